# SPDX-License-Identifier: MIT
"""Runs of a tracker behind the names that trials of this machine answer to: SOURCE=wandb and SOURCE=trackio.

A source tells its runs, and the rows of one; what they mean is said once, here.  W&B is asked by `_wandb`, a process
of its own, since nothing in the report imports a tracker; Trackio is a SQLite file.
"""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ablab import metrics, rundir
from ablab.report import index
from ablab.report.load import Curves, NothingError, QueryError, flat, unit
from ablab.report.table import Cell, Table, merge

Row = dict[str, Any]
_SPECIAL = {"NaN", "Infinity", "-Infinity"}
_CLOCKS = {"attempt", "q", "_step", "_runtime", "_timestamp", "timestamp", "iteration", "epoch", *metrics.AXES}
# system.gpu.<i>.<name> of the event stream -> our name under gpu/<i>/, and the factor to its unit
_EVENTS = {
    "gpu": ("compute_util_avg", 1.0),
    "memory": ("memory_util_avg", 1.0),
    "memoryAllocatedBytes": ("memory_used_avg_gb", 1e-9),
    "powerWatts": ("power_w", 1.0),
    "enforcedPowerLimitWatts": ("power_limit_w", 1.0),
    "temp": ("temp_max_c", 1.0),
    "smClock": ("sm_mhz", 1.0),
    "memoryClock": ("mem_mhz", 1.0),
}
BRIEF = ("compute_util_avg", "memory_util_avg", "memory_used_avg_gb")
_GPU = re.compile(r"gpu/(?:(\d+)/)?(\w+)")
_EVENT = re.compile(r"(?:system\.)?gpu\.(\d+)\.(\w+)")


class SourceError(ValueError):
    """A tracker that cannot be read; the text says what to do."""


@dataclass(frozen=True)
class Head:
    """What a source says of a run before its rows are read."""

    id: str
    name: str
    project: str
    state: str
    step: str | None
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


class Source(Protocol):
    """A tracker that holds runs."""

    def heads(self) -> list[Head]:
        """All runs of the project."""

    def rows(self, run: Head) -> tuple[Sequence[Row], Sequence[Row]]:
        """(history, system events) of a run: every row, in order, never a sample."""


@dataclass(frozen=True)
class Run(Curves):
    """A run of a tracker, as `query` and `compare` take it."""

    head: Head
    source: Source
    built = manifest = {}  # only a trial of this machine has them
    base = None
    decays = True
    """Nothing tells, and an earlier row must not pass for a result."""

    @property
    def id(self) -> str:
        return self.head.name

    @property
    def hash(self) -> str:
        return self.head.id

    @property
    def campaign(self) -> str:
        return self.head.project

    @property
    def state(self) -> str:
        return self.head.state

    @property
    def step(self) -> str | None:
        return self.head.step

    @property
    def arm(self) -> str:
        return self.head.step or self.head.name

    @property
    def seed(self) -> int | None:
        seed = self.head.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def is_done(self) -> bool:
        return self.state == "finished"

    @property
    def primary(self) -> tuple[str, str]:
        return "val_loss", "final"

    @property
    def values(self) -> dict[str, str]:
        """Its configuration by dotted name, without what only names the run."""
        return {k: v for k, v in flat(self.head.config) if k not in ("seed", "run_name")}

    @property
    def final(self) -> dict[str, float]:
        """Numbers of its summary; without one, as in Trackio, the last of each metric."""
        found = {k: v for k, v in self.head.summary.items() if type(v) in (int, float) and k not in _CLOCKS}
        return found or {name: self.over(name, "final") or 0.0 for name in self.columns.spans}

    @property
    def peak_gib(self) -> float | None:
        return self.over("memory/allocated_peak_gib", "max")

    def setter(self, symbol: str) -> None:
        """A tracker does not know."""

    def value(self, key: str, mode: str = "final") -> float | None:
        """A metric as `over` has it, of a finished run."""
        return self.over(key, mode) if self.is_done else None

    @cached_property
    def columns(self) -> index.Columns:
        history, events = self.source.rows(self.head)
        rows = [_row(r) for r in history]
        return index.pack([*rows, *_in_steps(events, rows)])


