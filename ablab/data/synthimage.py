# SPDX-License-Identifier: MIT
"""Synthetic images: ten patterns under noise, for tests and measurements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablab.data._image import SIDE, Images, Split

SEED = 20240229
TEST = 6  # one of so many images is a test image
COARSE, SHIFT = 8, 4  # squares of a pattern's side; pixels that it moves


class Synthimage(Images, symbol="DATA_SYNTHIMAGE"):
    """Each class is a pattern of grey squares, moved by a few pixels, at 40 % under uniform noise."""

    licence = "none: generated"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        samples: int
        """Images of all splits."""

    def recipe(self) -> dict[str, Any]:
        return {"samples": self.config.samples, "seed": SEED}

    def source(self) -> dict[str, Any]:
        return {"generator": "moved patterns under noise"}

    def read(self) -> Mapping[str, Split]:
        x, y = generate(self.config.samples, self.classes, SEED)
        test = np.arange(len(y)) % TEST == TEST - 1
        return {"train": (x[~test], y[~test]), "test": (x[test], y[test])}


def generate(samples: int, classes: int, seed: int) -> Split:
    """Images and their classes.  Raw generator output is used because numpy keeps only that stable."""
    bits = np.random.PCG64(seed)
    squares = bits.random_raw(classes * COARSE * COARSE // 8).view(np.uint8).reshape(classes, COARSE, COARSE)
    patterns = squares.repeat(SIDE // COARSE, 1).repeat(SIDE // COARSE, 2)
    draw = bits.random_raw(samples)
    y = (draw % np.uint64(classes)).astype(np.int64)
    down, right = ((draw >> np.uint64(n)) % np.uint64(SHIFT) for n in (20, 40))
    rows, cols = ((np.arange(SIDE) + d.astype(np.int64)[:, None]) % SIDE for d in (down, right))
    clean = patterns[y[:, None, None], rows[:, :, None], cols[:, None, :]].astype(np.uint16)
    noise = bits.random_raw(samples * SIDE * SIDE // 8).view(np.uint8).reshape(clean.shape)
    return ((2 * clean + 3 * noise.astype(np.uint16)) // 5).astype(np.uint8)[:, None], y.astype(np.uint8)
