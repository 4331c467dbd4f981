# SPDX-License-Identifier: MIT
"""Rows of `make bench`: optimizer steps and pruning of 10.7 million parameters against torch's own."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import prune

from ablab import build, config, kconf
from ablab.build import Built
from ablab.prune import Pruner
from ablab.prune._threshold import cut
from benchmarks import Figure, Sample, alternate, is_dirty, median, peers, steps, versus
from benchmarks.peers import SHAPES

TOTAL, STEP = 1000, 900  # of a budget; a step after the ramp, away from resets
PRUNED = ("CONFIG_PRUNE_MAGNITUDE=y", "CONFIG_PRUNE_WARMUP=1")
SPAM = "CONFIG_OPT_ADAMWSPAM=y"
LAB = (SPAM, "CONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y")


def made(*more: str) -> tuple[Built, Pruner]:
    """Model, optimizer and pruner of the small shape, with gradients, ready for step STEP."""
    shape = SHAPES["small"]
    system = ("DEVICE_CPU=y", "COMPILE_OFF=y", "AMP_OFF=y", f"THREADS={torch.get_num_threads()}")
    member = kconf.lex(kconf.ROOT / "member", "\n".join([*(f"CONFIG_SYS_{s}" for s in system), *more]), "member")
    cfg = config.load(kconf.settle(kconf.load(), [*steps.settled(shape).layers, member]).values)
    built = build.build(cfg, build.settle_system(cfg), shape.vocab)
    pruner = cfg.prune.build(built.model, built.optimizer, TOTAL, peers.SEED)
    for group in built.optimizer.param_groups:
        group["lr"] = peers.LR
    refill(built)
    built.optimizer.gate(torch.zeros(()), 0.0, STEP)
    built.optimizer.step()
    pruner.update(int(0.75 * TOTAL), 0.75)
    return built, pruner


def refill(built: Built) -> None:
    built.optimizer.arena.grads.normal_(0, 1e-3)


def against(row: str, samples: dict[str, list[Sample]], ours: str, peer: str, target: str, n: int) -> Figure:
    """The time of `ours` as a multiple of that of `peer`."""
    figure = versus(row, samples, ours, peer, target)
    figure.value = 1 / figure.value
    figure.detail += "; " + ", ".join(f"{k} {median(samples[k]) * 1e9 / n:.2f}" for k in (ours, peer)) + " ns/param"
    return figure


def spam(more: tuple[str, ...]) -> Callable[[], None]:
    """A step of SPAM with the clip in front of it."""
    optimizer = made(*more)[0].optimizer

    def step() -> None:
        optimizer.limit()
        optimizer.step()

    return step


def optimizer(threads: int, rounds: int) -> list[Figure]:
    """Steps of AdamW, alone and with masked gradients, and of SPAM against torch's fused AdamW."""
    built, _ = made()
    masked, pruner = made(*PRUNED)

    def masked_step() -> None:
        pruner.mask_gradients()
        masked.optimizer.step()

    candidates: dict[str, Callable[[], object]] = {"flat": built.optimizer.step, "masked": masked_step}
    candidates |= {"spam": spam((SPAM,)), "spam lab": spam(LAB)}
    for name, options in {"torch fused": {"fused": True}, "torch default": {}}.items():
        model = peers.from_ablab(built.model.state_dict(), SHAPES["small"])
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        candidates[name] = peers.adamw(model, **options).step
    found, n = alternate(candidates, rounds, threads), built.params
    ns = "; " + ", ".join(f"{k} {median(s) * 1e9 / n:.2f}" for k, s in found.items()) + " ns/param"
    rows = [versus("AdamW step: torch fused", found, "flat", "torch fused", ">= 1.00", ns)]
    targets = {"masked": "<= 1.15", "spam": "<= 1.35", "spam lab": ""}
    return rows + [against(f"{k} step", found, k, "torch fused", t, n) for k, t in targets.items()]


def pruning(threads: int, rounds: int) -> list[Figure]:
    """The threshold against kthvalue over joined scores, an update of the masks against torch.nn.utils.prune."""
    _, pruner = made(*PRUNED)
    parts, k = [c for parts in pruner.parts for c in parts], pruner.size // 2
    plain = nn.ModuleList(nn.Linear(p.shape[1], p.shape[0], bias=False) for p in pruner.weights.values())
    with torch.no_grad():
        for layer, p in zip(plain, pruner.weights.values(), strict=True):
            layer.weight.copy_(torch.randn_like(p))
            p.copy_(layer.weight)
    pruner.mask.held.fill_(-1)
    pruner.held = 0

    def update() -> None:
        pruner.mask.held.fill_(-1)
        pruner.update(int(0.75 * TOTAL), 0.75)

    def peer() -> None:
        prune.global_unstructured([(m, "weight") for m in plain], prune.L1Unstructured, amount=0.5)
        for m in plain:
            prune.remove(m, "weight")

    joined = lambda: torch.kthvalue(torch.cat([m.weight.detach().abs().flatten() for m in plain]), k)
    exact = cut(lambda: map(pruner._keys, parts), k)
    assert float(joined().values) == torch.tensor(exact.key, dtype=torch.int32).view(torch.float32)
    candidates = {"cut": lambda: cut(lambda: map(pruner._keys, parts), k), "cat + kthvalue": joined}
    found = alternate(candidates, rounds, threads)
    updates = alternate({"update": update, "global_unstructured": peer}, rounds, threads)
    ns = 1e9 * median(found["cut"]) / pruner.size
    return [
        against("threshold", found, "cut", "cat + kthvalue", "<= 0.35", pruner.size),
        Figure("threshold of a parameter", ns, "ns", "<= 5", "", is_dirty(found)),
        against("update of the masks", updates, "update", "global_unstructured", "<= 0.25", pruner.size),
    ]
