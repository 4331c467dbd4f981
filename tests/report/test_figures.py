# SPDX-License-Identifier: MIT
"""Every figure: same input, same bytes; the compile set refuses other differences; plot-check sees edits."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from ablab.report import figures, load, page, plots
from ablab.report.plots import _compile, gpu_timeline, sparsity_quality
from ablab.rundir import Campaign, Rows
from tests.report import campaign

ROOT = Path(__file__).parents[2]
COMPILE = [("R0", {"SYS_COMPILE": "OFF"}), ("R0", {"SYS_COMPILE": "ON"})]


def finals(arm, seed):
    return 2.4 + 0.01 * seed - {"R0": 0.0, "R1": 0.05, "R2": -0.04}.get(arm[0], 0) + 0.001 * (seed * 3 % 7)


def sparse(arm):
    """R1 reaches 0.5 and R2 0.8 by step; the formula is half a step ahead."""
    end = {"R0": 0.0, "R1": 0.5, "R2": 0.8}[arm[0]]
    at = lambda step: end * min(1.0, step / 100)
    rows = lambda step: {"sparsity": at(step), "sparsity/target": at(step + 5), "learning_rate": 1e-3 * math.exp(-step)}
    return {"rows": rows}


def compiled(folder: Path, other=False, same=False, **options) -> Campaign:
    """Compilation off and on, on 1.5 times as fast; `other`: the learning rate differs too."""

    def symbols(arm):
        on = arm[1]["SYS_COMPILE"] == "ON"
        return {"SYS_COMPILE_ON": "y" if on else "n", "OPT_LR": '"1e-3"' if on and other else '"6e-4"'}

    def facts(arm):
        resolved = campaign.manifest_facts()["resolved"]
        return {"resolved": {**resolved, "compile": "inductor" if arm[1]["SYS_COMPILE"] == "ON" else "off"}}

    def outcome(arm):
        gain = 1.5 if arm[1]["SYS_COMPILE"] == "ON" and not same else 1.0
        perf = {"tok_per_s": 1000.0 * gain, "step_ms_p50": 100 / gain, "peak_mem_bytes": int(2**28 * gain)}
        return {"perf": perf | {"step_ms_p95": 120.0, "mfu": None}}

    arms = {"arms": COMPILE, "seeds": (1, 2, 3), "contrasts": [("R0 SYS_COMPILE=ON", "R0 SYS_COMPILE=OFF")]}
    return campaign.write(folder, finals, symbols=symbols, facts=facts, outcome=outcome, **arms, **options)


def telemetry(made: Campaign) -> None:
    """A second of readings each second on two devices, with 20 s missing, for every trial."""
    for t in made.trials():
        rows = Rows(t.attempt(1).telemetry, "telemetry", {"trial": t.name, "attempt": 1, "period_ms": 1000})
        for s in [*range(30), *range(50, 80)]:
            read = {"busy_pct": 90 + s % 5, "mem_busy_pct": 30 + s % 7, "power_w": 200.0 + s, "used_bytes": 2**33}
            devices = {"GPU-a": read, "GPU-b": read | ({"throttle": ["power"]} if s == 60 else {})}
            rows.line({"t": 1000.0 + s, "devices": devices, "host": {}})
        rows.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A sparse campaign with telemetry and one of compilation, with all their figures."""
    folder = tmp_path_factory.mktemp("results")
    made = campaign.write(folder, finals, outcome=sparse, margin=0.01, study=campaign.STUDY)
    telemetry(made)
    pair = compiled(folder, name="compiled")
    telemetry(pair)
    assert figures.draw(made, "all")[0] == figures.draw(pair, "torch_compile")[0] == 0
    return folder


def judged(made):
    c = load.read(made)
    return c, page.judge(c)


def test_every_figure_exists_in_four_forms(results):
    found = {p.stem for p in results.rglob("report/*.png")}
    names = {n for n in plots.known() if n != "vs_baseline"}
    assert found == names | {"ra_vs_baseline"}
    for png in results.rglob("report/*.png"):
        assert all(png.with_suffix(f".{s}").stat().st_size for s in plots.SUFFIXES)


ALL = pytest.param(("all", "torch_compile"), marks=pytest.mark.slow)


@pytest.mark.parametrize("kinds", [("memory", "torch_compile_grouped"), ALL], ids=["two", "all"])
def test_a_figure_drawn_twice_has_the_same_bytes(results, tmp_path, kinds):
    shutil.copytree(results, tmp_path / "again")
    for name, kind in zip(("ra-20260101-abcdef", "compiled"), kinds, strict=True):
        made = Campaign.open(tmp_path / "again" / name)
        for path in made.report.glob(f"{kind}.*" if "all" not in kinds else "*"):
            path.unlink()
        figures.draw(made, kind)
        for path in (results / name / "report").iterdir():
            assert (made.report / path.name).read_bytes() == path.read_bytes(), path.name


