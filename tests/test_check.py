# SPDX-License-Identifier: MIT
"""The dry run passes what works and names the stage of every planted fault."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from ablab import check, machine, plugin
from ablab.attention import Attention
from ablab.mlp import Mlp
from ablab.optim._flat import FlatOptimizer
from ablab.optim.adamw import FlatAdamW
from ablab.prune import Prune, Pruner
from ablab.prune._masked import Masked
from ablab.rig import SHARED
from ablab.tensor.stage import Enrich, Gate, LatentDelta
from tests import trial as tiny
from tests.contract.test_knobs import mechanisms
from tests.test_images import IMAGES


def tiny_of(tmp_path, extra=""):
    s = tiny.settled(tmp_path, extra)
    return s.values, s.where


def write(tmp_path, texts, mode="check"):
    trials = [{"id": i, "hash": "0" * 64, "title": f"title of {i}", "config": t} for i, t in texts.items()]
    (tmp_path / "plan.json").write_text(json.dumps({"trials": trials, "mode": mode}))


def text(tmp_path, extra=""):
    return tiny.settled(tmp_path / "data", extra).config()


def verdict(tmp_path):
    return json.loads((tmp_path / "verdict.json").read_text())


def test_what_works_passes_every_stage(tmp_path, capsys):
    texts = {f"r0-s{n}": text(tmp_path, f"CONFIG_TRAIN_SEED={n}\n") for n in (1, 2)}
    write(tmp_path, texts | {"r1-s1": text(tmp_path, "CONFIG_MLP_GELU_WIDTH=32\n")})
    assert check.main(str(tmp_path)) == 0
    out, said = capsys.readouterr().out, verdict(tmp_path)
    assert said["ok"] and said["check"]["verdict"] == "passed" and len(said["check"]["sha256"]) == 64
    assert [t["ids"] for t in said["trials"]] == [["r0-s1", "r0-s2"], ["r1-s1"]]
    assert [t["params"] for t in said["trials"]] == [26368, 26368 - 2 * 32 * 65]
    assert said["trials"][0]["fingerprint"] != said["trials"][1]["fingerprint"]
    stages = "bind size build identity train gradients evaluate resume batch causality decode overfit state knobs"
    assert said["trials"][0]["passed"] == [*stages.split(), "contracts"]
    assert said["data"]["name"] == "synth" and said["data"]["tokens"] == 20000
    assert json.loads(Path(said["data"]["manifest"]).read_text())["sha256"] == said["data"]["sha256"]
    table = [line.split() for line in out.splitlines() if line.startswith("r")]
    assert table[0][:2] == ["r0-s1", "+1"] and [row[-1] for row in table] == ["pass", "pass"]
    assert table[0][-2] == "1.00x" and 0.2 < float(table[1][-2][:-1]) < 5
    assert "26,368" in out and "not covered: long runs, " in out and "several processes (DDP=1)" in out


def test_data_alone_can_be_asked_for(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path)}, "data")
    assert check.main(str(tmp_path)) == 0
    assert verdict(tmp_path)["check"] == {"verdict": "skipped", "sha256": None}
    assert verdict(tmp_path)["data"]["name"] == "synth" and "fingerprint" not in capsys.readouterr().out


def test_a_configuration_that_does_not_settle_is_a_bad_request(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path).replace("CONFIG_TRAIN_STEPS=20", "CONFIG_TRAIN_STEPS=no")})
    assert check.main(str(tmp_path)) == 2
    assert "CONFIG_TRAIN_STEPS=no: not an int" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["data", "check"])
def test_epochs_are_a_budget_like_any_other_once_data_is_there(tmp_path, capsys, mode):
    """225 images by 32: 15 steps in two epochs."""
    fine = IMAGES.replace("EPOCHS=3", "EPOCHS=2")
    short = fine.replace("EVAL_INTERVAL=0", "EVAL_INTERVAL=4")
    short += "CONFIG_SCHED_WARMUP=15\nCONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=11\n"
    write(tmp_path, {"a-s1": text(tmp_path, fine), "b-s1": text(tmp_path, short)}, mode)
    assert check.main(str(tmp_path)) == 2
    out = capsys.readouterr().out
    assert "b-s1: failed in stage budget: CONFIG_SCHED_WARMUP=15: the budget ends inside the warm-up, after 15" in out
    assert "CONFIG_PRUNE_RAMP_FRACTION ends it at step 11" in out and "CONFIG_EVAL_INTERVAL=4: 4 evaluations" in out
    assert "a-s1: failed" not in out


def test_missing_data_fails(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path, 'CONFIG_DATA_TEXT=y\nCONFIG_DATA_TEXT_PATH="/nowhere"\n')})
    assert check.main(str(tmp_path)) == 1
    assert "a-s1: failed in stage data: " in capsys.readouterr().out
    assert verdict(tmp_path)["data"] is None and not verdict(tmp_path)["ok"]


def test_a_vocabulary_below_the_tokenizer_fails_at_full_size(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path, "CONFIG_MODEL_GPT_VOCAB=128\n"), "b-s1": text(tmp_path)})
    assert check.main(str(tmp_path)) == 2
    out = capsys.readouterr().out
    assert "a-s1: failed in stage size: CONFIG_MODEL_GPT_VOCAB = 128 : the tokenizer has 256 ids" in out
    assert "again: make check STEP=a-s1" in out
    assert [t["stage"] for t in verdict(tmp_path)["trials"]] == ["size", None]  # the other one is still tried


# planted faults: a gate that does something wrong


class Leaks(Gate):
    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV + m.y_BHTV.roll(-1, 2)), ctx


class Unused(Gate):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, m, h, ctx):
        return m, ctx


class Mute(Unused):
    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * self.w.detach().mean()), ctx


class Explodes(Gate):
    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV / 0.0), ctx


class ExplodesBackward(Unused):
    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * (1 + (self.w - 1).abs().sqrt().mean())), ctx


class Remembers(Gate):
    calls = 0

    def forward(self, m, h, ctx):
        self.calls += 1
        return m._replace(y_BHTV=m.y_BHTV * self.calls), ctx


class Keeps(Gate):
    def forward(self, m, h, ctx):
        self.kept = m.y_BHTV
        return m, ctx


class Pools(Unused):
    """A gate from the mean over all tokens, later ones too; 1 at first."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * (1 + self.w * m.y_BHTV.mean((1, 2, 3), keepdim=True))), ctx


