# SPDX-License-Identifier: MIT
# Size: the stages of a dry run build on one trial; apart they would hand each other all of it.
"""One trial at a size that takes milliseconds, through everything that a trial does, stage by stage."""

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ablab import bind, build, checkpoint, config, kconf, metrics, plugin
from ablab.config import Switch
from ablab.dist import World
from ablab.rundir import Checkpoint
from ablab.schedule._coupling import Strength
from ablab.tensor import native
from ablab.tensor.stage import Past, init_

WIDTH, CONTEXT, VOCAB, IDS = 96, 32, 64, 61  # fewer ids than rows: padded columns are tried too
SIDE = 64  # of images that are enlarged
MICRO, ACCUM, ITERATIONS = 2, 2, 2
OVERFIT = 20  # steps on one batch
STEPS = ITERATIONS + OVERFIT
SHARED = 4  # steps of several processes with pruning: the first update only begins the ramp
EPS = torch.finfo(torch.float32).eps
RATE = 1e-3  # of the iterations
CLOSE = 2e-5  # of the largest logit, where the order of additions differs
EXACT = 1e-10  # between one process and two, in fp64
BLOCK = ("MODEL_", "ATTN_", "MLP_")
FIXED = {
    "MODEL_GPT_EMBED": WIDTH,
    "MODEL_GPT_BLOCK": CONTEXT,
    "MODEL_GPT_VOCAB": VOCAB,
    "MODEL_RESNET_WIDTH": 8,
    "TRAIN_BATCH_EFFECTIVE": MICRO * ACCUM,
    "TRAIN_BATCH_MICRO": MICRO,
    "TRAIN_STEPS": STEPS,
    "TRAIN_TOKENS": STEPS * MICRO * ACCUM * CONTEXT,
    # whatever starts late starts at once, or it would rest
    "SCHED_COUPLING_START": 0,
    "SCHED_COUPLING_STEPS": 0,
    "SCHED_COUPLING_DEADLINE": 1,
    "PRUNE_WARMUP": 1,
    "PRUNE_INTERVAL": 1,
    "PRUNE_RAMP_STEP": OVERFIT // 2,
    "PRUNE_RAMP_FRACTION": 0.5,
}
MOST = {
    "MODEL_GPT_LAYERS": 3,  # a first, a middle and a last block differ
    "MODEL_GPT_HEADS": 4,
    "SCHED_WARMUP": OVERFIT // 4,
}
WIDEST = 8  # times the embedding: chance asks for thousands
BY_CONTEXT = ("EVAL_KVPRUNE_KEEP", "EVAL_KVPRUNE_RECENT")


class CheckError(Exception):
    """Something that a stage looked for is not so."""


def shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration at the size of the dry run; mechanisms, switches and real numbers stay.

    Widths keep their ratio to the embedding, and stay multiples of the heads where they were; so sizes that differ
    still do, as far as the smaller model can tell them apart.
    """
    tree, scales = kconf.load(), dict.fromkeys(BY_CONTEXT, "context")
    for member in (plugin.find(s) for family in ("ATTN", "MLP") for s in plugin.selected(family, values)):
        scales |= {bind.symbol_of(member.symbol, name): scale for name, scale in member.scales.items()}
    small = {n: v for n, v in FIXED.items() if n in values}
    small |= {n: min(v, values[n]) for n, v in MOST.items() if n in values}
    small |= {n: SIDE for n in ("DATA_AUGMENT_RESIZE",) if values.get(n)}
    heads, now = values.get("MODEL_GPT_HEADS", 1), small.get("MODEL_GPT_HEADS", 1)
    for name, scale in ((n, s) for n, s in scales.items() if values.get(n)):  # 0 is off
        if scale == "keys":
            small[name] = min(values[name], CONTEXT // 2)
            continue
        size, new = ("MODEL_GPT_EMBED", WIDTH) if scale == "width" else ("MODEL_GPT_BLOCK", CONTEXT)
        unit = now if scale == "width" and values[name] % heads == 0 else 1
        low, high = tree.span(name) or (1, values[name])
        wanted = min(max(low, values[name] * new / values[size]), high, WIDEST * new)
        small[name] = max(round(wanted / unit), -(-low // unit), 1) * unit
    if values.get("EVAL_KVPRUNE"):
        small["EVAL_KVPRUNE_KEEP"] = max(small["EVAL_KVPRUNE_KEEP"], small["EVAL_KVPRUNE_RECENT"] + 2)
    return {**values, **small}


def watch(member: Any) -> set[str]:
    """The visible fields of a member's configuration; each leaves the set as soon as somebody reads it."""
    given = member.config
    values = {f.name: object.__getattribute__(given, f.name) for f in fields(given)}
    unread = {name for name, value in values.items() if value is not None}

    def look(self: Any, name: str) -> Any:
        unread.discard(name)
        return object.__getattribute__(self, name)

    kind = type(type(given).__name__, (type(given),), {"__slots__": (), "__getattribute__": look})
    member.config = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(member.config, name, value)
    return unread


