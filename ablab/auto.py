# SPDX-License-Identifier: MIT
"""What a device decides for a whole campaign: whether to compile, and the largest micro batch that its memory takes.

Nothing here is inferred.  Every number comes from steps that were taken: forward, backward, optimizer and one update of
the masks, in a process of its own for each try, so that its peak is its own and what kills it kills nothing else.
"""

import ctypes
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from ablab import build, config, forecast

WARM, TIMED = 2, 10  # steps: what starts late has started; those that count
CLOSE = 1e-2  # losses of eager and compiled steps, relative
FASTER = 0.97  # a compiled step takes at most this share of an eager one
WHOLE = 2  # steps of a try for memory: the second has all state, and its update the masks
RATE = 0.1  # of the peak rate: warm, and far from where rounding is amplified
SOON = {"PRUNE_WARMUP": 1, "PRUNE_INTERVAL": 100_000, "PRUNE_RAMP_FRACTION": 1.0}  # first zeros at the last step
KIB = 1 << 10
COMPILE, MICRO = "SYS_COMPILE_AUTO", "TRAIN_BATCH_MICRO"


class NothingFitsError(ValueError):
    """Not even a single sample fits into the memory of the device."""


@dataclass(frozen=True, slots=True)
class Meter:
    """Where numbers of a device come from."""

    device: torch.device
    limit: int | None = None
    """Bytes that count as free memory of a CPU; None: what the system has."""

    def free(self) -> int:
        """Bytes that a trial could take, asked in its own process before it takes any."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages if self.limit is None else self.limit

    def begin(self) -> int:
        """What `taken` starts from: on a CPU a process inherits free blocks and a peak, which are given up here."""
        if self.device.type == "cuda":
            return 0
        ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self.taken()

    def taken(self) -> int:
        """Bytes that this process has had at most: reserved on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * KIB

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Arm(NamedTuple):
    """One configuration of a campaign, its seeds apart."""

    id: str
    values: Mapping[str, Any]
    open: frozenset[str]
    """What it leaves to the device: SYS_COMPILE_AUTO, TRAIN_BATCH_MICRO."""

    def at(self, micro: int, compiled: bool, steps: int) -> config.RunConfig:
        """The configuration for a few steps of one micro batch."""
        chosen = {**SOON, "PRUNE_RAMP_STEP": steps, MICRO: micro, "TRAIN_BATCH_EFFECTIVE": micro}
        chosen |= {f"SYS_COMPILE_{n}": n == ("ON" if compiled else "OFF") for n in ("AUTO", "ON", "OFF")}
        return config.load({**self.values, **{n: v for n, v in chosen.items() if n in self.values}})

    def gib(self, micro: int) -> float:
        """Memory that the forecast finds likely."""
        return forecast.memory(self.at(micro, False, WHOLE), None).mem_gib[1]


def take_steps(arm: Arm, micro: int, compiled: bool, steps: int, meter: Meter) -> dict[str, Any]:
    """{free, peak} in bytes, {losses, step_s} of steps on random data, in the process that calls."""
    free, before = meter.free(), meter.begin()
    cfg = arm.at(micro, compiled, steps)
    device = build.settle_system(cfg)
    built = build.build(cfg, device)
    net = torch.compile(built.model) if compiled else built.model
    pruner = cfg.prune.build(built.model, built.optimizer, steps, cfg.train.seed)
    precision, optimizer, s = build.precision(cfg, device), built.optimizer, cfg.optim.section
    batch = cfg.data.noise(micro, built.length, built.n_vocab, torch.Generator().manual_seed(1))
    x, y = batch.x.to(device), batch.y.to(device)
    losses, times = [], []
    for number in range(1, steps + 1):
        start = time.perf_counter()
        with precision:
            loss = net(x, y).loss
        loss.backward()
        pruner.observe()
        pruner.mask_gradients()
        optimizer.gate(loss.detach(), s.clip_norm, number)
        for group in optimizer.param_groups:
            group["lr"] = RATE * s.lr
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(number, number / steps)
        losses.append(float(loss.detach()))
        meter.wait()
        times.append(time.perf_counter() - start)
    return {"free": free, "peak": meter.taken() - before, "losses": losses, "step_s": times}


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a process of its own, or {error} if it raises or dies.

    NOTE call it only while this process has one thread and has touched no GPU.
    """
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        place = Path(folder) / "said.json"
        if not (pid := os.fork()):
            try:
                try:
                    said = work()
                except Exception as error:  # out of memory, or whatever a member does at this size
                    said = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                place.write_text(json.dumps(said))
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        return json.loads(place.read_text()) if place.exists() else {"error": f"ended with wait status {status}"}


def compiles(arms: Sequence[Arm], micro: Callable[[Arm], int], meter: Meter) -> tuple[bool, str, list[dict[str, Any]]]:
    """(whether to compile all arms, why, what was measured), stopping at the first arm that decides against it."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        size = micro(arm)
        both = [apart(partial(take_steps, arm, size, on, WARM + TIMED, meter)) for on in (False, True)]
        row: dict[str, Any] = {"arm": arm.id, "micro": size}
        if errors := [r["error"] for r in both if "error" in r]:
            return False, f"{arm.id}: {errors[0]}", [*rows, row | {"error": errors[0]}]
        eager, compiled = (median(r["step_s"][WARM:]) for r in both)
        gap = max(abs(a - b) / abs(a) for a, b in zip(*(r["losses"] for r in both), strict=True))
        rows.append(row | {"eager_s": eager, "compiled_s": compiled, "gap": gap})
        if not gap <= CLOSE:
            return False, f"{arm.id}: losses differ by {gap:.2g}, more than {CLOSE:g}", rows
        if not compiled / eager <= FASTER:
            return False, f"{arm.id}: compiled steps take {compiled / eager:.2f} of eager ones, above {FASTER:g}", rows
    worst = max(r["compiled_s"] / r["eager_s"] for r in rows)
    return True, f"compiled steps take {worst:.2f} of eager ones or less, {TIMED} steps of {len(rows)} arms", rows


