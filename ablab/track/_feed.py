# SPDX-License-Identifier: MIT
"""What a tracker is sent of a trial, and how far it is: a function of the result files and a cursor."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from ablab import kconf, machine, rundir
from ablab.rundir import Campaign, Mirror, TrialDir
from ablab.track import NOTHING, Mark, Run

HIDDEN = ("TRACK", "TELEM", "STUDY")  # families that say nothing about a trial


class Cursor:
    """What is known to be with a tracker: {trial: {attempt: mark}}, states, and how often it was sent afresh.

    A file that grows by a line for each change; the last one of a trial and attempt counts.
    """

    def __init__(self, files: Mirror) -> None:
        self._path = files.cursor
        self._header = {"tracker": files.name}
        self.marks: dict[str, dict[int, Mark]] = {}
        self.states: dict[str, str] = {}
        self.recomputed: dict[str, int] = {}
        self.copy = 1
        reader = rundir.lines(files.cursor, "cursor")
        next(reader, None)
        for row in reader:
            self._fold(row)
        self._rows: rundir.Rows | None = None

    def _fold(self, row: Mapping[str, Any]) -> None:
        if "copy" in row:
            self.copy, self.marks, self.states, self.recomputed = row["copy"], {}, {}, {}
            return
        trial, mark = row["trial"], Mark(row["attempt"], row["q"], row["n"])
        self.states[trial] = row["state"]
        self.recomputed[trial] = row["recomputed"]
        if mark > NOTHING:
            self.marks.setdefault(trial, {})[mark.attempt] = mark

    def last(self, trial: str) -> Mark:
        return max(self.marks.get(trial, {}).values(), default=NOTHING)

    def is_closed(self, trial: str, attempt: int) -> bool:
        """True if all rows of a trial were delivered when it ended in this attempt."""
        return self.states.get(trial) == "closed" and self.last(trial).attempt == attempt

    def total(self) -> int:
        """Rows of all trials."""
        return sum(self.last(trial).n + 1 for trial in self.marks)

    def put(self, trial: str, mark: Mark, state: str, recomputed: int) -> None:
        """Append how far a trial is."""
        self._line({"trial": trial, **mark._asdict(), "state": state, "recomputed": recomputed})

    def fresh(self) -> None:
        """Forget everything: the next runs are copies under other ids."""
        self._line({"copy": self.copy + 1})

    def _line(self, row: Mapping[str, Any]) -> None:
        self._rows = self._rows or rundir.Rows(self._path, "cursor", self._header)
        self._rows.line(row)
        self._fold(row)


class Feed:
    """Rows of one trial that are not sent yet, in order, each name once at a step.

    An attempt counts up to the step where a later one resumed, as in `rundir.rows`; where more of it was sent
    already, what the later one computes again is counted and left out.
    """

    def __init__(self, trial: TrialDir, sent: Mapping[int, Mark], recomputed: int = 0) -> None:
        self.trial, self.sent, self.recomputed = trial, dict(sent), recomputed
        self.n = max(sent.values(), default=NOTHING).n
        self.attempt = 0
        self._tail: rundir.Tail | None = None
        self._seen: set[tuple[int, str]] = set()

    def read(self, limit: int) -> list[tuple[Mark, int, dict[str, Any]]]:
        """(mark, rows left out so far, row) of at most `limit` new rows, all of one attempt."""
        found: list[tuple[Mark, int, dict[str, Any]]] = []
        while not found:
            later = self._resumed(self.attempt + 1)
            if self._tail is None and not self._next(later):
                break
            last = min((start or -1 for number, start in later.items() if number > self.attempt), default=math.inf)
            rows = self._tail.read(limit)
            for row in rows:
                before = self.sent.get(self.attempt, NOTHING)
                if row["q"] <= before.q or row["step"] > last:
                    continue
                m = {n: v for n, v in row["m"].items() if (row["step"], n) not in self._seen}
                self.recomputed += not m
                if m:
                    self.n += 1
                    mark = self.sent[self.attempt] = Mark(self.attempt, row["q"], self.n)
                    found.append((mark, self.recomputed, {**row, "m": m}))
            if not rows:
                if not any(number > self.attempt for number in later):
                    break
                self.close()
        return found

    def unread(self) -> int:
        """Lines that `read` has not met yet; more than it will give where a later attempt computed them again."""
        count = self._tail.unread() if self._tail else 0
        for number in self._resumed(self.attempt + 1):
            with contextlib.closing(rundir.Tail(self.trial.attempt(number).metrics)) as tail:
                count += tail.unread()
        return count

    def close(self) -> None:
        if self._tail:
            self._tail.close()
            self._tail = None

    def _resumed(self, first: int) -> dict[int, int]:
        """Attempt -> step where it resumed, of those that have rows, from number `first` on."""
        found = {}
        for attempt in (a for a in self.trial.attempts() if a.number >= first):
            header = next(rundir.lines(attempt.metrics, "metrics"), None)
            if header:
                found[attempt.number] = header["resumed_at_step"]
        return found

    def _next(self, later: Mapping[int, int]) -> bool:
        """Go to the next attempt; on a start straight to that of the last row that was sent."""
        known = [number for number in later if number >= max(self.sent, default=0)]
        if not known:
            return False
        self.attempt = min(known)
        start = later[self.attempt]
        self._seen = {
            (row["step"], name)
            for number, mark in self.sent.items()
            if number < self.attempt
            for row in rundir.lines(self.trial.attempt(number).metrics, "metrics", None, '"q":')
            if row.get("q", math.inf) <= mark.q and row["step"] >= start
            for name in row["m"]
        }
        self._tail = rundir.Tail(self.trial.attempt(self.attempt).metrics)
        return True


def run_of(trial: TrialDir, files: Mirror, copy: int, state: str) -> Run:
    """What a tracker calls a trial that has been started."""
    campaign = trial.campaign
    identity = hashlib.sha256(f"{campaign.hash} {trial.record['hash']}".encode()).hexdigest()[:24]
    manifest = trial.manifest() or next(filter(None, (a.read("manifest") for a in trial.attempts()[::-1])), None) or {}
    return Run(
        id=identity if copy == 1 else f"{identity}-r{copy}",
        name=trial.record["id"],
        group=campaign.name,
        job=trial.record["step"] or "base",
        config=_config(trial, manifest),
        folder=files.data,
        gpus=_indices([d["uuid"] for d in manifest.get("devices", ())]),
        state=state,
    )


def _config(trial: TrialDir, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Flat configuration; nothing in it says where this machine keeps its files."""
    tree = kconf.load()
    values = kconf.settle(tree, [kconf.lex(trial.config)]).values
    kept = {n: v for n, v in values.items() if n.partition("_")[0] not in HIDDEN and tree.symbols[n].type != "path"}
    batch, data = manifest.get("batch", {}), trial.campaign.content["data"]
    return {
        "run_name": trial.record["id"],
        "batch_size": batch.get("micro"),
        "gradient_accumulation": batch.get("accum"),
        "effective_batch_size": batch.get("effective"),
        "learning_rate": values.get("OPT_LR"),
        "warmup_steps": values.get("SCHED_WARMUP"),
        "max_time": values.get("TRAIN_TIME") or values["TRAIN_CAP_TIME"] or None,
        "compile_model": manifest.get("resolved", {}).get("compile") == "on",
        "git_commit": trial.campaign.content["code"]["commit"],
        "seed": trial.record["seed"],
        "dataset": data["name"],
        "campaign": trial.campaign.name,
        "trial": trial.record["hash"],
        **{n: ",".join(map(str, v)) if isinstance(v, tuple) else v for n, v in kept.items()},
    }


