# SPDX-License-Identifier: MIT
"""results/.index/: the rows of a trial by column, and which DONE marks were verified; derived, rebuilt without loss.

    <campaign>/<trial>.columns     CRC32 and JSON on one line: sources, columns; then the arrays
    <campaign>/<trial>.verified    CRC32 and JSON on one line: all files that DONE vouches for

An entry counts only while every file it came from has the inode, size, modification and change time that it had
when it was read, and had been at rest for SETTLED_NS by then: what is written within one tick of a file system's
clock may not move its times.  The change time is the kernel's; an edit that puts size and modification time back
still moves it.  Nothing here is a proof, which hashing is: `Trial.flaw` of rundir always hashes.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ablab import machine, metrics, rundir
from ablab.rundir import TrialDir

SETTLED_NS = 2_000_000_000  # twice the coarsest tick in use, one second
VERSION = 1  # of the files; others are made again
FEW = 32  # trials that are read faster here than by processes that must start first
_scan = json.JSONDecoder().scan_once
_NUMBERS = {int, float, type(None)}
_HEAD = ("q", "t", *metrics.AXES, "attempt")


class Span(NamedTuple):
    """How often a metric was written, and the first and last step of that."""

    points: int
    first: int
    last: int


class Columns:
    """The merged rows of a trial: `spans` of its metrics, arrays on demand."""

    def __init__(self, head: Mapping[str, Any], fetch: Callable[[int, int], bytes]) -> None:
        self._columns: Mapping[str, Any] = head["columns"]
        self._fetch = fetch
        self.spans = {name: Span(*span) for name, span in head["spans"].items()}
        self.damage: list[str] = head["damage"]
        """Lines and values that are left out."""

    def axis(self, name: str) -> np.ndarray:
        """An axis, a value for each row; NaN where a row has none."""
        return self._array(f"@{name}")

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) of a metric, empty if it was never written; NaN stands for null."""
        if name not in self.spans:
            return np.empty(0, np.int64), np.empty(0)
        values = self._array(name)
        return self._array(f"#{name}") if f"#{name}" in self._columns else np.arange(len(values)), values

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The rows that have one of these metrics, with these alone, as rundir.rows gives them."""
        parts = [(name, *self.get(name)) for name in names if name in self.spans]
        if not parts:
            return []
        where = np.unique(np.concatenate([at for _, at, _ in parts]))
        cells = [_plain(self.axis(name)[where]) for name in _HEAD]
        found = [dict(zip(_HEAD, row, strict=True), m={}, bad=[]) for row in zip(*cells, strict=True)]
        for name, at, values in parts:
            for i, value in zip(np.searchsorted(where, at).tolist(), _plain(values), strict=True):
                found[i]["m"][name] = value
                if value is None:
                    found[i]["bad"].append(name)
        return found

    def _array(self, name: str) -> np.ndarray:
        offset, size, kind, crc = self._columns[name]
        data = self._fetch(offset, size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise _DamageError(name)
        return np.frombuffer(data, kind)


def _plain(values: np.ndarray) -> list[Any]:
    """Numbers of Python; None for NaN."""
    cells = values.tolist()
    return [None if v != v else v for v in cells] if np.isnan(values).any() else cells


class _DamageError(Exception):
    """An entry of the index is not what was written; it is made again."""


class _Stored(Columns):
    """Columns in a file of the index, or of the rows themselves once that file is gone, replaced or damaged."""

    def __init__(self, trial: TrialDir, path: Path, head: Mapping[str, Any], start: int) -> None:
        super().__init__(head, lambda offset, size: _slice(path, start + offset, size))
        self._trial = trial

    def _array(self, name: str) -> np.ndarray:
        try:
            return super()._array(name)
        except (_DamageError, OSError):
            fresh = pack(*_rows(self._trial))
            self._columns, self._fetch, self.spans = fresh._columns, fresh._fetch, fresh.spans
            return super()._array(name)


def _slice(path: Path, start: int, size: int) -> bytes:
    with rundir.plain(path) as file:
        file.seek(start)
        return file.read(size)


def columns(trial: TrialDir) -> Columns:
    """The rows of a trial, from the index if nothing changed since, else from its files."""
    path = trial.campaign.index / f"{trial.name}.columns"
    return _stored(trial, path) or _make(trial, path)


def prepare(trials: Sequence[TrialDir]) -> None:
    """Bring the index up to date for many trials, on all cores."""
    paths = [t.campaign.index / f"{t.name}.columns" for t in trials]
    todo = [str(t.path) for t, path in zip(trials, paths, strict=True) if not _stored(t, path)]
    if len(todo) > FEW and os.access(trials[0].campaign.path.parent, os.W_OK):
        with ProcessPoolExecutor(len(machine.cores()), multiprocessing.get_context("fork")) as pool:
            list(pool.map(_prepare, todo, chunksize=8))


def _prepare(place: str) -> None:
    path = Path(place)
    columns(TrialDir(rundir.Campaign(path.parents[1]), path.name, {"id": path.name}))


def _stored(trial: TrialDir, path: Path) -> Columns | None:
    try:
        with rundir.plain(path) as file:
            head = _unseal(file.readline())
            start = file.tell()
    except (OSError, rundir.RunError):
        return None
    if not isinstance(head, dict) or head.get("version") != VERSION:
        return None
    fresh = head["sources"] == _stamps(trial.path, [a.metrics for a in trial.attempts()])
    return _Stored(trial, path, head, start) if fresh else None


def _make(trial: TrialDir, path: Path) -> Columns:
    with _entry(path) as write:
        sources = [a.metrics for a in trial.attempts()]
        before = _stamps(trial.path, sources)
        found = pack(*_rows(trial))
        if before == _stamps(trial.path, sources):
            head = {"spans": found.spans, "damage": found.damage, "columns": found._columns}
            write({"version": VERSION, "sources": before, **head}, found._fetch(0, -1))
    return found


def flaw(trial: TrialDir) -> str | None:
    """`trial.flaw()`, which hashes all that DONE vouches for; not again while none of these files changed."""
    path = trial.campaign.index / f"{trial.name}.verified"
    fixed = [trial.campaign.file("campaign"), trial.file("done"), trial.file("lease")]
    try:
        with rundir.plain(path) as file:
            known = _unseal(file.readline())
        if known and known == _stamps(trial.path, [*fixed, *(f"{trial.path}/{s[0]}" for s in known[len(fixed) :])]):
            return None
    except (OSError, rundir.RunError):
        pass  # not verified yet
    if not trial.file("done").exists():
        return trial.flaw()
    with _entry(path) as write:
        try:
            done = trial.read("done")
        except rundir.RunError as error:
            return str(error)
        files = [*fixed, *(trial.path / name for name in (done or {"files": ()})["files"])]
        before = _stamps(trial.path, files)
        found = trial.flaw()
        if found is None and before == _stamps(trial.path, files):
            write(before)
    return found


def _stamps(folder: Path, paths: Iterable[Path | str]) -> list[list[Any]]:
    """What must not have changed: name, inode, size, modification and change time of each file that is there."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            s = os.lstat(path)
            name = str(path).removeprefix(f"{folder}/")
            found.append([name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])
    return found


