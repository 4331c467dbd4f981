# SPDX-License-Identifier: MIT
"""A projector with a key latent, to test what reads one."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ablab import plugin
from ablab.attention import Attention
from ablab.tensor.stage import CAUSAL, Field, Heads, Latent, LatentDelta, Linear, Piece, Project


class Narrow(Project):
    """k is a map of the latent, after what amends it; v is k; expanded before it is cached."""

    takes = (LatentDelta,)
    emits = (Latent,)
    caches = ("k", "v")
    std = {"up": 0.2}

    def __init__(self, dims, latent):
        super().__init__()
        self.n_head, self.scale = dims.n_head, dims.head_dim**-0.5
        self.q, self.dk = Linear(dims.n_embd, dims.n_embd, False), Linear(dims.n_embd, latent, False, 0.2)
        self.up = nn.Parameter(torch.empty(dims.n_embd, latent))

    def forward(self, x_BTD, ctx):
        c_BTL = self.dk(x_BTD)
        for delta in ctx.all(LatentDelta):
            c_BTL = c_BTL + delta.d_BTL
        q, k = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (self.q(x_BTD), c_BTL @ self.up.T))
        return Heads(q, k, k, self.scale, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", k)), ctx.put(Latent(c_BTL))


@pytest.fixture
def stand():
    class Stand(Attention, symbol="ATTN_STAND"):
        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config:
            latent: int

        def latent(self):
            return self.config.latent

        def parts(self, dims):
            return (Narrow(dims, self.config.latent),)

    yield
    plugin.forget("ATTN_STAND")
