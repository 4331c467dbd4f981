# SPDX-License-Identifier: MIT
"""docs/adding.md does what it says, in a copy: its two blocks pass the conformance suite, and so does the rest when a
member's file and entry are deleted."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ablab import plugin

ROOT = Path(__file__).parents[2]
MEMBERS = "tests/contract/test_members.py"
BRIEF = (MEMBERS, "tests/contract/test_kconfig.py", "tests/test_rig.py")
BROAD = (*BRIEF, "tests/contract/test_layers.py", "tests/contract/test_knobs.py", "tests/contract/test_studies.py")
FOLDERS = ("tests/attention", "tests/mlp", "tests/model", "tests/tensor", "tests/schedule")


@pytest.fixture
def copy(tmp_path):
    for name in ("ablab", "tests", "studies", "defconfigs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Kconfig", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def passed(folder: Path, *words: str) -> int:
    """How many tests pass there; all must."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def blocks() -> tuple[str, str]:
    text = (ROOT / "docs/adding.md").read_text()
    return tuple(re.search(f"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("kconfig", "python"))


def test_the_walkthrough_adds_a_working_member(copy):
    entry, code = blocks()
    kconfig = copy / "ablab/attention/Kconfig"
    kconfig.write_text(kconfig.read_text().replace("\nendmenu", f"\n{entry}\nendmenu"))
    (copy / "ablab/attention/gain.py").write_text(code)
    suite = [MEMBERS, "tests/contract/test_kconfig.py", "-k", "(GAIN and not test_every_subset) or symbol or field"]
    assert passed(copy, *suite) >= 10


def entry_of(symbol: str, text: str) -> list[str]:
    """What an `if` on the symbol holds, and its entries outside of one."""
    inside = re.search(rf"^if {symbol}\n.*?^endif\n\n?", text, re.M | re.S)
    text = text.replace(inside[0], "") if inside else text
    found = re.findall(rf"^config {symbol}(?:_\w+)?\n(?:[ \t].*\n|\n)*", text, re.M)
    assert found and len(found) == len(re.findall(rf"config {symbol}\b|config {symbol}_", text))
    return found + ([inside[0]] if inside else [])


def delete(folder: Path, symbol: str) -> None:
    """The file and the entry; with them go its own tests and the studies that ask for it, with theirs."""
    family, _, name = symbol.partition("_")
    place = plugin.FAMILIES[family]
    (folder / "ablab" / place / f"{name.lower()}.py").unlink()
    kconfig = folder / "ablab" / place / "Kconfig"
    text = kconfig.read_text()
    for part in entry_of(symbol, text):
        text = text.replace(part, "")
    assert symbol not in text
    kconfig.write_text(text)
    own = [p for p in (folder / "tests" / place).glob("test_*.py") if p.stem.endswith(f"_{name.lower()}")]
    assert len(own) == 1
    studies = [p for p in (folder / "studies").iterdir() if f"CONFIG_{symbol}" in p.read_text()]
    named = [p for p in (folder / "tests/model").glob("test_*.py") if p.stem[5:] in {s.stem for s in studies}]
    for path in (*own, *studies, *named):
        path.unlink()


def test_a_member_is_deleted_with_its_file_and_its_entry(copy):
    delete(copy, "ATTN_RACT")
    some = "test_kconfig or test_rig or ((LENS or CROSS) and not test_every_subset and not compile)"
    assert passed(copy, *BRIEF, "-k", some) > 60


def test_a_member_that_another_file_names_is_not_just_deleted(copy):
    (copy / "tests/mlp/test_extra.py").write_text(
        "from tests.blocks import network\n\n\ndef test_it():\n" "    assert network(ATTN_RACT=True)\n"
    )
    delete(copy, "ATTN_RACT")
    with pytest.raises(AssertionError):
        passed(copy, "tests/mlp/test_extra.py")


@pytest.mark.slow
@pytest.mark.parametrize("symbol", ["ATTN_RECIPROCAL", "ATTN_RACT", "MLP_CROSS", "MLP_LATENT"])
def test_all_that_is_left_passes(copy, symbol):
    delete(copy, symbol)
    assert passed(copy, *BROAD, *FOLDERS) > 500
