# SPDX-License-Identifier: MIT
"""Symbols and fields are in bijection, and the tree uses only what both Kconfig engines understand."""

import re
import typing
from enum import Enum
from pathlib import Path

import pytest

from ablab import bind, config, kconf, plan, plugin

ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "Kconfig", *(ROOT / "ablab").rglob("Kconfig*")])
PRESENT = [f for f in plugin.FAMILIES if (ROOT / "ablab" / plugin.FAMILIES[f] / "Kconfig").exists()]
SECTIONS = {"TRAIN": config.Train, "EVAL": config.Eval, "SYS": config.Sys, "STUDY": plan.StudyConfig}
KINDS = {"bool": bool, "int": int, "hex": int}
TYPES = {"float": float, "floats": tuple, "ints": tuple, "name": str, "path": Path, "text": str}


def fields():
    """(symbols of the field, its type) of every Config and Section there is."""
    for prefix, cls in SECTIONS.items():
        yield from _of(cls, prefix)
    for family in PRESENT:
        yield from _of(plugin.root(family).Section, family)
        for symbol in plugin.members(family):
            yield from _of(plugin.find(symbol).Config, symbol)


def _of(cls, prefix):
    hints = typing.get_type_hints(cls)
    for field, symbols in bind.symbols(cls, prefix).items():
        yield symbols, bind._unwrap(hints[field])[0]


def test_every_field_has_a_symbol_of_its_type():
    known = kconf.load().symbols
    for symbols, kind in fields():
        for symbol in symbols:
            assert symbol in known, f"no symbol {symbol}"
            info = known[symbol]
            if isinstance(kind, type) and issubclass(kind, Enum):
                assert info.kind == "bool" and info.choice, symbol
                continue
            want = KINDS.get(info.kind) or TYPES[re.match(r"\w+", info.type)[0]]
            assert (typing.get_origin(kind) or kind) is want, symbol


def test_every_symbol_has_a_field_or_a_member():
    bound = {s for symbols, _ in fields() for s in symbols}
    entries = {s for family in PRESENT for s in plugin.members(family)}
    hidden = {s for s in kconf.load().symbols if "_HAS_" in s or "_KEEPS_" in s or "_CARRIES_" in s}
    assert set(kconf.load().symbols) - bound - entries - hidden == set()
    assert entries <= set(kconf.load().symbols)
    assert not bound & entries


def test_every_symbol_is_documented_and_named_by_the_rule():
    families = {*plugin.FAMILIES, *SECTIONS}
    for name, info in kconf.load().symbols.items():
        assert name.split("_")[0] in families, name
        assert info.help.strip() or not info.prompt, f"{name}: no help"
        if name != "EVAL_TEST_EACH_EPOCH":  # of the test split
            assert not re.search(r"(^|_)(ENABLE|SELECT|TEST|NO|DISABLE)_", name), name
        if info.kind == "string":
            assert info.type, f"{name}: no type line"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_common_language_is_used(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        word = line.split()[0] if line.split() else ""
        assert word not in {
            "tristate",
            "option",
            "rsource",
            "osource",
            "orsource",
            "def_bool",
            "optional",
        }, number
        assert "$(" not in line, f"{path}:{number}: macro"
        assert line.isascii(), f"{path}:{number}"


def test_one_definition_each():
    names = [m for path in FILES for m in re.findall(r"^\s*(?:menu)?config (\w+)", path.read_text(), re.M)]
    assert len(names) == len(set(names))