def largest(arms: Sequence[Arm], sizes: Sequence[int], first: int, fits: Callable[[Arm, int], bool]) -> int | None:
    """The largest of the rising `sizes` that fits with every arm, None if none does.

    Looked for from `sizes[first]` on in the first arm, which should be the hungriest, then held against the others.
    """
    at = first
    if fits(arms[0], sizes[at]):
        while at + 1 < len(sizes) and fits(arms[0], sizes[at + 1]):
            at += 1
    else:
        at = next((i for i in reversed(range(at)) if fits(arms[0], sizes[i])), -1)
    for arm in arms[1:]:
        at = next((i for i in reversed(range(at + 1)) if fits(arm, sizes[i])), -1)
    return sizes[at] if at >= 0 else None


def choose(arms: Sequence[Arm], meter: Meter) -> dict[str, Any]:
    """{chosen: {symbol that was open: [what stands in, its value, why]}, measured: what that rests on}.

    First whether to compile, then, compiled or not, the micro batch: a divisor of the effective batch of every arm
    that leaves it open.  Raises NothingFitsError.
    """
    share = config.load(arms[0].values).sys.mem_fraction
    if "free" not in (said := apart(lambda: {"free": meter.free()})):
        raise ValueError(f"CONFIG_TRAIN_BATCH_MICRO=0: no memory can be measured: {said['error']}; see make doctor")
    free = said["free"]
    measured: dict[str, Any] = {"device": meter.device.type, "free": free, "fraction": share}
    batch = math.gcd(*(a.values["TRAIN_BATCH_EFFECTIVE"] for a in arms if MICRO in a.open))
    sizes = [n for n in range(1, batch + 1) if batch % n == 0] or [0]
    hungry = sorted((a for a in arms if MICRO in a.open), key=lambda a: -a.gib(batch))
    room = share * free / forecast.GIB
    first = max((i for i, n in enumerate(sizes) if hungry and hungry[0].gib(n) <= room), default=0)

    def micro(arm: Arm) -> int:
        return sizes[first] if MICRO in arm.open else arm.values[MICRO]

    chosen, on = {}, False
    if unsure := [a for a in arms if COMPILE in a.open]:
        on, why, measured["compile"] = compiles(unsure, micro, meter)
        chosen[COMPILE] = [f"SYS_COMPILE_{'ON' if on else 'OFF'}", "y", why]
    if hungry:
        tries = measured["micro"] = []

        def fits(arm: Arm, size: int) -> bool:
            compiled = on if COMPILE in arm.open else arm.values["SYS_COMPILE_ON"]
            said = apart(partial(take_steps, arm, size, compiled, WHOLE, meter))
            ok = "error" not in said and said["peak"] <= share * said["free"]
            kept = {n: said[n] for n in ("free", "peak", "step_s", "error") if n in said}
            tries.append({"arm": arm.id, "micro": size, "fits": ok, **kept})
            print(
                f"auto     {arm.id}: micro batch {size} {'fits' if ok else 'does not fit'}: {_taken(said)}", flush=True
            )
            return ok

        if (found := largest(hungry, sizes, first, fits)) is None:
            text = f"{tries[-1]['arm']}: no micro batch fits into {share:g} of {free >> 20} MiB: {_taken(tries[-1])}"
            raise NothingFitsError(f"{text}; shrink the model, or raise CONFIG_SYS_MEM_FRACTION={share:g}")
        peak = max(t["peak"] for t in tries if t["micro"] == found)
        why = f"largest divisor of {batch} that fits: its peak is {peak >> 20} MiB of {share:g} x {free >> 20} MiB"
        chosen[MICRO] = [MICRO, str(found), why]
    return {"chosen": chosen, "measured": measured}


def _taken(said: Mapping[str, Any]) -> str:
    return said.get("error") or f"peak {said['peak'] >> 20} MiB"
