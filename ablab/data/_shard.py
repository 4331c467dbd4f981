# SPDX-License-Identifier: MIT
"""Prepared token sets: hashed uint16 shards on disk, written once, read by position through memory maps."""

import hashlib
import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablab.data import Batch, DataError, Evaluation, Windows
from ablab.data._prepared import Prepared, store, write_json
from ablab.data._token import CODECS, Codec, codec

SPLITS = ("train", "val")
PIECE_CHARS = 1 << 20  # a tokenizer call; bounds the memory of its Python list
CHUNK = 4096  # sample numbers permuted by one vectorised call


class Tokens(Prepared):
    """Base of the text sets.  A member says what its content depends on and writes documents.

    Beside one file per shard lies bytes.bin, the text bytes that each token id stands for, so that reading needs no
    tokenizer package.
    """

    shard_tokens = 1 << 26  # 128 MiB; what a crash while preparing can cost

    @abstractmethod
    def write(self, out: "Writer") -> None:
        """Put all documents into `out`, from document number `out.documents` on.  Raises DataError."""

    def named(self) -> tuple[str, dict[str, Any]]:
        content = self.recipe() | {"format": 1, "val_fraction": self.section.val_fraction}
        return f"{self.slug}-{self.section.tokenizer.value}", content

    def codec(self) -> Codec:
        return codec(self.section.tokenizer)

    @property
    def classes(self) -> int:
        return CODECS[self.section.tokenizer].vocab

    def make(self, part: Path) -> dict[str, Any]:
        token = self.codec()
        out = Writer(part, token, self.shard_tokens)
        self.write(out)
        splits = out.close()
        if short := [s for s in SPLITS if splits[s]["bytes"] == 0]:
            what = f"{self.symbol}: the {short[0]} split is empty"
            raise DataError(f"{what}; give more text, or change CONFIG_DATA_VAL_FRACTION")
        return {
            "tokenizer": {"name": token.name, "sha256": token.sha256, "vocab": token.vocab, "eot": token.eot},
            "val_fraction": self.section.val_fraction,
            "documents": out.documents,
            "splits": splits,
            "bytes": store(part / "bytes.bin", token.lengths().astype("<u2")),
        }

    def samples(self, split: str, length: int) -> int:
        return _samples(self._split(split), length, self.folder)

    def batches(self, split: str, seed: int, position: int, size: int, length: int) -> Iterator[Batch]:
        stream = self._split(split)
        n = _samples(stream, length, self.folder)
        step = max(1, CHUNK // size) * size
        while True:
            starts = sample_starts(n, length, seed, position, step)
            for first in range(0, step, size):
                ids_BT = stream.windows(starts[first : first + size], length + 1)
                # two copies in one conversion each: views of one array would not be contiguous
                yield Batch(*(torch.from_numpy(part.astype(np.int64)) for part in (ids_BT[:, :-1], ids_BT[:, 1:])))
            position += step

    def noise(self, size: int, length: int, classes: int, generator: torch.Generator | None = None) -> Batch:
        ids_BT = torch.randint(classes, (size, length + 1), generator=generator)
        return Batch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous())

    def extent(self, length: int) -> int:
        return length

    def inspect(self, split: str, batch: Batch, size: int, length: int) -> None:
        x, y = batch.x, batch.y
        top, low = int(max(x.max(), y.max())), int(x.min())
        if not x.shape == y.shape == (size, length):
            raise DataError(f"{split}: batch of shape {list(x.shape)}")
        if not torch.equal(x[:, 1:], y[:, :-1]):
            raise DataError(f"{split}: y is not x shifted by one token")
        if low < 0 or top >= self.classes:
            raise DataError(f"{split}: token {top}, the tokenizer has {self.classes}")

    def evaluation(self, tokens: int, length: int, split: str = "val") -> Evaluation:
        stream = self._split(split)
        most = (stream.size - 1) // length
        n = min(most, tokens // length) if tokens else most
        if n < 1:
            what = f"{self.folder}: {stream.size} validation tokens and EVAL_TOKENS = {tokens} hold no sequence"
            raise DataError(f"{what} of {length}; lower MODEL_GPT_BLOCK or raise EVAL_TOKENS or DATA_VAL_FRACTION")
        ids_NT = stream.windows(np.arange(n) * (most // n * length), length + 1)
        table = np.fromfile(self.folder / "bytes.bin", "<u2")
        sha256 = hashlib.sha256(ids_NT.astype("<u2").tobytes()).hexdigest()
        return Windows(ids=ids_NT, sha256=sha256, tokens=n * length, bytes=int(table[ids_NT[:, 1:]].sum()))

    def text_bytes(self, split: str, start: int, stop: int) -> int:
        """Bytes of text that the tokens [start, stop) of a split stand for."""
        table = np.fromfile(self.folder / "bytes.bin", "<u2")
        parts = self._split(split).parts(start, stop)
        return sum(int(table[part].sum()) for part in parts)

    def _split(self, split: str) -> "Stream":
        shards = self.manifest()["splits"][split]["shards"]
        return Stream([np.memmap(self.folder / s["file"], "<u2", mode="r") for s in shards])


class Stream:
    """The tokens of a split: its shards as one sequence."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = [np.asarray(s) for s in shards]  # plain arrays: indexing a memmap object is slower
        self._ends = np.array(list(accumulate(len(s) for s in shards)))
        self.size = int(self._ends[-1])
        self._views: dict[int, np.ndarray] = {}

    def parts(self, start: int, stop: int) -> list[np.ndarray]:
        """Views that together are the tokens [start, stop)."""
        begins = self._ends - [len(s) for s in self._shards]
        inside = [s[max(0, start - b) : max(0, stop - b)] for s, b in zip(self._shards, begins, strict=True)]
        return [part for part in inside if len(part)]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The tokens [s, s + length) for each s, uint16 [len(starts), length]."""
        if len(self._shards) == 1:
            if length not in self._views:  # making one costs as much as reading a batch
                self._views[length] = np.lib.stride_tricks.sliding_window_view(self._shards[0], length)
            return self._views[length][starts]
        return np.stack([np.concatenate(self.parts(s, s + length)) for s in starts.tolist()])


class Writer:
    """Appends documents to the shards of a `.part` folder, after the last document that is on disk."""

    def __init__(self, folder: Path, token: Codec, shard_tokens: int) -> None:
        self.documents = 0
        """Documents added so far, those of an earlier `prepare` included."""
        empty = {"tokens": 0, "bytes": 0, "documents": 0, "highest": 0}
        self.splits = {s: empty | {"shards": []} for s in SPLITS}
        self._held = 0
        self._folder, self._token, self._shard_tokens = folder, token, shard_tokens
        self._buffers: dict[str, list[np.ndarray]] = {s: [] for s in SPLITS}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "progress.json").exists():
            saved = json.loads((folder / "progress.json").read_text())
            self.documents, self.splits = saved["documents"], saved["splits"]

    def text(self, split: str, text: str) -> None:
        """Add one document."""
        for at in range(0, len(text), PIECE_CHARS):
            self._put(split, self._token.encode(text[at : at + PIECE_CHARS]))
        self._put(split, np.array([self._token.eot], np.uint16))
        self.splits[split]["bytes"] += len(text.encode())
        self._end(split)

    def tokens(self, split: str, ids: np.ndarray) -> None:
        """Add one document of tokens that each stand for one byte."""
        self._put(split, ids)
        self.splits[split]["bytes"] += len(ids)
        self._end(split)

    def corpus(self, sizes: Sequence[int], load: Callable[[int], str], val_fraction: float) -> None:
        """Add documents of `sizes` bytes; the last `val_fraction` of all bytes is the validation split.

        The cut lies between two documents if that meets the share within a half of it, else at a line end
        inside one.  It counts bytes, not tokens, so every tokenizer gets the same split.
        """
        begins = [0, *accumulate(sizes)]
        total = begins[-1]
        want = total * (1 - val_fraction)
        cut = min(range(1, len(sizes)), key=lambda i: abs(begins[i] - want), default=0)
        inside = not cut or abs(begins[cut] - want) > val_fraction * total / 2
        if inside:
            cut = min(bisect_right(begins, want), len(sizes)) - 1
        for i, size in enumerate(sizes):
            text = load(i)
            if inside and i == cut:
                at = int(len(text) * (want - begins[i]) / size)
                at = text.find("\n", at, (at + len(text)) // 2) + 1 or at
                self.text("train", text[:at])
                self.text("val", text[at:])
            else:
                self.text("val" if i >= cut else "train", text)

    def close(self) -> dict[str, Any]:
        """Write what is left; returns the `splits` of the manifest."""
        self._flush()
        return self.splits

    def _put(self, split: str, ids: np.ndarray) -> None:
        if len(ids):
            entry = self.splits[split]
            entry["tokens"] += len(ids)
            entry["highest"] = max(entry["highest"], int(ids.max()))
            self._buffers[split].append(ids)
            self._held += len(ids)

    def _end(self, split: str) -> None:
        self.documents += 1
        self.splits[split]["documents"] += 1
        if self._held >= self._shard_tokens:
            self._flush()
            write_json(self._folder / "progress.json", {"documents": self.documents, "splits": self.splits})

    def _flush(self) -> None:
        self._held = 0
        for split, buffer in self._buffers.items():
            if buffer:
                shards = self.splits[split]["shards"]
                ids = np.concatenate(buffer).astype("<u2")
                shards.append(store(self._folder / f"{split}-{len(shards):05}.bin", ids))
                buffer.clear()


def sample_starts(n: int, length: int, seed: int, position: int, count: int) -> np.ndarray:
    """First tokens of the samples number `position` to `position + count` of an endless stream.

    An epoch is a permutation of n windows of `length` tokens, shifted by an offset below `length`; both are
    pure functions of (seed, epoch), so any position is reached at once.
    """
    epochs, places = np.divmod(np.arange(position, position + count), n)
    starts = np.empty(count, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        digest = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
        *keys, shift = np.frombuffer(digest + hashlib.sha256(digest).digest(), "<u8")[:5]
        mine = epochs == epoch
        starts[mine] = permute(places[mine], n, keys) * length + int(shift % np.uint64(length))
    return starts


def permute(places: np.ndarray, n: int, keys: Sequence[np.uint64]) -> np.ndarray:
    """A keyed permutation of range(n), applied to `places`: a Feistel network over the next power of four,
    walked along its cycle until it falls below n (Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).
    """
    half = np.uint64((max(n - 1, 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # golden ratio; the high half is well mixed
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # as in splitmix64
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        return left << half | right

    x = network(places.astype(np.uint64))
    while (out := x >= n).any():
        x[out] = network(x[out])
    return x.astype(np.int64)


def _samples(stream: Stream, length: int, folder: Path) -> int:
    """Samples in an epoch: windows of `length` inputs and one more target, less one for the offset."""
    if stream.size < 2 * length:
        what = f"{folder}: {stream.size} tokens hold no sequence of {length}"
        raise DataError(f"{what}; lower MODEL_GPT_BLOCK, give more text, or change DATA_VAL_FRACTION")
    return (stream.size - length) // length
