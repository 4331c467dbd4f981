# SPDX-License-Identifier: MIT
"""Sets on disk: prepared once into a folder of hashed files with a manifest, verified ever after."""

import fcntl
import hashlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ablab import rundir
from ablab.data import Data, DataError
from ablab.kconf import ROOT
from ablab.plugin import Clause

HASH_LIMIT = 1 << 26  # bytes of a set that every trial hashes in full at its start


class Prepared(Data):
    """Base of all sets.  One lies in DATA_DIR/<name>-<hash of what decides it>, with manifest.json."""

    licence: str
    resumable = False
    """True if a stopped `prepare` goes on."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What of the member decides the content."""

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """Where it comes from, with the hash of local files; must not have changed since `prepare`."""

    @abstractmethod
    def named(self) -> tuple[str, dict[str, Any]]:
        """Begin of the folder's name, and everything that decides the content."""

    @abstractmethod
    def make(self, part: Path) -> dict[str, Any]:
        """Write the files of the set into a folder; returns what the manifest says of them, among that `splits`, each
        with its `shards`.  Raises DataError."""

    @property
    def folder(self) -> Path:
        """Folder of the prepared set."""
        stem, content = self.named()
        return self.home / f"{stem}-{_digest(content)[:8]}"

    @property
    def home(self) -> Path:
        """Folder of all prepared sets; a relative DATA_DIR starts at the project."""
        return ROOT / self.section.dir

    def prepare(self) -> Path:
        folder = self.folder
        try:
            with _locked(folder.with_name(f".{folder.name}.lock")):
                if folder.exists():
                    self._verify(folder)
                else:
                    self._make(folder, folder.with_name(folder.name + ".part"))
        except OSError as error:
            what = f"{folder}: cannot prepare {self.symbol}: {error}"
            raise DataError(f"{what}; free the space or the path, or set CONFIG_DATA_DIR") from error
        return folder

    def _make(self, folder: Path, part: Path) -> None:
        source = self.source()  # first: without it nothing is written
        if not self.resumable:
            shutil.rmtree(part, ignore_errors=True)
        content = {"schema": "ablab.data/1", "name": self.slug, "source": source, "licence": self.licence}
        content |= self.make(part)
        write_json(part / "manifest.json", content | {"sha256": _digest(content)})
        part.rename(folder)
        (folder / "progress.json").unlink(missing_ok=True)
        rundir.sync(folder.parent)

    def _verify(self, folder: Path) -> None:
        manifest = self.manifest()
        for entry in files(manifest):
            if sha256(folder / entry["file"]) != entry["sha256"]:
                raise _changed(folder / entry["file"], "content differs from its hash in manifest.json")
        try:
            source = self.source()
        except DataError:  # a verified set needs no source, so it may be copied to where there is none
            return
        if source != manifest["source"]:
            what = f"{folder}: made from other content than {self.symbol} finds now"
            raise DataError(f"{what}; delete the folder to prepare the new content")

    def manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            content = {k: v for k, v in manifest.items() if k != "sha256"}
            if manifest["sha256"] != _digest(content):
                raise _changed(path, "content differs from its own hash")
            for entry in files(manifest):
                if (size := (path.parent / entry["file"]).stat().st_size) != entry["size"]:
                    raise _changed(path.parent / entry["file"], f"{size} bytes instead of {entry['size']}")
        except FileNotFoundError as error:
            what = "no prepared set" if not path.parent.exists() else "incomplete set"
            fix = "run 'make data'" if not path.parent.exists() else "delete the folder and run 'make data'"
            raise DataError(f"{error.filename}: {what} of {self.symbol}; {fix}") from error
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise _changed(path, "not the manifest of a prepared set") from error
        return manifest

    def contracts(self) -> tuple[Clause, ...]:
        def content(_: Any) -> tuple[Any, Any]:
            listed = files(self.manifest())
            if sum(e["size"] for e in listed) > HASH_LIMIT:  # sizes only: `prepare` hashed it all
                return len(listed), sum((self.folder / e["file"]).stat().st_size == e["size"] for e in listed)
            return [e["sha256"] for e in listed], [sha256(self.folder / e["file"]) for e in listed]

        def shared(_: Any) -> tuple[int, int]:
            hashes = [{s["sha256"] for s in split["shards"]} for split in self.manifest()["splits"].values()]
            return 0, sum(map(len, hashes)) - len(set().union(*hashes))

        return Clause("data/files", "build", content), Clause("data/disjoint", "build", shared)


def files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files of a set."""
    more = [part["labels"] for part in manifest["splits"].values() if "labels" in part]
    more += [manifest["bytes"]] if "bytes" in manifest else []
    return [*more, *(s for part in manifest["splits"].values() for s in part["shards"])]


def store(path: Path, values: np.ndarray) -> dict[str, Any]:
    """Write an array; returns its entry."""
    raw = values.tobytes()
    rundir.write_bytes(path, raw)
    return {"file": path.name, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    rundir.write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _changed(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; delete the folder {path.parent.name} and run 'make data'")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; a second process waits here and then finds the set prepared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
