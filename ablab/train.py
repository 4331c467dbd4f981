# SPDX-License-Identifier: MIT
"""Training: the only loop, and `main`, what the process of one attempt runs."""

import gc
import math
import resource
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab import build, checkpoint, config, forecast, kconf, metrics, provenance, rundir
from ablab.attempt import Attempt, CapError, DivergedError, EffectError, StoppedError, drift, manifest
from ablab.build import Built
from ablab.config import RunConfig, Switch
from ablab.evaluate import evaluate, perplexity
from ablab.plugin import Clause
from ablab.rundir import Rows, RunError
from ablab.window import CLOCKS, TRAINING, Clocks, Window, Work

SAY_S = 30.0  # between lines of the log
PROBES = (0.0, 0.25, 0.5, 0.75)  # progress at which the applied rate is kept; the last step is the fifth
GIB = 1 << 30
VALIDATION = ("val_loss", "val_perplexity", "val_bpb")
_TOTALS = ("tokens_seen", "total_training_time", "total_training_flops")  # `used` and the rows hold them
_SAID = (
    ("train_loss", "loss", ".4f"),
    ("val_loss", "val_loss", ".4f"),
    ("learning_rate", "lr", ".3g"),
    ("grad_norm", "norm", ".3g"),
    ("train/tok_per_sec", "tok/s", ".0f"),
    ("train/mfu", "mfu", ".1%"),
)


