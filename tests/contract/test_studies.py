# SPDX-License-Identifier: MIT
"""Shipped studies expand, ask a question, differ in what they compare, and have seeds enough to be heard."""

from itertools import combinations
from pathlib import Path

import pytest

from ablab import config, kconf, machine, model, plan, rig, study

ROOT = Path(__file__).parents[2]
STUDIES = sorted(p.stem for p in (ROOT / "studies").iterdir())
LAPTOP = machine.Machine(cores=(0, 1), memory_bytes=1 << 34, cpu="cpu", devices=(), host="h", boot_id="b")
LEAST_SEEDS = 3
EXEMPT = {"demo"}  # it has to end on a laptop in four minutes, and says that it cannot decide


def expand(name):
    layers = [kconf.lex(ROOT / "defconfigs" / base) for base in study.find(name).base]
    chosen = kconf.Layer("study", (kconf.Request("STUDY", f'"{name}"', f"studies/{name}.study"),))
    return plan.expand([*layers, chosen], {}, LAPTOP)


def fingerprint(trial):
    """The built model's, at the size of the dry run."""
    cfg = config.load(rig.shrunk(trial.values))
    return model.fingerprint(cfg.model.build(cfg.attention, cfg.mlp, trial.seed))


def twins(trials, of):
    """Pairs of steps that ask for different models and get the same one."""
    first = {t.step: t for t in sorted(trials, key=lambda t: -t.seed) if t.step}
    asked = {s: {n: v for n, v in rig.shrunk(t.values).items() if n.startswith(rig.BLOCK)} for s, t in first.items()}
    built = {s: of(t) for s, t in first.items()}
    return [(a, b) for a, b in combinations(first, 2) if asked[a] != asked[b] and built[a] == built[b]]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_expands_to_distinct_trials(name):
    p = expand(name)
    assert p.study is not None and p.trials and p.as_written
    assert len({t.hash for t in p.trials}) == len(p.trials)
    assert len({t.id for t in p.trials}) == len(p.trials)
    assert p.changes == ()


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_asks_and_declares(name):
    s = study.find(name)
    first, second = s.text.splitlines()[:2]
    assert first == "# SPDX-License-Identifier: MIT" and second.startswith("# ")
    assert s.question, "no question"
    assert expand(name).contrasts or s.placebo, "nothing is compared"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_seeds_enough(name):
    seeds = expand(name).factors.get("seeds", 1)
    assert seeds >= LEAST_SEEDS or name in EXEMPT


@pytest.mark.parametrize("name", STUDIES)
def test_steps_that_ask_for_different_models_get_them(name):
    assert twins(expand(name).trials, fingerprint) == []


def test_a_model_that_ignores_a_symbol_is_seen():
    assert twins(expand("demo").trials, lambda t: "the same") == [("D0", "D1"), ("D1", "D2")]


def test_the_demo_says_that_it_cannot_decide():
    p = expand("demo")
    assert [t.id for t in p.trials] == [f"d{s}-s{n}" for n in (1337, 1338) for s in range(3)]
    assert any("cannot decide" in line for line in plan.power(p))
