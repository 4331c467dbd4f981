# SPDX-License-Identifier: MIT
"""Bytes and bits hold the same mask, and applying it makes plain zeros."""

import pytest
import torch

from ablab.prune import _mask
from ablab.prune._mask import Mask, pack, unpack


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_goes_becomes_positive_zero_and_the_rest_keeps_its_bits(monkeypatch, bits, dtype):
    monkeypatch.setitem(_mask.CHUNK, "cpu", 64)
    flat = torch.randn(400, dtype=dtype)
    flat[[70, 71]] = torch.tensor([torch.nan, -0.0], dtype=dtype)
    before, stay = flat.clone(), torch.rand(203) > 0.5
    stay[:8] = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]).bool()
    mask = Mask(slice(64, 267), bits, flat.device)
    mask.put(slice(64, 128), stay[:64])
    mask.put(slice(128, 267), stay[64:])
    mask.apply(flat)
    assert list(mask._words) == [_mask.WORDS[dtype]]  # scratch of the width in use: of the other it is 128 MiB on a GPU
    inside = flat[64:267]
    assert not inside[~stay].any() and not torch.signbit(inside[~stay]).any()
    whole = torch.ones(400, dtype=torch.bool)
    whole[64:267] = stay
    kind = _mask.WORDS[dtype]
    assert torch.equal(flat[whole].view(kind), before[whole].view(kind))
    assert mask.nbytes == (26 if bits else 203)
    other = Mask(slice(64, 267), bits, flat.device)
    assert mask.packed().nbytes == 26 and not torch.equal(other.held, mask.held)
    other.load(mask.packed())
    assert torch.equal(other.held, mask.held)
    assert torch.equal(mask.words(slice(72, 104)), -stay[8:40].int())


def test_packing_is_little_endian_and_inverted():
    stay = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
    assert pack(stay).tolist() == [129, 0b11111110]
    assert torch.equal(unpack(pack(stay))[:11], -stay.to(torch.int8))
