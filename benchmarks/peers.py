# SPDX-License-Identifier: MIT
"""The peers of a training step: a plain GPT-2 step as people write it, and transformers'.

B batch, T tokens, D model, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one benchmark: blocks, heads, width, context, batch, vocabulary."""

    layers: int
    heads: int
    embed: int
    block: int
    batch: int
    vocab: int


SHAPES = {
    "tiny": Shape(2, 2, 64, 32, 4, 65),
    "mac": Shape(4, 4, 128, 64, 12, 65),
    "small": Shape(6, 6, 384, 256, 8, 65),
    "gpt2": Shape(12, 12, 768, 1024, 1, 50304),
}
LR, DECAY, BETAS, CLIP, SEED = 6e-4, 0.1, (0.9, 0.95), 1.0, 1337
RENAMES = (  # ablab -> peer
    ("blocks.", "h."),
    (".attn.project.qkv.", ".attn.c_attn."),
    (".attn.out.", ".attn.c_proj."),
    (".mlp.up.", ".mlp.c_fc."),
    (".mlp.down.", ".mlp.c_proj."),
    (".ln1.", ".ln_1."),
    (".ln2.", ".ln_2."),
)


def configuration(s: Shape, *more: str) -> str:
    """ablab's `.config` for a shape, with what the peer does not do switched off."""
    model = {"LAYERS": s.layers, "HEADS": s.heads, "EMBED": s.embed, "BLOCK": s.block, "VOCAB": s.vocab}
    lines = [
        "CONFIG_DATA_SYNTH=y",
        *(f"CONFIG_MODEL_GPT_{name}={value}" for name, value in model.items()),
        f"CONFIG_MLP_GELU_WIDTH={4 * s.embed}",
        f'CONFIG_OPT_LR="{LR}"',
        f'CONFIG_OPT_WEIGHT_DECAY="{DECAY}"',
        "CONFIG_OPT_DECAY_EMBED=y",
        f'CONFIG_OPT_CLIP_NORM="{CLIP}"',
        f'CONFIG_OPT_ADAMW_BETA1="{BETAS[0]}"',
        f'CONFIG_OPT_ADAMW_BETA2="{BETAS[1]}"',
        "CONFIG_SCHED_CONSTANT=y",
        "CONFIG_SCHED_WARMUP=0",
        f"CONFIG_TRAIN_BATCH_EFFECTIVE={s.batch}",
        f"CONFIG_TRAIN_BATCH_MICRO={s.batch}",
        f"CONFIG_TRAIN_SEED={SEED}",
    ]
    return "\n".join([*lines, *more, ""])


class Attention(nn.Module):
    def __init__(self, s: Shape, flash: bool) -> None:
        super().__init__()
        self.heads, self.flash = s.heads, flash
        self.c_attn = nn.Linear(s.embed, 3 * s.embed)
        self.c_proj = nn.Linear(s.embed, s.embed)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.c_attn(x_BTD).split(D, dim=2)
        q, k, v = (t.view(B, T, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
            y = (q @ k.mT * k.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D))


class Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(s.embed, 4 * s.embed)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * s.embed, s.embed)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x_BTD)))


class Block(nn.Module):
    def __init__(self, s: Shape, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(s.embed), Attention(s, flash)
        self.ln_2, self.mlp = nn.LayerNorm(s.embed), Mlp(s)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class Gpt(nn.Module):
    """GPT-2 with a tied head; returns the loss.  Without `flash` attention is written out, T x T."""

    def __init__(self, s: Shape, flash: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(s.vocab, s.embed), nn.Embedding(s.block, s.embed)
        self.h = nn.ModuleList(Block(s, flash) for _ in range(s.layers))
        self.ln_f = nn.LayerNorm(s.embed)

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        x = self.wte(x_BT) + self.wpe(torch.arange(x_BT.shape[1], device=x_BT.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y_BT.view(-1))


def from_ablab(state: dict[str, Tensor], shape: Shape) -> Gpt:
    """A plain peer with the weights of an ablab model."""
    renamed = {}
    for name, value in state.items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        renamed[name] = value
    model = Gpt(shape)
    model.load_state_dict(renamed)
    return model


def to_ablab(name: str) -> str:
    """ablab's name of a peer's parameter."""
    for old, new in RENAMES:
        name = name.replace(new, old)
    return name


def adamw(model: nn.Module, **options) -> torch.optim.AdamW:
    """AdamW with decay on matrices, as people set it up; torch chooses the implementation unless told."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, **options)


def get_batch(tokens: np.ndarray, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """A random batch, cut sample by sample."""
    starts = torch.randint(len(tokens) - shape.block, (shape.batch,))
    x = torch.stack([torch.from_numpy(tokens[i : i + shape.block].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + shape.block].astype(np.int64)) for i in starts])
    if device == "cpu":
        return x, y
    return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)


def train(
    loss_of,
    model: nn.Module,
    optimizer,
    tokens: np.ndarray,
    shape: Shape,
    device: str = "cpu",
    log_steps: int = 10,
) -> Iterator[None]:
    """One optimizer step per `next`: batch, forward, backward, clip, step, and, every
    `log_steps` as nanoGPT does, the loss.

    `loss_of(x, y)` runs the model, compiled or in whatever precision.
    """
    x, y = get_batch(tokens, shape, device)
    step = 0
    while True:
        for group in optimizer.param_groups:
            group["lr"] = LR
        loss = loss_of(x, y)
        x, y = get_batch(tokens, shape, device)  # while the device is busy
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_steps == 0:
            loss.item()
        step += 1
        yield