class Loop:
    """One trial, from where it stands to the end of its budget."""

    def __init__(self, attempt: Attempt, cfg: RunConfig, built: Built, device: torch.device, clocks: Clocks) -> None:
        self.attempt, self.cfg, self.built, self.device, self.clocks = attempt, cfg, built, device, clocks
        self.net: torch.nn.Module = built.model
        """What is called: the model, or its compiled form."""
        self.precision = build.precision(cfg, device)
        self.evaluation = cfg.data.evaluation(cfg.eval.tokens, built.length)
        t = cfg.train
        self.accum = t.batch_effective // t.batch_micro
        self.share = torch.tensor(1 / self.accum, device=device)  # gradient of each micro loss: sums to the mean
        tokens = t.batch_effective * built.length
        epoch = cfg.data.samples("train", built.length)
        peak, clip = forecast.peak(cfg, device), cfg.optim.section.clip_norm
        self.work = Work(t.batch_effective, tokens, tokens * built.flops_per_token, peak, epoch, clip)
        self.total = forecast.total_steps(cfg, tokens, epoch)
        self.window = Window(self.accum)
        self.step = self.evals = self.stale = 0
        self.best: tuple[float, int] | None = None
        """Lowest val_loss and its step."""
        self.first_loss: float | None = None
        self.latest: dict[str, float] = {}
        """Newest value of each metric."""
        self.probes: list[tuple[int, float, float]] = []
        """(step, progress, rate that the optimizer applied)."""
        self.saved = self.rowed = -1
        """Step of the newest checkpoint and of the newest row."""
        self.step_ms = array("d")
        self.graphs = 0
        self.said = -math.inf
        self.peak_bytes = 0

    # the loop

    def run(self) -> str:
        """Train to the end; returns `budget` or `early`."""
        t, clocks = self.cfg.train, self.clocks
        self.stream = self.feed()
        clocks.to("other")
        while True:
            done, early = self.used() >= 1.0, False
            # stop
            if self.attempt.stop:
                if self.step:
                    self.save()
                raise StoppedError(self.attempt.stop, self.saved >= 0)
            if t.cap_time and clocks.training() > t.cap_time:
                raise CapError(f"TRAIN_CAP_TIME={t.cap_time}: reached at step {self.step}, {self.used():.0%} done")
            # save first: whatever follows may fail
            open_ = self.rowed < self.step  # False where an earlier attempt got further than its checkpoint
            evaluates = open_ and (done or self.step % self.cfg.eval.interval == 0)
            if self.step and (done or self._saves(evaluates)):
                self.save()
            # evaluate
            if evaluates:
                if not self.evaluate():
                    continue  # told to stop
                early = 0 < t.stop_patience <= self.stale
            # log
            if open_ and (evaluates or (self.step and self.step % t.log_steps == 0)):
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
        clocks, optimizer, prune = self.clocks, self.built.optimizer, self.cfg.prune
        start, before = clocks.since, clocks.spent["fwd_bwd"]
        number, progress = self.step + 1, self.used(self.step + 1)
        self.set_rate(self.cfg.optim.section.lr * self.cfg.schedule.scale(number, progress))
        undo = checkpoint.random_state() if self.accum > 1 else None
        losses: list[Tensor] = []
        for _ in range(self.accum):
            if self.attempt.stop and losses:
                optimizer.zero_grad()
                checkpoint.set_random_state(*undo)
                self.stream = self.feed()
                return
            clocks.to("data")
            x_BT, y_BT = next(self.stream)
            clocks.to("fwd_bwd")
            with self.precision:
                loss = self.net(x_BT, y_BT).loss
            loss.backward(self.share)
            losses.append(loss.detach())
            self.attempt.moved()
        clocks.to("optimizer")
        prune.observe()
        prune.mask_gradients()
        norm = optimizer.gate(sum(losses[1:], losses[0]), self.work.clip)
        optimizer.step()
        optimizer.zero_grad()
        clocks.to("prune")
        prune.update(number)
        clocks.to("other")
        self._book("fwd_bwd", before)
        self.step = number
        self.window.add(losses, norm)
        self.step_ms.append(1e3 * (clocks.since - start))
        if (len(self.probes) < len(PROBES) and progress >= PROBES[len(self.probes)]) or progress >= 1:
            self.probes.append((number, progress, optimizer.param_groups[0]["lr"]))

    def set_rate(self, rate: float) -> None:
        """Write the learning rate into all groups: a float, so the device is not asked."""
        for group in self.built.optimizer.param_groups:
            group["lr"] = rate

    def used(self, step: int | None = None) -> float:
        """Used share of the budget, after `step` steps or those that are done."""
        if self.total is None:
            return self.clocks.training() / (self.cfg.train.time or 1)
        return (self.step if step is None else step) / self.total

    def feed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro batches on the device, from the next sample on."""
        t, pinned = self.cfg.train, self.device.type == "cuda"
        position = self.step * t.batch_effective
        for batch in self.cfg.data.batches("train", t.seed, position, t.batch_micro, self.built.length):
            if pinned:  # the copy overlaps with the step that still runs
                x_BT, y_BT = (part.pin_memory().to(self.device, non_blocking=True) for part in (batch.x, batch.y))
                yield x_BT, y_BT
            else:
                yield batch.x, batch.y

    def evaluate(self) -> bool:
        """Measure on the validation set; False if told to stop before the end."""
        self.clocks.to("eval")
        before = self.clocks.spent["eval"]

        def poll() -> bool:
            self.attempt.moved()
            return bool(self.attempt.stop)

        size = self.cfg.train.batch_micro
        found = evaluate(self.net, self.evaluation, size, self.device, self.precision, poll)
        self.clocks.to("other")
        self._book("eval", before)
        if found:
            self.judge(found)
        return bool(found)

    def judge(self, found: Mapping[str, float]) -> None:
        """Book what an evaluation at this step found."""
        self.latest |= found
        self.evals += 1
        loss = found["val_loss"]
        if self.step == 0:
            self.first_loss = loss
            self.attempt.judge([FIRST_LOSS], self, 0)
        if self.best is None or loss < self.best[0]:
            self.best, self.stale = (loss, self.step), 0
        else:
            self.stale += 1

    def row(self, evaluated: bool, last: bool) -> None:
        """Write what happened since the last row.  Raises DivergedError."""
        bad, clocks, group = self.window.read(), self.clocks, self.built.optimizer.param_groups
        m = self.window.measures(self.step, clocks, self.work) | {"tokens_seen": self.step * self.work.tokens}
        if self.step > self.window.step:
            m |= {"learning_rate": group[0]["lr"], **{f"lr/{g['name']}": g["lr"] for g in group}}
        m |= self._memory()
        if evaluated:
            m |= {name: self.latest[name] for name in VALIDATION}
        if last and self.best:
            m |= {"final/val_loss": self.latest["val_loss"], "final/best_val_loss": self.best[0]}
            m["final/best_val_perplexity"] = perplexity(self.best[0])
            m |= {
                "total_training_flops": self.step * self.work.flops,
                "total_training_time": clocks.training(),
            }
        axes = {"tokens": self.step * self.work.tokens, "flops": float(self.step * self.work.flops)}
        axes |= {"train_s": clocks.training(), "wall_s": clocks.total()}
        self.attempt.patiently(lambda: self.rows.row(self.step, m, **axes))
        self.rowed = self.step
        self._say(m, evaluated or last)
        if bad is not None:
            raise self._diverged(bad)
        if evaluated and not math.isfinite(m["val_loss"]):
            raise DivergedError(f"val_loss is {m['val_loss']} at step {self.step}; {self._last()}", step=self.step)
        self.latest |= m
        self.window = self.window.next(self.step, clocks, self.work)

    def _memory(self) -> dict[str, float]:
        """Gauges of memory; the parts are counted on the tensors, once, after step 2."""
        m = {"memory/host_rss_gib": _resident() / GIB}
        if self.device.type == "cuda":
            peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
            m |= {"memory/allocated_peak_gib": peak / GIB, "memory/reserved_peak_gib": held / GIB}
            self.peak_bytes = max(self.peak_bytes, peak)
        if self.window.step < 2 <= self.step:
            params, state = list(self.built.model.parameters()), self.built.optimizer.state.values()
            m["memory/weights_gib"] = sum(p.nbytes for p in params) / GIB
            m["memory/grads_gib"] = sum(p.grad.nbytes for p in params if p.grad is not None) / GIB
            m["memory/optimizer_gib"] = sum(t.nbytes for s in state for t in s.values()) / GIB
        return m

    def _say(self, m: Mapping[str, float], now: bool) -> None:
        """Refresh the status; a line in the log, now or when the last one is SAY_S old."""
        used, loss = self.used(), m.get("train_loss", self.latest.get("val_loss"))
        eta = self.clocks.total() * (1 - used) / used if 0 < used < 1 else None
        self.attempt.status |= {"step": self.step, "tokens": self.step * self.work.tokens, "eta_s": eta}
        self.attempt.status |= {
            "train_s": self.clocks.training(),
            "loss": loss if math.isfinite(loss or 0) else None,
        }
        if now or time.monotonic() - self.said >= SAY_S:
            self.said = time.monotonic()
            parts = [f"{label} {m[name]:{form}}" for name, label, form in _SAID if name in m]
            parts += [f"eta {eta:.0f} s"] if eta else []
            print("  ".join([f"step {self.step}/{self.total or '?'}", *parts]), flush=True)

    def _diverged(self, step: int) -> DivergedError:
        loss, norm = (values[step - self.window.step - 1] for values in (self.window.losses, self.window.norms))
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"train_loss is {loss}"
        batch = {"first_sample": (step - 1) * self.work.samples, "samples": self.work.samples}
        text = f"{what} at step {step}; last finite {step - 1}, {self._last()}; batch ids in"
        place = self.attempt.dir.exit.relative_to(self.attempt.trial.path)
        return DivergedError(f"{text} {place}", step=step, last_finite=step - 1, batch=batch, checkpoint=self.saved)

    def _last(self) -> str:
        return f"checkpoint {self.saved}" if self.saved >= 0 else "no checkpoint"

    # checkpoints

    def _saves(self, evaluates: bool) -> bool:
        t = self.cfg.train
        every = any(n and self.step % n == 0 for n in (t.ckpt_interval, t.ckpt_every))
        return every or (evaluates and t.ckpt_best)

    def save(self) -> None:
        """Save here unless that has been done.  Raises DivergedError rather than keep what follows a bad step."""
        if self.saved == self.step:
            return
        self.clocks.to("checkpoint")
        if (bad := self.window.read()) is not None:
            raise self._diverged(bad)
        trial, model, optimizer = self.attempt.trial, self.built.model, self.built.optimizer
        place = trial.checkpoint(self.step, self.attempt.dir.number)
        names = ("step", "evals", "stale", "best", "first_loss", "latest", "probes", "rowed")
        state = {name: getattr(self, name) for name in names}
        state |= {"samples": self.step * self.work.samples, "window": self.window.state()}
        state |= {"clocks": dict(self.clocks.spent), "rate": optimizer.param_groups[0]["lr"]}
        self.rows.sync()  # a checkpoint never knows of rows that a crash can take
        self.attempt.patiently(lambda: checkpoint.save(place, model, optimizer, state, self.attempt.guard))
        self.saved = self.step
        self.attempt.moved()
        self.clocks.to("other")

    def sweep(self) -> None:
        """Let checkpoints go that have no role."""
        t = self.cfg.train
        self.clocks.to("checkpoint")
        best = self.best[1] if t.ckpt_best and self.best else None
        checkpoint.sweep(self.attempt.trial, self.attempt.lease["first"], t.ckpt_keep, t.ckpt_every, best)
        self.clocks.to("other")

    def restore(self, place: rundir.Checkpoint) -> None:
        """Go on from a checkpoint, and from what an earlier attempt has already written at its step."""
        state = checkpoint.load(place, self.built.model, self.built.optimizer)
        for name in ("step", "evals", "stale", "first_loss", "latest", "rowed"):
            setattr(self, name, state[name])
        self.best = tuple(state["best"]) if state["best"] else None
        self.probes = [tuple(probe) for probe in state["probes"]]
        self.window.restore(state["window"])
        self.set_rate(state["rate"])
        spent = self.clocks.spent
        for name, seconds in state["clocks"].items():
            spent[name] += seconds
        self.saved = self.step
        seen = [] if self.rowed == self.step else rundir.rows(self.attempt.trial)
        for row in [row for row in seen if row["step"] == self.step]:
            m = row["m"]
            if "val_loss" in m:
                self.judge({name: m[name] for name in VALIDATION})
            self.latest |= m
            # the evaluation came after the checkpoint: its seconds are in the row alone
            spent["eval"] += max(0.0, row["wall_s"] - sum(state["clocks"].values()))
            self.window = self.window.next(self.step, self.clocks, self.work)
            self.rowed = self.step

    # before the first step

    def warm_up(self) -> None:
        """Steps on dummy data, refused by the gate: weights, optimizer and random state keep every bit."""
        before, undo = self._sums(), checkpoint.random_state()
        x_BT = torch.zeros(self.cfg.train.batch_micro, self.built.length, dtype=torch.long, device=self.device)
        y_BT = x_BT.clone()  # one tensor for both would be compiled as such
        optimizer, compiled = self.built.optimizer, self.net is not self.built.model
        for number in range(max(self.cfg.sys.warmup_steps, compiled)):
            self.clocks.to("compile" if compiled and not number else "warmup")
            with self.precision:
                loss = self.net(x_BT, y_BT).loss
            loss.backward(self.share)
            optimizer.gate(loss.detach() * math.nan, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if compiled and not number:  # evaluation is another graph
                self.net.eval()
                with self.precision, torch.no_grad():
                    self.net(x_BT, y_BT)
                self.net.train()
            self.attempt.moved()
            if self.attempt.stop:
                break
        self.graphs = self._graphs()
        checkpoint.set_random_state(*undo)
        assert self._sums() == before, "the warm-up changed weights or optimizer state"
        self.clocks.to("other")

    def _graphs(self) -> int:
        """Graphs that torch.compile has made."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.net is not self.built.model else 0

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
        return [int(t.detach().view(torch.int32).sum(dtype=torch.int64)) for t in tensors]


