# SPDX-License-Identifier: MIT
"""What a trial will need: memory and time, before it runs."""

import math
import time
from dataclasses import dataclass

import torch

from ablab.config import Amp, Device, RunConfig, total_steps
from ablab.data import DataError

# Dense peaks of one device from the makers' datasheets, 2026-11: TFLOP/s in bf16, in fp32 by TF32 where there is TF32.
# The first name that fits counts.  An MI250 is two devices: half of its datasheet.
PEAKS = {
    "H200": (989.0, 495.0),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 418.0),
    "H100": (989.0, 495.0),
    "B200": (2250.0, 1125.0),
    "A100": (312.0, 156.0),
    "A10G": (70.0, 35.0),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "RTX 4090": (165.0, 83.0),
    "RTX 3090": (71.0, 36.0),
    "MI300X": (1307.0, 654.0),
    "MI250X": (191.5, 47.9),
    "MI250": (181.0, 45.3),
    "W7900": (123.0, 61.0),
}
GIB = 1 << 30
BASE_GIB = (0.3, 0.8)  # of a process: torch on a CPU; torch and a CUDA context
MEM_BAND = (1.0, 1.15, 1.5)  # allocator slack and what backward holds for a moment, as factors
TIME_BAND = ((0.85, 0.7), (0.65, 1.0), (0.4, 2.0))  # share of the peak that products reach; factor on dispatch
DISPATCH_S = 5e-4  # seconds of a block, forward and backward, that no size of the model takes away


def peak(cfg: RunConfig, device: torch.device) -> float | None:
    """FLOP/s that MFU refers to: measured on a CPU, from the datasheet on a GPU, None for one that is not listed."""
    half = cfg.sys.amp is Amp.BF16
    if device.type == "cpu":
        return gemm_rate(torch.bfloat16 if half else torch.float32)
    found = listed(torch.cuda.get_device_name(device))
    return found[0 if half else 1] * 1e12 if found and (half or cfg.sys.tf32) else None


def listed(name: str) -> tuple[float, float] | None:
    """TFLOP/s in bf16 and in fp32 of the GPU that torch calls `name`."""
    return next((rates for key, rates in PEAKS.items() if key in name), None)


def gemm_rate(dtype: torch.dtype, size: int = 512, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product on the CPU with the present number of threads."""
    a, best = torch.full((size, size), 0.5, dtype=dtype), math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes by item, and low, likely, high of the whole; hours are None where no peak is known."""

    items: dict[str, int]
    mem_gib: tuple[float, float, float]
    hours: tuple[float, float, float] | None
    steps: int | None


def forecast(cfg: RunConfig, n_vocab: int | None, samples: int | None, rate: float | None) -> Forecast:
    """What a trial will need.  Weights, gradients and optimizer state are exact, and activations are what a forward
    keeps for backward, both from tensors without memory.  `samples` are those of an epoch, None as long as there is
    no prepared data; `rate` is `peak`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: it imports sympy, one second

    t, c = cfg.train, cfg.model.config
    # not the meta device: attention there takes a path that keeps T x T
    with FakeTensorMode():
        network = cfg.model.build(cfg.attention, cfg.mlp, t.seed, n_vocab)
        kept = _kept(cfg, network, torch.zeros(t.batch_micro, c.block, dtype=torch.long))
    weights = sum(p.nbytes for p in network.parameters())
    state = cfg.optim.state_bytes * sum(p.numel() for p in network.parameters())
    items = {"weights": weights, "gradients": weights, "optimizer": state, "activations": kept}
    exact, base = sum(items.values()), BASE_GIB[cfg.sys.device is Device.CUDA]
    mem = tuple(exact * factor / GIB + base for factor in MEM_BAND)
    tokens = t.batch_effective * c.block
    steps = total_steps(cfg, tokens, samples)
    if rate is None or (steps is None and not t.time):
        return Forecast(items, mem, None, steps)
    if steps is None:
        hours = (t.time or 0) / 3600
        return Forecast(items, mem, (hours, 1.1 * hours, 1.3 * hours), steps)
    flops = network.flops_per_token(c.block)
    evaluated = (steps // cfg.eval.interval + 2) * cfg.eval.tokens / 3  # forward is a third
    trained = steps * tokens + evaluated
    passes = trained / (t.batch_micro * c.block) + (evaluated / t.batch_micro if cfg.eval.kvprune else 0)
    calls = passes * (DISPATCH_S * (c.layers + 1))
    hours = tuple((flops * trained / rate / share + calls * slow) / 3600 for share, slow in TIME_BAND)
    return Forecast(items, mem, hours, steps)


def _kept(cfg: RunConfig, network: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes that one forward keeps for backward, weights apart."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(t)  # a freed storage would give its address to the next
        return t

    alive: list[torch.Tensor] = []
    half = cfg.sys.amp is Amp.BF16
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, half):
        network(ids, ids)
    return sum(kept.values())


def here(cfg: RunConfig) -> Forecast:
    """The forecast of a resolved configuration on this machine."""
    device = torch.device("cuda" if cfg.sys.device is Device.CUDA and torch.cuda.is_available() else "cpu")
    known = device.type == "cuda" or cfg.sys.device is Device.CPU
    try:
        vocab = cfg.data.manifest()["tokenizer"]["vocab"]
        samples = cfg.data.samples("train", cfg.model.config.block)
    except DataError:  # sizes are known without it, and a forecast comes before the download
        vocab = samples = None
    if known and device.type == "cpu":
        torch.set_num_threads(cfg.sys.threads)
    return forecast(cfg, vocab, samples, peak(cfg, device) if known else None)
