# SPDX-License-Identifier: MIT
# Size: the loop and what a checkpoint of it holds; apart, one could forget what the other added.
"""Training: the only loop, and `main`, what the process of one attempt runs."""

import gc
import math
import time
from array import array
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab import build, checkpoint, config, forecast, kconf, record, rundir
from ablab.attempt import Attempt, CapError, DivergedError, StoppedError
from ablab.build import Built
from ablab.config import RunConfig, Switch
from ablab.evaluate import evaluate
from ablab.plugin import Clause
from ablab.record import BUILD, END, FIRST_LOSS
from ablab.rundir import Rows, RunError
from ablab.schedule._coupling import Strength
from ablab.window import Clocks, Window, Work

SAY_S = 30.0  # between lines of the log
SAID = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_accuracy", "learning_rate", "grad_norm")
SAID += ("time/epoch_s", "train/tok_per_sec", "train/mfu")
MEASURED = ("val_loss", "val_perplexity", "val_bpb", "val_accuracy", "test_loss", "test_accuracy")
"""What an evaluation may find."""
PROBES = (0.0, 0.25, 0.5, 0.75)  # progress at which the applied rate is kept; the last step is the fifth
STATE = (
    "step",
    "evals",
    "stale",
    "best",
    "chosen",
    "top",
    "level",
    "reached",
    "first_loss",
    "latest",
    "probes",
    "applied",
    "rowed",
)
"""Attributes of the loop that a checkpoint holds."""


