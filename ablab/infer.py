# SPDX-License-Identifier: MIT
"""Text from a trained model: sampling with cached keys and values, on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ablab import build, checkpoint, config
from ablab.rundir import RunError, TrialDir
from ablab.tensor.stage import Past


def sample(
    trial: TrialDir,
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 1,
) -> str:
    """The prompt and `tokens` more tokens from the newest checkpoint of a trial that verifies.

    `temperature` 0 takes the likeliest token, 1 samples from the model; `top_k` keeps the k likeliest.  Equal
    arguments give equal text.  Raises ValueError for arguments out of range, RunError without a checkpoint.
    """
    for name, value, low in (
        ("TOKENS", tokens, 1),
        ("TEMPERATURE", temperature, 0),
        ("TOP_K", 1 if top_k is None else top_k, 1),
    ):
        if not low <= value < float("inf"):
            raise ValueError(f"{name}={value}: {low} or more is allowed; change {name}")
    cfg = config.read(trial.config)
    codec = cfg.data.codec()
    network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, codec.vocab)
    lease = trial.lease()
    saved = trial.saved(lease["first"]) if lease else []
    place = next((c for c in saved if c.flaw() is None), None)
    if place is None:
        raise RunError(f"{trial.path}: no checkpoint that verifies; run the trial, or choose another one")
    checkpoint.load_model(place, network)
    ids = codec.encode(prompt).tolist() or [codec.eot]
    cache = partial(build.cache, cfg)
    return codec.decode(ids + list(generate(network, ids, tokens, temperature, top_k, seed, cache)))


@torch.no_grad()
def generate(
    network: torch.nn.Module,
    ids: Sequence[int],
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    cache: Callable[[], Past] | None = None,
) -> Iterator[int]:
    """`tokens` token ids after `ids`, one at a time, from a GptNetwork, which is left in eval mode.

    `cache` makes an empty one, for a new context.  Positions are absolute: when the context is full, its newer half is
    read again as a new one.
    """
    stream = torch.Generator().manual_seed(seed)
    length, seen = network.dims.block_size, list(ids)
    cache = cache or partial(Past, length)
    past, fresh = cache(), seen[-length:]
    network.eval()
    for _ in range(tokens):
        if past.length + len(fresh) > length:
            past, fresh = cache(), seen[-(length // 2) :]
        for part in torch.tensor([fresh]).split(1 if past.single else len(fresh), 1):
            logits_V = network(part, past=past).logits[0, -1]
        fresh = [choose(logits_V, temperature, top_k, stream)]
        seen += fresh
        yield fresh[0]


def choose(logits_V: Tensor, temperature: float, top_k: int | None, stream: torch.Generator) -> int:
    """One token id."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double() / temperature
    if top_k is not None and top_k < len(logits_V):
        logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=stream))
