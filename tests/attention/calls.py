# SPDX-License-Identifier: MIT
"""What a test of an attention part starts from: random heads, a context, and the kernels that really run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ablab.tensor.stage import CAUSAL, Coupling, Ctx, Dims, Field, Heads, Piece

B, H, T, K = 2, 3, 40, 8
DIMS = Dims(
    n_embd=H * K,
    n_head=H,
    head_dim=K,
    mlp_hidden=32,
    block_size=T,
    bias=False,
    dropout=0.0,
    n_layer=2,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(*shapes):
    """Independent random tensors that take a gradient."""
    return [random(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]


def heads(q, k, v, scale=K**-0.5):
    return Heads(q, k, v, scale, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v))


def context(lam=1.0):
    return Ctx().put(Coupling(torch.tensor(lam, dtype=torch.float64)))


def rows(logits):
    """Softmax of each row over the keys that it may see."""
    return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def assert_same(got, want, inputs, tolerance=1e-10):
    """Equal values, and equal gradients of one random functional."""
    weight = random(*want.shape, seed=99)
    pairs = [torch.autograd.grad((o * weight).sum(), inputs, retain_graph=True) for o in (got, want)]
    for a, b in zip((got, *pairs[0]), (want, *pairs[1]), strict=True):
        assert (a - b).abs().max() < tolerance


class Kernels(TorchDispatchMode):
    """The attention kernels called, as (name, query channels, value channels), and ops that form T x T."""

    def __init__(self, square=257):
        super().__init__()
        self.square, self.calls, self.squares = square, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):
            q, _, v = args[1:4] if "backward" in name else args[:3]  # backward: dO comes first
            self.calls.append((name.removeprefix("_scaled_dot_product_"), q.shape[-1], v.shape[-1]))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and sum(n >= self.square for n in t.shape) > 1:
                self.squares.append(name)
        return out


def fold(window):
    """A part of another member to compose with; the test is skipped where that has been deleted."""
    return pytest.importorskip("ablab.attention.reciprocal").Fold(DIMS, 0.3, True, window).double()