def _row(r: Row) -> Row:
    """A row of a history as ours are: the step is what the run calls so, else the number of the row."""
    step = r.get("step", r.get("_step", 0))
    axes = {"wall_s": r.get("_runtime"), **{k: v for k, v in r.items() if k in metrics.AXES}}
    m = {k: None if isinstance(v, str) and v in _SPECIAL else v for k, v in r.items() if k not in _CLOCKS}
    return {**axes, "step": int(step), "m": {k: v for k, v in m.items() if v is None or type(v) in (int, float)}}


def _in_steps(events: Sequence[Row], rows: Sequence[Row]) -> Iterator[Row]:
    """System events under our names, at the last step before them."""
    clock, i = [r["wall_s"] or 0.0 for r in rows], 0
    for event in sorted(events, key=lambda e: e.get("_runtime", 0.0)):
        while i + 1 < len(rows) and clock[i + 1] <= event.get("_runtime", 0.0):
            i += 1
        m = {}
        for key, value in event.items():
            match = _EVENT.fullmatch(key)
            if match and match[2] in _EVENTS and type(value) in (int, float):
                name, factor = _EVENTS[match[2]]
                m[f"gpu/{match[1]}/{name}"] = value * factor
        if m:
            yield {"step": rows[i]["step"] if rows else 0, "wall_s": event.get("_runtime"), "m": m}


def find(v: Mapping[str, str], words: Sequence[str]) -> list[Run]:
    """Runs of SOURCE= ENTITY= PROJECT= by name (globs match), id, RUN_NAME= and RUN_ID=.

    Raises NothingError for a name without a run, QueryError for one of several, SourceError.
    """
    if "PROJECT" not in v:
        raise QueryError(f"SOURCE={v['SOURCE']}: of which project? add PROJECT=")
    source = SOURCES[v["SOURCE"]](v.get("ENTITY", ""), v["PROJECT"])
    known, found = source.heads(), {}
    wanted = [(w, False) for w in words] + [(v[n], n == "RUN_ID") for n in ("RUN_NAME", "RUN_ID") if n in v]
    if not wanted:
        raise QueryError("which runs? write names, globs or ids, or RUN_NAME= or RUN_ID=")
    for word, is_id in wanted:
        named = [] if is_id else [h for h in known if h.name == word]
        hits = named or [h for h in known if h.id == word]
        if len(hits) > 1:
            raise QueryError(f"{word}: {len(hits)} runs have this name; RUN_ID={' or '.join(h.id for h in hits)}")
        if not hits and not is_id:
            hits = [h for h in known if fnmatchcase(h.name, word)]
        if not hits:
            names = " ".join(dict.fromkeys(h.name for h in known[:8])) or "none"
            raise NothingError(f"{word}: no such run in {v['PROJECT']}; runs: {names}")
        found |= {h.id: h for h in hits}
    return [Run(h, source) for h in found.values()]


def gpu(runs: Sequence[Run], full: bool = False) -> Table:
    """What runs say of their devices: mean, quantiles and maximum over time, of BRIEF or of all quantities."""
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        found = [(m[1] or "all", m[2], name) for name in run.columns.spans if (m := _GPU.fullmatch(name))]
        for device, quantity, name in sorted(found, key=lambda f: (f[0] == "all", f[0].zfill(3), f[1])):
            if full or quantity in BRIEF:
                rows.append((run.campaign, run.id, device, quantity, unit(name), *_figures(*run.curve(name, "wall_s"))))
    columns = ("campaign", "trial", "device", "quantity", "unit", "mean", "median", "p5", "p95", "max")
    return merge(columns, rows, dict.fromkeys(columns[5:], ".4g"))


def _figures(seconds: np.ndarray, values: np.ndarray) -> tuple[float | None, ...]:
    """Mean, median, 5th and 95th percentile and maximum; a value stands for the time since the one before it."""
    if not len(values):
        return (None,) * 5
    spent = np.diff(seconds)
    weights = np.concatenate([[np.median(spent)], spent]) if len(spent) and spent.sum() > 0 else np.ones(len(values))
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    at = np.searchsorted(share, (0.5, 0.05, 0.95)).clip(max=len(values) - 1)
    return (float(np.average(values, weights=weights)), *values[order][at].tolist(), float(values.max()))