class Neighbours(Unused):
    """A gate from the mean over the rows of the batch."""

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * (self.w.mean() + m.y_BHTV.mean((0, 1, 3), keepdim=True))), ctx


class Inverted(Gate):
    """Attends to later tokens alone, as a mask that is inverted does; the last one to itself."""

    def forward(self, m, h, ctx):
        logits = h.scale * h.q_BHTK @ h.k_BHTK.transpose(2, 3)
        later = torch.ones(logits.shape[2:], dtype=torch.bool).triu(1)
        later[-1, -1] = True
        p = logits.masked_fill(~later, -torch.inf).softmax(3)
        return m._replace(y_BHTV=p @ h.v_BHTV), ctx


class Hungry(Gate):
    """Reads what no block before it puts there."""

    reads = (LatentDelta,)

    def forward(self, m, h, ctx):
        return m, ctx


class Swapped(Gate):
    """The signature of another stage."""

    def forward(self, x_BTD, ctx):
        return x_BTD, ctx


class Draws(Gate):
    def forward(self, m, h, ctx):
        torch.rand(())
        return m, ctx


class Length(Gate):
    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * m.y_BHTV.shape[2]), ctx


class Batch(Gate):
    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV.view(check.MICRO, *m.y_BHTV.shape[1:])), ctx


class Plain(Enrich):
    """A plain MLP's part, which the host gives a context as well."""

    def forward(self, h_BTF):
        return h_BTF


@pytest.fixture
def planted():
    made = []

    def plant(part, **facts):
        base, symbol = (Mlp, "MLP_PLANTED") if part is Plain else (Attention, "ATTN_PLANTED")

        class Planted(base, symbol=symbol):
            @dataclass(frozen=True, slots=True, kw_only=True)
            class Config:
                dim: int | None

            def parts(self, dims):
                return (part(),)

        for name, value in facts.items():
            setattr(Planted, name, value)
        made.append(Planted)

    yield plant
    for cls in made:
        plugin.forget(cls.symbol)


