# SPDX-License-Identifier: MIT
"""Rows of `make bench` for reciprocal attention, forward and backward, against plain SDPA and against T x T matrices.

B batch, T tokens, H heads, K head dim.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.attention.reciprocal import Fold
from ablab.tensor.attend import attend
from ablab.tensor.stage import CAUSAL, Coupling, Ctx, Dims, Field, Heads, Piece
from benchmarks import Figure, alternate, is_dirty, median

B, T, H, K = 1, 1024, 12, 64
DIMS = Dims(
    n_embd=H * K,
    n_head=H,
    head_dim=K,
    mlp_hidden=4 * H * K,
    block_size=T,
    bias=True,
    dropout=0.0,
    n_layer=12,
)
TARGETS = {"SDPA": "<= 2.3", "explicit": "<= 0.35"}  # times the peer
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def candidates(part: Fold) -> dict[str, Attention]:
    """BHTK q, k, v to the mixed values."""
    ctx = Ctx().put(Coupling(torch.ones(())))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h = Heads(q, k, v, K**-0.5, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v))
        return attend(part(h, ctx), ctx)[0].y_BHTV

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s_BHTT = q @ k.mT
        s_BHTT = K**-0.5 * (part.w_s[:, None, None] * s_BHTT + part.w_r[:, None, None] * s_BHTT.mT)
        hidden = torch.ones(s_BHTT.shape[-2:], dtype=torch.bool).triu(1)
        return s_BHTT.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    return {
        "ablab": ours,
        "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=K**-0.5),
        "explicit": explicit,
    }


def step(attention: Attention, length: int = T) -> Callable[[], list[Tensor]]:
    """A call that returns output and gradient; q, k and v are views of one tensor, as a projector gives them."""
    stream = torch.Generator().manual_seed(1)
    qkv = torch.randn(B, length, 3, H, K, generator=stream).requires_grad_()
    down = torch.randn(B, H, length, K, generator=stream)

    def run() -> list[Tensor]:
        out = attention(*[t.transpose(1, 2) for t in qkv.unbind(2)])
        return [out.detach(), *torch.autograd.grad(out, [qkv], down)]

    return run


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


def reciprocal(threads: int, rounds: int, limit_s: float) -> list[Figure]:
    """Times the peer's; nothing is timed that does not compute the same as the explicit form."""
    part = Fold(DIMS, 0.3, False, 0)
    calls = {name: step(attention) for name, attention in candidates(part).items()}
    worst = difference(calls["ablab"](), calls["explicit"]())
    assert worst < 1e-5, f"reciprocal attention differs from the explicit form by {worst:.2g}"
    samples = alternate(calls, rounds, threads, limit_s)
    figures = []
    for peer, target in TARGETS.items():
        pair = {name: samples[name] for name in ("ablab", peer)}
        ms = {name: 1e3 * median(found) for name, found in pair.items()}
        text = f"ablab {ms['ablab']:.3g} ms, {peer} {ms[peer]:.3g} ms; equal to explicit within {worst:.0e}"
        kept = {name: [asdict(s) for s in found] for name, found in pair.items()}
        row = f"reciprocal attention: {peer}"
        figures.append(Figure(row, ms["ablab"] / ms[peer], "x time", target, text, is_dirty(pair), kept))
    return figures
