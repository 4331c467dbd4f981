# SPDX-License-Identifier: MIT
"""The coupling schedule: how strongly mechanisms act, from nothing to all that they are."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

NEVER = 1 << 62  # a step that no trial reaches


class Onset(Enum):
    """What starts the ramp."""

    CONSTANT = "constant"
    RAMP = "ramp"
    VARIANCE = "variance"


class Strength:
    """lam, a function of the steps that are done, kept in a 0-d tensor in place.  Owned by the loop.

    CONSTANT: 1, and no work.  RAMP: clamp((step - START) / STEPS, 0, 1); STEPS = 0 jumps to 1.  VARIANCE: the same
    from the first step >= START on at which std / mean of the last WINDOW losses is below CV, or from DEADLINE.
    Losses, onset and strength stay on the device: no step waits for it.
    """

    def __init__(self, section: Any, lam: Tensor) -> None:
        self.section, self.lam = section, lam
        self.held: dict[str, Tensor] = {}
        """What a checkpoint must hold beside lam: `onset`, the step at which the ramp starts, `losses`, a ring."""
        if not section.ramps:
            return
        waits = section.coupling is Onset.VARIANCE
        self.held["onset"] = torch.tensor(NEVER if waits else section.coupling_start, device=lam.device)
        if waits:
            self.held["losses"] = torch.zeros(section.coupling_window, device=lam.device)
        self._set(0)

    def update(self, step: int, losses: Sequence[Tensor]) -> None:
        """Called after each optimizer step; `step` are done, the last one had these losses of micro batches."""
        if not self.held:
            return
        if "losses" in self.held:
            self._watch(step, sum(losses[1:], losses[0]) / len(losses))
        self._set(step)

    def _watch(self, step: int, loss: Tensor) -> None:
        s, onset, ring = self.section, self.held["onset"], self.held["losses"]
        ring[(step - 1) % len(ring)] = loss
        if step >= max(s.coupling_start, len(ring)):
            std, mean = torch.std_mean(ring, correction=0)
            onset.copy_(torch.where(std < s.coupling_cv * mean, onset.clamp(max=step), onset))
        if 0 < s.coupling_deadline <= step:
            onset.clamp_(max=step)

    def _set(self, step: int) -> None:
        since, steps = step - self.held["onset"], self.section.coupling_steps
        self.lam.copy_((since / steps).clamp_(0, 1) if steps else since >= 0)

    def state(self) -> dict[str, Any]:
        """What `restore` takes; lam itself is a buffer of the model."""
        return {name: tensor.tolist() for name, tensor in self.held.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self.held.items():
            tensor.copy_(torch.tensor(state[name]))
