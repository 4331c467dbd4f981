# SPDX-License-Identifier: MIT
"""Rows of `make bench` for statistics of attention rows, against SDPA alone and an explicit T x T."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ablab import build
from ablab.tensor import rowstat
from ablab.tensor.attend import attend
from ablab.tensor.stage import CAUSAL, Ctx, Field, Heads, Piece
from benchmarks import Figure, Sample, alternate, is_dirty, median

HEADS, LENGTH, DIM, TOP = 12, 1024, 64, 8
SCALE = DIM**-0.5
MEMORY_LENGTH = 2048
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
OURS = {
    "entropy": rowstat.entropy,
    "sum p^2": partial(rowstat.power, a=2),
    "top-k": partial(rowstat.mass, k=TOP),
}
EXPLICIT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # from p and log p, which is 0 where p is
    "entropy": lambda p, logp: -(p * logp).sum(-1),
    "sum p^2": lambda p, logp: (p * p).sum(-1),
    "top-k": lambda p, logp: p.topk(TOP).values.sum(-1),
}
TARGETS = {  # cost over the peer's
    "entropy forward: SDPA": "<= 2.0",
    "entropy forward: explicit": "<= 0.22",
    "entropy both: explicit": "<= 0.40",
    "sum p^2 forward: SDPA": "<= 2.1",
    "entropy peak: explicit": "<= 0.1",
    "sum p^2 peak: explicit": "<= 0.1",
    "top-k peak: explicit": "<= 0.1",
}


def inputs(length: int) -> list[Tensor]:
    """q, k, v as views of one tensor, as the projector makes them."""
    qkv = torch.randn(1, length, 3, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    return [t.transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(2)]


def ours(stat: str) -> Call:
    """Output of attention and a statistic of its rows."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        h = Heads(q, k, v, SCALE, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v))
        m, ctx = attend(h, Ctx(), lse=True)
        return m.y_BHTV, OURS[stat](m, h, ctx)

    return call


def explicit(stat: str) -> Call:
    """The same from an explicit T x T."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        logp = (SCALE * (q @ k.mT)).masked_fill(hidden, -torch.inf).log_softmax(-1)
        p = logp.exp()
        return p @ v, EXPLICIT[stat](p, logp.masked_fill(hidden, 0.0))

    return call


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention alone."""
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    return o, o.new_zeros(())


def forward(call: Call, t: list[Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return call(*t)


def both(call: Call, t: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed functional of both results."""
    o, stat = call(*t)
    return list(torch.autograd.grad(o.square().sum() + stat.square().sum(), t))


def assert_same(stat: str) -> float:
    """Largest relative difference of values and gradients.  Raises AssertionError above 1e-4: nothing is timed."""
    t = inputs(LENGTH // 4)
    found = [[*call(*t), *both(call, t)] for call in (ours(stat), explicit(stat))]
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))
    assert worst < 1e-4, f"{stat}: differs from the explicit matrix by {worst:.2g}"
    return worst


class Peak(TorchDispatchMode):
    """Most bytes that tensors made inside held at once; what an operator holds for a moment is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.live:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(n for _, n in self.live.values()))
        return out


def peak_bytes(call: Call, length: int = MEMORY_LENGTH) -> int:
    """Of one forward and backward pass."""
    t = inputs(length)
    with Peak() as seen:
        both(call, t)
    return seen.bytes


def cost(row: str, samples: dict[str, list[Sample]], mine: str, peer: str, detail: str = "") -> Figure:
    """Time over the peer's: lower is better."""
    pair = {name: samples[name] for name in (mine, peer)}
    a, b = (median(found) for found in pair.values())
    kept = {name: [asdict(s) for s in found] for name, found in pair.items()}
    text = f"{mine} {a * 1e3:.3g} ms, {peer} {b * 1e3:.3g} ms{detail}"
    return Figure(row, a / b, "of peer", TARGETS.get(row, ""), text, is_dirty(pair), kept)


def statistics(threads: int, rounds: int, limit_s: float) -> list[Figure]:
    """Forward, both passes and peak memory of each statistic with the attention that it belongs to."""
    build.keep_blocks()  # as in a trial
    figures, t = [], inputs(LENGTH)
    for stat in OURS:
        same = f"; equal within {assert_same(stat):.0e}"
        calls = {"ablab": ours(stat), "SDPA": sdpa, "explicit": explicit(stat)}
        for what, run in (("forward", forward), ("both", both)):
            samples = alternate({n: partial(run, c, t) for n, c in calls.items()}, rounds, threads, limit_s)
            for peer in ("SDPA", "explicit"):
                figures.append(cost(f"{stat} {what}: {peer}", samples, "ablab", peer, same))
        held = {name: peak_bytes(call) for name, call in calls.items()}
        text = ", ".join(f"{name} {n / 1e6:.3g} MB" for name, n in held.items())
        row = f"{stat} peak: explicit"
        figures.append(Figure(row, held["ablab"] / held["explicit"], "of peer", TARGETS[row], text))
    return figures
