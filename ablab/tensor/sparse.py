# SPDX-License-Identifier: MIT
"""Values mixed by rows of P that keep a few keys: a second pass, a few rows at a time, never T x T.

B batch, H heads, T queries, S keys, C channels.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ablab.tensor.attend import join, logits, positions, wide
from ablab.tensor.kernel import InForce, exact
from ablab.tensor.stage import Ctx, Field, Heads

Keep = Callable[[Tensor, Tensor], Tensor]
"""(p_BHTS, number of visible keys n_T1) to the mask of what stays, which must not depend on S."""


def largest(k: int, p_BHTS: Tensor, n_T1: Tensor) -> Tensor:
    """The k largest, and whatever equals the last of them."""
    return p_BHTS >= p_BHTS.topk(min(k, p_BHTS.shape[-1]), -1).values[..., -1:]


def above_rms(tau: float, p_BHTS: Tensor, n_T1: Tensor) -> Tensor:
    """Those of at least tau times the RMS over the visible keys; the largest stays however tau = 1 rounds."""
    rms_BHT1 = (p_BHTS.square().sum(-1, keepdim=True) / n_T1).sqrt()
    return p_BHTS >= torch.minimum(tau * rms_BHT1, p_BHTS.amax(-1, keepdim=True))


def mix(h: Heads, ctx: Ctx, value: Field, keep: Keep, normalise: bool) -> Tensor:
    """BHTC: the value by rows of the softmax of h, restricted to `keep` and, if `normalise`, brought back to sum 1.

    The selection has no gradient, what it keeps has.  With `Past` in `ctx` the value is cached like any field.
    """
    pieces, z_BHSC = wide(h, ctx), join((value,), ctx)
    regions, T, at = [r for _, _, r in pieces], h.q_BHTK.shape[2], positions(h, ctx)

    def rows(start: int, z: Tensor, *qk: Tensor) -> Tensor:
        part, S = list(zip(qk[::2], qk[1::2], regions, strict=True)), z.shape[2]
        n_T1 = torch.arange(start + 1, start + 1 + qk[0].shape[2], device=z.device)[:, None].clamp(max=S)
        with exact(z):  # bf16 would round the logits, and select others
            s_BHTS = logits(part, h.scale, start, None if at is None else at[..., :S])
            p_BHTS = s_BHTS.softmax(-1)
            p_BHTS = p_BHTS * keep(p_BHTS.detach(), n_T1)
            if normalise:
                p_BHTS = p_BHTS / p_BHTS.sum(-1, keepdim=True)
            return p_BHTS.to(z.dtype) @ z

    done = []
    for first in range(0, T, InForce.chunk):
        last = min(first + InForce.chunk, T)
        end = ctx.start + last
        qk = chain(*[(q[:, :, first:last], k[:, :, :end]) for q, k, _ in pieces])
        done.append(
            checkpoint(rows, ctx.start + first, z_BHSC[:, :, :end], *qk, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(done, 2)
