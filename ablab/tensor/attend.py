# SPDX-License-Identifier: MIT
"""The one softmax of training: causal attention over pieces, with its log-sum-exp, never forming T x T.

B batch, H heads, T queries, S keys, K key dim, V value dim, C channels of a field, L latent, W band width.

One causal piece is torch's SDPA.  For lse, or several pieces, there is one fused call per piece, and the
pieces are merged by their lse (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.tensor.kernel import band_mask, core, exact, precise
from ablab.tensor.stage import Ctx, Field, Heads, Mixed, Past, Piece, Region

Triple = tuple[Tensor, Tensor, Region]
"""q, whole k, and the keys that a query sees."""


def attend(h: Heads, ctx: Ctx, lse: bool = False) -> tuple[Mixed, Ctx]:
    """Mix values by the causal softmax of the pieces' logits.

    Called by the host once per block; Rows parts may call it again with other values or pieces.  `lse`: also
    return the log-sum-exp and the number of keys of each row.  With `Past` in `ctx` every field is cached,
    and queries see the cached keys too.
    """
    past, T, values = ctx.all(Past), h.q_BHTK.shape[2], (h.value, *h.side.values())
    if ctx.start:
        (out, *rest), l_BHT = _decode(h.pieces, values, h.scale, ctx, past[0])
    else:
        pieces, v = joined(h, ctx), join(values, ctx)
        q, k, region = pieces[0]
        if lse or len(pieces) > 1 or region.kind != "causal":
            out, l_BHT = _merge([piece(q, k, v, r, h.scale) for q, k, r in pieces])
        else:
            out, l_BHT = _sdpa(q, k, v, h.scale), None
        out, *rest = out.split(_widths(values), -1) if h.side else (out,)
    side = {**h.mixed, **dict(zip(h.side, rest, strict=True))}
    if not lse:
        return Mixed(out, side, None, None), ctx
    n_T = torch.arange(ctx.start + 1, ctx.start + T + 1, device=out.device)
    if past:
        n_T = n_T.clamp(max=past[0].capacity)
    return Mixed(out, side, l_BHT, n_T), ctx


def joined(h: Heads, ctx: Ctx) -> list[Triple]:
    """The pieces with one key tensor each, in decode the cached tokens in front."""
    return [(p.q_BHTK, join(p.k, ctx), p.region) for p in h.pieces]


def wide(h: Heads, ctx: Ctx) -> list[Triple]:
    """The same in the type of statistics.  A copy of keys that the projector interleaved pays within one pass; those
    of the cache are not."""
    dtype, got = precise(h.q_BHTK), joined(h, ctx)
    return [(q.to(dtype), k.to(dtype) if ctx.start else k.to(dtype).contiguous(), region) for q, k, region in got]


def join(fields: tuple[Field, ...], ctx: Ctx) -> Tensor:
    """One BHSC tensor of all channels, the cached tokens in front; a field shared by heads is repeated."""
    past = ctx.all(Past)
    got = [past[0].extend(ctx.layer, f, ctx.start) if past else f.new_BHTC for f in fields]
    if len(got) == 1:
        return got[0]
    n_head = max(t.shape[1] for t in got)
    return torch.cat([t.expand(-1, n_head, -1, -1) for t in got], -1)


def _widths(fields: tuple[Field, ...]) -> list[int]:
    return [f.new_BHTC.shape[-1] for f in fields]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.shape == k.shape == v.shape:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    # NOTE with unequal head dims SDPA falls back to the dense T x T kernel in silence
    width, V = _eights(max(q.shape[-1], v.shape[-1])), v.shape[-1]
    q, k, v = (_widen(t, width, q.shape[1]) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :V]


def _eights(n: int) -> int:
    return -(-n // 8) * 8


def _widen(t: Tensor, width: int, n_head: int) -> Tensor:
    """Zero channels up to `width`: no change to a dot product, zeros in a mix."""
    t = t.expand(-1, n_head, -1, -1)
    return F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t


def piece(q: Tensor, k: Tensor, v: Tensor, region: Region, scale: float) -> tuple[Tensor, Tensor]:
    """(o_BHTV, lse_BHT) of one region; a row that sees no key has o = 0, lse = -inf."""
    V, T, W = v.shape[-1], q.shape[2], region.width
    width = _eights(max(q.shape[-1], V))
    q, k, v = (_widen(t.to(v.dtype), width, q.shape[1]) for t in (q, k, v))  # gates widen q under autocast
    if region.kind == "causal" or (region.kind == "band" and W >= T - 1):
        o, l_BHT = core(q, None)(q, k, v, None, scale)
    elif region.kind == "band":
        o, l_BHT = _band(q, k, v, W, scale)
    elif W >= T - 1:  # far, and nothing is
        o, l_BHT = v.new_zeros(q.shape), _empty(q, T)
    else:
        skip = W + 1
        o, l_BHT = core(q, None)(q[:, :, skip:], k[:, :, :-skip], v[:, :, :-skip], None, scale)
        o, l_BHT = F.pad(o, (0, 0, skip, 0)), torch.cat([_empty(q, skip).to(l_BHT.dtype), l_BHT], -1)
    return o[..., :V], l_BHT


def _empty(q: Tensor, rows: int) -> Tensor:
    return q.new_full((*q.shape[:2], rows), -torch.inf, dtype=precise(q))


def _band(q: Tensor, k: Tensor, v: Tensor, W: int, scale: float) -> tuple[Tensor, Tensor]:
    """The first W queries are plain causal; then blocks of W against their own and the previous W keys."""
    B, H, T, C = q.shape
    o, l_BHT = core(q, None)(q[:, :, :W], k[:, :, :W], v[:, :, :W], None, scale)
    n_block = -(-T // W) - 1
    q, k, v = (F.pad(t, (0, 0, 0, (n_block + 1) * W - T)) for t in (q, k, v))
    q = q[:, :, W:].reshape(B, H * n_block, W, C)
    pairs = [torch.cat([t[:, :, :-W].reshape(q.shape), t[:, :, W:].reshape(q.shape)], 2) for t in (k, v)]
    mask = band_mask(q, W)
    o_far, l_far = core(q, mask)(q, *pairs, mask, scale)
    o = torch.cat([o, o_far.reshape(B, H, n_block * W, C)], 2)[:, :, :T]
    return o, torch.cat([l_BHT, l_far.reshape(B, H, n_block * W)], 2)[:, :, :T]


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The softmax over a union of regions from the softmax over each."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([l_BHT for _, l_BHT in parts])
    l_BHT = lses.logsumexp(0)
    o = sum((l_x - l_BHT).exp()[..., None] * o_x for (o_x, _), l_x in zip(parts, lses, strict=True))
    return o.to(parts[0][0].dtype), l_BHT


def _decode(
    pieces: tuple[Piece, ...], values: tuple[Field, ...], scale: float, ctx: Ctx, past: Past
) -> tuple[list[Tensor], Tensor]:
    """A few queries at positions `start` and up against all S keys, with explicit probabilities, field by field."""
    at = past.positions(ctx.layer, ctx.start, pieces[0].q_BHTK)  # where tokens were pruned, they reach beyond the keys
    found = []
    for p in pieces:
        parts = zip(p.q_BHTK.split(_widths(p.k), -1), p.k, strict=True)
        found.append((scale * sum(_meet(q, f, ctx, past) for q, f in parts), p.region))
    s_BHTS = _union(found, ctx.start, at)
    l_BHT = s_BHTS.logsumexp(-1)
    p_BHTS = (s_BHTS - l_BHT[..., None]).exp()
    past.attended(ctx.layer, p_BHTS)
    return [_mix(p_BHTS, f, ctx, past) for f in values], l_BHT


def _meet(q_BHTC: Tensor, f: Field, ctx: Ctx, past: Past) -> Tensor:
    """q.k over all keys of one field, in the precision of logits."""
    wide, held = precise(q_BHTC), past.hold(ctx.layer, f, ctx.start)
    with exact(held):  # bf16 would round the logits, and with them lse
        q_BHTC = q_BHTC.to(wide)
        if f.factors is not None:
            q_BHTC = torch.einsum("bhtc,hlc->bhtl", q_BHTC, f.factors.up_HLC.to(wide))
        return _product(q_BHTC, held.to(wide).mT)


def _mix(p_BHTS: Tensor, f: Field, ctx: Ctx, past: Past) -> Tensor:
    """P v for the values of one field."""
    held = past.hold(ctx.layer, f, ctx.start)
    o = _product(p_BHTS.to(held.dtype), held)
    return o if f.factors is None else torch.einsum("bhtl,hlc->bhtc", o, f.factors.up_HLC)


def _product(a_BHTX: Tensor, b_BHXY: Tensor) -> Tensor:
    """a @ b.  Heads that share b become rows of one product: matmul would copy b for each."""
    B, H, T, X = a_BHTX.shape
    if b_BHXY.shape[1] == H:
        return a_BHTX @ b_BHXY
    return (a_BHTX.reshape(B, 1, H * T, X) @ b_BHXY).view(B, H, T, -1)


def positions(h: Heads, ctx: Ctx) -> Tensor | None:
    """Those of the keys that new queries meet in decode, S or B11S; None where they are 0, 1, 2 and so on."""
    found = [past.positions(ctx.layer, ctx.start, h.q_BHTK) for past in ctx.all(Past) if ctx.start]
    return found[0] if found else None


def logits(pieces: Sequence[Triple], scale: float, start: int, at: Tensor | None = None) -> Tensor:
    """s_BHTS of a few queries at positions `start` and up and keys `at`; -inf where a query does not see a key."""
    found = []
    for q, k, region in pieces:
        with exact(q):  # bf16 would round the logits, and with them lse
            found.append((scale * (q.to(precise(q)) @ k.to(precise(q)).mT), region))
    return _union(found, start, at)


def _union(found: Sequence[tuple[Tensor, Region]], start: int, at: Tensor | None) -> Tensor:
    """Logits of pieces as one s_BHTS, each where its region sees the key; queries at `start` and up, keys `at`."""
    first, s_BHTS = found[0][0], None
    i_T1 = torch.arange(start, start + first.shape[2], device=first.device)[:, None]
    gap = i_T1 - (torch.arange(first.shape[3], device=first.device) if at is None else at)
    for s, region in found:
        seen = torch.where(sees(region, gap), s, -torch.inf)
        s_BHTS = seen if s_BHTS is None else torch.maximum(s_BHTS, seen)
    return s_BHTS


def sees(region: Region, gap: Tensor) -> Tensor:
    """Which pairs of query and key a region holds, by their distance i - j."""
    if region.kind == "far":
        return gap > region.width
    return (gap >= 0) & (gap <= region.width) if region.kind == "band" else gap >= 0
