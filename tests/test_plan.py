# SPDX-License-Identifier: MIT
"""The plan: which trials a study means, what is refused before anything exists, and what is frozen."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from math import comb
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab import kconf, machine, plan, rundir

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/plans"
GPU = machine.Device(kind="cuda", name="card", uuid="GPU-1", memory_bytes=1 << 36)


def computer(cores=2, gpus=0):
    return machine.Machine(
        cores=tuple(range(cores)),
        memory_bytes=1 << 34,
        cpu="cpu",
        devices=(GPU,) * gpus,
        host="h",
        boot_id="b",
    )


def expand(name="tiny", at=None, gpus=0, cores=2, **variables):
    """The plan of one of the project's defconfigs."""
    layers = [kconf.lex(ROOT / "defconfigs" / name)]
    return plan.expand(layers, variables, computer(cores, gpus))


IMAGE = """CONFIG_SCHED_WARMUP=100
CONFIG_TRAIN_STEPS=10000
CONFIG_TRAIN_BATCH_EFFECTIVE=128
CONFIG_EVAL_INTERVAL=500
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with the Kconfig files of this one, a defconfig `image`, the shipped studies; returns its folder."""
    root = tmp_path_factory.mktemp("matrix")
    for path in [ROOT / "Kconfig", *(ROOT / "ablab").rglob("Kconfig*")]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    for folder in ("defconfigs", "studies"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "defconfigs/image").write_text(IMAGE)
    return root


def expand_in(root, text, base="", gpus=0, **variables):
    """The plan of a study that is given as text, or by the name of its file."""
    name = text
    if "\n" in text:
        name = "ra"
        (root / "studies/ra.study").write_text(text)
    words = [f'CONFIG_STUDY="{name}"', *base.split()]
    extra = kconf.parse("fragment", enumerate(words, 1), "fragment")
    found = re.search(r"^base +(\S+)", (root / f"studies/{name}.study").read_text(), re.M)
    known = found and (root / "defconfigs" / found[1]).exists()
    layers = [kconf.lex(root / "defconfigs" / (found[1] if known else "image")), extra]
    return plan.expand(layers, variables, computer(gpus=gpus), kconf.load(root))


def refused(root, text, base="", **variables):
    """The error text of a study, as it reads from the project root."""
    with pytest.raises(ValueError) as caught:
        expand_in(root, text, base, **variables)
    assert type(caught.value) in (plan.PlanError, plan.StudyError, plan.ConfigError)
    return str(caught.value).replace(f"{root}/", "")


HEAD = "base image\nseeds 3 paired\n"
STEPS = HEAD + "[R0] Baseline\n[R1] Sink\nCONFIG_OPT_SINKGD=y\n[R2 : R1] Tanh\nCONFIG_OPT_SINKGD_FORM_TANH=y\n"
MATRIX = """\
base image
sweep OPT = SGD ADAMW ADAMWPRUNE
sweep PRUNE = NONE MAGNITUDE STATE
sweep PRUNE_SPARSITY = 0.5 0.9
"""


# What a study means


def test_a_matrix_has_the_trials_of_the_closed_form(project):
    """E (1 + 2 S) + 1 + S V per seed: E external optimizers, S sparsities, V scores, two external methods."""
    p = expand_in(project, "optim-matrix")
    external, sparsities, scores, seeds = 5, 3, 1, 5
    assert len(p.trials) == seeds * (external * (1 + 2 * sparsities) + 1 + sparsities * scores) == 195
    assert p.kind == "matrix"
    assert p.factors == {"seeds": 5, "OPT": 6, "PRUNE": 4, "PRUNE_SPARSITY": 3, "PRUNE_STATE_SCORE": 1}
    assert len(p.contrasts) == sparsities
    assert len({t.hash for t in p.trials}) == len({t.id for t in p.trials}) == 195


def test_skips_name_the_unmet_dependency(project):
    reasons = {tuple(axes.items()): why for axes, why in expand_in(project, "optim-matrix").skipped}
    for optimizer in ("SGD", "ADAM", "ADAMW", "ADAMWADV", "ADAMWSPAM"):
        why = reasons[(("OPT", optimizer), ("PRUNE", "STATE"))]
        assert why.startswith("PRUNE_STATE needs OPT_CARRIES_PRUNER")
        assert ("OPT_HAS_MOMENTS" in why) == (optimizer == "SGD")
    assert len(reasons) == 7
    assert reasons[(("OPT", "ADAMWPRUNE"), ("PRUNE", "MOVEMENT"))].startswith("PRUNE_MOVEMENT needs !OPT_CARRIES")