class Loop:
    """One trial, from where it stands to the end of its budget."""

    rows: Rows

    def __init__(self, attempt: Attempt, cfg: RunConfig, built: Built, device: torch.device, clocks: Clocks) -> None:
        self.attempt, self.cfg, self.built, self.device, self.clocks = attempt, cfg, built, device, clocks
        self.net: torch.nn.Module = built.model
        """What is called: the model, or its compiled form."""
        self.precision = build.precision(cfg, device)
        self.evaluation = cfg.data.evaluation(cfg.eval.tokens or 0, built.length)
        has_test = cfg.eval.test_each_epoch is not None
        self.test = cfg.data.evaluation(0, built.length, "test") if has_test else None
        """Looked at and reported; nothing else reads what it gives."""
        t = cfg.train
        self.accum = t.batch_effective // t.batch_micro
        self.coupling = Strength(cfg.schedule.section, built.model.lam)
        self.share = torch.tensor(1 / self.accum, device=device)  # the gradient of each micro loss
        tokens, epoch = t.batch_effective * built.length, cfg.data.samples("train", built.length)
        peak, clip = forecast.peak(cfg, device), cfg.optim.section.clip_norm
        self.work = Work(t.batch_effective, tokens, tokens * built.flops_per_token, peak, epoch, clip)
        self.total = config.total_steps(cfg, tokens, epoch)
        self.pruner = cfg.prune.build(built.model, built.optimizer, self.total, t.seed)
        self.watched: list[Clause] = []
        """Contracts that every evaluation judges."""
        self.window = Window(self.accum)
        self.pauses = tuple(n for n in (t.log_steps, t.ckpt_interval, t.ckpt_every) if n)
        """A step that one of these divides is followed by more than the next step."""
        self.step = self.evals = self.stale = 0
        self.best: tuple[float, int] | None = None
        """Lowest score and its step."""
        self.chosen: dict[str, float] = {}
        """What was found there."""
        self.found: dict[str, float] = {}
        """What the newest evaluation found."""
        self.top: list[list[float]] = []
        """[score, step] of the best evaluations that have a checkpoint, best first."""
        self.level = 0.0
        """Sparsity that the models of `best` and `top` have."""
        self.reached: int | None = None
        """Step at which pruning reached its target."""
        self.first_loss: float | None = None
        self.latest: dict[str, float] = {}
        """Newest value of each metric."""
        self.gauges: dict[str, float] = {}
        """Those of the newest evaluation."""
        self.applied = (0, 0.0, 0.0)
        """Step, progress, and the rate that the optimizer applied at it."""
        self.probes: list[tuple[int, float, float]] = []
        self.saved = self.rowed = -1
        """Step of the newest checkpoint and of the newest row."""
        self.proven = False
        """The first checkpoint of this attempt has been read back."""
        self.step_ms = array("d")
        self.marks: list[tuple[Any, Any]] = []
        """Begin and end of the steps that `step_ms` still lacks."""
        self.said, self.graphs = -math.inf, 0

    # the loop

    def run(self) -> str:
        """Train to the end; returns `budget` or `early`."""
        t, clocks = self.cfg.train, self.clocks
        self.stream = self.feed()
        clocks.to("other")
        while True:
            pauses = self.attempt.stop or self.used() >= 1.0 or any(self.step % n == 0 for n in self.pauses)
            pauses = pauses or self.due() or self.step == self.reached
            if pauses and self.window.raw:
                self.drain()
            done = self.used() >= 1.0
            if done and self.total is None:  # only now known to be the last step, where a ramp ends at the latest
                clocks.to("prune")
                self.pruner.update(self.step, 1.0)
                clocks.to("other")
            # stop
            if self.attempt.stop:
                if self.step:
                    self.save()
                raise StoppedError(self.attempt.stop, self.saved >= 0)
            if t.cap_time and clocks.training() > t.cap_time:
                raise CapError(f"TRAIN_CAP_TIME={t.cap_time}: reached at step {self.step}, {self.used():.0%} done")
            # save first: whatever follows may fail
            new = self.rowed < self.step  # False where an earlier attempt got further than its checkpoint
            evaluates = new and (done or self.due())
            if self.step and (done or self._saves(evaluates)):
                self.save()
            # evaluate
            if evaluates and not self.evaluate():
                continue  # told to stop
            early = 0 < t.stop_patience <= self.stale and not self.pruner.ramping
            # log
            if new and (evaluates or (t.log_steps and self.step and self.step % t.log_steps == 0)):
                self.row(evaluates, done or early)
            # end
            if early:
                self.save()
            if self.saved == self.step:
                self.sweep()
            if done or early:
                return "budget" if done else "early"
            # step
            self.train_step()

    def train_step(self) -> None:
        """One optimizer step, in the order of docs/design.md; a stop between micro batches takes it back."""
        clocks, optimizer, pruner = self.clocks, self.built.optimizer, self.pruner
        start, before = self.mark(), clocks.spent["fwd_bwd"]
        number, progress = self.step + 1, self.used(self.step + 1)
        self.set_rate(self.cfg.optim.section.lr * self.cfg.schedule.scale(number, progress))
        undo = (checkpoint.random_state(), self._buffers()) if self.accum > 1 else None
        losses: list[Tensor] = []
        hits: Tensor | None = None
        for _ in range(self.accum):
            if self.attempt.stop and losses:
                optimizer.zero_grad()
                checkpoint.set_random_state(*undo[0])
                self._buffers(undo[1])
                self.stream = self.feed()
                return
            clocks.to("data")
            x, y = next(self.stream)
            clocks.to("fwd_bwd")
            with self.precision:
                out = self.net(x, y)
            out.loss.backward(self.share)
            losses.append(out.loss.detach())
            hits = out.hits if hits is None else hits + out.hits
            self.attempt.moved()
        clocks.to("optimizer")
        pruner.observe()
        pruner.mask_gradients()
        norm = optimizer.gate(sum(losses[1:], losses[0]), self.work.clip, number)
        optimizer.step()
        optimizer.zero_grad()
        self.coupling.update(number, losses)
        self.window.add(losses, norm, hits)  # now and then waits for the device, so while a clock of training runs
        clocks.to("prune")
        pruner.update(number, progress)
        clocks.to("other")
        self._book("fwd_bwd", before)
        if self.reached is None and pruner.wanted and not pruner.ramping:
            self.reached = number
        self.step = self.attempt.status["step"] = number
        self.marks.append((start, self.mark()))
        self.applied = (number, progress, optimizer.param_groups[0]["lr"])
        if len(self.probes) < len(PROBES) and progress >= PROBES[len(self.probes)]:
            self.probes.append(self.applied)

    def drain(self) -> None:
        """Wait for the steps that a GPU still computes: on the clock of training, before the budget is read."""
        self.clocks.to("fwd_bwd")
        self.window.read()
        self.clocks.to("other")
        gpu = self.device.type == "cuda"
        self.step_ms.extend(a.elapsed_time(b) if gpu else 1e3 * (b - a) for a, b in self.marks)
        self.marks.clear()

    def mark(self) -> Any:
        """The time here: on a GPU an event, for the host is ahead of it."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def set_rate(self, rate: float) -> None:
        """Write the learning rate into all groups: a float, so that the device is not asked."""
        for group in self.built.optimizer.param_groups:
            group["lr"] = rate

    def used(self, step: int | None = None) -> float:
        """Used share of the budget, after `step` steps or those that are done."""
        if self.total is None:
            return self.clocks.training() / (self.cfg.train.time or 1)
        return (self.step if step is None else step) / self.total

    def due(self) -> bool:
        """Whether an evaluation is wanted after the steps that are done."""
        interval, epochs = self.cfg.eval.interval, self.work.epochs
        return self.step % interval == 0 if interval else epochs(self.step) > epochs(self.step - 1) or not self.step

    def feed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro batches on the device, from the next sample on."""
        t, position = self.cfg.train, self.step * self.work.samples
        for batch in self.cfg.data.batches("train", t.seed, position, t.batch_micro, self.built.length):
            if self.device.type == "cuda":  # pinned: the copy overlaps with the step that still runs
                pinned = (batch.x.pin_memory(), batch.y.pin_memory())
                yield tuple(part.to(self.device, non_blocking=True) for part in pinned)
            else:
                yield batch.x, batch.y

    def evaluate(self) -> bool:
        """Measure on the validation set, and on the test set where that is wanted; False if told to stop before the
        end."""
        self.clocks.to("eval")
        before = self.clocks.spent["eval"]

        def poll() -> bool:
            self.attempt.moved()
            return bool(self.attempt.stop)

        size, cache, net = self.cfg.train.batch_micro, None, self.net
        if self.cfg.eval.kvprune:  # not compiled: the cache grows
            cache, net = partial(build.cache, self.cfg), self.built.model
        found = evaluate(net, self.evaluation, size, self.device, self.precision, poll, cache)
        last = self.used() >= 1.0 or 0 < self.cfg.train.stop_patience <= self.stale + 1
        if found and self.test and (self.cfg.eval.test_each_epoch or last):
            test = evaluate(net, self.test, size, self.device, self.precision, poll, split="test")
            found = test and found | test
        if found:
            with self.precision:
                self.gauges = self.built.model.gauges(
                    next(self.evaluation.batches(1)).x.to(self.device), build.gauges(self.cfg)
                )
        self.clocks.to("other")
        self._book("eval", before)
        if found:
            self.judge(found)
        return bool(found)

    def judge(self, found: Mapping[str, float]) -> None:
        """Book what an evaluation at this step found.  Raises EffectError."""
        self.latest |= found
        self.found = dict(found)
        self.evals += 1
        # the lower the better; accuracy where there is one, and the earliest of equals
        score = -found["val_accuracy"] if "val_accuracy" in found else found["val_loss"]
        if self.step == 0:
            self.first_loss = found["val_loss"]
            self.attempt.judge([FIRST_LOSS], self, 0)
        elif self.watched:
            self.attempt.judge(self.watched, self, self.step)
        if self.pruner.wanted != self.level:  # what was less sparse is nothing to choose, nor to fall short of
            self.level, self.best, self.top, self.stale = self.pruner.wanted, None, [], 0
        if self.best is None or score < self.best[0]:
            self.best, self.stale, self.chosen = (score, self.step), 0, self.found
        else:
            self.stale += 1
        if self.step and math.isfinite(found["val_loss"]):
            self.top = sorted([*self.top, [score, self.step]])[: self.cfg.train.ckpt_top]

    def row(self, evaluated: bool, last: bool) -> None:
        """Write what happened since the last row.  Raises DivergedError."""
        bad, clocks, group = self.window.read(), self.clocks, self.built.optimizer.param_groups
        m = self.window.measures(self.step, clocks, self.work) | {"tokens_seen": self.step * self.work.tokens}
        if self.step > self.window.step:
            m |= {"learning_rate": group[0]["lr"], **{f"lr/{g['name']}": g["lr"] for g in group}}
            m |= {f"opt/{name}": value for name, value in self.built.optimizer.gauges().items()}
        m |= record.memory(self.device) | {"sched/lam": float(self.built.model.lam)}
        if self.window.step < 2 <= self.step:
            m |= record.tensors(self.built, self.pruner.nbytes)
        if evaluated:
            m |= self.found | self.pruner.gauges() | self.gauges
        if last and self.best:
            m |= record.final(self)
            m["total_training_flops"] = self.step * self.work.flops
            m["total_training_time"] = clocks.training()
        axes = {"tokens": self.step * self.work.tokens, "flops": float(self.step * self.work.flops)}
        axes |= {"train_s": clocks.training(), "wall_s": sum(self.window.upto.values())}
        self.attempt.patiently(lambda: self.rows.row(self.step, m, **axes))
        self.rowed = self.step
        self._say(m, evaluated or last)
        if bad is not None:
            raise self._diverged(bad)
        if evaluated and not math.isfinite(m["val_loss"]):
            text = f"val_loss is {m['val_loss']} at step {self.step}; {self._last()}"
            raise DivergedError(text, step=self.step)
        self.latest |= m
        self.window = self.window.next(self.step, clocks, self.work)

    def effects(self) -> None:
        """Write whether each contract holds, in a row at the last step and with the clocks of the row before."""
        m = {f"effect/{name}": float(found["ok"]) for name, found in self.attempt.contracts.items()}
        axes = {"tokens": self.step * self.work.tokens, "flops": float(self.step * self.work.flops)}
        axes |= {"train_s": self.clocks.training(), "wall_s": sum(self.window.clocks.values())}
        self.attempt.patiently(lambda: self.rows.row(self.step, m, **axes))

    def _say(self, m: Mapping[str, float], now: bool) -> None:
        """Refresh the status; a line in the log, now or when the last one is SAY_S old."""
        used, total_s, loss = self.used(), self.clocks.total(), m.get("train_loss", self.latest.get("val_loss"))
        eta = total_s * (1 - used) / used if 0 < used < 1 else None
        status = {"tokens": self.step * self.work.tokens, "eta_s": eta}
        status |= {"train_s": self.clocks.training(), "loss": loss if math.isfinite(loss or 0.0) else None}
        self.attempt.status |= status
        if now or time.monotonic() - self.said >= SAY_S:
            self.said = time.monotonic()
            parts = [f"{name.rpartition('/')[2]} {m[name]:.5g}" for name in SAID if name in m]
            parts += [f"eta {eta:.0f} s"] if eta else []
            print("  ".join([f"step {self.step}/{self.total or '?'}", *parts]), flush=True)

    def _diverged(self, step: int) -> DivergedError:
        at = step - self.window.step - 1
        loss, norm = self.window.losses[at], self.window.norms[at]
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"train_loss is {loss}"
        batch = {"first_sample": (step - 1) * self.work.samples, "samples": self.work.samples}
        place = self.attempt.dir.exit.relative_to(self.attempt.trial.path)
        text = f"{what} at step {step}; last finite {step - 1}, {self._last()}; batch ids in {place}"
        saved = self.saved if self.saved >= 0 else None
        return DivergedError(text, step=step, last_finite=step - 1, batch=batch, checkpoint=saved)

    def _last(self) -> str:
        return f"checkpoint {self.saved}" if self.saved >= 0 else "no checkpoint"

    # checkpoints

    def _saves(self, evaluates: bool) -> bool:
        t = self.cfg.train
        every = any(n and self.step % n == 0 for n in (t.ckpt_interval, t.ckpt_every))
        every |= bool(t.ckpt_target) and self.step == self.reached
        return every or (evaluates and (t.ckpt_best or t.ckpt_top > 0))

    def save(self) -> None:
        """Save here unless that has been done.  Raises DivergedError rather than keep what follows a bad step."""
        if self.saved == self.step:
            return
        self.clocks.to("checkpoint")
        if (bad := self.window.read()) is not None:
            raise self._diverged(bad)
        a, model, optimizer = self.attempt, self.built.model, self.built.optimizer
        place = a.trial.checkpoint(self.step, a.dir.number)
        state = {name: getattr(self, name) for name in STATE}
        state |= {"samples": self.step * self.work.samples, "window": self.window.state()}
        state |= {"clocks": dict(self.clocks.spent), "coupling": self.coupling.state()}
        self.rows.sync()  # a checkpoint never knows of rows that a crash can take
        sparse, more = bool(self.cfg.train.ckpt_sparse), self.pruner.state()
        a.patiently(lambda: checkpoint.save(place, model, optimizer, state, a.guard, more=more, sparse=sparse))
        if not self.proven:
            a.moved()
            checkpoint.prove(place, model, optimizer, self.pruner.state())
            self.proven = True
        self.saved = self.step
        a.moved()
        self.clocks.to("other")

    def sweep(self) -> None:
        """Let checkpoints go that have no role."""
        t = self.cfg.train
        self.clocks.to("checkpoint")
        chosen = {step for _, step in self.top} | ({self.best[1]} if t.ckpt_best and self.best else set())
        chosen |= {self.reached} if t.ckpt_target and self.reached else set()
        checkpoint.sweep(self.attempt.trial, self.attempt.lease["first"], t.ckpt_keep, t.ckpt_every, chosen)
        self.clocks.to("other")

    def restore(self, place: rundir.Checkpoint) -> None:
        """Go on from a checkpoint, and from what an earlier attempt has already written at its step."""
        more = self.pruner.state()
        state = checkpoint.load(place, self.built.model, self.built.optimizer, more)
        self.pruner.restore(more)
        for name in STATE:
            setattr(self, name, state[name])
        self.set_rate(self.applied[2])
        self.window.restore(state["window"])
        self.coupling.restore(state["coupling"])
        spent = self.clocks.spent
        for name, seconds in state["clocks"].items():
            spent[name] += seconds
        self.saved = self.attempt.status["step"] = self.step
        seen = [] if self.rowed == self.step else rundir.rows(self.attempt.trial)
        for row in [row for row in seen if row["step"] == self.step]:
            m = row["m"]
            if "val_loss" in m:
                self.judge({name: m[name] for name in MEASURED if name in m})
            self.latest |= m
            # the evaluation came after the checkpoint: its seconds are in the row alone
            spent["eval"] += max(0.0, row["wall_s"] - sum(state["clocks"].values()))
            self.window = self.window.next(self.step, self.clocks, self.work)
            self.built.optimizer.gauges()  # the row has them
            self.rowed = self.step

    def still(self, symbol: str) -> list[str]:
        """Parameters of a member that nothing has moved."""
        return record.still(self, symbol)

    # before the first step

    def warm_up(self) -> None:
        """Steps on dummy data, refused by the gate: weights, optimizer and random state keep every bit."""
        before, undo = self._sums(), checkpoint.random_state()
        buffers = self._buffers()  # running statistics move in a forward pass
        x, y = (torch.zeros_like(part) for part in next(self.feed()))
        optimizer, compiled = self.built.optimizer, self.net is not self.built.model
        for number in range(max(self.cfg.sys.warmup_steps, compiled)):
            self.clocks.to("compile" if compiled and not number else "warmup")
            with self.precision:
                loss = self.net(x, y).loss
            loss.backward(self.share)
            optimizer.gate(loss.detach() * math.nan, 1.0, self.step + 1)
            optimizer.step()
            optimizer.zero_grad()
            if compiled and not number:  # evaluation is another graph
                self.net.eval()
                with self.precision, torch.no_grad():
                    self.net(x, y)
                self.net.train()
            self.attempt.moved()
            if self.attempt.stop:
                break
        self.graphs = self._graphs()
        checkpoint.set_random_state(*undo)
        self._buffers(buffers)
        assert self._sums() == before, "the warm-up changed weights or optimizer state"
        self.clocks.to("other")

    @torch.no_grad()
    def _buffers(self, values: list[Tensor] | None = None) -> list[Tensor]:
        """Copies of what the model holds beside its parameters; `values` are put there first."""
        held = list(self.built.model.buffers())
        for buffer, value in zip(held, values or held, strict=True):
            buffer.copy_(value)
        return [buffer.clone() for buffer in held]

    def _graphs(self) -> int:
        """Graphs that torch.compile has made."""
        compiled = self.net is not self.built.model
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled else 0

    def _book(self, clock: str, before: float) -> None:
        """Call the seconds of a clock since `before` compilation, if something was compiled meanwhile."""
        graphs, spent = self._graphs(), self.clocks.spent
        if graphs != self.graphs:
            self.graphs = graphs
            spent["compile"] += spent[clock] - before
            spent[clock] = before

    def _sums(self) -> list[int]:
        """Exact checksums of the bits that training changes."""
        state = [t for s in self.built.optimizer.state.values() for t in s.values()]
        tensors = (*self.built.model.parameters(), *self.built.model.buffers(), *state)
        return [int(t.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64)) for t in tensors]


