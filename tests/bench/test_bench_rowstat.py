# SPDX-License-Identifier: MIT
"""The benchmark of row statistics compares equal things, and its memory tracker counts what is held."""

import pytest
import torch

from ablab.tensor import rowstat as measured
from benchmarks import Sample, rowstat


@pytest.mark.parametrize("stat", rowstat.OURS)
def test_both_sides_compute_the_same(stat):
    assert rowstat.assert_same(stat) < 1e-5


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(rowstat.OURS, "entropy", measured.entropy_share)
    with pytest.raises(AssertionError, match="entropy: differs"):
        rowstat.assert_same("entropy")


def test_peak_counts_tensors_that_live_at_once():
    with rowstat.Peak() as seen:
        a = torch.zeros(1000)  # 4000 B
        b = a.view(10, 100) + 1
        del a
        b.mul_(2)
        c = torch.cat([b, b])
        del b, c
        torch.zeros(10)
    assert seen.bytes == 12_000


def test_cost_is_time_over_the_peers():
    samples = {"ours": [Sample(3.0, 0.0)] * 3, "peer": [Sample(2.0, 0.0)] * 3}
    figure = rowstat.cost("entropy forward: SDPA", samples, "ours", "peer")
    assert figure.value == 1.5 and figure.target == "<= 2.0" and figure.verdict == "ok"
