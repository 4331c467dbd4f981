# SPDX-License-Identifier: MIT
"""MLP mechanisms beyond what conformance asks of every member: the gauge of an added term, and one block."""

from dataclasses import replace

import pytest

from ablab.tensor.stage import Gauges, Part
from tests.blocks import tokens
from tests.contract.test_members import CASES, make, member, name, parts

MINE = [case for case in CASES if case.startswith("MLP_")]
ADDING = [case for case in MINE if any(p.gauges == ("term_rms",) for p in parts(make(case)))]
ALONE = [case for case in MINE if not member(case).parts(replace(make(case).dims, n_layer=1))]


@pytest.mark.parametrize("case", ADDING)
def test_gauge_of_a_term_is_its_rms_over_that_of_its_target(case):
    net, seen, gauges = make(case), {}, Gauges()
    for layer, block in enumerate(net.blocks):
        for part in (m for m in block.modules() if isinstance(m, Part) and m.gauges == ("term_rms",)):
            at = gauges.name(part, layer, "term_rms")
            part.register_forward_hook(lambda m, args, out, at=at: seen.update({at: (args[0], out)}))
    net(tokens(2, 40), gauges=gauges)
    assert len(seen) >= 2 and seen.keys() == {n for n in gauges.values if n.endswith("term_rms")}
    for at, (before, after) in seen.items():
        used = ((after - before) != 0).any(0).any(0)  # units that a term may reach
        want = (after - before)[..., used].square().mean().sqrt() / before[..., used].square().mean().sqrt()
        assert (gauges.values[at] / want - 1).abs() < 1e-9


@pytest.mark.parametrize("case", ALONE)
def test_one_block_has_nobody_to_carry_to(case):
    with pytest.raises(ValueError, match=f"CONFIG_{name(case)}: adds no part .* CONFIG_MODEL_GPT_LAYERS to 2 or more"):
        make(case, MODEL_GPT_LAYERS=1)