def test_steps_with_axes_collapse_where_the_axis_is_invisible(project):
    p = expand_in(project, "criteria")
    count = {step: len([t for t in p.trials if t.step == step and t.seed == 1337]) for step in ("D0", "M0", "M1", "S0")}
    assert count == {"D0": 1, "M0": 1, "M1": 1, "S0": 12}
    assert len(p.trials) == 90 and len(p.contrasts) == 14
    assert all(t.axes == {} for t in p.trials if t.step != "S0")
    by_score = [t.axes for t in p.trials if t.seed == 1337 and t.axes.get("PRUNE_STATE_SCORE") == "BITTER5"]
    assert [a["PRUNE_STATE_BITTER5"] for a in by_score] == ["AWAY", "TOWARD"]
    assert ("S0 PRUNE_STATE_SCORE=BITTER5 PRUNE_STATE_BITTER5=TOWARD", "M0") in p.contrasts
    assert "cannot" not in plan.power(p)[0]
    (depth,) = [t for t in p.trials if t.id == "s0-bitter4-s1337"]
    assert "CONFIG_PRUNE_ALLOC_DEPTH=y" in depth.config and "CONFIG_PRUNE_ALLOC_GLOBAL=y" not in depth.config


def test_the_order_of_the_axes_does_not_change_the_trials(project):
    head, *sweeps = MATRIX.splitlines()
    made = set()
    for order in itertools.permutations(sweeps):
        p = expand_in(project, "\n".join([head, *order, ""]))
        made.add(frozenset(t.hash for t in p.trials))
    (only,) = made
    # SGD and ADAMW: dense and magnitude at two sparsities; ADAMWPRUNE: dense and state at two sparsities
    assert len(only) == 2 * 3 + 3


def test_an_axis_that_the_base_shows_and_another_axis_hides_collapses(project):
    text = "base image\nsweep PRUNE_SPARSITY = 0.5 0.9\nsweep PRUNE = MAGNITUDE NONE\n"
    p = expand_in(project, text, "CONFIG_PRUNE_MAGNITUDE=y")
    assert [t.axes for t in p.trials] == [
        {"PRUNE_SPARSITY": "0.5", "PRUNE": "MAGNITUDE"},
        {"PRUNE": "NONE"},
        {"PRUNE_SPARSITY": "0.9", "PRUNE": "MAGNITUDE"},
    ]


def test_seeds_are_the_slowest_axis_and_ids_are_readable(project):
    p = expand_in(project, STEPS)
    assert [t.id for t in p.trials] == [f"r{s}-s{n}" for n in (1337, 1338, 1339) for s in (0, 1, 2)]
    assert [t.seed for t in p.trials[::3]] == [1337, 1338, 1339]
    assert p.trials[1].folder == f"r1-s1337-{p.trials[1].hash[:8]}"
    assert {t.group for t in p.trials if t.step == "R1"} == {p.trials[1].group}
    assert all(rundir.checked(t.folder) for t in p.trials)
    assert p.kind == "ablation" and p.contrasts == (("R1", "R0"), ("R2", "R1"))


def test_a_step_is_the_fragments_of_its_ancestors_and_its_own(project):
    p = expand_in(project, STEPS)
    r0, r1, r2 = p.trials[:3]
    assert r0.overrides == ()
    assert r1.overrides[:2] == ("CONFIG_OPT_SINKGD=y", "CONFIG_OPT_SINKGD_FORM_PAPER=y")
    assert r2.values["OPT_SINKGD"] is True and r2.values["OPT_SINKGD_FORM_TANH"] is True
    assert r0.config.count("CONFIG_OPT_ADAMW=y\n") == 1


def test_joined_axes_move_together(project):
    p = expand_in(project, "base image\nsweep OPT_LR = 1e-4 3e-4\nwith SCHED_WARMUP = 10 20\nsweep OPT = ADAM SGD\n")
    assert [(t.values["OPT_LR"], t.values["SCHED_WARMUP"]) for t in p.trials] == [
        (1e-4, 10),
        (1e-4, 10),
        (3e-4, 20),
        (3e-4, 20),
    ]
    assert p.trials[0].id == "base-1e-4-adam-s1337"
    assert p.factors == {"OPT_LR with SCHED_WARMUP": 2, "OPT": 2}


def test_points_that_resolve_alike_are_one_trial():
    p = expand(SWEEP="SYS_COMPILE=AUTO,OFF")
    assert len(p.trials) == 1 and p.trials[0].values["SYS_COMPILE_OFF"] is True


def test_ids_that_would_be_equal_are_told_apart():
    p = expand(SWEEP='DATA_DIR="a/b",a-b')
    ids = [t.id for t in p.trials]
    assert len(set(ids)) == 2 and all(rundir.checked(i) for i in ids)
    assert all(re.fullmatch(r"base-a-b-[0-9a-f]{6}-s1337", i) for i in ids)