def case_of(tmp_path, extra="", **more):
    """The tiny configuration with what is planted, and `more` values."""
    s = tiny.settled(tmp_path, extra)
    values = {}
    for symbol, value in s.values.items():
        values[symbol] = value
        if symbol in ("ATTN_MHA", "MLP_GELU"):
            values[f"{symbol.partition('_')[0]}_PLANTED"] = True
    return check.Case(["x-s1"], "planted", {**values, **more}, s.where)


def tried(tmp_path, extra="", **more):
    case = case_of(tmp_path, extra, **more)
    check.run(case)
    return case


@pytest.mark.parametrize(
    ("gate", "stage", "reason"),
    [
        (Leaks, "causality", "logits before token 1 change"),
        (Pools, "causality", "logits before token 1 change"),
        (Inverted, "causality", "logits before token 1 change"),
        (Neighbours, "batch", "depend on the other rows"),
        (Keeps, "state", "kept on a module between forwards: blocks.0.attn.gate.planted.kept blocks.1"),
        (Hungry, "size", "CONFIG_ATTN_PLANTED: its gate in block 0 reads LatentDelta"),
        (Swapped, "build", "TypeError"),
        (Plain, "build", "TypeError"),
        (Unused, "gradients", "no gradient in 2 iterations: blocks.0.attn.gate.planted.w blocks.1.attn.gate.planted.w"),
        (Mute, "gradients", "no gradient"),
        (Explodes, "build", "not finite at init"),
        (ExplodesBackward, "train", "gradient not finite in iteration 1: blocks.0.attn.gate.planted.w"),
        (Remembers, "build", "two forwards of one input differ"),
        (Draws, "evaluate", "evaluation draws random numbers"),
        (Length, "decode", "cached decode differs from the full forward"),
        (Batch, "batch", "RuntimeError: shape"),
    ],
)
def test_a_planted_fault_is_named(tmp_path, planted, gate, stage, reason):
    planted(gate)
    case = tried(tmp_path)
    assert case.stage == stage and reason in case.reason and not case.refused
    assert bool(case.trace) == (gate in (Batch, Swapped, Plain))


def test_a_gate_that_is_well_made_passes(tmp_path, planted):
    class Fine(Unused):
        def forward(self, m, h, ctx):
            return m._replace(y_BHTV=m.y_BHTV * self.w.mean()), ctx

    planted(Fine)
    assert tried(tmp_path).stage == ""


def test_an_optimizer_that_does_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(FlatAdamW, "step", lambda self: None)
    case = tried(tmp_path)
    assert case.stage == "gradients" and "not moved in 2 iterations" in case.reason


def test_optimizer_state_that_is_not_saved_is_named(tmp_path, monkeypatch):
    def forget(self, name, part=None):
        flat = self.flats[name] = torch.zeros_like(self.arena.weights)
        for p in (p for g in self.param_groups for p in g["params"]):
            self.state[p][name] = torch.zeros_like(p)  # what is saved is not what is used
        return flat

    monkeypatch.setattr(FlatOptimizer, "zeros", forget)
    case = tried(tmp_path)
    assert case.stage == "resume" and "differ after save, load and one step" in case.reason


class Scale(Unused):
    """1 at first if `start` is 1."""

    start = 1.0

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), self.start))

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * self.w), ctx


class Twice(Scale):
    start = 2.0


@pytest.mark.parametrize(
    ("facts", "part", "stage", "reason"),
    [
        ({"identity": True}, Scale, "", ""),
        ({"identity": True}, Twice, "identity", "ATTN_PLANTED: logits at init differ from those without by "),
        ({"couples": True}, Scale, "identity", "ATTN_PLANTED: logits at strength 0 differ from those without by "),
    ],
)
def test_what_a_member_claims_of_itself_is_tried(tmp_path, planted, facts, part, stage, reason):
    planted(part, **facts)
    case = tried(tmp_path)
    assert case.stage == stage and case.reason.startswith(reason)


def test_a_knob_that_nobody_reads_is_named(tmp_path, planted):
    planted(Scale)
    case = tried(tmp_path, ATTN_PLANTED_DIM=3)
    assert case.stage == "knobs" and case.reason == "nobody reads CONFIG_ATTN_PLANTED_DIM"


@pytest.fixture
def still():
    """A pruner that prunes nothing."""

    class Still(Prune, symbol="PRUNE_STILL"):
        def build(self, network, optimizer, total, seed):
            return Pruner(network)

    yield
    plugin.forget("PRUNE_STILL")


