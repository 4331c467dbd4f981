# SPDX-License-Identifier: MIT
"""docs/adding.md does what it says: its two blocks, applied to a copy, pass the conformance suite."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks() -> tuple[str, str]:
    text = (ROOT / "docs/adding.md").read_text()
    return tuple(re.search(f"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("kconfig", "python"))


def test_the_walkthrough_adds_a_working_member(tmp_path):
    for name in ("ablab", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Kconfig", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    entry, code = blocks()
    kconfig = tmp_path / "ablab/attention/Kconfig"
    kconfig.write_text(kconfig.read_text().replace("\nendmenu", f"\n{entry}\nendmenu"))
    (tmp_path / "ablab/attention/gain.py").write_text(code)
    suite = ["tests/contract/test_members.py", "tests/contract/test_kconfig.py", "-k", "GAIN or symbol or field"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *suite],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10
