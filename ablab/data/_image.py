# SPDX-License-Identifier: MIT
"""What image sets share: a stratified split, normalisation, augmentation as a function of the sample's number.

N images, B batch, C channels, H W pixels; all sets are stored as 32 x 32.
"""

import hashlib
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.data import Batch, DataError, Evaluation, _idx
from ablab.data._prepared import Prepared, sha256, store
from ablab.data._shard import CHUNK, sample_starts
from ablab.kconf import ROOT

SIDE = 32
HELD_OUT, SHARE = 5000, 10  # validation images: so many, or one of so many where that is fewer
Split = tuple[np.ndarray, np.ndarray]
"""uint8 [N, C, H, W], and the class of each."""


class Images(Prepared):
    """Base of the image sets.  A member reads training and test images; part of training becomes validation."""

    offline = True
    unit = "samples"
    classes = 10
    channels = 1
    mean: tuple[float, ...] | None = None
    """Of each channel in 0..1, subtracted from it; None: measured on the training split."""
    std: tuple[float, ...] | None = None
    """What it is then divided by."""

    @abstractmethod
    def read(self) -> Mapping[str, Split]:
        """Images of `train` and `test`.  Raises DataError."""

    def recipe(self) -> dict[str, Any]:
        return {}

    def named(self) -> tuple[str, dict[str, Any]]:
        return self.slug, self.recipe() | {"format": 1, "split_seed": self.section.split_seed}

    def make(self, part: Path) -> dict[str, Any]:
        read = self.read()
        x, y = read["train"]
        held = held_out(y, self.section.split_seed)
        parts = {"train": (x[~held], y[~held]), "val": (x[held], y[held]), "test": read["test"]}
        part.mkdir(parents=True, exist_ok=True)
        splits = {}
        for name, (images, labels) in parts.items():
            if images.shape[1:] != (self.channels, SIDE, SIDE) or len(images) != len(labels) or not len(labels):
                raise DataError(f"{self.symbol}: {name}: {list(images.shape)} images, {len(labels)} labels")
            if labels.max() >= self.classes:
                raise DataError(f"{self.symbol}: {name}: class {labels.max()}, there are {self.classes}")
            entries = [store(part / f"{name}-{kind}.bin", a) for kind, a in (("images", images), ("labels", labels))]
            splits[name] = {"samples": len(labels), "shards": entries[:1], "labels": entries[1]}
        counts = np.zeros((self.channels, 256), np.int64)
        for first in range(0, len(parts["train"][0]), CHUNK):  # exact, and no large copy
            some = parts["train"][0][first : first + CHUNK]
            counts += [np.bincount(some[:, c].ravel(), minlength=256) for c in range(self.channels)]
        levels, share = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
        mean = self.mean or (share @ levels).tolist()
        std = self.std or np.sqrt(share @ levels**2 - (share @ levels) ** 2).tolist()
        return {"classes": self.classes, "mean": list(mean), "std": list(std), "splits": splits}

    def samples(self, split: str, length: int) -> int:
        return self.manifest()["splits"][split]["samples"]

    def batches(self, split: str, seed: int, position: int, size: int, length: int) -> Iterator[Batch]:
        """Augmented if `split` is `train`, each sample by draws that depend on seed and its number alone."""
        manifest = self.manifest()
        x_all, y_all = self.arrays(manifest, split)
        step = max(1, CHUNK // size) * size
        while True:
            order = sample_starts(len(y_all), 1, seed, position, step)
            for first in range(0, step, size):
                rows = order[first : first + size]
                drawn = draws(seed, np.arange(position + first, position + first + size)) if split == "train" else None
                yield self.batch(manifest, x_all[rows], y_all[rows], drawn)
            position += step

    def arrays(self, manifest: Mapping[str, Any], split: str) -> Split:
        """Images and labels of a split on disk."""
        entry = manifest["splits"][split]
        x, y = (np.memmap(self.folder / e["file"], np.uint8, "r") for e in (*entry["shards"], entry["labels"]))
        return np.asarray(x).reshape(-1, self.channels, SIDE, SIDE), np.asarray(y)

    def batch(self, manifest: Mapping[str, Any], x: np.ndarray, y: np.ndarray, drawn: np.ndarray | None) -> Batch:
        """Normalised images and their classes, augmented by `drawn`, uint64 [B]."""
        s, x_BCHW = self.section, torch.from_numpy(np.ascontiguousarray(x))
        if drawn is not None and (s.augment_crop or s.augment_flip):
            x_BCHW = moved(x_BCHW, drawn, s.augment_crop, s.augment_flip)
        mean, std = (torch.tensor(manifest[name]).view(-1, 1, 1) for name in ("mean", "std"))
        x_BCHW = x_BCHW.float().sub_(255 * mean).div_(255 * std)
        if s.augment_resize:
            x_BCHW = F.interpolate(x_BCHW, size=s.augment_resize, mode="bilinear", align_corners=False)
        return Batch(x_BCHW, torch.from_numpy(y.astype(np.int64)))

    def noise(self, size: int, length: int, classes: int, generator: torch.Generator | None = None) -> Batch:
        side = self.extent(length)
        x_BCHW = torch.randn(size, self.channels, side, side, generator=generator)
        return Batch(x_BCHW, torch.randint(classes, (size,), generator=generator))

    def extent(self, length: int) -> int:
        return self.section.augment_resize or SIDE

    def inspect(self, split: str, batch: Batch, size: int, length: int) -> None:
        side = self.extent(length)
        if batch.x.shape != (size, self.channels, side, side) or batch.y.shape != (size,):
            raise DataError(f"{split}: batch of shape {list(batch.x.shape)} and {list(batch.y.shape)}")
        if not bool(batch.x.isfinite().all()):
            raise DataError(f"{split}: pixels that are not finite")
        if int(batch.y.min()) < 0 or int(batch.y.max()) >= self.classes:
            raise DataError(f"{split}: class {int(batch.y.max())}, there are {self.classes}")

    def evaluation(self, tokens: int, length: int, split: str = "val") -> "Pictures":
        manifest = self.manifest()
        entry = manifest["splits"][split]
        n = min(tokens or entry["samples"], entry["samples"])
        facts = [entry["shards"][0]["sha256"], entry["labels"]["sha256"], manifest["mean"], manifest["std"]]
        digest = hashlib.sha256(f"{facts} {n} {self.section.augment_resize}".encode()).hexdigest()
        return Pictures(sha256=digest, tokens=n, bytes=None, data=self, manifest=manifest, split=split)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures(Evaluation):
    """Images of a split, spread evenly, as they are."""

    data: Images
    manifest: dict[str, Any]
    split: str

    def batches(self, size: int) -> Iterator[Batch]:
        x_all, y_all = self.data.arrays(self.manifest, self.split)
        rows = np.arange(self.tokens) * len(y_all) // self.tokens
        for first in range(0, self.tokens, size):
            mine = rows[first : first + size]
            yield self.data.batch(self.manifest, x_all[mine], y_all[mine], None)


class Files(Images):
    """Base of the sets in files that others publish: of a folder, fetched into it by `make data` if they are not
    there."""

    url = ""
    """What the names of files are appended to; empty: not fetched."""
    md5: Mapping[str, str] = {}
    """Files to fetch, with the hash that their publisher gives."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """DATA_<NAME>_*."""

        path: Path
        """Folder of the files; a relative path starts at the project, empty is a folder in DATA_DIR."""

    @property
    def root(self) -> Path:
        """Folder of the files."""
        return self.home / self.slug if self.config.path == Path() else ROOT / self.config.path

    @property
    def offline(self) -> bool:
        """Nothing must be fetched."""
        try:
            return bool(self.found())
        except FileNotFoundError:
            return not self.url

    @abstractmethod
    def found(self) -> list[Path]:
        """The files.  Raises FileNotFoundError with what is missing."""

    def source(self) -> dict[str, Any]:
        try:
            found = self.found()
        except FileNotFoundError as error:
            raise DataError(f"{error}; {self.remedy()}") from error
        return {"files": {path.name: sha256(path) for path in found}}

    def remedy(self) -> str:
        """What to do where files are missing."""
        names = " ".join(self.md5)
        return f"run 'make data' with a network, or put {names} from {self.url} there, or set CONFIG_{self.symbol}_PATH"

    def prepare(self) -> Path:
        if not self.offline and not self.folder.exists():
            self.fetch()
        return super().prepare()

    def fetch(self) -> None:
        """Download what is missing.  Raises DataError."""
        import urllib.error
        import urllib.request

        for name, wanted in self.md5.items():
            if (self.root / name).exists():
                continue
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=self.root, prefix=f".{name}.") as file:
                    with urllib.request.urlopen(self.url + name, timeout=60) as reply:
                        while piece := reply.read(1 << 20):
                            file.write(piece)
                    file.flush()
                    with open(file.name, "rb") as again:
                        got = hashlib.file_digest(again, "md5").hexdigest()
                    if got != wanted:
                        raise DataError(f"{self.url}{name}: MD5 {got} instead of {wanted}; {self.remedy()}")
                    Path(self.root / name).hardlink_to(file.name)
            except OSError as error:
                raise DataError(f"{self.url}{name}: {error}; {self.remedy()}") from error


class IdxFiles(Files):
    """Base of the sets in four IDX files of 28 x 28 grey images, to which a border of two pixels is added."""

    def found(self) -> list[Path]:
        return [path for stem in ("train", "t10k") for path in _idx.pair(self.root, stem)]

    def read(self) -> Mapping[str, Split]:
        found = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            images, labels = (_idx.read(path) for path in _idx.pair(self.root, stem))
            if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
                raise DataError(f"{self.root}: {stem}: {list(images.shape)} images, {list(labels.shape)} labels")
            edges = [(n // 2, n - n // 2) for n in (max(0, SIDE - side) for side in images.shape[1:])]
            found[split] = np.pad(images, ((0, 0), *edges))[:, None], labels
        return found


def held_out(y: np.ndarray, seed: int) -> np.ndarray:
    """Which of the training images are validation, bool [N]: of each class its share, chosen by `seed` alone."""
    wanted = min(HELD_OUT, len(y) // SHARE)
    rank = np.random.PCG64(seed).random_raw(len(y))  # raw: numpy keeps only that stable between versions
    kinds, counts = np.unique(y, return_counts=True)
    quota = counts * wanted // len(y)
    rest = counts * wanted % len(y)
    quota[np.argsort(-rest, kind="stable")[: wanted - quota.sum()]] += 1  # largest remainders
    held = np.zeros(len(y), bool)
    for kind, n in zip(kinds, quota, strict=True):
        mine = np.flatnonzero(y == kind)
        held[mine[np.argsort(rank[mine], kind="stable")[:n]]] = True
    return held


def draws(seed: int, numbers: np.ndarray) -> np.ndarray:
    """One uint64 for each sample number: splitmix64 of a stream that `seed` keys."""
    key = np.frombuffer(hashlib.sha256(f"augment {seed}".encode()).digest(), "<u8")[0]
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def moved(x_BCHW: Tensor, drawn: np.ndarray, pad: int, flip: bool | None) -> Tensor:
    """Each image cut out of itself with a black border of `pad` pixels, every second one mirrored if `flip`."""
    B, _, H, W = x_BCHW.shape
    wide, bits = np.uint64(2 * pad + 1), drawn >> np.uint64(1)
    down = torch.from_numpy((bits % wide).astype(np.int64))
    right = torch.from_numpy((bits // wide % wide).astype(np.int64))
    mirror = torch.from_numpy((drawn & np.uint64(1)).astype(bool)) & bool(flip)
    across = torch.arange(W)
    rows_BH = down[:, None] + torch.arange(H)
    cols_BW = right[:, None] + torch.where(mirror[:, None], across.flip(0), across)
    bordered = F.pad(x_BCHW, (pad, pad, pad, pad))
    index_B = torch.arange(B)[:, None, None]
    return bordered.permute(0, 2, 3, 1)[index_B, rows_BH[:, :, None], cols_BW[:, None, :]].permute(0, 3, 1, 2)
