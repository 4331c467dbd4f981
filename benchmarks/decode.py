# SPDX-License-Identifier: MIT
"""Rows of `make bench` for cached decode of latent attention: absorbed maps against expanded keys and values.

B batch, S tokens so far, D model, H heads, C channels of a head, L latent.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.tensor.stage import Ctx, Past
from benchmarks import Figure, alternate, median, versus
from benchmarks.peers import SHAPES, Shape
from benchmarks.steps import network

LENGTHS = (1024, 4096)
LATENT = 128


class Ours:
    """One step of ablab at the end of a full cache, again and again."""

    def __init__(self, shape: Shape, length: int, more: tuple[str, ...] = ()) -> None:
        self.net = network(shape, "CONFIG_ATTN_MLA=y", f"CONFIG_ATTN_MLA_LATENT={LATENT}", *more).eval()
        self.length, self.past = length, Past(shape.block)
        self.token = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            self.net(self.token, past=self.past)
        stream = torch.Generator().manual_seed(1)
        for t in self.past.fields.values():
            t.normal_(0.0, 0.5, generator=stream)  # the std of a latent at init

    @torch.no_grad()
    def step(self) -> Tensor:
        self.past.length = self.length - 1
        return self.net(self.token, past=self.past).logits[:, 0]


class Expanded:
    """The same step as it is without absorption: all keys and values are made from the cached latents each time."""

    def __init__(self, ours: Ours) -> None:
        self.net, self.length, self.token = ours.net, ours.length, ours.token
        fields = ours.past.fields
        self.cache = [[fields[i, n][:, 0].clone() for n in ("c_k", "c_v")] for i in range(len(self.net.blocks))]

    @torch.no_grad()
    def step(self) -> Tensor:
        net, last = self.net, self.length - 1
        x = net.wte(self.token) + net.wpe.weight[last]
        for block, cache in zip(net.blocks, self.cache, strict=True):
            x = x + self.attend(block.attn, block.ln1(x), cache)
            x = x + block.mlp(block.ln2(x), Ctx())[0]
        return F.linear(net.ln_f(x[:, -1]), net.wte.weight)

    def attend(self, attn: nn.Module, x_B1D: Tensor, cache: list[Tensor]) -> Tensor:
        p, S = attn.project, self.length
        for c_BSL, down in zip(cache, (p.dk, p.dv), strict=True):
            c_BSL[:, S - 1 : S] = down(x_B1D)
        c_K, c_V = (c_BSL[:, :S] for c_BSL in cache)
        k_BSD = F.linear(c_K, p.up_k.flatten(0, 1))
        v_BSD = F.linear(c_V, p.up_v.mT.flatten(0, 1))
        q, k, v = (t.unflatten(-1, (p.n_head, p.head_dim)).transpose(1, 2) for t in (p.q(x_B1D), k_BSD, v_BSD))
        return attn.out(F.scaled_dot_product_attention(q, k, v, scale=p.scale).transpose(1, 2).flatten(2))


def same(ours: Ours, peer: Expanded) -> float:
    """Largest difference of the logits to the peer's over their std.

    Raises AssertionError above 1e-4: nothing is timed that does not compute the same.
    """
    got, want = ours.step()[:, : ours.net.n_vocab], peer.step()[:, : ours.net.n_vocab]
    worst = ((got - want).abs().max() / want.std()).item()
    assert worst < 1e-4, f"absorbed and expanded logits differ by {worst:.2g}"
    return worst


def step(threads: int, rounds: int, quick: bool = False) -> list[Figure]:
    """A token of GPT-2 124M with latents; `quick`: of two blocks of it and a small vocabulary."""
    small = {"layers": 2, "vocab": 256} if quick else {}
    figures = []
    for length in LENGTHS:
        ours = Ours(replace(SHAPES["gpt2"], block=length, **small), length)
        peer = Expanded(ours)
        detail = f"; equal within {same(ours, peer):.0e}"
        samples = alternate({"absorbed": ours.step, "expanded": peer.step}, rounds, threads)
        figures.append(Figure(f"decode {length}: absorbed", 1 / median(samples["absorbed"]), "tok/s"))
        figures.append(versus(f"decode {length}: expanded", samples, "absorbed", "expanded", ">= 1.00", detail))
    return figures
