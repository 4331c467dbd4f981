# SPDX-License-Identifier: MIT
"""The streaming pass for the largest logits, in Triton's interpreter where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from ablab.tensor import kernel, rowstat, stream
from ablab.tensor.attend import attend, logits
from ablab.tensor.stage import CAUSAL, Ctx, Region
from tests.tensor.test_rowstat import heads, inputs, random

CPU = torch.device("cpu")
THERE = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not THERE, reason="triton is not installed")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.skipif(THERE, reason="triton is installed")
def test_without_triton_row_chunks_are_used():
    assert not stream.probe(CPU)


@needs_triton
@pytest.mark.parametrize("W", [None, 0, 7, 70, 200])
@pytest.mark.parametrize(("T", "C", "k"), [(130, 40, 8), (64, 16, 1), (5, 24, 8), (100, 65, 5)])
def test_it_finds_the_largest_logits_of_every_row(T, C, k, W):
    q, key, q2, key2 = (random(2, 3, T, C, seed=n).float() for n in range(4))
    pieces = [(q, key, CAUSAL if W is None else Region("band", W))]
    pieces += [] if W is None else [(q2, key2[:, :1], Region("far", W))]  # a key that heads share
    j_BHTN = stream.largest(pieces, 0.3, k)
    s_BHTS = logits(pieces, 0.3, 0)
    got = s_BHTS.gather(-1, j_BHTN).sort(-1, descending=True).values
    torch.testing.assert_close(got, s_BHTS.topk(min(k, T), -1).values, atol=1e-5, rtol=0)
    real = [set(row) for row in j_BHTN[0, 0].tolist()]
    assert all(len(row - {i + 1}) == min(i + 1, k) for i, row in enumerate(real))  # each key once


@needs_triton
@pytest.mark.parametrize("W", [None, 7])
@pytest.mark.parametrize("k", [1, 5])
def test_the_mass_and_its_gradient_are_those_of_row_chunks(k, W, monkeypatch):
    found = []
    for streams in (False, True):
        monkeypatch.setattr(kernel.InForce, "stream", streams)
        calls = []
        monkeypatch.setattr(stream, "largest", partial(lambda real, *a: calls.append(1) or real(*a), stream.largest))
        t = {name: v.detach().float().requires_grad_() for name, v in inputs().items()}
        h = heads(t, W)
        value = rowstat.mass(attend(h, Ctx(), lse=True)[0], h, Ctx(), k)
        gradient = torch.autograd.grad(value.sum(), list(t.values()), allow_unused=True)
        found.append([value, *(g for g in gradient if g is not None)])
        assert bool(calls) is streams
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from ablab.tensor.stream import kernel
types = {"q_ptr": "*fp32", "k_ptr": "*fp32", "best_ptr": "*i64", "T": "i32", "scale": "fp32", "width": "i32"}
targets = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx1100", 32)
for target in targets:
    for kind, C in enumerate((128, 64, 64)):
        sizes = dict(KIND=kind, FRESH=kind < 2, C=C, C2=C, N=8, N2=8, BM=64, BN=64)
        at = {(kernel().arg_names.index(name),): value for name, value in sizes.items()}
        source = triton.compiler.ASTSource(kernel(), types | dict.fromkeys(sizes, "constexpr"), at)
        print(target.arch, triton.compile(source, target=target).metadata.shared)
"""


@needs_triton
def test_it_compiles_for_gpus_that_are_not_there(tmp_path):
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 9, done.stderr
    assert all(int(shared) <= 101_376 for arch, shared in found)  # the least of the cards in use: an A10G's


@needs_triton
def test_the_probe_believes_what_is_right_and_nothing_else(monkeypatch):
    assert stream.probe(CPU)
    monkeypatch.setattr(stream, "KINDS", ("causal", "far", "band"))
    assert not stream.probe(CPU)
