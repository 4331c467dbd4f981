# SPDX-License-Identifier: MIT
"""The loop against a plain one written here; budgets, clocks, ends, and what each fault is called."""

import errno
import json
import math
import os
import re
import signal
import time
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch

from ablab import build, checkpoint, config, metrics, rundir, train, window
from ablab.attempt import Attempt
from ablab.optim._flat import FlatOptimizer
from ablab.plugin import Clause
from ablab.train import Loop
from ablab.window import CLOCKS, TRAINING, Clocks, Window
from tests import trial as tiny

CPU = torch.device("cpu")


def run(tmp_path, extra="", before=lambda: None, name="test"):
    """(trial, attempt, exit code) of one attempt."""
    trial = tiny.campaign(tmp_path, extra, name)
    attempt = tiny.claim(trial)
    code = os.waitstatus_to_exitcode(tiny.forked(attempt, before))
    return trial, attempt, code


def done(tmp_path, extra="", before=lambda: None, name="test"):
    trial, attempt, code = run(tmp_path, extra, before, name)
    assert code == 0, attempt.log.read_text()
    return trial


def points(trial, name):
    return {r["step"]: r["m"][name] for r in rundir.rows(trial, [name])}


def weights(trial):
    return trial.saved()[0].read("checkpoint")["files"]["model.safetensors"]["sha256"]


def final(trial):
    cfg = config.read(trial.config)
    network = cfg.model.build(cfg.attention, cfg.mlp, 1, 256)
    checkpoint.load_model(trial.saved()[0], network)
    return list(network.parameters())


# what is computed


