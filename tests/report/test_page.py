# SPDX-License-Identifier: MIT
"""The page says what the folder proves: verdicts first, everything without a result listed, nothing certified."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

from ablab import report
from ablab.report import load, page
from tests.report import campaign

GOLDEN = Path(__file__).parents[1] / "golden" / "report.md"
HOSTILE = "<img src=x onerror=alert(1)> | ![x](http://x) \x1b[31m=cmd"


def finals(arm, seed):
    """R1 gains 0.05, R2 loses 0.02 on it; seeds differ by 0.01 and 0.001 of it is not shared by the arms."""
    effect = {"R0": 0.0, "R1": -0.05, "R2": -0.03}[arm[0]]
    return 2.4 + 0.01 * seed + effect + 0.001 * ((seed * (2 + int(arm[0][1]))) % 7)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Seven pairs, two registered contrasts, one failure outside of the first."""
    path = tmp_path_factory.mktemp("results")
    skipped = [{"axes": {"OPT": "SGD"}, "reason": "PRUNE_STATE needs OPT_CARRIES_PRUNER"}]
    made = campaign.write(
        path,
        finals,
        seeds=range(1, 8),
        fates={"r2-s3": "diverged"},
        skipped=skipped,
        make_vars={"SEEDS": "7", "O": "elsewhere", "SWEEP": "OPT_LR=1e-3,$(x)"},
        margin=0.01,
    )
    start = time.process_time()
    text = report.build(made).read_text()
    return made, text, time.process_time() - start


def cells(text, heading):
    """The table below a heading as a list of rows."""
    part = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    return [[c.strip() for c in row.strip("|").split(" | ")] for row in rows[2:]]


