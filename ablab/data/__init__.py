# SPDX-License-Identifier: MIT
"""Data sets: prepared once into hashed shards, read by position so that resume seeks and never replays."""

from abc import ABC, abstractmethod
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
    """One micro batch on the CPU.

    Text: x, y int64 [B, T], y is x shifted by one token.  Images: x float32 [B, C, H, W], y int64 [B].
    """

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(ABC):
    """A fixed set of samples, equal for all trials that ask with the same numbers."""

    sha256: str
    tokens: int
    """Targets: of N sequences N * T, of N images N."""
    bytes: int | None
    """Bytes of text that the targets stand for; bits per byte = loss * tokens / (ln 2 * bytes).  None for images."""

    @abstractmethod
    def batches(self, size: int) -> Iterator[Batch]:
        """The set once, in order; the last batch may be smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows(Evaluation):
    """Sequences of a text."""

    ids: np.ndarray
    """uint16 [N, T + 1]: windows that share no target."""

    def batches(self, size: int) -> Iterator[Batch]:
        for first in range(0, len(self.ids), size):
            ids = torch.from_numpy(self.ids[first : first + size].astype(np.int64))
            yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class Data(Plugin, family="DATA"):
    """Base of the data sets."""

    offline: ClassVar[bool] = False
    """True if `prepare` needs no network: then a run prepares the set by itself."""
    unit: ClassVar[str] = "tokens"
    """What a target is called, in the manifest too."""
    classes: int
    """Classes of a target; for text the tokens that exist."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """DATA_* symbols that every data set shares."""

        dir: Path
        """Folder of the prepared sets."""
        tokenizer: Tokenizer | None
        """None for images."""
        val_fraction: float | None
        split_seed: int | None
        """Which images are held out for validation; None for text."""
        augment_crop: int | None
        """Pixels of border around an image from which a window of its size is cut."""
        augment_flip: bool | None
        """Every second image is mirrored."""
        augment_resize: int | None
        """Pixels of a side, 0 as they are; None where a model takes one size only."""

        def __post_init__(self) -> None:
            if self.augment_resize and self.augment_resize < 32:
                raise ValueError(
                    f"CONFIG_DATA_AUGMENT_RESIZE = {self.augment_resize} : images have 32 pixels a side and are only"
                    " enlarged; set 0 or more than 32"
                )

    @abstractmethod
    def prepare(self) -> Path:
        """Make the prepared set or verify it; called by `make data` and, if `offline`, by a run.

        Idempotent.  Returns the folder, which holds manifest.json and the shards.
        Raises DataError, which says what to do.
        """

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """The manifest of the prepared set: name, sha256, splits with sizes, shards and hashes, licence, source.
        Raises DataError when the set is missing or was changed."""

    @abstractmethod
    def batches(self, split: str, seed: int, position: int, size: int, length: int) -> Iterator[Batch]:
        """Endless batches of `size` samples, of `length` targets each, from sample number `position` on.

        The order is a stateless permutation of (seed, epoch), so batch k is the same whatever was read
        before.
        """

    @abstractmethod
    def samples(self, split: str, length: int) -> int:
        """Samples of `length` targets in one epoch of a split."""

    @abstractmethod
    def evaluation(self, tokens: int, length: int, split: str = "val") -> Evaluation:
        """Non-overlapping samples of `length` targets spread evenly over a split: as many as fit into `tokens`
        targets, all of them for 0.  Raises DataError when not one fits."""

    @abstractmethod
    def noise(self, size: int, length: int, classes: int, generator: torch.Generator | None = None) -> Batch:
        """A random batch of the shape and type of real ones, without reading any; it works on fake tensors."""

    @abstractmethod
    def extent(self, length: int) -> int:
        """Size of the axis that a forward pass works along: tokens of a sequence, pixels of an image's side."""

    @abstractmethod
    def inspect(self, split: str, batch: Batch, size: int, length: int) -> None:
        """Raises DataError if a batch of so many samples is not what `Batch` promises."""

    def codec(self) -> Any:
        """The tokenizer, with `encode(text)`, `decode(ids)`, `vocab` and `eot`."""
        raise DataError(f"{self.symbol}: images have no tokenizer; choose a trial on text")


class DataError(ValueError):
    """Data is missing, unreadable or not what its manifest says."""
