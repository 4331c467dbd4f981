# SPDX-License-Identifier: MIT
"""The dry run: every distinct configuration of a plan, shrunk, through everything that a trial does."""

import hashlib
import inspect
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab import build, checkpoint, config, forecast, kconf, metrics
from ablab.build import Built
from ablab.config import RunConfig
from ablab.plugin import EffectError
from ablab.rundir import Checkpoint, write_bytes
from ablab.tensor.stage import Past, coupled

VOCAB, IDS = 64, 61  # embedding rows, ids that exist: padded columns are tried too
WIDTH, CONTEXT, MICRO, ACCUM, ITERATIONS = 32, 32, 2, 2, 2
SLOTS = 12  # of a pruned cache: fewer than the context, so that it prunes
RATE = 1e-3
CLOSE = 1e-4  # of logits near 1, where the order of additions differs
UNCOVERED = "not covered: speed, full-size memory, compile, GPU kernels, several processes, stability of long runs"


class CheckError(Exception):
    """Something that a stage looked for is not so."""


@dataclass(slots=True)
class Case:
    """A distinct configuration and what came of it."""

    ids: list[str]
    title: str
    values: Mapping[str, Any]
    where: Mapping[str, str]
    group: str = ""
    params: int | None = None
    fingerprint: str = ""
    seconds: float = 0.0
    stage: str = ""
    """Where it failed; empty if it did not."""
    reason: str = ""
    trace: str = ""
    passed: list[str] = field(default_factory=list)


def main(folder: str) -> int:
    """Do what folder/plan.json asks for, write folder/verdict.json; 0 if all is well, 1 if not, 2 for a bad plan.

    Mode `data` prepares data, `forecast` reads it if it is there, `check` is the dry run; for the groups that the plan
    lists under `forecast` each also says what time and memory they need.
    """
    torch.set_num_threads(1)
    plan = json.loads((Path(folder) / "plan.json").read_text())
    try:
        cases = _cases(plan["trials"])
    except ValueError as error:
        print(error)
        return 2
    sets, failures = _data(cases) if plan["mode"] != "forecast" else ({}, [])
    if plan["mode"] == "check":
        for case in cases:
            run(case, sets.get(_data_key(case)))
        twins(cases)
        print(_table(cases))
        for case in (c for c in cases if c.stage):
            print(f"\n{case.ids[0]}: failed in stage {case.stage}: {case.reason}", case.trace, sep="\n")
            print(f"again: make check STEP={case.ids[0]}")
        print(UNCOVERED)
    print(*failures, sep="\n", end="\n" if failures else "")
    ok = not failures and not any(c.stage for c in cases)
    made = {c.group: asdict(f) for c in cases if c.group in plan.get("forecast", ()) and (f := _forecast(c))}
    ok &= plan["mode"] != "forecast" or len(made) == len(cases)
    verdict = _verdict(plan["mode"], cases, sets, ok) | {"forecast": made}
    write_bytes(Path(folder) / "verdict.json", json.dumps(verdict).encode())
    return 0 if ok else 1


def _cases(trials: list[dict[str, Any]]) -> list[Case]:
    """One for all seeds of a configuration."""
    found: dict[str, Case] = {}
    for trial in trials:
        settled = kconf.settle(kconf.load(), [kconf.lex(Path(trial["id"]), trial["config"], ".config")])
        key = kconf.group(settled.values)
        case = found.setdefault(key, Case([], trial["title"], settled.values, settled.where, group=key))
        case.ids.append(trial["id"])
    return list(found.values())


def _forecast(case: Case) -> forecast.Forecast | None:
    """What a case will need; None for one that failed, and where a member lets none be made."""
    if case.stage:
        return None
    try:
        return forecast.here(config.load(case.values, case.where))
    except Exception as error:  # a member may fail in any way; a trial runs without a forecast all the same
        print(f"{case.ids[0]}: no forecast: {type(error).__name__}: {error}")
        return None


# data


def _data_key(case: Case) -> str:
    chosen = {k: v for k, v in case.values.items() if k.startswith("DATA_") or k == "MODEL_GPT_BLOCK"}
    return json.dumps(chosen, sort_keys=True)


