# SPDX-License-Identifier: MIT
"""What a trial will need: memory and time, before it runs."""

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ablab import build, config, machine
from ablab.config import Amp, Device, RunConfig, Switch, total_steps
from ablab.data import DataError
from ablab.machine import USABLE, Gpu, banded, listed

GIB = 1 << 30
EXACT = ("weights", "gradients", "optimizer", "masks")
BASE_GIB = (0.3, 0.8)  # of a process: torch on a CPU; torch and a CUDA context
MEM_BAND = (1.0, 1.1, 1.4)  # allocator slack, as factors
COMPILED = 0.6  # a compiled graph keeps less for backward: of the activations, in the low estimate
TIME_BAND = ((0.85, 0.7), (0.65, 1.0), (0.4, 2.0))  # share of the peak that products reach; factor on dispatch
PACE_BAND = (1.0, 1.4, 2.5)  # on the fastest pass: alone on the machine, with data and update beside it, among others
PACE_S = 0.5  # of a pass that is measured, about, at most
FITS_IN = statistics.NormalDist()
SIDE = FITS_IN.inv_cdf(0.9)  # low and high are where one of ten falls below and above
START_S = (0.3, 0.8, 3.0)  # of a process, until its first step
SAVE_S = (0.01, 0.04, 0.2)  # of a checkpoint, its bytes apart
COMPILE_S = (15.0, 40.0, 180.0)
DISPATCH_S = 5e-4  # seconds of a block, forward and backward, that no size of the model takes away


def peak(cfg: RunConfig, device: torch.device) -> float | None:
    """FLOP/s that MFU refers to: measured on a CPU, from the datasheet on a GPU, None for one that is not listed."""
    half = cfg.sys.amp is Amp.BF16
    if device.type == "cpu":
        return gemm_rate(torch.bfloat16 if half else torch.float32)
    found = listed(torch.cuda.get_device_name(device))
    return found[0 if half else 1] * 1e12 if found and (half or cfg.sys.tf32) else None


def present() -> Gpu:
    """The first GPU of this machine, with the memory that torch sees."""
    found = listed(torch.cuda.get_device_name(0)) or Gpu(0.0, 0.0, 0, 0, 0)
    return found._replace(gib=torch.cuda.get_device_properties(0).total_memory / GIB / USABLE)


def gemm_rate(dtype: torch.dtype, size: int = 512, repeats: int = 8) -> float:
    """FLOP/s of a square matrix product on the CPU with the present number of threads."""
    a, best = torch.full((size, size), 0.5, dtype=dtype), math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def pace(cfg: RunConfig, rate: float) -> float:
    """Seconds of an image, forward and backward, on the CPU at the micro batch, or less of it where that takes long.

    Measured, for convolutions of few channels, normalisation and pooling move bytes far below the `rate` of products.
    """
    names = [n for n in cfg.values if n.startswith(("MODEL_", "DATA_AUGMENT_RESIZE", "SYS_AMP", "SYS_THREADS"))]
    key = (cfg.train.batch_micro, *((n, cfg.values[n]) for n in names))
    if key not in _paces:
        _paces[key] = _pace(cfg, rate)
    return _paces[key]


_paces: dict[Any, float] = {}


