# SPDX-License-Identifier: MIT
"""Families and their members: a folder and its files, found by symbol, imported only when asked for."""

import importlib
import pkgutil
import sys
import tomllib
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

FAMILIES = {
    "DATA": "data",
    "MODEL": "model",
    "ATTN": "attention",
    "MLP": "mlp",
    "OPT": "optim",
    "SCHED": "schedule",
    "PRUNE": "prune",
    "TRACK": "track",
    "TELEM": "telemetry",
    "PROBE": "probe",
}
_found: dict[str, type["Plugin"]] = {}


class PluginError(ValueError):
    """A symbol names no member, or a member needs a package that is not installed."""


class EffectError(Exception):
    """Something did not have the effect that it must have; the trial ends as `failed: effect`."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One post-condition of a member: `probe` returns (expected, measured), measured and never computed from
    the configuration.  `moment` is `build` (probe gets the build.Built), `eval` or `end` (probe gets the
    train.Loop): at the end those of `eval`, at every evaluation of a trained model, are judged too.

    Numbers agree within `tolerance`, anything else must be equal; a breach ends the trial as `failed: effect`.
    """

    name: str
    moment: str
    probe: Callable[[Any], tuple[Any, Any]]
    tolerance: float = 0.0

    def judge(self, subject: Any) -> dict[str, Any]:
        expected, measured = self.probe(subject)
        number = isinstance(expected, int | float) and isinstance(measured, int | float)
        ok = abs(expected - measured) <= self.tolerance if number else expected == measured
        return {"name": self.name, "ok": bool(ok), "expected": expected, "measured": measured}


class Plugin(ABC):
    """Base of every family root (`family="OPT"`) and member (`symbol="OPT_ADAMW"`).

    A member is constructed by `config.load` with its own Config, bound from SYMBOL_*, and the Section of its
    family, bound from the FAMILY_* symbols that belong to no member.  A wrong declaration is a TypeError here,
    at class definition.
    """

    family: ClassVar[str] = ""
    symbol: ClassVar[str] = ""
    slug: ClassVar[str] = ""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Fields of the member; none unless it says so."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """Fields that all members of the family share; none unless it says so."""

    def __init_subclass__(cls, *, family: str = "", symbol: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            if family not in FAMILIES:
                raise TypeError(f"{cls.__name__}: no family {family}; known: {' '.join(FAMILIES)}")
            cls.family = family
        if symbol:
            name = symbol.removeprefix(cls.family + "_")
            if name == symbol or "_" in name:
                raise TypeError(f"{cls.__name__}: symbol {symbol} is not {cls.family}_NAME with a one-word NAME")
            if cls.__name__.rstrip("_") != name.title():
                raise TypeError(f"{cls.__name__}: the class of {symbol} must be called {name.title()}")
            cls.symbol, cls.slug = symbol, name.lower()
            _found[symbol] = cls

    def __init__(self, config: Any, section: Any) -> None:
        self.config = config
        self.section = section

    base: Any
    """The member that `parent` names."""

    def parent(self) -> str:
        """Symbol of a member of the same family that this one is built on, empty if none; `config.create` makes it
        from its own symbols and passes it on as `base`."""
        return ""

    def contracts(self) -> tuple[Clause, ...]:
        """Post-conditions of this member, evaluated by check and by every trial."""
        return ()


def members(family: str) -> tuple[str, ...]:
    """Symbols of the members that have a file, in alphabetical order, without importing one."""
    folder = Path(__file__).parent / FAMILIES[family]
    names = [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")]
    return tuple(sorted(f"{family}_{name.upper()}" for name in names))


def root(family: str) -> type[Plugin]:
    """The base class of a family: the direct holder of its Section."""
    module = importlib.import_module(f"ablab.{FAMILIES[family]}")
    return next(c for c in vars(module).values() if _is_root(c, family, module.__name__))


def _is_root(value: Any, family: str, module: str) -> bool:
    is_class = isinstance(value, type) and issubclass(value, Plugin)
    return is_class and value.family == family and not value.symbol and value.__module__ == module


def find(symbol: str) -> type[Plugin]:
    """The class of a member.

    Raises PluginError when no file defines it, or when it needs a package that is missing; the text then names
    the extra that brings it.
    """
    if symbol in _found:
        return _found[symbol]
    family, _, name = symbol.partition("_")
    if family not in FAMILIES or symbol not in members(family):
        known = [s for f in FAMILIES if (Path(__file__).parent / FAMILIES[f]).is_dir() for s in members(f)]
        near = get_close_matches(symbol, known, 1) or known[:1]
        raise PluginError(f"{symbol}: no such member; nearest: {near[0]}")
    try:
        importlib.import_module(f"ablab.{FAMILIES[family]}.{name.lower()}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ablab"):
            raise
        raise missing(symbol, error.name or "a package") from error
    return _found[symbol]


def missing(symbol: str, module: str) -> PluginError:
    """The error for a package that `symbol` needs and that is not installed; names the extra that brings it."""
    extra = extra_of(module)
    what = f"'ablab[{extra}]'" if extra else module
    return PluginError(f"{symbol} needs {module}: pip install {what}")


def extra_of(module: str) -> str | None:
    """The extra of ablab whose requirements contain `module`, by package metadata or pyproject.toml."""
    wanted = module.partition(".")[0].replace("_", "-").lower()
    for extra, requirements in _extras().items():
        for requirement in requirements:
            name = "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
            if name.replace("_", "-").lower() == wanted:
                return extra
    return None


def _extras() -> Mapping[str, list[str]]:
    source = Path(__file__).parent.parent / "pyproject.toml"
    if source.exists():
        return tomllib.loads(source.read_text())["project"]["optional-dependencies"]
    found: dict[str, list[str]] = {}
    for line in metadata.requires("ablab") or ():
        requirement, _, marker = line.partition(";")
        if "extra ==" in marker:
            found.setdefault(marker.split("==")[1].strip(" '\""), []).append(requirement)
    return found


def selected(family: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Members of a family that a configuration switches on, in Kconfig entry order.

    `values` are typed values by symbol in Kconfig order; a symbol counts as member when a file or a class
    registered in this process defines it.
    """
    known = {*members(family), *(s for s, c in _found.items() if c.family == family)}
    return tuple(s for s, value in values.items() if value is True and s in known)


def forget(symbol: str) -> None:
    """Drop a member that a test defined outside the family folders."""
    cls = _found.pop(symbol)
    assert cls.__module__ not in sys.modules or not cls.__module__.startswith("ablab."), symbol
