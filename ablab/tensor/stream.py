# SPDX-License-Identifier: MIT
"""The largest logits of each row on a GPU, in one pass over the keys that holds a few of them per row (Triton).

B batch, H heads, T queries and keys, C channels, N picked keys.

A program keeps the best so far of a block of rows and merges one tile of keys after the other.  A logit and its key
are one int64: the bits of the float, reordered so that integers compare as floats do, above the index.  Left to row
chunks where Triton or a device is missing, or where `probe` finds other values than theirs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ablab.tensor.stage import CAUSAL, Region

ROWS = KEYS = 64  # of a tile
KINDS = ("causal", "band", "far")
UNSEEN, INDEX = -(1 << 63) + (1 << 32), (1 << 32) - 1  # below it are slots without a key, the low half is the key


def largest(pieces: Sequence[tuple[Tensor, Tensor, Region]], scale: float, k: int) -> Tensor:
    """Keys of the min(k, T) largest logits of each row over all pieces (q, k, region), BHTN in no order.

    A row that sees fewer is filled up with one that it does not see.  fp32 products.
    """
    B, H, T, _ = pieces[0][0].shape
    best_BHTN = pieces[0][0].new_empty((B, H, T, min(k, T)), dtype=torch.int64)
    for n, (q, key, region) in enumerate(pieces):
        q, key = (t.expand(B, H, -1, -1).float().contiguous() for t in (q, key))
        merge(q, key, best_BHTN, scale, KINDS.index(region.kind), region.width, n == 0)
    after_T1 = torch.arange(1, T + 1, device=best_BHTN.device)[:, None]
    return torch.where(best_BHTN < UNSEEN, after_T1, best_BHTN & INDEX)


@torch.library.custom_op("ablab::merge_largest", mutates_args=("best",))
def merge(q: Tensor, k: Tensor, best: Tensor, scale: float, kind: int, width: int, fresh: bool) -> None:
    """Merge the logits of one region into `best`; a compiler does not look inside."""
    B, H, T, C = q.shape
    N, power = best.shape[-1], lambda n: 1 << (n - 1).bit_length()
    sizes = {"C": C, "C2": max(16, power(C)), "N": N, "N2": power(N), "BM": ROWS, "BN": KEYS}
    kernel()[-(-T // ROWS), B * H](q, k, best, T, scale, width, KIND=kind, FRESH=fresh, **sizes)


@cache
def kernel() -> Any:
    """Made when first needed: triton is imported nowhere else."""
    import triton
    import triton.language as tl

    @triton.jit
    def merged(
        q_ptr, k_ptr, best_ptr, T, scale, width,
        KIND: tl.constexpr, FRESH: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        first, head = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
        i, c, slot = first + tl.arange(0, BM), tl.arange(0, C2), tl.arange(0, N2)
        q = tl.load(q_ptr + (head * T + i[:, None]) * C + c[None, :], (i[:, None] < T) & (c[None, :] < C), 0.0)
        place, live = best_ptr + (head * T + i[:, None]) * N + slot[None, :], (i[:, None] < T) & (slot[None, :] < N)
        nothing = tl.zeros((BM, BN), tl.int64) - 9223372036854775807
        # distinct, above nothing and below every logit; slots beyond N are never the least
        best = tl.zeros((BM, N2), tl.int64) - 9223372036854775806 + slot[None, :]
        best = tl.where(slot[None, :] < N, best, 9223372036854775807)
        if not FRESH:
            best = tl.where(live, tl.load(place, live, 0), best)
        low, high = 0, tl.minimum(first + BM, T)
        if KIND == 1:
            low = tl.maximum(first - width, 0) // BN * BN
        if KIND == 2:
            high = tl.minimum(first + BM - 1 - width, T)
        for start in range(low, high, BN):
            j = start + tl.arange(0, BN)
            k = tl.load(k_ptr + (head * T + j[:, None]) * C + c[None, :], (j[:, None] < T) & (c[None, :] < C), 0.0)
            s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
            gap = i[:, None] - j[None, :]
            seen = (gap >= 0) & (i[:, None] < T)
            if KIND == 1:
                seen = seen & (gap <= width)
            if KIND == 2:
                seen = seen & (gap > width)
            bits = s.to(tl.int32, bitcast=True)
            order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
            tile = tl.where(seen, (order << 32) | j[None, :].to(tl.int64), nothing)
            for _ in range(N):
                top, least = tl.max(tile, 1), tl.min(best, 1)
                best = tl.where((best == least[:, None]) & (top > least)[:, None], top[:, None], best)
                tile = tl.where(tile == top[:, None], nothing, tile)
        tl.store(place, best, live)

    return merged


def probe(device: torch.device) -> bool:
    """Is it there, and are its keys those of a dense float64 product, causal and in two pieces?"""
    T, C, k, width = 100, 24, 5, 30
    draws = torch.Generator().manual_seed(0)  # of its own: the trial's random state is left alone
    q, key = (torch.randn(1, 2, T, C, generator=draws).to(device) for _ in range(2))
    gap = torch.arange(T)[:, None] - torch.arange(T)
    s = (q.double() @ key.double().mT).cpu().masked_fill(gap < 0, -torch.inf)
    near, far = (q, key, Region("band", width)), (-q, key, Region("far", width))
    try:
        cases = (([(q, key, CAUSAL)], s), ([near, far], torch.where(gap > width, -s, s)))
        found = [(dense, largest(pieces, 1.0, k).cpu()) for pieces, dense in cases]
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError):  # no Triton, or not for this device
        return False
    got = [dense.gather(-1, j.clamp(max=T - 1)).sort(-1, descending=True).values for dense, j in found]
    return all(torch.allclose(g, dense.topk(k, -1).values, atol=1e-4) for g, (dense, _) in zip(got, found, strict=True))
