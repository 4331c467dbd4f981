# SPDX-License-Identifier: MIT
"""stage: contexts are immutable and end where they should, init streams are keyed by name alone."""

import hashlib
from typing import NamedTuple

import pytest
import torch

from ablab.tensor.stage import Coupling, Ctx, Dims, Field, Linear, Past, init_


class Note(NamedTuple):
    text: str


def test_put_leaves_the_old_context_alone():
    a = Ctx(start=3)
    b = a.put(Note("x"))
    assert a.all(Note) == () and b.one(Note).text == "x" and b.start == 3


def test_next_keeps_coupling_and_start_and_what_is_carried():
    lam = Coupling(torch.ones(()))
    past = Past(8)
    ctx = Ctx(start=3).put(lam, past, Note("ends")).next(Note("carried"))
    assert ctx.one(Coupling) is lam and ctx.one(Past) is past
    assert [n.text for n in ctx.all(Note)] == ["carried"]
    assert (ctx.start, ctx.layer) == (3, 1)


@pytest.mark.parametrize("n", [0, 2])
def test_one_refuses_none_and_two(n):
    with pytest.raises(RuntimeError, match=f"{n} values of Note"):
        Ctx().put(*[Note("x")] * n).one(Note)


def test_stream_is_the_documented_one():
    got = init_(torch.empty(5, 7), 1337, "blocks.0.mlp.up.weight", 0.02)
    digest = hashlib.blake2b(b"1337:blocks.0.mlp.up.weight").digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    assert torch.equal(got, torch.empty(5, 7).normal_(0.0, 0.02, generator=stream))


def test_stream_depends_on_seed_and_name_and_on_nothing_else():
    def draw(seed, name, dtype=torch.float32):
        return init_(torch.empty(64, dtype=dtype), seed, name, 1.0)

    state = torch.get_rng_state()
    a = draw(1, "a")
    draw(1, "b")
    assert torch.equal(draw(1, "a"), a)
    assert not torch.equal(draw(2, "a"), a) and not torch.equal(draw(1, "b"), a)
    assert torch.equal(draw(1, "a", torch.float64), a.double())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_linear_takes_nothing_from_the_global_stream():
    state = torch.get_rng_state()
    linear = Linear(3, 4, bias=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(linear.bias, torch.zeros(4)) and linear.std == {"weight": 0.02}


def test_past_grows_by_position_and_writing_twice_is_harmless():
    past, t = Past(6), torch.arange(8.0).view(1, 1, 4, 2)
    first = Field("k", t[:, :, :3])
    assert torch.equal(past.extend(0, first, 0), t[:, :, :3])
    assert torch.equal(past.extend(0, first, 0), t[:, :, :3])
    assert torch.equal(past.extend(0, Field("k", t[:, :, 3:]), 3), t)
    past.extend(1, Field("k", t[:, :, :1]), 0)
    assert past.values_per_token() == 4


def test_first_and_last_block():
    dims = Dims(n_embd=8, n_head=2, head_dim=4, mlp_hidden=9, block_size=5, bias=True, dropout=0.0, n_layer=3)
    assert [(d.first, d.last) for d in map(dims.at, range(3))] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert dims.residual_std == pytest.approx(0.02 / 6**0.5)
