# SPDX-License-Identifier: MIT
"""AdamW with spike-aware clipping and momentum resets (SPAM, Huang et al. 2025, https://arxiv.org/abs/2501.06842).

t step, D interval, W rewarm, G grace, Z spike_z; j = t mod D from the first reset on.  Profile `paper`:
    t mod D = 0:   m = v = 0; bias correction goes on
    from G on:     where g^2 > theta v:  g = sign(g) sqrt(theta v)
    phi = 1 - 0.495 (1 + cos(pi j / (W + 1))) while j < W, else 1
    w -= lr phi m^ / (sqrt(v^) + eps / sqrt(1 - b2^t));  w *= 1 - lr lam
Profile `lab`, c steps since the reset, so that bias correction restarts; a mended form of the additions that others
made:
    c > G:         the clip with v / (1 - b2^(c - 1)), where that is positive
    q = 1 if the norm after the clip exceeds mean + Z std of the last HISTORY, else 0
    m *= 1 - 0.5 q;  v *= 1 - 0.1 q;  x *= 1 - 0.1 q;  then AdamW, AMSGrad on x if asked for, at rate lr phi
    phi = max(1e-3, (1 - cos(pi j / W)) / 2) while j < W, else 1
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ablab.optim import Impl, Optim
from ablab.optim.adamw import FlatAdamW

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements clipped in one go: what stays in the cache of a core
MARGIN = 1 + 1e-5  # the search for spikes may see one that is none, but must not miss one by what it rounds
FEWEST = 10  # norms before one can be called a spike


class Profile(Enum):
    """Whose rule."""

    PAPER = "paper"
    LAB = "lab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """OPT_ADAMWSPAM_*."""

    profile: Profile
    beta1: float
    """Memory of the first moment."""
    beta2: float
    """Memory of the second moment."""
    eps: float
    """Added to the root of the second moment."""
    theta: float
    """Largest g^2 / v; 0 is off."""
    interval: int
    """Steps D between resets; 0 is off."""
    rewarm: int
    """Steps W over which the rate comes back after a reset."""
    grace: int
    """Steps G from the start and after a reset without clipping."""
    spike_z: float | None
    """Standard deviations above which a norm is a spike; 0 is off."""
    history: int | None
    """Norms that are remembered."""
    amsgrad: bool | None

    def __post_init__(self) -> None:
        if self.profile is Profile.PAPER and self.theta and self.grace < 2:
            raise ValueError(
                f"CONFIG_OPT_ADAMWSPAM_GRACE = {self.grace} : the first step would be clipped to nothing, for there is"
                " no second moment yet, and so would all others; set 2 or more"
            )
        if self.interval and 2 * self.rewarm > self.interval:
            raise ValueError(
                f"CONFIG_OPT_ADAMWSPAM_REWARM = {self.rewarm} : more than half of CONFIG_OPT_ADAMWSPAM_INTERVAL ="
                f" {self.interval} ; the rate must be back before the next reset"
            )


class FlatSpam(FlatAdamW):
    """Both profiles.  What depends on the step number is computed on the host, from the loop's number alone, but for
    the clip of groups that can rest.  NOTE eps of profile `paper` has the loop's number there too.
    """

    def __init__(self, groups: list[dict[str, Any]], c: Settings, impl: Impl) -> None:
        super().__init__(groups, c.beta1, c.beta2, c.eps, impl, bool(c.amsgrad))
        self.c, self.lab = c, c.profile is Profile.LAB
        weights, first = self.arena.weights, self.state[groups[0]["params"][0]]
        self.size = sum(p.numel() for g in groups for p in g["params"])
        # sums over the steps since the last row: clipped gradients, soft resets, phi, steps
        self.tally = first["tally"] = torch.zeros(4, dtype=torch.float64, device=weights.device)
        if c.history:
            self.norms = first["norms"] = torch.full((c.history,), torch.nan, device=weights.device)
        self.spikes, self.soft = self.tally.new_zeros(()), self.tally.new_zeros(())
        edge = CHUNK[weights.device.type]
        self.chunks = [
            [slice(a, min(a + edge, s.stop)) for a in range(s.start, s.stop, edge)] for s in self.arena.spans
        ]
        """Of each group."""
        self.scratch = [weights.new_empty(min(edge, len(weights))) for _ in range(2)]

    @property
    def since(self) -> int | None:
        """Steps since the last reset, 0 in that step; None before the first."""
        D = self.c.interval
        return self.number % D if D and self.number >= D else None

    @property
    def age(self) -> int:
        """Steps that the bias correction counts, this one included."""
        return self.since + 1 if self.lab and self.since is not None else self.number

    def limit(self) -> None:
        assert self.number, "the step number is needed"
        c = self.c
        self.spikes = self.tally.new_zeros(())
        if self.lab:
            on = self.age > c.grace
        else:
            on = self.number >= c.grace and (not c.interval or self.number % c.interval >= c.grace)
        if c.theta and on:
            v, lib = self.flats["exp_avg_sq"], self.compiled
            for group, chunks, s in zip(self.param_groups, self.chunks, self.arena.spans, strict=True):
                theta = self._theta(group)
                if lib:
                    part = self.arena.grads[s], v[s]
                    self.spikes += lib.clip(*part, s.start, self.pending, float(theta), MARGIN, self.lab)
                    continue
                self.spikes = sum((self._clip(self.arena.grads[s], v[s], theta) for s in chunks), self.spikes)

    def _theta(self, group: dict[str, Any]) -> Any:
        """Largest g^2 / v in a group.  One that can rest has a clock of its own, on the device: inf in its grace."""
        c, rests = self.c, "lam" in group
        seen = group["count"].double() if rests else self.age - 1  # steps behind v
        theta = c.theta / (1 - c.beta2**seen) if self.lab else c.theta
        return torch.where(seen + 1 >= c.grace + self.lab, theta, math.inf) if rests else theta

    def _clip(self, g: Tensor, v: Tensor, theta: Any) -> Tensor:
        """Clip a chunk of gradients; how many that were."""
        top, other = (t[: len(g)] for t in self.scratch)
        # most chunks hold no spike, and a CPU has nothing to wait for: one pass finds that out
        if not g.is_cuda and torch.addcmul(v, g, g, value=-MARGIN / float(theta), out=top).amin() >= 0:
            return self.tally.new_zeros(())
        torch.mul(v, theta, out=top).nan_to_num_(nan=math.inf, posinf=math.inf)  # 0 * inf is nan
        top.copy_((top if g.is_cuda else top.double()).sqrt())  # to the nearest fp32, which MKL does not give
        if self.lab:
            top.copy_(torch.where(top > 0, top, torch.inf))  # a coordinate that never moved may start
        inside = torch.clamp(g, torch.neg(top, out=other), top)
        torch.sub(g, inside, out=other)
        torch.add(inside, other, alpha=0, out=g)  # 0 * inf is nan: the gate must see it
        return torch.count_nonzero(other)

    @torch.no_grad()
    def gate(self, loss: Tensor, limit: float, number: int = 0) -> Tensor:
        norm = super().gate(loss, limit, number)
        if self.c.spike_z:
            n, h = norm.double(), self.norms.double()
            seen = h.isfinite().sum()
            mean = h.nansum() / seen
            std = ((h - mean).square().nansum() / seen).sqrt()
            self.soft = ((seen >= FEWEST) & (std > 0) & (n - mean > self.c.spike_z * std)).double()
            at = (number - 1) % len(self.norms)
            self.norms[at] = torch.where(self.found_inf.bool(), self.norms[at], norm)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        c, good = self.c, 1 - self.found_inf
        if self.since == 0:  # after the gate: a step that is refused resets nothing
            for state in self.flats.values():
                state.mul_(self.found_inf)
            for group in self.paces if self.lab else ():
                group["count"].mul_(group["found_inf"])
        self.tick()
        if c.spike_z and (self.soft.is_cuda or self.soft):  # a CPU has nothing to wait for
            for name, share in (("exp_avg", 0.5), ("exp_avg_sq", 0.1), ("max_exp_avg_sq", 0.1)):
                if name in self.flats:
                    self.flats[name].mul_((1 - share * self.soft * good).to(self.arena.weights))
        phi, rates = self._phi(), []
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            # torch decays before the update; the paper decays last, so there the update shrinks by the same factor
            keep = 1.0 if self.lab else max(1 - lr * decay, 1e-12)
            rates.append({"lr": lr * phi * keep, "weight_decay": decay / (phi * keep)})
        eps = c.eps if self.lab else c.eps / math.sqrt(1 - c.beta2**self.number)
        self.apply(rates, self.rule | {"eps": eps})
        now = torch.stack([self.spikes / self.size, self.soft, *self.tally.new_tensor([phi, 1.0])])
        self.tally.add_(now * good)

    def _phi(self) -> float:
        """Factor on the rate."""
        j, W = self.since, self.c.rewarm
        if j is None or j >= W:
            return 1.0
        if self.lab:
            return max(1e-3, (1 - math.cos(math.pi * j / W)) / 2)
        return 1 - 0.495 * (1 + math.cos(math.pi * j / (W + 1)))

    def gauges(self) -> dict[str, float]:
        spikes, soft, phi, steps = self.tally.tolist()
        self.tally.zero_()
        if not steps:
            return {}
        found = {"spike_frac": spikes / steps, "rewarm": phi / steps}
        return found | ({"soft_reset_frac": soft / steps} if self.lab else {})


class Adamwspam(Optim, symbol="OPT_ADAMWSPAM"):
    """Spikes are clipped, moments forgotten now and then."""

    Config = Settings

    @property
    def state_bytes(self) -> int:
        return 12 if self.config.amsgrad else 8

    def build(self, groups: list[dict[str, Any]]) -> FlatSpam:
        return FlatSpam(groups, self.config, self.section.impl)