def test_golden_report(good):
    text = re.sub(r"\b[0-9a-f]{64}\b", "<sha256>", good[1])
    if os.environ.get("ABLAB_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_nothing_is_certified_and_that_stands_on_top(good):
    assert good[1].splitlines()[2].startswith("> **NOT CERTIFIED: no certificate holds")


def test_a_report_takes_less_than_5_seconds_of_one_core(good):
    assert good[2] < 5


def test_verdicts_have_effect_interval_n_and_word(good):
    first, second = cells(good[1], "Verdicts")
    differences = [finals(("R1", {}), s) - finals(("R0", {}), s) for s in range(1, 8)]
    assert first[0] == "R1 - R0" and float(first[1]) == pytest.approx(sum(differences) / 7, rel=1e-3)
    # the interval cuts 3 of the 127 subset means at each end: 2 * 3 / 128 < 0.05
    means = sorted(sum(part) / len(part) for n in range(1, 8) for part in combinations(differences, n))
    assert first[3] == f"{means[2]:+#.4g} .. {means[-3]:+#.4g} (95.3%)"
    assert first[4:7] == ["7", "0.01562", "0.03125"] and first[8:] == ["better", ""]
    assert second[8:] == ["undecided", "blocked by r2-s3 (diverged)"]


def test_arms_show_mean_spread_n_and_the_trials_behind_them(good):
    row = cells(good[1], "Arms")[2]
    values = [finals(("R2", {}), s) for s in range(1, 8) if s != 3]
    assert row[:3] == ["R2", "RA + RA-CT", "6 of 7"]
    assert float(row[3]) == pytest.approx(sum(values) / 6, abs=1e-4)
    assert row[-1] == "r2-s1 r2-s2 r2-s4 r2-s5 r2-s6 r2-s7"


def test_a_failure_is_listed_with_state_reason_and_path(good):
    (row,) = cells(good[1], "Trials without a result")
    assert row[:4] == ["r2-s3", "diverged", "1", "diverged at step 100"]
    assert (good[0].path / row[4]).is_dir()


def test_what_was_not_tested_is_said(good):
    text = good[1].partition("## Not tested")[2].partition("\n## ")[0]
    for claim in ("data other than synth", "OPT=SGD: skipped, PRUNE", "R2 - R1: undecided", "no placebo arm"):
        assert claim in text


def test_reproduction_starts_from_commit_and_frozen_base(good):
    lines = [line for line in good[1].splitlines() if line.startswith("    ")]
    assert lines[0] == "    git checkout " + "c" * 40
    assert lines[-1] == "    make NEW=1 SEEDS=7 SWEEP='OPT_LR=1e-3,$$(x)'"
    frozen = (good[0].report / "base.config").read_text()
    assert frozen == good[0].content["base"]["config"]


def test_no_path_of_this_machine_is_in_any_output(good):
    for path in filter(Path.is_file, good[0].report.rglob("*")):
        assert str(good[0].path.parent).encode() not in path.read_bytes(), path.name


def test_table_has_every_trial_with_its_numbers(good):
    rows = list(csv.DictReader(io.StringIO((good[0].report / "table.csv").read_text())))
    assert len(rows) == 21 and {r["state"] for r in rows} == {"done", "diverged"}
    assert float(rows[0]["val_loss final"]) == finals(("R0", {}), 1)
    assert rows[8]["trial"] == "r2-s3" and rows[8]["val_loss final"] == ""


def test_the_same_campaign_gives_the_same_bytes(good, tmp_path):
    again = campaign.write(
        tmp_path,
        finals,
        seeds=range(1, 8),
        fates={"r2-s3": "diverged"},
        skipped=good[0].content["skipped"],
        make_vars=good[0].content["make_vars"],
        margin=0.01,
    )
    report.build(again)
    for path in filter(Path.is_file, good[0].report.rglob("*")):
        assert (again.report / path.relative_to(good[0].report)).read_bytes() == path.read_bytes(), path.name


def test_summary_has_each_arm_its_difference_and_the_failures(good):
    lines = report.summary_table(good[0]).splitlines()
    assert lines[0] == "ra-20260101-abcdef: val_loss (nats/token, lower is better), final"
    assert lines[2].split()[:3] == ["R0", "Baseline", "7/7"]
    assert lines[3].split()[-3:] == ["to", "R0", "better"]
    assert lines[5] == "no result: r2-s3 (diverged) diverged at step 100"
    assert lines[6].startswith("NOT CERTIFIED")
    assert max(map(len, lines[:5])) <= 120


def test_an_unfinished_campaign_reports_what_is_there(tmp_path):
    fates = {"r0-s2": "running", "r1-s2": "queued", "r2-s1": "queued", "r2-s2": "queued"}
    made = campaign.write(tmp_path, finals, seeds=(1, 2), fates=fates)
    text = report.build(made).read_text()
    assert "Trials: 2 of 6 done; 2 done, 3 queued, 1 running" in text
    first, second = cells(text, "Verdicts")
    assert first[4] == "1" and first[8:] == ["undecided", "unfinished, 2 trials to go"]
    assert second[1] == "-" and second[8] == "undecided"
    assert len(cells(text, "Trials without a result")) == 4


def test_a_campaign_without_any_result_has_a_page(tmp_path):
    made = campaign.write(
        tmp_path, finals, arms=(("R0", {}), ("R1", {})), seeds=(1,), fates={"r0-s1": "queued", "r1-s1": "oom"}
    )
    text = report.build(made).read_text()
    assert "None: no trial is done." in text and not list(made.report.glob("*.png"))
    assert "no result: r1-s1 (oom)" in report.summary_table(made)


def test_a_figure_whose_result_is_gone_does_not_stay(tmp_path):
    made = campaign.write(tmp_path, finals, arms=(("R0", {}), ("R1", {})), seeds=(1,))
    report.build(made)
    assert (made.report / "ablation_forest.png").exists()
    made.trials()[1].file("done").unlink()
    assert "ablation_forest" not in report.build(made).read_text()
    assert not list(made.report.glob("ablation_forest.*")) and (made.report / "loss_curves.png").exists()


def test_amendments_are_shown_and_count(tmp_path):
    arms = (("R0", {}), ("R1", {}))
    made = campaign.write(tmp_path, finals, arms=arms, seeds=(1,))
    campaign.amend(made, arms, 2, finals, "one more seed")
    text = report.build(made).read_text()
    assert "Amended after the start: 2 trials added (one more seed)" in text
    assert [row[2] for row in cells(text, "Arms")] == ["2 of 2", "2 of 2"]


def test_one_seed_reads_n_1_and_has_no_spread(tmp_path):
    facts = {"arms": ((None, {}),), "seeds": (1,), "study": None, "contrasts": (), "question": ""}
    made = campaign.write(tmp_path, lambda arm, seed: 2.0, **facts)
    text = report.build(made).read_text()
    assert cells(text, "Arms")[0][2:7] == ["1 of 1", "2.0000", "-", "-", "-"]
    assert "n=1 in base" in text and "No question was registered." in text
    assert json.loads((made.report / "loss_curves.json").read_text())["info"]["curves"][0]["n"] == 1


def test_a_hand_edited_trial_is_listed_as_damaged_and_not_ranked(tmp_path):
    made = campaign.write(tmp_path, finals, arms=(("R0", {}), ("R1", {})), seeds=(1, 2))
    trial = made.trials()[1]
    path = trial.file("summary")
    path.write_text(path.read_text().replace("2.36", "1.36"))
    text = report.build(made).read_text()
    (row,) = cells(text, "Trials without a result")
    assert row[:2] == ["r1-s1", "damaged"] and f"trials/{trial.name}/summary.json" in row[3]
    assert cells(text, "Arms")[1][2] == "1 of 2" and "1.36" not in text


def test_hiding_rows_never_moves_a_mean(good):
    loaded = load.read(good[0])
    whole = page.arm_table(loaded).rows
    parts = load.Loaded(loaded.dir, loaded.content, loaded.trials, {"R1": loaded.arms["R1"]}, loaded.replay)
    assert page.arm_table(parts).rows == whole[1:2]


def test_a_verdict_of_a_placebo_marks_the_campaign(tmp_path):
    shifted = lambda arm, seed: 2.0 + 0.001 * seed + (0.5 if arm[0] == "placebo1" else 0)
    seeds = {"R0": (1, 2, 3, 4), "placebo1": (5, 6, 7, 8)}
    facts = {"arms": (("R0", {}), ("placebo1", {})), "seeds": seeds, "contrasts": (), "placebo": 1}
    bad = report.build(campaign.write(tmp_path, shifted, name="bad", **facts)).read_text()
    assert "> **PLACEBO VERDICT: placebo1 against R0: +0.504, unpaired p 0.0286, worse**" in bad
    good = report.build(campaign.write(tmp_path, lambda a, s: 2 + s % 2, name="good", **facts)).read_text()
    assert "PLACEBO VERDICT" not in good and "placebo placebo1 against R0" in good


def test_names_from_users_stay_inert(tmp_path):
    titles = {"R0": HOSTILE, "R1": "=cmd|'/C calc'!A0"}
    made = campaign.write(tmp_path, finals, arms=(("R0", {}), ("R1", {})), seeds=(1,), titles=titles, question=HOSTILE)
    text = report.build(made).read_text()
    assert "<img" not in text and not re.search(r"(?<!\\)!\\?\[x", text) and "\x1b" not in text
    assert "\x1b" not in report.summary_table(made)
    assert "<img" not in (made.report / "loss_curves.svg").read_text()
    rows = list(csv.DictReader(io.StringIO((made.report / "table.csv").read_text())))
    assert rows[1]["title"] == "'=cmd|'/C calc'!A0"


def test_import_is_light_and_quick():
    code = (
        "import time; start = time.process_time(); import ablab.report; took = time.process_time() - start; import sys;"
        "print(took, [m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, _, modules = done.stdout.partition(" ")
    assert float(took) < 0.15 and modules.strip() == "[]"


def test_the_page_needs_no_torch(good):
    code = (
        "import sys; from pathlib import Path; from ablab import report; report.build(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good[0].path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["config", "manifest.json", "built.json", "summary.json", "DONE"])
def test_a_damaged_file_of_a_trial_costs_that_trial_alone(tmp_path, name):
    made = campaign.write(tmp_path, lambda arm, seed: 2.0 + seed / 100)
    path = made.trials()[0].path / name
    path.write_bytes(b"\xff" + path.read_bytes()[:20])
    text = report.build(made).read_text()
    assert "Trials: 17 of 18 done; 1 damaged" in text and name in text.partition("## Trials without a result")[2]