def _resident() -> int:
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(path: str) -> int:
    """Run the attempt whose folder is given, in a process of its own; returns the exit code."""
    return Attempt(Path(path)).run(_work)


def _work(a: Attempt) -> None:
    clocks = Clocks()
    # what was asked for
    a.settled = settled = kconf.settle(kconf.load(), [kconf.lex(a.trial.config)])
    if kconf.identity(settled.values) != a.trial.record["hash"]:
        raise RunError(f"{a.trial.config}: is not what the campaign planned; a changed configuration is a new campaign")
    cfg = config.load(settled.values, settled.where)
    device = build.settle_system(cfg)
    # what it needs
    a.phase("data")
    if cfg.data.offline:
        cfg.data.prepare()
    data = cfg.data.manifest()
    a.phase("build")
    built = build.build(cfg, device, data["tokenizer"]["vocab"])
    loop = Loop(a, cfg, built, device, clocks)
    place = checkpoint.newest(a.trial, a.lease["first"])
    _record(a, loop, data, place)
    a.ready = True
    # where it stands
    a.phase("load")
    if place:
        loop.restore(place)
    header = {"trial": a.trial.name, "attempt": a.dir.number, "resumed_at_step": loop.step}
    loop.rows = Rows(a.dir.metrics, "metrics", header)
    clauses = [clause for member in build.members(cfg) for clause in member.contracts()]
    a.judge([*BUILD, *(c for c in clauses if c.moment == "build")], built, loop.step)
    if cfg.sys.compile is Switch.ON:
        a.phase("compile")
        loop.net = torch.compile(built.model)
    loop.warm_up()
    gc.freeze()  # what start-up made stays: later collections need not look at it
    # the work
    a.phase("train")
    stop = loop.run()
    a.phase("end")
    a.judge([*END, *(c for c in clauses if c.moment == "end")], loop, loop.step)
    loop.rows.close()
    a.record("summary", _summary(loop, stop))
    a.patiently(lambda: rundir.publish(a.trial, a.dir.number, a.lease["lease"]))


