# SPDX-License-Identifier: MIT
"""A cache that holds a fixed number of tokens: what attention no longer looks at gives way to what is new.

B batch, H heads, T queries (one), S slots, C channels of a field.

After Zhang et al. 2023 (https://arxiv.org/abs/2306.14048), who keep the tokens with most attention and the newest.
Deviations: one decision for all heads; a slot's attention counts against what uniform attention would give it, and
per step of its life, so that age is no merit; the first token stays, as an attention sink (Xiao et al. 2023,
https://arxiv.org/abs/2309.17453).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ablab.tensor.stage import Field, Past


@dataclass
class _Book:
    """The slots of one block: `used` of them hold tokens, the first ones."""

    at: int
    """Position of the newest token."""
    used: int
    pos_BS: Tensor
    """Position of the token in each slot."""
    score_BS: Tensor
    slot_B1: Tensor
    """Where the newest token lies."""
    free_B1: Tensor
    """The slot that the next token takes once all are used."""
    scored: bool = False


class Pruned(Past):
    """Keeps `keep` tokens per block and batch row; tokens come one at a time.

    Step t: the token takes a free slot and attends; then score_j += mean over heads of p_tj x (slots attended), and if
    more than `keep` are held the slot of lowest score_j / (t - pos_j + 1) is freed with all its fields, ties going to
    the oldest.  The first token and the `recent` newest stay.  Only queries up to t decide, only later ones feel it.
    Raises ValueError unless keep >= recent + 2.
    """

    single = True

    def __init__(self, keep: int, recent: int) -> None:
        if keep < recent + 2:
            raise ValueError(f"keep = {keep} : the first token, {recent} recent ones and one more must fit")
        super().__init__(keep + 1)
        self.keep, self.recent = keep, recent
        self.books: dict[int, _Book] = {}

    def hold(self, layer: int, field: Field, start: int) -> Tensor:
        new = field.new_BHTC if field.factors is None else field.factors.c_BHTL
        B, H, T, C = new.shape
        if T != 1:
            raise ValueError(f"{T} tokens at once: each must be attended before the next is kept; give one at a time")
        book, key = self._turned(layer, start, new), (layer, field.name)
        if key not in self.fields:
            self.fields[key] = new.new_zeros(B, H, self.capacity, C)
        held = self.fields[key]
        held.scatter_(2, book.slot_B1[:, :, None, None].expand(B, H, 1, C), new.to(held.dtype))
        return held[:, :, : book.used]

    def positions(self, layer: int, start: int, q_BHTK: Tensor) -> Tensor:
        book = self._turned(layer, start, q_BHTK)
        return book.pos_BS[:, None, None, : book.used]

    def attended(self, layer: int, p_BHTS: Tensor) -> None:
        book = self.books[layer]
        if book.scored:  # a Rows part attends again
            return
        book.scored = True
        book.score_BS[:, : book.used] += p_BHTS[:, :, 0].mean(1) * book.used
        if book.used > self.keep:
            book.free_B1 = self.lowest(book)

    def lowest(self, book: _Book) -> Tensor:
        """The slot of each batch row that is freed, B1."""
        age_BS = book.at - book.pos_BS
        rate_BS = book.score_BS / (age_BS + 1)
        stays = (book.pos_BS == 0) | (age_BS < self.recent)
        rate_BS = rate_BS.masked_fill(stays, torch.inf)
        tied = rate_BS == rate_BS.amin(1, keepdim=True)
        return age_BS.masked_fill(~tied, -1).argmax(1, keepdim=True)

    def _turned(self, layer: int, start: int, like: Tensor) -> _Book:
        """The book of a block, opened for the token at `start`."""
        B, device, book = like.shape[0], like.device, self.books.get(layer)
        if book and book.at == start:
            return book
        if book is None:
            pos_BS = torch.zeros(B, self.capacity, dtype=torch.long, device=device)
            score_BS = torch.zeros(B, self.capacity, dtype=torch.float64, device=device)
            free_B1 = pos_BS[:, :1]
        else:
            pos_BS, score_BS, free_B1 = book.pos_BS, book.score_BS, book.free_B1
        slot_B1 = torch.full_like(free_B1, start) if start <= self.keep else free_B1
        pos_BS.scatter_(1, slot_B1, start)
        score_BS.scatter_(1, slot_B1, 0.0)
        used = min(start, self.keep) + 1
        self.books[layer] = book = _Book(start, used, pos_BS, score_BS, slot_B1, free_B1)
        return book