def test_placebo_arms_copy_the_baseline_on_seeds_of_their_own(project):
    p = expand_in(project, STEPS.replace("seeds", "placebo 2\nseeds"))
    arms = {s: [t for t in p.trials if t.step == s] for s in ("R0", "placebo1", "placebo2")}
    seeds = [t.seed for arm in arms.values() for t in arm]
    assert seeds == [1337, 1338, 1339, 1340, 1341, 1342, 1343, 1344, 1345]
    assert len({t.group for arm in arms.values() for t in arm}) == 1
    assert arms["placebo1"][0].id == "placebo1-s1340"
    assert p.contrasts == (("R1", "R0"), ("R2", "R1"))


def test_a_contrast_that_names_an_axis_names_what_moves_with_it(project):
    text = MATRIX.split("sweep")[0] + (
        "sweep TRAIN_STEPS = 5000 9000\nwith OPT_LR = 1e-3 2e-3\ncontrast TRAIN_STEPS=9000 - TRAIN_STEPS=5000\n"
    )
    assert expand_in(project, text).contrasts == (("TRAIN_STEPS=9000 OPT_LR=2e-3", "TRAIN_STEPS=5000 OPT_LR=1e-3"),)


def test_a_point_contrast_holds_at_every_point_it_does_not_name(project):
    text = MATRIX + "contrast OPT=ADAMW PRUNE=MAGNITUDE - OPT=SGD PRUNE=MAGNITUDE, PRUNE=MAGNITUDE - PRUNE=NONE\n"
    assert set(expand_in(project, text).contrasts) == {
        ("OPT=ADAMW PRUNE=MAGNITUDE PRUNE_SPARSITY=0.5", "OPT=SGD PRUNE=MAGNITUDE PRUNE_SPARSITY=0.5"),
        ("OPT=ADAMW PRUNE=MAGNITUDE PRUNE_SPARSITY=0.9", "OPT=SGD PRUNE=MAGNITUDE PRUNE_SPARSITY=0.9"),
        ("OPT=ADAMW PRUNE=MAGNITUDE PRUNE_SPARSITY=0.5", "OPT=ADAMW PRUNE=NONE"),
        ("OPT=ADAMW PRUNE=MAGNITUDE PRUNE_SPARSITY=0.9", "OPT=ADAMW PRUNE=NONE"),
        ("OPT=SGD PRUNE=MAGNITUDE PRUNE_SPARSITY=0.5", "OPT=SGD PRUNE=NONE"),
        ("OPT=SGD PRUNE=MAGNITUDE PRUNE_SPARSITY=0.9", "OPT=SGD PRUNE=NONE"),
    }


def test_an_arm_is_found_again_by_its_text(project):
    p = expand_in(project, "criteria")
    for arm in {a for pair in p.contrasts for a in pair}:
        assert len([t for t in p.trials if plan.arm_text(t.step, t.axes) == arm]) == 6


# The make line


@pytest.mark.parametrize(
    ("variables", "symbol", "value"),
    [
        ({"TIME": "90"}, "TRAIN_TIME", 90),
        ({"TIME": "2m"}, "TRAIN_TIME", 120),
        ({"TIME": "1h"}, "TRAIN_TIME", 3600),
        ({"MAX_ITERS": "60"}, "TRAIN_STEPS", 60),
        ({"MAX_TOKENS": "20000"}, "TRAIN_TOKENS", 20000),
        ({"EPOCHS": "3"}, "TRAIN_EPOCHS", 3),
        ({"CONFIG_OPT_LR": "1e-4"}, "OPT_LR", 1e-4),
        ({"CONFIG_DATA_DIR": "a b"}, "DATA_DIR", "a b"),
        ({"CONFIG_TRAIN_SEED": "5", "SEEDS": "2"}, "TRAIN_SEED", 5),
        ({"O": "/x/y"}, "STUDY_RESULTS", "/x/y"),
        ({"JOBS": "auto"}, "STUDY_JOBS", 0),
        ({"KEEP_GOING": "n"}, "STUDY_KEEP_GOING", False),
        ({"TRACKER": "none"}, "TRAIN_SEED", 1337),
    ],
)
def test_variables_of_the_make_line_act(variables, symbol, value):
    assert expand(**variables).trials[0].values[symbol] == value


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"TIME": "2d"}, "make line: error: TIME=2d: not a whole number of seconds, or one with s, m or h"),
        ({"MAX_ITERS": "1e4"}, "make line: error: CONFIG_TRAIN_STEPS=1e4: not an int"),
        ({"SEEDS": "0"}, "make line: error: SEEDS=0: not a number of 1 or more"),
        ({"SEEDS": ""}, "make line: error: SEEDS=: not a number of 1 or more"),
        (
            {"SEEDS": "2", "SWEEP": "TRAIN_SEED=1,2"},
            "make line: error: SEEDS=2: SWEEP= names TRAIN_SEED too; keep one",
        ),
        (
            {"SWEEP": "SCHED=LIN"},
            "make line: error: CONFIG_SCHED_LIN: no such symbol; nearest: CONFIG_SCHED_LINEAR",
        ),
        ({"SWEEP": "OPT_LR=20"}, 'make line: error: CONFIG_OPT_LR="20": outside (0, 10]'),
        (
            {"SWEEP": "TRAIN_SEED=a,2"},
            "make line: error: SWEEP=TRAIN_SEED=a,2: TRAIN_SEED: a 2: not all are ints",
        ),
        (
            {"SWEEP": "TRAIN_SEED=1..1000 EVAL_TOKENS=1..1000"},
            "tiny: error: 1,000,000 points; 100,000 at most, sweep less",
        ),
        ({"SWEEP": "OPT_LR=1,2", "CONFIG_OPT_LR": "1"}, "make line: error: CONFIG_OPT_LR: swept by SWEEP="),
        ({"STEPS": "R1"}, "make line: error: STEPS=R1: no step R1; steps: none"),
        ({"TRACKER": "paper"}, "make line: error: TRACKER=paper: no tracker paper; trackers: none"),
        ({"CONFIG_STUDY": "nope"}, 'CONFIG_STUDY="nope": no such study; nearest first: '),
    ],
)
def test_variables_that_cannot_act_are_errors(variables, text):
    with pytest.raises(ValueError) as caught:
        expand(**variables)
    assert str(caught.value).startswith(text)


