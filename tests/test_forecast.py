# SPDX-License-Identifier: MIT
"""Forecasts: exact where they say so, inside their band where not, None where nothing is known."""

import subprocess
import sys

import pytest
import torch

from ablab import build, config, forecast, machine
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


MASKED = ["MAGNITUDE", "MAGNITUDE=y\nCONFIG_PRUNE_MASK_BITS", "MAGNITUDE=y\nCONFIG_PRUNE_TIED", "DISPLACEMENT"]
MASKED += ["MOVEMENT", "MOVEMENT=y\nCONFIG_PRUNE_MOVEMENT_SHADOW_BF16", "STATE=y\nCONFIG_OPT_ADAMWPRUNE", None]


@pytest.mark.parametrize("extra", MASKED)
def test_masks_are_those_of_the_pruner(tmp_path, extra):
    cfg = load(tmp_path, "" if extra is None else f"CONFIG_PRUNE_{extra}=y\nCONFIG_PRUNE_WARMUP=4\n")
    built = build.build(cfg, CPU, 256)
    masks = forecast.memory(cfg, 256).items["masks"]
    assert masks == cfg.prune.build(built.model, built.optimizer, 20, 1).nbytes and bool(masks) is (extra is not None)


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
        network(ids, ids.clone())
    real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    assert forecast.forecast(cfg, 256, 561, None).items["activations"] == real


def test_activations_grow_with_the_micro_batch(tmp_path):
    small, large = (
        forecast.forecast(load(tmp_path, f"CONFIG_TRAIN_BATCH_MICRO={n}\n"), 256, 561, None) for n in (1, 4)
    )
    assert large.items["activations"] > 3 * small.items["activations"]
    assert large.items["weights"] == small.items["weights"]


def test_blocks_that_are_not_built_count_as_if_they_were(tmp_path):
    cfg = load(tmp_path, "CONFIG_MODEL_GPT_LAYERS=7\n")
    assert forecast.memory(cfg, 256).items["activations"] == forecast._kept(cfg, 256, 2)[0]


def test_the_first_moment_of_backward_holds_two_more_of_the_largest_tensor(tmp_path):
    """A loss over a large vocabulary: log-probabilities are kept, their gradient and that of the logits come."""
    found = forecast.memory(load(tmp_path, "CONFIG_MODEL_GPT_VOCAB=4096\n"), 4096).items
    assert found["backward"] == 2 * 2 * 32 * 4096 * 4


def test_a_smaller_micro_batch_is_offered_where_one_fits(tmp_path):
    cfg = load(tmp_path, "CONFIG_TRAIN_BATCH_MICRO=4\nCONFIG_MODEL_GPT_BLOCK=2048\nCONFIG_MODEL_GPT_VOCAB=50304\n")
    needs = {n: forecast.memory(cfg, 256, n) for n in (1, 2, 4)}
    room = (needs[2].mem_gib[1] + needs[4].mem_gib[0]) / 2
    gpu = machine.Gpu(1.0, 1.0, room / forecast.USABLE, 1.0, 1.0)
    assert needs[2].mem_gib[1] < room < needs[4].mem_gib[0]
    assert forecast.verdict(cfg, 256, needs[4], gpu).startswith("does not fit: ")
    assert forecast.verdict(cfg, 256, needs[4], gpu).endswith("; CONFIG_TRAIN_BATCH_MICRO=2 fits")
    assert forecast.verdict(cfg, 256, needs[1], gpu).startswith("fits: ")
    assert forecast.verdict(cfg, 256, needs[4], gpu._replace(gib=0.1)).endswith("; no micro batch fits")


STEPS = """
import re, sys, torch
from pathlib import Path
from ablab import build, config
torch.set_num_threads(1)
cfg = config.read(Path(sys.argv[1]))
built, ids = build.build(cfg, torch.device("cpu"), 8192), torch.zeros(8, 128, dtype=torch.long)
for _ in range(2):
    loss = built.model(ids, ids).loss
    loss.backward()
    built.optimizer.gate(loss.detach(), 1.0)
    built.optimizer.step()
    built.optimizer.zero_grad()
    del loss
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss counts the parent's too
"""


