# SPDX-License-Identifier: MIT
"""The ramp: values and means of its curves, its grid, its end."""

import pytest

from ablab.prune._schedule import Curve, Ramp


def ramp(**changes):
    base = {"initial": 0.0, "final": 0.8, "curve": Curve.LINEAR, "warmup": 100, "interval": 7, "end": 500}
    return Ramp(**{**base, "fraction": None, **changes})


@pytest.mark.parametrize(
    ("curve", "half", "mean"), [(Curve.LINEAR, 0.4, 0.5), (Curve.CUBIC_IN, 0.1, 0.25), (Curve.CUBIC_ZG, 0.7, 0.75)]
)
def test_curves(curve, half, mean):
    r = ramp(curve=curve)
    assert [r.target(t, 0.0) for t in (1, 100, 300, 500, 900)] == pytest.approx([0, 0, half, 0.8, 0.8])
    assert sum(r.target(t, 0.0) for t in range(100, 500)) / 400 == pytest.approx(mean * 0.8, abs=2e-3)
    from_half = ramp(curve=curve, initial=0.4)
    assert from_half.target(100, 0.0) == pytest.approx(0.4) and from_half.target(500, 0.0) == 0.8


def test_updates_are_on_the_grid_and_at_the_end_of_the_ramp():
    r = ramp(end=511)
    due = [t for t in range(1, 700) if r.due(t, 0.0)]
    assert due == [*range(100, 511, 7), 511]
    assert r.target(511, 0.0) == 0.8


def test_under_a_budget_of_seconds_progress_counts():
    r = ramp(end=None, fraction=0.5, interval=50)
    assert r.target(99, 0.3) == 0 and r.target(100, 0.25) == pytest.approx(0.4) and r.target(100, 0.6) == 0.8
    assert r.due(150, 0.1) and not r.due(151, 0.1) and r.due(151, 0.5)
