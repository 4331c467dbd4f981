# SPDX-License-Identifier: MIT
"""The ways to (o, lse) of softmax(scale q k^T) v on a device, and the probe that chooses among them.

B batch, H heads, T queries, S keys, C channels of q, k and v alike, a multiple of 8.

A way is square and causal without a mask, and takes an additive mask [T, S] of any shape.  torch's fused operators
return an lse without a gradient, which drops gradients in silence: `Fused` alone calls them.
NOTE they are private API: torch is pinned.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ablab.tensor import stream

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
ATEN = torch.ops.aten
SPARE = 8  # channels that the backward pass adds to carry the gradient of lse; kernels want multiples of 8
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the probe, against the largest entry; 3e-2 for half types
LSE_TOLERANCE = 1e-3  # lse of half types is fp32: a rounded one is refused


class Kernel(NamedTuple):
    """A fused operator."""

    forward: Callable[..., tuple[Tensor, ...]]
    """(q, k, v, mask, scale) to (o, lse, *rest); lse may have columns beyond T."""
    backward: Callable[..., tuple[Tensor, ...]]
    """(do, q, k, v, mask, o, lse, rest, scale) to (dq, dk, dv)."""
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    masked: tuple[bool, ...] = (False, True)
    widest: int = 1 << 16
    """Most channels C."""


def _cpu(q, k, v, mask, scale):
    q, k, v = (
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
    )  # 5 % faster than on what a projector interleaves, the copies included
    return ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)


def _cpu_backward(do, q, k, v, mask, o, lse, rest, scale):
    op = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    return op(do, q, k, v, o, lse, 0.0, mask is None, attn_mask=mask, scale=scale)


def _flash(q, k, v, mask, scale):
    o, lse, _, _, _, _, seed, offset, _ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    return o, lse, seed, offset


def _flash_backward(do, q, k, v, mask, o, lse, rest, scale):
    op, T = ATEN._scaled_dot_product_flash_attention_backward, q.shape[2]
    return op(do, q, k, v, o, lse, None, None, T, T, 0.0, True, *rest, scale=scale)


def _bias(q, mask):
    """The mask with rows that start at multiples of 16 entries, as the efficient kernel wants them."""
    if mask is None:
        return None
    S = mask.shape[1]
    return F.pad(mask, (0, -S % 16))[:, :S].expand(*q.shape[:2], -1, -1)


def _efficient(q, k, v, mask, scale):
    op = ATEN._scaled_dot_product_efficient_attention
    return op(q, k, v, _bias(q, mask), True, 0.0, mask is None, scale=scale)


def _efficient_backward(do, q, k, v, mask, o, lse, rest, scale):
    op, wanted = ATEN._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
    return op(do, q, k, v, _bias(q, mask), o, lse, *rest, 0.0, wanted, mask is None, scale=scale)[:3]


KERNELS: Mapping[str, Kernel] = {  # the fastest first
    "cpu": Kernel(_cpu, _cpu_backward, ("cpu",), (torch.float64, torch.float32, *HALF)),
    "flash": Kernel(_flash, _flash_backward, ("cuda",), HALF, (False,), 256 - SPARE),
    "efficient": Kernel(_efficient, _efficient_backward, ("cuda",), (torch.float32, *HALF)),
}
"""Those of a GPU are written from the operator schemas: the probe decides."""


class InForce:
    """Settings of this process, as torch's number of threads is one; `settle` changes them before a trial starts."""

    chunk: ClassVar[int] = 128
    """Query rows per step where logits are formed a few rows at a time."""
    kernels: ClassVar[dict[tuple[str, torch.dtype, bool], tuple[str, ...]]] = {}
    """(device type, dtype, masked) -> fused operators that passed the probe."""
    stream: ClassVar[bool] = False
    """The largest logits of rows are found by `stream.largest`."""


def settle(device: torch.device, chunk: int, dtypes: Iterable[torch.dtype]) -> None:
    """Put a chunk in force and choose the kernels of a device, once per process and key."""
    InForce.chunk = chunk
    InForce.stream = device.type == "cuda" and stream.probe(device)
    for dtype in dtypes:
        for masked in (False, True):
            key = device.type, dtype, masked
            if key not in InForce.kernels:
                InForce.kernels[key] = choose(KERNELS, device, dtype, masked)


def choose(kernels: Mapping[str, Kernel], device: torch.device, dtype: torch.dtype, masked: bool) -> tuple[str, ...]:
    """Names of the kernels that are right on a device, in their order."""
    listed = [n for n, k in kernels.items() if device.type in k.devices and dtype in k.dtypes and masked in k.masked]
    return tuple(n for n in listed if probe(fused(kernels[n]), device, dtype, masked))


def chosen(device: torch.device) -> str:
    """What `core` takes on a device, as text: one name if it is the same throughout."""
    found = {key: [*names, "chunked"][0] for key, names in InForce.kernels.items() if key[0] == device.type}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{name} for {str(d)[6:]}{' masked' * masked}" for (_, d, masked), name in found.items())


