# SPDX-License-Identifier: MIT
"""GPT-2 (Radford et al. 2019): embeddings, N pre-norm blocks, final norm, head tied to the token embedding.

B batch, T tokens, D model, V vocabulary.

Init, each tensor from the stream of its own name (`init_` in `ablab/tensor/stage.py`):
    wte.weight  wpe.weight                      N(0, 0.02)
    blocks.*  Linear weights                    N(0, 0.02)
    blocks.*.attn.out.weight  mlp.down.weight   N(0, 0.02 / sqrt(2 N))
    Linear biases 0; LayerNorm 1, 0             by their constructors
    mechanisms                                  as their files say
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.model import Model, Network, Output
from ablab.model._block import Block
from ablab.model._flow import FlowError, check
from ablab.plugin import EffectError
from ablab.tensor.stage import BlockMember, Coupling, Ctx, Dims, Gauges, Part, Past


class GptNetwork(Network):
    """Token ids to loss or logits."""

    ties = {"head": "wte.weight"}

    def __init__(self, members: Sequence[BlockMember], dims: Dims, n_vocab: int, n_column: int, seed: int) -> None:
        super().__init__()
        self.members, self.dims, self.n_vocab, self.dropout = tuple(members), dims, n_vocab, dims.dropout
        self.wte = nn.Embedding(n_column, dims.n_embd, _weight=torch.empty(n_column, dims.n_embd))
        self.wpe = nn.Embedding(dims.block_size, dims.n_embd, _weight=torch.empty(dims.block_size, dims.n_embd))
        self.std = {"wte.weight": 0.02, "wpe.weight": 0.02}
        at = [dims.at(layer) for layer in range(dims.n_layer)]
        parts = [[part for m in members for part in m.made(d)] for d in at]
        check([m.symbol for m in members], parts)
        self.blocks = nn.ModuleList(Block(p, d) for p, d in zip(parts, at, strict=True))
        self.ln_f = nn.LayerNorm(dims.n_embd, bias=dims.bias)
        self._draw(seed)

    def forward(
        self,
        x_BT: Tensor,
        y_BT: Tensor | None = None,
        keep_logits: bool = False,
        past: Past | None = None,
        gauges: Gauges | None = None,
    ) -> Output:
        """With `past` the tokens continue those it holds; logits are then [B, 1, V], of the last token."""
        ctx = Ctx(start=past.length if past else 0).put(Coupling(self.lam))
        end = ctx.start + x_BT.shape[1]
        pos_TD = self.wpe.weight
        if end != pos_TD.shape[0] or ctx.start:
            pos_TD = pos_TD[ctx.start : end]
        x_BTD = self.wte(x_BT) + pos_TD
        if self.dropout:
            x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        if past:
            ctx = ctx.put(past)
            past.length = end
        if gauges:
            ctx = ctx.put(gauges)
        for block in self.blocks:
            x_BTD, ctx = block(x_BTD, ctx)
        if past:
            x_BTD = x_BTD[:, -1:]
        logits_NV = F.linear(self.ln_f(x_BTD).flatten(0, 1), self.wte.weight)  # N = B T
        if not self.training and self.n_vocab < logits_NV.shape[1]:
            logits_NV[:, self.n_vocab :] = -torch.inf  # a padded row would add e^0 to the softmax
        wanted = keep_logits or y_BT is None
        logits_BTV = logits_NV.view(*x_BTD.shape[:2], -1) if wanted else None
        if y_BT is None:
            return Output(None, 0, logits_BTV)
        wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        return Output(F.cross_entropy(wide_NV, y_BT.flatten()), y_BT.numel(), logits_BTV)

    def flops_per_token(self, length: int) -> int:
        """6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B): N all parameters, attention not halved.

        Members add what they compute beyond their parameters, three times: backward is two forwards.
        """
        n_param, d = sum(p.numel() for p in self.parameters()), self.dims
        dearer = sum(m.widens(d, length) for m in self.members)
        at = [replace(d, layer=layer, dearer=dearer) for layer in range(d.n_layer)]
        more = sum(dearer + sum(m.flops(here, length) for m in self.members) for here in at)
        return 6 * n_param + 12 * d.n_layer * d.n_head * d.head_dim * length + 3 * more

    def example(self) -> Tensor:
        return (torch.arange(16) * 7919 % self.n_vocab).view(2, 8)  # a prime scatters the ids

    @torch.no_grad()
    def gauges(self, x_BT: Tensor, seen: Gauges | None = None) -> dict[str, float]:
        """One forward in eval mode; none where no part has gauges and nothing is to be `seen` besides."""
        layers = enumerate(self.blocks)
        parts = [(part, layer) for layer, b in layers for part in b.modules() if isinstance(part, Part)]
        wanted = [Gauges.name(part, layer, gauge) for part, layer in parts for gauge in part.gauges]
        if not wanted and seen is None:
            return {}
        seen, training = seen or Gauges(), self.training
        self.eval()
        self(x_BT, gauges=seen)
        self.train(training)
        if odd := set(wanted) ^ seen.values.keys():
            raise EffectError(f"gauges: declared or reported, but not both: {' '.join(sorted(odd))}")
        found = seen.values | seen.watched
        return dict(zip(found, torch.stack([v.float() for v in found.values()]).tolist(), strict=True))

    def facts(self) -> dict[str, Any]:
        """KV bytes per token in bf16, counted on a real cache; MLP : attention in weights with 2 axes."""
        past, training = Past(self.dims.block_size), self.training
        self.eval()
        with torch.no_grad():
            self(self.example()[:, :2].to(self.lam.device), past=past)
        self.train(training)
        weights = {"attn": 0, "mlp": 0, "ln1": 0, "ln2": 0}
        for name, p in self.blocks.named_parameters():
            weights[name.split(".")[1]] += p.numel() * (p.ndim >= 2)
        return {
            "kv_bytes_per_token": 2 * past.values_per_token(),
            "mlp_to_attention": weights["mlp"] / weights["attn"],
        }


class Gpt(Model, symbol="MODEL_GPT"):
    """GPT-2 from the selected attention and MLP members."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MODEL_GPT_*."""

        layers: int
        """Blocks N."""
        heads: int
        embed: int
        """Width D of the residual stream."""
        block: int
        """Longest context T."""
        vocab: int
        """Columns V of the embedding, padding included."""
        bias: bool
        """Biases in every Linear and LayerNorm."""
        dropout: float
        """At the embedding and the two residual branches."""

        def __post_init__(self) -> None:
            if self.embed % self.heads:
                fit = sorted(
                    (h for h in range(1, self.embed + 1) if self.embed % h == 0), key=lambda h: abs(h - self.heads)
                )[:2]
                raise ValueError(
                    f"CONFIG_MODEL_GPT_EMBED = {self.embed} is no multiple of CONFIG_MODEL_GPT_HEADS ="
                    f" {self.heads} : a head is EMBED / HEADS wide; set {' or '.join(map(str, sorted(fit)))} heads"
                )

    @property
    def length(self) -> int:
        return self.config.block

    @property
    def depth(self) -> int:
        return self.config.layers

    def build(
        self,
        attention: Sequence[BlockMember],
        mlp: Sequence[BlockMember],
        seed: int,
        n_vocab: int | None = None,
    ) -> GptNetwork:
        c = self.config
        n_vocab = c.vocab if n_vocab is None else n_vocab
        if n_vocab > c.vocab:
            raise ValueError(
                f"CONFIG_MODEL_GPT_VOCAB = {c.vocab} : the tokenizer has {n_vocab} ids; set {n_vocab} or more"
            )
        members = (*attention, *mlp)
        widths = [(m.symbol, m.hidden()) for m in members if m.hidden() is not None]
        if len(widths) != 1:
            got = " and ".join(symbol for symbol, _ in widths) or "nobody"
            raise FlowError(f"the MLP width comes from {got}: exactly one member must set it; select one")
        dims = Dims(
            n_embd=c.embed,
            n_head=c.heads,
            head_dim=c.embed // c.heads,
            mlp_hidden=widths[0][1],
            block_size=c.block,
            bias=c.bias,
            dropout=c.dropout,
            n_layer=c.layers,
            latent=next((n for m in members if (n := m.latent()) is not None), 0),
        )
        return GptNetwork(members, dims, n_vocab, c.vocab, seed)
