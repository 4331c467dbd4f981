# SPDX-License-Identifier: MIT
"""Figures hold exactly the numbers they are given, carry their origin, and do not depend on the user's settings."""

import csv
import hashlib
import io
import json
import warnings

import matplotlib
import pytest
from PIL import Image

from ablab.report import stats
from ablab.report.plots import _save, _style, ablation_forest, loss_curves

ORIGIN = {
    "commit": "c" * 40,
    "trials": ["r0-s1"],
    "inputs": "0" * 64,
    "certificate": "uncertified",
    "query": {},
}
CURVES = [
    (
        "R0 Baseline",
        [
            [(0, 5.0), (10, 3.0), (20, 2.0)],
            [(0, 5.0), (10, 3.5), (20, 2.5)],
            [(0, 5.5), (10, 4.0), (30, 1.0)],
        ],
    ),
    ("R1 RA", [[(0, 5.0), (10, 2.5), (20, 1.5)]]),
    ("R2 nothing", [[], []]),
]


def curves(arms=CURVES):
    return loss_curves.arrange("val_loss", "optimizer steps", "val_loss (nats/token)", arms)


def forest():
    rule = stats.Rule(better="lower", margin=0.01)
    base = [2 + 0.01 * i for i in range(8)]
    noise = [0.001 * (i % 3) for i in range(8)]
    made = []
    for name, effect, n in (("R1", -0.5, 8), ("R2", 0.5, 8), ("R3", 0.0, 8), ("R4", 0.3, 1)):
        a = {i: base[i] + effect + noise[i] for i in range(n)}
        facts = {"title": "$x^2$ \u4f60 <b>", "where": "", "failed": (), "waiting": 0, "hours": None}
        made.append(stats.Contrast(left=name, right="R0", a=a, b=dict(enumerate(base)), registered=n > 1, **facts))
    title = "val_loss, left minus right; lower is better"
    return ablation_forest.arrange(title, "difference of val_loss (nats/token)", 0.01, stats.judge(made, rule))


def test_a_curve_is_median_and_range_at_the_points_that_all_seeds_have():
    first, second = curves().curves
    assert first == loss_curves.Curve("R0 Baseline", 3, (0.0, 10.0), (5.0, 3.5), (5.0, 3.0), (5.5, 4.0))
    assert (second.n, second.x, second.low) == (1, (0.0, 10.0, 20.0), second.median)


def test_a_forest_row_is_the_verdict():
    rows = forest().rows
    assert [r.kind for r in rows] == ["better", "worse", "equivalent", "open"]
    assert rows[0].effect == pytest.approx(-0.5 + 0.007 / 8) and rows[0].n == 8 and rows[0].level > 0.95
    assert (rows[3].n, rows[3].low, rows[3].word) == (1, None, "exploratory")


def test_good_and_bad_differ_in_colour_and_in_marker():
    marks = [_style.VERDICTS[kind] for kind in ("better", "worse", "equivalent", "open")]
    assert len({c for c, _ in marks}) == len({m for _, m in marks}) == 4
    red, green = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (_style.WORSE, _style.BETTER))
    assert red[0] == max(red) and green[1] == max(green)


def text_of(figure):
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def test_axes_name_quantity_and_unit_and_the_legend_names_n():
    with _style.style():
        figure = loss_curves.draw(curves())
        assert figure.axes[0].get_ylabel() == "val_loss (nats/token)"
        assert figure.axes[0].get_xlabel() == "optimizer steps"
        assert "R0 Baseline (n=3)" in text_of(figure) and "R1 RA (n=1)" in text_of(figure)
        ax = ablation_forest.draw(forest()).axes[0]
        assert ax.get_xlabel() == "difference of val_loss (nats/token)"


def test_many_arms_get_a_panel_each_beside_the_first():
    arms = [(f"R{i}", [[(s, 5.0 - 0.1 * i - 0.01 * s) for s in (0, 50, 100)]] * 2) for i in range(19)]
    with _style.style():
        figure = loss_curves.draw(curves(arms))
        panels = [ax for ax in figure.axes if ax.axison]
    assert len(panels) == 18
    for i, ax in enumerate(panels, 1):
        first, own = (list(line.get_ydata()) for line in ax.get_lines())
        assert first == list(curves(arms).curves[0].median) and own == list(curves(arms).curves[i].median)


@pytest.mark.parametrize("width", [40, 12])
def test_a_users_text_is_one_short_line_without_mathematics(width):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = _style.label("$x^2$ \u4f60\n\x1b[31m <b> " + "y" * 99, width)
    assert len(text) <= width and text.isprintable() and "\u4f60" not in text and text.startswith("$x^2$ ? ?[")
    with _style.style():
        assert not matplotlib.rcParams["text.parse_math"]


def test_labels_and_numbers_do_not_overlap():
    with _style.style():
        figure = ablation_forest.draw(forest())
        figure.canvas.draw()
        boxes = [t.get_window_extent() for ax in figure.axes for t in (*ax.texts, *ax.get_yticklabels())]
        assert len(boxes) == 6 * 5 + 4
        assert not [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i < j and a.overlaps(b)]


def test_outputs_carry_their_origin_and_the_hash_of_their_numbers(tmp_path):
    assert _save.save(tmp_path, "loss_curves", curves(), loss_curves.draw, ORIGIN) == "loss_curves"
    written = (tmp_path / "loss_curves.csv").read_bytes()
    with Image.open(tmp_path / "loss_curves.png") as image:
        assert round(image.info["dpi"][0]) == 300
        meta = json.loads(image.info["Description"])
    assert meta["csv"] == hashlib.sha256(written).hexdigest() and ORIGIN.items() <= meta.items()
    assert meta["schema"] == "ablab.figure/1"
    svg = (tmp_path / "loss_curves.svg").read_text()
    assert meta["csv"] in svg and "uncertified" in svg
    body = json.loads((tmp_path / "loss_curves.json").read_text())
    assert body["csv"] == meta["csv"] and body["info"]["curves"][0]["median"] == [5.0, 3.5]
    rows = list(csv.DictReader(io.StringIO(written.decode())))
    assert [float(r["median"]) for r in rows if r["arm"] == "R0 Baseline"] == [5.0, 3.5]


def test_same_input_same_bytes_whatever_the_users_settings(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _save.save(tmp_path / "a", "x", forest(), ablation_forest.draw, ORIGIN)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None, "savefig.dpi": 50}):
        _save.save(tmp_path / "b", "x", forest(), ablation_forest.draw, ORIGIN)
    for suffix in _save.SUFFIXES:
        assert (tmp_path / "a" / f"x.{suffix}").read_bytes() == (tmp_path / "b" / f"x.{suffix}").read_bytes(), suffix


def test_one_changed_number_changes_picture_and_hash(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.01)):
        (tmp_path / name).mkdir()
        moved = [(arm, [[(x, v + shift) for x, v in seed] for seed in seeds]) for arm, seeds in CURVES]
        _save.save(tmp_path / name, "x", curves(moved), loss_curves.draw, ORIGIN)
    assert (tmp_path / "a" / "x.png").read_bytes() != (tmp_path / "b" / "x.png").read_bytes()
    assert (tmp_path / "a" / "x.csv").read_bytes() != (tmp_path / "b" / "x.csv").read_bytes()
