# SPDX-License-Identifier: MIT
"""Kconfig in, typed values out: the sole user of kconfiglib; what was asked is what is set, or an error."""

# Size: lexer, literals, tree and settling stand together because all of them know what a literal is, and the
# state they work on is one kconfiglib object that nobody else may touch.

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

import kconfiglib as kl

ROOT = Path(__file__).resolve().parent.parent
Value = bool | int | float | str | tuple
DECORATION = ("TRACK", "TELEM", "STUDY")  # families that cannot change weights, so identity leaves them out
BESIDE = ("SYS_PUBLIC_REMOTE", "SYS_PRICE_PER_HOUR")  # further symbols of that kind
NAME = re.compile(r"[a-z0-9](?!.*\.\.)[a-z0-9._-]{0,99}")
_FLOAT = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_INT = re.compile(r"-?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_TYPE = re.compile(r"type: (float|floats|ints|name|path|text)(?: ([\[(])(\S+), (\S+)([\])]))?")
_LITERAL = re.compile(r'("(?:[^"\\]|\\["\\])*"|[^\s"#]*)(.*)')
UNSET = re.compile(r"# CONFIG_(\w+) is not set")
_SET = re.compile(r"CONFIG_(\w+)(\s*=\s*)(.*)", re.DOTALL)


class ConfigError(ValueError):
    """Everything that is wrong with one layer; `errors` are the lines of the text."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True, slots=True)
class Info:
    """The facts of one symbol."""

    name: str
    kind: str
    """bool, int, hex or string."""
    type: str
    """The type line of a string symbol without `type: `, else empty."""
    prompt: str
    help: str
    choice: str | None
    """Prompt of the choice it belongs to."""
    depends: str
    file: str
    line: int
    default: str
    menu: str


@dataclass(frozen=True, slots=True)
class Request:
    """One line that asks for a value.  A line of bad form carries its error in `fault`; settle raises it."""

    name: str
    text: str
    """As written after the equal sign; n for `is not set`."""
    where: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """Requests of equal rank: a file, the make line, a step, a sweep point."""

    name: str
    requests: tuple[Request, ...]


# Files and literals


def lex(path: Path, text: str | None = None, name: str | None = None, root: Path | None = None) -> Layer:
    """The layer in a file, or in `text` as if it stood there.

    Lines of bad form become requests with a fault, so that settle reports them together with what the tree
    knows.  Raises ConfigError if the file cannot be read at all.  Without `name` a layer is called `.config`
    for a full file (`.config`, a trial's `config`) and `defconfig` for any other.  A relative path starts at
    `root`, by default the working folder.
    """
    where = place(path)
    try:
        text = (root or Path()).joinpath(path).read_bytes().decode() if text is None else text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise ConfigError([f"{where}: error: cannot be read: {reason}"]) from error
    if text.startswith("\ufeff"):
        raise ConfigError([f"{where}:1: error: byte order mark; save the file as UTF-8 without one"])
    if "\r" in text:
        line = text[: text.index("\r")].count("\n") + 1
        raise ConfigError([f"{where}:{line}: error: carriage return; save the file with LF line ends"])
    resolved = path.name in (".config", ".config.old", "config")
    return parse(name or (".config" if resolved else "defconfig"), enumerate(text.split("\n"), 1), where)


def parse(name: str, lines: Iterable[tuple[int, str]], file: str) -> Layer:
    """The layer in numbered lines of a file, for example the body of a study's step."""
    found = [_line(line, f"{file}:{number}") for number, line in lines]
    return Layer(name, tuple(r for r in found if r is not None))


def place(path: Path) -> str:
    """How error texts name a file: relative to the project when it lies below it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def request(name: str, rest: str, where: str, line: str | None = None, blank: bool = False) -> Request:
    """The request CONFIG_`name`=`rest`, its literal checked for form."""
    rest = rest.replace("\n", " ")  # a make variable may hold one
    text, tail = _LITERAL.fullmatch(rest).groups()
    bad = ""
    if blank:
        bad = f"blank beside '='; write CONFIG_{name}={text}"
    elif tail and not text and rest.startswith('"'):
        bad = r"string without its end, or an escape other than \" and \\"
    elif not text and not tail:
        bad = 'no value; write "" for an empty string'
    elif tail and not tail.strip():
        bad = f"blank after the value; write CONFIG_{name}={text}"
    elif tail:
        bad = "text after the value; comments stand on their own line"
    fault = f"{where}: error: '{line or f'CONFIG_{name}={rest}'}': {bad}" if bad else ""
    return Request(name, text, where, fault)


def _line(line: str, where: str) -> Request | None:
    unset = UNSET.fullmatch(line)
    if unset:
        return Request(unset[1], "n", where)
    if not line.strip() or (line.startswith("#") and not re.match(r"#\s*CONFIG_\w+\s+is\s+not\s+set\b", line)):
        return None
    found = _SET.fullmatch(line)
    if found:
        return request(found[1], found[3], where, line, blank=found[2] != "=")
    expected = "expected CONFIG_NAME=value, '# CONFIG_NAME is not set' or a # comment"
    return Request("", "", where, f"{where}: error: '{line}': {expected}")


def literal(tree: "Tree", name: str, text: str) -> str:
    """`text` as a literal of the symbol: a string symbol gets its quotes, unless `text` brings them."""
    info = tree.symbols.get(name)
    if info is None or info.kind != "string" or re.fullmatch(r'".*"', text):
        return text
    return f'"{kl.escape(text)}"'


@lru_cache(maxsize=4096)
def typed(info: Info, text: str) -> Value:
    """The value that a literal binds to.  Raises ValueError, its text what is wrong with it."""
    if info.kind == "bool":
        if text not in ("y", "n"):
            raise ValueError("not y or n")
        return text == "y"
    if info.kind in ("int", "hex"):
        if not (_INT if info.kind == "int" else _HEX).fullmatch(text):
            raise ValueError("not an int" if info.kind == "int" else "not a hex number like 0x1f")
        return int(text, 0)
    if not text.startswith('"'):
        raise ValueError(f'not a string; write CONFIG_{info.name}="{text}"')
    text = kl.unescape(text[1:-1])
    kind, *bounds = _TYPE.fullmatch(f"type: {info.type}").groups()
    if kind in ("text", "path"):
        return text
    if kind == "name":
        if not NAME.fullmatch(text):
            raise ValueError("not a name: lower case letters, digits and . _ - without ..")
        return text
    if kind == "float":
        return _number(float, text, bounds)
    return tuple(_number(float if kind == "floats" else int, item, bounds) for item in text.split(",") if text)


def _number(kind: type, text: str, bounds: Sequence[str | None]) -> int | float:
    form = _FLOAT if kind is float else _INT
    if not form.fullmatch(text) or not math.isfinite(kind(text)):
        raise ValueError("not a float" if kind is float else "not a list of ints")
    number = kind(text)
    opening, low, high, closing = bounds
    if opening:
        above = number > float(low) or (opening == "[" and number == float(low))
        below = number < float(high) or (closing == "]" and number == float(high))
        if not (above and below):
            raise ValueError(f"outside {opening}{low}, {high}{closing}")
    return number


def ranked(name: str, known: Iterable[str]) -> list[str]:
    """Known names, the most like `name` first; those that hold all its words lead."""

    def distance(other: str) -> float:
        words = set(name.upper().split("_")) <= set(other.upper().split("_"))
        return -words - SequenceMatcher(None, name.upper(), other.upper(), autojunk=False).ratio()

    return sorted(known, key=distance)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`."""
    return (ranked(name, known) or ["none"])[0]


# The tree


class Tree:
    """A parsed Kconfig tree, and the one mutable state that settling works on: not for two threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            with _environment(root):
                self._kc = kl.Kconfig("Kconfig", warn_to_stderr=False)
        except (kl.KconfigError, OSError) as error:
            raise ConfigError([f"{place(root / 'Kconfig')}: error: {' '.join(str(error).split())}"]) from error
        self._syms = {s.name: s for s in self._kc.unique_defined_syms}
        self.symbols = {name: _info(sym) for name, sym in self._syms.items()}
        self.now: Settled | None = None
        errors = [f"Kconfig: error: {w.removeprefix('warning: ')}" for w in self._kc.warnings]
        for info in self.symbols.values():
            if info.kind == "string" and not _TYPE.fullmatch(f"type: {info.type}"):
                errors.append(f"{info.file}:{info.line}: error: {info.name}: the help of a string ends in a type line")
        if errors:
            raise ConfigError(errors)
        self._kc.warnings.clear()

    def reset(self) -> None:
        """Back to the defaults."""
        self.now = None
        self._kc.unset_values()

    def set(self, name: str, text: str) -> None:
        """Ask for a literal of the right form; nothing is checked, without a prompt nothing happens."""
        self.now = None
        if self.symbols[name].prompt:
            self._syms[name].set_value(kl.unescape(text[1:-1]) if text.startswith('"') else text)

    def visible(self, name: str) -> bool:
        """Whether the prompt of the symbol is visible."""
        return self._syms[name].visibility > 0

    def text(self, name: str) -> str | None:
        """The resolved value as a literal, None if the symbol has none."""
        sym = self._syms[name]
        line = sym.config_string
        if not line:
            return None
        return "n" if line.startswith("#") else line[line.index("=") + 1 : -1]

    def bounds(self, name: str) -> tuple[str, str] | None:
        """The active range of an int or hex symbol."""
        active = (r for r in self._syms[name].ranges if kl.expr_value(r[2]))
        return next(((low.str_value, high.str_value) for low, high, _ in active), None)

    def span(self, name: str) -> tuple[int, int] | None:
        """The range of an int symbol as it is written, whether the symbol is visible now or not."""
        found = self._syms[name].ranges if name in self._syms else []
        return next(((int(low.str_value), int(high.str_value)) for low, high, _ in found), None)

    def selection(self, name: str) -> str | None:
        """The selected member of the choice that the symbol belongs to."""
        choice = self._syms[name].choice
        return choice.selection.name if choice and choice.selection else None

    def siblings(self, name: str) -> tuple[str, ...]:
        """All members of the choice that the symbol belongs to."""
        choice = self._syms[name].choice
        return tuple(s.name for s in choice.syms) if choice else ()

    def selectors(self, name: str, active: bool = False) -> tuple[str, ...]:
        """The symbols that select this one, or only those that do so now."""
        selects = kl.split_expr(self._syms[name].rev_dep, kl.OR)
        syms = [(kl.split_expr(s, kl.AND)[0], s) for s in selects if s is not self._kc.n]
        return tuple(s.name for s, expr in syms if not active or kl.expr_value(expr))

    def unmet(self, name: str) -> list[Any]:
        """The parts of the prompt's condition that do not hold, as kconfiglib expressions."""
        return [e for e in _parts(_prompt(self._syms[name])[1]) if not kl.expr_value(e)]

    def evaluate(self) -> tuple[str, ...]:
        """Evaluate every symbol; returns what kconfiglib warns about, but for user values out of range, which
        the caller sees as a request that did not take."""
        for sym in self._syms.values():
            sym.str_value  # noqa: B018  the property computes and warns
        found = tuple(w.removeprefix("warning: ") for w in self._kc.warnings if "warning: user value" not in w)
        self._kc.warnings.clear()
        if found:
            self._kc._invalidate_all()  # else the next settle finds cached values and misses the warning
        return found

    def minimal(self) -> str:
        """The present state in savedefconfig form."""
        return self._kc._min_config_contents("")


@contextmanager
def _environment(root: Path) -> Iterator[None]:
    """kconfiglib reads options from the environment: fix them, so that the user's cannot change the tree."""
    before = dict(os.environ)
    os.environ.update({"srctree": str(root), "CONFIG_": "CONFIG_", "KCONFIG_CONFIG_HEADER": ""})
    os.environ.update({"KCONFIG_WARN_UNDEF": "y", "KCONFIG_FUNCTIONS": "ablab.no_such_module"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _info(sym: kl.Symbol) -> Info:
    node, kind = sym.nodes[0], kl.TYPE_TO_STR[sym.orig_type]
    help_text = (node.help or "").strip()
    last = help_text.rpartition("\n")[2].strip()
    menu, up = "", node.parent
    while up is not None and up.parent is not None:
        menu, up = (up.prompt[0] if up.item is kl.MENU else menu), up.parent
    defaults = (
        kl.expr_str(v) + (f" if {kl.expr_str(c)}" if c is not sym.kconfig.y else "") for v, c in sym.orig_defaults
    )
    return Info(
        name=sym.name,
        kind=kind,
        type=last.removeprefix("type: ") if kind == "string" and last.startswith("type: ") else "",
        prompt=_prompt(sym)[0],
        help=help_text,
        choice=_prompt(sym.choice)[0] if sym.choice else None,
        depends=" && ".join(kl.expr_str(e) for e in _parts(sym.direct_dep) if e is not sym.kconfig.y),
        file=node.filename,
        line=node.linenr,
        default=", ".join(defaults),
        menu=menu,
    )


def _prompt(sc: kl.Symbol | kl.Choice) -> tuple[str, Any]:
    """The prompt and its condition."""
    return next((n.prompt for n in sc.nodes if n.prompt), ("", sc.kconfig.n))


def _parts(expr: Any) -> Iterator[Any]:
    """What all must hold for `expr`; a choice stands for the condition of its prompt."""
    for part in kl.split_expr(expr, kl.AND):
        yield from _parts(_prompt(part)[1]) if isinstance(part, kl.Choice) else (part,)


def load(root: Path | None = None) -> Tree:
    """The tree below a folder, the project's by default; parsed once in a process.

    Raises ConfigError on any error or warning of the Kconfig files.
    """
    return _load((root or ROOT).resolve())


_load = lru_cache(maxsize=None)(Tree)


# Settling


@dataclass(frozen=True)
class Settled:
    """A resolved configuration."""

    values: dict[str, Value]
    """Typed values of all symbols that stand in a `.config`, in Kconfig order."""
    text: dict[str, str]
    """The same as literals."""
    where: dict[str, str]
    """`default`, or file:line or `make line` of the request that set it."""
    superseded: tuple[str, ...]
    """Requests undone by a later layer, with the reason."""
    layers: tuple[Layer, ...] = field(repr=False)
    tree: Tree = field(repr=False, compare=False)

    def config(self) -> str:
        """The full `.config`."""
        lines, menu = ["# ablab configuration, complete; change it with: make menuconfig"], ""
        for name, text in self.text.items():
            info = self.tree.symbols[name]
            if info.menu != menu:
                menu = info.menu
                lines += ["", "#", f"# {menu}", "#"]
            lines.append(line_of(name, text))
        return "\n".join(lines) + "\n"

    def minimal(self) -> str:
        """The savedefconfig form: what differs from the defaults."""
        if self.tree.now is not self:
            self.tree.reset()
            for asked in (r for layer in self.layers for r in layer.requests):
                self.tree.set(asked.name, asked.text)
            self.tree.now = self
        return self.tree.minimal()


def line_of(name: str, text: str) -> str:
    """A literal as a line of a `.config`."""
    return f"# CONFIG_{name} is not set" if text == "n" else f"CONFIG_{name}={text}"


def settle(tree: Tree, layers: Sequence[Layer]) -> Settled:
    """Resolve layers, weakest first; each is settled in turn.

    Raises ConfigError with every error of the first layer that has one: a line of bad form, a symbol that is
    unknown, set twice or has no prompt, a value of wrong type or out of range, a request that did not take.
    """
    tree.reset()
    asked: dict[str, Request] = {}
    for layer in (Layer("default", ()), *layers):
        errors = _apply(tree, layer, asked)
        if errors:
            raise ConfigError(errors)
    resolved = ((name, tree.text(name)) for name in tree.symbols)
    text = {name: got for name, got in resolved if got is not None}
    values, where = {}, {}
    for name, got in text.items():
        info = tree.symbols[name]
        try:
            values[name] = typed(info, got)
        except ValueError as error:
            raise ConfigError([f"{info.file}:{info.line}: error: {name}: default {got}: {error}"]) from error
        source = asked.get(tree.selection(name) or name)
        in_force = source and tree.visible(name) and source.text == text.get(source.name)
        where[name] = source.where if in_force else "default"
    undone = (_undone(tree, r, asked) for layer in layers for r in layer.requests)
    tree.now = Settled(values, text, where, tuple(u for u in undone if u), tuple(layers), tree)
    return tree.now


def _apply(tree: Tree, layer: Layer, asked: dict[str, Request]) -> list[str]:
    """Apply a layer to the state of the tree; returns its errors in the order of its lines."""
    errors = []
    first: dict[str, Request] = {}
    for r in layer.requests:
        flaw = _flaw(tree, layer, r, first)
        if not flaw:  # even if the form of the line is bad, so that lines which depend on it are not blamed
            tree.set(r.name, r.text)
            asked[r.name] = r
        first.setdefault(r.name, r)
        errors.append(r.fault or flaw)
    warned = tree.evaluate()
    errors = [e or _outcome(tree, layer, r, asked) for e, r in zip(errors, layer.requests, strict=True)]
    return [e for e in errors if e] + [f"{layer.name}: error: {w}" for w in warned]


def _flaw(tree: Tree, layer: Layer, r: Request, first: Mapping[str, Request]) -> str:
    """What is wrong with a request whatever the values of other layers are."""
    head = f"{r.where}: error: CONFIG_{r.name}"
    info = tree.symbols.get(r.name)
    if info is None:
        return f"{head}: no such symbol; nearest: CONFIG_{nearest(r.name, tree.symbols)}"
    if r.name in first:
        return f"{head}: already set at {first[r.name].where}"
    if not info.prompt and layer.name != ".config":
        by = " ".join(tree.selectors(r.name))
        return f"{head}={r.text}: has no prompt; {f'selected by {by}' if by else 'its default decides'}"
    try:
        typed(info, r.text)
    except ValueError as error:
        return f"{head}={r.text}: {error}"
    for rival in (first[m] for m in tree.siblings(r.name) if m in first):
        if r.text == rival.text == "y":
            return f'{head}=y: stayed n; choice "{info.choice}" is {rival.name} ({rival.where})'
    return ""


def _outcome(tree: Tree, layer: Layer, r: Request, asked: Mapping[str, Request]) -> str:
    """Why a request of the layer just applied is not in force, empty if it is."""
    head = f"{r.where}: error: CONFIG_{r.name}={r.text}"
    info = tree.symbols[r.name]
    got = tree.text(r.name) or ("n" if info.kind == "bool" else "unset")
    if not tree.visible(r.name):
        # tools write symbols without a visible prompt into `.config`
        if layer.name == ".config" and got == r.text:
            return ""
        if not info.prompt:
            return f"{head}: stayed {got}; it has no prompt, leave the line out"
        return f"{head}: stayed {got}; {needs(tree, r.name)} ({info.file}:{info.line})"
    if got == r.text:
        return ""
    bounds = tree.bounds(r.name)
    if bounds:
        return f"{head}: outside {bounds[0]}..{bounds[1]}"
    chosen = tree.selection(r.name)
    if chosen:
        source = asked[chosen].where if chosen in asked and asked[chosen].text == "y" else "default"
        return f'{head}: stayed {got}; choice "{info.choice}" is {chosen} ({source})'
    return f"{head}: stayed {got}; selected by {' '.join(tree.selectors(r.name, active=True))}"


def needs(tree: Tree, name: str) -> str:
    """What the prompt of an invisible symbol waits for, with values."""
    parts = []
    for expr in tree.unmet(name):
        if isinstance(expr, kl.Symbol):
            parts.append(f"{expr.name}, which is {expr.str_value}")
        else:
            used = sorted((s for s in kl.expr_items(expr) if s.name in tree.symbols), key=lambda s: s.name)
            values = ", ".join(f"{s.name} is {s.str_value}" for s in used)
            parts.append(f"{kl.expr_str(expr)} ({values})")
    return "needs " + " and ".join(parts)


def _undone(tree: Tree, r: Request, asked: Mapping[str, Request]) -> str:
    """The line for a request that is no longer in force, empty if it is."""
    got = tree.text(r.name)
    if got == r.text or not tree.symbols[r.name].prompt or (r.text == "n" and (got is None or tree.siblings(r.name))):
        return ""
    later = asked[r.name] if asked[r.name] is not r else asked.get(tree.selection(r.name) or "", r)
    why = f"{got} by {later.where}" if later is not r else f"is {got}"
    return f"CONFIG_{r.name}={r.text} ({r.where}): {why if tree.visible(r.name) else needs(tree, r.name)}"


def decides(name: str) -> bool:
    """Whether a symbol can change weights."""
    return name.partition("_")[0] not in DECORATION and name not in BESIDE


def identity(values: Mapping[str, Value]) -> str:
    """SHA-256 of the values that can change weights."""
    kept = {name: v for name, v in values.items() if decides(name)}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def group(values: Mapping[str, Value]) -> str:
    """The identity that the seeds of one configuration share."""
    return identity({name: v for name, v in values.items() if name != "TRAIN_SEED"})


# Questions about a configuration


def diff(tree: Tree, a: Sequence[Layer], b: Settled) -> tuple[Request, ...]:
    """A fragment, in Kconfig order, that turns the configuration of layers `a` into `b`.

    No line of it can be left out, because a value that follows from the others already is.
    """

    def reaches(requests: Sequence[Request]) -> bool:
        try:
            return settle(tree, [*a, Layer("diff", tuple(requests))]).text == b.text
        except ConfigError:
            return False

    settle(tree, b.layers)
    every = [Request(n, t, "diff") for n, t in b.text.items() if tree.visible(n) and (t == "y" or not tree.siblings(n))]
    base, before = settle(tree, a).text, None
    changed = [r for r in every if base.get(r.name) != r.text]
    found = changed if reaches(changed) else every
    while before != found:
        before = found
        for r in reversed(found):
            rest = [other for other in found if other is not r]
            found = rest if reaches(rest) else found
    return tuple(found)


def remedy(tree: Tree, layers: Sequence[Layer], want: Request, limit: int = 3) -> tuple[Request, ...] | None:
    """The smallest set of at most `limit` changes after which `want` takes, None if there is none.

    Searched breadth first: each failing request adds the changes that its unmet condition names.
    """
    frontier: list[tuple[Request, ...]] = [()]
    seen = set()
    for _ in range(limit + 1):
        following = []
        for changes in frontier:
            try:
                settle(tree, [*layers, Layer("change", (*changes, want))])
                return changes
            except ConfigError:
                levers = [lever for r in (*changes, want) for lever in _levers(tree, r)]
            for name, text in levers:
                key = frozenset({(name, text), *((r.name, r.text) for r in changes)})
                if key not in seen and name not in {want.name, *(r.name for r in changes)}:
                    seen.add(key)
                    following.append((Request(name, text, "change"), *changes))
        frontier = following
    return None


def _levers(tree: Tree, r: Request) -> Iterator[tuple[str, str]]:
    """Single changes that may help a request that did not take."""
    items = sorted({s for expr in tree.unmet(r.name) for s in kl.expr_items(expr)}, key=lambda s: s.name)
    constants = [s.str_value for s in items]
    for info in (tree.symbols[s.name] for s in items if s.name in tree.symbols):
        if info.kind == "bool":
            yield from _flips(tree, info.name)
        elif info.kind == "string":
            yield from ((info.name, literal(tree, info.name, text)) for text in constants)
        else:
            form = hex if info.kind == "hex" else str
            numbers = [int(c, 0) for c in constants if _INT.fullmatch(c) or _HEX.fullmatch(c)]
            yield from ((info.name, form(n + d)) for n in numbers for d in (0, 1, -1))
    if r.text == "n":
        yield from (flip for other in tree.selectors(r.name, active=True) for flip in _flips(tree, other))


def _flips(tree: Tree, name: str) -> Iterator[tuple[str, str]]:
    """Requests that turn a bool over: its own, or those of its choice's other members or of its selectors."""
    members = tree.siblings(name)
    on = tree.text(name) == "y"
    if not tree.symbols[name].prompt or tree.selectors(name, active=True):
        yield from (flip for other in tree.selectors(name, active=on) for flip in _flips(tree, other))
    elif members and on:
        yield from ((other, "y") for other in members if other != name)
    else:
        yield name, "n" if on else "y"
