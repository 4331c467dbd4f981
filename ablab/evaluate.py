# SPDX-License-Identifier: MIT
"""Evaluation: means over a fixed set of samples, the same for every trial."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ablab.data import Evaluation
from ablab.tensor.stage import Past


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Evaluation,
    size: int,
    device: torch.device,
    precision: AbstractContextManager,
    poll: Callable[[], bool] = lambda: False,
    cache: Callable[[], Past] | None = None,
    split: str = "val",
) -> dict[str, float] | None:
    """Means over the targets of the whole set, `size` samples at a time: {val_loss, val_perplexity, val_bpb} for text,
    {val_loss, val_accuracy} for a model that counts its hits, in percent.

    Dropout is off, random state untouched, and nothing is read from the device until the end.  `poll` is asked
    before each forward pass; when it says True the result is None.  With `cache` every sequence is read token by token
    through an empty one.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    hits: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for batch in data.batches(size):
            x_BT, y_BT = (part.to(device, non_blocking=True) for part in (batch.x, batch.y))
            for x, y, more in _reads(x_BT, y_BT, cache):
                if poll():
                    return None
                with precision:
                    out = model(x, y, **more)
                total += out.loss.double() * out.n
                hits += [] if out.hits is None else [out.hits]
    finally:
        model.train(training)
    loss = total.item() / data.tokens
    found = {f"{split}_loss": loss}
    if data.bytes:
        bits = loss * data.tokens / (math.log(2) * data.bytes)
        found |= {f"{split}_perplexity": perplexity(loss), f"{split}_bpb": bits}
    if hits:
        found[f"{split}_accuracy"] = 100 * int(torch.stack(hits).sum()) / data.tokens
    return found


def _reads(x_BT: Tensor, y_BT: Tensor, cache: Callable[[], Past] | None) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """Arguments of the forward passes over a batch."""
    if cache is None:
        yield x_BT, y_BT, {}
        return
    past = cache()
    yield from ((x, y, {"past": past}) for x, y in zip(x_BT.split(1, 1), y_BT.split(1, 1), strict=True))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that has no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