def test_the_make_line_may_not_set_what_a_planned_step_or_axis_sets(project):
    lr = project / "studies/lr.study"
    lr.write_text("base image\nsweep OPT_LR = 1e-4 3e-4\n")
    assert refused(project, "lr", CONFIG_OPT_LR="1e-4") == (
        "make line: error: CONFIG_OPT_LR: swept by study 'lr'; change the axis with SWEEP="
    )
    assert refused(project, STEPS, CONFIG_OPT_ADAM="y") == (
        "make line: error: CONFIG_OPT_ADAM: set by step R1 of study 'ra'; edit the step"
    )
    assert len(expand_in(project, STEPS, STEPS="R0", CONFIG_OPT_ADAM="y").trials) == 3


def test_sweeps_of_the_make_line_add_or_replace_axes(project):
    text = "base image\nsweep OPT_LR = 1e-4 3e-4\nwith SCHED_WARMUP = 10 20\nsweep OPT = ADAM SGD\n"
    p = expand_in(project, text, SWEEP="OPT_LR=0.1,0.2,0.3 TRAIN_SEED=1..2 PRUNE=NONE,DISPLACEMENT")
    assert p.factors == {"seeds": 2, "OPT_LR": 3, "OPT": 2, "PRUNE": 2}
    assert len(p.trials) == 24 and not p.as_written


def test_steps_select_and_ancestors_lend_their_fragments(project):
    p = expand_in(project, STEPS, STEPS="R2,R0")
    assert [t.step for t in p.trials[:2]] == ["R0", "R2"]
    assert p.trials[1].values["OPT_SINKGD_FORM_TANH"] is True
    assert p.contrasts == ()
    assert refused(project, STEPS, STEPS="R0,R9").endswith("STEPS=R0,R9: no step R9; steps: R0 R1 R2")


# What is refused


def test_two_steps_that_resolve_alike_read_as_specified(project):
    text = "#\n" * 5 + STEPS + "[R3] Copy of R1\nCONFIG_OPT_SINKGD=y\n"
    assert refused(project, text) == ("studies/ra.study:13: error: [R3]: resolves to the same configuration as R1")


def test_a_wrong_expect_reads_as_specified(project):
    head = MATRIX.replace("base image\n", "base image\nseeds 3\nexpect 57\n")
    assert refused(project, head) == ("studies/ra.study:3: error: expect 57: the plan has 27 trials, 9 points skipped")
    right = head.replace("57", "27")
    assert len(expand_in(project, right).trials) == 27
    assert len(expand_in(project, right, SEEDS="1").trials) == 9  # expect counts the file as written
    assert "expect 57: the plan has 27" in refused(project, head, SEEDS="1")


