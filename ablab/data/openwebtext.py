# SPDX-License-Identifier: MIT
"""OpenWebText: pages linked from Reddit (Gokaslan and Cohen 2019, https://skylion007.github.io/OpenWebTextCorpus)."""

from ablab.data._hub import Hub


class Openwebtext(Hub, symbol="DATA_OPENWEBTEXT"):
    """One document per page."""

    repo = "Skylion007/openwebtext"
    licence = "CC0 1.0 (packaging); the texts are their authors'"
