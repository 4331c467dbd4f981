# SPDX-License-Identifier: MIT
"""The verbs and their variables are a promise: they change by a reviewed golden only, and make offers the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ablab import __main__ as cli

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/cli.txt"
DEVELOP = {
    "all",
    "style",
    "test",
    "test-all",
    "golden",
    "bench",
    "bench-check",
    "gpu-check",
    "ci",
    "clean",
    "mrproper",
}


def ablab(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ablab", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_golden_list_of_verbs():
    lines = [f"{n}: {' '.join([*v.takes, *(['CONFIG_X'] if v.symbols else [])])}" for n, v in cli.VERBS.items()]
    text = "\n".join(lines) + "\n"
    if os.environ.get("ABLAB_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_make_and_ablab_offer_the_same():
    text = (ROOT / "Makefile").read_text()
    verbs = set(re.search(r"^VERBS := (.*?)\n\n", text, re.S | re.M)[1].replace("\\\n", " ").split())
    assert verbs | {"run", "defconfig"} == set(cli.VERBS)
    phony = set(re.search(r"^\.PHONY: (all .*)$", text, re.M)[1].replace("$(VERBS)", "").split())
    assert phony - {"run", "setup"} == DEVELOP


def test_every_verb_has_help():
    for name in cli.VERBS:
        assert len(cli.usage(name).splitlines()) >= 3, name


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nosuch"], "make: error: nosuch: no such target; nearest: "),
        (
            ["plan", "BATCH=4"],
            "make line: error: BATCH=4: no such variable; nearest: CONFIG_TRAIN_BATCH_MICRO",
        ),
        (
            ["plan", "CONFIG_OPT_LRR=1"],
            "make line: error: CONFIG_OPT_LRR: no such symbol; nearest: CONFIG_OPT_LR",
        ),
        (["status", "what", "ever"], "make line: error: ever: expected VARIABLE=value"),
        (["plan", "FORMAT=xml"], "make line: error: FORMAT=xml: not table or json"),
        (["plan", "FORMAT=csv"], "make line: error: FORMAT=csv: not table or json"),
        (["ls", "FORMAT=xml"], "make line: error: FORMAT=xml: not table or json or csv"),
        (["run", "CHECK=2"], "make line: error: CHECK=2: not 0 or 1"),
        (["run", "NEW=maybe"], "make line: error: NEW=maybe: not 0 or 1"),
        (["olddefconfig", "DROP=yes"], "make line: error: DROP=yes: not 0 or 1"),
        (["continue", "JOBS=x"], "make line: error: JOBS=x: not a number of trials at once, or auto"),
        (["continue", "JOBS=-1"], "make line: error: JOBS=-1: not a number of trials at once, or auto"),
        (["continue", "KEEP_GOING=maybe"], "make line: error: KEEP_GOING=maybe: not y or n"),
        (["series", "latest", "KEY=val_loss", "POINTS=-1"], "make line: error: POINTS=-1: not a number of points"),
        (["run", "O="], "make line: error: O=: empty; give it a value or leave it out"),
        (["plan", "SEEDS=2", "SEEDS=3"], "make line: error: SEEDS=3: SEEDS is given twice; keep one"),
        (["sample", "x", "a\udcff"], "make line: error: PROMPT: not UTF-8"),
        (["status", "CAMPAIGN=./pyproject.toml"], "pyproject.toml: no campaign.json, so it is no campaign"),
        (["plan", "--seeds"], "make line: error: --seeds: needs a value"),
        (["help", "VERB=nosuch"], "make: error: nosuch: no such target; nearest: "),
        (["status", "CAMPAIGN=nope"], "nope"),
        (["tracker", "paper"], "make line: error: DO=paper: not sync, status, test, import, record or bench"),
        (["tracker", "test", "paper"], "tracker test paper: no such tracker; trackers: "),
        (["plan", "TRACKER=paper"], "make line: error: TRACKER=paper: no tracker paper; trackers: none "),
    ],
)
def test_bad_input_is_one_text_and_exit_2(words, text, tmp_path):
    done = ablab(*words, *([f"O={tmp_path}"] if "status" in words else []))
    assert done.returncode == 2
    assert text in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / ".config").mkdir()
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    (tmp_path / "Kconfig").write_text('mainmenu "empty"\n')
    assert cli.main(["plan"]) == 2
    assert f"{tmp_path}/.config: error: Is a directory; " in capsys.readouterr().err


def test_a_stray_config_variable_in_the_environment_is_an_error():
    done = ablab("plan", CONFIG_OPT_LR="1")
    assert done.returncode == 2
    assert done.stderr == "environment: error: CONFIG_OPT_LR is set in the environment; give it on the make line\n"


def test_make_passes_values_with_blanks_by_name():
    done = ablab("plan", ABLAB_MAKE_VARS="SWEEP", SWEEP="OPT_LR=1e-4,2e-4 TRAIN_SEED=1..2", FORMAT="")
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
