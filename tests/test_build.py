# SPDX-License-Identifier: MIT
"""Configuration to parts: parameter groups, what may not be left open, equal builds."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ablab import build, config, kconf
from tests import trial as tiny

CPU = torch.device("cpu")


def load(tmp_path, extra=""):
    s = tiny.settled(tmp_path, extra)
    return config.load(s.values, s.where)


def counts(groups):
    return {g["name"]: sum(p.numel() for p in g["params"]) for g in groups}


def test_gpt2_124m_has_the_documented_groups():
    s = kconf.settle(kconf.load(), [kconf.lex(Path("none"), "", "none")])  # the defaults are GPT-2 124M
    (model,) = config.create("MODEL", s.values)
    with torch.device("meta"):
        network = model.build(config.create("ATTN", s.values), config.create("MLP", s.values), 1)
    assert counts(build.split(network, 0.1, False)) == {"decay": 84_934_656, "plain": 39_541_248}
    embeddings = 50304 * 768 + 1024 * 768
    assert counts(build.split(network, 0.1, True)) == {
        "decay": 84_934_656 + embeddings,
        "plain": 39_541_248 - embeddings,
    }


class Odd(nn.Module):
    """A matrix that asks not to decay, a tie, a frozen tensor."""

    NO_DECAY = ("gate",)

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(4, 4))
        self.wte = nn.Embedding(10, 4)
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.wte.weight
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_each_trainable_tensor_is_in_one_group():
    net = Odd()
    groups = build.split(net, 0.1, False)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("decay", 0.1), ("plain", 0.0)]
    assert [id(p) for p in groups[0]["params"]] == [id(net.first.weight)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in (net.gate, net.wte.weight, net.first.bias)}


def test_a_tied_head_decays_only_as_an_embedding():
    net = Odd()
    decays = build.split(net, 0.1, True)[0]["params"]
    assert [id(p) for p in decays] == [id(net.wte.weight), id(net.first.weight)]


def test_an_empty_group_is_left_out():
    assert [g["name"] for g in build.split(nn.Linear(3, 3, bias=False), 0.1, False)] == ["decay"]


def test_equal_configurations_build_equal_weights(tmp_path):
    cfg = load(tmp_path)
    torch.manual_seed(5)
    a = build.build(cfg, CPU, 256)
    torch.manual_seed(6)
    b = build.build(cfg, CPU, 256)
    assert a.fingerprint == b.fingerprint
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert build.build(load(tmp_path, "CONFIG_TRAIN_SEED=7\n"), CPU, 256).fingerprint != a.fingerprint


def test_built_facts_are_measured(tmp_path):
    built = build.build(load(tmp_path), CPU, 256)
    assert built.params == built.trainable == sum(built.groups.values()) == 26368
    assert built.length == 32 and built.n_vocab == 256
    assert built.flops_per_token == 6 * 26368 + 12 * 2 * 32 * 32


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"CONFIG_MODEL_GPT_VOCAB = 256 .*300"):
        build.build(load(tmp_path), CPU, 300)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("CONFIG_SYS_DEVICE_AUTO=y", "CONFIG_SYS_DEVICE_AUTO"),
        ("CONFIG_SYS_COMPILE_AUTO=y", "CONFIG_SYS_COMPILE_AUTO"),
        ("CONFIG_SYS_AMP_AUTO=y", "CONFIG_SYS_AMP_AUTO"),
        ("CONFIG_SYS_THREADS=0", "CONFIG_SYS_THREADS=0"),
        ("CONFIG_TRAIN_BATCH_MICRO=0", "CONFIG_TRAIN_BATCH_MICRO=0"),
    ],
)
def test_nothing_is_left_to_the_machine(tmp_path, line, named):
    symbol = line.partition("=")[0].removeprefix("CONFIG_")
    values = dict(tiny.settled(tmp_path).values)
    if symbol.endswith("_AUTO"):
        family = symbol.removesuffix("_AUTO")
        values |= {s: False for s in values if s.startswith(family + "_")} | {symbol: True}
    else:
        values[symbol] = 0
    with pytest.raises(ValueError, match=f"{named}: not decided"):
        build.resolved(config.load(values))
    build.resolved(load(tmp_path))


def test_a_device_that_is_not_there_is_refused(tmp_path):
    values = {**tiny.settled(tmp_path).values, "SYS_DEVICE_CPU": False, "SYS_DEVICE_CUDA": True}
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(build.DeviceError, match="SYS_DEVICE_CUDA=y: torch sees no device"):
        build.settle_system(config.load(values))


def test_precision_is_as_configured(tmp_path):
    cfg = load(tmp_path)
    built = build.build(cfg, CPU, 256)
    x = torch.zeros(2, 32, dtype=torch.long)
    assert built.model(x).logits.dtype == torch.float32
    values = {**cfg.values, "SYS_AMP_OFF": False, "SYS_AMP_BF16": True}
    with build.precision(config.load(values), CPU):
        out = built.model(x, x, keep_logits=True)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