def test_errors_of_step_bodies_name_the_step_and_come_together(project):
    text = HEAD + "[R0] a\n[R1] b\nCONFIG_OPT_SGDD=y\n[R2 : R1] c\nCONFIG_PRUNE_STATE=y\n[R3] d\nCONFIG_OPT_LR = 1\n"
    assert refused(project, text).splitlines() == [
        "studies/ra.study:5: error: [R1]: CONFIG_OPT_SGDD: no such symbol; nearest: CONFIG_OPT_SGD",
        "studies/ra.study:9: error: [R3]: 'CONFIG_OPT_LR = 1': blank beside '='; write CONFIG_OPT_LR=1",
    ]
    text = HEAD + "[R0] a\n[R1] b\nCONFIG_PRUNE_STATE=y\n"
    error = refused(project, text)
    assert error.startswith(
        "studies/ra.study:5: error: [R1]: CONFIG_PRUNE_STATE=y: stayed n; needs OPT_CARRIES_PRUNER, which"
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "base image\nsweep OPTT = SGD\n",
            "studies/ra.study:2: error: CONFIG_OPTT_SGD: no such symbol; nearest: CONFIG_OPT_SGD",
        ),
        (
            "base image\nsweep OPT_LR = 1 99\n",
            'studies/ra.study:2: error: CONFIG_OPT_LR="99": outside (0, 10]',
        ),
        (
            "base image\nsweep OPT = SGD ADAM\nsweep PRUNE = NONE STATE\n",
            "studies/ra.study:3: error: PRUNE = STATE: no trial uses it; everywhere the item is blocked or"
            " its axis invisible",
        ),
        ("base imag\n[A] a\n", "studies/ra.study:1: error: base imag: no such defconfig; nearest: image"),
        (
            MATRIX + "contrast OPT=SGD PRUNE=STATE - OPT=ADAMW PRUNE=NONE\n",
            "studies/ra.study:5: error: contrast OPT=SGD PRUNE=STATE - OPT=ADAMW PRUNE=NONE: no trials to" " compare",
        ),
        (
            STEPS.replace("seeds 3 paired", "seeds 6 paired  looks 3 6"),
            "studies/ra.study:2: error: look 3: cannot decide; smallest p 0.25, needs 0.013\n"
            "studies/ra.study:2: error: look 6: cannot decide; smallest p 0.031, needs 0.013",
        ),
        (
            STEPS.replace("seeds 3 paired", "seeds 8 paired  looks 8 12"),
            "studies/ra.study:2: error: look 12: the plan has 8 seeds",
        ),
    ],
)
def test_a_study_that_cannot_be_is_refused(project, text, error):
    assert refused(project, text) == error


@pytest.mark.parametrize(
    ("variables", "texts"),
    [
        (
            {"CONFIG_TRAIN_BATCH_MICRO": "3"},
            ["CONFIG_TRAIN_BATCH_MICRO=3: does not divide CONFIG_TRAIN_BATCH_EFFECTIVE=8"],
        ),
        (
            {"MAX_ITERS": "5"},
            ["CONFIG_SCHED_WARMUP=5: the budget ends inside the warm-up", "CONFIG_EVAL_INTERVAL=10: 1"],
        ),
        (
            {"MAX_TOKENS": "10000"},
            ["CONFIG_EVAL_INTERVAL=10: 4 evaluations in 40 steps, 5 or more are needed"],
        ),
        ({"SWEEP": "EVAL_INTERVAL=10,20,50"}, ["CONFIG_EVAL_INTERVAL=20: 3", "CONFIG_EVAL_INTERVAL=50: 1"]),
        (
            {"CONFIG_SCHED_COUPLING_RAMP": "y", "CONFIG_SCHED_COUPLING_START": "50"},
            ["CONFIG_SCHED_COUPLING_START=50: the budget ends before any coupling starts, after 50 steps; lower it"],
        ),
        (
            {"CONFIG_SCHED_COUPLING_VARIANCE": "y"},
            ["CONFIG_SCHED_COUPLING_WINDOW=50: the budget ends before any coupling starts"],
        ),
        (
            {"CONFIG_PRUNE_MAGNITUDE": "y", "CONFIG_PRUNE_WARMUP": "37"},
            ["CONFIG_PRUNE_WARMUP=37: the ramp of pruning must end after it and within 50 steps, but CONFIG_PRUNE_R"],
        ),
        (
            {"CONFIG_PRUNE_MAGNITUDE": "y", "CONFIG_PRUNE_RAMP_BY_STEP": "y", "CONFIG_PRUNE_RAMP_STEP": "51"},
            ["CONFIG_PRUNE_RAMP_STEP ends it at step 51"],
        ),
    ],
)
def test_a_budget_or_batch_that_cannot_work_is_refused(variables, texts):
    with pytest.raises(plan.PlanError) as caught:
        expand(**variables)
    found = str(caught.value).splitlines()
    assert len(found) == len(texts)
    assert all(text in line for text, line in zip(texts, found, strict=True))


def test_an_equal_flaw_of_many_trials_is_one_line():
    with pytest.raises(plan.PlanError, match=r"^base-s1337 and 9 more: error: CONFIG_EVAL_INTERVAL=50"):
        expand(SEEDS="10", CONFIG_EVAL_INTERVAL="50")


# What the machine decides


