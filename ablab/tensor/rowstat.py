# SPDX-License-Identifier: MIT
"""Statistics of the rows of P, for all rows at once and never forming T x T.

B batch, H heads, T queries, S keys, K key dim, N picked keys.

With l the log-sum-exp of a row's logits s, sum p^a = exp(lse(a s) - a l); the entropy is l - sum p s, where sum p s
is scale * q . kbar and kbar = sum p k what attention mixes from the keys; the largest p are those of the largest s.
All are differentiable in q and k.  Their own passes are fp32 (fp64 stays fp64) also under autocast: with bf16
products the entropy is off by 2.5e-2 nats, and a probability by 0.2.

The shares are position-normalised to [0, 1] by the n keys that a row sees, since a raw statistic encodes the
position: 0 for uniform rows, 1 for rows on one key (top k: on k keys), and 0 where only one value is possible.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ablab.tensor import stream
from ablab.tensor.attend import Triple, logits, piece, positions, sees, wide
from ablab.tensor.kernel import InForce, exact
from ablab.tensor.stage import Ctx, Gauges, Heads, Mixed


def entropy(m: Mixed, h: Heads, ctx: Ctx) -> Tensor:
    """BHT in nats.  One attention pass over each piece, with its keys as values."""
    pieces = wide(h, ctx)
    with exact(h.q_BHTK):
        if ctx.start:
            s_BHTS = logits(pieces, h.scale, ctx.start, positions(h, ctx))
            return _entropy(s_BHTS)
        found = [piece(q, k, k, region, h.scale) for q, k, region in pieces]
        means = [h.scale * torch.linalg.vecdot(q, kbar) for (q, _, _), (kbar, _) in zip(pieces, found, strict=True)]
        if len(found) == 1:
            return found[0][1] - means[0]
        l_BHT = _total([lse for _, lse in found])
        return l_BHT - sum((lse - l_BHT).exp() * mean for (_, lse), mean in zip(found, means, strict=True))


def _entropy(s: Tensor) -> Tensor:
    """That of rows whose logits are there, -inf where a key is not seen."""
    p = s.softmax(-1)
    return s.logsumexp(-1) - (p * s.masked_fill(p == 0, 0)).sum(-1)


def power(m: Mixed, h: Heads, ctx: Ctx, a: float) -> Tensor:
    """sum p^a, BHT.  One attention pass over each piece, for its lse; `m` brings that of the rows."""
    pieces = wide(h, ctx)
    with exact(h.q_BHTK):
        if ctx.start:
            l_BHT = logits(pieces, a * h.scale, ctx.start, positions(h, ctx)).logsumexp(-1)
        else:
            l_BHT = _total([piece(q, k, k, region, a * h.scale)[1] for q, k, region in pieces])
        return (l_BHT - a * m.lse_BHT).exp()


def mass(m: Mixed, h: Heads, ctx: Ctx, k: int) -> Tensor:
    """Sum of the k largest p, BHT.  A streaming pass, or logits of a few query rows at a time, say which; those are
    computed again."""
    pieces, at, T, done = wide(h, ctx), positions(h, ctx), h.q_BHTK.shape[2], []
    with torch.no_grad():
        streams = InForce.stream and not ctx.start and h.q_BHTK.dtype != torch.float64
        found_BHTN = stream.largest(pieces, h.scale, k) if streams else None
    with exact(h.q_BHTK):
        for first in range(0, T, InForce.chunk):
            rows, start = slice(first, first + InForce.chunk), ctx.start + first
            l_BHT, parts = m.lse_BHT[:, :, rows], [(q[:, :, rows], key, region) for q, key, region in pieces]
            if found_BHTN is None:
                s_BHTN, j_BHTN = _best(parts, h.scale, start, at, k)
            else:
                s_BHTN, j_BHTN = None, found_BHTN[:, :, rows]
            # recomputed in the backward pass: N copies of k would be kept
            if s_BHTN is None or (torch.is_grad_enabled() and at is None):
                more = {"use_reentrant": False, "preserve_rng_state": False}
                s_BHTN = checkpoint(_picked, parts, j_BHTN, h.scale, start, **more)
            done.append((s_BHTN - l_BHT[..., None]).exp().sum(-1))
    return torch.cat(done, -1)


@torch.no_grad()
def _best(pieces: list[Triple], scale: float, start: int, at: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(logits, keys) BHTN of the largest of a few rows, from all their logits."""
    end = max(start + pieces[0][0].shape[2], k)  # a slice ends at the last key at the latest
    seen = [(q, key[:, :, :end], region) for q, key, region in pieces]
    s_BHTS = logits(seen, scale, start, None if at is None else at[..., :end])
    return s_BHTS.max(-1, keepdim=True) if k == 1 else s_BHTS.topk(min(k, s_BHTS.shape[-1]), sorted=False)


