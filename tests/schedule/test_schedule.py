# SPDX-License-Identifier: MIT
"""Schedules against their formulas: warm-up, ends, and what every one of them must be."""

import math
from itertools import pairwise

import pytest

from ablab import plugin

CONFIGS = {
    "SCHED_CONSTANT": {},
    "SCHED_LINEAR": {"floor": 0.25},
    "SCHED_COSINE": {"floor": 0.25},
    "SCHED_WSD": {"floor": 0.25, "decay": 0.2},
}
WANTED = {
    "SCHED_CONSTANT": lambda p: 1.0,
    "SCHED_LINEAR": lambda p: (1 - p) + 0.25 * p,
    "SCHED_COSINE": lambda p: 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * p)),
    "SCHED_WSD": lambda p: 1.0 if p <= 0.8 else 1.0 - 0.75 * (p - 0.8) / 0.2,
}
GRID = [i / 20 for i in range(21)]


def schedule(symbol, warmup=0):
    cls = plugin.find(symbol)
    hidden = dict.fromkeys(f for f in cls.Section.__dataclass_fields__ if f.startswith("coupling"))
    return cls(cls.Config(**CONFIGS[symbol]), cls.Section(warmup=warmup, **hidden))


def test_every_member_has_a_case():
    assert set(plugin.members("SCHED")) == set(CONFIGS)


@pytest.mark.parametrize("symbol", CONFIGS)
def test_shape_is_the_formula(symbol):
    made = schedule(symbol)
    assert [made.shape(p) for p in GRID] == pytest.approx([WANTED[symbol](p) for p in GRID])


@pytest.mark.parametrize("symbol", CONFIGS)
def test_warm_up_is_linear_and_multiplies(symbol):
    made, total = schedule(symbol, warmup=10), 100
    got = [made.scale(step, step / total) for step in range(1, total + 1)]
    wanted = [min(1.0, step / 10) * WANTED[symbol](step / total) for step in range(1, total + 1)]
    assert got == pytest.approx(wanted)
    assert schedule(symbol).scale(1, 0.01) == pytest.approx(WANTED[symbol](0.01))


@pytest.mark.parametrize("symbol", CONFIGS)
def test_it_starts_at_the_peak_never_rises_and_ends_at_its_floor(symbol):
    shape = [schedule(symbol).shape(p) for p in GRID]
    assert shape[0] == 1.0
    assert all(a >= b for a, b in pairwise(shape))
    assert shape[-1] == pytest.approx(CONFIGS[symbol].get("floor", 1.0))
