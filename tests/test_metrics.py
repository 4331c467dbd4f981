# SPDX-License-Identifier: MIT
"""The registry of metric names."""

from pathlib import Path

import pytest

from ablab import metrics
from ablab.metrics import AGGREGATIONS, TABLE, MetricError, get

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "unit", "better"),
    [
        ("train_loss", "nats/token", "lower"),
        ("val_loss", "nats/token", "lower"),
        ("val_bpb", "bits/byte", "lower"),
        ("learning_rate", "1", None),
        ("train/tok_per_sec", "1/s", "higher"),
        ("train/mfu", "0..1", "higher"),
        ("time/fwd_bwd_s", "s", "lower"),
        ("memory/optimizer_gib", "GiB", "lower"),
        ("final/best_val_perplexity", "1", "lower"),
    ],
)
def test_established_names_have_their_unit_and_direction(name, unit, better):
    metric = get(name)
    assert (metric.name, metric.unit, metric.better) == (name, unit, better)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("sparsity/blocks.0.attn.out.weight", "sparsity/<layer>"),
        ("sparsity/target", "sparsity/target"),
        ("lr/decay", "lr/<group>"),
        ("attn/0/ract_gate", "attn/<layer>/<gauge>"),
        ("attn/11/lens/sym", "attn/<layer>/<gauge>"),
        ("mlp/3/headgate_rms", "mlp/<layer>/<gauge>"),
        ("opt/spike_frac", "opt/<gauge>"),
        ("sched/lam", "sched/lam"),
        ("effect/optim/state_bytes", "effect/<contract>"),
    ],
)
def test_a_pattern_serves_the_names_that_fit(name, pattern):
    assert get(name) is TABLE[pattern]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "val_los",
        "attn/gate",
        "attn/0/",
        "sparsity/a/b",
        "lr/",
        "val_loss ",
        "opt/a b",
        "gauge/x",
        "lr/<group>\n",
    ],
)
def test_other_names_are_errors(name):
    with pytest.raises(MetricError, match=r"no such metric; nearest: .*; register it in ablab/metrics"):
        get(name)


def test_a_near_name_is_proposed():
    with pytest.raises(MetricError, match="'val_los': no such metric; nearest: val_loss "):
        get("val_los")


def test_every_row_of_the_table_is_complete():
    for name, metric in TABLE.items():
        assert name == metric.name and metric.unit and metric.text and metric.agg in AGGREGATIONS
        assert metric.better in ("lower", "higher", None)
    assert sum(n.startswith("time/") and n.endswith("_s") for n in TABLE) == 11


def test_docs_are_generated_from_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics.markdown(), "docs/metrics.md: make golden"
