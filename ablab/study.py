# SPDX-License-Identifier: MIT
"""Study files: `studies/NAME.study` parsed to steps, axes, contrasts, registration, all errors at once."""

import math
import re
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal, DecimalException, localcontext
from pathlib import Path
from typing import Any

from ablab import metrics
from ablab.kconf import ROOT, nearest, place, ranked

MOST_ITEMS = 100_000  # of one axis: a slip like 1..1e9 must not fill the memory
_NUM = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_INT = r"-?(?:0|[1-9][0-9]*)"
_NAME = r"[a-z0-9][a-z0-9._-]{0,99}"
_ID = r"[A-Z0-9]{1,8}"
_KEY = r"[A-Z][A-Z0-9_]*"
_WORD = r'(?:"(?:[^"\\]|\\.)*"|[^\s"])+'
_ITEM = r'(?:"(?:[^"\\]|\\.)*"|[^,"])+'
_RANGE = re.compile(rf"({_NUM})\.\.({_NUM})(?:/({_NUM}))?")
_HEADER = re.compile(rf"\[\s*({_ID})\s*(?::\s*({_ID})\s*)?\]\s+(\S.*)")
_UNSET = re.compile(r"# CONFIG_\w+ is not set\s*")
_USES = {
    "base": (rf"({_NAME}(?:\s*\+\s*{_NAME})*)", "base NAME [+ NAME ..]"),
    "sweep": (rf"({_KEY})\s*=\s*(\S.*)", "sweep KEY = item [item ..]"),
    "with": (rf"({_KEY})\s*=\s*(\S.*)", "with KEY = item [item ..]"),
    "seeds": (r"([1-9][0-9]{0,4})(?:\s+(paired))?", "seeds N [paired], N of 1 or more"),
    "contrast": (r"(\S.*)", "contrast ARM - ARM [, ARM - ARM ..]"),
    "question": (r"(\S.*)", "question TEXT"),
    "metric": (r"(\S+)(?:\s+(final|min|max))?", "metric KEY [final|min|max]"),
    "budget": (r"(steps|tokens|epochs|time)", "budget steps|tokens|epochs|time"),
    "margin": (rf"({_NUM})", "margin NUMBER, above 0"),
    "alpha": (rf"({_NUM})(?:\s+(two-sided|one-sided))?", "alpha NUMBER [two-sided|one-sided], in (0, 1)"),
    "placebo": (r"([1-9][0-9]?)", "placebo N, in 1..99"),
    "looks": (r"([1-9][0-9]{0,4}(?:\s+[1-9][0-9]{0,4})*)", "looks N [N ..], rising"),
    "failures": (r"(block|worst)", "failures block|worst"),
    "protocol": (r"(equal)", "protocol equal"),
    "expect": (r"([1-9][0-9]{0,6})", "expect N, the number of trials"),
}
_SPLIT = re.compile(rf"\s\s+(?=(?:{'|'.join(_USES)})(?:\s|$))")

Arm = str | tuple[tuple[str, str], ...]
"""A step id, or the points that carry these (key, item) pairs."""


