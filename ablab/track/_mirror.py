# SPDX-License-Identifier: MIT
"""The mirror process of a campaign.

It starts a worker for each tracker, which tails the rows of all trials.  A call of a tracker that raises, takes longer
than CALL_S or takes the worker down costs that worker: it is started anew after a while, and its tracker tells what it
has.  When standard input ends, so does the mirror, once everything is delivered.
"""

import faulthandler
import fcntl
import math
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablab import kconf, plugin
from ablab.bind import bind
from ablab.journal import Journal
from ablab.kconf import ROOT
from ablab.rundir import Campaign, Mirror, TrialDir, no_link
from ablab.track import NOTHING, ConflictError, Mark, Track, _feed

QUEUE = 4096  # rows that wait for a tracker; when it is full no more are read
BATCH = 256  # rows between two looks at what the service has
CALL_S = 10.0
LOOK_S, TICK_S = 1.0, 0.1
FIRST_S, LONGEST_S = 0.5, 60.0  # before a worker is started anew; doubles each time
TRIES = 5  # of `sync`, without a row delivered
CONFLICT, BUSY = 3, 4  # exit codes of a worker


def symbol_of(name: str) -> str:
    return f"TRACK_{name.partition(':')[0].upper()}"


def made(name: str, values: Mapping[str, Any]) -> Track:
    """The member of a name such as `trackio` or `wandb:offline`."""
    symbol, mode = symbol_of(name), name.partition(":")[2]
    cls = plugin.find(symbol)
    chosen = {n: n.endswith(f"_{mode.upper()}") for n in values if mode and n.startswith(f"{symbol}_MODE_")}
    values = {**values, **chosen}
    return cls(bind(cls.Config, symbol, values), bind(cls.Section, "TRACK", values))


def values_of(names: Sequence[str], text: str) -> dict[str, Any]:
    """Typed values of a configuration, with the trackers of these names on, so that their symbols show."""
    tree = kconf.load()
    known = {symbol_of(n) for n in names} & tree.symbols.keys()
    on = [kconf.request(symbol, "y", "mirror") for symbol in sorted(known)]
    base = kconf.settle(tree, [kconf.lex(Path("config"), text)]).minimal()
    return kconf.settle(tree, [kconf.lex(Path("base"), base), kconf.Layer("mirror", tuple(on))]).values


class _Trial:
    """One trial on its way to one tracker."""

    def __init__(self, trial: TrialDir, cursor: _feed.Cursor) -> None:
        self.trial, self.cursor, self.name = trial, cursor, trial.name
        self.member: Track | None = None
        self.state = cursor.states.get(trial.name, "new")
        self.sent: deque[tuple[Mark, int]] = deque()  # not known to be safe yet
        self.feed: _feed.Feed | None = None
        self.go_on(NOTHING)

    def go_on(self, mark: Mark) -> None:
        """Read on behind what the service has, or the cursor if that is further."""
        marks = dict(self.cursor.marks.get(self.name, {}))
        if mark > self.cursor.last(self.name):
            marks[mark.attempt] = mark
        if self.feed:
            self.feed.close()
        self.feed = _feed.Feed(self.trial, marks, self.cursor.recomputed.get(self.name, 0))

    def put(self, state: str, mark: Mark | None = None, recomputed: int | None = None) -> None:
        """Write the cursor."""
        self.state = state
        count = self.feed.recomputed if recomputed is None else recomputed
        self.cursor.put(self.name, mark or self.cursor.last(self.name), state, count)