def _pace(cfg: RunConfig, rate: float) -> float:
    network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, cfg.data.classes)
    image_s = network.flops_per_token(cfg.data.extent(cfg.model.length)) / rate
    size = max(1, min(cfg.train.batch_micro, int(PACE_S / image_s)))
    batch = cfg.data.noise(size, cfg.model.length, cfg.data.classes, torch.Generator().manual_seed(0))
    took = []
    for _ in range(4):  # the first also lays out memory
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, cfg.sys.amp is Amp.BF16):
            loss = network(batch.x, batch.y).loss
        loss.backward()
        took.append(time.perf_counter() - start)
    return min(took) / size


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes by item, and low, likely, high of the whole; hours are None where no peak is known."""

    items: dict[str, int]
    mem_gib: tuple[float, ...]
    hours: tuple[float, ...] | None
    steps: int | None
    flops: float
    """Of forward and backward, per token."""

    @property
    def exact_gib(self) -> float:
        """What no estimate may fall below."""
        return sum(self.items[k] for k in EXACT) / GIB


def memory(cfg: RunConfig, n_vocab: int | None, micro: int | None = None) -> Forecast:
    """What a trial will hold, at its micro batch or another.

    Weights, gradients, optimizer state and masks are exact.  Activations are what a forward keeps for backward, from
    tensors without memory; blocks between the first and the last are alike, so two and three tell of any number.
    """
    micro, name = micro or cfg.train.batch_micro, "MODEL_GPT_LAYERS"
    n_vocab = n_vocab or cfg.data.classes
    with torch.device("meta"):
        network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, n_vocab)
    weights, layers = sum(p.nbytes for p in network.parameters()), cfg.values.get(name, 0)
    if layers > 3:
        less, more = (_kept(config.load({**cfg.values, name: n}), n_vocab, micro) for n in (2, 3))
        kept, largest = more[0] + (layers - 3) * (more[0] - less[0]), more[1]
    else:
        kept, largest = _kept(cfg, n_vocab, micro)
    state = cfg.optim.claimed(build.sizes(build.grouped(cfg, network)))
    items = {"weights": weights, "gradients": weights, "optimizer": state, "activations": kept}
    items["masks"] = cfg.prune.mask_bytes(network)
    items["backward"] = 2 * largest  # the loss's gradients, as large as what they belong to, before anything is freed
    exact, base = sum(items.values()), BASE_GIB[cfg.sys.device is Device.CUDA]
    low = exact - (1 - COMPILED) * kept if cfg.sys.compile is Switch.ON else exact
    mem = tuple(size * factor / GIB + base for size, factor in zip((low, exact, exact), MEM_BAND, strict=True))
    return Forecast(items, mem, None, None, network.flops_per_token(cfg.data.extent(cfg.model.length)))


def chance(mem_gib: Sequence[float], room: float) -> float:
    """Probability that a need stays below `room`: log-normal on each side of likely."""
    low, likely, high = mem_gib
    side = math.log(high / likely if room >= likely else likely / low)
    return FITS_IN.cdf(SIDE * math.log(room / likely) / side) if side else float(room >= likely)


def verdict(cfg: RunConfig, n_vocab: int | None, found: Forecast, gpu: Gpu, band: Sequence[float] = (1.0,) * 3) -> str:
    """Whether that fits into a GPU, and how probably; if it may not, with the largest micro batch that likely does, at
    equal effective batch.  `band` is what earlier trials there teach of likely."""
    room = USABLE * gpu.gib
    low, likely, high = found.mem_gib
    text = f"{low:.1f} / {likely:.1f} / {high:.1f} GiB of {room:.1f}, probability {chance(found.mem_gib, room):.2f}"
    if likely <= room:
        return f"fits: {text}" if high <= room else f"likely fits: {text}"
    now, whole = cfg.train.batch_micro, cfg.train.batch_effective
    smaller = [n for n in range(now - 1, 0, -1) if whole % n == 0]
    fix = next((n for n in smaller if band[1] * memory(cfg, n_vocab, n).mem_gib[1] <= room), None)
    advice = f"CONFIG_TRAIN_BATCH_MICRO={fix} fits" if fix else "no micro batch fits"
    return f"{'does not fit' if low > room else 'may not fit'}: {text}; {advice}"


def forecast(
    cfg: RunConfig,
    n_vocab: int | None,
    samples: int | None,
    rate: float | None,
    gbs: float | None = None,
    evaluated: int = 0,
    image_s: float | None = None,
) -> Forecast:
    """What a trial will need.  `samples` are those of an epoch, None as long as there is no prepared data; `rate` is
    `peak`, `gbs` the bandwidth of the device where it is known; `evaluated` targets are looked at in an evaluation of
    whole splits; `image_s` is `pace`, which takes the place of the rate."""
    t, length = cfg.train, cfg.model.length
    found = memory(cfg, n_vocab)
    tokens = t.batch_effective * length
    steps = total_steps(cfg, tokens, samples)
    if rate is None or (steps is None and not t.time):
        return replace(found, steps=steps)
    if steps is None:
        hours = (t.time or 0) / 3600
        return replace(found, hours=(hours, 1.1 * hours, 1.3 * hours))
    interval = cfg.eval.interval or -(-(samples or steps) // t.batch_effective)
    looked = (steps // interval + 2) * (cfg.eval.tokens or evaluated) / 3  # forward is a third
    trained = steps * tokens + looked
    passes = trained / (t.batch_micro * length) + (looked / t.batch_micro if cfg.eval.kvprune else 0)
    calls = passes * (DISPATCH_S * (cfg.model.depth + 1))
    # weights twice and gradients once a pass; the update reads weights, gradients and state, writes two of them
    moved = 3 * passes * found.items["weights"] + steps * (3 * found.items["weights"] + 2 * found.items["optimizer"])
    moved_s = moved / (gbs * 1e9) if gbs else 0.0
    saves = steps // t.ckpt_interval + 1 if t.ckpt_interval else 1
    fixed = [a + saves * b for a, b in zip(START_S, SAVE_S, strict=True)]
    if cfg.sys.compile is Switch.ON:
        fixed = [a + b for a, b in zip(fixed, COMPILE_S, strict=True)]
    if image_s:
        work: Iterable[float] = (trained * image_s * factor for factor in PACE_BAND)
    else:
        work = ((found.flops * trained / rate + moved_s) / share + calls * slow for share, slow in TIME_BAND)
    return replace(found, hours=tuple((w + f) / 3600 for w, f in zip(work, fixed, strict=True)), steps=steps)


def _kept(cfg: RunConfig, n_vocab: int | None, micro: int) -> tuple[int, int]:
    """Bytes that one forward keeps for backward, weights apart: all of them, and of the largest tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: it imports sympy, one second

    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []
    half = cfg.sys.amp is Amp.BF16

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(t)  # a freed storage would give its address to the next
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    # not the meta device: attention there takes a path that keeps T x T
    with FakeTensorMode(), hooks, torch.autocast("cpu", torch.bfloat16, half):
        network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, n_vocab)
        own = {p.untyped_storage()._cdata for p in network.parameters()}
        batch = cfg.data.noise(micro, cfg.model.length, n_vocab or cfg.data.classes)
        network(batch.x, batch.y)
    return sum(kept.values()), max(kept.values())


