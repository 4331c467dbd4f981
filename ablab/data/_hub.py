# SPDX-License-Identifier: MIT
"""Text sets of the Hugging Face hub, streamed once into shards, or parquet files on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ablab import plugin
from ablab.data import DataError
from ablab.data._shard import SPLITS, Tokens, Writer


class Hub(Tokens):
    """Base of the sets that are fetched: streams documents until training, then validation is full.

    A document is the `text` of a row.  If DATA_DIR/<slug> holds parquet files they are read, not the hub.
    """

    resumable = True
    repo: str
    subset: str | None = None
    """Configuration of the repository, None for its only one."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """DATA_<NAME>_*."""

        tokens: int
        """Training tokens to prepare; the validation split comes on top, from the documents that follow."""

    def recipe(self) -> dict[str, Any]:
        return {"repo": self.repo, "subset": self.subset, "tokens": self.config.tokens}

    def source(self) -> dict[str, Any]:
        return {"repo": self.repo, "subset": self.subset}

    def write(self, out: Writer) -> None:
        share = self.section.val_fraction
        goals = {"train": self.config.tokens, "val": round(self.config.tokens * share / (1 - share))}
        for text in self._texts(out.documents):
            split = next((s for s in SPLITS if out.splits[s]["tokens"] < goals[s]), None)
            if split is None:
                return
            out.text(split, text)
        if out.splits["val"]["tokens"] < goals["val"]:
            have = sum(s["tokens"] for s in out.splits.values())
            fits = int(have * (1 - share))
            what = f"{self.symbol}: the source ends after {have} tokens, {self.config.tokens} and validation are wanted"
            raise DataError(f"{what}; set CONFIG_{self.symbol}_TOKENS={fits} or less")

    def _texts(self, skip: int) -> Iterator[str]:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise DataError(str(plugin.missing(self.symbol, "datasets"))) from error
        local = self.home / self.slug
        files = sorted(str(path) for path in local.rglob("*.parquet"))
        place = {"path": "parquet", "data_files": files} if files else {"path": self.repo, "name": self.subset}
        try:
            for row in datasets.load_dataset(**place, split="train", streaming=True).skip(skip):
                yield row["text"]
        # the hub client has its own error for each way to fail; what the user can do is always the same
        except Exception as error:
            cause = f"{self.symbol}: cannot read {local if files else self.repo}: {type(error).__name__}: {error}"
            fix = f"run 'make data' with a network, or put parquet files with a `text` column in {local}"
            raise DataError(f"{cause}; {fix}") from error