def _record(a: Attempt, loop: Loop, data: Mapping[str, Any], place: rundir.Checkpoint | None) -> None:
    """Write manifest and built; print what runs.  Raises RunError when a resumed trial would not be the same."""
    built, cfg, settled = loop.built, loop.cfg, a.settled
    origins = a.trial.campaign.content["base"].get("origins", {}) | a.trial.record.get("origins", {})
    what = manifest(settled, origins, cfg, built, loop.device, data)
    what |= {"campaign": a.trial.campaign.name, "attempt": a.dir.number, "lease": a.lease["lease"]}
    what |= {"trial": {k: a.trial.record[k] for k in ("id", "hash", "group")}, "resume": None}
    what["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if place:
        before = a.trial.attempt(place.attempt).read("manifest") or {}
        allowed, refused = drift(before, what, a.lease.get("allow_drift") or ())
        if refused:
            text = "\n".join([f"{a.trial.path}: cannot go on from {place.name}, other than then are:", *refused])
            raise RunError(f"{text}\nrun it anew, or allow the keys with ALLOW_DRIFT=")
        stamp = rundir.stamp(place.file("checkpoint"))["sha256"]
        what["resume"] = {"step": place.step, "checkpoint": place.name, "sha256": stamp, "drift": allowed}
    if what["code"]["dirty"]:
        rundir.write_bytes(a.dir.patch, provenance.patch())
    a.dir.write("manifest", what)
    a.record("manifest", what)
    a.record("built", {"attempt": a.dir.number, **build.describe(built, loop.evaluation)})
    a.status["devices"] = [d["uuid"] for d in what["devices"]]
    b, r, limit = what["batch"], what["resolved"], what["budget"]
    steps = f"{loop.total} steps, {loop.total * loop.work.tokens} tokens" if loop.total else f"{limit['limit']} s"
    gates = f"compile {r['compile']}, amp {r['amp']}, attention {r['attention_kernel']}, {r['threads']} threads"
    names = [d["name"] for d in what["devices"]] or [what["cpu"]["model"]]
    print(
        f"trial    {a.trial.record['id']} attempt {a.dir.number}: {a.trial.record['title']}",
        *(f"  {line}" for line in settled.minimal().splitlines()),
        f"device   {' '.join(names)}; {gates}",
        f"versions torch {torch.__version__}, python {what['software']['python']}, tree {what['code']['tree'][:12]}",
        f"batch    {b['micro']} micro x {b['accum']} accumulation x {b['world']} = {b['effective']} sequences"
        f" x {b['seq_len']} tokens = {b['tokens_per_step']} tokens a step",
        f"budget   {limit['kind']}: {steps}",
        f"model    {built.params} parameters, {built.groups}, fingerprint {built.fingerprint[:12]}",
        f"resumes  {place.name}" if place else "starts   at step 0",
        sep="\n",
        flush=True,
    )


def _summary(loop: Loop, stop: str) -> dict[str, Any]:
    """What came out, for summary.json.  Raises EffectError when the primary metric was never written."""
    a, built, clocks = loop.attempt, loop.built, loop.clocks
    clocks.total()
    spent, tokens, train_s = clocks.spent, loop.step * loop.work.tokens, clocks.training()
    chosen = a.trial.campaign.content["registration"].get("metric") or {"key": "val_loss", "mode": "final"}
    key, mode = chosen["key"], chosen["mode"]
    points = [(row["m"][key], row["step"]) for row in rundir.rows(a.trial, [key]) if row["m"][key] is not None]
    if not points:
        raise EffectError(f"{key}: the primary metric was never written")
    value, step = {"final": points[-1], "min": min(points), "max": max(points)}[mode]
    ms = sorted(loop.step_ms) or [1e3 * train_s / loop.step]
    used = {f"{n}_s": spent[n] for n in CLOCKS if n not in TRAINING}
    forecast = a.trial.record.get("forecast")
    peak = loop.peak_bytes or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flops = loop.step * loop.work.flops
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values()) if loop.graphs else 0
    return {
        "trial": a.trial.name,
        "attempt": a.dir.number,
        "attempts": len(a.trial.attempts()),
        "stop": stop,
        "primary": {
            "key": key,
            "value": value,
            "direction": metrics.get(key).better or "lower",
            "step": step,
        },
        "final": {n: v for n, v in loop.latest.items() if "/" not in n and n not in _TOTALS and math.isfinite(v)},
        "best": {"val_loss": {"value": loop.best[0], "step": loop.best[1]}} if loop.best else {},
        "used": {
            "steps": loop.step,
            "tokens": tokens,
            "train_s": train_s,
            **used,
            "total_s": sum(spent.values()),
        },
        "perf": {
            "tok_per_s": tokens / train_s,
            "step_ms_p50": ms[len(ms) // 2],
            "step_ms_p95": ms[len(ms) * 95 // 100],
            "mfu": flops / train_s / loop.work.peak if loop.work.peak else None,
            "peak_mem_bytes": peak,
            "epoch_s_mean": loop.window.epoch_s / loop.window.epoch if loop.window.epoch else None,
        },
        "model": {"params": built.params, "trainable": built.trainable, "fingerprint": built.fingerprint},
        "compile": {"graphs": loop.graphs, "breaks": breaks} if loop.graphs else None,
        "contracts": list(a.contracts.values()),
        "forecast": {**forecast, "actual": [peak / GIB, sum(spent.values()) / 3600]} if forecast else None,
    }


# contracts of every trial; members add theirs


def _groups(built: Built) -> tuple[int, int]:
    return built.trainable, sum(p.numel() for g in built.optimizer.param_groups for p in g["params"])


def _product(loop: Loop) -> tuple[int, int]:
    t, x_BT = loop.cfg.train, next(loop.feed())[0]
    return t.batch_effective * loop.built.length, x_BT.numel() * loop.accum


def _rates(loop: Loop) -> tuple[float, float]:
    """Largest relative error of the applied rate against the formula, over the probes."""
    peak, scale = loop.cfg.optim.section.lr, loop.cfg.schedule.scale
    wanted = [peak * scale(step, progress) for step, progress, _ in loop.probes]
    return 0.0, max(abs(got - w) / max(w, 1e-30) for w, (_, _, got) in zip(wanted, loop.probes, strict=True))


def _evaluations(loop: Loop) -> tuple[int, int]:
    interval = loop.cfg.eval.interval
    return loop.step // interval + 1 + (loop.step % interval > 0), loop.evals


FIRST_LOSS = Clause(
    "loss/first",
    "end",
    lambda loop: (math.log(loop.built.n_vocab), loop.first_loss),
    1.0,  # nats; tied embeddings of GPT-2 size start about 0.2 above ln(vocab), a broken model far from it
)
BUILD = (Clause("optim/groups", "build", _groups),)
END = (
    FIRST_LOSS,
    Clause("batch/product", "end", _product),
    Clause("schedule/rate", "end", _rates, 1e-12),
    Clause("eval/count", "end", _evaluations),
)
