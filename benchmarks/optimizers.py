# SPDX-License-Identifier: MIT
"""Rows of `make bench`: optimizer steps and pruning of 10.7 million parameters against torch's own, and whole steps."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from ablab import build, config, kconf
from ablab.build import Built
from ablab.optim import Impl
from ablab.optim.adamw import FlatAdamW
from ablab.prune import Pruner
from ablab.prune._mask import Mask
from ablab.tensor import native
from benchmarks import Figure, Sample, alternate, is_dirty, median, peers, steps, versus
from benchmarks.peers import SHAPES

TOTAL, STEP = 1000, 900  # of a budget; a step after the ramp, away from resets
PRUNED = ("CONFIG_PRUNE_MAGNITUDE=y", "CONFIG_PRUNE_WARMUP=1")
BITS = "CONFIG_PRUNE_MASK_BITS=y"
SPAM = "CONFIG_OPT_ADAMWSPAM=y"
LAB = (SPAM, "CONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y")
INTERVAL = 50  # steps between updates of the masks, which the mean step of a pruned trial shares
LARGE = {30: "<= 1.00", 124: "<= 1.05"}  # million parameters
Call = Callable[[], object]


def made(*more: str) -> tuple[Built, Pruner]:
    """Model, optimizer and pruner of the small shape, with gradients, ready for step STEP, on torch's kernels."""
    shape = SHAPES["small"]
    system = ("DEVICE_CPU=y", "COMPILE_OFF=y", "AMP_OFF=y", "NATIVE_OFF=y", f"THREADS={torch.get_num_threads()}")
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


def compiled() -> native.Native | None:
    """The native kernels, None where there are none; torch's stay in force."""
    try:
        return native.ready()
    except native.NativeError as error:
        print(f"no native rows: {error}")
        return None


def under(lib: native.Native | None, call: Call) -> Call:
    """The call with these kernels in force."""

    def run() -> None:
        native.InForce.lib = lib
        call()
        native.InForce.lib = None

    return run


def against(row: str, samples: dict[str, list[Sample]], ours: str, peer: str, target: str, n: int) -> Figure:
    """The time of `ours` as a multiple of that of `peer`."""
    figure = versus(row, samples, ours, peer, target)
    figure.value = 1 / figure.value
    figure.detail += "; " + ", ".join(f"{k} {median(samples[k]) * 1e9 / n:.2f}" for k in (ours, peer)) + " ns/param"
    return figure


def spam(more: tuple[str, ...]) -> Call:
    """A step of SPAM with the clip in front of it."""
    optimizer = made(*more)[0].optimizer

    def step() -> None:
        optimizer.limit()
        optimizer.step()

    return step


def masked(optimizer: Any, mask: Callable[[], None]) -> Call:
    """A step under masked gradients."""

    def step() -> None:
        mask()
        optimizer.step()

    return step


def optimizer(threads: int, rounds: int) -> list[Figure]:
    """Steps of AdamW, alone and with masked gradients, and of SPAM against torch's fused AdamW."""
    built, _ = made()
    (dense, pruner), (packed, bits) = made(*PRUNED), made(*PRUNED, BITS)
    lib = compiled()
    candidates: dict[str, Call] = {
        "flat": built.optimizer.step,
        "masked": masked(dense.optimizer, pruner.mask_gradients),
    }
    calls = candidates | {"masked bits": masked(packed.optimizer, bits.mask_gradients)}
    calls |= {"spam": spam((SPAM,)), "spam lab": spam(LAB)}
    candidates |= {k: calls[k] for k in ("spam", "spam lab")}
    candidates |= {f"{k} native": under(lib, call) for k, call in calls.items() if lib}
    for name, options in {"torch fused": {"fused": True}, "torch default": {}}.items():
        model = peers.from_ablab(built.model.state_dict(), SHAPES["small"])
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        candidates[name] = peers.adamw(model, **options).step
    found, n = alternate(candidates, rounds, threads), built.params
    ns = "; " + ", ".join(f"{k} {median(s) * 1e9 / n:.2f}" for k, s in found.items()) + " ns/param"
    rows = [versus("AdamW step: torch fused", found, "flat", "torch fused", ">= 1.00", ns)]
    targets = {"masked": "<= 1.15", "spam": "<= 1.35", "spam lab": ""}
    targets |= {f"{k} native": "<= 1.00" for k in ("flat", "masked", "masked bits")}
    targets |= {"spam native": "<= 1.35", "spam lab native": ""}
    return rows + [against(f"{k} step", found, k, "torch fused", t, n) for k, t in targets.items() if k in found]


