# SPDX-License-Identifier: MIT
"""Flat storage: weights, gradients and state of all parameters as one buffer each, with a view for each parameter.

A step over a few long buffers is a few kernels, whatever the number of tensors; clipping, zeroing and a later
all-reduce are one each.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ablab.tensor import native
from ablab.tensor.native import ROW, Keep

ALIGN = 64  # elements: 256 bytes, what a CUDA allocation guarantees and what vectorised kernels want


class Arena:
    """Moves the parameters of all groups into one buffer and gives them gradients in another.

    NOTE from then on `p.data` and `p.grad` are views: assigning either breaks the tie, so gradients are zeroed and
    never set to None.  Gaps between parameters are zero and stay zero under any elementwise update.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        sets: list[list[nn.Parameter]] = [g["params"] for g in groups]
        params = [p for s in sets for p in s]
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in params]
        starts = list(accumulate(sizes, initial=0))
        ends = list(accumulate((len(s) for s in sets), initial=0))
        self._at = dict(zip(params, starts, strict=False))
        self.weights = torch.zeros(starts[-1], dtype=params[0].dtype, device=params[0].device)
        self.grads = self.weights.new_zeros(-(-starts[-1] // ROW) * ROW)  # whole rows
        self.spans = [slice(starts[a], starts[b]) for a, b in pairwise(ends)]
        """What each group occupies."""
        for p in params:
            self.view(self.weights, p).copy_(p.data)
            p.data = self.view(self.weights, p)
            p.grad = self.view(self.grads, p)

    def span(self, p: nn.Parameter) -> slice:
        """What a parameter occupies."""
        return slice(self._at[p], self._at[p] + p.numel())

    def view(self, flat: Tensor, p: nn.Parameter) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in its shape."""
        return flat[self.span(p)].view(p.shape)


class FlatOptimizer(torch.optim.Optimizer):
    """Base of optimizers over an Arena; `state[p]` holds views, so state is saved by parameter name.

    One step is `gate`, `step`, `zero_grad`.  Beside torch's own keys each group has two, and `step` obeys both:
    `found_inf`, 1 if it must leave weights and state of the group alone, and `count`, the steps applied to the group,
    which `tick` moves.  A group with `lam`, the coupling strength, rests while that is 0: nothing decays, moments and
    count stand still, so bias correction starts at its own first step, as torch does for a gradient of None.
    """

    grad_scale: Tensor | None = None
    """Divides the gradients in `step`."""
    found_inf: Tensor | None = None
    """1 if `step` must change nothing; both are torch's own names for what its fused optimizers read."""
    number = 0
    """Of the step; set by `gate`."""
    pending: Keep | None = None
    """What `gate`, `limit` and `step` take gradients under, where they do that while they read them."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.arena = Arena(groups)
        self.flats: dict[str, Tensor] = {}
        """State buffers in the layout of the arena, by name."""
        super().__init__(groups, {})
        self.count, own = (torch.zeros((), device=self.arena.weights.device) for _ in range(2))
        for group in self.param_groups:
            group |= {"count": own if "lam" in group else self.count, "found_inf": None}
            self.state.update({p: {"step": group["count"]} for p in group["params"]})
        self.resting = [g for g in self.param_groups if "lam" in g]
        self.paces = list({id(g["count"]): g for g in self.param_groups}.values())
        """A group for each count."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # not torch's: it imports dynamo, one second, and checks what build.py has checked
        self.param_groups.append(param_group)

    def _patch_step_function(self) -> None:
        """Not torch's, which wraps `step` for its profiler and costs 6 us a step."""

    def zeros(self, name: str, part: slice | None = None) -> Tensor:
        """A zeroed flat buffer over a part of the arena, whose views are the state `name` of the parameters in it."""
        part = slice(0, len(self.arena.weights)) if part is None else part
        flat = self.flats[name] = torch.zeros_like(self.arena.weights[part])
        for p in (p for g in self.param_groups for p in g["params"]):
            at = self.arena.span(p)
            if part.start <= at.start < part.stop:
                self.state[p][name] = flat[at.start - part.start : at.stop - part.start].view(p.shape)
        return flat

    def mask(self, mask: Any) -> None:
        """Zero the gradients that a prune._mask.Mask drops; called before `gate`."""
        mask.apply(self.arena.grads)

    @torch.no_grad()
    def gate(self, loss: Tensor, limit: float, number: int = 0) -> Tensor:
        """The global gradient norm, on the device.  Called once per step, before `step`.

        Sets the clip to norm `limit` (0: none), and makes `step` a no-op if loss or norm is not finite.  `number` is
        that of the step, first 1, for optimizers that have a period.
        """
        self.number = number
        self.limit()
        # of rows first: the norm of 124 million in one fp32 sum is 1.5 % too small on a CPU
        grads = self.arena.grads
        if self.pending and (lib := native.on(grads)):
            rows = lib.norms(grads, self.pending)
        else:
            rows = torch.linalg.vector_norm(grads.view(-1, ROW), dim=1)
        norm = torch.linalg.vector_norm(rows)
        # g / max(1, (n + 1e-6) / C) is g * min(1, C / (n + 1e-6)), as in torch.nn.utils.clip_grad_norm_
        self.grad_scale = ((norm + 1e-6) / limit).clamp_(min=1.0) if limit else None
        self.found_inf = (norm + loss).mul_(0).ne_(0).float()  # 0 * inf and 0 * nan are nan, which is not 0
        for group in self.param_groups:
            group["found_inf"] = self.found_inf
        for group in self.resting:  # on the device: the host may not know the strength
            group["found_inf"] = torch.maximum(self.found_inf, group["lam"].eq(0).float())
        return norm

    def tick(self) -> None:
        """Count the step in every group that takes it; the first thing that `step` does."""
        for group in self.paces:
            group["count"].add_(1)
            if group["found_inf"] is not None:
                group["count"].sub_(group["found_inf"])

    def limit(self) -> None:
        """Change the gradients before their norm is taken; what is not finite stays so.  Here: nothing."""

    def gauges(self) -> dict[str, float]:
        """Means over the steps since the last call, by name; called when a row is written."""
        return {}

    def divisor(self, fused: bool) -> Tensor | None:
        """What a fused kernel divides gradients by, fp32 as it reads it; for other kernels they are divided here."""
        if self.grad_scale is not None and not fused:
            self.arena.grads.div_(self.grad_scale)
        return self.grad_scale.float() if self.grad_scale is not None and fused else None

    @contextmanager
    def gated(self, group: dict[str, Any], *changed: list[Tensor]) -> Iterator[None]:
        """Around an update to which torch gives no gate: what it changed is taken back if the group must not move."""
        tensors = [t for some in changed for t in some]
        before = [t.clone() for t in tensors]
        yield
        if group["found_inf"] is not None:
            for tensor, kept in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(group["found_inf"].bool(), kept, tensor))

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients; NOTE they cannot be None, whatever is asked for."""
        self.arena.grads.zero_()
        self.pending = None