class Worker:
    """Sends the rows of a campaign to one tracker until it is told to end and everything is delivered."""

    def __init__(self, campaign: Campaign, name: str, ended: Callable[[float], bool]) -> None:
        self.campaign, self.name, self.ended = campaign, name, ended
        self.files = files_of(campaign, name)
        self.values = values_of([name], campaign.content["base"]["config"])
        self.rebuilds = made(name, self.values).rebuilds
        self.cursor = _feed.Cursor(self.files)
        if self.rebuilds:
            self.cursor.fresh()
        self.epoch = _feed.epoch_tokens(campaign)
        self.trials: dict[str, _Trial] = {}
        self.idle: dict[str, Any] = {}
        """Trials that have nothing to send, and where their journal stood when that was so."""
        self.told: Any = None

    def work(self) -> int:
        """The exit code."""
        journal, end = Journal.of(self.campaign), False
        while True:
            end = end or self.ended(0)
            entries, busy, waits = journal.replay(), False, False
            for folder in self.campaign.records():
                entry = entries.entry(folder)
                if self.idle.get(folder) == entry or not entry.attempt:
                    continue
                finished = entry.state.is_finished()
                if folder not in self.trials:
                    if finished and self.cursor.is_closed(folder, entry.attempt):
                        self.idle[folder] = entry
                        continue
                    self.trials[folder] = _Trial(self.campaign.trial(folder), self.cursor)
                trial = self.trials[folder]
                moved = self.step(trial)
                busy, waits = busy or moved, waits or bool(trial.sent)
                if not moved and not trial.sent and (finished or end):
                    self.close(trial, entry.state.value, finished)
                    if finished:
                        self.idle[folder] = entry
            self.tell("sends" if busy or waits else "synced")
            if end and not (busy or waits):
                conflict = any(t.state == "conflict" for t in self.trials.values())
                self.tell("conflict" if conflict else "synced")
                return CONFLICT if conflict else 0
            if end:
                time.sleep(0 if busy else TICK_S)
            elif not busy:
                end = self.ended(TICK_S if waits else LOOK_S)

    def step(self, trial: _Trial) -> bool:
        """Send what is new; True if there was something."""
        if trial.state == "conflict":
            return False
        if trial.member is None:
            return bool(trial.feed.read(1)) and self.open(trial)
        room = QUEUE - sum(len(t.sent) for t in self.trials.values())
        found = trial.feed.read(min(room, BATCH)) if room > 0 else []
        for mark, recomputed, row in found:
            self.call(trial.member.row, mark, _feed.payload(row, mark, self.epoch))
            trial.sent.append((mark, recomputed))
        if trial.sent:
            kept, last = self.call(trial.member.kept), None
            while trial.sent and trial.sent[0][0] <= kept:
                last = trial.sent.popleft()
            if last:
                trial.put("open", *last)
        return bool(found)

    def open(self, trial: _Trial) -> bool:
        """Open the run and start over behind what it has; False on a conflict."""
        state = trial.state if trial.state in ("new", "opening") else "open"
        run = _feed.run_of(trial.trial, self.files, 1 if self.rebuilds else self.cursor.copy, state)
        if state == "new":
            trial.put("opening")
        member = made(self.name, self.values)
        try:
            mark = self.call(member.open, run)
        except ConflictError as error:
            trial.put("conflict")
            print(f"{trial.name}: {error}", file=sys.stderr, flush=True)
            return False
        trial.go_on(mark)
        trial.put("open", max(mark, self.cursor.last(trial.name)))
        trial.member = member
        return True

    def close(self, trial: _Trial, state: str, finished: bool) -> None:
        if trial.member:
            self.call(trial.member.close, state)
            trial.member = None
            trial.put("closed" if finished else "open")  # a child that outlives its runner writes on
        trial.feed.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a tracker; the process ends where that takes too long."""
        # a timer of C: a package that holds the interpreter's lock does not hold this one
        faulthandler.dump_traceback_later(CALL_S, exit=True)
        try:
            return function(*arguments)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def tell(self, state: str) -> None:
        left = sum(len(t.sent) + t.feed.unread() for t in self.trials.values() if t.name not in self.idle)
        left = _feed.left(self.files) if state == "conflict" else left
        said = (state, self.cursor.total(), left)
        if said != self.told:
            self.told = said
            tell(self.files, *said, recomputed=sum(self.cursor.recomputed.values()))


def files_of(campaign: Campaign, name: str) -> Mirror:
    """Files of a tracker; its modes have files of their own."""
    return Mirror(campaign, name.replace(":", "-"))


def tell(files: Mirror, state: str, sent: int, left: int, recomputed: int = 0, error: str | None = None) -> None:
    """Write down for people how far a tracker is."""
    content = {"tracker": files.name, "state": state, "sent": sent, "left": left, "recomputed": recomputed}
    files.write("mirror", {**content, "error": error})


def work(campaign: Campaign, name: str) -> int:
    """A worker; one at a time for each tracker of a campaign."""
    os.nice(10)  # training comes first
    files = files_of(campaign, name)
    with open(files.lock, "ab", opener=no_link) as lock:
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if ended(LOOK_S):
                    return BUSY
        try:
            return Worker(campaign, name, ended).work()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # threads of a tracker may not want to end


def ended(wait_s: float) -> bool:
    """True once standard input has ended, after at most so many seconds."""
    return bool(select.select([0], [], [], wait_s)[0]) and not os.read(0, 1)


class _Child:
    """A worker as its supervisor sees it."""

    def __init__(self, campaign: Campaign, name: str, module: str) -> None:
        self.campaign, self.name, self.module = campaign, name, module
        self.files = files_of(campaign, name)
        self.process: subprocess.Popen | None = None
        self.code: int | None = None
        self.tries, self.due, self.reached = 0, 0.0, -1

    def start(self) -> None:
        command = [sys.executable, "-m", self.module, "work", str(self.campaign.path), self.name]
        env = dict(os.environ)
        for symbol in plugin.members("TRACK"):  # the login of one is a secret for the others
            if symbol != symbol_of(self.name):
                env = {k: v for k, v in env.items() if k not in plugin.find(symbol).environment}
        with open(self.files.log, "ab", opener=no_link) as log:
            self.logged = log.tell()
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def look(self, end: bool) -> None:
        """Take note of its end, start it when it is due, tell it to end."""
        if self.process is None and time.monotonic() >= self.due:
            self.start()
        if self.process is None:
            return
        if end and self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        if (code := self.process.poll()) is None:
            return
        self.kill()
        if code in (0, CONFLICT, BUSY):
            self.code = code
            return
        cursor = _feed.Cursor(self.files)
        sent = cursor.total()
        self.tries = 1 if sent > self.reached else self.tries + 1
        self.reached = max(sent, self.reached)
        self.due = time.monotonic() + min(LONGEST_S, FIRST_S * 2 ** (self.tries - 1))
        with suppress(OSError):  # a full disk: the next one may find room
            tell(self.files, "behind", sent, _feed.left(self.files), sum(cursor.recomputed.values()), self.why(code))

    def why(self, code: int) -> str:
        """The last line that it wrote, without what only its log needs."""
        lines = self.files.log.read_bytes()[self.logged :].decode(errors="replace").splitlines()
        if any(line.startswith("Timeout (") for line in lines):
            return f"a call took longer than {CALL_S:.0f} s"
        return (f"killed by signal {-code}" if code < 0 else lines[-1] if lines else f"exit code {code}")[:300]

    def leave(self) -> None:
        """Give up, and write down what is left."""
        self.kill()
        cursor, error = _feed.Cursor(self.files), (self.files.state() or {}).get("error")
        if left := _feed.left(self.files):
            recomputed = sum(cursor.recomputed.values())
            with suppress(OSError):
                tell(self.files, "behind", cursor.total(), left, recomputed, error or "out of time")

    def kill(self) -> None:
        """End the worker and the processes that its tracker started."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdin:
                self.process.stdin.close()
            self.process = None


