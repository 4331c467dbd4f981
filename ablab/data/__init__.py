# SPDX-License-Identifier: MIT
"""Data sets: prepared once into hashed shards, read by position so that resume seeks and never replays."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ablab.plugin import Plugin


class Tokenizer(Enum):
    """What a token is."""

    BYTE = "byte"
    GPT2 = "gpt2"


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro batch: x, y int64 [B, T] on the CPU; y is x shifted by one token."""

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A fixed set of validation sequences, equal for all trials that ask with the same numbers."""

    ids: np.ndarray
    """uint16 [N, T + 1]: windows that share no target."""
    sha256: str
    tokens: int
    """Targets: N * T."""
    bytes: int
    """Bytes of text that the targets stand for; bits per byte = loss * tokens / (ln 2 * bytes)."""

    def batches(self, size: int) -> Iterator[Batch]:
        """The set once, in order; the last batch may be smaller."""
        for first in range(0, len(self.ids), size):
            ids = torch.from_numpy(self.ids[first : first + size].astype(np.int64))
            yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class Data(Plugin, family="DATA"):
    """Base of the data sets."""

    offline: ClassVar[bool] = False
    """True if `prepare` needs no network: then a run prepares the set by itself."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """DATA_* symbols that every data set shares."""

        dir: Path
        """Folder of the prepared sets."""
        tokenizer: Tokenizer
        val_fraction: float

    @abstractmethod
    def prepare(self) -> Path:
        """Make the prepared set or verify it; called by `make data` and, if `offline`, by a run.

        Idempotent and resumable.  Returns the folder, which holds manifest.json and the shards.
        Raises DataError, which says what to do.
        """

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """The manifest of the prepared set: name, sha256, tokenizer, splits with tokens, bytes, shards and
        hashes, licence, source.  Raises DataError when the set is missing or was changed."""

    @abstractmethod
    def batches(self, split: str, seed: int, position: int, size: int, length: int) -> Iterator[Batch]:
        """Endless batches of `size` sequences of `length` tokens from sample number `position` on.

        The order is a stateless permutation of (seed, epoch), so batch k is the same whatever was read
        before.
        """

    @abstractmethod
    def samples(self, split: str, length: int) -> int:
        """Sequences of `length` tokens in one epoch of a split."""

    @abstractmethod
    def evaluation(self, tokens: int, length: int) -> Evaluation:
        """Non-overlapping windows of `length` tokens spread evenly over the validation split: as many as fit
        into `tokens` targets, all of them for 0.  Raises DataError when not one fits."""

    @abstractmethod
    def codec(self) -> Any:
        """The tokenizer, with `encode(text)`, `decode(ids)`, `vocab` and `eot`."""


class DataError(ValueError):
    """Data is missing, unreadable or not what its manifest says."""
