# SPDX-License-Identifier: MIT
"""The coupling schedule against a plain one, and in trials: what rests, what moves, what is reported, what fails."""

import math
import os
import signal
import statistics

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ablab import check, config, plugin, rundir
from ablab.attention import Attention
from ablab.model.gpt import GptNetwork
from ablab.schedule import Schedule
from ablab.schedule._coupling import Onset, Strength
from ablab.tensor.stage import Coupling, Gate, Gauges
from tests import trial as tiny
from tests.blocks import network, tokens


def section(kind, start=0, steps=0, window=None, cv=None, deadline=None):
    given = {"start": start, "steps": steps, "window": window, "cv": cv, "deadline": deadline}
    return Schedule.Section(warmup=0, coupling=kind, **{f"coupling_{k}": v for k, v in given.items()})


def strengths(section, losses, split=2):
    """lam after 0, 1, .. steps with these losses, each the mean of `split` micro batches."""
    lam = torch.ones(())
    made, found = Strength(section, lam), [float(lam)]
    for step, loss in enumerate(losses, 1):
        made.update(step, [torch.tensor(loss + d) for d in ((-0.5, 0.5) if split == 2 else (0.0,))])
        found.append(float(lam))
    return found


# the formula


@pytest.mark.parametrize(
    ("start", "steps", "wanted"),
    [
        (3, 4, [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (0, 4, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        (3, 0, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
        (0, 0, [1] * 10),
        (20, 0, [0] * 10),
    ],
)
def test_a_ramp_is_the_formula_before_at_in_and_after_it(start, steps, wanted):
    assert strengths(section(Onset.RAMP, start, steps), [3.0] * 9) == wanted


@pytest.mark.parametrize("kind", [Onset.CONSTANT, None])
def test_constant_is_1_and_no_work(kind):
    lam = torch.ones(())
    made, version = Strength(section(kind), lam), lam._version
    made.update(1, [torch.tensor(3.0)])
    assert lam == 1 and lam._version == version and made.state() == {}


def plain(losses, start, steps, window, cv, deadline):
    """The same in Python floats, from the definition."""
    found, onset = [], None
    for step in range(len(losses) + 1):
        last = losses[max(0, step - window) : step]
        steady = len(last) == window and statistics.pstdev(last) / statistics.fmean(last) < cv
        if onset is None and ((step >= start and steady) or 0 < deadline <= step):
            onset = step
        since = -1 if onset is None else step - onset
        found.append(min(max(since / steps, 0.0), 1.0) if steps else float(since >= 0))
    return found, onset


def falling(n=60, seed=0):
    """A loss that falls and becomes steady."""
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return [3 + 2 * math.exp(-t / 8) + 0.02 * noise[t] for t in range(n)]


@pytest.mark.parametrize(
    ("start", "steps", "window", "cv", "deadline", "onset"),
    [
        (0, 8, 8, 0.02, 0, 23),
        (0, 0, 8, 0.02, 0, 23),
        (40, 8, 8, 0.02, 0, 40),  # steady before START
        (0, 8, 8, 0.02, 12, 12),  # the deadline comes first
        (0, 8, 8, 0.02, 50, 23),  # it comes later
        (0, 8, 8, 0.001, 0, None),  # never steady
        (0, 8, 16, 0.99, 0, 16),  # as soon as there are WINDOW losses
    ],
)
def test_variance_is_the_definition(start, steps, window, cv, deadline, onset):
    losses = falling()
    wanted, at = plain(losses, start, steps, window, cv, deadline)
    assert at == onset
    assert strengths(section(Onset.VARIANCE, start, steps, window, cv, deadline), losses) == wanted


class Reads(TorchDispatchMode):
    """Counts what the host asks of a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_asks_the_device():
    made = Strength(section(Onset.VARIANCE, 0, 8, 8, 0.02, 30), torch.ones(()))
    with Reads() as seen:
        for step in range(1, 40):
            made.update(step, [torch.ones(())] * 2)
        assert seen.count == 0
        float(made.lam)
        assert seen.count == 1


@pytest.mark.parametrize("at", [5, 23, 27, 50])
def test_its_state_is_all_that_it_needs(at):
    made, losses = section(Onset.VARIANCE, 0, 8, 8, 0.02, 0), falling()
    whole, lam = strengths(made, losses, split=1), torch.ones(())
    first = Strength(made, torch.ones(()))
    for step in range(1, at + 1):
        first.update(step, [torch.tensor(losses[step - 1])])
    second = Strength(made, lam)
    second.restore(first.state())
    for step in range(at + 1, len(losses) + 1):
        second.update(step, [torch.tensor(losses[step - 1])])
        assert float(lam) == whole[step]


# in a trial


class Sound(Gate):
    """A part that couples, has a matrix that decays and a vector that starts at 0, and says how strong it is."""

    reads = (Coupling,)
    gauges = ("lam", "g_mean")

    def __init__(self, dims):
        super().__init__()
        self.w_VV = torch.nn.Parameter(torch.zeros(dims.head_dim, dims.head_dim))
        self.g_H = torch.nn.Parameter(torch.zeros(dims.n_head))
        self.std = {"w_VV": 0.02}

    def forward(self, m, h, ctx):
        lam = ctx.one(Coupling).lam
        self.say(ctx, lam)
        return m._replace(y_BHTV=m.y_BHTV + self.term(m.y_BHTV, lam)), ctx

    def say(self, ctx, lam):
        for g in ctx.all(Gauges):
            g.put(ctx, self, lam=lam, g_mean=self.g_H.mean())

    def term(self, y_BHTV, lam):
        return lam * (y_BHTV @ self.w_VV + self.g_H[:, None, None] * y_BHTV)


class Deaf(Sound):
    """Ignores the strength."""

    def term(self, y_BHTV, lam):
        return super().term(y_BHTV, 1.0)


class Silent(Sound):
    """Keeps a gauge to itself."""

    def say(self, ctx, lam):
        for g in ctx.all(Gauges):
            g.put(ctx, self, lam=lam)


class Chatty(Sound):
    """Reports what it did not declare."""

    gauges = ("lam",)


class FrozenVector(Sound):
    """The gate never moves."""

    def term(self, y_BHTV, lam):
        return lam * (y_BHTV @ self.w_VV + self.g_H.detach()[:, None, None] * y_BHTV)


class FrozenMatrix(Sound):
    """Decay moves the matrix, no gradient does."""

    def term(self, y_BHTV, lam):
        return lam * (y_BHTV @ self.w_VV.detach() + self.g_H[:, None, None] * y_BHTV)


@pytest.fixture
def planted():
    made = []

    def plant(part):
        class Planted(Attention, symbol="ATTN_PLANTED"):
            couples = True

            def parts(self, dims):
                return (part(dims),)

        def before():
            real = config.create

            def create(family, values, where=None):
                member = Planted(Planted.Config(), Planted.Section())
                return (*real(family, values, where), *([member] if family == "ATTN" else []))

            config.create = create

        made.append(Planted)
        return before

    yield plant
    for cls in made:
        plugin.forget(cls.symbol)


RAMP = "CONFIG_SCHED_COUPLING_RAMP=y\nCONFIG_SCHED_COUPLING_START=7\nCONFIG_SCHED_COUPLING_STEPS=8\n"
VARIANCE = "CONFIG_SCHED_COUPLING_VARIANCE=y\nCONFIG_SCHED_COUPLING_WINDOW=8\nCONFIG_SCHED_COUPLING_STEPS=10\n"
VARIANCE += 'CONFIG_SCHED_COUPLING_CV="0.5"\n'  # steady as soon as there are 8 losses
KEEP = "CONFIG_TRAIN_CKPT_EVERY=1\nCONFIG_TRAIN_CKPT_INTERVAL=0\n"


def ran(tmp_path, extra, before, name="test"):
    """(trial, what its attempt said at the end)."""
    trial = tiny.campaign(tmp_path, extra, name)
    attempt = tiny.claim(trial)
    tiny.forked(attempt, before)
    return trial, attempt.read("exit")


def points(trial, name):
    return {r["step"]: r["m"][name] for r in rundir.rows(trial, [name])}


def test_every_row_has_the_strength_and_evaluations_use_it(tmp_path, planted):
    trial, said = ran(tmp_path, RAMP, planted(Sound))
    assert said["state"] == "done", said
    lam, gauge = points(trial, "sched/lam"), points(trial, "attn/1/planted_lam")
    assert lam == {s: min(max((s - 7) / 8, 0), 1) for s in (0, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20)}
    assert gauge == {s: lam[s] for s in (0, 4, 8, 12, 16, 20)}
    mean = points(trial, "attn/0/planted_g_mean")
    assert mean[0] == mean[4] == 0 and mean[20] != 0
    names = {c["name"] for c in trial.summary()["contracts"] if c["ok"]}
    assert names >= {"moved/ATTN_PLANTED", "modules/ATTN_PLANTED"}


def test_a_trial_without_mechanisms_has_strength_1(tmp_path):
    trial, _ = ran(tmp_path, "", lambda: None)
    assert set(points(trial, "sched/lam").values()) == {1.0}
    assert [n for r in rundir.rows(trial) for n in r["m"] if n.startswith(("attn/", "mlp/"))] == []


def test_a_model_without_gauges_runs_no_forward_for_them(monkeypatch):
    net = network()
    monkeypatch.setattr(GptNetwork, "forward", lambda *a, **k: pytest.fail("a forward"))
    assert net.gauges(tokens(1, 8)) == {}


@pytest.mark.parametrize(("steps", "first"), [(0, 8), (8, 9)])
def test_coupled_parameters_rest_bit_by_bit_then_move(tmp_path, planted, steps, first):
    extra = RAMP.replace("STEPS=8", f"STEPS={steps}") + KEEP
    trial, said = ran(tmp_path, extra, planted(Sound))
    assert said["state"] == "done", said
    saved = {c.step: (load_file(c.model), load_file(c.optim)) for c in trial.saved()}
    mine = [n for n in saved[1][0] if "planted" in n]
    states = [n for n in saved[1][1] if "planted" in n]
    assert len(mine) == 4 and len(states) == 12
    for step, (weights, state) in saved.items():
        moved = step >= first
        assert [torch.equal(weights[n], saved[1][0][n]) for n in mine] == [not moved] * 4, step
        assert [bool(state[n].any()) for n in states] == [moved] * 12, step
        counts = {float(state[n]) for n in states if n.endswith("step")}
        assert counts == {max(0, step - first + 1)} and float(state["wte.weight/step"]) == step
    assert {"lr/coupled_decay", "lr/coupled_plain"} < {n for r in rundir.rows(trial) for n in r["m"]}
    groups = trial.built()["groups"]
    assert groups["coupled_decay"] == 2 * 16 * 16 and groups["coupled_plain"] == 2 * 2


def test_constant_has_no_groups_of_its_own(tmp_path, planted):
    trial, said = ran(tmp_path, "", planted(Sound))
    assert said["state"] == "done" and set(trial.built()["groups"]) == {"decay", "plain"}


def stopped(tmp_path, extra, before, at):
    """Outcome of a trial that is told to stop after a step and goes on."""
    trial = tiny.campaign(tmp_path, extra, f"stopped-{at}")

    def disturbed():
        before()
        real = Strength.update

        def update(self, step, losses):
            real(self, step, losses)
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        Strength.update = update

    attempt = tiny.claim(trial)
    assert os.waitstatus_to_exitcode(tiny.forked(attempt, disturbed)) != 0
    assert tiny.ended(trial, attempt) == "preempted"
    assert trial.saved()[0].step == at
    assert tiny.forked(tiny.claim(trial), before) == 0
    return tiny.outcome(trial)


@pytest.mark.parametrize("extra", [RAMP, VARIANCE], ids=["ramp", "variance"])
def test_resume_is_bitwise_equal_before_in_and_after_the_ramp(tmp_path, planted, extra):
    before = planted(Sound)
    whole, said = ran(tmp_path, extra, before, "whole")
    assert said["state"] == "done", said
    lam = points(whole, "sched/lam")
    assert lam[6] == 0 < lam[9] < lam[12] < lam[18] == 1
    for at in (5, 11, 18):
        assert stopped(tmp_path, extra, before, at) == tiny.outcome(whole), at


def test_a_strength_that_is_not_restored_is_seen(tmp_path, planted):
    before = planted(Sound)

    def forgets():
        before()
        Strength.restore = lambda self, state: None

    whole, _ = ran(tmp_path, VARIANCE, before, "whole")
    assert stopped(tmp_path, VARIANCE, forgets, 11) != tiny.outcome(whole)


# planted faults


@pytest.mark.parametrize(
    ("part", "extra", "text"),
    [
        (Silent, "", "gauges: declared or reported, but not both: attn/0/planted_g_mean attn/1/planted_g_mean"),
        (Chatty, "", "gauges: declared or reported, but not both: attn/0/planted_g_mean attn/1/planted_g_mean"),
        (FrozenVector, RAMP, "moved/ATTN_PLANTED: expected [], measured ['blocks.0.attn.gate.planted.g_H'"),
        (FrozenMatrix, "", "moved/ATTN_PLANTED: expected [], measured ['blocks.0.attn.gate.planted.w_VV'"),
    ],
)
def test_a_fault_ends_the_trial(tmp_path, planted, part, extra, text):
    _, said = ran(tmp_path, extra, planted(part))
    assert (said["state"], said["class"]) == ("failed", "effect") and text in said["message"]


@pytest.mark.parametrize(
    ("part", "stage", "reason"),
    [
        (Sound, "", ""),
        (Deaf, "identity", "logits at strength 0 differ from those without by"),
        (Silent, "evaluate", "gauges: declared or reported, but not both: attn/0/planted_g_mean"),
        (FrozenVector, "gradients", "no gradient in 3 iterations: blocks.0.attn.gate.planted.g_H"),
    ],
)
def test_the_dry_run_names_a_fault(tmp_path, planted, monkeypatch, part, stage, reason):
    monkeypatch.setattr(config, "create", config.create)  # undone at the end
    planted(part)()
    s = tiny.settled(tmp_path, RAMP)
    case = check.Case(["x-s1"], "planted", s.values, s.where)
    check.run(case)
    assert case.stage == stage and reason in case.reason and not case.trace
