# SPDX-License-Identifier: MIT
"""The lowest k of many scores: exact, deterministic, ties by position, without sorting or joining them.

Scores come in chunks that are computed anew for each pass.  An integer key has the order of the floats; a histogram
of its upper half finds the bin that holds rank k, one of the lower halves in that bin finds the key itself.  Where a
sample says about where that is, only keys nearby are put into bins and the others compared; a sample that misleads
costs a pass, never a bit.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ablab.tensor import native
from ablab.tensor.native import Ranked

LOW = -(1 << 31)
"""Key of what has no rank: below all others."""
HALF, BINS = 1 << 15, 1 << 16
INFINITE = 0x7F80  # upper half of the bits of inf; nan is beyond
REACH, SIGMAS = 0.005, 4  # of a guess to either side: a share of all keys, standard deviations of a sample's rank

ODD = "a score is not finite"

Chunks = Callable[[], Iterable[Tensor | Ranked]]
"""Keys, or for the native kernels what they are made from."""


class Cut(NamedTuple):
    """Keys below `key` go, and of those equal to it the first `ties`."""

    key: int
    ties: int
    equal: int
    """How many are equal."""


def keys(scores: Tensor, words: Tensor | None = None, absolute: bool = False) -> Tensor:
    """int32 keys of fp32 scores, or of their magnitudes, -0 as +0; LOW where `words`, int32, is 0 and not -1."""
    if absolute:
        k = scores.view(torch.int32).bitwise_and(~LOW)
        return k if words is None else k.bitwise_xor_(LOW).bitwise_and_(words).bitwise_xor_(LOW)
    k = (scores + 0.0).view(torch.int32)
    k ^= (k >> 31).bitwise_or_(LOW)  # the order of unsigned words: a negative one inverted, of another the sign
    return (k if words is None else k.bitwise_and_(words)).bitwise_xor_(LOW)


def plain(c: Tensor | Ranked) -> Tensor:
    """The keys themselves."""
    return native.InForce.lib.keys(c) if isinstance(c, Ranked) else c


def around(some: Tensor, share: float) -> tuple[int, int]:
    """Keys between which the one above `share` of all is likely to be, from a sample of them."""
    ranked, n = some.sort().values, len(some)
    reach = REACH * n + SIGMAS * (n * share * (1 - share)) ** 0.5 + 1
    a, b = int(share * n - reach), int(share * n + reach)
    return max(int(ranked[a]), LOW + 1) if a > 0 else LOW + 1, int(ranked[b]) if b < n else -LOW - 1


def cut(chunks: Chunks, k: int, guess: tuple[int, int] | None = None) -> Cut:
    """Where to cut so that exactly the k lowest go; `chunks` gives the keys in order, as often as it is called.

    `guess` are two keys between which that may be.  Raises ValueError if a score is not finite.
    """
    if guess:
        below, dead, near = _near(chunks, *guess)
        if k <= dead:
            return Cut(LOW, k, dead)
        if below < k <= below + len(near):
            return cut(lambda: [near], k - below)
    upper = _count(chunks)
    ends = upper.cumsum(0)
    low = int((ends < k).sum())  # first bin whose end reaches rank k
    dead = upper[0]
    if int(upper[: HALF - INFINITE].sum() - dead + upper[HALF + INFINITE :].sum()):
        raise ValueError(ODD)
    if low == 0:
        return Cut(LOW, k, int(dead))
    rank = k - int(ends[low - 1])
    lower = _count(chunks, low - HALF)
    ends = lower.cumsum(0)
    at = int((ends < rank).sum())
    equal = int(lower[at])
    return Cut(((low - HALF) << 16) + at, rank - int(ends[at]) + equal, equal)


def _near(chunks: Chunks, low: int, high: int) -> tuple[int, int, Tensor]:
    """(keys below `low`, those of them that have no rank, the keys from `low` to `high`)."""
    near, counts = [], []
    for c in chunks():
        if isinstance(c, Ranked):
            part, *count = native.InForce.lib.near(c, low, high)
        else:
            lower = c < low
            part = c[(c <= high) & ~lower]
            none = c.new_zeros((), dtype=torch.int64)
            odd, dead = none, none
            if c.amin() < -INFINITE << 16:  # comparing all is dear
                odd, dead = (c < -INFINITE << 16).count_nonzero(), len(c) - (c ^ LOW).count_nonzero()
            count = lower.count_nonzero(), dead, odd - dead + (c.amax() >= INFINITE << 16)
        near.append(part)
        counts.append(torch.stack([torch.as_tensor(n) for n in count]))
    below, dead, odd = torch.stack(counts).sum(0).tolist()
    if odd:
        raise ValueError(ODD)
    return below, dead, torch.cat(near)


def _count(chunks: Chunks, inside: int | None = None) -> Tensor:
    """Keys in each bin of the upper half; of those `inside` one, in each of the lower half."""
    bins, low = torch.zeros(native.WAYS * torch.get_num_threads(), BINS, dtype=torch.int32), []
    upper = torch.zeros((), dtype=torch.int64)
    for c in chunks():
        c = plain(c)
        if lib := native.on(c):
            lib.count(c, bins, inside)
        elif inside is None:
            upper = torch.bincount(c.view(torch.int16)[1::2].int() + HALF, minlength=BINS).add_(upper.to(c.device))
        else:
            low.append(c[(c >> 16) == inside] & 0xFFFF)
    if low:
        return torch.bincount(torch.cat(low), minlength=BINS)
    return upper if upper.ndim else bins.sum(0)


def kept(c: Tensor, where: Cut, seen: int) -> tuple[Tensor, int]:
    """(mask of what stays in a chunk of keys, equal ones in the chunks so far); `seen` is that of those before."""
    stay = c > where.key
    if where.ties == where.equal:
        return stay, seen
    equal = c == where.key
    stay |= equal & (equal.cumsum(0) > where.ties - seen)
    return stay, seen + int(equal.sum())