@contextlib.contextmanager
def _entry(path: Path) -> Iterator[Callable[..., None]]:
    """A writer `(head, data)` of a file of the index; `head` is or holds the stamps of the sources.

    The file takes its name only if the sources were at rest when this began, by the clock of the same file system.
    Where the folder cannot be written, or is full, nothing is kept: the caller has what it read.
    """
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")

    def write(head: Any, data: bytes = b"") -> None:
        sources = head["sources"] if isinstance(head, dict) else head
        with contextlib.suppress(OSError):
            begun = os.stat(temporary).st_mtime_ns
            if all(max(s[3:]) <= begun - SETTLED_NS for s in sources):
                temporary.write_bytes(_seal(head) + data)
                os.replace(temporary, path)

    try:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            open(temporary, "xb").close()
        yield write
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _seal(head: Any) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _unseal(line: bytes) -> Any:
    """What `_seal` was given; None if this is not all of it."""
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if crc == b"%08x" % zlib.crc32(text) else None


# From rows to columns


def _rows(trial: TrialDir) -> tuple[list[dict[str, Any]], list[str]]:
    """(merged rows, damage), as rundir.rows tells; one whole attempt, the common case, is read at once."""
    attempts = [a for a in trial.attempts() if a.metrics.exists()]
    if len(attempts) == 1:
        with rundir.plain(attempts[0].metrics) as file:
            head, _, text = file.read().partition(b"\n")
        with _no_gc():
            found = _whole(text)
        header = next(rundir.lines(attempts[0].metrics, "metrics"), None)
        # at the step of the header a name counts once, which rundir.rows sees to
        if found is not None and header and sum(r["step"] == header["resumed_at_step"] for r in found) < 2:
            for row in found:
                row["attempt"] = attempts[0].number
            return found, []
    damage: list[str] = []
    return list(rundir.rows(trial, None, damage)), damage


