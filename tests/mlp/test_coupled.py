# SPDX-License-Identifier: MIT
"""What holds for every MLP mechanism in every form: identity, coupling, flow between blocks, decode, gauges."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ablab.tensor.stage import Coupling, Ctx, Emit, Gauges, Part, Past
from tests.blocks import perturbed, tokens
from tests.mlp.dense import build

CASES = {
    "headgate": {"symbols": ["MLP_HEADGATE"]},
    "cross": {"symbols": ["MLP_CROSS"]},
    "cross-topk": {"symbols": ["MLP_CROSS", "MLP_CROSS_SPARSE_TOPK"], "MLP_CROSS_SPARSE_K": 3},
    "cross-rms": {"symbols": ["MLP_CROSS", "MLP_CROSS_SPARSE_RMS"], "MLP_CROSS_SPARSE_TAU": '"1.0"'},
    "latent": {"symbols": ["MLP_LATENT"], "latent": 16},
    "latent-untied": {"symbols": ["MLP_LATENT", "MLP_LATENT_TYING_UNTIED"], "latent": 16},
    "latent-scalar": {"symbols": ["MLP_LATENT", "MLP_LATENT_TYING_PER_HEAD_SCALAR"], "latent": 16},
    "reciprocal": {"symbols": ["MLP_RECIPROCAL"]},
    "all": {"symbols": ["MLP_HEADGATE", "MLP_CROSS", "MLP_LATENT", "MLP_RECIPROCAL"], "latent": 16},
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
CARRYING = {n: c for n, c in CASES.items() if n != "reciprocal"}
carrying = pytest.mark.parametrize("case", CARRYING.values(), ids=CARRYING)
pytestmark = pytest.mark.usefixtures("stand")


def host_of(case, **typed):
    return build(latent=case.get("latent", 0), **typed)


def states(net, x_BT):
    """The residual stream after each block, and what the gauges say."""
    g, x_BTD, out = Gauges(), net.wte(x_BT) + net.wpe.weight[: x_BT.shape[1]], []
    ctx = Ctx().put(Coupling(net.lam), g)
    for block in net.blocks:
        x_BTD, ctx = block(x_BTD, ctx)
        out.append(x_BTD)
    return out, g.values


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_init_has_the_logits_of_the_host_bit_for_bit(case, dtype):
    net, host, x = build(**case).to(dtype), host_of(case).to(dtype), tokens(2, 40)
    assert torch.equal(net(x).logits, host(x).logits)
    assert not torch.equal(perturbed(net)(x).logits, host(x).logits)


@every
def test_without_coupling_it_is_the_host_anywhere(case):
    net, host, x = perturbed(build(**case).double()), host_of(case).double(), tokens(2, 40)
    host.load_state_dict(net.state_dict(), strict=False)
    assert not torch.equal(net(x).logits, host(x).logits)
    net.lam.fill_(0.0)
    assert torch.equal(net(x).logits, host(x).logits)


@carrying
@pytest.mark.parametrize("layer", [0, 1])
def test_a_producer_changes_later_blocks_only(case, layer):
    net, x = perturbed(build(**case, MODEL_GPT_LAYERS=4).double()), tokens(2, 40)
    before, _ = states(net, x)
    with torch.no_grad():
        for part in (p for p in net.blocks[layer].modules() if isinstance(p, Emit)):
            for p in part.parameters():
                p.add_(0.5)
            if not list(part.parameters()):  # it emits through the matrix of another part: hand over another value
                part.register_forward_hook(lambda m, args, out: type(out)(out[0] + 0.5))
    after, _ = states(net, x)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [n <= layer for n in range(4)]


@every
def test_batch_rows_are_independent(case):
    net, x = perturbed(build(**case).double()), tokens(3, 40)
    other = torch.cat([x[:1], tokens(2, 40, seed=1)])
    got, want = net(other).logits, net(x).logits
    assert (got[0] - want[0]).abs().max() < 1e-12 and (got[1:] - want[1:]).abs().max() > 1e-3


@every
@pytest.mark.parametrize("layers", [2, 3])
def test_no_parameter_is_dead(case, layers):
    net, x = build(**case, MODEL_GPT_LAYERS=layers).double(), tokens(4, 40)
    seen = dict.fromkeys((n for n, _ in net.named_parameters()), False)
    for step in range(2):
        net.zero_grad()
        net(x, tokens(4, 40, seed=step + 1)).loss.backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                seen[name] |= bool(p.grad.any())
                p.sub_(0.1 * p.grad)
    assert [n for n, alive in seen.items() if not alive] == []


@every
def test_later_tokens_and_the_cache_change_nothing(case):
    net, x = perturbed(build(**case).double()).eval(), tokens(2, 40)
    full, past = net(x).logits, Past(40)
    other = torch.cat([x[:, :16], tokens(2, 24, seed=1)], 1)
    assert torch.equal(net(other).logits[:, :16], full[:, :16])
    with torch.no_grad():
        got = [net(x[:, :9], past=past).logits] + [net(x[:, t : t + 1], past=past).logits for t in range(9, 40)]
    assert (torch.cat(got, 1) - full[:, 8:]).abs().max() < 1e-10


@every
def test_recomputed_blocks_give_equal_gradients_and_meta_equal_facts(case):
    with torch.device("meta"):
        light = build(**case)
    net, x = perturbed(build(**case).double()), tokens(2, 40)
    assert light.facts() == net.facts()
    want = torch.autograd.grad(net(x, x).loss, list(net.parameters()))
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    got = torch.autograd.grad(net(x, x).loss, list(net.parameters()))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["cross-topk", "latent"])
def test_a_second_pass_and_a_shared_matrix_compile(name):
    net, x = perturbed(build(**CASES[name], MODEL_GPT_LAYERS=2).double()), tokens(2, 40)
    want = torch.autograd.grad(net(x, x).loss, list(net.parameters()))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, x).loss, list(net.parameters()))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(got, want, strict=True))
    torch._dynamo.reset()


@every
def test_every_declared_gauge_is_reported_and_no_other(case):
    net, x = perturbed(build(**case).double()), tokens(2, 40)
    after, got = states(net, x)
    want = {
        f"mlp/{layer}/{part.symbol.partition('_')[2].lower()}_{gauge}"
        for layer, block in enumerate(net.blocks)
        for part in block.modules()
        if isinstance(part, Part)
        for gauge in part.gauges
    }
    assert set(got) == want and all(
        v.shape == () and v.isfinite() and v > 0 for n, v in got.items() if "bound" not in n
    )
    assert len({n.split("/")[1] for n in want}) >= 2


def test_gauges_of_a_gate_are_those_of_its_scale():
    net, x = build(**CASES["headgate"]).double(), tokens(2, 8)
    _, got = states(net, x)
    assert [got[f"mlp/0/headgate_{g}"] for g in ("scale_mean", "scale_std", "bound_frac")] == [1, 0, 0]
    with torch.no_grad():
        net.blocks[0].mlp.emit["headgate"].b.copy_(torch.tensor([20.0, -20.0, -20.0, 0.0]))
    _, got = states(net, x)
    scale = torch.tensor([1.1, 0.9, 0.9, 1.0], dtype=torch.float64)
    assert (got["mlp/0/headgate_scale_mean"] - scale.mean()).abs() < 1e-7
    assert (got["mlp/0/headgate_scale_std"] - scale.std(correction=0)).abs() < 1e-7
    assert got["mlp/0/headgate_bound_frac"] == 0.75


@pytest.mark.parametrize("name", ["cross", "latent", "reciprocal"])
def test_gauge_of_a_term_is_its_rms_over_that_of_its_target(name):
    net, x, seen = perturbed(build(**CASES[name]).double()), tokens(2, 40), []
    stage = net.blocks[1].mlp.pre if name == "reciprocal" else net.blocks[1].mlp.enrich
    stage[name].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    _, got = states(net, x)
    ((before, after),) = seen
    used = slice(-64, None) if name == "reciprocal" else slice(None)
    term, target = (after - before)[..., used], before[..., used]
    want = term.square().mean().sqrt() / target.square().mean().sqrt()
    assert (got[f"mlp/1/{name}_term_rms"] / want - 1).abs() < 1e-9


@pytest.mark.parametrize("name", ["headgate", "cross"])
def test_one_block_has_nobody_to_carry_to(name):
    symbol = CASES[name]["symbols"][0]
    with pytest.raises(ValueError, match=f"CONFIG_{symbol}: adds no part .* CONFIG_MODEL_GPT_LAYERS to 2 or more"):
        build(**CASES[name], MODEL_GPT_LAYERS=1)