def test_autos_on_a_cpu():
    p = expand("demo", cores=4)
    assert {(a["asked"], a["symbol"], a["value"]) for a in p.autos} == {
        ("SYS_DEVICE_AUTO", "SYS_DEVICE_CPU", "y"),
        ("SYS_COMPILE_AUTO", "SYS_COMPILE_OFF", "y"),
        ("SYS_AMP_AUTO", "SYS_AMP_OFF", "y"),
        ("SYS_THREADS", "SYS_THREADS", "2"),
        ("TRAIN_BATCH_MICRO", "TRAIN_BATCH_MICRO", "12"),
    }
    assert {"no GPU", "4 cores, 2 at once"} < {a["why"] for a in p.autos}
    assert not [a for a in p.autos for t in p.trials if f"CONFIG_{a['asked']}=y" in t.config]
    assert p.trials[0].overrides == ()


def test_autos_on_gpus():
    v = expand(gpus=2, cores=8).trials[0].values
    assert v["SYS_DEVICE_CUDA"] and v["SYS_COMPILE_ON"] and v["SYS_AMP_BF16"] and v["SYS_THREADS"] == 4
    v = expand(gpus=2, cores=8, CONFIG_SYS_DEVICE_CPU="y").trials[0].values
    assert v["SYS_DEVICE_CPU"] and v["SYS_COMPILE_OFF"] and v["SYS_THREADS"] == 8


def test_what_a_gpu_decides_is_provisional_until_it_was_measured():
    p = expand(gpus=1, SEEDS="2")
    assert p.measure and p.measured is None and p.open == {t.group: [*plan.MEASURED] for t in p.trials}
    assert sum(a["why"] == plan.LATER for a in p.autos) == 2
    chosen = {
        "SYS_COMPILE_AUTO": ["SYS_COMPILE_OFF", "y", "slower"],
        "TRAIN_BATCH_MICRO": ["TRAIN_BATCH_MICRO", "4", "largest"],
    }
    known = {p.measure: {"chosen": chosen, "measured": {"free": 1}}, "another": {}}
    layers = [kconf.lex(ROOT / "defconfigs/tiny")]
    q = plan.expand(layers, {}, computer(2, 1), measured=known)  # seeds change nothing of it
    assert q.measure == p.measure and q.measured == {"free": 1}
    v = q.trials[0].values
    assert v["SYS_COMPILE_OFF"] and v["TRAIN_BATCH_MICRO"] == 4
    assert {a["why"] for a in q.autos} >= {"slower", "largest"}
    assert plan.evidence(q, computer(2, 1))["measured"] == {"free": 1}
    other = plan.expand(layers, {"CONFIG_OPT_SGD": "y"}, computer(2, 1), measured=known)
    assert other.measure != p.measure and other.measured is None  # another arm needs other memory


def test_a_gpu_decides_only_what_is_left_to_it_and_a_cpu_nothing():
    assert expand().measure == "" and "measured" not in plan.evidence(expand(), computer())
    p = expand(gpus=1, CONFIG_SYS_COMPILE_ON="y")
    assert p.open == {t.group: ["TRAIN_BATCH_MICRO"] for t in p.trials}
    assert expand(gpus=1, CONFIG_SYS_COMPILE_ON="y", CONFIG_TRAIN_BATCH_MICRO="4").measure == ""


@pytest.mark.parametrize(("batches", "micro"), [("8", 8), ("64", 16), ("7", 7), ("34", 2), ("24,36", 12), ("17,19", 1)])
def test_the_auto_micro_batch_is_the_largest_that_divides_all(batches, micro):
    p = expand(SWEEP=f"TRAIN_BATCH_EFFECTIVE={batches}")
    assert {t.values["TRAIN_BATCH_MICRO"] for t in p.trials} == {micro}
    sizes = [int(b) for b in batches.split(",")]
    assert max(d for d in range(1, 17) if all(s % d == 0 for s in sizes)) == micro


def test_an_auto_leaves_alone_what_is_set(project):
    p = expand_in(project, "criteria", gpus=0)
    assert all(t.values["SYS_COMPILE_ON"] for t in p.trials)
    assert "SYS_COMPILE_AUTO" not in {a["asked"] for a in p.autos}


# Identity


def test_the_hash_covers_trials_study_and_variables_but_not_how_they_run(project):
    same = [expand_in(project, STEPS).hash, expand_in(project, STEPS, O="/elsewhere", KEEP_GOING="n").hash]
    other = [
        expand_in(project, STEPS, SEEDS="2").hash,
        expand_in(project, STEPS, STEPS="R0,R1").hash,
        expand_in(project, STEPS, 'CONFIG_OPT_LR="1e-4"').hash,
        expand_in(project, STEPS.replace("Sink", "Sunk")).hash,
        expand_in(project, STEPS, JOBS="2").hash,  # other threads
    ]
    assert len(set(same)) == 1 and len({*same, *other}) == 6


