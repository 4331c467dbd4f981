# SPDX-License-Identifier: MIT
"""Rows of `make bench` in one process: the training step, the loop around it, data and the optimizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ablab import build, config, kconf, rundir, train
from ablab.data._shard import Writer
from ablab.data.synth import FIRST, Synth, generate
from ablab.window import Clocks
from benchmarks import Figure, alternate, is_dirty, median, peers, versus
from benchmarks.peers import SHAPES, Shape

LOG_STEPS = 10  # of both sides
REFERENCE_STEP_S = 0.020  # the step that overhead is compared with
TARGETS = {  # times faster than the plain peer, the peer with fused AdamW, transformers
    "tiny": {"peer": ">= 1.40"},
    "mac": {"peer": ">= 1.10", "transformers": ">= 1.60"},
    "small": {"peer": ">= 1.02", "peer fused": ">= 1.00", "transformers": ">= 1.15"},
    "gpt2": {"peer": ">= 1.02", "peer fused": ">= 1.00", "transformers": ">= 1.15"},
}
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def settled(shape: Shape, *more: str) -> kconf.Settled:
    """The configuration of ablab for a shape."""
    text = peers.configuration(shape, "CONFIG_TRAIN_STEPS=100000000", f"CONFIG_TRAIN_LOG_STEPS={LOG_STEPS}", *more)
    return kconf.settle(kconf.load(), [kconf.lex(kconf.ROOT / "benchmark", text=text, name="benchmark")])


def network(shape: Shape, *more: str) -> torch.nn.Module:
    """The model of a shape, as a trial has it at step 0."""
    values = settled(shape, *more).values
    (model,) = config.create("MODEL", values)
    return model.build(config.create("ATTN", values), config.create("MLP", values), peers.SEED)


class Letters(Synth):
    """Synthetic tokens from 0 on, for vocabularies smaller than a byte."""

    vocab = 0

    def write(self, out: Writer) -> None:
        for i, split in enumerate(("train", "val")):
            out.tokens(split, generate(self.config.tokens, i) - np.uint16(FIRST))

    def manifest(self) -> dict[str, Any]:
        found = super().manifest()
        return found | {"tokenizer": found["tokenizer"] | {"vocab": self.vocab}}


class Ours:
    """ablab's own loop on a shape, with its rows, without evaluations and checkpoints."""

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        device: str = "cpu",
        bf16: bool = False,
        compiled: bool = False,
        more: tuple[str, ...] = (),
    ) -> None:
        system = (
            *more,
            f'CONFIG_DATA_DIR="{folder}"',
            f"CONFIG_SYS_THREADS={torch.get_num_threads()}",
            f"CONFIG_SYS_DEVICE_{device.upper()}=y",
            f"CONFIG_SYS_AMP_{'BF16' if bf16 else 'OFF'}=y",
            f"CONFIG_SYS_TF32={'y' if bf16 else 'n'}",
            f"CONFIG_SYS_COMPILE_{'ON' if compiled else 'OFF'}=y",
        )
        cfg = config.load(settled(shape, *system).values)
        data = Letters(cfg.data.config, cfg.data.section)
        data.vocab = shape.vocab
        data.prepare()
        self.tokens = generate(1 << 20, 0) - np.uint16(FIRST)
        self.data = data
        where = build.settle_system(cfg)
        cfg = replace(cfg, data=data)
        self.built = build.build(cfg, where, shape.vocab)
        nobody = SimpleNamespace(stop=0, moved=lambda: None, patiently=lambda call: call(), status={})
        self.loop = train.Loop(nobody, cfg, self.built, where, Clocks())
        header = {"trial": "benchmark", "attempt": 1, "resumed_at_step": 0}
        self.loop.rows = rundir.Rows(folder / f"{shape.embed}.jsonl", "metrics", header)
        self.loop.said = float("inf")  # no lines on the screen
        self.loop.net = torch.compile(self.built.model) if compiled else self.built.model
        self.loop.stream = self.loop.feed()

    def step(self) -> None:
        """One step, and a row when one is due."""
        self.loop.train_step()
        if self.loop.step % LOG_STEPS == 0:
            self.loop.row(False, False)

    def bare(self) -> Callable[[], None]:
        """The same step without a loop: forward, backward, optimizer on one batch."""
        loop, optimizer = self.loop, self.built.optimizer
        x, y = next(loop.feed())

        def step() -> None:
            with loop.precision:
                loss = loop.net(x, y).loss
            loss.backward(loop.share)
            optimizer.gate(loss.detach(), peers.CLIP)
            optimizer.step()
            optimizer.zero_grad()

        return step


