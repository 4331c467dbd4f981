# SPDX-License-Identifier: MIT
"""Evaluation: token-weighted, over a fixed set, without a trace in the model."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from ablab import config
from ablab.data import Windows
from ablab.evaluate import evaluate, perplexity
from ablab.model import Output
from ablab.tensor.cache import Pruned
from tests import trial as tiny
from tests.blocks import network, perturbed, tokens

CPU = torch.device("cpu")


class Fake(nn.Module):
    """Loss is the mean of the targets, plus noise while training."""

    def forward(self, x, y):
        noise = torch.rand(()) if self.training else 0.0
        return Output(y.float().mean() + noise, y.numel(), None)


def data(n=5, length=4, bytes_=30):
    ids = np.arange(n * (length + 1), dtype=np.uint16).reshape(n, length + 1)
    return Windows(ids=ids, sha256="0" * 64, tokens=n * length, bytes=bytes_)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_mean_is_over_tokens_whatever_the_batch(size):
    found = evaluate(Fake(), data(), size, CPU, nullcontext())
    wanted = data().ids[:, 1:].mean()
    assert found["val_loss"] == pytest.approx(wanted, rel=1e-6)
    assert found["val_perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)
    assert found["val_bpb"] == pytest.approx(wanted * 20 / (math.log(2) * 30), rel=1e-6)


class Guesses(Fake):
    """Right where the target is even."""

    def forward(self, x, y):
        return super().forward(x, y)._replace(hits=(y % 2 == 0).sum())


@pytest.mark.parametrize("size", [1, 3, 5])
def test_accuracy_is_over_all_targets_and_images_have_no_bytes(size):
    found = evaluate(Guesses(), data(bytes_=None), size, CPU, nullcontext(), split="test")
    assert found["test_accuracy"] == 100 * (data().ids[:, 1:] % 2 == 0).mean()
    assert found.keys() == {"test_loss", "test_accuracy"}


def test_it_leaves_mode_and_random_state_as_they_were():
    model, before = Fake().train(), torch.get_rng_state()
    evaluate(model, data(), 2, CPU, nullcontext())
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_a_stop_ends_it_between_batches():
    asked = iter([False, False, True])
    model = Fake()
    assert evaluate(model, data(), 2, CPU, nullcontext(), lambda: next(asked)) is None
    assert model.training and next(asked, None) is None


@pytest.mark.parametrize(("keep", "recent"), [(7, 3), (40, 5)])
def test_under_a_pruned_cache_each_token_is_predicted_from_what_is_left(keep, recent):
    net, ids = perturbed(network().double(), 0.2), tokens(5, 41).numpy().astype(np.uint16)
    data = Windows(ids=ids, sha256="0" * 64, tokens=200, bytes=200)
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (ids[:, :-1], ids[:, 1:]))
    net.eval()
    with torch.no_grad():
        past = Pruned(keep, recent)
        logits = torch.cat([net(x[:, t : t + 1], past=past).logits for t in range(40)], 1)
        wanted = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        plain = net(x, y).loss.item()
    got = evaluate(net, data, 2, CPU, nullcontext(), cache=lambda: Pruned(keep, recent))["val_loss"]
    assert got == pytest.approx(wanted, rel=1e-12)
    assert (abs(got - plain) < 1e-10) == (keep >= 40)


def test_a_loss_without_a_float_exponential_is_infinite():
    assert perplexity(1e4) == math.inf and perplexity(0.0) == 1.0 and math.isnan(perplexity(math.nan))


def test_the_set_does_not_depend_on_seed_or_batch(tmp_path):
    sets = []
    for extra in ("", "CONFIG_TRAIN_SEED=9\nCONFIG_TRAIN_BATCH_EFFECTIVE=8\nCONFIG_TRAIN_BATCH_MICRO=4\n"):
        s = tiny.settled(tmp_path, extra)
        cfg = config.load(s.values, s.where)
        cfg.data.prepare()
        sets.append(cfg.data.evaluation(cfg.eval.tokens, cfg.model.config.block).sha256)
    assert sets[0] == sets[1]
