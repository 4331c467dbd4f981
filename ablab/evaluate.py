# SPDX-License-Identifier: MIT
"""Evaluation: the mean loss over a fixed set of validation sequences, the same for every trial."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from ablab.data import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Evaluation,
    size: int,
    device: torch.device,
    precision: AbstractContextManager,
    poll: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """{val_loss, val_perplexity, val_bpb}: token-weighted means over the whole set, `size` sequences at a time.

    Dropout is off, random state untouched, and nothing is read from the device until the end.  `poll` is asked
    before each batch; when it says True the result is None.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in data.batches(size):
            if poll():
                return None
            with precision:
                out = model(batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True))
            total += out.loss.double() * out.n
    finally:
        model.train(training)
    loss = total.item() / data.tokens
    bits = loss * data.tokens / (math.log(2) * data.bytes)
    return {"val_loss": loss, "val_perplexity": perplexity(loss), "val_bpb": bits}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that has no float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
