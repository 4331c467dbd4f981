# SPDX-License-Identifier: MIT
"""A study that promises one protocol has it in all arms that it compares, or is refused with what differs."""

import re
import shutil
from pathlib import Path

import pytest

from ablab import kconf, machine, plan

ROOT = Path(__file__).parents[1]
HERE = machine.Machine(cores=(0, 1), memory_bytes=1 << 34, cpu="cpu", devices=(), host="h", boot_id="b")
HEAD = "base plain\nseeds 3 paired\nprotocol equal\n"
PRUNED = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=10\nCONFIG_PRUNE_INTERVAL=5\n"
CRITERIA = (
    HEAD
    + "sweep PRUNE_STATE_SCORE = RANDOM BITTER0 BITTER4 BITTER5\n[D0] Dense\n[M0 : D0] Magnitude\n"
    + PRUNED
    + "[M1 : M0] Weights alone\nCONFIG_PRUNE_SCOPE_WEIGHTS=y\n"
    + "[S0 : M0] State\nCONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\n"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project of the Kconfig files and a small defconfig, for studies of the test."""
    root = tmp_path_factory.mktemp("project")
    for path in [ROOT / "Kconfig", *(ROOT / "ablab").rglob("Kconfig*")]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    for folder in ("defconfigs", "studies"):
        (root / folder).mkdir()
    plain = re.sub("CONFIG_OPT_LR=.*", "", (ROOT / "defconfigs/tiny").read_text())
    (root / "defconfigs/plain").write_text(plain)  # optimizers have the rate of their defaults
    return root


def expanded(root, text, **variables):
    (root / "studies/q.study").write_text(text)
    layers = [kconf.lex(Path("defconfigs/plain"), root=root), kconf.parse("test", [(1, 'CONFIG_STUDY="q"')], "test")]
    return plan.expand(layers, variables, HERE, kconf.load(root))


def refused(root, text, **variables):
    """The symbols that each comparison is refused for."""
    with pytest.raises(plan.StudyError) as caught:
        expanded(root, text, **variables)
    found = {}
    for line in str(caught.value).splitlines():
        assert "studies/q.study:" in line and "error: protocol equal: " in line
        pair, symbols = re.search(r"protocol equal: (.*?): (CONFIG_.*)", line).groups()
        found.setdefault(pair, []).append(re.match(r"CONFIG_(\w+)=", symbols)[1])
    return found


def steps(*bodies):
    return HEAD + "".join(f"[S{n}] step\n{body}" for n, body in enumerate(bodies))


def test_arms_that_differ_in_method_and_score_alone_are_fair(root):
    p = expanded(root, CRITERIA)
    assert len(p.contrasts) == 2 + 4
    assert "protocol    equal but for the factor of each contrast" in plan.listing(p)
    assert plan.registration(p)["protocol"] == "equal"


@pytest.mark.parametrize(
    "line",
    [
        'OPT_LR="1e-3"',
        'OPT_ADAMW_BETA1="0.8"',
        'OPT_ADAMW_BETA2="0.999"',
        'OPT_WEIGHT_DECAY="0.2"',
        'OPT_CLIP_NORM="0.5"',
        "SCHED_WARMUP=7",
        "TRAIN_STEPS=60",
        "TRAIN_BATCH_EFFECTIVE=16",
        "EVAL_INTERVAL=5",
        "PRUNE_WARMUP=11",
        "PRUNE_INTERVAL=6",
        'PRUNE_RAMP_FRACTION="0.5"',
        'PRUNE_SPARSITY="0.6"',
    ],
)
def test_a_step_that_changes_the_protocol_beside_its_factor_is_refused(root, line):
    name = line.partition("=")[0]
    found = refused(root, f"{CRITERIA}CONFIG_{line}\n")
    assert set(found) == {"S0 PRUNE_STATE_SCORE=RANDOM - M0 and 3 more"}  # in each of the four scores
    assert {symbol for symbols in found.values() for symbol in symbols} == {name}


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("SCHED_LINEAR=y", "SCHED_LINEAR"),
        ("PRUNE_CURVE_LINEAR=y", "PRUNE_CURVE_LINEAR"),
        ("OPT_ADAMWPRUNE_BASE_ADAMWADV=y", "OPT_ADAMWPRUNE_BASE_ADAMWADV"),
        ("PRUNE_RAMP_BY_STEP=y\nCONFIG_PRUNE_RAMP_STEP=30", "PRUNE_RAMP_BY_STEP"),
    ],
)
def test_a_choice_of_the_protocol_is_refused_by_its_member(root, choice, named):
    found = refused(root, f"{CRITERIA}CONFIG_{choice}\n")
    assert all(named in symbols for symbols in found.values())


def test_the_error_has_both_values_and_where_they_come_from(root):
    with pytest.raises(plan.StudyError) as caught:
        expanded(root, steps("", "CONFIG_OPT_SGD=y\n"))
    line = next(line for line in str(caught.value).splitlines() if "_LR" in line)
    assert re.search(
        r'q.study:3: error: protocol equal: S1 - S0: CONFIG_OPT_LR="0.1" \(default\) against CONFIG_OPT_LR="[^"]+"'
        r" \(\S+\); set both alike, or make it the only thing in which they differ$",
        line,
    )


def test_what_follows_from_the_factor_is_refused_and_its_fair_twin_is_not(root):
    """SGD is the factor; its rate is a default that follows."""
    assert refused(root, steps("", "CONFIG_OPT_SGD=y\n")) == {"S1 - S0": ["OPT_LR"]}
    same = 'CONFIG_OPT_LR="1e-3"\n'
    assert expanded(root, steps(same, "CONFIG_OPT_SGD=y\n" + same)).contrasts == (("S1", "S0"),)


def test_betas_are_those_of_the_step_whatever_optimizer_has_them(root):
    decay = 'CONFIG_OPT_WEIGHT_DECAY="0.1"\n'
    adam = "CONFIG_OPT_ADAM=y\n" + decay
    assert expanded(root, steps(decay, adam)).contrasts
    assert refused(root, steps(decay, adam + 'CONFIG_OPT_ADAM_BETA2="0.999"\n')) == {"S1 - S0": ["OPT_ADAM_BETA2"]}
    assert refused(root, steps("", "CONFIG_OPT_ADAM=y\n")) == {"S1 - S0": ["OPT_WEIGHT_DECAY"]}


def test_the_clip_that_an_optimizer_brings_is_seen(root):
    """A bundle differs in what it bundles, unless that is written down."""
    off = 'CONFIG_OPT_CLIP_NORM="0"\n'
    assert refused(root, steps(off, "CONFIG_OPT_ADAMWADV=y\n")) == {"S1 - S0": ["OPT_CLIP_NORM"]}
    assert expanded(root, steps(off, "CONFIG_OPT_ADAMWADV=y\n" + off)).contrasts


def test_one_part_of_the_protocol_may_be_the_factor(root):
    assert expanded(root, steps("", 'CONFIG_OPT_LR="2e-3"\n')).contrasts
    two = 'CONFIG_OPT_LR="2e-3"\nCONFIG_OPT_CLIP_NORM="0.5"\n'
    assert refused(root, steps("", two)) == {"S1 - S0": ["OPT_CLIP_NORM"]}


def test_a_pruned_optimizer_is_its_base(root):
    state = PRUNED.replace("CONFIG_PRUNE_MAGNITUDE=y\n", "CONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\n")
    base = "CONFIG_OPT_ADAMWPRUNE_BASE_ADAM=y\n"
    assert expanded(root, steps("", state)).contrasts
    assert set(refused(root, steps("", state + base))["S1 - S0"]) == {
        "OPT_ADAMWPRUNE_BASE_ADAM",
        "OPT_WEIGHT_DECAY",
    }


MATRIX = """base plain
seeds 3
protocol equal
contrast OPT=SGD - OPT=ADAMW
sweep OPT = SGD ADAMW
"""


def test_an_axis_that_the_contrast_names_is_the_factor_and_its_followers_are_not(root):
    assert refused(root, MATRIX) == {"OPT=SGD - OPT=ADAMW": ["OPT_LR"]}
    assert expanded(root, MATRIX, CONFIG_OPT_LR="1e-2").contrasts
    tuned = MATRIX + "with OPT_LR = 0.1 1e-3\n"
    assert expanded(root, tuned).contrasts  # the rate of each is part of what is declared


def test_a_promise_about_nothing_is_refused(root):
    text = "base plain\nseeds 3\nprotocol equal\nsweep OPT = SGD ADAMW\n"
    with pytest.raises(plan.StudyError, match="protocol equal: no arms are compared; declare a contrast"):
        expanded(root, text)


def test_without_the_promise_anything_goes(root):
    unfair = CRITERIA.replace("protocol equal\n", "") + 'CONFIG_OPT_LR="5e-3"\n'
    assert "protocol " not in plan.listing(expanded(root, unfair))


def test_selected_steps_and_sweeps_of_the_make_line_are_held_to_it(root):
    unfair = f'{CRITERIA}CONFIG_OPT_LR="5e-3"\n'
    assert expanded(root, unfair, STEPS="D0,M0").contrasts
    assert "S0 PRUNE_STATE_SCORE=RANDOM - M0 and 3 more" in refused(root, unfair, STEPS="M0,S0")
