# SPDX-License-Identifier: MIT
"""Acceptance 8: three seeds cannot reach p < 0.05, and that is said, with a number that can, before training."""

import shutil

import pytest

from ablab import kconf, machine, plan, run
from ablab.rundir import campaigns
from ablab.study import StudyError
from tests.run import drive

STUDY = """# SPDX-License-Identifier: MIT
# Two rates.
question Does a higher rate help?
base     tiny
metric   val_loss final
seeds    {}
[A] Baseline
[B] Faster
CONFIG_OPT_LR="6e-3"
"""


def planned(folder, seeds):
    """The plan of a study, in a copy of the tree that holds it."""
    for name in ("ablab", "defconfigs"):
        shutil.copytree(kconf.ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(kconf.ROOT / "Kconfig", folder)
    (folder / "studies").mkdir()
    (folder / "studies/rates.study").write_text(STUDY.format(seeds))
    chosen = kconf.Layer("study", (kconf.Request("STUDY", '"rates"', "here"),))
    layers = [kconf.lex(folder / "defconfigs/tiny"), chosen]
    return plan.expand(layers, {}, machine.inventory(), kconf.load(folder))


def test_three_seeds_are_told_before_training_that_they_cannot_decide(tmp_path, capsys):
    todo = planned(tmp_path / "tree", "3 paired")
    options = drive.options(results=tmp_path / "results", checker="tests.run.targets:passes", yes=False, tty=False)
    with pytest.raises(ValueError, match="YES=1"):
        run.start(todo, options)
    assert campaigns(tmp_path / "results") == []
    told = capsys.readouterr().out
    assert "smallest two-sided p 0.25, Holm over 1 needs 0.05: cannot decide at this n; 6 can" in told


def test_a_look_that_cannot_decide_is_refused(tmp_path):
    with pytest.raises(StudyError, match="look 3: cannot decide; smallest p 0.25"):
        planned(tmp_path / "tree", "8 paired    looks 3 8")
