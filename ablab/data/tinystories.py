# SPDX-License-Identifier: MIT
"""TinyStories: short stories in a child's vocabulary (Eldan and Li 2023, https://arxiv.org/abs/2305.07759)."""

from ablab.data._hub import Hub


class Tinystories(Hub, symbol="DATA_TINYSTORIES"):
    """One document per story."""

    repo = "roneneldan/TinyStories"
    licence = "CDLA-Sharing 1.0"
