# SPDX-License-Identifier: MIT
"""The dry run passes what works and names the stage of every planted fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ablab import check, plugin
from ablab.attention import Attention
from ablab.optim._flat import FlatOptimizer
from ablab.optim.adamw import FlatAdamW
from ablab.tensor.stage import Gate
from tests import trial as tiny


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
    stages = ["bind", "size", "build", "train", "gradients", "evaluate", "resume", "batch", "causality", "decode"]
    assert said["trials"][0]["passed"] == [*stages, "coupling", "contracts"]
    assert said["data"]["name"] == "synth" and said["data"]["tokens"] == 20000
    assert json.loads(Path(said["data"]["manifest"]).read_text())["sha256"] == said["data"]["sha256"]
    table = [line.split() for line in out.splitlines() if line.startswith("r")]
    assert table[0][:2] == ["r0-s1", "+1"] and [row[-1] for row in table] == ["pass", "pass"]
    assert "26,368" in out and "not covered: speed" in out


def test_data_alone_can_be_asked_for(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path)}, "data")
    assert check.main(str(tmp_path)) == 0
    assert verdict(tmp_path)["check"] == {"verdict": "skipped", "sha256": None}
    assert verdict(tmp_path)["data"]["name"] == "synth" and "fingerprint" not in capsys.readouterr().out


def test_a_configuration_that_does_not_settle_is_a_bad_request(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path).replace("CONFIG_TRAIN_STEPS=20", "CONFIG_TRAIN_STEPS=no")})
    assert check.main(str(tmp_path)) == 2
    assert "CONFIG_TRAIN_STEPS=no: not an int" in capsys.readouterr().out


def test_missing_data_fails(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path, 'CONFIG_DATA_TEXT=y\nCONFIG_DATA_TEXT_PATH="/nowhere"\n')})
    assert check.main(str(tmp_path)) == 1
    assert "a-s1: failed in stage data: " in capsys.readouterr().out
    assert verdict(tmp_path)["data"] is None and not verdict(tmp_path)["ok"]


def test_a_vocabulary_below_the_tokenizer_fails_at_full_size(tmp_path, capsys):
    write(tmp_path, {"a-s1": text(tmp_path, "CONFIG_MODEL_GPT_VOCAB=128\n"), "b-s1": text(tmp_path)})
    assert check.main(str(tmp_path)) == 1
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


@pytest.fixture
def planted():
    made = []

    def plant(gate):
        class Planted(Attention, symbol="ATTN_PLANTED"):
            def parts(self, dims):
                return (gate(),)

        made.append(Planted)

    yield plant
    for cls in made:
        plugin.forget(cls.symbol)


def tried(tmp_path, planted_member=True):
    s = tiny.settled(tmp_path)
    values = {}
    for symbol, value in s.values.items():
        values[symbol] = value
        if symbol == "ATTN_MHA":
            values["ATTN_PLANTED"] = planted_member
    case = check.Case(["x-s1"], "planted", values, s.where)
    check.run(case, None)
    return case


@pytest.mark.parametrize(
    ("gate", "stage", "reason"),
    [
        (Leaks, "causality", "logits before token 16 change"),
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
    assert case.stage == stage and reason in case.reason
    assert bool(case.trace) == (gate is Batch)


def test_a_gate_that_is_well_made_passes(tmp_path, planted):
    class Fine(Unused):
        def forward(self, m, h, ctx):
            return m._replace(y_BHTV=m.y_BHTV * self.w.mean()), ctx

    planted(Fine)
    assert tried(tmp_path).stage == ""


def test_an_optimizer_that_does_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(FlatAdamW, "step", lambda self: None)
    case = tried(tmp_path, False)
    assert case.stage == "gradients" and "not moved in 2 iterations" in case.reason


def test_optimizer_state_that_is_not_saved_is_named(tmp_path, monkeypatch):
    def forget(self, name):
        flat = torch.zeros_like(self.arena.weights)
        for p in (p for g in self.param_groups for p in g["params"]):
            self.state[p][name] = torch.zeros_like(p)  # what is saved is not what is used
        return flat

    monkeypatch.setattr(FlatOptimizer, "zeros", forget)
    case = tried(tmp_path, False)
    assert case.stage == "resume" and "differ after save, load and one step" in case.reason


def test_a_knob_that_changes_nothing_is_named(tmp_path):
    s, cases = tiny.settled(tmp_path), []
    for n in (1, 2):
        cases.append(check.Case([f"r{n}-s1"], "", {**s.values, "ATTN_FAKE_DIM": n}, s.where))
        check.run(cases[-1], None)
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
    assert sorted(verdict(tmp_path)["seconds"].values())[0] < 1.0  # 0.05 s on an idle core
