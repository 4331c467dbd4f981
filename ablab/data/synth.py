# SPDX-License-Identifier: MIT
"""Synthetic tokens: a Markov source of order two whose entropy is known, for tests and measurements."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablab.data._shard import Tokens, Writer

SYMBOLS = 32
FIRST = 64  # the symbols are the ASCII characters from "@" on
ODDS = (0, 0, 0, 0, 1, 1, 2, 3)  # successors with probability 1/2, 1/4, 1/8, 1/8
ENTROPY = 1.75 * math.log(2)  # nats per token once the two tokens before are known
SEED = 20240229


class Synth(Tokens, symbol="DATA_SYNTH"):
    """Each pair of symbols has four possible successors.

    No model gets below ENTROPY; one that sees a single token back stays far above it, so reaching it shows
    that attention works.
    """

    offline = True
    licence = "none: generated"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        tokens: int
        """Size of both splits together."""

    def recipe(self) -> dict[str, Any]:
        return {"tokens": self.config.tokens, "symbols": SYMBOLS, "seed": SEED}

    def source(self) -> dict[str, Any]:
        return {"generator": "Markov chain of order two", "entropy_nats": ENTROPY}

    def write(self, out: Writer) -> None:
        val = round(self.config.tokens * self.section.val_fraction)
        out.tokens("train", generate(self.config.tokens - val, SEED + 1))
        out.tokens("val", generate(val, SEED + 2))


def generate(tokens: int, seed: int) -> np.ndarray:
    """Tokens of the source as uint16.

    Chains run side by side and are joined, which costs an unpredictable start every 4096 tokens.  Raw
    generator output is used because numpy keeps only that stable between versions.
    """
    length = min(tokens, 4096)
    chains = -(-tokens // length)
    shuffled = np.random.PCG64(SEED).random_raw(SYMBOLS**3).reshape(-1, SYMBOLS).argsort()
    successors = shuffled[:, ODDS].astype(np.uint16).ravel()
    bits = np.random.PCG64(seed)
    x = np.empty((length, chains), np.uint16)
    x[:2] = (bits.random_raw(2 * chains) % SYMBOLS).reshape(2, chains)
    for t in range(2, length):
        draw = bits.random_raw(chains) >> np.uint64(61)
        pair = x[t - 2].astype(np.int64) * SYMBOLS + x[t - 1]
        x[t] = successors[pair * len(ODDS) + draw.astype(np.int64)]
    return x.T.reshape(-1)[:tokens] + np.uint16(FIRST)
