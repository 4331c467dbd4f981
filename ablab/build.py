# SPDX-License-Identifier: MIT
"""Configuration to running parts: settings in force, model, parameter groups, optimizer."""

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ablab import model
from ablab.config import Amp, Device, RunConfig, Switch
from ablab.optim import MATRIX
from ablab.optim._flat import FlatOptimizer
from ablab.plugin import Plugin
from ablab.rundir import RunError
from ablab.tensor import kernel, native
from ablab.tensor.cache import Pruned
from ablab.tensor.rowstat import RowEntropy
from ablab.tensor.stage import Gauges, Past, coupled

TRIM, MMAP_ABOVE = -1, -3  # mallopt parameters, <malloc.h>


class DeviceError(RunError):
    """The device that a trial asks for is not there."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready to train."""

    model: model.Network
    optimizer: FlatOptimizer
    groups: dict[str, int]
    """Elements of each parameter group."""
    params: int
    trainable: int
    length: int
    """Targets of a training sample: tokens of a sequence, 1 for an image."""
    n_vocab: int
    """Classes that exist: token ids for text."""
    fingerprint: str
    flops_per_token: int


def members(cfg: RunConfig) -> tuple[Plugin, ...]:
    """All members that a trial is made of, in pipeline order."""
    return (cfg.data, cfg.model, *cfg.attention, *cfg.mlp, cfg.optim, cfg.schedule, cfg.prune)


def resolved(cfg: RunConfig) -> None:
    """Raises ValueError if something is left to the machine: a campaign decides that once, for all its trials."""
    s = cfg.sys
    left = {
        "SYS_DEVICE_AUTO": s.device is Device.AUTO,
        "SYS_COMPILE_AUTO": s.compile is Switch.AUTO,
        "SYS_AMP_AUTO": s.amp is Amp.AUTO,
        "SYS_THREADS=0": s.threads == 0,
        "TRAIN_BATCH_MICRO=0": cfg.train.batch_micro == 0,
    }
    if auto := [f"CONFIG_{name}" for name, is_left in left.items() if is_left]:
        raise ValueError(f"{' '.join(auto)}: not decided; start the trial by make, or set plain values")


def cache(cfg: RunConfig) -> Past:
    """An empty cache of keys and values for evaluation and sampling."""
    e = cfg.eval
    return Pruned(e.kvprune_keep, e.kvprune_recent) if e.kvprune else Past(cfg.model.config.block)


def gauges(cfg: RunConfig) -> Gauges | None:
    """What an evaluation watches besides the gauges of parts."""
    return RowEntropy() if cfg.eval.entropy else None


def settle_system(cfg: RunConfig) -> torch.device:
    """Put the SYS_* settings in force in this process and seed it; returns the device.  Raises DeviceError and
    NativeError."""
    resolved(cfg)
    if cfg.sys.device is Device.CUDA and not torch.cuda.is_available():
        raise DeviceError("CONFIG_SYS_DEVICE_CUDA=y: torch sees no device; see make doctor")
    torch.set_num_threads(cfg.sys.threads)
    if cfg.sys.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on CUDA
        torch.use_deterministic_algorithms(True)
    keep_blocks()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(cfg.train.seed)
    device = torch.device("cpu") if cfg.sys.device is Device.CPU else torch.device("cuda", 0)
    if device.type == "cuda":
        _settle_cuda(cfg)
    half = [torch.bfloat16] if cfg.sys.amp is Amp.BF16 else []
    if cfg.attention:
        kernel.settle(device, cfg.sys.attend_chunk, [torch.float32, *half])
    native.settle(device.type == "cpu" and cfg.sys.native is not Switch.OFF, cfg.sys.native is Switch.ON)
    return device


def keep_blocks() -> None:
    """Big blocks stay in the process: mapping and clearing them anew costs 1 to 7 % of a step."""
    for option, value in ((MMAP_ABOVE, 32 << 20), (TRIM, 1 << 30)):  # 32 MiB is the most that glibc takes
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(option, value)


