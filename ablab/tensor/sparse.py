# SPDX-License-Identifier: MIT
"""Values mixed by rows of P that keep a few keys: a second pass, a few rows at a time, never T x T.

B batch, H heads, T queries, S keys, C channels.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ablab.tensor.attend import CHUNK, _join
from ablab.tensor.stage import Ctx, Field, Heads, Past, Region

Keep = Callable[[Tensor, Tensor], Tensor]
"""(p_BHTS, number of visible keys n_BHT1) to the mask of what stays, which must not depend on S."""


def largest(k: int, p_BHTS: Tensor, n_BHT1: Tensor) -> Tensor:
    """The k largest, and whatever equals the last of them."""
    return p_BHTS >= p_BHTS.topk(min(k, p_BHTS.shape[-1]), -1).values[..., -1:]


def above_rms(tau: float, p_BHTS: Tensor, n_BHT1: Tensor) -> Tensor:
    """Those of at least tau times the RMS over the visible keys; the largest stays however tau = 1 rounds."""
    rms_BHT1 = (p_BHTS.square().sum(-1, keepdim=True) / n_BHT1).sqrt()
    return p_BHTS >= torch.minimum(tau * rms_BHT1, p_BHTS.amax(-1, keepdim=True))


def mix(h: Heads, ctx: Ctx, value: Field, keep: Keep, normalise: bool) -> Tensor:
    """BHTC: the value by rows of the softmax of h, restricted to `keep` and, if `normalise`, brought back to sum 1.

    The selection has no gradient, what it keeps has.  With `Past` in `ctx` the value is cached like any field.
    """
    past, T, regions = ctx.all(Past), h.q_BHTK.shape[2], [p.region for p in h.pieces]
    keys, z_BHSC = [_join(p.k, ctx, past) for p in h.pieces], _join((value,), ctx, past)
    wide = torch.promote_types(h.q_BHTK.dtype, torch.float32)

    def rows(start: int, z: Tensor, *qk: Tensor) -> Tensor:
        pieces = [(q.to(wide), k.to(wide), r) for q, k, r in zip(qk[::2], qk[1::2], regions, strict=True)]
        kind = "cpu" if z.is_meta else z.device.type  # there is no autocast on meta
        with torch.autocast(kind, enabled=False):  # bf16 would round the logits, and select others
            s_BHTS = _logits(pieces, h.scale, start)
            p_BHTS = s_BHTS.softmax(-1)
            p_BHTS = p_BHTS * keep(p_BHTS.detach(), s_BHTS.isfinite().sum(-1, keepdim=True))
            if normalise:
                p_BHTS = p_BHTS / p_BHTS.sum(-1, keepdim=True)
            return p_BHTS.to(z.dtype) @ z

    done = []
    for first in range(0, T, CHUNK):
        last = min(first + CHUNK, T)
        end = ctx.start + last
        pairs = [(p.q_BHTK[:, :, first:last], k[:, :, :end]) for p, k in zip(h.pieces, keys, strict=True)]
        done.append(checkpoint(rows, ctx.start + first, z_BHSC[:, :, :end], *chain(*pairs), use_reentrant=False))
    return torch.cat(done, 2)


def _logits(pieces: list[tuple[Tensor, Tensor, Region]], scale: float, start: int) -> Tensor:
    """BHTS of queries at positions `start` and up on keys from 0; -inf where not seen."""
    T, S, device = pieces[0][0].shape[2], pieces[0][1].shape[2], pieces[0][1].device
    gap_TS = torch.arange(start, start + T, device=device)[:, None] - torch.arange(S, device=device)
    s_BHTS = 0.0
    for q, k, (kind, width) in pieces:
        seen_TS = {"causal": gap_TS >= 0, "band": gap_TS <= width, "far": gap_TS > width}[kind]
        s_BHTS = s_BHTS + torch.where(seen_TS, scale * (q @ k.mT), 0.0)
    return torch.where(gap_TS >= 0, s_BHTS, -torch.inf)
