# SPDX-License-Identifier: MIT
"""The tiny trial without its process: what a step does, on data of its own."""

from pathlib import Path

import torch

from ablab import build, config
from tests import trial as tiny

CPU = torch.device("cpu")


def made(extra, total):
    """(configuration, built, pruner) of the tiny trial under `extra` in a budget of `total` steps."""
    s = tiny.settled(Path("unused"), f"{extra}\nCONFIG_TRAIN_STEPS={total}")
    cfg = config.load(s.values, s.where)
    built = build.build(cfg, CPU, 256)
    return cfg, built, cfg.prune.build(built.model, built.optimizer, total, cfg.train.seed)


def train(built, pruner, first, last, total, after=lambda: None):
    """Steps `first` to `last`, in the order of the loop."""
    for t in range(first, last + 1):
        ids = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(t))
        loss = built.model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        pruner.observe()
        pruner.mask_gradients()
        for group in built.optimizer.param_groups:
            group["lr"] = 1e-3
        built.optimizer.gate(loss.detach(), 1.0, t)
        built.optimizer.step()
        built.optimizer.zero_grad()
        pruner.update(t, t / total)
        after()


def run(extra, total=16, after=None):
    """(built, pruner) after a whole budget; `after` takes both after each step."""
    _, built, pruner = made(extra, total)
    train(built, pruner, 1, total, total, (lambda: after(built, pruner)) if after else lambda: None)
    return built, pruner
