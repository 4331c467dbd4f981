# SPDX-License-Identifier: MIT
"""Trackers that fail on purpose, and the process that uses them: `python -m tests.track.faults VERB PLACE ..`.

Each keeps its rows in a file, which stands for the service.  One called `raises` fails at every third row and then
goes on; `never` never takes one.
"""

import errno
import json
import os
import signal
import sys
import time

from ablab.track import NOTHING, Mark, Track, _mirror
from ablab.track.__main__ import main

EVERY = 3


class Service(Track):
    """What the faults have in common."""

    package = "json"

    def ready(self) -> None:
        self.installed()

    def open(self, run):
        run.folder.mkdir(exist_ok=True)
        self.path = run.folder / f"{run.name}-{run.id}.jsonl"
        self.failed = run.folder / "failed"
        rows = self.fetch(str(self.path))[1] if self.path.exists() else []
        self.last = Mark(rows[-1]["attempt"], rows[-1]["q"], len(rows) - 1) if rows else NOTHING
        return self.last

    def row(self, mark, row):
        if mark.n % EVERY == 0 and not (self.failed / str(mark.n)).exists():
            self.failed.mkdir(exist_ok=True)
            (self.failed / str(mark.n)).touch()
            self.fault()
        with open(self.path, "a") as file:
            file.write(json.dumps({**row, "n": mark.n}) + "\n")
        self.last = mark

    def fault(self):
        raise RuntimeError("planted")

    def kept(self):
        return self.last

    def close(self, state):
        pass

    def address(self, run):
        return str(run.folder / f"{run.name}-{run.id}.jsonl")

    def fetch(self, address):
        with open(address) as file:
            return {}, [json.loads(line) for line in file]


class Raises(Service, symbol="TRACK_RAISES"):
    """An exception."""


class Sleeps(Service, symbol="TRACK_SLEEPS"):
    """A call that does not return."""

    def fault(self):
        time.sleep(1000)


class Dies(Service, symbol="TRACK_DIES"):
    """A package that takes the process down."""

    def fault(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Busy(Service, symbol="TRACK_BUSY"):
    """A service that asks for patience."""

    def fault(self):
        raise RuntimeError("429 Too Many Requests")


class Full(Service, symbol="TRACK_FULL"):
    """A disk without room, after half a line that nobody wanted."""

    def fault(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Never(Service, symbol="TRACK_NEVER"):
    """A service that is gone."""

    def row(self, mark, row):
        raise ConnectionError("no route to the service")


class Slow(Service, symbol="TRACK_SLOW"):
    """A service that takes its time: what a random kill interrupts."""

    def row(self, mark, row):
        time.sleep(0.002)
        self.failed.mkdir(exist_ok=True)
        (self.failed / str(mark.n)).touch()
        super().row(mark, row)


if __name__ == "__main__":
    _mirror.CALL_S, _mirror.FIRST_S, _mirror.LONGEST_S, _mirror.LOOK_S = 1.0, 0.05, 0.1, 0.1
    _mirror.BATCH = 4
    sys.exit(main(sys.argv[1:], "tests.track.faults"))