def core(q: Tensor, mask: Tensor | None) -> Core:
    """The first kernel that passed the probe for tensors like q, else row chunks; without a probe, what torch has."""
    kind = "cpu" if q.device.type == "meta" else q.device.type
    unknown = ("cpu",) if kind == "cpu" else ()
    for name in InForce.kernels.get((kind, q.dtype, mask is not None), unknown):
        if q.shape[-1] <= KERNELS[name].widest:
            return fused(KERNELS[name])
    return chunked


def fused(kernel: Kernel) -> Core:
    return partial(Fused.apply, kernel.forward, kernel.backward)


class Fused(torch.autograd.Function):
    """A fused operator with a gradient for its lse.

    dL/ds_ij = p_ij (dP_ij - d_i + g_i), g the gradient of lse, and fused backwards compute d_i = dO_i . o_i
    themselves: in spare channels, where v is 0, dO = 1 and o = -g / SPARE make it d - g and leave dP alone.
    """

    @staticmethod
    def forward(ctx, op, backward, q, k, v, mask, scale):
        o, lse, *rest = op(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, o, lse, *rest)
        ctx.op, ctx.scale = backward, scale
        ctx.set_materialize_grads(False)
        return o, lse[..., : q.shape[2]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dl_BHT):
        q, k, v, mask, o, lse, *rest = ctx.saved_tensors
        C = q.shape[-1]
        do = torch.zeros_like(o) if do is None else do
        if dl_BHT is not None:
            q, k, v = (F.pad(t, (0, SPARE)) for t in (q, k, v))
            do = F.pad(do, (0, SPARE), value=1.0)
            spare = (dl_BHT / -SPARE).to(o.dtype)[..., None]
            o = torch.cat([o, spare.expand(*spare.shape[:-1], SPARE)], -1)
        grads = ctx.op(do, q, k, v, mask, o, lse, rest, ctx.scale)
        return None, None, *(g[..., :C] for g in grads), None, None


def precise(t: Tensor) -> torch.dtype:
    """The type of lse and statistics: fp32, or fp64 for fp64."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def exact(t: Tensor) -> torch.autocast:
    """The context in which products keep the type of their inputs."""
    return torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False)


def chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Any device: a few rows at a time, recomputed in the backward pass."""

    def rows(q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        wide = precise(q)
        with exact(q):  # bf16 would round the logits, and with them lse
            s = scale * (q.to(wide) @ k.to(wide).mT)
        if mask is None:
            i = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
            s = s.masked_fill(torch.arange(k.shape[2], device=q.device) > i, -torch.inf)
        else:
            s = s + mask[first : first + q.shape[2]]
        l_BHT = s.logsumexp(-1)
        return (s - l_BHT[..., None]).exp().to(v.dtype) @ v, l_BHT

    done = []
    for first in range(0, q.shape[2], InForce.chunk):
        last = min(first + InForce.chunk, q.shape[2])
        end = last if mask is None else k.shape[2]
        part = q[:, :, first:last], k[:, :, :end], v[:, :, :end], first
        done.append(checkpoint(rows, *part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat([o for o, _ in done], 2), torch.cat([l_BHT for _, l_BHT in done], 2)


def band_mask(q: Tensor, W: int) -> Tensor:
    """[W, 2W], for W queries against the W keys before them and their own: i sees i - W <= j <= i."""
    i, j = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
    return q.new_zeros(W, 2 * W).masked_fill((j > i + W) | (j < i), -torch.inf)


def probe(way: Core, device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Are o, lse and the gradients through both those of a dense float64 softmax, on 64 keys?"""
    S, C, scale = 64, 64, 0.125
    T = S // 2 if masked else S
    stream = torch.Generator().manual_seed(0)  # of its own: the trial's random state is left alone
    draw = lambda *shape: torch.randn(1, 2, *shape, generator=stream, dtype=torch.float64).to(dtype)
    q, k, v, do, dl = draw(T, C), draw(S, C), draw(S, C), draw(T, C), draw(T)
    mask = band_mask(q, T) if masked else None
    seen = band_mask(q.double(), T) if masked else torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = scale * (q @ k.mT) + seen
        return s.softmax(-1) @ v, s.logsumexp(-1)

    def run(call: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in inputs]
            o, lse = call(*leaves)
            # one scalar: torch imports sympy where gradients of outputs are given
            total = (o * do.to(o)).sum() + (lse * dl.to(lse)).sum()
            gradient = torch.autograd.grad(total, leaves)
        return [t.detach().double().cpu() for t in (o, *gradient, lse)]

    there = lambda *t: way(*t, None if mask is None else mask.to(device), scale)
    try:
        got = run(there, *(t.to(device) for t in (q, k, v)))
    except (RuntimeError, TypeError, ValueError, AttributeError):  # not on this device, or not in this build of torch
        return False
    want = run(dense, *(t.double() for t in (q, k, v)))
    bounds = [TOLERANCE.get(dtype, 3e-2) * w.abs().max() for w in want[:-1]]
    bounds.append(min(TOLERANCE.get(dtype, LSE_TOLERANCE), LSE_TOLERANCE) * want[-1].abs().max())
    return all(((g - w).abs().max() <= b).item() for g, w, b in zip(got, want, bounds, strict=True))
