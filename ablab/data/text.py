# SPDX-License-Identifier: MIT
"""Any UTF-8 text: one file, or all files of a folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.data import DataError
from ablab.data._shard import Tokens, Writer
from ablab.kconf import ROOT


class Text(Tokens, symbol="DATA_TEXT"):
    """One document per file; files come in sorted order, hidden and empty ones are left out."""

    offline = True
    licence = "of the owner of the text"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        path: Path
        """File or folder; a relative path starts at the project."""

    def recipe(self) -> dict[str, Any]:
        return {"path": str(self.config.path)}

    def source(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        files = self._files()
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return {"files": len(files), "sha256": digest.hexdigest()}

    def write(self, out: Writer) -> None:
        files = self._files()

        def load(i: int) -> str:
            try:
                return files[i].read_bytes().decode()
            except UnicodeDecodeError as error:
                what = f"{files[i]}: byte {error.start} is not UTF-8"
                raise DataError(f"{what}; convert the file, or move it out of CONFIG_DATA_TEXT_PATH") from error

        out.corpus([path.stat().st_size for path in files], load, self.section.val_fraction)

    def _files(self) -> list[Path]:
        root = ROOT / self.config.path
        if self.config.path == Path():
            raise DataError("CONFIG_DATA_TEXT_PATH is empty; set it to a file or folder of UTF-8 text")
        if not root.exists():
            raise DataError(f"{root}: no such file or folder; set CONFIG_DATA_TEXT_PATH to UTF-8 text")
        found = [root] if root.is_file() else sorted(root.rglob("*"))
        names = {path: path.relative_to(root).parts for path in found if path.is_file() and path.stat().st_size}
        files = [path for path, parts in names.items() if not any(part.startswith(".") for part in parts)]
        if not files:
            raise DataError(f"{root}: no text in it; set CONFIG_DATA_TEXT_PATH to UTF-8 text")
        return files