def _indices(uuids: list[str]) -> tuple[int, ...]:
    """Indices of NVIDIA devices by their UUID."""
    text = machine.command(["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]) if uuids else ""
    pairs = (line.split(", ") for line in text.splitlines())
    return tuple(int(index) for index, uuid in pairs if uuid in uuids)


def payload(row: Mapping[str, Any], mark: Mark, epoch: int | None) -> dict[str, float]:
    """A row as services get it: metrics, axes, and the names of axes and metrics that scripts know."""
    m = {name: math.nan if value is None else value for name, value in row["m"].items()}
    axes = {name: row[name] for name in ("step", "tokens", "train_s", "wall_s", "flops") if name in row}
    more = {"iteration": row["step"], "attempt": mark.attempt, "q": mark.q}
    if epoch and "tokens" in row:
        more["epoch"] = row["tokens"] / epoch
    if "time/epoch_s" in m:
        more["epoch_time"] = m["time/epoch_s"]
    return {**m, **axes, **more}


def epoch_tokens(campaign: Campaign) -> int | None:
    """Tokens of the training split; None where the manifest of the data is gone."""
    try:
        manifest = json.loads((kconf.ROOT / campaign.content["data"]["manifest"]).read_text())
        return int(manifest["splits"]["train"]["tokens"])
    except (OSError, ValueError, KeyError):
        return None


def left(files: Mirror) -> int:
    """Rows that a tracker does not have yet."""
    cursor, count = Cursor(files), 0
    for trial in files.campaign.trials():
        with contextlib.closing(Feed(trial, cursor.marks.get(trial.name, {}))) as feed:
            while rows := feed.read(1000):
                count += len(rows)
    return count