def test_the_peak_of_a_real_process_is_in_the_band(tmp_path):
    sizes = {"EMBED": 256, "HEADS": 4, "LAYERS": 6, "BLOCK": 128, "VOCAB": 8192}
    lines = "".join(f"CONFIG_MODEL_GPT_{n}={v}\n" for n, v in sizes.items())
    lines += "CONFIG_MLP_GELU_WIDTH=1024\nCONFIG_TRAIN_BATCH_MICRO=8\nCONFIG_TRAIN_BATCH_EFFECTIVE=8\n"
    (tmp_path / "config").write_text(tiny.settled(tmp_path, lines).config())
    command = [sys.executable, "-c", STEPS, str(tmp_path / "config")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    low, _, high = forecast.memory(load(tmp_path, lines), 8192).mem_gib
    slack = 0.15  # GiB by which a bare process may be below what BASE_GIB says
    assert low - slack < int(done.stdout) / (1 << 20) < high


@pytest.mark.parametrize(("text", "name"), [("a10g", "A10G"), ("rtx-4090", "RTX 4090"), ("h100PCIe", "H100 PCIe")])
def test_a_user_may_write_a_gpu_in_any_case(text, name):
    assert machine.named(text) == name


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ValueError, match="GPU=a10x: no such GPU; nearest: A100 or A10G or H100; known: H200, "):
        machine.named("a10x")


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
    assert machine.listed(name)[0] == bf16


def test_a_cpu_is_measured(tmp_path):
    assert 1e8 < forecast.peak(load(tmp_path), CPU) < 1e14


def test_a_forecast_here_uses_the_data_once_it_is_there(tmp_path):
    cfg = load(tmp_path, "CONFIG_TRAIN_BUDGET_EPOCHS=y\nCONFIG_TRAIN_EPOCHS=2\n")
    before, _ = forecast.here(cfg)
    assert before.steps is None and before.hours is None and before.mem_gib[0] > 0
    cfg.data.prepare()
    assert forecast.here(cfg)[0].steps == 281 and forecast.here(cfg)[0].hours[0] > 0


@pytest.mark.parametrize(("room", "share"), [(10.0, 0.1), (12.0, 0.5), (18.0, 0.9)])
def test_low_and_high_are_where_one_of_ten_falls_outside(room, share):
    assert forecast.chance((10.0, 12.0, 18.0), room) == pytest.approx(share)


def test_a_band_without_width_is_sure():
    assert forecast.chance((2.0, 2.0, 2.0), 3.0) == 1.0 and forecast.chance((2.0, 2.0, 2.0), 1.0) == 0.0


def test_a_band_decides_what_fits_and_changes_no_number(tmp_path):
    cfg = load(tmp_path)
    gpu = machine.Gpu(1.0, 1.0, 8 / machine.USABLE, 1.0, 1.0)
    found, fits = forecast.here(cfg, gpu)
    same, refused = forecast.here(cfg, gpu, {"mem_gib": [40.0, 50.0, 60.0]})
    assert same == found and fits.startswith("fits: ") and refused.startswith("does not fit: ")
    assert "probability 0.00" in refused


IMAGES = "CONFIG_DATA_SYNTHIMAGE=y\nCONFIG_DATA_SYNTHIMAGE_SAMPLES=300\nCONFIG_MODEL_LENET5=y\nCONFIG_TRAIN_EPOCHS=2\n"
IMAGES += "CONFIG_EVAL_INTERVAL=0\n"


def test_an_image_on_a_cpu_takes_what_it_took(tmp_path, monkeypatch):
    cfg = load(tmp_path, IMAGES)
    network = cfg.model.build(cfg.attention, cfg.mlp, cfg.train.seed, cfg.data.classes)
    took = forecast.pace(cfg, 1e11)
    assert took > network.flops_per_token(32) / 1e11  # products are the least of it
    cfg.data.prepare()
    monkeypatch.setattr(forecast, "pace", lambda cfg, rate: 0.5)
    found, _ = forecast.here(cfg)
    assert found.steps == 113  # 2 x 225 images by 4
    looked = sum(cfg.data.samples(split, 1) for split in ("val", "test"))
    # at the start, after each epoch, without backward
    assert 3600 * found.hours[0] == pytest.approx(0.5 * (452 + 3 * looked / 3), rel=0.01)