def pruning(threads: int, rounds: int) -> list[Figure]:
    """The threshold against kthvalue over joined scores, an update of the masks against torch.nn.utils.prune, and the
    mean step of AdamW with masks and their updates against torch's fused AdamW without."""
    built, pruner = made(*PRUNED)
    parts, k = [c for parts in pruner.parts for c in parts], pruner.size // 2
    plain = nn.ModuleList(nn.Linear(p.shape[1], p.shape[0], bias=False) for p in pruner.weights.values())
    with torch.no_grad():
        for layer, p in zip(plain, pruner.weights.values(), strict=True):
            layer.weight.copy_(torch.randn_like(p))
            p.copy_(layer.weight)
    pruner.mask.held.fill_(-1)
    pruner.held = 0

    # both start from dense weights each time: what is zero already is ranked otherwise
    dense, first = pruner.flat.clone(), [m.weight.detach().clone() for m in plain]

    def restore() -> None:
        pruner.flat.copy_(dense)
        pruner.mask.held.fill_(-1)

    def update() -> None:
        restore()
        pruner.update(int(0.75 * TOTAL), 0.75)

    def peer() -> None:
        for m, w in zip(plain, first, strict=True):
            m.weight.data.copy_(w)
        prune.global_unstructured([(m, "weight") for m in plain], prune.L1Unstructured, amount=0.5)
        for m in plain:
            prune.remove(m, "weight")

    lib = compiled()
    model = peers.from_ablab(built.model.state_dict(), SHAPES["small"])
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    joined = lambda: torch.kthvalue(torch.cat([m.weight.detach().abs().flatten() for m in plain]), k)
    ranked = lambda: pruner.cut(pruner._ranked, parts, k)
    exact, n = ranked(), pruner.size
    assert float(joined().values) == torch.tensor(exact.key, dtype=torch.int32).view(torch.float32)
    candidates: dict[str, Call] = {"cut": ranked} | ({"cut native": under(lib, ranked)} if lib else {})
    found = alternate(candidates | {"cat + kthvalue": joined}, rounds, threads)
    candidates = {"update": update} | ({"update native": under(lib, update)} if lib else {})
    updates = alternate(candidates | {"restore": restore, "global_unstructured": peer}, rounds, threads)
    step = masked(built.optimizer, pruner.mask_gradients)
    candidates = {"masked": step} | ({"masked native": under(lib, step)} if lib else {})
    taken = alternate(candidates | {"torch fused": peers.adamw(model, fused=True).step}, rounds, threads)
    rows = []
    for name, most, bound in (("", "<= 5", "<= 1.45"), (" native", "<= 1.5", "<= 1.00")):
        if f"cut{name}" not in found:
            continue
        ns = 1e9 * median(found[f"cut{name}"]) / n
        rows += [
            against(f"threshold{name}", found, f"cut{name}", "cat + kthvalue", "<= 0.35", n),
            Figure(f"threshold of a parameter{name}", ns, "ns", most, "", is_dirty(found)),
            against(f"update of the masks{name}", updates, f"update{name}", "global_unstructured", "<= 0.25", n),
        ]
        once = median(updates[f"update{name}"]) - median(updates["restore"])  # no trial restores its weights
        mean = median(taken[f"masked{name}"]) + once / INTERVAL
        ratio, text = mean / median(taken["torch fused"]), f"one update in {INTERVAL} steps"
        rows.append(Figure(f"AdamW, masks, updates{name}", ratio, "x", bound, text, is_dirty(taken)))
    return rows


def large(threads: int, rounds: int) -> list[Figure]:
    """The masked step of many parameters in one tensor, native and torch's, against torch's fused AdamW."""
    lib, rows = compiled(), []
    for millions, target in LARGE.items():
        n = millions * 10**6 // 4096 * 4096

        def leaf(n: int = n) -> nn.Parameter:
            return nn.Parameter(torch.randn(n) * 0.02)

        ours, theirs = leaf(), leaf()
        theirs.grad = torch.randn(n) * 1e-3
        group = {"name": "decay", "weight_decay": 0.1, "lr": peers.LR}
        flat = FlatAdamW([{"params": [ours], **group}], 0.9, 0.95, 1e-8, Impl.FUSED)
        flat.arena.grads.copy_(theirs.grad)
        mask = Mask(slice(0, n), True, torch.device("cpu"))
        mask.held.random_(0, 256)
        peer = torch.optim.AdamW([theirs], lr=peers.LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        step = masked(flat, lambda flat=flat, mask=mask: flat.mask(mask))
        candidates: dict[str, Call] = {"torch fused": peer.step} | ({"native": under(lib, step)} if lib else {})
        found = alternate(candidates, rounds, threads)
        rows += [against(f"masked step, {millions}M", found, "native", "torch fused", target, n)] if lib else []
    return rows


def whole(folder: Path, threads: int, rounds: int) -> list[Figure]:
    """The mean step of a trial of the small shape at 50 %, updates of the masks included, against a dense one."""
    pruned = (*PRUNED, 'CONFIG_PRUNE_INITIAL="0.5"', "CONFIG_PRUNE_RAMP_BY_STEP=y")
    loops = {}
    for name, lines in {"dense": (), "pruned": pruned}.items():
        (folder / name).mkdir()
        loops[name] = steps.Ours(SHAPES["small"], folder / name, more=lines)
        loops[name].step()
    candidates: dict[str, Call] = {name: ours.step for name, ours in loops.items()}
    pruner = loops["pruned"].loop.pruner
    found = alternate(candidates | {"update": lambda: pruner.update(1 + INTERVAL, 0.0)}, rounds, threads)
    s = {name: median(samples) for name, samples in found.items()}
    text = ", ".join(f"{name} {1e3 * t:.4g} ms" for name, t in s.items()) + f", one update in {INTERVAL} steps"
    kept = {name: [asdict(sample) for sample in samples] for name, samples in found.items()}
    ratio = (s["pruned"] + s["update"] / INTERVAL) / s["dense"]
    return [Figure(f"pruned trial: dense, {native.InForce.name}", ratio, "x", "<= 1.03", text, is_dirty(found), kept)]