def _picked(pieces: list[Triple], j_BHTN: Tensor, scale: float, start: int) -> Tensor:
    """Logits of picked keys; -inf where the query does not see one."""
    B, H, T, N = j_BHTN.shape
    gap_BHTN = torch.arange(start, start + T, device=j_BHTN.device)[:, None] - j_BHTN
    s_BHTN = torch.full(j_BHTN.shape, -torch.inf, dtype=pieces[0][0].dtype, device=j_BHTN.device)
    for q, k, region in pieces:
        K = k.shape[-1]
        index = j_BHTN.flatten(2)[..., None].expand(-1, -1, -1, K)
        k_BHTNK = k.expand(B, H, -1, -1).gather(2, index).view(B, H, T, N, K)
        s_BHTN = torch.where(sees(region, gap_BHTN), scale * (k_BHTNK @ q[..., None])[..., 0], s_BHTN)
    return s_BHTN


class RowEntropy(Gauges):
    """Watches the entropy of one row in eight, over the ln n that a uniform row has: its mean, and the lowest mean of a
    head, which falls when attention collapses."""

    every = 8

    @torch.no_grad()
    def watch(self, h: Heads, ctx: Ctx) -> None:
        T = h.q_BHTK.shape[2]
        if T == 1:
            return
        at_N = torch.arange(T - 1, 0, -self.every, device=h.q_BHTK.device)  # row 0 has no choice
        gap_NS, s_BHNS = at_N[:, None] - torch.arange(T, device=at_N.device), torch.tensor(-torch.inf)
        with exact(h.q_BHTK):
            for q, k, region in wide(h, ctx):
                s_BHNS = torch.where(sees(region, gap_NS), h.scale * (q[:, :, at_N] @ k.mT), s_BHNS.to(q))
            share_H = (_entropy(s_BHNS) / (at_N + 1).to(s_BHNS).log()).mean((0, 2))
        name = f"attn/{ctx.layer}/entropy"
        self.watched |= {f"{name}_mean": share_H.mean(), f"{name}_lowest_head": share_H.min()}


def entropy_share(m: Mixed, h: Heads, ctx: Ctx) -> Tensor:
    """Entropy over ln n, BHT: unlike the others 1 for uniform rows and 0 for rows on one key."""
    n_T = _n(m)
    return _ratio(entropy(m, h, ctx), n_T.log())


def rms_share(m: Mixed, h: Heads, ctx: Ctx) -> Tensor:
    """Root of the sum of squares, BHT."""
    least_T = _n(m).rsqrt()
    return _ratio(power(m, h, ctx, 2).sqrt() - least_T, 1 - least_T)


def mass_share(m: Mixed, h: Heads, ctx: Ctx, k: int) -> Tensor:
    """Mass of the k largest, BHT."""
    n_T = _n(m)
    least_T = n_T.clamp(max=k) / n_T
    return _ratio(mass(m, h, ctx, k) - least_T, 1 - least_T)


def _n(m: Mixed) -> Tensor:
    return m.n_T.to(m.lse_BHT.dtype)


def _ratio(a_BHT: Tensor, b_T: Tensor) -> Tensor:
    """a / b, and 0 without a gradient where b is 0."""
    return torch.where(b_T > 0, a_BHT, 0.0) / torch.where(b_T > 0, b_T, 1.0)


def _total(lses: list[Tensor]) -> Tensor:
    return lses[0] if len(lses) == 1 else torch.stack(lses).logsumexp(0)