class Side(NamedTuple):
    """What takes steps."""

    model: nn.Module
    optimizer: Any
    pruner: Any
    strength: Strength

    def state(self) -> dict[str, Any]:
        """What the loop's own part of a checkpoint holds."""
        return {"step": 1, "coupling": self.strength.state()}

    def load(self, place: Checkpoint) -> None:
        more = self.pruner.state()
        self.strength.restore(checkpoint.load(place, self.model, self.optimizer, more)["coupling"])
        self.pruner.restore(more)


class Rig:
    """One shrunk trial; stages build on each other."""

    def __init__(self, values: Mapping[str, Any], where: Mapping[str, str], folder: Path) -> None:
        self.values, self.where = values, where
        self.saved = Checkpoint(folder / "step", 1, 1)
        self.params: int | None = None
        self.fingerprint = ""
        self.step_ms: float | None = None
        """CPU time of a step."""
        self.cost: float | None = None
        """The same over that of a fixed piece of work."""
        self.tops: dict[str, float] = {}
        """Largest entry of the gradients that each parameter has had, after the clip."""
        self.unread: dict[str, set[str]] = {}
        """Fields that nobody has looked at, by member."""

    def stages(self) -> dict[str, Callable[[], None]]:
        names = "bind size build identity train gradients evaluate resume batch causality decode overfit state knobs"
        alone = [] if plugin.selected("ATTN", self.values) else ["causality", "decode"]  # nothing follows an image
        return {name: getattr(self, name) for name in [*names.split(), "contracts"] if name not in alone}

    def bind(self) -> None:
        self.full = config.load(self.values, self.where)
        if self.full.sys.native is Switch.ON:
            native.ready()  # raises what to do
        self.cfg = config.load(shrunk(self.values), self.where)
        self.classes = min(IDS, self.cfg.data.classes)
        self.iterations = ITERATIONS + self.cfg.schedule.section.ramps  # couplings may rest in the first
        c = self.cfg
        members = [c.model, *c.attention, *c.mlp, c.optim, c.schedule]
        for member in members:  # grows
            self.unread[member.symbol] = watch(member)
            members += [member.base] if member.parent() else []

    def size(self) -> None:
        """Full size, without memory."""
        with torch.device("meta"):
            c = self.full
            network = c.model.build(c.attention, c.mlp, c.train.seed, c.data.classes)
        self.params = sum(p.numel() for p in network.parameters())

    def build(self) -> None:
        self.built = build.build(self.cfg, torch.device("cpu"), self.classes)
        self.fingerprint = self.built.fingerprint
        self.side = self._side(self.built.model, self.built.optimizer)
        self.held = _held(self.built.model)
        once, again = (self._logits(self.built.model, self._ids(0))[..., :IDS] for _ in range(2))
        need(bool(once.isfinite().all()), "logits are not finite at init")
        need(torch.equal(once, again), "two forwards of one input differ")

    def identity(self) -> None:
        """At init without the members that say they are the identity there; anywhere at coupling strength 0 without
        those that are coupled."""
        model, ids = self.built.model, self._ids(12)
        members = (*self.cfg.attention, *self.cfg.mlp)
        if unlike := [m for m in members if m.identity]:
            found = self._gap(*(_at(n, ids, 1.0) for n in (model, self._host(unlike))))
            need(found <= CLOSE, f"{_symbols(unlike)}: logits at init differ from those without by {found:.2g}")
        if (coupled := [m for m in members if m.couples]) and "lam" in dict(model.named_buffers()):
            found = self._gap(*(_at(n, ids, 0.0, _probe(n)) for n in (model, self._host(coupled))))
            need(found <= CLOSE, f"{_symbols(coupled)}: logits at strength 0 differ from those without by {found:.2g}")

    def train(self) -> None:
        """Iterations of micro batches: forward, backward, clip, step; the state after the first is kept."""
        self.start = {n: p.detach().clone() for n, p in self.built.model.named_parameters()}
        for number in range(self.iterations):
            self._iterate(self.side, number)
            if number == 0:
                model, optimizer, pruner, _ = self.side
                checkpoint.save(self.saved, model, optimizer, self.side.state(), more=pruner.state())

    def gradients(self) -> None:
        names = {n for n, p in self.built.model.named_parameters() if p.requires_grad}
        dead = {n for n in names if not self.tops.get(n)}
        need(not dead, f"no gradient in {self.iterations} iterations: {_some(dead)}")
        equal = {n for n, p in self.built.model.named_parameters() if n in names and torch.equal(p, self.start[n])}
        # a rule without moments cannot move in fp32 what has a tiny gradient
        still = {n for n in equal if RATE * self.tops[n] > EPS * self.start[n].abs().max()}
        need(not still, f"not moved in {self.iterations} iterations: {_some(still)}")

    def evaluate(self) -> None:
        """Eval mode gives the same twice, leaves random state and buffers alone, and never predicts what does not
        exist."""
        model, before = self.built.model, torch.get_rng_state()
        batch = self._ids(5), self._batch(6)[1]
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        model.eval()
        with torch.no_grad():
            losses = [float(model(*batch).loss) for _ in range(2)]
            logits = model(self._ids(5)).logits
        model.train()
        need(losses[0] == losses[1], f"two evaluations of one batch: {losses}")
        need(torch.equal(before, torch.get_rng_state()), "evaluation draws random numbers")
        odd = {n for n, b in model.named_buffers() if not torch.equal(b, buffers[n])}
        need(not odd, f"evaluation changes {_some(odd)}")
        need(bool(torch.isinf(logits[..., IDS:]).all()), "padded vocabulary can be predicted in eval mode")
        _, optimizer, pruner, _ = self.side
        gauges = model.gauges(self._ids(5, 1), build.gauges(self.cfg))
        for name in (*gauges, *pruner.gauges(), *(f"opt/{n}" for n in optimizer.gauges())):
            metrics.get(name)

    def resume(self) -> None:
        """The second iteration, from the checkpoint after the first in a model of another seed, gives the same bits."""
        c = self.cfg
        network = c.model.build(c.attention, c.mlp, c.train.seed + 1, self.classes)
        self.other = self._side(network, c.optim.build(build.grouped(c, network)))
        self.other.load(self.saved)
        for number in range(1, self.iterations):
            self._iterate(self.other, number)
        mine, other = ({**dict(n.named_parameters()), **dict(n.named_buffers())} for n in (self.built.model, network))
        odd = {name for name, a in mine.items() if not torch.equal(a, other[name])}
        need(not odd, f"differ after save, load and one step: {_some(odd)}")

    def overfit(self) -> None:
        """Steps on one batch at the trial's rate and the shape of its schedule: finite, falling, the rate applied."""
        (model, optimizer, *_), c = self.other, self.cfg
        batch = self._batch(13, c.model.length // 2) if c.attention else self._batch(13)
        dense = _zeros(model)
        losses, times, paces = [self._loss(model, batch)], [], []
        for number in range(1, OVERFIT + 1):
            start = time.process_time()
            share = c.schedule.scale(number, number / OVERFIT)
            need(0 <= share <= 1, f"the schedule asks for {share:.3g} of the peak rate at step {number} of {OVERFIT}")
            rate = c.optim.section.lr * share
            loss = model(*batch).loss
            loss.backward()
            self._apply(self.other, loss.detach(), rate, self.iterations + number)
            times.append(time.process_time() - start)
            paces.append(_pace())
            odd = [g["lr"] for g in optimizer.param_groups if g["lr"] != rate]
            need(not odd, f"the optimizer left a rate of {odd[:1]} where the schedule asked for {rate:.3g}")
        # the fastest is what neighbours disturb least, and they slow the fixed work beside it as much
        self.step_ms, self.cost = 1e3 * min(times), min(times) / min(paces)
        losses.append(self._loss(model, batch))
        text = f"{OVERFIT} steps on one batch at a peak rate of {c.optim.section.lr:g}"
        need(math.isfinite(losses[1]), f"loss {losses[1]} after {text}")
        if c.prune.symbol == "PRUNE_NONE":
            need(losses[1] < losses[0], f"loss {losses[0]:.4g} rose to {losses[1]:.4g} in {text}; lower CONFIG_OPT_LR")
        else:
            need(_zeros(model) > dense, f"{c.prune.symbol}: no more zeros in the weights after {text}")
        before = [p.detach().clone() for p in model.parameters()]
        model(*batch).loss.backward()
        self._apply(self.other, loss.detach(), 0.0, self.iterations + OVERFIT + 1)
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        need(not moved, "weights move at a learning rate of 0")

    def batch(self) -> None:
        """Another batch size and length; nothing of it is left in the next forward."""
        model = self.built.model
        with torch.no_grad():
            for name, p in _probe(model).items():  # from here on at a point where no gate is at rest
                model.get_parameter(name).copy_(p)
        before = self._logits(model, self._ids(5))
        x, y = self._batch(7, self.cfg.model.length // 2 or 1, 3)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with torch.no_grad():
            out = model(x, y)
            for name, b in model.named_buffers():  # running statistics, which are meant to move
                b.copy_(buffers[name])
        shape = " x ".join(map(str, y.shape))
        need(bool(out.loss.isfinite()), f"batch of {shape}: loss is {float(out.loss)}")
        need(out.n == y.numel(), f"batch of {shape}: {out.n} targets")
        need(torch.equal(before, self._logits(model, self._ids(5))), "a forward depends on the one before it")
        rows = torch.cat([self._logits(model, row) for row in self._ids(5).split(1)])
        found = self._gap(before, rows)
        need(found <= CLOSE, f"a row's logits depend on the other rows of its batch, by {found:.2g}")

    def causality(self) -> None:
        """A changed suffix leaves earlier logits as they are."""
        cuts = (1, CONTEXT // 4, CONTEXT // 2, CONTEXT - 1)
        a, b = self._ids(9, 1), self._ids(10, 1)
        whole, *rows = self._logits(
            self.built.model, torch.cat([a, *(torch.cat([a[:, :n], b[:, n:]], 1) for n in cuts)])
        )
        for cut, row in zip(cuts, rows, strict=True):
            found = self._gap(whole[:cut], row[:cut])
            need(found <= CLOSE, f"logits before token {cut} change by {found:.2g} with the tokens after it")

    def decode(self) -> None:
        """Token by token with a cache, where the model offers that, against the full forward."""
        model = self.built.model
        if "past" not in inspect.signature(model.forward).parameters:
            return
        ids, past = self._ids(11, length=8), Past(8)
        full = self._logits(model, ids)
        model.eval()
        with torch.no_grad():
            steps = [model(ids[:, t : t + 1], past=past).logits for t in range(ids.shape[1])]
        model.train()
        found = self._gap(full, torch.cat(steps, 1))
        need(found <= CLOSE, f"cached decode differs from the full forward by {found:.2g}")
        if self.cfg.eval.kvprune:
            model.eval()
            past, ids = build.cache(self.cfg), self._ids(12)
            with torch.no_grad():
                logits = [model(x, past=past).logits[..., :IDS] for x in ids.split(1, 1)]
            model.train()
            odd = [t for t, found in enumerate(logits) if not found.isfinite().all()]
            need(not odd, f"logits are not finite at tokens {odd} under a pruned cache")

    def state(self) -> None:
        """Modules hold what they held before the first step: values travel, they are not kept."""
        now = _held(self.built.model)
        odd = {n for n in self.held.keys() | now.keys() if self.held.get(n, self) is not now.get(n, self)}
        need(not odd, f"kept on a module between forwards: {_some(odd)}")

    def knobs(self) -> None:
        """Every visible field of the members that shape the model and its step has been looked at."""
        odd = {f"CONFIG_{symbol}_{n.upper()}" for symbol, names in self.unread.items() for n in names}
        need(not odd, f"nobody reads {_some(odd)}")

    def contracts(self) -> None:
        """Those at build of all members but the data, whose files the data stage reads."""
        members = (m for m in build.members(self.cfg) if m is not self.cfg.data)
        results = [c.judge(self.built) for m in members for c in m.contracts() if c.moment == "build"]
        broken = [r for r in results if not r["ok"]]
        need(not broken, "; ".join(f"{r['name']}: {r['expected']} expected, {r['measured']} found" for r in broken))

    def _host(self, without: list[Any]) -> nn.Module:
        """The model without some members."""
        c = self.cfg
        kept = [[m for m in family if m not in without] for family in (c.attention, c.mlp)]
        return c.model.build(*kept, c.train.seed, self.classes)

    def _batch(self, seed: int, length: int = 0, size: int = MICRO) -> tuple[Tensor, Tensor]:
        stream, data = torch.Generator().manual_seed(seed), self.cfg.data
        batch = data.noise(size, length or self.cfg.model.length, self.classes, stream)
        return batch.x, batch.y

    def _ids(self, seed: int, size: int = MICRO, length: int = 0) -> Tensor:
        return self._batch(seed, length, size)[0]

    def _side(self, model: nn.Module, optimizer: Any) -> Side:
        pruner = self.cfg.prune.build(model, optimizer, STEPS, self.cfg.train.seed)
        return Side(model, optimizer, pruner, Strength(self.cfg.schedule.section, model.lam))

    def _iterate(self, side: Side, number: int) -> None:
        """One optimizer step, numbered from 0, as the loop does it."""
        model = side.model
        losses = []
        for micro in range(ACCUM):
            loss = model(*self._batch(100 * number + micro)).loss
            (loss / ACCUM).backward()  # a gradient argument would import sympy, 0.2 s
            losses.append(loss.detach())
        named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        tops = torch.stack([g.abs().max() for _, g in named]).tolist()
        odd = {n for (n, _), top in zip(named, tops, strict=True) if not math.isfinite(top)}
        need(not odd, f"gradient not finite in iteration {number + 1}: {_some(odd)}")
        norm = self._apply(side, sum(losses), RATE, number + 1)
        scale = 1.0 if side.optimizer.grad_scale is None else float(side.optimizer.grad_scale)
        self.tops |= {n: max(top / scale, self.tops.get(n, 0.0)) for (n, _), top in zip(named, tops, strict=True)}
        need(bool(torch.stack([*losses, norm]).isfinite().all()), f"loss not finite in iteration {number + 1}")

    def _apply(self, side: Side, loss: Tensor, rate: float, number: int) -> Tensor:
        """What follows accumulation, in the order of docs/design.md; returns the norm."""
        _, optimizer, pruner, strength = side
        pruner.observe()
        pruner.mask_gradients()
        norm = optimizer.gate(loss, self.cfg.optim.section.clip_norm, number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if rate:  # else nothing may move
            strength.update(number, [loss])
            pruner.update(number, min(number / STEPS, 1.0))
        return norm

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
        model.eval()
        with torch.no_grad():
            loss = model(*batch).loss.item()
        model.train()
        return loss

    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            logits = model(ids).logits
        model.train()
        return logits

    def _gap(self, a: Tensor, b: Tensor) -> float:
        """Largest difference of real columns, as a share of the largest logit of `a`."""
        a, b = a[..., :IDS], b[..., :IDS]
        return float((a - b).abs().max() / a.abs().max())


def alone_and_together(values: Mapping[str, Any], where: Mapping[str, str], world: World) -> None:
    """Steps of this rank's share of a batch, in fp64, against the whole batch in this process alone: one, or with
    pruning SHARED, of which each changes the masks.

    Raises CheckError where gradients, weights, buffers or optimizer state differ by more than rounding, or between
    ranks at all: after every update their masks and weights have one hash.
    """
    cfg = config.load({**shrunk(values), "MODEL_GPT_DROPOUT": 0.0}, where)
    classes, each = min(IDS, cfg.data.classes), 1 if cfg.attention else MICRO
    stream = torch.Generator().manual_seed(1)
    batch = cfg.data.noise(world.size * ACCUM * each, cfg.model.length, classes, stream)
    x = batch.x.double() if batch.x.is_floating_point() else batch.x
    rows = [*zip(x.split(each), batch.y.split(each), strict=True)]
    found = []
    # statistics of a batch are those of a micro batch, so one process takes the same ones where there are any
    for mine, group in ((((x, batch.y),) if cfg.attention else rows, World()), (rows[world.rank :: world.size], world)):
        torch.manual_seed(world.rank)  # a draw must not decide what all ranks hold in common
        network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, classes).double()
        optimizer = cfg.optim.build(build.grouped(cfg, network))
        pruner = cfg.prune.build(network, optimizer, STEPS, cfg.train.seed)
        for number in range(1, 1 + (SHARED if pruner.state() else 1)):
            losses = [network(*row).loss for row in mine]
            loss = sum(losses) / len(losses)
            loss.backward()
            loss = loss.detach()
            group.mean_(optimizer.arena.grads, loss)
            pruner.observe()
            pruner.mask_gradients()
            grads = {n: p.grad.clone() for n, p in network.named_parameters()}
            optimizer.gate(loss, cfg.optim.section.clip_norm, number)
            for g in optimizer.param_groups:
                g["lr"] = cfg.optim.section.lr
            optimizer.step()
            optimizer.zero_grad()
            pruner.update(number, number / STEPS)
            masks = [*pruner.state().values(), *network.parameters()]
            need(group.agree(masks), f"ranks hold different masks or weights after update {number}")
        state = {f"{n} {k}": t for n, p in network.named_parameters() for k, t in optimizer.state[p].items()}
        kept = {f"gradient of {n}": g for n, g in grads.items()} | state
        apart = network.state_dict().keys()  # running statistics are those of a rank's own batches
        kept |= {n: b for n, b in network.named_buffers() if n not in apart}
        found.append(kept | dict(network.named_parameters()) | pruner.state())
    alone, together = found
    # state alone may hold nan: what is not there yet
    close = partial(torch.allclose, rtol=EXACT, atol=EXACT)
    odd = {n for n, t in alone.items() if not close(t, together[n], equal_nan=n in state)}
    need(not odd, f"{world.size} processes differ from one at equal effective batch: {_some(odd)}")
    need(world.agree(together.values()), "ranks hold different bits after a step")


def _probe(network: nn.Module) -> dict[str, Tensor]:
    """Parameters moved by 0.05 N(0, 1), where mechanisms that start as the identity act."""
    return {n: p.detach() + init_(torch.empty_like(p), 0, f"probe:{n}", 0.05) for n, p in network.named_parameters()}


def _at(network: nn.Module, ids: Tensor, lam: float, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
    """Logits with other tensors and at a coupling strength, wherever a schedule has put that."""
    strength = {"lam": torch.tensor(lam)} if "lam" in dict(network.named_buffers()) else {}
    network.eval()
    with torch.no_grad():
        logits = functional_call(network, {**tensors, **strength}, (ids,)).logits
    network.train()
    return logits


def _held(network: nn.Module) -> dict[str, Any]:
    """What modules hold outside their tensors' tables; the objects themselves, so that identity means something."""
    found = {f"{path}.{k}".lstrip("."): v for path, m in network.named_modules() for k, v in vars(m).items()}
    return {n: v for n, v in found.items() if not n.endswith(("training", "_parameters", "_buffers", "_modules"))}


def _pace() -> float:
    """CPU seconds of work that no change to this project changes."""
    start = time.process_time()
    x, w = torch.ones(16, 96), torch.full((96, 96), 0.01, requires_grad=True)
    for _ in range(8):
        x = nn.functional.gelu(x @ w)
    x.sum().backward()
    return time.process_time() - start


def _zeros(network: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in network.parameters() if p.ndim >= 2)


def need(fact: bool, otherwise: str) -> None:
    if not fact:
        raise CheckError(otherwise)


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return " ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _symbols(members: list[Any]) -> str:
    return " ".join(m.symbol for m in members)
