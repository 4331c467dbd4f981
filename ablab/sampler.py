# SPDX-License-Identifier: MIT
"""The process that writes telemetry: one for each campaign and host, beside the trainers and not in them.

It finds the trials that run on this host by the journal, samples the devices that each says it opened, and appends to
the telemetry of its attempt.  It ends when its runner and the trials are gone, whoever was killed; nobody waits for it.
"""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablab import config, kconf, machine, rundir
from ablab.journal import Journal, TrialState
from ablab.rundir import Campaign, Rows, RunError, TrialDir
from ablab.telemetry import HOST, Telemetry


def members(text: str) -> tuple[tuple[Telemetry, ...], float]:
    """What the text of a configuration selects, in order of preference, and seconds between samples."""
    found = {r.name: r.text for r in kconf.lex(Path("config"), text).requests if (r.name or "").startswith("TELEM_")}
    values = {name: int(t) if t.isdecimal() else t == "y" for name, t in found.items()}  # settled when it was planned
    made = config.create("TELEM", values)
    return made, made[0].section.period_ms / 1000 if made else 1.0


def tree(pid: int) -> tuple[int, ...]:
    """A process and all below it, itself first; only itself where the kernel lists no children."""
    found = [pid]
    for parent in found:
        with suppress(OSError):  # a thread or process that ended
            for thread in os.scandir(f"/proc/{parent}/task"):
                with suppress(OSError), open(f"{thread.path}/children", "rb") as file:
                    found += map(int, file.read().split())
    return tuple(found)


class Sampler:
    """Samples the trials of a campaign."""

    def __init__(
        self,
        campaign: Campaign,
        readers: Sequence[Telemetry],
        period_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.campaign, self.readers, self.period_s = campaign, readers, period_s
        self._clock = clock or time.monotonic
        self._journal = Journal.of(campaign)
        self._status: dict[str, tuple[Any, dict[str, Any]]] = {}
        """What status.json held, by what the file was then."""
        self._open: dict[str, tuple[int, Rows]] = {}
        """Attempt and its rows, of the trials that run."""
        self._stale: dict[str, float] = {}
        """When a device of a slow reader was last written."""

    def tick(self) -> int:
        """Write one sample of each trial that runs here; returns their number."""
        running = {n for n, e in self._journal.replay().items() if e.state is TrialState.RUNNING}
        live = {n: status for n in running if (status := self._live(self.campaign.trial(n)))}
        for name in self._open.keys() - live.keys():
            self._open.pop(name)[1].close()
        for name, status in live.items():
            with suppress(OSError):  # a full disk: a gap, and the trainer knows what to do
                self._rows(name, status["attempt"]).line(self.sample(status))
        return len(live)

    def sample(self, status: dict[str, Any]) -> dict[str, Any]:
        """{t, devices: {identity: reading}, host: reading} of a trial."""
        pids = tree(status["pid"])
        found = {device: r for device in status["devices"] if (r := self._read(device, pids))}
        return {"t": self._clock(), "devices": found, "host": self._read(HOST, pids) or {}}

    def _read(self, device: str, pids: tuple[int, ...]) -> dict[str, Any] | None:
        """By the first reader that knows the device; a slow one is not written twice for one reading."""
        for reader in self.readers:
            if (found := reader.sample(device, pids)) is not None:
                now = self._clock()
                if reader.every_s and now - self._stale.get(device, -reader.every_s) < reader.every_s:
                    return None
                self._stale[device] = now
                return found
        return None

    def _live(self, trial: TrialDir) -> dict[str, Any] | None:
        """What a trial says of itself, if its process runs on this host."""
        try:
            facts = os.stat(trial.file("status"))
            stamp = facts.st_ino, facts.st_mtime_ns
            if self._status.get(trial.name, (None,))[0] != stamp:
                self._status[trial.name] = stamp, trial.status() or {}
        except (OSError, RunError):
            return None
        status = self._status[trial.name][1]
        here = status and (status["host"], status["boot_id"]) == (machine.host(), machine.boot_id())
        return status if here and machine.proc_start(status["pid"]) == status["proc_start"] else None

    def _rows(self, name: str, attempt: int) -> Rows:
        if self._open.get(name, (0,))[0] != attempt:
            if name in self._open:
                self._open.pop(name)[1].close()
            place = self.campaign.trial(name).attempt(attempt).telemetry
            header = {"trial": name, "attempt": attempt, "period_ms": round(1000 * self.period_s)}
            self._open[name] = attempt, Rows(place, "telemetry", header)
        return self._open[name][1]

    def close(self) -> None:
        for _, rows in self._open.values():
            rows.close()


def main(path: str, runner: str) -> int:
    """Sample until the runner, `pid:start`, and all trials of the campaign on this host are gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    campaign = Campaign.open(Path(path))
    readers, period_s = members(campaign.content["base"]["config"])
    pid, _, start = runner.partition(":")
    with open(campaign.sampler_lock(machine.boot_id()), "ab", opener=rundir.no_link) as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # another runner's sampler serves this host: we wait until it ends
        sampler = Sampler(campaign, readers, period_s)
        due = time.monotonic()
        try:
            while sampler.tick() or str(machine.proc_start(int(pid))) == start:
                due = max(due + period_s, time.monotonic())  # late once is late once
                time.sleep(due - time.monotonic())
        finally:
            sampler.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