def here(
    cfg: RunConfig, gpu: Gpu | None = None, band: Mapping[str, Sequence[float]] | None = None
) -> tuple[Forecast, str]:
    """The forecast of a resolved configuration on this machine or on a GPU, and whether it fits there by the `band` of
    the device; empty on a CPU that has room."""
    device = torch.device("cuda" if cfg.sys.device is Device.CUDA and torch.cuda.is_available() else "cpu")
    known = device.type == "cuda" or cfg.sys.device is Device.CPU
    vocab, length = cfg.data.classes, cfg.model.length
    splits = ["val", *(["test"] if cfg.eval.test_each_epoch else [])]
    try:
        samples = cfg.data.samples("train", length)
        evaluated = sum(cfg.data.samples(split, length) * length for split in splits)
    except DataError:  # sizes are known without it, and a forecast comes before the download
        samples, evaluated = None, 0
    if known and device.type == "cpu":
        torch.set_num_threads(cfg.sys.threads)
    rate = gpu[0 if cfg.sys.amp is Amp.BF16 else 1] * 1e12 if gpu else peak(cfg, device) if known else None
    there = gpu or (present() if device.type == "cuda" else None)
    image_s = pace(cfg, rate) if rate and not there and not cfg.attention else None
    found = forecast(cfg, vocab, samples, rate, there.gbs if there else None, evaluated, image_s)
    factors = (band or {}).get("mem_gib")
    told = replace(found, mem_gib=tuple(banded(found.mem_gib[1], factors, found.exact_gib))) if factors else found
    if there:
        return found, verdict(cfg, vocab, told, there, factors or (1.0,) * 3)
    host = Gpu(0.0, 0.0, machine.memory() / GIB, 0.0, 0.0)
    text = verdict(cfg, vocab, told, host, factors or (1.0,) * 3) if cfg.sys.device is Device.CPU else ""
    return found, "" if text.startswith("fits") else text
