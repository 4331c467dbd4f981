# SPDX-License-Identifier: MIT
"""The small model of the dry run: every size in its range, ratios kept, what differs still differs."""

import pytest

from ablab import kconf, rig

FULL = {"MODEL_GPT_EMBED": 768, "MODEL_GPT_HEADS": 12, "MODEL_GPT_BLOCK": 1024, "MODEL_GPT_LAYERS": 12}
# sizes of the 124M model -> of the dry run: a third of the heads, an eighth of the widths
EIGHTH = [
    ("MLP_GELU_WIDTH", {3072: 384, 3840: 480, 3264: 408, 2560: 320, 2048: 256}),
    ("MLP_HEADGATE_DIM", {296: 37, 224: 28}),
    ("MLP_CROSS_RANK", {96: 12, 48: 8}),  # 6 is no multiple of 4 heads
    ("ATTN_MLA_LATENT", {128: 16, 64: 16, 512: 64}),
    ("MLP_RECIPROCAL_WIDTH", {64: 8, 768: 96, 3072: 384}),
    ("ATTN_RECIPROCAL_WINDOW", {0: 0, 64: 2, 128: 4, 1: 1, 1024: 32}),
]


@pytest.mark.parametrize(("name", "sizes"), EIGHTH)
def test_sizes_keep_their_ratio(name, sizes):
    assert {v: rig.shrunk({**FULL, name: v})[name] for v in sizes} == sizes


def test_every_size_stays_in_the_range_of_its_symbol():
    tree = kconf.load()
    names = {*rig.FIXED, *rig.MOST, *rig.BY_WIDTH, *rig.BY_CONTEXT} & tree.symbols.keys()
    for name in (n for n in names if tree.symbols[n].kind == "int"):
        low, high = tree.span(name)
        for value in (low, high):
            small = rig.shrunk({**FULL, name: value})[name]
            assert low <= small <= high, (name, value, small)


def test_every_name_is_a_symbol():
    names = {*rig.FIXED, *rig.MOST, *rig.BY_WIDTH, *rig.BY_CONTEXT}
    assert names <= kconf.load().symbols.keys()


def test_what_was_a_multiple_of_the_heads_still_is():
    for heads in range(1, 13):
        small = rig.shrunk(
            {**FULL, "MODEL_GPT_HEADS": heads, "MLP_CROSS_RANK": 8 * heads, "MLP_GELU_WIDTH": 100 * heads}
        )
        assert small["MLP_CROSS_RANK"] % small["MODEL_GPT_HEADS"] == 0
        assert small["MLP_GELU_WIDTH"] % small["MODEL_GPT_HEADS"] == 0
        assert small["MODEL_GPT_EMBED"] % small["MODEL_GPT_HEADS"] == 0


def test_what_starts_late_acts_within_the_dry_run():
    late = {"SCHED_WARMUP": 2000, "SCHED_COUPLING_START": 1000, "SCHED_COUPLING_STEPS": 500}
    small = rig.shrunk({**FULL, **late})
    assert small["SCHED_COUPLING_START"] + small["SCHED_COUPLING_STEPS"] < rig.ITERATIONS
    assert 0 < small["SCHED_WARMUP"] < rig.OVERFIT


def test_small_models_are_not_mixed_up_with_switches():
    values = {**FULL, "MODEL_GPT_BIAS": True, "OPT_LR": 6e-4}
    assert rig.shrunk(values)["MODEL_GPT_BIAS"] is True and rig.shrunk(values)["OPT_LR"] == 6e-4


def test_a_pruned_cache_keeps_more_than_its_newest_tokens():
    small = rig.shrunk({**FULL, "EVAL_KVPRUNE": True, "EVAL_KVPRUNE_KEEP": 100, "EVAL_KVPRUNE_RECENT": 98})
    assert small["EVAL_KVPRUNE_KEEP"] == small["EVAL_KVPRUNE_RECENT"] + 2
