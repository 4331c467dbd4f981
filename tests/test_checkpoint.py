# SPDX-License-Identifier: MIT
"""Checkpoints: what was saved comes back bit for bit, or is not used at all."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ablab import build, checkpoint, config
from ablab.rundir import RunError
from tests import trial as tiny

CPU = torch.device("cpu")


@pytest.fixture
def trial(tmp_path):
    trial = tiny.campaign(tmp_path)
    tiny.claim(trial)
    return trial


def built(trial, seed=1337):
    values = {**config.read(trial.config).values, "TRAIN_SEED": seed}
    return build.build(config.load(values), CPU, 256)


def trained(trial, seed=1337):
    """A build with weights and optimizer state that no constructor gives."""
    b = built(trial, seed)
    for group in b.optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(2):
        b.optimizer.arena.grads.normal_()
        b.optimizer.gate(torch.tensor(1.0), 1.0)
        b.optimizer.step()
        b.optimizer.zero_grad()
    return b


def put(trial, step, b=None, attempt=1, **options):
    b = b or trained(trial)
    place = trial.checkpoint(step, attempt)
    checkpoint.save(place, b.model, b.optimizer, {"step": step}, **options)
    return place


def same(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(
        torch.equal(p, q) and all(torch.equal(t, b.optimizer.state[q][k]) for k, t in a.optimizer.state[p].items())
        for p, q in pairs
    )


def test_weights_optimizer_and_state_come_back(trial):
    a, b = trained(trial), built(trial, seed=2)
    place = put(trial, 7, a)
    assert not same(a, b)
    assert checkpoint.load(place, b.model, b.optimizer)["step"] == 7
    assert same(a, b) and place.flaw() is None
    flat = b.optimizer.arena.weights.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == flat for p in b.model.parameters())


def test_weights_alone_come_with_the_coupling_strength(trial):
    a, b = trained(trial), built(trial, seed=2)
    a.model.lam.fill_(0.25)
    checkpoint.load_model(put(trial, 7, a), b.model)
    assert b.model.lam == 0.25
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_random_state_of_all_generators_comes_back(trial):
    def draws():
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    random.gauss(0, 1)  # leaves a second value behind, which is state too
    np.random.randn()
    b = built(trial)
    place = put(trial, 1, b)
    wanted = draws()
    draws()
    checkpoint.load(place, b.model, b.optimizer)
    assert draws() == wanted


def test_the_files_are_plain_safetensors_with_equal_bytes(trial):
    b = trained(trial)
    first, second = put(trial, 1, b), put(trial, 2, b)
    assert {p.name for p in first.path.iterdir()} == {
        "model.safetensors",
        "optim.safetensors",
        "state.safetensors",
        "rank-0.safetensors",
        "state.json",
        "manifest.json",
    }
    found = load_file(first.model)
    assert found.keys() == b.model.state_dict().keys()
    assert all(torch.equal(found[n], t) for n, t in b.model.state_dict().items())
    state = load_file(first.optim)
    assert torch.equal(state["wte.weight/exp_avg"], b.optimizer.state[b.model.wte.weight]["exp_avg"])
    assert first.model.read_bytes() == second.model.read_bytes()


@pytest.mark.parametrize("dtype", checkpoint.NAMES)
def test_every_dtype_is_stored_as_safetensors_reads_it(tmp_path, dtype):
    tensors = {"a": torch.tensor([0, 1, 1]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    tensors["empty"] = torch.zeros(0, 3).to(dtype)
    checkpoint.store(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], t), name


def pruned(share):
    """A weight with this share of zeros, among the rest some that are hard: -0, nan, subnormal."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    w.view(-1)[: int(share * w.numel())] = 0.0
    w.view(-1)[-3:] = torch.tensor([-0.0, torch.nan, 1e-42])
    return w


@pytest.mark.parametrize(("share", "size"), [(0.5, 2.125), (0.9, 0.525)])
@pytest.mark.parametrize("dtype", checkpoint.WORDS.values(), ids=lambda d: f"{d.itemsize} bytes")
def test_a_sparse_tensor_takes_bits_and_what_is_kept_and_loses_nothing(tmp_path, share, size, dtype):
    kind = {torch.int16: torch.bfloat16, torch.int32: torch.float32, torch.int64: torch.float64}[dtype]
    w = pruned(share).to(kind)
    thin = checkpoint.thinned({"w": w, "dense": torch.ones(5), "mask": torch.zeros(9, dtype=torch.bool)})
    assert thin.keys() == {"w#bits", "w#kept", "w#shape", "dense", "mask"}
    expected = 0.125 + kind.itemsize * (1 - share)
    assert abs((thin["w#bits"].nbytes + thin["w#kept"].nbytes) / w.numel() - expected) < 1e-3
    if kind is torch.float32:
        assert abs(expected - size) < 1e-9
    checkpoint.store(tmp_path / "x", thin)
    found = checkpoint.read(tmp_path / "x")
    assert found.keys() == {"w", "dense", "mask"} and found["w"].dtype == kind
    assert torch.equal(found["w"].view(dtype), w.view(dtype)) and torch.equal(found["dense"], torch.ones(5))


