# SPDX-License-Identifier: MIT
"""What a row is made of: clocks that add up, losses and gradient norms since the last row, without a sync per step."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ablab.evaluate import perplexity

CLOCKS = (
    "startup",
    "compile",
    "warmup",
    "data",
    "fwd_bwd",
    "optimizer",
    "prune",
    "eval",
    "checkpoint",
    "other",
)
TRAINING = ("fwd_bwd", "optimizer", "prune")
"""Clocks that count as training: those of a time budget."""
FOLD = 4096  # device scalars held before they are read


class Clocks:
    """Seconds by activity; exactly one clock runs, so they add up to the whole."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(CLOCKS, 0.0)
        self.running, self.since = "startup", time.perf_counter()

    def to(self, name: str) -> None:
        """Stop the running clock and start another."""
        now = time.perf_counter()
        self.spent[self.running] += now - self.since
        self.running, self.since = name, now

    def total(self) -> float:
        """Seconds of everything, up to now."""
        self.to(self.running)
        return sum(self.spent.values())

    def training(self) -> float:
        """Seconds of training, without what runs now."""
        return sum(self.spent[name] for name in TRAINING)


class Work(NamedTuple):
    """What one optimizer step is."""

    samples: int
    tokens: int
    flops: float
    peak: float | None
    """FLOP/s of the device; None if unknown."""
    epoch: int
    """Samples in one pass over the training split."""
    clip: float
    """Norm above which gradients are clipped; 0 is off."""

    def epochs(self, step: int) -> int:
        """Whole passes over the training split in so many steps."""
        return step * self.samples // self.epoch


class Window:
    """The steps since the last row."""

    def __init__(self, accum: int) -> None:
        self.accum = accum
        self.raw: list[Tensor] = []
        """On the device: the losses of the micro batches of a step, its gradient norm, and what `add` got more."""
        self.width = accum + 1
        """Entries of a step in it."""
        self.hits: list[float] = []
        """Right answers of each step, where a model counts them."""
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.step, self.epoch = 0, 0
        self.clocks = dict.fromkeys(CLOCKS, 0.0)
        """Where the clocks stood at the last row."""
        self.upto: dict[str, float] = {}
        """Where they stood at this one, where the next window begins; empty before `measures`."""
        self.epoch_s = 0.0
        """Seconds of training and data at the last end of an epoch."""

    def add(self, losses: list[Tensor], norm: Tensor, hits: Tensor | None = None) -> None:
        """One step; `hits` are the right answers in all its micro batches."""
        entries = [*losses, norm] if hits is None else [*losses, norm, hits]
        self.width = len(entries)
        self.raw += entries
        if len(self.raw) > FOLD:
            self.read()

    def read(self) -> int | None:
        """Fetch what is still on the device; returns the first step that was not finite."""
        on_host = not self.raw or self.raw[0].is_cpu  # one by one is faster there; elsewhere each is a sync
        values = [t.item() for t in self.raw] if on_host else torch.stack(self.raw).tolist()
        self.raw.clear()
        for i in range(0, len(values), self.width):
            self.losses.append(math.fsum(values[i : i + self.accum]) / self.accum)
            self.norms.append(values[i + self.accum])
            self.hits += values[i + self.accum + 1 : i + self.width]
        pairs = enumerate(zip(self.losses, self.norms, strict=True), self.step + 1)
        return next((i for i, pair in pairs if not all(map(math.isfinite, pair))), None)

    def measures(self, step: int, clocks: Clocks, work: Work) -> dict[str, float]:
        """Metrics of the window, after `read`; its clocks are differences, so that they add up over rows."""
        clocks.total()
        self.upto = dict(clocks.spent)
        d = {name: self.upto[name] - self.clocks[name] for name in CLOCKS}
        m = {f"time/{name}_s": s for name, s in d.items() if s}
        train_s, steps = sum(d[name] for name in TRAINING), step - self.step
        if not steps or not self.norms:
            return m
        loss, count = math.fsum(self.losses) / len(self.losses), len(self.norms)
        m["train_loss"] = loss
        if self.hits:
            m["train_accuracy"] = 100 * math.fsum(self.hits) / (count * work.tokens)
        else:
            m["train_perplexity"] = perplexity(loss)
        m |= {"grad_norm": math.fsum(self.norms) / count, "grad_norm_max": max(self.norms)}
        m["grad_clip_frac"] = sum(n > work.clip for n in self.norms) / count if work.clip else 0.0
        m |= {
            "train/tok_per_sec": steps * work.tokens / train_s,
            "train/samples_per_sec": steps * work.samples / train_s,
        }
        m |= {"train/step_s": train_s / steps, "time/data_pct": 100 * d["data"] / (d["data"] + train_s)}
        if work.peak:
            m["train/mfu"] = steps * work.flops / train_s / work.peak
        epochs = work.epochs(step) - self.epoch
        if epochs:
            m["time/epoch_s"] = (clocks.training() + clocks.spent["data"] - self.epoch_s) / epochs
        return m

    def next(self, step: int, clocks: Clocks, work: Work) -> "Window":
        """The window that begins here."""
        new = Window(self.accum)
        new.step, new.clocks, new.epoch_s = step, self.upto or dict(clocks.spent), self.epoch_s
        new.epoch = work.epochs(step)
        if new.epoch > self.epoch:
            new.epoch_s = clocks.training() + clocks.spent["data"]
        return new

    def state(self) -> dict[str, Any]:
        """What `restore` takes, after `read`."""
        names = ("losses", "norms", "hits", "step", "epoch", "clocks", "epoch_s")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
