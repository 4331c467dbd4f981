# SPDX-License-Identifier: MIT
"""Tiny models from symbols, and a dense T x T attention to compare with."""

import torch

from ablab import config, kconf, plugin

SIZES = {
    "MODEL_GPT_LAYERS": 3,
    "MODEL_GPT_HEADS": 4,
    "MODEL_GPT_EMBED": 32,
    "MODEL_GPT_BLOCK": 40,
    "MODEL_GPT_VOCAB": 97,
    "MLP_GELU_WIDTH": 128,
}


def values(**symbols):
    """Typed values of the default configuration at test sizes; MLP_GELU_TANH=True sets CONFIG_MLP_GELU_TANH=y."""
    text = {True: "y", False: "n"}
    asked = {**SIZES, **symbols}
    lines = [f"CONFIG_{k}={text[v] if isinstance(v, bool) else v}" for k, v in asked.items()]
    return kconf.settle(kconf.load(), [kconf.parse("test", enumerate(lines, 1), "test")]).values


def network(seed=1, n_vocab=None, **symbols):
    return assemble(values(**symbols), seed, n_vocab)


def assemble(typed, seed=1, n_vocab=None):
    """The network of typed values, which may name members that a test defined."""
    (model,) = config.create("MODEL", typed)
    return model.build(config.create("ATTN", typed), config.create("MLP", typed), seed, n_vocab)


def block_members():
    """Symbols of all attention and MLP members, in Kconfig order."""
    known = {*plugin.members("ATTN"), *plugin.members("MLP")}
    return [s for s in kconf.load().symbols if s in known]


def tokens(*shape, seed=0, n=97):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def perturbed(net, std=0.05):
    """The probe point: away from init, where members that start as the identity show."""
    stream = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=stream, dtype=torch.float64).to(p.dtype) * std)
    return net


def dense(pieces, v, scale, start=0):
    """(o, lse) by an explicit softmax.  pieces: (q, k, region kind, width); key j, query start + i."""
    T, S = pieces[0][0].shape[2], v.shape[2]
    i, j = torch.arange(start, start + T)[:, None], torch.arange(S)
    s = torch.full((*pieces[0][0].shape[:3], S), -torch.inf, dtype=v.dtype)
    for q, k, kind, width in pieces:
        seen = {
            "causal": j <= i,
            "band": (j <= i) & (j >= i - width),
            "far": j < i - width,
        }[kind]
        s = torch.where(seen, scale * (q @ k.transpose(-1, -2)), s)
    return s.softmax(-1) @ v, s.logsumexp(-1)
