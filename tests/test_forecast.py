# SPDX-License-Identifier: MIT
"""Forecasts: exact where they say so, inside their band where not, None where nothing is known."""

import pytest
import torch

from ablab import build, config, forecast
from tests import trial as tiny

CPU = torch.device("cpu")


def load(tmp_path, extra=""):
    s = tiny.settled(tmp_path, extra)
    return config.load(s.values, s.where)


def test_what_is_exact_equals_the_built_model(tmp_path):
    cfg = load(tmp_path)
    built = build.build(cfg, CPU, 256)
    items = forecast.forecast(cfg, 256, 561, 1e11).items
    assert items["weights"] == items["gradients"] == sum(p.nbytes for p in built.model.parameters())
    state = [t for s in built.optimizer.state.values() for k, t in s.items() if k != "step"]
    assert items["optimizer"] == sum(t.nbytes for t in state)


def test_activations_are_those_of_the_real_forward(tmp_path):
    cfg = load(tmp_path)
    network = cfg.model.build(cfg.attention, cfg.mlp, 1, 256)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.zeros(cfg.train.batch_micro, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(ids, ids)
    real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    assert forecast.forecast(cfg, 256, 561, None).items["activations"] == real


def test_activations_grow_with_the_micro_batch(tmp_path):
    small, large = (
        forecast.forecast(load(tmp_path, f"CONFIG_TRAIN_BATCH_MICRO={n}\n"), 256, 561, None) for n in (1, 4)
    )
    assert large.items["activations"] > 3 * small.items["activations"]
    assert large.items["weights"] == small.items["weights"]


@pytest.mark.parametrize(
    ("extra", "steps"),
    [
        ("", 20),
        ("CONFIG_TRAIN_BUDGET_TOKENS=y\nCONFIG_TRAIN_TOKENS=2500\n", 20),
        ("CONFIG_TRAIN_BUDGET_EPOCHS=y\nCONFIG_TRAIN_EPOCHS=2\n", 281),  # 2 x 561 sequences by 4
        ("CONFIG_TRAIN_BUDGET_TIME=y\nCONFIG_TRAIN_TIME=7200\n", None),
    ],
)
def test_steps_and_hours_follow_the_budget(tmp_path, extra, steps):
    found = forecast.forecast(load(tmp_path, extra), 256, 561, 1e11)
    low, likely, high = found.hours
    assert found.steps == steps and 0 < low <= likely <= high
    if steps is None:
        assert low == 2.0


def test_an_unknown_device_has_no_hours(tmp_path):
    assert forecast.forecast(load(tmp_path), 256, 561, None).hours is None


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI250X / MI250", 191.5),
    ],
)
def test_a_listed_device_has_its_own_peak(name, bf16):
    assert forecast.listed(name)[0] == bf16


def test_a_cpu_is_measured(tmp_path):
    assert 1e8 < forecast.peak(load(tmp_path), CPU) < 1e14


def test_a_forecast_here_uses_the_data_once_it_is_there(tmp_path):
    cfg = load(tmp_path, "CONFIG_TRAIN_BUDGET_EPOCHS=y\nCONFIG_TRAIN_EPOCHS=2\n")
    before = forecast.here(cfg)
    assert before.steps is None and before.hours is None and before.mem_gib[0] > 0
    cfg.data.prepare()
    assert forecast.here(cfg).steps == 281 and forecast.here(cfg).hours[0] > 0