class Wandb:
    """Runs of a W&B project, by the package and the log-in of the user."""

    def __init__(self, entity: str, project: str) -> None:
        self._path = f"{entity}/{project}" if entity else project

    def heads(self) -> list[Head]:
        """All runs of the project."""
        return [Head(**line) for line in self._ask("heads")]

    def rows(self, run: Head) -> tuple[Sequence[Row], Sequence[Row]]:
        """History by the full scan, and the event stream."""
        lines = self._ask("rows", run.id)
        return [r["row"] for r in lines if "row" in r], [r["event"] for r in lines if "event" in r]

    def _ask(self, *words: str) -> list[Any]:
        command = [sys.executable, "-m", "ablab.report._wandb", self._path, *words]
        environment = {**os.environ, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise SourceError(f"wandb: {self._path}: {last}; check ENTITY, PROJECT and wandb login")
        return [json.loads(line) for line in done.stdout.splitlines()]


class Trackio:
    """Runs of a Trackio project, from its SQLite file on this machine."""

    def __init__(self, entity: str, project: str) -> None:
        if entity:
            raise QueryError(f"ENTITY={entity}: Trackio has projects only; leave it out")
        home = os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")
        folder = Path(os.environ.get("TRACKIO_DIR") or Path(home) / "trackio")
        # as trackio names it: other characters are dropped
        name = "".join(c for c in project if c.isalnum() or c in "-_") or "default"
        self._project, self._path = project, folder / f"{name}.db"
        if not self._path.exists():
            known = " ".join(sorted(p.stem for p in folder.glob("*.db"))) or "none"
            raise NothingError(f"{self._path}: no such project; projects: {known}; TRACKIO_DIR= names another folder")

    def _all(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        try:
            with closing(sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro", uri=True)) as file:
                return file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise SourceError(f"{self._path}: {error}; not a project of this version of Trackio") from None

    def heads(self) -> list[Head]:
        """All runs of the project; Trackio keeps no state, so each counts as finished."""
        configs = {id: json.loads(text) for id, text in self._all("SELECT run_id, config FROM configs")}
        runs = self._all("SELECT run_id, run_name FROM metrics GROUP BY run_id ORDER BY MIN(id)")
        return [
            Head(id, name, self._project, "finished", config.get("step"), config, {})
            for id, name in runs
            for config in [{k: v for k, v in configs.get(id, {}).items() if not k.startswith("_")}]
        ]

    def rows(self, run: Head) -> tuple[Sequence[Row], Sequence[Row]]:
        """All rows of both tables in the order of the log."""
        logged = self._all("SELECT step, metrics FROM metrics WHERE run_id = ? ORDER BY timestamp, id", run.id)
        system = self._all("SELECT metrics FROM system_metrics WHERE run_id = ? ORDER BY timestamp, id", run.id)
        return [{"_step": s, **json.loads(text)} for s, text in logged], [json.loads(text) for (text,) in system]


class Imported:
    """Runs that `ablab tracker import` brought here."""

    def __init__(self, results: Path) -> None:
        self._runs = {r.name: (r, r.origin()) for r in rundir.imported(results)}

    def heads(self) -> list[Head]:
        """All of them, whatever they came from."""
        project = "imported"
        return [Head(n, n, project, "finished", None, origin["config"], {}) for n, (_, origin) in self._runs.items()]

    def rows(self, run: Head) -> tuple[Sequence[Row], Sequence[Row]]:
        """All rows; there were no events.  Raises RunError where they are not what was imported."""
        place, origin = self._runs[run.id]
        if rundir.stamp(place.metrics)["sha256"] != origin["sha256"]:
            raise rundir.RunError(f"{place.metrics}: is not what was imported; remove {place.path}, import it again")
        return [{n: r[n] for n in metrics.AXES} | r["m"] for r in place.rows() if "m" in r], []


def imported(results: Path, pattern: str) -> list[Run]:
    """Imported runs by name; globs match.  Raises NothingError."""
    source = Imported(results)
    heads = source.heads()
    if not (found := [h for h in heads if fnmatchcase(h.name, pattern)]):
        names = " ".join(h.name for h in heads) or "none"
        raise NothingError(f"imported:{pattern}: no such run; imported: {names}; ablab tracker import brings one")
    return [Run(h, source) for h in found]


SOURCES: dict[str, Callable[[str, str], Source]] = {"wandb": Wandb, "trackio": Trackio}
