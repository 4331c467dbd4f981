# SPDX-License-Identifier: MIT
"""The registry of metric names."""

import ast
import re
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
        ("opt/spike_frac", "opt/spike_frac"),
        ("opt/else", "opt/<gauge>"),
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
    assert sum(n.startswith("time/") and n.endswith("_s") for n in TABLE) == 12


def test_docs_are_generated_from_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics.markdown(), "docs/metrics.md: make golden"


def patterns(source: str) -> tuple[set[str], list[re.Pattern]]:
    """(texts, f-strings as patterns) of a source file."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    found = []
    for node in (n for n in nodes if isinstance(n, ast.JoinedStr)):
        parts = [re.escape(v.value) if isinstance(v, ast.Constant) else r"([\w.-]+)" for v in node.values]
        if any(isinstance(v, ast.Constant) and "/" in v.value for v in node.values):
            found.append(re.compile("".join(parts)))
    return texts, found


def unwritten(names, sources):
    """Names that no source spells, whole or as an f-string whose gaps are texts of some source."""
    parsed = [patterns(s) for s in sources]
    texts = {word for t, _ in parsed for text in t for word in (text, *text.split())}
    matches = lambda name: (m for _, found in parsed for p in found if (m := p.fullmatch(name)))
    return [n for n in names if n not in texts and not any(set(m.groups()) <= texts for m in matches(n))]


def test_every_name_has_a_writer():
    sources = [p.read_text() for p in (ROOT / "ablab").rglob("*.py") if p.name != "metrics.py"]
    names = [n for n, m in TABLE.items() if "<" not in n and not m.text.startswith("mirrors only")]
    assert len(names) > 40
    assert unwritten(names, sources) == []


def test_a_name_without_a_writer_is_seen():
    sources = ['CLOCKS = ("eval",)\nm = {f"time/{c}_s": 1 for c in CLOCKS}\nm["train_loss"] = 2']
    names = ["time/eval_s", "train_loss", "time/sleep_s", "val_loss"]
    assert unwritten(names, sources) == ["time/sleep_s", "val_loss"]