def test_decoration_does_not_change_a_trial():
    ids = [expand(**v).trials[0].hash for v in ({}, {"CONFIG_STUDY_HANG": "100"}, {"O": "/x"})]
    assert len(set(ids)) == 1


def test_a_trial_settles_again_from_its_text(project):
    tree = kconf.load(project)
    for t in expand_in(project, "criteria").trials[:16]:
        again = kconf.settle(tree, [kconf.lex(Path("config"), t.config)])
        assert kconf.identity(again.values) == t.hash and again.values == t.values


# What n can show


@pytest.mark.parametrize(
    ("n", "paired", "p"),
    [(3, True, 0.25), (4, True, 0.125), (5, True, 0.0625), (6, True, 0.03125), (8, True, 0.0078125)]
    + [(3, False, 0.1), (4, False, 2 / 70), (5, False, 2 / 252), (1, False, 1.0)],
)
def test_the_smallest_p_is_that_of_the_exact_test(n, paired, p):
    assert plan.smallest_p(n, paired) == pytest.approx(p, rel=1e-12)
    assert plan.smallest_p(n, False) == min(1.0, 2 / comb(2 * n, n))


@pytest.mark.parametrize(("family", "pairs"), [(1, 6), (3, 7), (5, 8), (10, 9), (18, 10)])
def test_the_pairs_that_a_family_needs_are_those_of_the_table(project, family, pairs):
    steps = "".join(f"[S{i}] s\nCONFIG_SCHED_WARMUP={i + 1}\n" for i in range(family + 1))
    assert f"{pairs} can" in plan.power(expand_in(project, HEAD + steps))[0]
    enough = plan.power(expand_in(project, HEAD.replace("3", str(pairs)) + steps))[0]
    assert enough.endswith("can decide")


@pytest.mark.parametrize(
    "variables",
    [
        {"CONFIG_SCHED_COUPLING_RAMP": "y", "CONFIG_SCHED_COUPLING_START": "49"},
        {"CONFIG_SCHED_COUPLING_VARIANCE": "y", "CONFIG_SCHED_COUPLING_WINDOW": "8"},
        {"CONFIG_SCHED_COUPLING_VARIANCE": "y", "CONFIG_SCHED_COUPLING_DEADLINE": "49"},
    ],
)
def test_a_coupling_that_starts_in_the_budget_is_planned(variables):
    assert len(expand(**variables).trials) == 1


def test_widths_off_multiples_of_64_are_named_and_switches_are_none():
    words = ["ATTN_MLA=y", "MLP_LATENT=y", "MLP_HEADGATE=y", "MLP_HEADGATE_DIM=37", "MLP_CROSS=y", "MLP_CROSS_RANK=128"]
    variables = {f"CONFIG_{name}": value for name, value in (word.split("=") for word in words)}
    said = [line for line in plan.listing(expand(**variables)).splitlines() if line.startswith("width ")]
    assert [line.split()[1] for line in said] == ["CONFIG_MODEL_GPT_EMBED", "CONFIG_MLP_HEADGATE_DIM", "width"]
    assert "CONFIG_MLP_HEADGATE_DIM = 37: off multiples of 64" in said[1]


def test_two_pairs_of_the_demo_cannot_decide():
    assert "cannot decide at this n; 7 can" in plan.listing(expand("demo"))


# The frozen form


def frozen(p, **changes):
    facts = {
        "name": "c",
        "created": "2026-01-01T00:00:00Z",
        "code": {"commit": None, "dirty": False, "patch": None, "tree": "0" * 64},
        "data": {"name": "synth", "sha256": "0" * 64, "tokens": 1},
        "check": {"verdict": "passed", "sha256": None},
    }
    return plan.frozen(p, **{**facts, **changes})


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_the_frozen_plan_is_a_valid_campaign(tmp_path, name):
    p = expand(name)
    campaign = rundir.Campaign.create(tmp_path, "c", frozen(p), {t.folder: t.config for t in p.trials})
    content = json.loads((campaign.path / "campaign.json").read_text())
    assert [t["id"] for t in content["trials"]] == [t.id for t in p.trials]
    assert content["plan"] == p.hash and content["kind"] == p.kind
    assert content["registration"]["metric"] == {"key": "val_loss", "mode": "final"}
    assert content["registration"]["budget"] == "steps"
    assert content["policy"]["retries"]["preempted"] == 100


def test_the_forecast_goes_into_the_records():
    p = expand()
    record = frozen(p, forecast={p.trials[0].group: {"mem_gib": [1.0, 2.0, 3.0], "hours": [1.0]}})["trials"][0]
    assert record["resources"] == {"gpus": 0, "cpus": 2, "mem_gib": 3.0}


