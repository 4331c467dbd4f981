# SPDX-License-Identifier: MIT
"""Trackers: services that mirror the rows of trials for people to look at; nothing is read back from them.

A member is used by the mirror process alone (`_mirror.py`), one instance for each trial, and imports its package in
its methods.  It may raise what it likes, hang or die: the process is killed and started anew, and goes on behind what
the service has.
"""

import importlib.util
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ablab import plugin
from ablab.plugin import Plugin


class Mark(NamedTuple):
    """Which row: `q` counts rows of the attempt, `n` the rows that were sent of this trial."""

    attempt: int
    q: int
    n: int


NOTHING = Mark(0, -1, -1)


class ConflictError(Exception):
    """The service has a run of our name that is not ours, or has lost the one that we wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a tracker calls a trial."""

    id: str
    """24 hex digits, and -r2, .. for a fresh copy."""
    name: str
    group: str
    job: str
    config: Mapping[str, Any]
    """Flat: names that scripts read, and the symbols; no path."""
    folder: Path
    """Where the tracker may write files."""
    gpus: tuple[int, ...]
    """Devices of the trial, by the index that the driver gives them."""
    state: str
    """`new`: never opened; `opening`: somebody died while opening it; `open`: it exists."""


class Track(Plugin, family="TRACK"):
    """Base of the trackers."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """TRACK_* symbols that every tracker shares."""

        project: str
        deadline_s: int
        """How long the end of a campaign waits."""

    package: ClassVar[str]
    """What must be installed."""
    environment: ClassVar[tuple[str, ...]] = ()
    """Variables that its process gets beside the usual ones: where it logs in."""
    rebuilds: ClassVar[bool] = False
    """It writes all rows anew when it is opened."""

    def installed(self) -> None:
        """Raises PluginError, naming the extra, where the package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            raise plugin.missing(self.symbol, self.package)

    @abstractmethod
    def ready(self) -> None:
        """Called once before a campaign starts; raises ValueError where the package is missing or nobody is logged
        in."""

    @abstractmethod
    def open(self, run: Run) -> Mark:
        """Make or resume the run; returns the last row that the service has, NOTHING for none.  Raises
        ConflictError."""

    @abstractmethod
    def row(self, mark: Mark, row: Mapping[str, float]) -> None:
        """Send a row: metrics and axes, `attempt` and `q` too; nan stands for what was not finite."""

    @abstractmethod
    def kept(self) -> Mark:
        """The last row that is safe with the service: it would be there if we died now."""

    @abstractmethod
    def close(self, state: str) -> None:
        """The trial ended in this state; all rows are kept."""

    @abstractmethod
    def address(self, run: Run) -> str:
        """Where `fetch` finds a run of ours."""

    @abstractmethod
    def fetch(self, address: str) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """Configuration and every row of a run, with `step`, never a sample.  Raises ValueError where it is not."""
