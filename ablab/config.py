# SPDX-License-Identifier: MIT
"""One trial's configuration, bound: an instance of every selected member and the TRAIN, EVAL, SYS sections."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ablab import kconf, plugin
from ablab.bind import bind


class Budget(Enum):
    """What ends a trial."""

    STEPS = "steps"
    TOKENS = "tokens"
    EPOCHS = "epochs"
    TIME = "time"


class Device(Enum):
    """Where a trial runs; AUTO is resolved before the first trial starts."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Switch(Enum):
    """torch.compile, whose AUTO is resolved before the first trial starts, and native kernels, where every AUTO has
    the same bits."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Amp(Enum):
    """Mixed precision; AUTO is resolved before the first trial starts."""

    AUTO = "auto"
    OFF = "off"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """How a trial trains (TRAIN_*)."""

    budget: Budget
    steps: int | None
    tokens: int | None
    epochs: int | None
    time: int | None
    """Seconds of training."""
    cap_time: int
    """Seconds of training after which the trial fails; 0 is off."""
    seed: int
    batch_effective: int
    """Samples in one optimizer step."""
    batch_micro: int
    """Samples in one forward pass; 0 until the campaign has resolved it."""
    log_steps: int
    """0: rows at evaluations only."""
    ckpt_interval: int
    ckpt_keep: int
    ckpt_best: bool
    ckpt_top: int
    ckpt_every: int
    ckpt_target: bool | None
    """Keep the checkpoint of the step at which pruning reached its target."""
    ckpt_sparse: bool | None
    """Zeros take a bit each."""
    stop_patience: int

    def __post_init__(self) -> None:
        if self.batch_micro and self.batch_effective % self.batch_micro:
            raise ValueError(
                f"CONFIG_TRAIN_BATCH_MICRO = {self.batch_micro} does not divide"
                f" CONFIG_TRAIN_BATCH_EFFECTIVE = {self.batch_effective} ; choose a divisor, or 0 for auto"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Eval:
    """How a trial is evaluated (EVAL_*)."""

    interval: int
    """Steps between evaluations; 0 is the end of every epoch."""
    test_each_epoch: bool | None
    """Measure on the test split at each evaluation, not at the end alone; None where there is no test split."""
    tokens: int | None
    """Validation tokens; 0 is the whole split, as for images."""
    entropy: bool | None
    """Watch the entropy of attention rows; None for a model without them."""
    kvprune: bool | None
    """Read with a cache that is pruned; None for a model without one."""
    kvprune_keep: int | None
    kvprune_recent: int | None

    def __post_init__(self) -> None:
        if self.kvprune and self.kvprune_keep < self.kvprune_recent + 2:
            raise ValueError(
                f"CONFIG_EVAL_KVPRUNE_KEEP = {self.kvprune_keep} must exceed CONFIG_EVAL_KVPRUNE_RECENT ="
                f" {self.kvprune_recent} by 2 or more: the first token stays and one must be able to go; set"
                f" {self.kvprune_recent + 2} or more"
            )

    def slots(self, length: int) -> int:
        """Tokens that the cache holds at a context of `length`."""
        return min(length, self.kvprune_keep) if self.kvprune else length


@dataclass(frozen=True, slots=True, kw_only=True)
class Sys:
    """What a trial runs on (SYS_*)."""

    device: Device
    compile: Switch
    amp: Amp
    tf32: bool
    cudnn_benchmark: bool | None
    deterministic: bool
    threads: int
    """CPU threads; 0 until the campaign has resolved it."""
    native: Switch
    """Compiled CPU kernels."""
    attend_chunk: int | None
    """None for a model without attention."""
    warmup_steps: int
    mem_fraction: float
    """Share of the free memory that a micro batch may fill when it is automatic."""
    price_per_hour: float
    """Of one device; 0 is unknown."""
    alloc_expandable: bool
    public_remote: str
    """Address of the public repository, empty for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that one trial is made of."""

    values: Mapping[str, Any]
    """Typed values of all visible symbols, in Kconfig order."""
    data: Any
    model: Any
    attention: tuple[Any, ...]
    mlp: tuple[Any, ...]
    optim: Any
    schedule: Any
    prune: Any
    train: Train
    eval: Eval
    sys: Sys


def create(family: str, values: Mapping[str, Any], where: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """Instances of the members of a family that `values` select, in Kconfig entry order."""

    def made(symbol: str) -> Any:
        cls = plugin.find(symbol)
        section = bind(cls.Section, family, values, where)
        member = cls(bind(cls.Config, symbol, values, where), section)
        if member.parent():
            member.base = made(member.parent())
        return member

    return tuple(made(symbol) for symbol in plugin.selected(family, values))


def load(values: Mapping[str, Any], where: Mapping[str, str] | None = None) -> RunConfig:
    """Bind typed values.  Raises BindError or PluginError, both ValueError, naming symbol and origin, and ValueError
    for a pruning ramp that does not fit the budget."""

    def one(family: str) -> Any:
        (member,) = create(family, values, where)
        return member

    cfg = RunConfig(
        values=values,
        data=one("DATA"),
        model=one("MODEL"),
        attention=create("ATTN", values, where),
        mlp=create("MLP", values, where),
        optim=one("OPT"),
        schedule=one("SCHED"),
        prune=one("PRUNE"),
        train=bind(Train, "TRAIN", values, where),
        eval=bind(Eval, "EVAL", values, where),
        sys=bind(Sys, "SYS", values, where),
    )
    cfg.prune.ramp(total_steps(cfg, cfg.train.batch_effective * cfg.model.length, None))  # raises if it misfits
    return cfg


def total_steps(cfg: RunConfig, tokens: int, samples: int | None) -> int | None:
    """Optimizer steps of the budget, each of `tokens` tokens; `samples` are those of an epoch.  None for seconds, and
    for epochs of data that is not there yet."""
    t = cfg.train
    if t.budget is Budget.TOKENS:
        return -(-(t.tokens or 0) // tokens)
    if t.budget is Budget.EPOCHS:
        return -(-(t.epochs or 0) * samples // t.batch_effective) if samples else None
    return t.steps


def read(path: Path) -> RunConfig:
    """The configuration in a resolved `.config` file, settled again from the text."""
    settled = kconf.settle(kconf.load(), [kconf.lex(path)])
    return load(settled.values, settled.where)