def test_a_mask_that_does_not_move_is_named(tmp_path, still):
    case = tried(tmp_path, PRUNE_NONE=False, PRUNE_STILL=True)
    assert case.stage == "overfit" and "PRUNE_STILL: no more zeros in the weights after 20 steps" in case.reason


@pytest.mark.parametrize(
    ("rate", "reason"), [("10", "lower CONFIG_OPT_LR"), ("1e-3", "weights move at a learning rate of 0")]
)
def test_a_rate_that_is_too_high_or_not_applied_is_named(tmp_path, monkeypatch, rate, reason):
    step = FlatAdamW.step
    if rate == "1e-3":

        def own(self):
            for group in self.param_groups:
                group["lr"] = group["lr"] or 1e-3
            step(self)

        monkeypatch.setattr(FlatAdamW, "step", own)
    case = tried(tmp_path, f'CONFIG_OPT_LR="{rate}"\n')
    assert case.stage == "overfit" and reason in case.reason


@pytest.mark.parametrize(("part", "reason"), [(Scale, ""), (Neighbours, "2 processes differ from one at equal")])
def test_two_processes_equal_one(tmp_path, planted, part, reason):
    planted(part)
    cases = [case_of(tmp_path), check.Case(["y-s1"], "", *tiny_of(tmp_path))]
    check.together(cases, tmp_path)
    assert cases[1].passed == ["ddp"]  # the one after a failure is tried all the same
    assert cases[0].stage == ("ddp" if reason else "") and cases[0].reason.startswith(reason)


def test_two_processes_equal_one_with_all_mechanisms(tmp_path):
    s = tiny.settled(tmp_path, mechanisms())
    case = check.Case(["x-s1"], "", s.values, s.where)
    check.together([case], tmp_path)
    assert case.passed == ["ddp"], case.reason


def test_state_that_is_not_there_yet_is_no_difference(tmp_path):
    case = check.Case(["x-s1"], "", *tiny_of(tmp_path, "CONFIG_OPT_ADAMWSPAM=y\nCONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y\n"))
    check.together([case], tmp_path)
    assert case.passed == ["ddp"], case.reason


PRUNED = "CONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\n"


def seen(tmp_path, monkeypatch, extra="", spoil=lambda mask: None):
    """A pruned case of two processes, and the zeros of each update; `spoil` is what rank 1 does to its third mask."""
    real, here = Masked.zero, []

    def zero(self):
        here.append(self.masked())
        if len(here) == 3 + SHARED and torch.distributed.get_rank():  # the first steps are those of a process alone
            spoil(self.mask)
        (tmp_path / f"zeros-{torch.distributed.get_rank()}").write_text(" ".join(map(str, here)))
        real(self)

    monkeypatch.setattr(Masked, "zero", zero)
    case = check.Case(["x-s1"], "", *tiny_of(tmp_path, PRUNED + extra))
    check.together([case], tmp_path)
    return case, [(tmp_path / f"zeros-{rank}").read_text().split() for rank in range(2)]


def test_masks_of_two_processes_are_equal_after_each_update(tmp_path, monkeypatch):
    case, zeros = seen(tmp_path, monkeypatch)
    assert case.passed == ["ddp"], case.reason
    counts = list(map(int, zeros[0]))
    assert zeros[0] == zeros[1] and counts[:SHARED] == counts[SHARED:] == sorted(counts[:SHARED])
    assert counts[0] == 0 and counts[-1] > 0 and len(set(counts)) == SHARED  # each changed something


@pytest.mark.parametrize("bits", ["BOOL", "BITS"])
def test_a_bit_of_a_mask_that_is_flipped_on_one_rank_is_caught(tmp_path, monkeypatch, bits):
    def flip(mask):
        mask.held[0] ^= 1 if mask.bits else -1

    monkeypatch.setattr(Masked, "check", lambda self, step: None)  # else the count of zeros sees it first
    case, _ = seen(tmp_path, monkeypatch, f"CONFIG_PRUNE_MASK_{bits}=y\n", flip)
    assert case.stage == "ddp" and case.reason == "ranks hold different masks or weights after update 3"


