# SPDX-License-Identifier: MIT
"""The Makefile: variables reach the verbs by name, errors have a remedy, names complete."""

import json

import pytest

from tests import project


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return project.copy(tmp_path_factory.mktemp("project"))


def test_values_with_blanks_and_quotes_survive(copy):
    assert project.make(copy, "defconfig-tiny").returncode == 0
    done = project.make(copy, "plan", "SWEEP=OPT_LR=1e-4,2e-4 TRAIN_SEED=1..2")
    assert done.returncode == 0, done.stderr
    assert "trials: 4" in done.stdout


def test_make_line_symbols_act(copy):
    project.make(copy, "defconfig-tiny")
    done = project.make(copy, "plan", "CONFIG_OPT_LR=0.5", "MAX_ITERS=70")
    assert 'CONFIG_OPT_LR="0.5"' in done.stdout and "70 steps" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["plan", "BATCH=4"], "make line: error: BATCH=4: no such variable; nearest: CONFIG_TRAIN_BATCH_MICRO"),
        (["plam"], "make: error: plam: no such target; nearest: plan"),
        (["defconfig-dmo"], "nearest"),
        (["plan", "CONFIG_OPT_LR=fast"], "make line: error: CONFIG_OPT_LR="),
        (["rerun"], "rerun"),
    ],
)
def test_bad_words_have_a_remedy_and_no_traceback(copy, words, text):
    done = project.make(copy, *words)
    assert done.returncode == 2
    assert text in done.stderr and "Traceback" not in done.stderr


def test_the_environment_is_no_input(copy):
    project.make(copy, "defconfig-tiny")
    done = project.make(copy, "plan", SEEDS="3")
    assert "one configuration" in done.stdout
    assert "is set in the environment" in project.make(copy, "plan", CONFIG_OPT_LR="1").stderr


def test_defconfigs_and_studies_complete(copy):
    database = project.make(copy, "-npq", "help").stdout
    assert "\ndefconfig-demo:" in database and "\ndefconfig-gpt2-124m:" in database


def test_json_is_all_that_stdout_gets(tmp_path):
    copy = project.copy(tmp_path)
    first = project.make(copy, "plan", "FORMAT=json")
    assert "no .config: loading defconfigs/demo" in first.stderr and len(json.loads(first.stdout)["trials"]) == 6
    project.make(copy, "defconfig-tiny")
    done = project.make(copy, "check", "FORMAT=json")
    assert done.returncode == 0 and "pass" in done.stderr
    assert json.loads(done.stdout)["trials"][0]["ids"] == ["base-s1337"]


def test_verbose_shows_the_command(copy):
    assert "-m ablab list-defconfigs" in project.make(copy, "list-defconfigs", "V=1").stdout


def test_the_interpreter_of_the_set_up_is_no_variable_of_a_verb(copy):
    project.make(copy, "defconfig-tiny")
    assert project.make(copy, "plan", "PYTHON=python3").returncode == 0
