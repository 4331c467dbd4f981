# SPDX-License-Identifier: MIT
"""`ablab check` as a user meets it: what is chosen, exit codes, the table, the command that repeats a failure."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import project

GOLDEN = Path(__file__).parent / "golden" / "check.txt"
LEAK = "F.gelu(pre_BTF, approximate=self.form)"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A project without `.config`, and with the demo for its only study."""
    made = project.copy(tmp_path_factory.mktemp("project"))
    for path in (made / "studies").iterdir():
        if path.name != "demo.study":
            path.unlink()
    return made


def ablab(copy, *words):
    command = [copy / ".venv/bin/python", "-m", "ablab", *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "ABLAB_", "CONFIG_", "PYTEST"))}
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=clean)


def test_the_golden_text_of_a_check(copy):
    """Without .config all shipped studies; numbers of this machine are left out."""
    done = ablab(copy, "check", "STUDY=demo")
    text = re.sub(r"\b[0-9a-f]{12}\b", "#" * 12, re.sub(r" *\d+\.\d\d(?= s|x)", " #", done.stdout))
    if os.environ.get("ABLAB_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert done.returncode == 0 and text == GOLDEN.read_text()


def test_without_a_configuration_it_tries_all_shipped_studies(copy):
    (copy / "studies/other.study").write_text("base tiny\n[A] Same\n[B] Narrow\nCONFIG_MLP_GELU_WIDTH=64\n")
    (copy / "studies/twin.study").write_text("base tiny\n[Z] Same\n[Y] Wide\nCONFIG_MLP_GELU_WIDTH=256\n")
    done = ablab(copy, "check", "FORMAT=json", "DDP=1")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    ids = [t["ids"] for t in said["trials"]]
    assert ["other:a-s1337", "twin:z-s1337"] in ids and len(ids) == 6  # one configuration, tried once
    assert re.search(r"\ntwin:z-s1337 .* as other:a-s1337\n", done.stderr)
    assert not (copy / ".config").exists()
    assert "ddp" in said["trials"][0]["passed"] and not any("DDP=1" in u for u in said["uncovered"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["STEP=demo:D9"], "STEP=D9: not in demo; steps: demo:D0 demo:D1 demo:D2"),
        (["STEP=D1"], "STEP=D1: of which study? there is no .config; write STEP=NAME:D1; studies: demo"),
        (["STEP=demo:D1", "STUDY=tiny"], "STEP=demo:D1: is not of STUDY=tiny; keep one"),
        (["STUDY=dmo"], "no such study; nearest first: demo"),
    ],
)
def test_a_wrong_choice_is_2_and_lists_the_right_ones(copy, words, text):
    done = ablab(copy, "check", *words)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr


def test_a_gpu_follows_into_the_plan(copy):
    """What is automatic follows the device: half precision, so half the activations."""
    code = ablab(copy, "check", "STEP=demo:D0", "GPU=rtx3090", "FORMAT=json")
    (trial,) = json.loads(code.stdout)["trials"]
    assert code.returncode == 0 and trial["memory"]["fits"].startswith("fits: ")
    text = ablab(copy, "estimate", "GPU=h100").stdout
    assert "fits: " in text and "GiB of 74.4" in text
    (copy / ".config").unlink()  # the estimate has loaded the demo


def test_a_planted_fault_fails_every_step_and_the_command_repeats_it(tmp_path):
    copy = project.copy(tmp_path)
    path = copy / "ablab/mlp/gelu.py"
    path.write_text(path.read_text().replace(LEAK, f"{LEAK} + pre_BTF.mean(1, keepdim=True)"))
    assert ablab(copy, "defconfig", "demo").returncode == 0
    done = ablab(copy, "check", 'CONFIG_OPT_LR="1e-3"')
    rows = [line for line in done.stdout.splitlines() if line.startswith("d")][1:]
    assert done.returncode == 1 and [r.endswith("FAILED causality") for r in rows[:3]] == [True] * 3
    assert "d2-s1337: failed in stage causality: logits before token 1 change" in done.stdout
    (again,) = {line for line in done.stdout.splitlines() if line.startswith("again: make check STEP=d2-s1337")}
    words = shlex.split(again.removeprefix("again: make "))
    assert 'CONFIG_OPT_LR="1e-3"' in words
    repeated = ablab(copy, *words)
    assert repeated.returncode == 1 and "failed in stage causality" in repeated.stdout
    assert "d1-s1337" not in repeated.stdout
    assert json.loads((copy / "results/check.json").read_text())["trials"][0]["stage"] == "causality"