def test_drawn_figures_pass_and_each_kind_of_damage_is_named(results, tmp_path):
    shutil.copytree(results, tmp_path / "r")
    folder = tmp_path / "r" / "ra-20260101-abcdef" / "report"
    found = figures.check([tmp_path / "r"], tmp_path / "r")
    assert figures.is_good(found) and len(found.rows) == 13
    (folder / "memory.csv").write_text((folder / "memory.csv").read_text().replace("R0", "R9"))
    (folder / "schedule.csv").unlink()
    info = json.loads((folder / "throughput.json").read_text())
    (folder / "throughput.json").write_text(json.dumps(info | {"trials": []}))
    shutil.copy(ROOT / "docs/mechanisms-regions.png", folder / "foreign.png")
    shutil.copy(ROOT / "docs/mechanisms-regions.png", folder / "listed.png")
    (folder / "figures.txt").write_text("listed.png: a drawing\nforeign.png:\n")
    states = {Path(r[0]).stem: r[1] for r in figures.check([folder], tmp_path / "r").rows}
    wanted = {
        "memory": "edited",
        "schedule": "orphan",
        "throughput": "edited",
        "foreign": "orphan",
        "listed": "excluded",
    }
    assert states == dict.fromkeys(states, "ok") | wanted
    assert [r[1] for r in figures.check([folder / "loss_curves.png"], tmp_path).rows] == ["orphan"]


def test_one_changed_row_makes_figures_stale(results, tmp_path):
    shutil.copytree(results, tmp_path / "r")
    made = Campaign.open(tmp_path / "r" / "ra-20260101-abcdef")
    rows = made.trials()[0].attempt(1).metrics
    rows.write_text(rows.read_text().replace('"val_loss":2.', '"val_loss":3.', 1))
    found = figures.check([made.report], tmp_path / "r")
    assert not figures.is_good(found) and {r[1] for r in found.rows} == {"stale"}


def test_figures_of_the_documents_pass_or_have_a_reason():
    found = figures.check([ROOT / "docs"], ROOT / "results")
    assert figures.is_good(found) and all(len(row[2]) > 20 for row in found.rows if row[1] == "excluded")


def test_the_compile_set_refuses_arms_that_differ_in_more(tmp_path):
    code, lines = figures.draw(compiled(tmp_path, other=True), "torch_compile")
    assert code == 3 and "OPT_LR" in lines[0] and "SYS_COMPILE_ON" not in lines[0]
    plain = campaign.write(tmp_path, finals, name="plain")
    code, lines = figures.draw(plain, "torch_compile")
    assert code == 3 and "R0 off, R1 off, R2 off" in lines[0] and list(plain.report.iterdir()) == []


def test_the_compile_figures_show_measured_ratios_and_identical_arms_no_difference(results, tmp_path):
    info = plots.figure("torch_compile_before_after").info(*judged(results / "compiled"))
    rows = {row[1]: row for row in info.rows}
    assert rows["tokens/s"][3] == pytest.approx(1.5) and rows["tokens/s"][-1] == "better"
    assert rows["peak memory (GiB)"][3] == pytest.approx(1.5) and rows["peak memory (GiB)"][-1] == "worse"
    assert rows["memory activity (% of time)"][-1] == "no difference"
    same = plots.figure("torch_compile_before_after").info(*judged(compiled(tmp_path, same=True)))
    assert {row[-1] for row in same.rows} == {"no difference"}
    assert not any("saved" in text for text in (*same.labels, same.title, *same.column("measure")))
    assert _compile.status(load.read(results / "compiled").arms["R0 SYS_COMPILE=ON"]) == "on"


def test_gaps_of_telemetry_stay_gaps(results):
    info = gpu_timeline.info(*judged(results / "ra-20260101-abcdef"))
    part = info.groups("device")[1]
    assert len(info.groups("device")) == 2 and [t for t in part.column("throttle") if t] == ["power"]
    assert [a for a, v in zip(part.column("s"), part.column("busy"), strict=True) if v is None] == [39.5]


def test_sparsity_is_what_was_realised(results, tmp_path):
    info = sparsity_quality.info(*judged(results / "ra-20260101-abcdef"))
    assert [round(x, 3) for x in info.column("sparsity")] == [0.0, 0.5, 0.8] and dataclasses.is_dataclass(info)
    assert sparsity_quality.info(*judged(campaign.write(tmp_path, finals))) is None


def test_an_unknown_figure_names_the_known_ones(results):
    with pytest.raises(
        plots.PlotError, match="SET=nosuch: no such figure; there are: all torch_compile ablation_forest"
    ):
        figures.draw(Campaign.open(results / "compiled"), "nosuch")