def test_an_amendment_adds_the_trials_that_more_seeds_would_have_made(project):
    text = STEPS.replace("seeds 3", "seeds 2")
    content = json.loads(json.dumps(frozen(expand_in(project, text))))
    added = plan.amended(content, 1, kconf.load(project))
    longer = expand_in(project, STEPS)
    assert [t.hash for t in added] == [t.hash for t in longer.trials[-3:]]
    assert [(t.id, t.step, t.title) for t in added] == [(t.id, t.step, t.title) for t in longer.trials[-3:]]
    assert plan.record(added[0])["group"] == content["trials"][0]["group"]


def test_amendments_work_for_matrices_and_keep_placebo_seeds_apart(project):
    content = frozen(expand_in(project, STEPS.replace("seeds", "placebo 1\nseeds")))
    added = plan.amended(content, 2, kconf.load(project))
    assert [(t.step, t.seed) for t in added] == [
        *(("R0", 1343), ("R1", 1343), ("R2", 1343), ("placebo1", 1345)),
        *(("R0", 1344), ("R1", 1344), ("R2", 1344), ("placebo1", 1346)),
    ]
    content = frozen(expand_in(project, MATRIX))
    added = plan.amended(content, 1, kconf.load(project))
    assert [t.group for t in added] == [t["group"] for t in content["trials"]]
    assert {t.hash for t in added}.isdisjoint(t["hash"] for t in content["trials"])


def test_an_amendment_under_another_tree_is_refused(project, tmp_path):
    content = frozen(expand_in(project, STEPS))
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "Kconfig"
    entry = 'config OPT_NEW\n\tint "another knob"\n\tdefault 1\n\thelp\n\t  One.\n'
    path.write_text(path.read_text() + entry)
    with pytest.raises(plan.PlanError, match="this Kconfig tree makes another trial of it"):
        plan.amended(content, 1, kconf.load(tmp_path))


def test_the_dry_run_reads_all_trials():
    trials = plan.as_json(expand("demo"))["trials"]
    assert [t["id"] for t in trials][:3] == ["d0-s1337", "d1-s1337", "d2-s1337"]
    assert trials[1].keys() == {"id", "hash", "title", "config"}


# Cost and text


def test_a_trial_costs_two_settles_and_no_torch():
    """Settling is what a plan costs: once for the point and once with the autos, for any number of axes."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom ablab import kconf, machine, plan\n"
        "calls = []\nreal = kconf.settle\n"
        "kconf.settle = lambda *a: calls.append(1) or real(*a)\n"
        f"layers = [kconf.lex(Path({str(ROOT / 'defconfigs/tiny')!r}))]\n"
        "p = plan.expand(layers, {'SWEEP': 'OPT_LR=1e-3,2e-3 SCHED_WARMUP=1..5 TRAIN_SEED=1..10'},"
        " machine.Machine(cores=(0,), memory_bytes=1, cpu='', devices=(), host='', boot_id=''))\n"
        "plan.listing(p)\nprint(len(p.trials), len(calls), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    trials, calls, has_torch = done.stdout.split()
    assert (trials, has_torch) == ("100", "False")
    assert int(calls) <= 2 * 100 + 30


def masked(text):
    """A listing without its hashes, which every new symbol changes, and of trials those of the first seed alone."""
    text = re.sub(r"^\S+-s13(3[89]|4\d) .*\n", "", text, flags=re.M)
    return re.sub(r"\b[0-9a-f]{8}\b|(?<=, )[0-9a-f]{6}$", lambda m: "#" * len(m[0]), text, flags=re.M)


@pytest.mark.parametrize("name", ["demo", "tiny", "tiny-sweep", "optim-matrix", "criteria", "placebo"])
def test_the_golden_listing(project, name):
    if name in ("demo", "tiny"):
        p = expand(name)
    elif name == "tiny-sweep":
        p = expand(SWEEP="OPT_LR=1e-3,3e-3 with SCHED_WARMUP=5,8 SCHED=COSINE,CONSTANT", SEEDS="2")
    else:
        placebo = STEPS.replace("seeds", "question Does it?\nplacebo 1\nseeds")
        p = expand_in(project, placebo if name == "placebo" else name)
    text = masked(plan.listing(p)).replace(f"{project}/", "")
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("ABLAB_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@given(st.text(st.sampled_from('OPTLR_=,.1359e-/" with')))
@settings(max_examples=200, deadline=None)
def test_any_sweep_gives_a_plan_or_an_error_of_ours(text):
    try:
        assert expand(SWEEP=text).trials
    except (plan.PlanError, plan.StudyError, kconf.ConfigError) as error:
        assert str(error).startswith(("make line: error: ", "tiny: error: ", "base-"))
