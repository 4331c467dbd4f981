# SPDX-License-Identifier: MIT
"""Masks over a stretch of the flat buffers: one byte or one bit an element, applied as a bitwise and.

And is exact (what goes becomes +0) and cheap on every device; a product with bools is neither.
"""

import torch
from torch import Tensor

from ablab.tensor import native

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements at a time: what stays in the cache of a core
WORDS = {torch.float32: torch.int32, torch.float64: torch.int64}


def pack(stay: Tensor) -> Tensor:
    """uint8, bit i of byte j is element 8 j + i; `stay` is 0 or not, its length is padded with ones."""
    rest = -len(stay) % 8
    bits = torch.cat([stay.ne(0), stay.new_ones(rest, dtype=torch.bool)]).view(-1, 8)
    return (bits * _weights(stay)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """int8, -1 for a set bit and 0 for another."""
    return -(packed[:, None] & _weights(packed)).ne(0).view(-1).to(torch.int8)


def _weights(like: Tensor) -> Tensor:
    return torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=like.device)


class Mask:
    """Which elements of `span` stay; all do at first.  Positions are those of the flat buffer.

    With `bits` the ends of what is asked for must be multiples of 8 but for that of the span.
    """

    def __init__(self, span: slice, bits: bool, device: torch.device) -> None:
        self.span, self.bits = span, bits
        size = span.stop - span.start
        full = torch.full((-(-size // 8),), 255, dtype=torch.uint8, device=device)
        self.held = full if bits else torch.full((size,), -1, dtype=torch.int8, device=device)
        step = CHUNK[device.type]
        self.chunks = [slice(a, min(a + step, span.stop)) for a in range(span.start, span.stop, step)]
        self._words: dict[torch.dtype, Tensor] = {}

    @property
    def keep(self) -> native.Keep:
        """As the compiled kernels take it."""
        return native.Keep(self.held, self.span.start, self.span.stop - self.span.start, self.bits)

    def at(self, where: slice) -> Tensor:
        """int8, -1 for what stays and 0 for what goes."""
        a, b = where.start - self.span.start, where.stop - self.span.start
        return unpack(self.held[a // 8 : -(-b // 8)])[: b - a] if self.bits else self.held[a:b]

    def words(self, where: slice, dtype: torch.dtype = torch.int32) -> Tensor:
        """The same in integers of another width; overwritten by the next call."""
        if dtype not in self._words:
            longest = self.chunks[0].stop - self.chunks[0].start
            self._words[dtype] = torch.empty(longest, dtype=dtype, device=self.held.device)
        return self._words[dtype][: where.stop - where.start].copy_(self.at(where))

    def put(self, where: slice, stay: Tensor) -> None:
        """Set a stretch from bools."""
        a, b = where.start - self.span.start, where.stop - self.span.start
        if self.bits:
            self.held[a // 8 : -(-b // 8)] = pack(stay)
        else:
            self.held[a:b] = -stay.to(torch.int8)

    def apply(self, *flats: Tensor) -> None:
        """Zero what goes in flat buffers."""
        for flat in flats:
            if lib := native.on(flat):
                lib.mask(flat[self.span], self.span.start, self.keep)
        flats = tuple(flat for flat in flats if not native.on(flat))
        for where in self.chunks:
            for flat in flats:
                dtype = WORDS[flat.dtype]
                part = flat[where]  # state may end where the masked weights begin
                part.view(dtype).bitwise_and_(self.words(where, dtype)[: len(part)])

    def packed(self) -> Tensor:
        """One bit an element, a copy."""
        return self.held.clone() if self.bits else pack(self.held)

    def load(self, packed: Tensor) -> None:
        self.held.copy_(packed if self.bits else unpack(packed)[: len(self.held)])

    @property
    def nbytes(self) -> int:
        return self.held.nbytes
