# SPDX-License-Identifier: MIT
"""The check of a GPU in under ten minutes: right against float64, then fast against the plain peer.

    python -m benchmarks.gpu [--wheels DIR] [--out FILE] [--quick] [--rehearse]

Needs torch, numpy, safetensors and kconfiglib, which `--wheels` finds in a folder of wheels; no network.
Without a GPU it says so and exits 0.  `--rehearse` runs all of it on the CPU at tiny sizes, to test itself.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import Figure, record

LIMIT_S = 500  # rungs that would start later are left out, and listed
PLAIN = {"tf32": False, "bf16": False, "flash": False, "vocab": 50257, "fused": False, "sync": True, "compile": False}
LADDER = (  # what each rung adds
    ("fp32, eager", {}),
    ("+ TF32", {"tf32": True}),
    ("+ bf16", {"bf16": True}),
    ("+ flash", {"flash": True}),
    ("+ vocabulary 50304", {"vocab": 50304}),
    ("+ fused AdamW", {"fused": True}),
    ("+ no host sync", {"sync": False}),
    ("+ compile", {"compile": True}),
)

RACT = "CONFIG_ATTN_RACT=y"
MECHANISMS = (  # lines of .config, and the most that a step may take against the baseline's
    ("RA", "<= 1.12", ("CONFIG_ATTN_RECIPROCAL=y",)),
    ("RA-CT entropy", "<= 1.25", (RACT, "CONFIG_ATTN_RACT_STAT_ENTROPY=y")),
    ("RA-CT rms", "<= 1.25", (RACT, "CONFIG_ATTN_RACT_STAT_RMS=y")),
    ("RA-CT max", "<= 1.40", (RACT, "CONFIG_ATTN_RACT_STAT_MAX=y")),
    ("RA-CT topk", "<= 1.40", (RACT,)),
    ("cross-token", "<= 1.15", ("CONFIG_MLP_CROSS=y",)),
    ("latent", "<= 1.15", ("CONFIG_ATTN_MLA=y", "CONFIG_MLP_LATENT=y")),
)
MOST_MEMORY = "<= 1.15"  # times the baseline's peak


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder with a kconfiglib wheel")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: benchmarks/results/")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    args = parser.parse_args(argv)
    # a wheel is a zip file that Python imports from
    sys.path += [str(p) for p in sorted(args.wheels.glob("*.whl"))] if args.wheels else []
    try:
        import torch

        import ablab.kconf  # noqa: F401
    except ImportError as error:
        print(f"gpu-check: skipped: {error}; install it, or give --wheels DIR for kconfiglib")
        return 0
    if not torch.cuda.is_available() and not args.rehearse:
        print(f"gpu-check: skipped: torch {torch.__version__} finds no CUDA or ROCm device")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder), args.rehearse, 5 if args.quick else 15)
        check.all()
    path = record(check.figures, check.facts, "gpu", args.out)
    print(f"gpu-check: {len(check.figures)} figures in {time.perf_counter() - check.start:.0f} s: {path}")
    return 1 if any(f.verdict == "short" and f.unit == "error" for f in check.figures) else 0


class Check:
    """Runs the parts in order and collects their figures; a part that fails is a figure too."""

    def __init__(self, folder: Path, rehearse: bool, samples: int) -> None:
        import torch

        from ablab.forecast import listed
        from benchmarks.peers import SHAPES

        self.torch, self.folder, self.rehearse, self.samples = torch, folder, rehearse, samples
        self.device = "cpu" if rehearse else "cuda"
        self.start = time.perf_counter()
        self.figures: list[Figure] = []
        name = "rehearsal" if rehearse else torch.cuda.get_device_name()
        self.peak = (listed(name) or (0.0,))[0] * 1e12
        self.facts: dict[str, Any] = {"device": name, "torch": torch.__version__, "hip": torch.version.hip}
        self.small, self.gpt2 = replace(SHAPES["mac"], vocab=256), replace(SHAPES["gpt2"], batch=16)
        if rehearse:
            torch.set_num_threads(1)
            self.gpt2 = replace(SHAPES["tiny"], vocab=256)
        else:
            memory = torch.cuda.get_device_properties(0).total_memory
            self.facts["memory_bytes"] = memory
            # 124M with plain attention, fp32 and separate logits takes about 3 GiB per sequence of 1024
            self.gpt2 = replace(self.gpt2, batch=max(1, min(16, 1 << int(math.log2(memory / 2**30 / 4)))))
        self.facts["shape"] = repr(self.gpt2)

    def all(self) -> None:
        for part in (
            self.ceilings,
            self.correct,
            self.ladder,
            self.transformers,
            self.ours,
            self.mechanisms,
            self.auto,
        ):
            try:
                part()
            # one broken part must not cost the result of the others on a machine that is lent for minutes
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._add(Figure(f"{part.__name__} failed", 1, "error", "<= 0", text))

    # ---- parts

    def ceilings(self) -> None:
        """What this device can do at most: a large bf16 product and a copy, on rotating random inputs."""
        torch, n = self.torch, 256 if self.rehearse else 8192
        pairs = [self._randn(n, n).bfloat16() for _ in range(4)]
        s = self._median(lambda i: pairs[i % 4] @ pairs[(i + 1) % 4])
        self.matmul = 2 * n**3 / s
        self.facts["matmul_tflops"] = self.matmul / 1e12
        self._add(Figure(f"bf16 matmul {n}", self.matmul / 1e12, "TFLOP/s"))
        size = (1 << 22) if self.rehearse else (1 << 28)
        sources, target = [self._randn(size) for _ in range(2)], torch.empty(size, device=self.device)
        s = self._median(lambda i: target.copy_(sources[i % 2]))
        self._add(Figure("device copy, read and write", 8 * size / s / 1e9, "GB/s"))

    def correct(self) -> None:
        """Loss and gradients against float64, in each precision, eager and compiled."""
        from benchmarks.peers import from_ablab, to_ablab
        from benchmarks.steps import drift, network

        torch = self.torch
        ours = network(self.small).to(self.device)
        peer = from_ablab(ours.state_dict(), self.small).to(self.device)
        x, y = (torch.randint(self.small.vocab, (8, self.small.block), device=self.device) for _ in range(2))

        def gradients(model: Any, call: Callable, bf16: bool) -> dict[str, Any]:
            model.zero_grad()
            with self._autocast(bf16):
                loss = call(x, y)
            loss.backward()
            found = {to_ablab(n): p.grad.double().clone() for n, p in model.named_parameters()}
            return found | {"loss": loss.detach().double()}

        def error(a: dict[str, Any]) -> float:
            return max(float((a[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

        torch.backends.cuda.matmul.allow_tf32 = False
        wide = network(self.small).to(self.device).double()
        exact = gradients(wide, lambda x, y: wide(x, y).loss, False)
        for bf16 in (False, True):
            word = "bf16" if bf16 else "fp32"
            plain = error(gradients(peer, peer, bf16))
            calls = {"eager": ours} if self.rehearse else {"eager": ours, "compiled": torch.compile(ours)}
            for mode, call in calls.items():
                ours_e = error(gradients(ours, lambda x, y, c=call: c(x, y).loss, bf16))
                row = f"gradient error {word} {mode}"
                bound = max(2 * plain, 1e-5)
                self._add(Figure(row, ours_e, "error", f"<= {bound:.3g}", f"plain peer {plain:.3g}"))
        error_10 = drift(self.small, self.folder, self.device)
        self._add(Figure("loss after 10 steps, fp32", error_10, "error", "<= 1e-4", "against float64"))

    def ladder(self) -> None:
        """The plain peer, one improvement after another."""
        torch, state = self.torch, dict(PLAIN)
        for name, change in LADDER:
            if time.perf_counter() - self.start > LIMIT_S:
                self.facts.setdefault("left_out", []).append(name)
                continue
            state |= change
            if self.rehearse:
                state |= {"vocab": self.gpt2.vocab, "compile": False}
            torch.backends.cuda.matmul.allow_tf32 = state["tf32"]
            shape = replace(self.gpt2, vocab=state["vocab"])
            self._speed(f"peer {name}", self._peer(shape, state).__next__)
        torch._dynamo.reset()  # lets go of the compiled peer

    def transformers(self) -> None:
        """transformers' GPT-2 in bf16, eager, if it is installed."""
        if not importlib.util.find_spec("transformers"):
            self.facts.setdefault("left_out", []).append("transformers")
            return
        from benchmarks import peers
        from benchmarks.steps import network, transformers_peer

        model, loss = transformers_peer(network(self.gpt2).state_dict(), self.gpt2)
        model.to(self.device)

        def loss_of(x: Any, y: Any) -> Any:
            with self._autocast(not self.rehearse):
                return loss(x, y)

        run = peers.train(loss_of, model, peers.adamw(model, fused=True), self._tokens(), self.gpt2, self.device)
        self._speed("peer transformers", run.__next__)

    def ours(self) -> None:
        """ablab's step: against the best peer, without host sync, and its share of the ceilings."""
        from benchmarks.steps import Ours

        torch, real = self.torch, not self.rehearse
        torch.backends.cuda.matmul.allow_tf32 = True
        if real:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = Ours(self.gpt2, self.folder, self.device, bf16=real, compiled=real)
        rate = self._speed("ablab", step.step)
        flops = step.built.flops_per_token * rate
        self._add(Figure("ablab FLOP rate", flops / 1e12, "TFLOP/s", "", f"{flops / self.matmul:.1%} of the matmul"))
        if self.peak:
            self._add(Figure("ablab MFU", flops / self.peak, "", ">= 0.50"))
        peers = {f.row: f.value for f in self.figures if f.row.startswith("peer ")}
        for name, target in (("+ compile", ">= 1.30"), ("+ no host sync", ""), ("transformers", "")):
            if plain := peers.get(f"peer {name}"):
                self._add(Figure(f"ablab against peer {name}", rate / plain, "x", target))
        self._adamw(step)
        if real:
            self._add(Figure("ablab peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"))
            torch.cuda.set_sync_debug_mode("error")  # a step that waits for the device now raises
            try:
                for _ in range(3):
                    step.loop.train_step()
                waits, text = 0, ""
            except RuntimeError as error:
                waits, text = 1, str(error).splitlines()[0][:120]
            torch.cuda.set_sync_debug_mode("default")
            self._add(Figure("host syncs in a step", waits, "", "<= 0", text))

    def auto(self) -> None:
        """What the device decides for a campaign, compiling and micro batch, in a process that has yet to touch it."""
        from benchmarks.steps import settled

        kinds = ("DEVICE_CPU", "AMP_OFF") if self.rehearse else ("DEVICE_CUDA", "AMP_BF16")
        lines = [f"CONFIG_SYS_{kind}=y" for kind in (*kinds, "COMPILE_OFF")]
        text = settled(self.gpt2, *lines, "CONFIG_SYS_THREADS=1").config()
        if not self.rehearse:  # more than fits at once
            text = re.sub("(CONFIG_TRAIN_BATCH_EFFECTIVE)=.*", r"\1=256", text)
        asked = ["TRAIN_BATCH_MICRO", *([] if self.rehearse else ["SYS_COMPILE_AUTO"])]
        trial = {"id": "gpt2", "hash": "0" * 64, "group": "g", "title": "", "config": text}
        content = {"mode": "measure", "trials": [trial], "open": {"g": asked}}
        content |= {"limit": 1 << 34} if self.rehearse else {}
        (self.folder / "plan.json").write_text(json.dumps(content))
        code = "import sys; from ablab import check; sys.exit(check.main(sys.argv[1]))"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if not self.rehearse:
            self.torch.cuda.empty_cache()
        subprocess.run([sys.executable, "-c", code, str(self.folder)], env=env, check=True)
        found = self.facts["auto"] = json.loads((self.folder / "verdict.json").read_text())
        fits = [t for t in found["measured"]["micro"] if t["fits"]]
        best = max(fits, key=lambda t: t["micro"])
        why = "; ".join(f"{value[0]}={value[1]}: {value[2]}" for value in found["chosen"].values())
        self._add(Figure("auto: peak of the micro batch", best["peak"] / best["free"], "of free memory", "<= 0.9", why))

    def mechanisms(self) -> None:
        """Gradients against float64, then a whole step and its memory beside the baseline's."""
        from ablab.tensor import kernel
        from benchmarks.steps import Ours

        torch, real = self.torch, not self.rehearse
        torch.backends.cuda.matmul.allow_tf32 = True
        found: dict[str, tuple[float, float]] = {}
        for number, (name, target, lines) in enumerate((("baseline", "", ()), *MECHANISMS)):
            if time.perf_counter() - self.start > LIMIT_S:
                self.facts.setdefault("left_out", []).append(name)
                continue
            if lines:
                self._add(Figure(f"{name} gradient error fp32", self._error(lines), "error", "<= 1e-3"))
            folder = self.folder / f"mechanism{number}"
            folder.mkdir()
            if real:
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            step = Ours(self.gpt2, folder, self.device, bf16=real, compiled=real, more=lines)
            rate = self._speed(f"ablab {name}", step.step)
            peak = torch.cuda.max_memory_allocated() if real else 1
            found[name] = rate, peak
            if lines and "baseline" in found:
                base_rate, base_peak = found["baseline"]
                self._add(Figure(f"{name}: step of the baseline", base_rate / rate, "x", target))
                self._add(Figure(f"{name}: memory of the baseline", peak / base_peak, "x", MOST_MEMORY))
            del step
        self.facts["lse_kernel"] = kernel.chosen(torch.device(self.device))

    def _error(self, lines: tuple[str, ...]) -> float:
        """Largest relative error of a gradient of the small model in fp32, away from init, against float64."""
        from ablab.tensor import kernel
        from ablab.tensor.stage import init_
        from benchmarks.steps import network

        torch = self.torch
        torch.backends.cuda.matmul.allow_tf32 = False
        kernel.settle(torch.device(self.device), 128, (torch.float32,))
        x, y = (torch.randint(self.small.vocab, (8, self.small.block), device=self.device) for _ in range(2))
        found = []
        for wide in (torch.float64, torch.float32):
            net = network(self.small, *lines)
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p.add_(init_(torch.empty_like(p), 0, f"probe:{name}", 0.05))
            net.to(self.device, wide)
            net(x, y).loss.backward()
            found.append({n: p.grad.double() for n, p in net.named_parameters()})
        exact, ours = found
        torch.backends.cuda.matmul.allow_tf32 = True
        return max(float((ours[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

    def _adamw(self, step: Any) -> None:
        """The optimizer alone, against torch's fused one."""
        from benchmarks.peers import Gpt, adamw

        model = Gpt(self.gpt2).to(self.device)
        for p in model.parameters():
            p.grad = self.torch.randn_like(p) * 1e-3
        ours = self._median(lambda _: step.built.optimizer.step())
        peer = adamw(model, fused=True)
        plain = self._median(lambda _: peer.step())
        text = f"flat {ours * 1e3:.3g} ms, torch fused {plain * 1e3:.3g} ms"
        self._add(Figure("AdamW step: torch fused", plain / ours, "x", ">= 1.00", text))

    # ---- helpers

    def _add(self, figure: Figure) -> None:
        self.figures.append(figure)
        print(figure.line(), flush=True)

    def _randn(self, *shape: int) -> Any:
        return self.torch.randn(*shape, device=self.device)

    def _autocast(self, on: bool) -> Any:
        return self.torch.autocast(self.device, dtype=self.torch.bfloat16) if on else nullcontext()

    def _median(self, call: Callable[[int], object], warm: int = 5) -> float:
        """Median seconds of `call(i)` by device events after a warm-up."""
        return statistics.median(self._times(call, warm))

    def _times(self, call: Callable[[int], object], warm: int) -> list[float]:
        torch = self.torch
        for i in range(warm):
            call(i)
        if self.rehearse:
            times = []
            for i in range(self.samples):
                start = time.perf_counter()
                call(i)
                times.append(time.perf_counter() - start)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.samples + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for i, event in enumerate(events[1:]):
            call(i)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    def _tokens(self) -> Any:
        import numpy as np

        return np.random.default_rng(0).integers(0, self.gpt2.vocab, 1 << 20).astype(np.uint16) % 50257

    def _speed(self, name: str, step: Callable[[], object]) -> float:
        times = self._times(lambda _: step(), 6)
        rate = self.gpt2.batch * self.gpt2.block / statistics.median(times)
        self._add(Figure(name, rate, "tok/s", samples={name: times}))
        return rate

    def _peer(self, shape: Any, state: dict[str, Any]) -> Iterator[None]:
        from benchmarks import peers

        torch = self.torch
        torch.manual_seed(0)
        model = peers.Gpt(shape, flash=state["flash"]).to(self.device)
        options = {"fused": True} if state["fused"] else {"foreach": True}
        call = torch.compile(model) if state["compile"] else model

        def loss_of(x: Any, y: Any) -> Any:
            with self._autocast(state["bf16"]):
                return call(x, y)

        every = 1 if state["sync"] else 10**9
        optimizer = peers.adamw(model, **options)
        return peers.train(loss_of, model, optimizer, self._tokens(), shape, self.device, every)


if __name__ == "__main__":
    sys.exit(main())
