# SPDX-License-Identifier: MIT
"""Sparse rows against an explicit T x T softmax, in values and gradients, over more than one chunk of rows."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ablab.tensor.kernel import InForce
from ablab.tensor.sparse import above_rms, largest, mix
from ablab.tensor.stage import CAUSAL, Ctx, Field, Heads, Past, Piece, Region

B, H, T, K, C = 1, 2, 300, 8, 3  # three chunks
SCALE = 0.37
BANDED = (Region("band", 40), Region("far", 40))
KEEPS = {"topk": partial(largest, 5), "rms": partial(above_rms, 0.8)}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n_key=H, length=T):
    shapes = {"q": (B, H, length, K), "k": (B, n_key, length, K), "q2": (B, H, length, K), "k2": (B, H, length, K)}
    return {
        n: random(*s, seed=i).requires_grad_() for i, (n, s) in enumerate((shapes | {"z": (B, H, length, C)}).items())
    }


def heads(t, regions=(CAUSAL,), rows=slice(None)):
    keys = [("q", "k"), ("q2", "k2")]
    pieces = tuple(
        Piece(t[q][:, :, rows], (Field(k, t[k][:, :, rows]),), r) for (q, k), r in zip(keys, regions, strict=False)
    )
    return Heads(t["q"][:, :, rows], t["k"], t["z"], SCALE, pieces, Field("v", t["z"]))


def reference(t, kind, normalise, regions=(CAUSAL,), dtype=torch.float64):
    """Selection by rank, or by the power sum in logarithms."""
    length = t["q"].shape[2]
    gap = torch.arange(length)[:, None] - torch.arange(length)
    s = SCALE * t["q"] @ t["k"].mT
    if len(regions) > 1:
        s = torch.where(gap <= regions[0].width, s, SCALE * t["q2"] @ t["k2"].mT)
    s = s.to(dtype).double().masked_fill(gap < 0, -torch.inf)
    if kind == "topk":
        keep = s.argsort(-1, descending=True).argsort(-1) < 5
    else:
        n = torch.arange(1.0, length + 1)[:, None].double()
        keep = s >= (2 * s).logsumexp(-1, keepdim=True) / 2 - n.log() / 2 + math.log(0.8)
    p = torch.where(keep, s.softmax(-1), 0.0)
    return (p / p.sum(-1, keepdim=True) if normalise else p) @ t["z"]


def gradients(out, t):
    return torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), list(t.values()), materialize_grads=True)


@pytest.mark.parametrize("kind", KEEPS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("regions", "n_key"), [((CAUSAL,), H), ((CAUSAL,), 1), (BANDED, H)], ids=["one", "shared", "two"]
)
def test_values_and_gradients_equal_dense_masked_rows(kind, normalise, regions, n_key):
    t = inputs(n_key)
    got = mix(heads(t, regions), Ctx(), Field("z", t["z"]), KEEPS[kind], normalise)
    want = reference(t, kind, normalise, regions)
    assert (got - want).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(gradients(got, t), gradients(want, t), strict=True))


class Copies(TorchDispatchMode):
    """Elements that copies and casts write."""

    def __init__(self):
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "_to_copy", "copy_"):
            self.written += out.numel()
        return out


def test_keys_are_cast_and_laid_out_once_and_not_for_each_chunk(monkeypatch):
    qkv = torch.randn(B, T, 3, H, 64).to(torch.bfloat16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    h = Heads(q, k, v, SCALE, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v))
    written = []
    for chunk in (T, 16):
        monkeypatch.setattr(InForce, "chunk", chunk)
        with Copies() as seen, torch.no_grad():
            mix(h, Ctx(), Field("z", v[..., :1]), KEEPS["topk"], True)
        written.append(seen.written)
    p_BHTT = B * H * T * T  # brought to the type of z once
    assert written[1] - written[0] < k.numel() and written[0] - p_BHTT < 6 * k.numel()


@pytest.mark.parametrize("kind", KEEPS)
def test_decode_continues_from_the_cache(kind):
    t, past, got = inputs(), Past(T), []
    for rows in (slice(0, 260), slice(260, 261), slice(261, T)):
        ctx = Ctx((past,), rows.start)
        got.append(mix(heads(t, BANDED, rows), ctx, Field("z", t["z"][:, :, rows]), KEEPS[kind], True))
    assert (torch.cat(got, 2) - reference(t, kind, True, BANDED)).abs().max() < 1e-12
    assert {name for _, name in past.fields} == {"k", "k2", "z"}


def test_equal_entries_all_stay_and_no_row_is_empty():
    p, n = torch.full((99, 99), 1.0).tril(), torch.arange(1, 100)[:, None]
    p = p / n
    assert (largest(2, p, n) >= (p > 0)).all() and above_rms(1.0, p, n).any(-1).all()
    rms = (p.square().sum(-1, keepdim=True) / n).sqrt()
    assert not (p >= rms).any(-1).all()  # rounding alone would empty a row


def test_bf16_selects_as_precise_logits_do():
    t = {n: x.detach().bfloat16() for n, x in inputs().items()}
    wide = {n: x.double() for n, x in t.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = mix(heads(t), Ctx(), Field("z", t["z"]), KEEPS["topk"], True)
    assert got.dtype == torch.bfloat16
    assert (got - reference(wide, "topk", True)).abs().max() < 0.03  # bf16 of P and of the result, values up to 4
    assert (got - reference(wide, "topk", True, dtype=torch.bfloat16)).abs().max() > 0.3  # others are selected


class Squares(TorchDispatchMode):
    """Counts outputs with two axes of T or more."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found += any(isinstance(x, torch.Tensor) and sum(n >= T for n in x.shape) > 1 for x in (out,))
        return out


def test_no_op_forms_a_square():
    t = inputs()
    with Squares() as seen:
        gradients(mix(heads(t, BANDED), Ctx(), Field("z", t["z"]), KEEPS["topk"], True), t)
    assert seen.found == 0
    with Squares() as seen:
        reference(t, "topk", True)
    assert seen.found > 0