def test_a_sparse_checkpoint_is_proven_and_loaded_bit_for_bit(trial):
    b, other = trained(trial), built(trial, seed=2)
    for p in b.model.parameters():
        where = torch.rand(p.shape) < 0.8
        for t in (p.data, *(s for k, s in b.optimizer.state[p].items() if s.shape == p.shape)):
            t[where] = 0.0
    whole, thin = put(trial, 1, b), put(trial, 2, b, sparse=True)
    assert thin.model.stat().st_size < 0.35 * whole.model.stat().st_size
    assert thin.optim.stat().st_size < 0.35 * whole.optim.stat().st_size
    checkpoint.prove(thin, b.model, b.optimizer)
    checkpoint.load(thin, other.model, other.optimizer)
    assert same(b, other)
    checkpoint.load_model(thin, built(trial, seed=3).model)


def test_a_sparse_checkpoint_of_another_model_is_named(trial):
    place = put(trial, 1, trained(trial), sparse=True)
    found = checkpoint.thinned({"ln_f.bias": torch.zeros(31)}) | checkpoint.read(place.model)
    place.model.unlink()
    checkpoint.store(place.model, {n: t for n, t in found.items() if n != "ln_f.bias"})
    with pytest.raises(RunError, match=r"ln_f.bias: \[31\] in the file, \[32\] in the model"):
        checkpoint.load_model(place, built(trial).model)


@pytest.mark.parametrize("at", range(1, 7))
def test_a_full_disk_leaves_no_trace(trial, at):
    left = [at]

    def write(fd, data):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "disk full")
        return os.write(fd, data[: max(1, len(data) // 2)])  # short writes are completed

    with pytest.raises(OSError, match="disk full"):
        put(trial, 1, write=write)
    assert list(trial.checkpoints.iterdir()) == []


def test_a_lost_lease_leaves_no_trace(trial):
    def guard():
        raise RunError("lease 2 is newer")

    with pytest.raises(RunError):
        put(trial, 1, guard=guard)
    assert list(trial.checkpoints.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no manifest"])
def test_a_bad_one_is_renamed_and_an_older_one_used(trial, capsys, damage):
    good, bad = put(trial, 1), put(trial, 2)
    if damage == "flip":
        raw = bytearray(bad.model.read_bytes())
        raw[-5] ^= 1
        bad.model.write_bytes(raw)
    elif damage == "cut":
        os.truncate(bad.optim, 100)
    else:
        (bad.path / ("manifest.json" if damage == "no manifest" else "rank-0.safetensors")).unlink()
    assert checkpoint.newest(trial, 1).name == good.name
    assert [p.name.startswith("bad-step-00000002-a1") for p in sorted(trial.checkpoints.iterdir())] == [True, False]
    assert "an older one is used" in capsys.readouterr().out


def test_another_model_is_named_not_loaded(trial):
    place = put(trial, 1)
    values = {**config.read(trial.config).values, "MLP_GELU_WIDTH": 96}
    other = build.build(config.load(values), CPU, 256)
    with pytest.raises(RunError, match=r"mlp.down.weight: \[32, 64\] in the file, \[32, 96\] in the model"):
        checkpoint.load(place, other.model, other.optimizer)


def test_a_checkpoint_is_read_back_against_memory(trial):
    b = trained(trial)
    checkpoint.prove(put(trial, 1, b), b.model, b.optimizer)
    with torch.no_grad():
        next(b.model.parameters())[0, 0] = torch.nan
    checkpoint.prove(put(trial, 2, b), b.model, b.optimizer)
    assert steps(trial) == [1, 2]


def test_a_disk_that_keeps_other_bytes_is_caught(trial):
    left = [5]

    def write(fd, data):
        left[0] -= 1
        data = bytes(data)
        return os.write(fd, data[:-1] + bytes([data[-1] ^ 1]) if left[0] == 0 else data)

    b = trained(trial)
    place = put(trial, 1, b, write=write)
    assert place.flaw() is None  # its hashes are those of what was written
    with pytest.raises(RunError, match="is not what memory holds; the disk does not keep"):
        checkpoint.prove(place, b.model, b.optimizer)
    assert steps(trial) == [] and list(trial.checkpoints.glob("bad-*"))


def steps(trial):
    return sorted(c.step for c in trial.saved())


def test_roles_decide_what_is_kept(trial):
    b = trained(trial)
    for step in (10, 20, 30, 40, 50):
        put(trial, step, b)
    gone = checkpoint.sweep(trial, 1, keep=2, every=0, chosen={20})
    assert sorted(c.step for c in gone) == [10, 30] and steps(trial) == [20, 40, 50]
    put(trial, 60, b)
    checkpoint.sweep(trial, 1, keep=1, every=25, chosen=())
    assert steps(trial) == [50, 60]


def test_nothing_goes_before_the_newest_verifies(trial):
    b = trained(trial)
    for step in (1, 2):
        put(trial, step, b)
    os.truncate(trial.checkpoint(2, 1).model, 10)
    with pytest.raises(RunError, match="is not what was vouched for"):
        checkpoint.sweep(trial, 1, keep=1, every=0, chosen=())
    assert steps(trial) == [1, 2]
