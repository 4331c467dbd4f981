# SPDX-License-Identifier: MIT
"""The study ratio builds what its table says: 19 steps, their parents, parameters, MLP : attention and cache bytes."""

import math
from copy import deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

from ablab import config, kconf, machine, plan, study
from tests.blocks import assemble, perturbed
from tests.contract.test_members import assert_conforms, assert_no_square, differ

ROOT = Path(__file__).parents[2]
MACHINE = machine.Machine(cores=(0, 1), memory_bytes=1 << 34, cpu="cpu", devices=(), host="h", boot_id="b")
# step: parent, parameters, weights of the MLP over those of attention, bytes of cache per token in bf16
TABLE = {
    "0": (None, 124_475_904, 2.0000, 36_864),
    "1": ("0", 124_475_904, 2.0000, 36_864),
    "2": ("0", 138_640_896, 2.5000, 36_864),
    "3": ("2", 138_683_940, 2.5018, 36_864),
    "4": ("3", 138_563_076, 2.4976, 38_976),
    "5": ("0", 124_475_904, 2.0000, 55_296),
    "6": ("5", 138_640_896, 2.5000, 55_296),
    "7": ("6", 138_563_076, 2.4976, 57_408),
    "8": ("0", 115_020_288, 3.0000, 6_144),
    "9": ("8", 105_576_960, 2.5000, 6_144),
    "10": ("9", 105_534_980, 2.4981, 8_256),
    "11": ("9", 105_576_960, 2.5000, 24_576),
    "12": ("11", 105_534_980, 2.4981, 26_688),
    "13": ("0", 124_476_192, 2.0000, 36_864),
    "14": ("9", 105_577_248, 2.5000, 6_144),
    "15": ("11", 105_577_248, 2.5000, 24_576),
    "16": ("12", 105_535_268, 2.4981, 26_688),
    "17": ("13", 124_476_192, 2.0000, 36_864),
    "18": ("13", 124_476_192, 2.0000, 36_864),
}
LENGTH, EMBED, BLOCKS = 1024, 768, 12


@cache
def trials(name):
    layers = [kconf.lex(ROOT / "defconfigs" / base) for base in study.find(name).base]
    chosen = kconf.Layer("study", (kconf.Request("STUDY", f'"{name}"', f"studies/{name}.study"),))
    return plan.expand([*layers, chosen], {}, MACHINE).trials


def step(name, number):
    return next(t for t in trials(name) if t.step == number)


@cache
def built(name, number):
    cfg = config.load(step(name, number).values)
    with torch.device("meta"):
        return cfg.model.build(cfg.attention, cfg.mlp, 1)


def test_the_study_has_the_steps_of_the_table_and_six_seeds():
    parents = {s.id: s.parent for s in study.find("ratio").steps}
    assert parents == {number: row[0] for number, row in TABLE.items()}
    assert len(trials("ratio")) == 19 * 6 and len(trials("ratio-tiny")) == 19 * 3


@pytest.mark.parametrize("number", TABLE)
def test_a_step_has_the_parameters_the_ratio_and_the_cache_of_the_table(number):
    _, params, ratio, cache_bytes = TABLE[number]
    net = built("ratio", number)
    facts = net.facts()
    assert sum(p.numel() for p in net.parameters()) == params
    assert math.isclose(facts["mlp_to_attention"], ratio, abs_tol=5e-5)
    assert facts["kv_bytes_per_token"] == cache_bytes


def test_gates_and_routing_spend_what_the_width_gives_up():
    """Weights of the MLP in the steps of one budget stay within 0.1 % of each other."""
    for same in (("2", "3", "4"), ("6", "7"), ("9", "10"), ("11", "12"), ("15", "16")):
        sizes = [sum(p.numel() for p in built("ratio", n).parameters()) for n in same]
        assert max(sizes) < 1.001 * min(sizes)


@pytest.mark.parametrize("number", [n for n, row in TABLE.items() if row[2] > 2 and n != "8"])
def test_the_tiny_study_spends_the_same_budget(number):
    net = built("ratio-tiny", number)
    assert 2.4993 <= round(net.facts()["mlp_to_attention"], 4) <= 2.5041
    assert 1.08e6 <= sum(p.numel() for p in net.parameters()) < 1.605e6


@pytest.mark.parametrize("number", TABLE)
def test_both_studies_switch_the_same_members(number):
    def on(name):
        families = ("ATTN_", "MLP_", "OPT_", "PRUNE_")
        return {s for s, v in step(name, number).values.items() if v is True and s.startswith(families)}

    assert on("ratio") == on("ratio-tiny")


def test_attention_flops_of_a_step_are_those_of_its_passes():
    """12 L H Q T of the baseline; RA has half of that once more, for it doubles the width of the logits."""
    base, ra = built("ratio", "0"), built("ratio", "5")
    assert base.flops_per_token(LENGTH) - 6 * 124_475_904 == 12 * BLOCKS * EMBED * LENGTH
    assert ra.flops_per_token(LENGTH) - base.flops_per_token(LENGTH) == 6 * BLOCKS * EMBED * LENGTH


@cache
def tiny(number, **changes):
    """A step of the tiny study, three blocks deep."""
    typed = {**step("ratio-tiny", number).values, "MODEL_GPT_LAYERS": 3, "MODEL_GPT_DROPOUT": 0.0, **changes}
    return assemble(typed).double()


@pytest.mark.parametrize("number", TABLE)
def test_a_step_is_causal_alive_and_decodes(number):
    assert_conforms(perturbed(deepcopy(tiny(number))))


@pytest.mark.parametrize("number", TABLE)
def test_a_step_forms_no_square(number):
    assert_no_square(tiny(number, MODEL_GPT_BLOCK=521))


def test_steps_are_different_models_but_for_the_pruned_one():
    pairs = combinations(TABLE, 2)
    same = [pair for pair in pairs if not differ(*map(tiny, pair))]
    assert same == [("0", "1")]


def test_tensors_that_steps_share_start_equal():
    seen, shared = {}, 0
    for number in TABLE:
        for name, t in tiny(number).state_dict().items():
            first = seen.setdefault((name, t.shape), t)
            assert torch.equal(first, t), f"{number}: {name}"
            shared += first is not t
    assert shared > 300