def _data(cases: list[Case]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Manifest by set, each prepared if that needs no network and read once by the real loader; failures."""
    sets: dict[str, dict[str, Any]] = {}
    failures = []
    for case in {_data_key(c): c for c in cases}.values():
        start = time.perf_counter()
        try:
            cfg = config.load(case.values, case.where)
            if cfg.data.offline:
                cfg.data.prepare()
            manifest = cfg.data.manifest() | {"path": str(cfg.data.folder / "manifest.json")}
            sets[_data_key(case)] = manifest
            _read(cfg, manifest)
            tokens = " ".join(f"{name} {s['tokens']}" for name, s in manifest["splits"].items())
            took = time.perf_counter() - start
            print(f"data {manifest['name']} {manifest['sha256'][:12]}: {tokens} tokens, {took:.2f} s")
        except (ValueError, CheckError) as error:
            failures.append(f"{case.ids[0]}: failed in stage data: {error}")
    return sets, failures


def _read(cfg: RunConfig, manifest: Mapping[str, Any]) -> None:
    length, vocab = cfg.model.config.block, manifest["tokenizer"]["vocab"]
    for split in manifest["splits"]:
        batch = next(cfg.data.batches(split, cfg.train.seed, 0, MICRO, length))
        _need(batch.x.shape == batch.y.shape == (MICRO, length), f"{split}: batch of shape {list(batch.x.shape)}")
        _need(torch.equal(batch.x[:, 1:], batch.y[:, :-1]), f"{split}: y is not x shifted by one token")
        top = int(max(batch.x.max(), batch.y.max()))
        _need(int(batch.x.min()) >= 0 and top < vocab, f"{split}: token {top}, the tokenizer has {vocab}")
    cfg.data.evaluation(cfg.eval.tokens, length)


# stages


def shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration at a size that takes milliseconds; mechanisms and their numbers stay."""
    embed, heads = values["MODEL_GPT_EMBED"], min(values["MODEL_GPT_HEADS"], 2)
    small = {
        "MODEL_GPT_LAYERS": min(values["MODEL_GPT_LAYERS"], 2),
        "MODEL_GPT_HEADS": heads,
        "MODEL_GPT_EMBED": WIDTH,
        "MODEL_GPT_BLOCK": CONTEXT,
        "MODEL_GPT_VOCAB": VOCAB,
        "MLP_GELU_WIDTH": max(16, values.get("MLP_GELU_WIDTH", 4 * embed) * WIDTH // embed),
        "EVAL_KVPRUNE_KEEP": min(values.get("EVAL_KVPRUNE_KEEP", 0), SLOTS),
        "EVAL_KVPRUNE_RECENT": min(values.get("EVAL_KVPRUNE_RECENT", 0), SLOTS // 2),
        "TRAIN_BATCH_EFFECTIVE": MICRO * ACCUM,
        "TRAIN_BATCH_MICRO": MICRO,
    }
    return {**values, **{k: v for k, v in small.items() if k in values}}


def run(case: Case, data: Mapping[str, Any] | None) -> None:
    """All stages of a case, up to the first that fails; `data` is the manifest of its set."""
    start = time.perf_counter()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        rig = Rig(case.values, case.where, data["tokenizer"]["vocab"] if data else None, Path(folder))
        try:
            for name, stage in rig.stages().items():
                case.stage = name
                stage()
                case.passed.append(name)
            case.stage = ""
        except (CheckError, EffectError, ValueError) as error:
            case.reason = str(error)
        except Exception as error:  # a member may fail in any way; the verdict says how
            case.reason, case.trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    case.params, case.fingerprint = rig.params, rig.fingerprint
    case.seconds = time.perf_counter() - start


class Rig:
    """One shrunk trial; stages build on each other."""

    def __init__(self, values: Mapping[str, Any], where: Mapping[str, str], n_vocab: int | None, folder: Path) -> None:
        self.values, self.where, self.n_vocab = values, where, n_vocab
        self.saved = Checkpoint(folder / "step", 1, 1)
        self.params: int | None = None
        self.fingerprint = ""
        self.live: set[str] = set()

    def stages(self) -> dict[str, Callable[[], None]]:
        names = (
            "bind",
            "size",
            "build",
            "train",
            "gradients",
            "evaluate",
            "resume",
            "batch",
            "causality",
            "decode",
            "coupling",
            "contracts",
        )
        return {name: getattr(self, name) for name in names}

    def bind(self) -> None:
        self.full = config.load(self.values, self.where)
        self.cfg = config.load(shrunk(self.values), self.where)

    def size(self) -> None:
        """Full size, without memory."""
        with torch.device("meta"):
            c = self.full
            network = c.model.build(c.attention, c.mlp, c.train.seed, self.n_vocab)
        self.params = sum(p.numel() for p in network.parameters())

    def build(self) -> None:
        self.built = self._built()
        self.fingerprint = self.built.fingerprint
        once, again = (self._logits(self.built, self._ids(0))[..., :IDS] for _ in range(2))
        _need(bool(once.isfinite().all()), "logits are not finite at init")
        _need(torch.equal(once, again), "two forwards of one input differ")

    def train(self) -> None:
        """Iterations of micro batches: forward, backward, clip, step; the state after the first is kept."""
        self.start = {n: p.detach().clone() for n, p in self.built.model.named_parameters()}
        for number in range(ITERATIONS):
            self._iterate(self.built, number)
            if number == 0:
                checkpoint.save(self.saved, self.built.model, self.built.optimizer, {"step": 1})

    def gradients(self) -> None:
        names = {n for n, p in self.built.model.named_parameters() if p.requires_grad}
        _need(not names - self.live, f"no gradient in {ITERATIONS} iterations: {_some(names - self.live)}")
        still = {n for n, p in self.built.model.named_parameters() if n in names and torch.equal(p, self.start[n])}
        _need(not still, f"not moved in {ITERATIONS} iterations: {_some(still)}")

    def evaluate(self) -> None:
        """Eval mode gives the same twice, leaves random state alone, and never predicts what does not exist; gauges
        are there, under names that are registered."""
        model, before = self.built.model, torch.get_rng_state()
        model.eval()
        with torch.no_grad():
            losses = [float(model(self._ids(5), self._ids(6)).loss) for _ in range(2)]
            logits = model(self._ids(5)).logits
        model.train()
        for name in model.gauges(self._ids(5, 1)):
            metrics.get(name)
        _need(losses[0] == losses[1], f"two evaluations of one batch: {losses}")
        _need(torch.equal(before, torch.get_rng_state()), "evaluation draws random numbers")
        _need(bool(torch.isinf(logits[..., IDS:]).all()), "padded vocabulary can be predicted in eval mode")

    def resume(self) -> None:
        """The second iteration, from the checkpoint after the first, gives the same bits."""
        other = self._built()
        checkpoint.load(self.saved, other.model, other.optimizer)
        self._iterate(other, 1)
        pairs = zip(self.built.model.named_parameters(), other.model.parameters(), strict=True)
        odd = {name for (name, a), b in pairs if not torch.equal(a, b)}
        _need(not odd, f"differ after save, load and one step: {_some(odd)}")

    def batch(self) -> None:
        """Another batch size and length."""
        with torch.no_grad():
            out = self.built.model(self._ids(7, 3, CONTEXT // 2), self._ids(8, 3, CONTEXT // 2))
        _need(bool(out.loss.isfinite()), f"batch of 3 x {CONTEXT // 2}: loss is {float(out.loss)}")
        _need(out.n == 3 * CONTEXT // 2, f"batch of 3 x {CONTEXT // 2}: {out.n} targets")

    def causality(self) -> None:
        """A changed suffix leaves earlier logits as they are."""
        cut, a = CONTEXT // 2, self._ids(9)
        b = torch.cat([a[:, :cut], self._ids(10)[:, cut:]], 1)
        gap = self._gap(self._logits(self.built, a)[:, :cut], self._logits(self.built, b)[:, :cut])
        _need(gap <= CLOSE, f"logits before token {cut} change by {gap:.2g} with the tokens after it")

    def decode(self) -> None:
        """Token by token with a cache, where the model offers that, against the full forward."""
        model = self.built.model
        if "past" not in inspect.signature(model.forward).parameters:
            return
        ids, past = self._ids(11, length=8), Past(8)
        full = self._logits(self.built, ids)
        model.eval()
        with torch.no_grad():
            steps = [model(ids[:, t : t + 1], past=past).logits for t in range(ids.shape[1])]
        model.train()
        gap = self._gap(torch.cat(steps, 1), full)
        _need(gap <= CLOSE, f"cached decode differs from the full forward by {gap:.2g}")
        if self.cfg.eval.kvprune:
            model.eval()
            past, ids = build.cache(self.cfg), self._ids(12)
            with torch.no_grad():
                steps = [model(x, past=past).logits[..., :IDS] for x in ids.split(1, 1)]
            model.train()
            _need(bool(torch.cat(steps, 1).isfinite().all()), "logits are not finite under a pruned cache")

    def coupling(self) -> None:
        """At strength 0 the model is its host, whatever its coupled parameters are."""
        c, model, ids, stream = self.cfg, self.built.model, self._ids(12), torch.Generator().manual_seed(13)
        symbols = [m.symbol for m in (*c.attention, *c.mlp) if m.couples]
        if not symbols:
            return
        plain = ([m for m in members if not m.couples] for members in (c.attention, c.mlp))
        host = c.model.build(*plain, c.train.seed, IDS)
        host.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            for p in coupled(model):
                p.add_(torch.randn(p.shape, generator=stream))
            wanted = host.eval()(ids).logits
        model.lam.zero_()
        gap = self._gap(self._logits(self.built, ids), wanted)
        model.lam.fill_(1)
        _need(gap <= CLOSE, f"at strength 0 logits differ by {gap:.2g} from those without {' '.join(symbols)}")

    def contracts(self) -> None:
        """Those at build of all members but the data, whose files the data stage reads."""
        members = (m for m in build.members(self.cfg) if m is not self.cfg.data)
        results = [c.judge(self.built) for m in members for c in m.contracts() if c.moment == "build"]
        broken = [r for r in results if not r["ok"]]
        _need(not broken, "; ".join(f"{r['name']}: {r['expected']} expected, {r['measured']} found" for r in broken))

    def _built(self) -> Built:
        return build.build(self.cfg, torch.device("cpu"), IDS)

    def _ids(self, seed: int, size: int = MICRO, length: int = CONTEXT) -> Tensor:
        return torch.randint(IDS, (size, length), generator=torch.Generator().manual_seed(seed))

    def _iterate(self, built: Built, number: int) -> None:
        losses = []
        for micro in range(ACCUM):
            x_BT = self._ids(100 * number + micro, length=CONTEXT + 1)
            loss = built.model(x_BT[:, :-1], x_BT[:, 1:]).loss
            (loss / ACCUM).backward()  # a gradient argument would import sympy, 0.2 s
            losses.append(loss.detach())
        named = [(n, p.grad) for n, p in built.model.named_parameters() if p.grad is not None]
        odd = {n for n, g in named if not bool(g.isfinite().all())}
        _need(not odd, f"gradient not finite in iteration {number + 1}: {_some(odd)}")
        self.live |= {n for n, g in named if bool(g.any())}
        norm = built.optimizer.gate(sum(losses), self.cfg.optim.section.clip_norm, number + 1)
        for group in built.optimizer.param_groups:
            group["lr"] = RATE
        built.optimizer.step()
        built.optimizer.zero_grad()
        _need(bool(torch.stack([*losses, norm]).isfinite().all()), f"loss not finite in iteration {number + 1}")

    def _logits(self, built: Built, ids: Tensor) -> Tensor:
        built.model.eval()
        with torch.no_grad():
            logits = built.model(ids).logits
        built.model.train()
        return logits

    def _gap(self, a: Tensor, b: Tensor) -> float:
        return float((a[..., :IDS] - b[..., :IDS]).abs().max())


def _need(fact: bool, otherwise: str) -> None:
    if not fact:
        raise CheckError(otherwise)


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return " ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def twins(cases: list[Case]) -> None:
    """Cases that differ in the model's configuration must differ in what was built."""
    seen: dict[str, tuple[Any, Case]] = {}
    for case in (c for c in cases if c.fingerprint and not c.stage):
        families = ("MODEL_", "ATTN_", "MLP_")
        key = {k: v for k, v in shrunk(case.values).items() if k.startswith(families)}
        known, twin = seen.setdefault(case.fingerprint, (key, case))
        if known != key:
            odd = _some({k for k in known.keys() | key.keys() if known.get(k) != key.get(k)})
            case.stage, case.reason = "fingerprint", f"same model as {twin.ids[0]} though {odd} differ"


# what is reported


def _table(cases: list[Case]) -> str:
    rows = [("id", "title", "parameters", "fingerprint", "time", "verdict")]
    for c in cases:
        more = f" +{len(c.ids) - 1}" if len(c.ids) > 1 else ""
        size = f"{c.params:,}" if c.params else "-"
        verdict = f"FAILED {c.stage}" if c.stage else "pass"
        rows.append((c.ids[0] + more, c.title, size, c.fingerprint[:12] or "-", f"{c.seconds:.2f} s", verdict))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (False, False, True, False, True, False)
    lines = []
    for row in rows:
        cells = zip(row, wide, right, strict=True)
        lines.append("  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in cells).rstrip())
    return "\n".join(lines)


def _verdict(mode: str, cases: list[Case], sets: Mapping[str, Mapping[str, Any]], ok: bool) -> dict[str, Any]:
    """What verdict.json holds; `data` and `check` go into campaign.json."""
    trials = [
        {
            "ids": c.ids,
            "params": c.params,
            "fingerprint": c.fingerprint,
            "passed": c.passed,
            "stage": c.stage or None,
            "reason": c.reason or None,
        }
        for c in cases
    ]
    first = next(iter(sets.values()), None)
    data = None
    if first:
        tokens = sum(s["tokens"] for s in first["splits"].values())
        data = {"name": first["name"], "sha256": first["sha256"], "tokens": tokens, "manifest": first["path"]}
    text = json.dumps(trials, sort_keys=True)
    word = "skipped" if mode != "check" else "passed" if ok else "failed"
    digest = hashlib.sha256(text.encode()).hexdigest() if mode == "check" else None
    times = {c.ids[0]: round(c.seconds, 3) for c in cases}
    check = {"verdict": word, "sha256": digest}
    return {"ok": ok, "data": data, "check": check, "trials": trials, "seconds": times, "uncovered": UNCOVERED}
