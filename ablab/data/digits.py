# SPDX-License-Identifier: MIT
"""Digits: 1797 handwritten digits of 8 x 8 pixels, in the package scikit-learn (Alpaydin and Kaynak 1998)."""

import gzip
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ablab import plugin
from ablab.data import DataError
from ablab.data._image import SIDE, Images, Split
from ablab.data._prepared import sha256

EACH = 5  # one of so many images is a test image


class Digits(Images, symbol="DATA_DIGITS"):
    """Each pixel becomes 4 x 4."""

    licence = "CC BY 4.0 (UCI), in scikit-learn (BSD 3-Clause)"

    def source(self) -> dict[str, Any]:
        return {"package": "scikit-learn", "sha256": sha256(_file())}

    def read(self) -> Mapping[str, Split]:
        with gzip.open(_file()) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int64)
        pixels = (table[:, :-1].reshape(-1, 1, 8, 8) * 255 // 16).astype(np.uint8)  # 0..16 in the file
        x, y = pixels.repeat(SIDE // 8, 2).repeat(SIDE // 8, 3), table[:, -1].astype(np.uint8)
        test = np.arange(len(y)) % EACH == EACH - 1
        return {"train": (x[~test], y[~test]), "test": (x[test], y[test])}


def _file() -> Path:
    """The table, found without importing the package, which takes a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(str(plugin.missing("DATA_DIGITS", "scikit-learn")))
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():
        raise DataError(f"{path}: not in this version of scikit-learn; install the one of constraints.txt")
    return path
