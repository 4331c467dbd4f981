# SPDX-License-Identifier: MIT
"""Fetched sets, by the real streaming code on local parquet files."""

import datasets
import numpy as np
import pytest

from ablab.data import DataError, Tokenizer
from ablab.data.finewebedu import Finewebedu
from ablab.data.openwebtext import Openwebtext
from ablab.data.tinystories import Tinystories
from tests.section import text as text_section

DOCS = [f"Document {i} is about the number {i}.\n" * (1 + i % 7) for i in range(400)]


def section(folder, tokenizer=Tokenizer.BYTE):
    return text_section(folder, tokenizer, 0.1)


def parquet(folder, slug, column="text", docs=DOCS):
    (folder / slug).mkdir(parents=True)
    for part in range(2):
        half = docs[part * len(docs) // 2 : (part + 1) * len(docs) // 2]
        datasets.Dataset.from_dict({column: half}).to_parquet(str(folder / slug / f"{part}.parquet"))


def texts(data, split):
    shards = data.manifest()["splits"][split]["shards"]
    ids = np.concatenate([np.fromfile(data.folder / s["file"], "<u2") for s in shards])
    return bytes(ids.astype(np.uint8)).decode().split("\0")[:-1]


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_parquet_files_become_a_set_cut_between_documents(tmp_path):
    parquet(tmp_path, "tinystories")
    data = Tinystories(Tinystories.Config(tokens=40_000), section(tmp_path))
    data.shard_tokens = 10_000
    data.prepare()
    train, val = texts(data, "train"), texts(data, "val")
    assert train + val == DOCS[: len(train) + len(val)] and len(val) > 10
    splits = data.manifest()["splits"]
    assert 40_000 <= splits["train"]["tokens"] < 40_500 and 4_444 <= splits["val"]["tokens"] < 5_000
    assert splits["train"]["bytes"] == sum(len(t) for t in train) and len(splits["train"]["shards"]) >= 3


def test_stopped_fetch_goes_on_and_gives_the_same_set(tmp_path):
    for name in ("one", "two"):
        parquet(tmp_path / name, "finewebedu")
    config = Finewebedu.Config(subset="s", tokens=12_000)

    class Stopped(Finewebedu):
        def _texts(self, skip):
            self.skipped = skip
            for i, text in enumerate(super()._texts(skip)):
                if i == 150:
                    raise KeyboardInterrupt
                yield text

    whole = Finewebedu(config, section(tmp_path / "one", Tokenizer.GPT2))
    torn = Stopped(config, section(tmp_path / "two", Tokenizer.GPT2))
    whole.shard_tokens = torn.shard_tokens = 2_000
    whole.prepare()
    for _ in range(10):
        try:
            torn.prepare()
            break
        except KeyboardInterrupt:
            continue
    assert torn.skipped > 200
    assert {p.name: p.read_bytes() for p in torn.folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.folder.iterdir()
    }


def test_source_that_ends_early_names_the_size_that_fits(tmp_path):
    parquet(tmp_path, "openwebtext")
    data = Openwebtext(Openwebtext.Config(tokens=1_000_000), section(tmp_path))
    with pytest.raises(DataError, match=r"the source ends after (\d+) tokens.*CONFIG_DATA_OPENWEBTEXT_TOKENS=\d+"):
        data.prepare()
    assert not data.folder.exists()


def test_parquet_without_text_says_what_is_missing(tmp_path):
    parquet(tmp_path, "tinystories", column="story")
    data = Tinystories(Tinystories.Config(tokens=1000), section(tmp_path))
    with pytest.raises(DataError, match=r"KeyError: 'text'; .*parquet files with a `text` column"):
        data.prepare()


def test_without_network_the_error_says_what_to_do(tmp_path):
    data = Openwebtext(Openwebtext.Config(tokens=1000), section(tmp_path))
    with pytest.raises(DataError, match=r"cannot read Skylion007/openwebtext: .*or put parquet files .*openwebtext$"):
        data.prepare()