class StudyError(ValueError):
    """What is wrong with a study file; `errors` has a line for each finding and str() joins them."""

    def __init__(self, *errors: str) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One block of a study file."""

    id: str
    title: str
    parent: str | None
    lines: tuple[tuple[int, str], ...]
    """Its Kconfig fragment, without that of its ancestors, as numbered lines."""
    comments: tuple[str, ...]
    """The comment lines right above its header, without the number sign."""
    hypothesis: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One swept key: a symbol or the common prefix of a choice's members."""

    key: str
    items: tuple[str, ...]
    """As written, ranges spelled out."""
    joined: bool
    """Moves with the axis above it."""
    where: str
    """`file:line` or `make line`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One declared comparison, left minus right."""

    left: Arm
    right: Arm
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study file.  What it leaves out has the value that the registration then carries."""

    name: str
    path: str
    """As error texts show it: from the project root if it lies there."""
    text: str
    base: tuple[str, ...]
    """Defconfig and fragments."""
    steps: tuple[Step, ...]
    axes: tuple[Axis, ...]
    contrasts: tuple[Contrast, ...]
    question: str = ""
    metric: tuple[str, str] = ("val_loss", "final")
    budget: str | None = None
    margin: float | None = None
    alpha: float = 0.05
    sides: int = 2
    placebo: int = 0
    looks: tuple[int, ...] = ()
    failures: str = "block"
    protocol: str = ""
    """`equal` promises that arms of a contrast differ in their factor alone."""
    expect: int | None = None
    seeds: int | None = None
    paired: bool = False
    lines: dict[str, int] = field(default_factory=dict)
    """Directive -> line, of those that stand at most once."""

    def at(self, directive: str) -> str:
        """`file:line` of a directive, for error texts."""
        return f"{self.path}:{self.lines[directive]}"

    def step(self, id: str) -> Step:
        """The step with this id."""
        return next(s for s in self.steps if s.id == id)

    def chain(self, id: str) -> tuple[Step, ...]:
        """The ancestors of a step, oldest first, and the step itself."""
        step = self.step(id)
        return (*(self.chain(step.parent) if step.parent else ()), step)

    def explain(self, error: str) -> str:
        """A configuration error of a step's line with the step's id put in front of the text."""
        place, mark, text = error.partition(": error: ")
        file, _, line = place.rpartition(":")
        if file != self.path or not line.isdigit():
            return error
        above = bisect([s.line for s in self.steps], int(line)) - 1
        return f"{place}{mark}[{self.steps[above].id}]: {text}" if above >= 0 else error


def find(name: str, root: Path = ROOT) -> Study:
    """The study called `name` in the project at `root`.  Raises StudyError that lists the studies."""
    known = sorted(p.stem for p in (root / "studies").glob("*.study"))
    if name not in known:
        near = " ".join(ranked(name, known)) or "none"
        raise StudyError(f'CONFIG_STUDY="{name}": no such study; nearest first: {near}')
    return read(root / "studies" / f"{name}.study")


def read(path: Path) -> Study:
    """The study in a file.  Raises StudyError with all its errors."""
    shown = place(path)
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{shown}: error: cannot be read as UTF-8 text: {error}") from error
    return _Reader(path.stem, shown, text).study()


def sweep(text: str) -> tuple[Axis, ...]:
    """Axes of the make line, `KEY=item,item [with] KEY=item`; raises StudyError."""
    found: list[Axis] = []
    errors = []
    joined = False
    for word in re.findall(_WORD, text):
        match = re.fullmatch(rf"({_KEY})=(.+)", word)
        try:
            if word != "with" and not match:
                raise ValueError(f"{word}: expected KEY=item,item")
            if match:
                found.append(_axis(match[1], re.findall(_ITEM, match[2]), found, joined, "make line"))
        except ValueError as error:
            errors.append(f"make line: error: SWEEP={text}: {error}")
        joined = word == "with"
    if errors or joined or not found:
        raise StudyError(*errors or [f"make line: error: SWEEP={text}: expected KEY=item,item [with] KEY=item,item"])
    return tuple(found)


def same(item: str) -> Any:
    """What makes two items equal: the number if it is one, else the text without its quotes."""
    return Decimal(item).normalize() if re.fullmatch(_NUM, item) else item.strip('"')


def spread(words: Iterable[str]) -> tuple[str, ...]:
    """Items with ranges spelled out in decimal arithmetic, both ends included; raises ValueError."""
    found: list[str] = []
    for word in words:
        match = _RANGE.fullmatch(word)
        if not match:
            found.append(word)
            continue
        first, last, step = match.groups()
        if not step and not (re.fullmatch(_INT, first) and re.fullmatch(_INT, last)):
            raise ValueError(f"{word}: a decimal range needs a step, as in 0.5..0.9/0.1")
        try:
            with localcontext(prec=50):  # exact for anything a person writes
                low, width = Decimal(first), Decimal(step or 1)
                count = (Decimal(last) - low) / width
                if not 0 <= count < MOST_ITEMS or count != int(count):  # int() of 1e999999 takes a minute
                    raise ValueError(f"{word}: whole steps must lead from {first} to {last}, {MOST_ITEMS} at most")
                found += [f"{(low + width * i).normalize():f}" for i in range(int(count) + 1)]
        except DecimalException as error:
            raise ValueError(f"{word}: not a range of numbers") from error
    return tuple(found)


def _axis(key: str, words: list[str], above: list[Axis], joined: bool, where: str) -> Axis:
    items = spread(words)
    seen: dict[Any, str] = {}
    for item in items:
        if same(item) in seen:
            raise ValueError(f"{key}: {item} and {seen[same(item)]} are equal items")
        seen[same(item)] = item
    if key == "TRAIN_SEED" and not all(map(str.isdigit, items)):
        raise ValueError(f"TRAIN_SEED: {' '.join(items)}: not all are ints of 0 or more")
    if any(a.key == key for a in above):
        raise ValueError(f"{key}: already an axis")
    if joined and not above:
        raise ValueError(f"with {key}: no sweep above it")
    if joined and len(items) != len(above[-1].items):
        raise ValueError(f"with {key}: {len(items)} items, but {above[-1].key} has {len(above[-1].items)}")
    return Axis(key=key, items=items, joined=joined, where=where)


class _Reader:
    """Reads one text; collects fields and errors."""

    def __init__(self, name: str, shown: str, text: str) -> None:
        self.name, self.shown, self.text = name, shown, text
        self.errors: list[tuple[int, str]] = []
        self.got: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.axes: list[Axis] = []
        self.contrasts: list[Contrast] = []
        self.steps: list[Step] = []
        self.bodies: list[list[tuple[int, str]]] = []

    def study(self) -> Study:
        if self.text.startswith("\ufeff") or "\r" in self.text:
            self.errors.append((1, "byte order mark or carriage return; save as UTF-8 with LF"))
        comments: list[str] = []
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.lstrip().startswith("#") and not _UNSET.fullmatch(line):
                comments.append(line.strip().lstrip("#").strip())
                continue
            if line.startswith("["):
                self.header(number, line.strip(), comments)
            elif self.bodies and line.strip():
                self.bodies[-1].append((number, line))
            elif line.strip():
                self.directives(number, line.strip())
            comments = []
        self.across()
        if self.errors:
            raise StudyError(*(f"{self.shown}:{n}: error: {text}" for n, text in sorted(self.errors)))
        return Study(
            name=self.name,
            path=self.shown,
            text=self.text,
            steps=tuple(replace(s, lines=tuple(b)) for s, b in zip(self.steps, self.bodies, strict=True)),
            axes=tuple(self.axes),
            contrasts=tuple(self.contrasts),
            lines=self.lines,
            **self.got,
        )

    def header(self, number: int, line: str, comments: list[str]) -> None:
        match = _HEADER.fullmatch(line)
        if not match:
            text = f"{line!r}: expected [ID] TITLE or [ID : PARENT] TITLE, an ID of 1 to 8 of A-Z 0-9"
            self.errors.append((number, text))
            return
        id, parent, title = match.groups()
        above, _, marked = " ".join(comments).partition("hypothesis:")
        known = dict(id=id, parent=parent, title=title, line=number, lines=(), comments=tuple(comments))
        self.steps.append(Step(**known, hypothesis=(marked or above).strip()))
        self.bodies.append([])

    def directives(self, number: int, line: str) -> None:
        rest = line
        while rest:
            word = rest.split(None, 1)[0]
            if word not in _USES:
                text = f"{rest!r}: no such directive; nearest: {nearest(word, _USES)}"
                self.errors.append((number, text))
                return
            # a question runs to the end of its line
            part, rest = (rest, "") if word == "question" else (*_SPLIT.split(rest, maxsplit=1), "")[:2]
            pattern, use = _USES[word]
            match = re.fullmatch(pattern, part[len(word) :].strip())
            try:
                if not match:
                    raise ValueError(f"{part!r}: expected {use}")
                self.directive(number, word, *(*match.groups(), "")[:2])
            except ValueError as error:
                self.errors.append((number, str(error)))

    def directive(self, number: int, word: str, one: str, two: str | None) -> None:
        if word in ("sweep", "with"):
            where = f"{self.shown}:{number}"
            self.axes.append(_axis(one, re.findall(_WORD, two or ""), self.axes, word == "with", where))
        elif word == "contrast":
            self.contrasts += [_contrast(part, number) for part in one.split(",")]
        elif word in self.lines:
            raise ValueError(f"{word}: already given at {self.shown}:{self.lines[word]}")
        else:
            self.lines[word] = number
            self.got |= _fields(word, one, two)

    def across(self) -> None:
        """Rules that more than one line makes."""
        seen: dict[str, int] = {}
        ids = list(dict.fromkeys(s.id for s in self.steps))
        for s in self.steps:
            if s.id in seen:
                self.errors.append((s.line, f"[{s.id}]: already a step at {self.shown}:{seen[s.id]}"))
            elif s.parent and s.parent not in seen:
                why = "stands below or is itself; move it up" if s.parent in ids else ""
                why = f"{s.parent} {why}" if why else f"no step {s.parent}; steps: {' '.join(ids)}"
                self.errors.append((s.line, f"[{s.id} : {s.parent}]: {why}"))
            seen.setdefault(s.id, s.line)
        if "base" not in self.lines:
            self.errors.append((1, "no base; write base NAME, a file of defconfigs/"))
        axes = {a.key: {same(i) for i in a.items} for a in self.axes}
        if "seeds" in self.lines and "TRAIN_SEED" in axes:
            self.errors.append((self.lines["seeds"], "seeds: TRAIN_SEED is swept already; keep one"))
        if "placebo" in self.lines and not ids:
            self.errors.append((self.lines["placebo"], "placebo: copies the first step, and there is none"))
        for line, arm in ((c.line, arm) for c in self.contrasts for arm in (c.left, c.right)):
            if isinstance(arm, str):
                bad = [] if arm in ids else [f"no step {arm}; steps: {' '.join(ids) or 'none'}"]
            else:
                bad = [f"no axis {k}; axes: {' '.join(axes) or 'none'}" for k, _ in arm if k not in axes]
                bad += [f"{k} has no item {i}" for k, i in arm if k in axes and same(i) not in axes[k]]
            self.errors += [(line, f"contrast: {text}") for text in bad]


def _fields(word: str, one: str, two: str | None) -> dict[str, Any]:
    """What a directive that stands once says, by field of Study."""
    if word == "base":
        return {"base": tuple(re.findall(_NAME, one))}
    if word == "metric":
        metrics.get(one)
        return {"metric": (one, two or "final")}
    if word == "seeds":
        return {"seeds": int(one), "paired": bool(two)}
    if word in ("margin", "alpha"):
        if not 0 < float(one) < (1 if word == "alpha" else math.inf):
            raise ValueError(f"{word} {one}: expected {_USES[word][1]}")
        return {word: float(one)} | ({"sides": 1 if two == "one-sided" else 2} if word == "alpha" else {})
    if word == "looks":
        looks = tuple(map(int, one.split()))
        if list(looks) != sorted(set(looks)):
            raise ValueError(f"looks {one}: expected {_USES[word][1]}")
        return {"looks": looks}
    return {word: int(one) if word in ("placebo", "expect") else one}


def _contrast(text: str, line: int) -> Contrast:
    arms = re.split(r"\s-\s", text.strip())
    if len(arms) != 2:
        raise ValueError(f"contrast {text.strip()!r}: expected ARM - ARM with blanks beside the minus")
    return Contrast(left=_arm(arms[0]), right=_arm(arms[1]), line=line)


def _arm(text: str) -> Arm:
    words = re.findall(_WORD, text)
    if len(words) == 1 and re.fullmatch(_ID, words[0]):
        return words[0]
    pairs = [re.fullmatch(rf"({_KEY})=(.+)", word) for word in words]
    if not pairs or not all(pairs):
        raise ValueError(f"contrast: arm {text.strip()!r}: expected a step id or KEY=item [KEY=item ..]")
    return tuple((m[1], m[2]) for m in pairs if m)
