# SPDX-License-Identifier: MIT
"""Scenario 1: blanks beside '=', typo, inline comment, unmet dependency: four errors with lines, exit 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOUR = {
    "CONFIG_OPT_LR=": 'CONFIG_OPT_LR = "1e-4"',
    "CONFIG_TRAIN_BATCH_MICRO=": "CONFIG_TRAIN_BATCH_MICR=8",
    "CONFIG_EVAL_INTERVAL=": "CONFIG_EVAL_INTERVAL=100 # often",
    "CONFIG_TRAIN_STEPS=": "CONFIG_TRAIN_EPOCHS=3",
}
SAYS = {
    "CONFIG_OPT_LR=": """'CONFIG_OPT_LR = "1e-4"': blank beside '='; write CONFIG_OPT_LR="1e-4\"""",
    "CONFIG_TRAIN_BATCH_MICRO=": "CONFIG_TRAIN_BATCH_MICR: no such symbol; nearest: CONFIG_TRAIN_BATCH_MICRO",
    "CONFIG_EVAL_INTERVAL=": "'CONFIG_EVAL_INTERVAL=100 # often': text after the value; comments stand",
    "CONFIG_TRAIN_STEPS=": "CONFIG_TRAIN_EPOCHS=3: stayed unset; needs TRAIN_BUDGET_EPOCHS, which is n",
}


@pytest.fixture
def project(tmp_path):
    """A copy of what the verbs read, so that `.config` and results are the test's own."""
    for name in ("ablab", "defconfigs", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Kconfig", tmp_path)
    return tmp_path


def ablab(project, *arguments):
    env = {k: v for k, v in os.environ.items() if not k.startswith("CONFIG_")} | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-m", "ablab", *arguments]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_four_mistakes_are_four_errors_with_lines_and_exit_2(project):
    assert ablab(project, "defconfig-tiny").returncode == 0
    path = project / ".config"
    lines, wanted = path.read_text().splitlines(), {}
    for number, line in enumerate(lines, 1):
        for start, bad in FOUR.items():
            if line.startswith(start):
                lines[number - 1] = bad
                wanted[number] = f".config:{number}: error: {SAYS[start]}"
    path.write_text("\n".join(lines) + "\n")
    before = sorted(p.name for p in project.iterdir())
    done = ablab(project, "plan")
    said = [line for line in (done.stdout + done.stderr).splitlines() if ": error: " in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(said) == len(wanted) == 4
    assert all(line.startswith(wanted[number]) for line, number in zip(said, sorted(wanted), strict=True))
    assert sorted(p.name for p in project.iterdir()) == before  # nothing was written


def test_without_the_mistakes_it_plans(project):
    assert ablab(project, "defconfig-tiny").returncode == 0
    done = ablab(project, "plan")
    assert done.returncode == 0, done.stderr
