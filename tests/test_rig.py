# SPDX-License-Identifier: MIT
"""The small model of the dry run: every size in its range, ratios kept, what differs still differs."""

import pytest

from ablab import kconf, plugin, rig

FULL = {"MODEL_GPT_EMBED": 768, "MODEL_GPT_HEADS": 12, "MODEL_GPT_BLOCK": 1024, "MODEL_GPT_LAYERS": 12}
# sizes of the 124M model -> of the dry run: a third of the heads, an eighth of the widths
EIGHTH = [
    ("MLP_GELU_WIDTH", {3072: 384, 3840: 480, 3264: 408, 2560: 320, 2048: 256}),
    ("MLP_HEADGATE_DIM", {296: 37, 224: 28}),
    ("MLP_CROSS_RANK", {96: 12, 48: 8}),  # 6 is no multiple of 4 heads
    ("ATTN_MLA_LATENT", {128: 16, 64: 16, 512: 64}),
    ("MLP_RECIPROCAL_WIDTH", {64: 8, 768: 96, 3072: 384}),
    ("ATTN_RECIPROCAL_WINDOW", {0: 0, 64: 2, 128: 4, 1: 1, 1024: 32}),
    ("ATTN_RACT_K", {8: 8, 64: 16}),
]


def scaled():
    """Symbols that members declare to shrink, with that of the member."""
    members = [plugin.find(s) for family in ("ATTN", "MLP") for s in plugin.members(family)]
    return {f"{m.symbol}_{field.upper()}": (m, field) for m in members for field in m.scales}


def small(**values):
    """FULL and these at the size of the dry run, with the members that have them."""
    on = {m.symbol: True for name, (m, _) in scaled().items() if name in values}
    return rig.shrunk({**FULL, **on, **values})


@pytest.mark.parametrize(("name", "sizes"), [case for case in EIGHTH if case[0] in kconf.load().symbols])
def test_sizes_keep_their_ratio(name, sizes):
    assert {v: small(**{name: v})[name] for v in sizes} == sizes


def test_every_size_stays_in_the_range_of_its_symbol():
    tree = kconf.load()
    names = {*rig.FIXED, *rig.MOST, *rig.BY_CONTEXT, *scaled()} & tree.symbols.keys()
    for name in (n for n in names if tree.symbols[n].kind == "int"):
        low, high = tree.span(name)
        for value in (low, high):
            assert low <= small(**{name: value})[name] <= high, (name, value)


def test_every_name_is_a_symbol():
    names = {*rig.FIXED, *rig.MOST, *rig.BY_CONTEXT}
    assert names <= kconf.load().symbols.keys()
    assert all(field in m.Config.__dataclass_fields__ for m, field in scaled().values())


def test_what_was_a_multiple_of_the_heads_still_is():
    for heads in range(1, 13):
        got = small(MODEL_GPT_HEADS=heads, MLP_GELU_WIDTH=100 * heads)
        assert got["MLP_GELU_WIDTH"] % got["MODEL_GPT_HEADS"] == 0
        assert got["MODEL_GPT_EMBED"] % got["MODEL_GPT_HEADS"] == 0


def test_what_starts_late_acts_within_the_dry_run():
    late = {"SCHED_WARMUP": 2000, "SCHED_COUPLING_START": 1000, "SCHED_COUPLING_STEPS": 500}
    got = small(**late)
    assert got["SCHED_COUPLING_START"] + got["SCHED_COUPLING_STEPS"] < rig.ITERATIONS
    assert 0 < got["SCHED_WARMUP"] < rig.OVERFIT


def test_small_models_are_not_mixed_up_with_switches():
    values = {**FULL, "MODEL_GPT_BIAS": True, "OPT_LR": 6e-4}
    assert rig.shrunk(values)["MODEL_GPT_BIAS"] is True and rig.shrunk(values)["OPT_LR"] == 6e-4


def test_a_pruned_cache_keeps_more_than_its_newest_tokens():
    got = small(EVAL_KVPRUNE=True, EVAL_KVPRUNE_KEEP=100, EVAL_KVPRUNE_RECENT=98)
    assert got["EVAL_KVPRUNE_KEEP"] == got["EVAL_KVPRUNE_RECENT"] + 2
