# SPDX-License-Identifier: MIT
"""Turning any knob of an optimizer or a pruning method changes what a few steps leave behind, or is refused."""

import hashlib
from pathlib import Path

import pytest
import torch

from ablab import kconf
from tests import trial as tiny
from tests.prune import rig

STEPS = 14
PRUNED = "PRUNE_WARMUP=2\nPRUNE_INTERVAL=3\nPRUNE_MAGNITUDE=y"
STATE = "OPT_ADAMWPRUNE=y\nPRUNE_STATE=y\nPRUNE_WARMUP=2\nPRUNE_INTERVAL=3"
SPAM = "OPT_ADAMWSPAM=y\nOPT_ADAMWSPAM_GRACE=2\nOPT_ADAMWSPAM_INTERVAL=6\nOPT_ADAMWSPAM_REWARM=2"
SPAM += '\nOPT_ADAMWSPAM_THETA="1.0"'
BASES = (  # so many that each knob is visible in one, and matters
    "",
    "OPT_SGD=y",
    "OPT_ADAM=y",
    "OPT_ADAMWADV=y",
    SPAM,
    f'{SPAM}\nOPT_ADAMWSPAM_PROFILE_LAB=y\nOPT_ADAMWSPAM_HISTORY=10\nOPT_ADAMWSPAM_SPIKE_Z="0.1"',
    "OPT_SINKGD=y",
    "OPT_SINKGD=y\nOPT_SINKGD_FORM_TANH=y",
    "OPT_MUON=y",
    PRUNED,
    f"{PRUNED}\nPRUNE_RAMP_BY_STEP=y\nPRUNE_RAMP_STEP=8",
    f'{PRUNED}\nPRUNE_ALLOC_DEPTH=y\nPRUNE_SPARSITY="0.8"',
    PRUNED.replace("MAGNITUDE", "MOVEMENT"),
    STATE,
    f"{STATE}\nPRUNE_STATE_SCORE_BITTER5=y",
)
TURNED = {
    "OPT_ADAMWSPAM_HISTORY": "11",
    "OPT_ADAMWSPAM_INTERVAL": "4",
    "OPT_ADAMWSPAM_REWARM": "3",
    "OPT_ADAMWSPAM_GRACE": "4",
    "OPT_ADAMWSPAM_SPIKE_Z": '"0"',
    "PRUNE_ALLOC_CAP": '"0.9"',
    "PRUNE_STATE_EPS": '"0.5"',
    "PRUNE_RAMP_STEP": "10",
    "PRUNE_INTERVAL": "2",
}
ELSEWHERE = {
    "PRUNE_STATE_SCORE_BITTER9": "compiles: tests/prune/test_scores.py",
    "PRUNE_SKIP_FIRST": "no convolution here: tests/prune/test_prunable.py",
    "PRUNE_SKIP_LAST": "no classifier here: tests/prune/test_prunable.py",
    "OPT_LR": "whole trials: tests/contract/test_knobs.py",
    "OPT_CLIP_NORM": "whole trials: tests/contract/test_knobs.py",
    "OPT_ADAMWPRUNE": "alone it is its base, bit for bit: tests/optim/test_family.py",
}


def lines(text):
    return "".join(f"CONFIG_{line}\n" for line in text.split("\n") if line)


def left(text):
    """What steps leave behind: weights, state, masks and what those take, as one hash; or why there are none."""
    try:
        built, pruner = rig.run(lines(text), STEPS)
    except ValueError as error:
        return str(error)
    digest = hashlib.sha256(str((type(built.optimizer).__name__, pruner.nbytes)).encode())
    state = [t for s in built.optimizer.state.values() for t in s.values()]
    for t in (*built.model.parameters(), *state, *pruner.state().values()):
        digest.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def knobs():
    """(symbol, base that shows it, the base turned), each symbol once."""
    tree, found = kconf.load(), {}
    for base in BASES:
        values = tiny.settled(Path("unused"), lines(base)).values
        for name, value in values.items():
            info, mine = tree.symbols[name], name.startswith(("OPT_", "PRUNE_"))
            if not mine or name in found or name in ELSEWHERE or not info.prompt or (info.choice and value is True):
                continue
            text = TURNED.get(name) or _turned(info, value)
            kept = [line for line in base.split("\n") if not line.startswith(f"{name}=")]
            kept = [line for line in kept if line.partition("=")[0] not in (tree.siblings(name) or ())]
            if info.choice and name.rpartition("_")[0] in ("OPT", "PRUNE") and base:
                continue  # a whole method in place of another hides what the base is for: from the plain base
            found[name] = name, base, "\n".join([*kept, f"{name}={text}"])
    return list(found.values())


def _turned(info, value):
    if info.kind == "bool":
        return "n" if value is True else "y"
    return str(value + 1) if info.kind == "int" else f'"{value / 2 if value else 0.25}"'


def test_each_knob_of_these_families_is_turned_or_named():
    tree = kconf.load()
    known = {name for name, info in tree.symbols.items() if name.startswith(("OPT_", "PRUNE_")) and info.prompt}
    selected = {n for base in BASES for n, v in tiny.settled(Path("unused"), lines(base)).values.items() if v is True}
    assert known - {name for name, *_ in knobs()} - set(ELSEWHERE) <= selected
    assert set(ELSEWHERE) <= known and set(TURNED) <= known


KNOWN: dict[str, str] = {}


@pytest.mark.parametrize(("name", "base", "turned"), knobs(), ids=lambda v: v if str(v).isupper() else "")
def test_a_turned_knob_changes_what_steps_leave(name, base, turned):
    if base not in KNOWN:
        KNOWN[base] = left(base)
    assert left(turned) != KNOWN[base], f"CONFIG_{name} is dead under {base!r}"


def test_a_dead_knob_would_be_seen():
    assert left("") == left("") != left("OPT_SGD=y")
