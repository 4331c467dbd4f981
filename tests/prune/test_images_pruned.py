# SPDX-License-Identifier: MIT
"""LeNet-5 that is killed inside a ramp ends with the weights, masks, statistics and rows of one that was not."""

import signal

import pytest
import torch

from ablab import checkpoint, rundir
from ablab.metrics import TABLE
from tests import trial as tiny
from tests.test_images import IMAGES, finished
from tests.test_resume import disturbed

RAMP = "CONFIG_PRUNE_WARMUP=3\nCONFIG_PRUNE_INTERVAL=2\n"
SPARSE = "CONFIG_TRAIN_CKPT_SPARSE=y\n"
ARMS = {
    "movement": "CONFIG_PRUNE_MOVEMENT=y\nCONFIG_PRUNE_MOVEMENT_SHADOW_BF16=y\nCONFIG_PRUNE_SKIP_FIRST=y\n" + SPARSE,
    "pattern": "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_PATTERN_2OF4=y\nCONFIG_PRUNE_SKIP_LAST=y\n" + SPARSE,
    "state": "CONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\nCONFIG_PRUNE_MASK_BITS=y\nCONFIG_EVAL_TEST_EACH_EPOCH=n\n",
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("arm", ["movement", *(pytest.param(a, marks=SLOW) for a in ("pattern", "state"))])
def test_a_kill_inside_the_ramp_changes_no_bit(tmp_path, arm):
    extra = RAMP + ARMS[arm]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = finished(tmp_path / "a", extra)
    trial = tiny.campaign(tmp_path / "b", IMAGES + extra)
    states = disturbed(trial, [45, 60], signal.SIGKILL)
    assert states[0] == "dead" and states[-1] == "done"
    assert tiny.outcome(trial) == tiny.outcome(whole)
    one, two = (checkpoint.read(t.saved()[0].state) for t in (whole, trial))
    assert one.keys() == two.keys() and torch.equal(one["prune/mask"], two["prune/mask"])
    rows = [r["m"] for r in rundir.rows(trial)]
    assert {m.name for m in TABLE.values() if m.required} <= {n for m in rows for n in m}
    weights = checkpoint.read(trial.saved()[0].model)
    share = {n: float((w == 0).float().mean()) for n, w in weights.items() if w.ndim > 1}
    if arm == "pattern":  # rows of 25 and 150 are no multiple of four
        assert {n for n, s in share.items() if s} == {"fc1.weight", "fc2.weight"}
        assert all(bool(((w.view(-1, 4) == 0).sum(1) == 2).all()) for n, w in weights.items() if share.get(n))
    else:
        assert (share["conv1.weight"] == 0) == (arm == "movement") and share["fc1.weight"] > 0.3