def transformers_peer(state: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.nn.Module, Loss]:
    """transformers' GPT-2 as it comes, tanh GELU included, with the weights of an ablab model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.embed,
        "n_positions": shape.block,
    }
    rest = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab, use_cache=False, **sizes, **rest))
    plain = peers.from_ablab(state, shape).state_dict()
    # its linear layers hold the transposed matrix
    turned = {n: w.T if n.startswith("h.") and w.dim() == 2 else w for n, w in plain.items()}
    model.transformer.load_state_dict(turned)
    model.train()
    return model, lambda x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


def same_at_step_0(shape: Shape, candidates: dict[str, tuple[torch.nn.Module, Loss]]) -> dict[str, float]:
    """Largest relative difference of loss and gradients to the first candidate's.

    Raises AssertionError above 1e-4: nothing is timed that does not compute the same.
    """
    batch = (2, min(2, shape.batch), shape.block)
    x, y = torch.from_numpy(np.random.default_rng(1).integers(0, shape.vocab, batch))
    found = {}
    for name, (model, loss_of) in candidates.items():
        loss = loss_of(x, y)
        loss.backward()
        grads = {n.removeprefix("transformer."): p.grad.clone() for n, p in model.named_parameters()}
        found[name] = {peers.to_ablab(n): g for n, g in grads.items()} | {"loss": loss.detach()}
        model.zero_grad(set_to_none=False)
    first, *_ = found.values()
    worst = dict.fromkeys(found, 0.0)
    for name, got in found.items():
        for key, want in first.items():
            turned = name == "transformers" and key.startswith("blocks.") and want.dim() == 2
            value = got[key].T if turned else got[key]
            worst[name] = max(worst[name], ((value - want).norm() / want.norm()).item())
        assert worst[name] < 1e-4, f"{name}: loss or gradients differ at step 0 by {worst[name]:.2g}"
    return worst


def drift(shape: Shape, folder: Path, device: str = "cpu", steps: int = 10) -> float:
    """Relative difference of ablab's loss after some steps of its loop to the plain peer's in float64."""
    ours = Ours(shape, folder, device)
    twin = peers.from_ablab(ours.built.model.state_dict(), shape).to(device).double()
    optimizer = peers.adamw(twin)
    for _, (x, y) in zip(range(steps), ours.loop.feed(), strict=False):
        ours.loop.train_step()
        optimizer.zero_grad()
        loss = twin(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), peers.CLIP)
        optimizer.step()
    ours.loop.window.read()
    return abs(ours.loop.window.losses[-1] / loss.item() - 1)


def steps(name: str, folder: Path, threads: int, rounds: int, limit_s: float) -> list[Figure]:
    """The training step against its peers; for tiny also what the loop and a row cost."""
    shape = SHAPES[name]
    ours = Ours(shape, folder)
    model, state = ours.built.model, ours.built.model.state_dict()
    plain, fused = peers.from_ablab(state, shape), peers.from_ablab(state, shape)
    models: dict[str, Any] = {"ablab": (model, lambda x, y: model(x, y).loss)}
    models |= {"peer": (plain, plain), "peer fused": (fused, fused)}
    worst = same_at_step_0(shape, models)
    pairs = dict.fromkeys(["peer", "peer fused"], "ablab")
    candidates: dict[str, Callable[[], object]] = {"ablab": ours.step}
    for peer, (module, loss_of) in list(models.items())[1:]:
        optimizer = peers.adamw(module, **({"fused": True} if peer == "peer fused" else {}))
        run = peers.train(loss_of, module, optimizer, ours.tokens, shape, log_steps=LOG_STEPS)
        candidates[peer] = run.__next__
    if "transformers" in TARGETS[name]:  # its GELU is the tanh form, which is slow on a CPU: so is ours here
        twin = Ours(shape, folder, more=("CONFIG_MLP_GELU_TANH=y",))
        module, loss_of = transformers_peer(twin.built.model.state_dict(), shape)
        both = {"tanh": (twin.built.model, lambda x, y: twin.built.model(x, y).loss), "transformers": (module, loss_of)}
        worst |= same_at_step_0(shape, both)
        run = peers.train(loss_of, module, peers.adamw(module), twin.tokens, shape, log_steps=LOG_STEPS)
        candidates |= {"ablab tanh": twin.step, "transformers": run.__next__}
        pairs["transformers"] = "ablab tanh"
    if name == "tiny":
        candidates["bare"] = ours.bare()
    samples = alternate(candidates, rounds, threads, limit_s)
    same = f"; equal at step 0 within {max(worst.values()):.0e}"
    tokens = shape.batch * shape.block / median(samples["ablab"])
    figures = [Figure(f"step {name}: ablab", tokens, "tok/s")]
    for peer, mine in pairs.items():
        figures.append(versus(f"step {name}: {peer}", samples, mine, peer, TARGETS[name].get(peer, ""), same))
    if name == "tiny":
        spent = max(0.0, median(samples["ablab"]) - median(samples["bare"]))
        text = f"{spent * 1e6:.0f} us a step around forward, backward, optimizer"
        pair = {k: samples[k] for k in ("ablab", "bare")}
        share = 100 * spent / REFERENCE_STEP_S
        figures.append(Figure("loop overhead of a 20 ms step", share, "%", "<= 3", text, is_dirty(pair)))
        figures += parts(ours, threads, rounds)
    return figures


def parts(ours: Ours, threads: int, rounds: int) -> list[Figure]:
    """A row of metrics; a batch at the mac shape."""
    loop, shape = ours.loop, SHAPES["mac"]
    stream = ours.data.batches("train", peers.SEED, 0, shape.batch, shape.block)
    known = {k: v for k, v in loop.latest.items() if v == v}
    row = lambda: loop.rows.row(loop.step, known, tokens=0, train_s=0.0, wall_s=0.0, flops=0.0)
    samples = alternate({"row": row, "batch": stream.__next__}, rounds, threads)
    us = {name: 1e6 * median(found) for name, found in samples.items()}
    dirty = is_dirty(samples)
    return [
        Figure("logged row", us["row"], "us", "<= 100", f"{len(known)} metrics", dirty),
        Figure(
            "batch of a 20 ms step",
            us["batch"] / 1e4 / REFERENCE_STEP_S,
            "%",
            "<= 1",
            f"{us['batch']:.1f} us",
            dirty,
        ),
    ]
