# SPDX-License-Identifier: MIT
"""Figures: each file has `info`, a frozen dataclass of all numbers and texts, and `draw`, ink only."""
