# SPDX-License-Identifier: MIT
"""A copy of the project that a test may configure and run, sharing the packages of the one it came from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("ablab", "defconfigs", "studies", "scripts", "Kconfig", "Makefile", "pyproject.toml", "constraints.txt")


def copy(folder: Path) -> Path:
    """Lay the project out below `folder`; `.venv` in it is the interpreter that runs the tests."""
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for stamp in ("run", "test"):
        (folder / ".venv" / stamp).touch()
    return folder


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make there, without what the calling make or the user left in the environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "ABLAB_", "CONFIG_", "PYTEST"))}
    return subprocess.run(
        ["make", *words], cwd=folder, capture_output=True, text=True, env={**clean, **environment}, timeout=300
    )
