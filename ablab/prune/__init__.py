# SPDX-License-Identifier: MIT
"""Pruners: which weights are zero, and when."""

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ablab.plugin import Plugin
from ablab.prune._mask import WORDS
from ablab.prune._schedule import Curve, Ramp
from ablab.tensor import native


class RampBy(Enum):
    """What says where the ramp ends."""

    FRACTION = "fraction"
    STEP = "step"


class Alloc(Enum):
    """Among which weights a score is compared."""

    GLOBAL = "global"
    LAYER = "layer"
    DEPTH = "depth"


Pattern = Enum("Pattern", {"FREE": "free", "2OF4": "2of4"})
"""Which weights may be zero together: any, or two of every four along a row."""


class Store(Enum):
    """How a mask is held."""

    BOOL = "bool"
    BITS = "bits"


class Scope(Enum):
    """What a mask acts on."""

    FULL = "full"
    WEIGHTS = "weights"


class Pruner:
    """One trial's pruning at work; the order of the calls in one step is that of docs/design.md.

    This one prunes nothing, and is what the dense trial has.
    """

    def __init__(self, network: nn.Module, section: Any = None) -> None:
        self.weights = prunable(network, section)
        self.size = sum(p.numel() for p in self.weights.values())
        self.whole = sum(p.numel() for p in network.parameters())

    def observe(self) -> None:
        """Called after accumulation with the dense gradients in place."""

    def mask_gradients(self) -> None:
        """Called after `observe`, before clipping."""

    def update(self, step: int, progress: float) -> None:
        """Called once after optimizer step number `step` (first 1), at `progress` in (0, 1] of the budget; under one of
        seconds after the last step again, at progress 1.

        Raises EffectError if the weights are not as sparse as they were made.
        """

    def zeros(self) -> dict[str, int]:
        """Zeros in each prunable weight, counted.  Waits for the device."""
        if self.weights and (lib := native.on(next(iter(self.weights.values())))):
            return {name: lib.zeros(p) for name, p in self.weights.items()}
        # ints, without the sign: ten times as fast to count as floats
        words = [p.detach().abs().view(WORDS[p.dtype]) for p in self.weights.values()]
        counts = torch.stack([w.numel() - torch.count_nonzero(w) for w in words])
        return dict(zip(self.weights, counts.tolist(), strict=True))

    def sparsity(self) -> float:
        """Share of zeros in the prunable weights, counted."""
        return sum(self.zeros().values()) / self.size

    def gauges(self) -> dict[str, float]:
        """Metrics of a row with an evaluation."""
        return {"sparsity": self.sparsity()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and optimizer; bytes that are not the pruner's own."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave."""

    def masked(self) -> int:
        """Zeros in the masks, counted."""
        return 0

    held = 0
    """Zeros that the last update made."""
    nbytes = 0
    """Of masks and scores."""
    wanted = 0.0
    """Sparsity that the last update was asked for."""
    ramping = False
    """More is to come."""


class Prune(Plugin, family="PRUNE"):
    """Base of the pruning methods."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """PRUNE_* symbols that every method shares; none is there without pruning."""

        sparsity: float | None
        """Share of zeros at the end of the ramp."""
        initial: float | None
        """Share of zeros at its begin."""
        curve: Curve | None
        warmup: int | None
        """Step of the first update, where the ramp begins."""
        ramp_by: RampBy | None
        ramp_fraction: float | None
        """Share of the budget at which the ramp ends."""
        ramp_step: int | None
        """Step at which the ramp ends."""
        interval: int | None
        """Steps between updates of the masks."""
        alloc: Alloc | None
        alloc_cap: float | None
        """Largest share of a layer whose share grows with depth."""
        pattern: Pattern | None
        mask: Store | None
        scope: Scope | None
        tied: bool | None
        """A head that is an embedding is pruned too."""
        skip_first: bool | None
        """The first convolution stays dense."""
        skip_last: bool | None
        """The classifier stays dense."""

        def __post_init__(self) -> None:
            if self.sparsity is not None and self.initial > self.sparsity:
                raise ValueError(
                    f"CONFIG_PRUNE_INITIAL = {self.initial} : more than CONFIG_PRUNE_SPARSITY = {self.sparsity} ;"
                    " a ramp only rises"
                )
            if self.alloc_cap is not None and self.alloc_cap < self.sparsity:
                raise ValueError(
                    f"CONFIG_PRUNE_ALLOC_CAP = {self.alloc_cap} : less than CONFIG_PRUNE_SPARSITY = {self.sparsity} ;"
                    " all layers would be at the cap"
                )
            if self.pattern is Pattern["2OF4"] and self.sparsity != 0.5:
                raise ValueError(f"CONFIG_PRUNE_SPARSITY = {self.sparsity} : CONFIG_PRUNE_PATTERN_2OF4 = y ends at 0.5")

    def ramp(self, total: int | None) -> Ramp | None:
        """The schedule in a budget of `total` steps, None under one of seconds.

        Raises ValueError if the ramp does not end after its begin and in the budget.
        """
        s = self.section
        if s.sparsity is None:
            return None
        fixed = s.ramp_by is RampBy.STEP
        end = s.ramp_step if fixed else None if total is None else int(s.ramp_fraction * total)
        if end is not None and not s.warmup < end <= (total or end):
            where = "RAMP_STEP" if fixed else "RAMP_FRACTION"
            misfits = end > (total or end)
            remedy = (
                f"set CONFIG_PRUNE_{where} to {total} or less" if misfits else f"lower it below {end}, or raise that"
            )
            raise ValueError(
                f"CONFIG_PRUNE_WARMUP = {s.warmup} : the ramp must end after it and within {total or 'all'} steps,"
                f" but CONFIG_PRUNE_{where} ends it at step {end}; {remedy}"
            )
        return Ramp(s.initial, s.sparsity, s.curve, s.warmup, s.interval, end, s.ramp_fraction)

    score_bytes = 0
    """Of what a method holds beside the mask, for each prunable weight."""

    def mask_bytes(self, network: nn.Module) -> int:
        """Of masks and scores over a network, which may be on the meta device; without the gaps of the arena."""
        s = self.section
        size = 0 if s.mask is None else sum(p.numel() for p in prunable(network, s).values())
        return (-(-size // 8) if s.mask is Store.BITS else size) + self.score_bytes * size

    @abstractmethod
    def build(self, network: nn.Module, optimizer: Any, total: int | None, seed: int) -> Pruner:
        """Called once per trial, with the network on its device, its optim.FlatOptimizer, and TRAIN_SEED.

        Raises ValueError as `ramp` does, or when the network has nothing to prune.
        """


def prunable(network: nn.Module, section: Any = None) -> dict[str, nn.Parameter]:
    """Weights of Linear and Conv2d by name, in the order of the model, but for those that the section leaves out; one
    that embeds only if the section has it `tied`."""
    layers = [m for m in network.modules() if isinstance(m, LAYERS)]
    kinds = {m.weight: isinstance(m, nn.Embedding) for m in layers}
    ties = {network.get_parameter(name) for name in network.ties.values()} if section and section.tied else set()
    convolutions = [m.weight for m in layers if isinstance(m, nn.Conv2d)]
    linear = [m.weight for m in layers if isinstance(m, nn.Linear)]
    spared = {*(convolutions[:1] if section and section.skip_first else ())}
    spared |= {*(linear[-1:] if section and section.skip_last else ())}
    named = ((n, p) for n, p in network.named_parameters() if p.requires_grad and p not in spared)
    return {n: p for n, p in named if kinds.get(p) is False or p in ties}


LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)
