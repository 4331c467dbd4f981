# SPDX-License-Identifier: MIT
"""A family takes a new member without a change to the hosts, and the flow check finds what does not fit together."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ablab import plugin
from ablab.attention import Attention
from ablab.mlp import Mlp
from ablab.model._flow import FlowError
from ablab.tensor.stage import Attended, Coupling, Emit, Gate, Pre, Project, Score
from tests.blocks import assemble, network, tokens, values


class Load(NamedTuple):
    """Carried to the next block: one number per token and head."""

    s_BTH: Tensor


class Missing(NamedTuple):
    """A context that nobody puts."""

    x: Tensor


class HeadTilt(Gate):
    """y times 1 + lam g, g zero at init."""

    reads = (Coupling,)

    def __init__(self, dims, start):
        super().__init__()
        self.g_H = nn.Parameter(torch.full((dims.n_head,), start))

    def forward(self, m, h, ctx):
        scale_H11 = (1 + ctx.one(Coupling).lam * self.g_H)[:, None, None]
        return m._replace(y_BHTV=m.y_BHTV * scale_H11), ctx


class SendLoad(Emit):
    emits = (Load,)
    std = {"w_HF": 0.02}

    def __init__(self, dims):
        super().__init__()
        self.w_HF = nn.Parameter(torch.empty(dims.n_head, dims.mlp_hidden))

    def forward(self, h_BTF, ctx):
        return Load(h_BTF @ self.w_HF.T)


class TakeLoad(Gate):
    reads = (Load,)

    def __init__(self, dims):
        super().__init__()
        self.gain_H = nn.Parameter(torch.zeros(dims.n_head))

    def forward(self, m, h, ctx):
        u_BHT = ctx.one(Load).s_BTH.transpose(1, 2) * self.gain_H[:, None]
        return m._replace(y_BHTV=m.y_BHTV * (1 + u_BHT.tanh())[..., None]), ctx


class AddAttended(Pre):
    reads = (Attended,)

    def __init__(self, dims):
        super().__init__()
        self.w_FD = nn.Parameter(torch.zeros(dims.mlp_hidden, dims.n_embd))

    def forward(self, pre_BTF, ctx):
        return pre_BTF + ctx.one(Attended).y_BTD @ self.w_FD.T


class ReadMissing(Score):
    reads = (Missing,)

    def forward(self, h, ctx):
        return h


class SecondProject(Project):
    def forward(self, x_BTD, ctx):
        raise NotImplementedError


@pytest.fixture
def member():
    """Declares a member by a function from dims to parts; it is gone after the test."""
    made = []

    def declare(base, symbol, make):
        made.append(symbol)
        name = symbol.partition("_")[2].title()
        type(base)(name, (base,), {"parts": lambda self, dims: make(dims)}, symbol=symbol)

    yield declare
    for symbol in made:
        plugin.forget(symbol)


def build(*symbols, **fields):
    """The test model with members on that a test declared; their fields by symbol."""
    return assemble({**values(), **dict.fromkeys(symbols, True), **fields})


@pytest.fixture
def tilt():
    class Tilt(Attention, symbol="ATTN_TILT"):
        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config:
            start: float

        def parts(self, dims):
            return (HeadTilt(dims, self.config.start),)

    yield Tilt
    plugin.forget("ATTN_TILT")


@pytest.fixture
def relay():
    class Relay(Mlp, symbol="MLP_RELAY"):
        def parts(self, dims):
            return (*([] if dims.first else [TakeLoad(dims)]), *([] if dims.last else [SendLoad(dims)]))

    yield Relay
    plugin.forget("MLP_RELAY")


def test_two_new_members_run_in_the_same_hosts(tilt, relay):
    net, host, x = build("ATTN_TILT", "MLP_RELAY", ATTN_TILT_START=0.0), network(), tokens(2, 40)
    added = {n for n, _ in net.named_parameters()} - {n for n, _ in host.named_parameters()}
    assert added == {
        *(f"blocks.{layer}.attn.gate.tilt.g_H" for layer in range(3)),
        *(f"blocks.{layer}.attn.gate.relay.gain_H" for layer in (1, 2)),
        *(f"blocks.{layer}.mlp.emit.relay.w_HF" for layer in (0, 1)),
    }
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in host.state_dict().items())
    assert torch.equal(net(x).logits, host(x).logits)  # both start as the identity
    for _ in range(2):
        net(x, x).loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(p.grad)
    assert all((p.grad != 0).any() for p in net.parameters())


def test_a_carried_value_reaches_the_next_block_and_no_other(tilt, relay):
    net, x = build("MLP_RELAY").double(), tokens(2, 40)
    with torch.no_grad():
        for block in net.blocks[1:]:
            block.attn.gate["relay"].gain_H.fill_(3.0)
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda m, args: seen.append([v.s_BTH for v in args[1].all(Load)]))
    net(x)
    assert [len(s) for s in seen] == [0, 1, 1]
    assert not torch.equal(seen[1][0], seen[2][0])


def test_fields_of_a_new_member_bind_by_its_symbol(tilt):
    assert build("ATTN_TILT", ATTN_TILT_START=0.25).blocks[0].attn.gate["tilt"].g_H[0] == 0.25


def test_lam_reaches_every_block_without_a_rebuild(tilt):
    net, x = build("ATTN_TILT", ATTN_TILT_START=0.5), tokens(2, 40)
    with torch.no_grad():
        net.lam.fill_(0.0)
    assert torch.equal(net(x).logits, network()(x).logits)


def test_attended_is_published_only_where_it_is_wanted(member):
    member(Mlp, "MLP_ECHO", lambda d: (AddAttended(d),))
    net = build("MLP_ECHO")
    assert all(b.attn.publish for b in net.blocks) and not any(b.attn.publish for b in network().blocks)
    net(tokens(2, 8), tokens(2, 8)).loss.backward()
    assert (net.blocks[2].mlp.pre["echo"].w_FD.grad != 0).any()


def test_a_read_that_nobody_emits_is_refused(member):
    member(Attention, "ATTN_ORPHAN", lambda d: (ReadMissing(),))
    with pytest.raises(FlowError, match=r"CONFIG_ATTN_ORPHAN: its score in block 0 reads Missing, which no part"):
        build("ATTN_ORPHAN")


def test_a_consumer_in_block_0_is_refused(member):
    member(Mlp, "MLP_RELAY", lambda d: (TakeLoad(d), *([] if d.last else [SendLoad(d)])))
    with pytest.raises(FlowError, match="CONFIG_MLP_RELAY: its gate in block 0 reads Load"):
        build("MLP_RELAY")


def test_an_emission_of_the_last_block_is_refused(member):
    member(Mlp, "MLP_RELAY", lambda d: (*([] if d.first else [TakeLoad(d)]), SendLoad(d)))
    with pytest.raises(FlowError, match="CONFIG_MLP_RELAY: carries Load from block 2 to 3, where no part reads it"):
        build("MLP_RELAY")


def test_a_carried_value_without_a_reader_is_refused(member):
    member(Mlp, "MLP_SHOUT", lambda d: () if d.last else (SendLoad(d),))
    with pytest.raises(FlowError, match="CONFIG_MLP_SHOUT: carries Load from block 0 to 1, where no part reads it"):
        build("MLP_SHOUT")


def test_two_projectors_are_refused(member):
    member(Attention, "ATTN_OTHER", lambda d: (SecondProject(),))
    with pytest.raises(FlowError, match="project comes from ATTN_MHA and ATTN_OTHER: exactly one"):
        build("ATTN_OTHER")


def test_a_member_that_one_block_makes_inert_is_refused(relay):
    with pytest.raises(ValueError, match="CONFIG_MLP_RELAY: adds no part to any of 1 blocks"):
        build("MLP_RELAY", MODEL_GPT_LAYERS=1)


def test_two_parts_of_a_member_at_one_stage_are_refused(member):
    member(Attention, "ATTN_TWICE", lambda d: (HeadTilt(d, 0.0), HeadTilt(d, 0.0)))
    with pytest.raises(FlowError, match="two parts of TWICE at gate"):
        build("ATTN_TWICE")


def test_a_missing_mlp_is_refused():
    typed = {s: v for s, v in values().items() if s != "MLP_GELU"}
    with pytest.raises(FlowError, match="MLP width comes from nobody"):
        assemble(typed)
