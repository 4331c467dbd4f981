# SPDX-License-Identifier: MIT
"""The probe lets through what is right and nothing else; what passed is what runs."""

import pytest
import torch

from ablab.tensor import kernel
from ablab.tensor.kernel import KERNELS, Fused, InForce, choose, core, fused, probe
from tests.tensor.test_attend import random

CPU = torch.device("cpu")
RIGHT = KERNELS["cpu"]
MASKED = pytest.mark.parametrize("masked", [False, True])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


@pytest.fixture
def fresh():
    """Settings of the process as they were, afterwards."""
    before = InForce.chunk, dict(InForce.kernels)
    InForce.kernels.clear()
    yield
    InForce.kernels.clear()
    InForce.chunk = before[0]
    InForce.kernels.update(before[1])


def raises(error):
    def forward(q, k, v, mask, scale):
        raise error("no kernel image is available")

    return RIGHT._replace(forward=forward)


def changed(change):
    """A kernel whose (o, lse) are changed after the fact."""

    def forward(q, k, v, mask, scale):
        return change(*RIGHT.forward(q, k, v, mask, scale))

    return RIGHT._replace(forward=forward)


def wrong_gradient(do, q, k, v, mask, o, lse, rest, scale):
    """Drops what the spare channels carry: the gradient of lse."""
    do, o = (torch.cat([t[..., : -kernel.SPARE], torch.zeros_like(t[..., -kernel.SPARE :])], -1) for t in (do, o))
    return RIGHT.backward(do, q, k, v, mask, o, lse, rest, scale)


PLANTED = {
    "raises": raises(RuntimeError),
    "is not built": raises(NotImplementedError),
    "has another schema": raises(TypeError),
    "has another scale": RIGHT._replace(forward=lambda q, k, v, m, scale: RIGHT.forward(q, k, v, m, 1.1 * scale)),
    "rounds lse": changed(lambda o, lse: (o, lse.bfloat16().to(lse.dtype))),
    "is off by one key": changed(lambda o, lse: (o.roll(1, 2), lse)),
    "is not a number": changed(lambda o, lse: (o * torch.nan, lse)),
    "drops the gradient of lse": RIGHT._replace(backward=wrong_gradient),
}


@DTYPES
@MASKED
def test_the_cpu_kernel_and_row_chunks_pass(dtype, masked):
    assert probe(fused(RIGHT), CPU, dtype, masked) and probe(kernel.chunked, CPU, dtype, masked)


@DTYPES
@MASKED
@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_or_raising_kernel_is_passed_over(fault, masked, dtype):
    tried = {"planted": PLANTED[fault], "right": RIGHT}
    assert choose(tried, CPU, dtype, masked) == ("right",)
    assert choose({"planted": PLANTED[fault]}, CPU, dtype, masked) == ()


def test_a_kernel_of_another_device_type_or_without_masks_is_not_tried():
    other = raises(AssertionError)
    assert choose({"a": other._replace(devices=("cuda",))}, CPU, torch.float32, False) == ()
    assert choose({"a": other._replace(dtypes=(torch.bfloat16,))}, CPU, torch.float32, False) == ()
    assert choose({"a": other._replace(masked=(False,))}, CPU, torch.float32, True) == ()


@pytest.mark.parametrize("name", ["flash", "efficient"])
@MASKED
def test_a_kernel_that_this_machine_lacks_is_refused_and_not_an_error(name, masked):
    assert not probe(fused(KERNELS[name]), CPU, torch.float32, masked)


def taken(way):
    return way.args[0] if way is not kernel.chunked else "chunked"


@pytest.mark.usefixtures("fresh")
def test_what_passed_is_what_runs():
    q = random(1, 2, 8, 8)
    assert taken(core(q, None)) is RIGHT.forward  # before any probe: what torch has for a CPU
    kernel.settle(CPU, 64, [torch.float64])
    assert InForce.chunk == 64 and kernel.chosen(CPU) == "cpu"
    assert taken(core(q, None)) is taken(core(q, torch.zeros(8, 8))) is RIGHT.forward
    InForce.kernels["cpu", torch.float64, True] = ()
    assert taken(core(q, torch.zeros(8, 8))) == "chunked" and taken(core(q, None)) is RIGHT.forward
    assert kernel.chosen(CPU) == "cpu for float64, chunked for float64 masked"
    InForce.kernels["cpu", torch.float64, False] = ("flash", "cpu")
    assert taken(core(q, None)) is KERNELS["flash"].forward
    assert taken(core(random(1, 1, 2, 256), None)) is RIGHT.forward  # the gradient of lse needs more than 256 channels


@pytest.mark.usefixtures("fresh")
def test_the_probe_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    kernel.settle(CPU, 128, [torch.float32])
    assert torch.equal(torch.get_rng_state(), before)


def test_columns_of_lse_beyond_the_rows_are_cut_and_kept_for_the_backward_pass():
    """As the efficient kernel of CUDA has them."""
    padded = RIGHT._replace(
        forward=lambda *args: tuple(torch.nn.functional.pad(t, (0, 24 * (t.ndim == 3))) for t in RIGHT.forward(*args)),
        backward=lambda do, q, k, v, m, o, lse, rest, scale: RIGHT.backward(
            do, q, k, v, m, o, lse[..., :-24].contiguous(), rest, scale
        ),
    )
    assert probe(fused(padded), CPU, torch.float64, False)


def test_masks_of_the_efficient_kernel_are_aligned_and_unchanged():
    q, mask = random(2, 3, 7, 8), random(7, 14)
    bias = kernel._bias(q, mask)
    assert bias.shape == (2, 3, 7, 14) and bias.stride(2) == 16 and torch.equal(bias[1, 2], mask)


def test_no_spare_channel_is_paid_for_where_lse_has_no_gradient():
    seen = []

    def backward(do, q, *rest):
        seen.append(q.shape[-1])
        return RIGHT.backward(do, q, *rest)

    for use in (lambda o, lse: o, lambda o, lse: lse, lambda o, lse: o.sum(-1) + lse):
        q = random(1, 2, 16, 8).requires_grad_()
        use(*Fused.apply(RIGHT.forward, backward, q, q, q, None, 1.0)).sum().backward()
    assert seen == [8, 16, 16]