def main(path: str) -> int:
    """Run the attempt whose folder is given, in a process of its own; returns the exit code."""
    return Attempt(Path(path)).run(_work)


def _work(a: Attempt) -> None:
    clocks = Clocks()
    # what was asked for
    a.settled = settled = kconf.settle(kconf.load(), [kconf.lex(a.trial.config)])
    if kconf.identity(settled.values) != a.trial.record["hash"]:
        raise RunError(f"{a.trial.config}: is not what was planned; a changed configuration is a new campaign")
    cfg = config.load(settled.values, settled.where)
    device = build.settle_system(cfg)
    # what it needs
    a.phase("data")
    if cfg.data.offline:
        cfg.data.prepare()
    data = cfg.data.manifest()
    a.phase("build")
    built = build.build(cfg, device)
    loop = Loop(a, cfg, built, device, clocks)
    place = checkpoint.newest(a.trial, a.lease["first"])
    record.begin(loop, data, place)
    a.ready = True
    # where it stands
    a.phase("load")
    if place:
        loop.restore(place)
    header = {"trial": a.trial.name, "attempt": a.dir.number, "resumed_at_step": loop.step}
    loop.rows = Rows(a.dir.metrics, "metrics", header)
    clauses = [clause for member in build.members(cfg) for clause in member.contracts()]
    loop.watched = [c for c in clauses if c.moment == "eval"]
    a.judge([*BUILD, *(c for c in clauses if c.moment == "build")], built, loop.step)
    if cfg.sys.compile is Switch.ON:
        a.phase("compile")
        loop.net = torch.compile(built.model)
    loop.warm_up()
    gc.freeze()  # what start-up made stays: later collections need not look at it
    # the work
    a.phase("train")
    stop = loop.run()
    # what came out
    a.phase("end")
    try:
        a.judge([*END, *(c for c in clauses if c.moment != "build")], loop, loop.step)
    finally:
        loop.effects()
    loop.rows.close()
    a.write("summary", record.summary(loop, stop))
    a.patiently(lambda: rundir.publish(a.trial, a.dir.number, a.lease["lease"]))