def _settle_cuda(cfg: RunConfig) -> None:
    if cfg.sys.alloc_expandable:
        # the name for all devices where torch has it; the other one warns there
        every = hasattr(torch._C, "_accelerator_setAllocatorSettings")
        setting = torch._C._accelerator_setAllocatorSettings if every else torch.cuda.memory._set_allocator_settings
        setting("expandable_segments:True")
    torch.set_float32_matmul_precision("high" if cfg.sys.tf32 else "highest")
    torch.backends.cudnn.benchmark = bool(cfg.sys.cudnn_benchmark)


def precision(cfg: RunConfig, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass; can be entered again and again."""
    return torch.autocast(device.type, torch.bfloat16) if cfg.sys.amp is Amp.BF16 else nullcontext()


def build(cfg: RunConfig, device: torch.device, n_vocab: int | None = None) -> Built:
    """Model and optimizer of a trial on a device, initialised from TRAIN_SEED.

    `n_vocab` classes exist, None: as many as the data set has.  Raises ValueError when the configuration fits no
    model.
    """
    n_vocab = n_vocab or cfg.data.classes
    network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, n_vocab)
    fingerprint = model.fingerprint(network)
    network.to(device)
    groups = grouped(cfg, network)
    counts = sizes(groups)
    params = list(network.parameters())
    trainable = sum(p.numel() for p in params if p.requires_grad)
    assert sum(counts.values()) == trainable, f"groups hold {counts}, the model {trainable}"
    return Built(
        model=network,
        optimizer=cfg.optim.build(groups),
        groups=counts,
        params=sum(p.numel() for p in params),
        trainable=trainable,
        length=cfg.model.length,
        n_vocab=n_vocab,
        fingerprint=fingerprint,
        flops_per_token=network.flops_per_token(cfg.data.extent(cfg.model.length)),
    )


def grouped(cfg: RunConfig, network: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups of a trial."""
    rule, apart = cfg.optim.section, cfg.optim.matrix_bytes is not None
    return split(network, rule.weight_decay, rule.decay_embed, cfg.schedule.section.ramps, apart)


def split(
    network: nn.Module, weight_decay: float, decay_embed: bool, rests: bool = False, apart: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups `decay`, `plain` and `matrix`, each trainable tensor in one, in the order of the model.

    A tensor decays if it has two or more axes, is no embedding (unless `decay_embed`), and no module names it in
    NO_DECAY.  A head tied to an embedding is that tensor.  Of those that decay, weights of Linear and Conv2d that are
    no embeddings are `matrix` if kept `apart`.  `rests`: parameters of coupled parts are in groups of their own,
    `coupled_decay` and so on, with the tensor `lam` by which an optimizer sees that they rest.
    """
    modules = list(network.modules())
    spared = {id(p) for m in modules for p in _spared(m, decay_embed)}
    linear = {id(m.weight) for m in modules if isinstance(m, nn.Linear | nn.Conv2d)}
    linear -= {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    resting = {id(p) for p in coupled(network)} if rests else set()
    kinds = ("decay", "plain", "coupled_decay", "coupled_plain", MATRIX, f"coupled_{MATRIX}")  # matrices last
    named: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for p in network.parameters():  # walks each tensor once
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in spared
            kind = MATRIX if decays and apart and id(p) in linear else "decay" if decays else "plain"
            named[f"coupled_{kind}" if id(p) in resting else kind].append(p)
    groups: list[dict[str, Any]] = []
    for name, params in ((n, ps) for n, ps in named.items() if ps):
        rate = 0.0 if name.endswith("plain") else weight_decay
        lam = {"lam": network.lam} if name.startswith("coupled") else {}
        groups.append({"name": name, "params": params, "weight_decay": rate, "lr": 0.0, **lam})
    seen = [id(p) for g in groups for p in g["params"]]
    assert len(seen) == len(set(seen)), "a tensor is in two groups"
    return groups


def sizes(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Elements of each parameter group."""
    return {g["name"]: sum(p.numel() for p in g["params"]) for g in groups}


def _spared(module: nn.Module, decay_embed: bool) -> Iterator[nn.Parameter]:
    if isinstance(module, nn.Embedding) and not decay_embed:
        yield module.weight
    yield from (module.get_parameter(n) for n in getattr(module, "NO_DECAY", ()))
