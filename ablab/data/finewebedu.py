# SPDX-License-Identifier: MIT
"""FineWeb-Edu: web pages chosen for educational value (Penedo et al. 2024, https://arxiv.org/abs/2406.17557)."""

from dataclasses import dataclass

from ablab.data._hub import Hub


class Finewebedu(Hub, symbol="DATA_FINEWEBEDU"):
    """One document per page."""

    repo = "HuggingFaceFW/fineweb-edu"
    licence = "ODC-By 1.0"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        subset: str
        """Configuration of the repository, such as sample-10BT."""
        tokens: int
        """Training tokens to prepare."""

    @property
    def subset(self) -> str:
        return self.config.subset