def test_the_loop_equals_a_plain_one(tmp_path):
    trial = done(tmp_path)
    cfg = config.read(trial.config)
    network = cfg.model.build(cfg.attention, cfg.mlp, 1337, 256)
    decay, plain = ([p for p in network.parameters() if id(p) in ids] for ids in _groups(network))
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    batches = cfg.data.batches("train", 1337, 0, 4, 32)
    losses, rates, norms = [], [], []
    for step in range(1, 21):
        rates.append(6e-4 * min(1, step / 4) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        batch = next(batches)
        loss = torch.nn.functional.cross_entropy(network(batch.x).logits.flatten(0, 1), batch.y.flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    steps = [0, *points(trial, "train_loss")]
    windows = list(pairwise(steps))
    assert points(trial, "train_loss") == pytest.approx({b: sum(losses[a:b]) / (b - a) for a, b in windows}, rel=1e-5)
    assert points(trial, "grad_norm") == pytest.approx({b: sum(norms[a:b]) / (b - a) for a, b in windows}, rel=1e-3)
    assert points(trial, "grad_norm_max") == pytest.approx({b: max(norms[a:b]) for a, b in windows}, rel=1e-3)
    assert points(trial, "learning_rate") == pytest.approx({b: rates[b - 1] for _, b in windows}, rel=1e-12)
    for p, q in zip(network.parameters(), final(trial), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)  # two micro batches against one


def _groups(network):
    spared = {id(network.wte.weight), id(network.wpe.weight)}
    decay = {id(p) for p in network.parameters() if p.ndim > 1} - spared
    return decay, {id(p) for p in network.parameters()} - decay


def test_accumulation_equals_one_large_batch(tmp_path):
    size = "CONFIG_TRAIN_BATCH_EFFECTIVE=4\nCONFIG_TRAIN_BATCH_MICRO="
    one, two, four = (done(tmp_path, f"{size}{micro}\n", name=f"m{micro}") for micro in (4, 2, 1))
    for other in (two, four):
        assert points(other, "train_loss") == pytest.approx(points(one, "train_loss"), rel=1e-5)
        assert points(other, "val_loss") == pytest.approx(points(one, "val_loss"), rel=1e-5)
        for p, q in zip(final(one), final(other), strict=True):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


def test_the_same_trial_twice_is_the_same(tmp_path):
    dropout = 'CONFIG_MODEL_GPT_DROPOUT="0.2"\n'
    a, b = (done(tmp_path, dropout, name=name) for name in "ab")
    assert tiny.outcome(a) == tiny.outcome(b)
    assert weights(done(tmp_path, dropout + "CONFIG_TRAIN_SEED=2\n", name="c")) != weights(a)


def test_native_kernels_change_no_bit_of_a_trial(tmp_path):
    pruned = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=4\nCONFIG_PRUNE_INTERVAL=3\n"
    found = [done(tmp_path, f"{pruned}CONFIG_SYS_NATIVE_{word}=y\n", name=word.lower()) for word in ("AUTO", "OFF")]
    assert found[1].manifest()["resolved"]["step_kernel"] == "torch"
    assert weights(found[0]) == weights(found[1])


def test_warm_up_leaves_no_trace(tmp_path):
    dropout = 'CONFIG_MODEL_GPT_DROPOUT="0.2"\nCONFIG_SYS_WARMUP_STEPS='
    cold, warm = (done(tmp_path, f"{dropout}{n}\n", name=f"w{n}") for n in (0, 3))
    assert weights(cold) == weights(warm) and points(cold, "train_loss") == points(warm, "train_loss")
    assert cold.summary()["used"]["warmup_s"] == 0 < warm.summary()["used"]["warmup_s"]


def test_a_warm_up_that_leaves_a_trace_is_caught(tmp_path):
    def before():
        FlatOptimizer.gate = lambda self, loss, limit, number: loss.detach()  # nothing is gated any more

    _, attempt, code = run(tmp_path, before=before)
    assert code == 1 and "the warm-up changed weights" in attempt.read("exit")["message"]


def test_bf16_differs_from_fp32_and_trains(tmp_path):
    plain = done(tmp_path)
    half = done(tmp_path, "CONFIG_SYS_AMP_BF16=y\n", name="half")
    assert half.manifest()["resolved"]["amp"] == "bf16"
    assert weights(half) != weights(plain)
    assert points(half, "val_loss")[20] == pytest.approx(points(plain, "val_loss")[20], rel=1e-2)


# budgets


@pytest.mark.parametrize(
    ("extra", "steps"),
    [
        ("CONFIG_TRAIN_BUDGET_TOKENS=y\nCONFIG_TRAIN_TOKENS=2500\n", 20),  # 19.5 steps of 128
        ("CONFIG_TRAIN_BUDGET_TOKENS=y\nCONFIG_TRAIN_TOKENS=2560\n", 20),
        ("CONFIG_TRAIN_BUDGET_EPOCHS=y\nCONFIG_TRAIN_EPOCHS=1\nCONFIG_TRAIN_BATCH_EFFECTIVE=32\n", 18),
    ],
)
def test_a_budget_ends_with_the_step_that_reaches_it(tmp_path, extra, steps):
    trial = done(tmp_path, extra)
    summary = trial.summary()
    assert (summary["stop"], summary["used"]["steps"]) == ("budget", steps)
    rate = points(trial, "learning_rate")[steps]
    assert rate == pytest.approx(6e-5)  # the floor: the schedule ends with the budget
    if "EPOCHS" in extra:  # 18000 training tokens hold 561 sequences
        assert config.read(trial.config).data.samples("train", 32) == 561
        assert summary["perf"]["epoch_s_mean"] > 0 and points(trial, "time/epoch_s").keys() == {18}


def test_a_time_budget_counts_training_only(tmp_path):
    def before():
        real = Clocks.training
        Clocks.training = lambda self: real(self) * 50  # a fast clock

    trial = done(tmp_path, "CONFIG_TRAIN_BUDGET_TIME=y\nCONFIG_TRAIN_TIME=2\n", before)
    used = trial.summary()["used"]
    assert 2.0 <= used["train_s"] < 3.0
    assert points(trial, "learning_rate")[used["steps"]] < 1.2e-4


def test_early_stop_saves_what_it_stopped_at(tmp_path):
    trial = done(tmp_path, 'CONFIG_OPT_LR="1e-15"\nCONFIG_TRAIN_STOP_PATIENCE=2\n')
    assert trial.summary()["stop"] == "early" and trial.summary()["used"]["steps"] == 8
    assert trial.saved()[0].step == 8 and points(trial, "final/best_val_loss").keys() == {8}


# what is written


def test_clocks_add_up(tmp_path):
    def before():  # a clock that ticks when it is read: the machine's load is not what is tested
        ticks = count()
        window.time = SimpleNamespace(perf_counter=lambda: 1e-3 * next(ticks))

    trial = done(tmp_path, before=before)
    used, rows = trial.summary()["used"], list(rundir.rows(trial))
    assert sum(v for k, v in used.items() if k.endswith("_s") and k != "total_s") == pytest.approx(used["total_s"])
    booked = sum(r["m"].get(f"time/{name}_s", 0.0) for r in rows for name in CLOCKS)
    assert booked == pytest.approx(rows[-1]["wall_s"], rel=0.01)
    assert [r["train_s"] for r in rows] == sorted(r["train_s"] for r in rows)
    assert all(used[k] > 0 for k in ("startup_s", "warmup_s", "data_s", "eval_s", "checkpoint_s", "train_s"))


@pytest.mark.parametrize("fold", [2, 4096])
def test_a_device_is_awaited_on_a_clock_of_training(tmp_path, fold):
    """What a GPU still computes when a row, an evaluation or a checkpoint is due is neither of them."""

    def before():
        window.FOLD = fold
        real_to, real_read, running = Clocks.to, Window.read, [""]

        def to(self, name):
            running[0] = name
            real_to(self, name)

        def read(self):
            assert not self.raw or running[0] in TRAINING, f"waits on the clock {running[0]}"
            return real_read(self)

        Clocks.to, Window.read = to, read

    more = "CONFIG_TRAIN_LOG_STEPS=7\nCONFIG_TRAIN_CKPT_INTERVAL=3\nCONFIG_TRAIN_STEPS=19\n"
    assert points(done(tmp_path, more, before), "train_loss").keys() >= {7, 14, 19}


def test_every_step_is_timed(tmp_path):
    def before():
        timed = Clause("test/timed", "end", lambda loop: (19, len(loop.step_ms)))
        train.END = (*train.END, timed)

    trial = done(tmp_path, "CONFIG_TRAIN_LOG_STEPS=7\nCONFIG_TRAIN_STEPS=19\n", before)
    assert "test/timed" in [c["name"] for c in trial.summary()["contracts"]]


def test_a_done_trial_holds_all_that_is_promised(tmp_path):
    trial = done(tmp_path)
    assert trial.flaw() is None
    manifest, built, summary = trial.manifest(), trial.built(), trial.summary()
    assert manifest["batch"] == {
        "micro": 2,
        "accum": 2,
        "world": 1,
        "effective": 4,
        "seq_len": 32,
        "tokens_per_step": 128,
    }
    resolved = manifest["resolved"]
    assert resolved["threads"] == 1 and resolved["attention_kernel"] == "flash"
    assert resolved["lse_kernel"] == "cpu" and resolved["attend_chunk"] == 128
    assert resolved["step_kernel"] == "native" or resolved["step_kernel"].startswith("torch: ")
    steps, rate = manifest["config"]["TRAIN_STEPS"], manifest["config"]["OPT_LR"]
    assert steps["value"] == 20 and steps["origin"].startswith("test:") and rate["origin"] == "default"
    assert manifest["neighbours"] == []
    assert built["params"] == 26368 and built["state_bytes"] >= 8 * 26368
    assert built["evaluation"]["tokens"] == 512 and len(built["modules"]) > 8
    assert [c["ok"] for c in summary["contracts"]] == [True] * len(summary["contracts"])
    names = {c["name"] for c in summary["contracts"]}
    assert names >= {"batch/product", "schedule/rate", "eval/count", "loss/first", "optim/state_bytes", "optim/groups"}
    val = points(trial, "val_loss")
    assert summary["primary"] == {"key": "val_loss", "value": val[20], "direction": "lower", "step": 20}
    assert summary["best"]["val_loss"] == {"value": min(val.values()), "step": min(val, key=val.get)}
    assert list(val) == [0, 4, 8, 12, 16, 20] and val[0] == pytest.approx(math.log(256), abs=0.1)
    assert points(trial, "val_bpb")[20] == pytest.approx(val[20] / math.log(2))  # a byte is a token
    assert points(trial, "memory/optimizer_gib").keys() == {3}
    assert trial.status()["state"] == "done" and trial.status()["progress"] > 40


def test_every_name_that_a_trial_writes_is_registered_and_what_is_required_is_written(tmp_path):
    trial = done(tmp_path)
    names = {name for row in rundir.rows(trial) for name in row["m"]}
    assert {metrics.get(name).name for name in names} >= {m.name for m in metrics.TABLE.values() if m.required}
    held = {c["name"]: c["ok"] for c in trial.summary()["contracts"]}
    last = list(rundir.rows(trial))[-1]
    assert last["m"] == {f"effect/{name}": float(ok) for name, ok in held.items()} and len(held) > 6


@pytest.mark.parametrize(("lost", "text"), [("grad_norm", "metrics/written"), (None, "'val_los': no such metric")])
def test_a_required_name_that_is_missing_and_an_unknown_one_fail_the_trial(tmp_path, lost, text):
    def before():
        real = Window.measures

        def measures(self, *args):
            m = real(self, *args)
            return {k: v for k, v in m.items() if k != lost} if lost else {**m, "val_los": 1.0}

        Window.measures = measures

    trial, attempt, code = run(tmp_path, "", before)
    assert code == 1 and text in attempt.log.read_text() + str(attempt.read("exit"))
    if lost:
        assert points(trial, "effect/metrics/written") == {20: 0.0}


def test_a_pruned_cache_changes_what_is_measured_and_nothing_else(tmp_path):
    plain = done(tmp_path)
    pruned = done(
        tmp_path, "CONFIG_EVAL_KVPRUNE=y\nCONFIG_EVAL_KVPRUNE_KEEP=6\nCONFIG_EVAL_KVPRUNE_RECENT=2\n", name="b"
    )
    assert weights(plain) == weights(pruned)
    losses = points(plain, "val_loss"), points(pruned, "val_loss")
    assert losses[0].keys() == losses[1].keys() and abs(losses[0][20] - losses[1][20]) > 1e-4
    for trial, slots in ((plain, 32), (pruned, 6)):
        built = trial.built()
        assert (built["kv_slots"], built["kv_bytes"]) == (slots, slots * 2 * 2 * 2 * 32)  # bf16, 2 blocks, k and v
        assert built["kv_bytes_per_token"] == 2 * 2 * 2 * 32


def test_a_cache_in_which_nothing_can_go_is_refused(tmp_path):
    with pytest.raises(ValueError, match="CONFIG_EVAL_KVPRUNE_KEEP = 6 must exceed CONFIG_EVAL_KVPRUNE_RECENT = 5"):
        s = tiny.settled(tmp_path, "CONFIG_EVAL_KVPRUNE=y\nCONFIG_EVAL_KVPRUNE_KEEP=6\nCONFIG_EVAL_KVPRUNE_RECENT=5\n")
        config.load(s.values, s.where)


def test_checkpoints_are_kept_by_role(tmp_path):
    extra = "CONFIG_TRAIN_CKPT_KEEP=1\nCONFIG_TRAIN_CKPT_EVERY=10\nCONFIG_TRAIN_CKPT_INTERVAL=3\n"
    trial = done(tmp_path, extra)
    assert [c.step for c in trial.saved()] == [20, 10]
    best = done(tmp_path, 'CONFIG_TRAIN_CKPT_BEST=y\nCONFIG_TRAIN_CKPT_KEEP=1\nCONFIG_OPT_LR="0.3"\n', name="best")
    at = best.summary()["best"]["val_loss"]["step"]
    assert sorted({20, at} - {0}) == sorted(c.step for c in best.saved())


def test_the_best_so_many_are_kept(tmp_path):
    extra = "CONFIG_TRAIN_CKPT_TOP=4\nCONFIG_TRAIN_CKPT_KEEP=1\nCONFIG_TRAIN_CKPT_INTERVAL=0\nCONFIG_EVAL_INTERVAL=2\n"
    trial = done(tmp_path, extra + 'CONFIG_SCHED_CONSTANT=y\nCONFIG_OPT_LR="0.05"\n')
    losses = {step: loss for step, loss in points(trial, "val_loss").items() if step}
    top = sorted(losses, key=losses.get)[:4]
    assert min(top) < 14 and sorted({*top, 20}) == sorted(c.step for c in trial.saved())


def test_the_first_checkpoint_of_an_attempt_is_read_back(tmp_path):
    def watched():
        real = checkpoint.prove
        checkpoint.prove = lambda place, *rest: print("proven", place.step) or real(place, *rest)

    _, attempt, code = run(tmp_path, before=watched)
    assert code == 0 and re.findall("proven.*", attempt.log.read_text()) == ["proven 5"]

    def lying():
        real = checkpoint.store

        def store(path, tensors, write=os.write):
            real(path, {n: t + 1 if n == "ln_f.bias" else t for n, t in tensors.items()}, write)

        checkpoint.store = store

    trial, attempt, code = run(tmp_path, before=lying, name="lying")
    assert code == 1 and "ln_f.bias is not what memory holds" in attempt.read("exit")["message"]
    assert trial.saved() == []


# ends


def poisoned(at):
    """A `before` that makes one gradient of step `at` infinite, after two warm-up steps."""

    def before():
        real, calls = FlatOptimizer.gate, [0]

        def gate(self, loss, limit, number):
            calls[0] += 1
            if calls[0] == at + 2:
                self.arena.grads[5] = math.inf
            return real(self, loss, limit, number)

        FlatOptimizer.gate = gate

    return before


def test_a_step_that_is_not_finite_is_never_applied_and_named(tmp_path):
    trial, attempt, code = run(tmp_path, before=poisoned(7))
    said = attempt.read("exit")
    assert (code, said["state"], said["class"]) == (1, "diverged", "diverged")
    assert (said["step"], said["last_finite"], said["checkpoint"]) == (7, 6, 5)
    assert said["batch"] == {"first_sample": 24, "samples": 4}
    wanted = "gradient norm is inf at step 7; last finite 6, checkpoint 5; batch ids in attempts/1/exit.json"
    assert said["message"] == wanted
    assert trial.summary() is None and not trial.done() and [c.step for c in trial.saved()] == [5]
    bad = [r for r in map(json.loads, attempt.metrics.read_text().splitlines()[1:]) if r["bad"]]
    assert [r["step"] for r in bad] == [8] and set(bad[0]["bad"]) == {"grad_norm", "grad_norm_max"}


def test_a_checkpoint_does_not_follow_a_bad_step(tmp_path):
    rare = "CONFIG_TRAIN_LOG_STEPS=100\nCONFIG_EVAL_INTERVAL=4\nCONFIG_TRAIN_CKPT_INTERVAL=3\n"
    trial, attempt, code = run(tmp_path, rare, poisoned(5))
    assert code == 1 and attempt.read("exit")["step"] == 5
    assert [c.step for c in trial.saved()] == [3]


def raises(error):
    """A `before` under which the third evaluation raises."""

    def before():
        real = Loop.judge

        def judge(self, found):
            if self.evals == 2:
                raise error
            real(self, found)

        Loop.judge = judge

    return before


@pytest.mark.parametrize(
    ("error", "state", "cls", "code", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "oom", "oom", 1, "make CONFIG_TRAIN_BATCH_MICRO=1 needs less"),
        (MemoryError(), "oom", "oom", 1, "out of memory in phase train"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom", "oom", 1, "allocate"),
        (RuntimeError("CUDA error: out of memory"), "oom", "oom", 1, "CUDA error"),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling"), "oom", "oom", 1, "HIPBLAS"),
        (RuntimeError("boom"), "failed", "exception", 1, "RuntimeError: boom"),
        (ValueError("boom"), "failed", "exception", 1, "ValueError: boom"),
        (OSError(errno.ENOSPC, "No space left"), "preempted", "disk", 75, "free space"),
    ],
)
def test_each_fault_has_its_class(tmp_path, error, state, cls, code, text):
    trial, attempt, got = run(tmp_path, before=raises(error))
    said = attempt.read("exit")
    assert (said["state"], said["class"], said["code"], got) == (state, cls, code, code)
    assert text in said["message"] and said["step"] == 8
    assert ("traceback" in said) == (cls == "exception")
    assert trial.summary() is None and trial.status()["state"] == state


def test_the_cap_fails_the_trial(tmp_path):
    def before():
        Clocks.training = lambda self: 1e6 if self.spent["fwd_bwd"] else 0.0

    _, attempt, code = run(tmp_path, "CONFIG_TRAIN_CAP_TIME=5\n", before)
    said = attempt.read("exit")
    assert (code, said["class"]) == (1, "cap")
    assert said["message"].startswith("TRAIN_CAP_TIME=5: reached at step 1")


def test_missing_data_is_refused(tmp_path):
    extra = f'CONFIG_DATA_TEXT=y\nCONFIG_DATA_TEXT_PATH="{tmp_path}/nothing"\n'
    _, attempt, code = run(tmp_path, extra)
    said = attempt.read("exit")
    assert (code, said["state"], said["class"]) == (1, "refused", "data") and "nothing" in said["message"]


def test_a_broken_contract_fails_the_trial(tmp_path):
    def before():
        real = Loop.set_rate
        Loop.set_rate = lambda self, rate: real(self, 2 * rate)

    trial, attempt, code = run(tmp_path, before=before)
    said = attempt.read("exit")
    assert (code, said["state"], said["class"]) == (1, "failed", "effect")
    assert "schedule/rate: expected 0.0, measured 1.0" in said["message"]
    assert trial.summary() is None and not trial.done()
    lines = [json.loads(line) for line in attempt.contracts.read_text().splitlines()[1:]]
    assert [r["name"] for r in lines if not r["ok"]] == ["schedule/rate"]


def test_a_first_loss_far_from_chance_fails_at_once(tmp_path):
    def before():
        real = build.build

        def loud(*args):
            built = real(*args)
            with torch.no_grad():
                built.model.wte.weight.mul_(100)
            return built

        build.build = loud

    _, attempt, code = run(tmp_path, before=before)
    said = attempt.read("exit")
    assert (code, said["class"], said["step"]) == (1, "effect", 0) and "loss/first" in said["message"]


@pytest.mark.parametrize(
    ("signum", "state"),
    [(signal.SIGTERM, "preempted"), (signal.SIGUSR1, "preempted"), (signal.SIGINT, "interrupted")],
)
def test_a_signal_stops_within_a_step_and_saves_once(tmp_path, signum, state):
    def before():
        real = Loop.train_step

        def step(self):
            real(self)
            if self.step in (6, 7):  # the second one changes nothing
                os.kill(os.getpid(), signum)

        Loop.train_step = step

    trial, attempt, code = run(tmp_path, before=before)
    said = attempt.read("exit")
    assert (code, said["state"], said["class"]) == (75, state, "signal")
    assert [c.step for c in trial.saved()] == [6, 5]


def test_a_signal_between_micro_batches_takes_the_step_back(tmp_path):
    def before():
        real, moves = Attempt.moved, [0]

        def moved(self):
            real(self)
            moves[0] += self.status["phase"] == "train"
            if moves[0] == 12:  # the phase, 8 evaluation batches, step 1, and the first half of step 2
                os.kill(os.getpid(), signal.SIGTERM)

        Attempt.moved = moved

    trial, _, code = run(tmp_path, before=before)
    place = trial.saved()[0]
    assert code == 75 and place.step == 1 and place.read("state")["samples"] == 4


def test_a_full_disk_is_waited_for(tmp_path):
    quiet = done(tmp_path, name="quiet")

    def before():
        real, left = checkpoint.store, [3]
        time.sleep = lambda seconds: None

        def store(*args):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        checkpoint.store = store

    trial = done(tmp_path, before=before, name="full")
    assert tiny.outcome(trial) == tiny.outcome(quiet)
    assert quiet.campaign.reserve.exists() and not trial.campaign.reserve.exists()


def test_a_disk_that_stays_full_stops_the_trial_with_its_checkpoints(tmp_path):
    def before():
        real, calls = checkpoint.store, [0]
        rundir.PATIENCE_S = 0.0

        def store(*args):
            calls[0] += 1
            if calls[0] > 4:  # the files of the first checkpoint
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        checkpoint.store = store

    trial, attempt, code = run(tmp_path, before=before)
    said = attempt.read("exit")
    assert (code, said["state"], said["class"]) == (75, "preempted", "disk")
    assert [c.step for c in trial.saved()] == [5] and trial.saved()[0].flaw() is None
    assert sorted(p.name for p in trial.checkpoints.iterdir()) == ["step-00000005-a1"]


def test_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trial = tiny.campaign(tmp_path)
    assert train.main(str(tiny.claim(trial).path)) == 0
    assert signal.getsignal(signal.SIGTERM) is before and trial.done()