def supervise(campaign: Campaign, names: Sequence[str], module: str, once: bool) -> int:
    """Keep a worker for each tracker until standard input ends, and TRACK_DEADLINE_S longer; `once` ends when all is
    delivered, and gives up on a worker that fails TRIES times without a row delivered."""
    children, end, stop = [_Child(campaign, name, module) for name in names], once, []
    values = values_of(names, campaign.content["base"]["config"])
    wait_s = math.inf if once else max(made(name, values).section.deadline_s for name in names)
    leave_at = math.inf
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    while not stop and (left := [c for c in children if c.code is None]):
        for child in left:
            child.look(end)
            if once and child.process is None and child.tries >= TRIES:
                child.code = 1
        if end:
            time.sleep(TICK_S)
        elif ended(TICK_S):
            end, leave_at = True, time.monotonic() + wait_s
        if time.monotonic() >= leave_at:
            break
    for child in children:
        if child.code is None:
            child.leave()
    return max((1 if c.code is None else c.code for c in children), default=0)


def ready(names: Sequence[str], text: str) -> int:
    """0 if every tracker could be used now; else 2, and why."""
    values = values_of(names, text)
    for name in names:
        try:
            made(name, values).ready()
        except ValueError as error:
            print(f"TRACKER={name}: error: {error}")
            return 2
    return 0
