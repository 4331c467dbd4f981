# SPDX-License-Identifier: MIT
"""The lowest k of many scores: exact, deterministic, ties by position, without sorting or joining them.

Scores come in chunks that are computed anew for each pass.  An integer key has the order of the floats; a histogram
of its upper half finds the bin that holds rank k, one of the lower halves in that bin finds the key itself.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ablab.tensor import native

LOW = -(1 << 31)
"""Key of what has no rank: below all others."""
HALF, BINS = 1 << 15, 1 << 16
INFINITE = 0x7F80  # upper half of the bits of inf; nan is beyond


class Cut(NamedTuple):
    """Keys below `key` go, and of those equal to it the first `ties`."""

    key: int
    ties: int
    equal: int
    """How many are equal."""


def keys(scores: Tensor, words: Tensor | None = None) -> Tensor:
    """int32 keys of fp32 scores, -0 as +0; LOW where `words`, int32, is 0 and not -1."""
    k = (scores + 0.0).view(torch.int32)
    k ^= (k >> 31).bitwise_or_(LOW)  # the order of unsigned words: a negative one inverted, of another the sign
    return (k if words is None else k.bitwise_and_(words)).bitwise_xor_(LOW)


def cut(chunks: Callable[[], Iterable[Tensor]], k: int) -> Cut:
    """Where to cut so that exactly the k lowest go; `chunks` gives the keys in order, as often as it is called.

    Raises ValueError if a score is not finite.
    """
    upper = _count(chunks)
    ends = upper.cumsum(0)
    low = int((ends < k).sum())  # first bin whose end reaches rank k
    dead = upper[0]
    if int(upper[: HALF - INFINITE].sum() - dead + upper[HALF + INFINITE :].sum()):
        raise ValueError("a score is not finite")
    if low == 0:
        return Cut(LOW, k, int(dead))
    rank = k - int(ends[low - 1])
    lower = _count(chunks, low - HALF)
    ends = lower.cumsum(0)
    at = int((ends < rank).sum())
    equal = int(lower[at])
    return Cut(((low - HALF) << 16) + at, rank - int(ends[at]) + equal, equal)


def _count(chunks: Callable[[], Iterable[Tensor]], inside: int | None = None) -> Tensor:
    """Keys in each bin of the upper half; of those `inside` one, in each of the lower half."""
    bins, low = torch.zeros(native.WAYS * torch.get_num_threads(), BINS, dtype=torch.int32), []
    upper = torch.zeros((), dtype=torch.int64)
    for c in chunks():
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
