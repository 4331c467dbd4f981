# SPDX-License-Identifier: MIT
"""Studies over optimizers and pruning methods expand to what can be, and say why the rest cannot."""

import shutil
from pathlib import Path

import pytest

from ablab import kconf, machine, plan

ROOT = Path(__file__).parents[2]
HERE = machine.Machine(cores=(0, 1), memory_bytes=1 << 34, cpu="cpu", devices=(), host="h", boot_id="b")
HEAD = "base   tiny\nquestion q\nmetric val_loss min\n"
MATRIX = """contrast OPT=ADAMWPRUNE PRUNE=STATE - OPT=ADAMW PRUNE=MAGNITUDE
sweep  OPT = SGD ADAM ADAMW ADAMWADV ADAMWSPAM ADAMWPRUNE
sweep  PRUNE = NONE MAGNITUDE MOVEMENT STATE
sweep  PRUNE_SPARSITY = 0.5 0.7 0.9
sweep  PRUNE_STATE_SCORE = BITTER0
sweep  TRAIN_SEED = 1337..1341
expect 195
"""
CRITERIA = """
sweep  PRUNE_STATE_SCORE = RANDOM BITTER0 BITTER1 BITTER2 BITTER3 BITTER4 BITTER5 BITTER6 BITTER7 BITTER8 BITTER9
sweep  PRUNE_STATE_BITTER5 = AWAY TOWARD
sweep  TRAIN_SEED = 1337..1342
expect 90
[D0] Dense control
CONFIG_SYS_COMPILE_ON=y
[M0 : D0] External magnitude
CONFIG_PRUNE_MAGNITUDE=y
CONFIG_PRUNE_WARMUP=10
[M1 : M0] Only weights masked
CONFIG_PRUNE_SCOPE_WEIGHTS=y
[S0 : M0] State score
CONFIG_OPT_ADAMWPRUNE=y
CONFIG_PRUNE_STATE=y
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project of Kconfig files, the tiny defconfig and studies of the test."""
    root = tmp_path_factory.mktemp("project")
    for path in [ROOT / "Kconfig", *(ROOT / "ablab").rglob("Kconfig*"), ROOT / "defconfigs/tiny"]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    (root / "studies").mkdir()
    return root


def expanded(root, text):
    (root / "studies/q.study").write_text(HEAD + text.lstrip())
    layers = [kconf.lex(Path("defconfigs/tiny"), root=root), kconf.parse("test", [(1, 'CONFIG_STUDY="q"')], "test")]
    return plan.expand(layers, {}, HERE, kconf.load(root))


def test_each_optimizer_meets_each_method_that_it_can_have(root):
    found = expanded(root, MATRIX)
    one = [t.id for t in found.trials if t.id.endswith("s1337")]
    # five with outside methods: dense and two at three sparsities; the composed one: dense and three
    assert len(one) == 5 * (1 + 2 * 3) + 1 + 3 and len(found.trials) == 195
    assert sum("state" in name for name in one) == 3 and "base-adamwprune-magnitude-0.5-s1337" not in one
    reasons = {(point["OPT"], point["PRUNE"]): text for point, text in found.skipped}
    assert "OPT_HAS_MOMENTS" in reasons["SGD", "STATE"] and "OPT_CARRIES_PRUNER" in reasons["ADAMW", "STATE"]
    assert "OPT_CARRIES_PRUNER" in reasons["ADAMWPRUNE", "MAGNITUDE"] and len(reasons) == 5 + 2


def test_axes_that_a_point_does_not_see_collapse(root):
    found = expanded(root, CRITERIA)
    one = [t.id for t in found.trials if t.id.endswith("s1337")]
    assert len(one) == 15 and len(found.trials) == 90
    assert [name for name in one if not name.startswith("s0")] == ["d0-s1337", "m0-s1337", "m1-s1337"]
    (depth,) = [t for t in found.trials if t.id == "s0-bitter4-s1337"]
    assert "CONFIG_PRUNE_ALLOC_DEPTH=y" in depth.config and "CONFIG_PRUNE_ALLOC_GLOBAL=y" not in depth.config
