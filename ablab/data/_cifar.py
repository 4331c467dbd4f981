# SPDX-License-Identifier: MIT
"""The binary version of CIFAR: records of labels and 3 x 32 x 32 bytes, in files or in the archive as published."""

import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ablab.data import DataError
from ablab.data._image import SIDE, Files, Split


class Cifar(Files):
    """Base of both.  Pickles, the other form in which they are published, run code when they are read: not here."""

    licence = "none stated; cite Krizhevsky 2009"
    channels = 3
    url = "https://www.cs.toronto.edu/~kriz/"
    folder_name: str
    labels: int
    """Labels before the pixels of a record, the last of which counts."""
    names: Mapping[str, Sequence[str]]
    """Files of each split."""

    def found(self) -> list[Path]:
        (archive,) = self.md5
        names = [name for split in self.names.values() for name in split]
        for folder in (self.root, self.root / self.folder_name):
            if all((folder / name).exists() for name in names):
                return [folder / name for name in names]
        if (self.root / archive).exists():
            return [self.root / archive]
        pickled = (
            any(self.root.glob("cifar-*-py*")) or (self.root / "meta").exists() or (self.root / "batches.meta").exists()
        )
        hint = "; the pickles there are not read, since reading them runs code" if pickled else ""
        raise FileNotFoundError(f"{self.root}: neither {archive} nor {' '.join(names)}{hint}")

    def read(self) -> Mapping[str, Split]:
        found = {path.name: path for path in self.found()}
        (archive,) = self.md5
        if archive not in found:
            return {s: self._split([found[n].read_bytes() for n in names]) for s, names in self.names.items()}
        try:
            with tarfile.open(found[archive]) as tar:
                read = lambda name: tar.extractfile(f"{self.folder_name}/{name}").read()
                return {s: self._split([read(n) for n in names]) for s, names in self.names.items()}
        except (tarfile.TarError, KeyError, EOFError, OSError) as error:
            raise DataError(f"{found[archive]}: {error}; remove it and run 'make data'") from error

    def _split(self, pieces: Sequence[bytes]) -> Split:
        size = self.labels + 3 * SIDE * SIDE
        if any(len(piece) % size for piece in pieces):
            raise DataError(f"{self.root}: files of {[len(p) for p in pieces]} bytes are no records of {size}")
        table = np.frombuffer(b"".join(pieces), np.uint8).reshape(-1, size)
        return table[:, self.labels :].reshape(-1, 3, SIDE, SIDE), table[:, self.labels - 1]
