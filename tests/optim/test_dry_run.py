# SPDX-License-Identifier: MIT
"""Every optimizer and every pruning method passes the dry run, one that fits the other."""

import pytest

from ablab import check, plugin
from ablab.optim import Impl
from ablab.optim.sgd import FlatSgd
from tests import trial as tiny

BRINGS = {"OPT_ADAMWPRUNE": "PRUNE_STATE"}
"""What an optimizer is pruned with, where it is not the method that is asked for."""
NEEDS = {method: optimizer for optimizer, method in BRINGS.items()}
PAIRS = {(s, BRINGS.get(s, "PRUNE_MAGNITUDE")) for s in plugin.members("OPT")}
PAIRS |= {(NEEDS.get(s, "OPT_ADAMW"), s) for s in plugin.members("PRUNE")}


@pytest.mark.parametrize("more", ["", "SCHED_COUPLING_RAMP=y\nCONFIG_ATTN_RECIPROCAL=y\nCONFIG_MLP_HEADGATE=y"])
@pytest.mark.parametrize("pair", sorted(PAIRS), ids=" ".join)
def test_it_passes_every_stage(pair, more, tmp_path):
    lines = [
        *(f"{s}=y" for s in pair),
        *(["PRUNE_WARMUP=2"] if "NONE" not in pair[1] else []),
        *([more] if more else []),
    ]
    s = tiny.settled(tmp_path, "".join(f"CONFIG_{line}\n" for line in lines))
    case = check.Case(["x-s1"], "member", s.values, s.where)
    check.run(case)
    assert (case.stage, case.reason) == ("", "")


@pytest.mark.parametrize("symbol", ["OPT_ADAMWPRUNE", "OPT_MUON"])
def test_a_field_of_a_base_that_nobody_reads_is_seen(symbol, tmp_path, monkeypatch):
    plain = lambda self, groups: FlatSgd(groups, 0.9, False, Impl.LOOP)
    for name in (symbol, "OPT_ADAMW"):
        monkeypatch.setattr(plugin.find(name), "build", plain)
    s = tiny.settled(tmp_path, f"CONFIG_{symbol}=y\n")
    case = check.Case(["x-s1"], "member", s.values, s.where)
    check.run(case)
    assert case.stage == "knobs" and "CONFIG_OPT_ADAMW_BETA1" in case.reason


def test_a_gradient_too_small_to_be_felt_is_no_fault(tmp_path):
    lines = ['OPT_SGD_MOMENTUM="0.0"', "MLP_CROSS=y", "MLP_HEADGATE=y", "ATTN_RECIPROCAL=y", "SCHED_COUPLING_RAMP=y"]
    s = tiny.settled(tmp_path, "".join(f"CONFIG_{line}\n" for line in ["OPT_SGD=y", "MLP_GELU_WIDTH=128", *lines]))
    case = check.Case(["x-s1"], "member", s.values, s.where)
    check.run(case)
    assert (case.stage, case.reason) == ("", "")
