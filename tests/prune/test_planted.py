# SPDX-License-Identifier: MIT
"""Pruning that does nothing never ends as a success: nine ways to fail at it, in a GPT and in a CNN."""

import os

import pytest
import torch

from ablab import prune
from ablab.prune import _masked
from ablab.prune._mask import Mask
from ablab.prune._schedule import Ramp
from ablab.prune.magnitude import Magnitude
from ablab.train import Loop
from tests import trial as tiny
from tests.test_images import IMAGES

PRUNED = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=4\nCONFIG_PRUNE_INTERVAL=2\n"


def stuck():
    real = _masked.Masked.update
    _masked.Masked.update = lambda self, step, progress: real(self, 1, progress)


def idle():
    Mask.apply = lambda self, *flats: None


def full():
    _masked.Masked.prune = lambda self, parts, k: None


def never():
    Ramp.due = lambda self, step, progress: False


def flat():
    Ramp.target = lambda self, step, progress: self.initial


def partial():
    real = prune.prunable
    some = lambda *args: dict(list(real(*args).items())[-1:])  # the classifier, or the last matrix
    prune.prunable = some


def copied():
    """Masks that act on a copy of the weights."""
    real = _masked.Masked.__init__

    def init(self, *args):
        real(self, *args)
        self.flat = self.flat.clone()

    _masked.Masked.__init__ = init


def absent():
    Magnitude.build = lambda self, network, optimizer, total, seed: prune.Pruner(network, self.section)


def regrown():
    """An optimizer that keeps its own idea of the weights."""
    real = Loop.train_step

    def train_step(self):
        before = self.built.optimizer.arena.weights.clone()
        real(self)
        flat = self.built.optimizer.arena.weights
        with torch.no_grad():
            flat.copy_(torch.where(flat == 0, before, flat))

    Loop.train_step = train_step


FAULTS = (stuck, idle, full, never, flat, partial, copied, absent, regrown)


CASES = [pytest.param("", fault, id=f"gpt-{fault.__name__}") for fault in FAULTS]
FAST = (partial, idle, regrown)  # of those in a CNN, whose code is that of a GPT
CASES += [pytest.param(IMAGES, f, id=f"cnn-{f.__name__}", marks=() if f in FAST else pytest.mark.slow) for f in FAULTS]


@pytest.mark.parametrize(("base", "fault"), CASES)
def test_pruning_that_does_nothing_fails_the_trial(tmp_path, base, fault):
    attempt = tiny.claim(tiny.campaign(tmp_path, base + PRUNED))
    code = os.waitstatus_to_exitcode(tiny.forked(attempt, fault))
    said = attempt.read("exit")
    assert code == 1 and said["class"] == "effect" and "prune/" in said["message"], attempt.log.read_text()