def _whole(text: bytes) -> list[dict[str, Any]] | None:
    """Rows of a file in which every line is one, else None."""
    try:
        lines = text[: text.rfind(b"\n") + 1].decode().split("\n")[:-1]
        pairs = [_scan(line, 0) for line in lines]
        rows = [row for row, _ in pairs]
        sound = all(end == len(line) for (_, end), line in zip(pairs, lines, strict=True))
        return rows if sound and all(type(r["step"]) is int and type(r["m"]) is dict for r in rows) else None
    except (ValueError, StopIteration, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """No collection while many objects without cycles are made: a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def pack(rows: Sequence[Mapping[str, Any]], damage: Sequence[str] = ()) -> Columns:
    """Columns of rows {step tokens .. m}; values that are no numbers are left out and named in `damage`."""
    data, columns, spans, damage = bytearray(), {}, {}, list(damage)

    def put(name: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        columns[name] = [len(data), len(raw), values.dtype.str, zlib.crc32(raw)]
        data.extend(raw)

    for axis in _HEAD:
        put(f"@{axis}", _numbers([row.get(axis) for row in rows])[1])
    steps = [row["step"] for row in rows]
    shapes: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        shapes.setdefault(tuple(row["m"]), []).append(i)
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for names, where in shapes.items():
        at = np.array(where)
        for name, values in zip(names, zip(*(rows[i]["m"].values() for i in where), strict=True), strict=True):
            sound, numbers = _numbers(values)
            if not sound.all():
                damage.append(f"{name}: {int((~sound).sum())} values are not numbers; left out")
            parts.setdefault(name, []).append((at[sound], numbers[sound]))
    for name, pieces in parts.items():
        at, values = (np.concatenate(p) for p in zip(*pieces, strict=True))
        if not len(at):
            continue
        if len(pieces) > 1:
            order = np.argsort(at, kind="stable")
            at, values = at[order], values[order]
        spans[name] = Span(len(at), steps[at[0]], steps[at[-1]])
        put(name, values)
        if len(at) != len(rows):
            put(f"#{name}", at)
    whole = bytes(data)
    head = {"columns": columns, "spans": spans, "damage": damage}
    return Columns(head, lambda offset, size: whole[offset : offset + size] if size >= 0 else whole)


def _numbers(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(which are numbers or null, the values: int64 where all are small integers, else float64 with NaN for null)."""
    kinds, all_sound = set(map(type, values)), np.ones(len(values), bool)
    with contextlib.suppress(OverflowError):
        if kinds == {int} and max(map(abs, values)) < 2**63:
            return all_sound, np.array(values, np.int64)
        if kinds <= _NUMBERS:
            return all_sound, np.array(values, np.float64)
    sound = np.array([type(v) in _NUMBERS and (type(v) is not int or abs(v) < 2**1023) for v in values], bool)
    return sound, np.array([v if ok else None for v, ok in zip(values, sound, strict=True)], np.float64)