def test_a_rank_that_decides_by_chance_is_named(tmp_path, monkeypatch):
    def shaken(self):
        self.arena.weights.add_(torch.rand(()))  # each rank draws its own

    monkeypatch.setattr(FlatAdamW, "step", shaken)
    case = check.Case(["x-s1"], "", *tiny_of(tmp_path))
    check.together([case], tmp_path)
    assert case.stage == "ddp"


def test_a_rank_that_dies_is_named(tmp_path, monkeypatch):
    def die(values, where, world):
        if world.rank:
            os._exit(3)
        world.mean_(torch.ones(1))

    monkeypatch.setattr(check, "alone_and_together", die)
    case = check.Case(["x-s1"], "", *tiny_of(tmp_path))
    check.together([case], tmp_path)
    assert case.stage == "ddp" and case.reason


def test_a_step_that_got_slower_is_a_note_and_no_failure(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path)})
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["trials"][0]["group"] = "g"
    for before, notes in ((1e9, 0), (1e-3, 1)):
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "costs": {"g": before}}))
        assert check.main(str(tmp_path)) == 0
        assert len(verdict(tmp_path)["trials"][0]["notes"]) == notes
    assert "a-s1: a step costs" in capsys.readouterr().out


def test_a_process_that_dies_is_a_failure_of_its_case(tmp_path, monkeypatch):
    real = check.run

    def dies(case):
        if case.ids[0] == "b-s1":
            os._exit(3)
        real(case)

    monkeypatch.setattr(check, "run", dies)
    monkeypatch.setattr(machine, "cores", lambda: (0, 1))
    cases = [check.Case([f"{n}-s1"], "", *tiny_of(tmp_path)) for n in "abcd"]
    check.spread(cases)
    assert [c.stage for c in cases] == ["", "process", "", ""] and cases[3].fingerprint  # after b in its process


def test_data_that_a_network_must_bring_is_not_covered_or_stops_a_start(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path, "CONFIG_DATA_FINEWEBEDU=y\nCONFIG_MODEL_GPT_VOCAB=50304\n")})
    assert check.main(str(tmp_path)) == 1
    assert "a-s1: failed in stage data: " in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "start": False}))
    assert check.main(str(tmp_path)) == 0
    assert "data of a-s1 (" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("gpu", "code", "says"), [("h100", 0, "fits: "), ("a10x", 2, "nearest: A100 or A10G")])
def test_a_gpu_by_name(tmp_path, capsys, gpu, code, says):
    write(tmp_path, {"a-s1": text(tmp_path)})
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "gpu": gpu}))
    assert check.main(str(tmp_path)) == code
    assert says in capsys.readouterr().out


def test_a_model_that_cannot_fit_is_4_and_no_failure(tmp_path, capsys):
    huge = "CONFIG_MODEL_GPT_EMBED=8192\nCONFIG_MODEL_GPT_LAYERS=48\nCONFIG_MLP_GELU_WIDTH=32768\n"
    write(tmp_path, {"a-s1": text(tmp_path), "b-s1": text(tmp_path, huge)})
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "gpu": "RTX 4090"}))
    assert check.main(str(tmp_path)) == 4
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("a-s1", "b-s1"))]
    assert "pass, fits: " in rows[0] and "pass, does not fit: " in rows[1] and "no micro batch fits" in rows[1]


def test_a_knob_that_changes_nothing_is_named(tmp_path):
    s, cases = tiny.settled(tmp_path), []
    for n in (1, 2):
        cases.append(check.Case([f"r{n}-s1"], "", {**s.values, "ATTN_FAKE_DIM": n}, s.where))
        check.run(cases[-1])
    check.twins(cases)
    assert [c.stage for c in cases] == ["", "fingerprint"]
    assert cases[1].reason == "same model as r1-s1 though ATTN_FAKE_DIM differ"


def test_a_step_costs_little_and_loads_no_dynamo(tmp_path):
    code = f"""
import sys, time
from ablab import check
check.main({str(tmp_path)!r})
print("dynamo", "torch._dynamo" in sys.modules, "sympy", "sympy" in sys.modules)
"""
    write(tmp_path, {f"r{n}-s1": text(tmp_path, f"CONFIG_MLP_GELU_WIDTH={32 * n}\n") for n in (1, 2, 3)})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dynamo False sympy False" in done.stdout and "FAILED" not in done.stdout
    assert min(t["seconds"] for t in verdict(tmp_path)["trials"]) < 5.0  # 0.15 s on an idle core
