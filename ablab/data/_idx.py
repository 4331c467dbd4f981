# SPDX-License-Identifier: MIT
"""IDX, the format of MNIST: arrays of bytes behind a header of big-endian numbers, gzipped or not."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from ablab.data import DataError

UBYTE = 8  # the only type that image sets use


def read(path: Path) -> np.ndarray:
    """The array in a file, uint8.  Raises DataError."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        zero, kind, axes = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{axes}I", raw, 4)
    except (struct.error, OSError, EOFError) as error:
        raise DataError(f"{path}: not an IDX file: {error}; fetch it again") from error
    body = raw[4 + 4 * axes :]
    if zero or kind != UBYTE or len(body) != math.prod(shape):
        what = f"type {kind}, shape {list(shape)}, {len(body)} bytes"
        raise DataError(f"{path}: not an IDX file of bytes: {what}; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def write(path: Path, values: np.ndarray) -> None:
    """Write an array of bytes; gzipped, without a time, if the name ends in .gz."""
    head = struct.pack(f">HBB{values.ndim}I", 0, UBYTE, values.ndim, *values.shape)
    raw = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def pair(folder: Path, stem: str) -> tuple[Path, Path]:
    """Files of images and labels whose names begin with `stem`.  Raises FileNotFoundError with what is missing."""
    found = []
    for name in (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"):
        paths = [p for p in (folder / name, folder / f"{name}.gz") if p.exists()]
        if not paths:
            raise FileNotFoundError(f"{folder / name}: no such file, gzipped neither")
        found.append(paths[0])
    return found[0], found[1]
