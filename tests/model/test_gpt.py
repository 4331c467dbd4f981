# SPDX-License-Identifier: MIT
"""GPT-2: sizes, init, loss, vocabulary padding, dropout, fingerprint."""

import math

import pytest
import torch
import torch.nn.functional as F

from ablab import bind, config, configure, kconf
from ablab.model import fingerprint
from tests.blocks import network, perturbed, tokens

FULL = {
    "MODEL_GPT_LAYERS": 12,
    "MODEL_GPT_HEADS": 12,
    "MODEL_GPT_EMBED": 768,
    "MODEL_GPT_BLOCK": 1024,
    "MODEL_GPT_VOCAB": 50304,
    "MLP_GELU_WIDTH": 3072,
}


def test_gpt2_has_124475904_parameters():
    with torch.device("meta"):
        net = network(**FULL)
    assert sum(p.numel() for p in net.parameters()) == 124_475_904
    assert net.facts() == {"kv_bytes_per_token": 36_864, "mlp_to_attention": 2.0}
    assert net.flops_per_token(1024) == 6 * 124_475_904 + 12 * 12 * 12 * 64 * 1024


def test_a_tensor_on_meta_has_the_shape_of_the_real_one():
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in network().named_parameters()}
    assert shapes == {n: p.shape for n, p in network().named_parameters()}


def test_init_is_that_of_gpt2():
    net = network(MODEL_GPT_LAYERS=2, MODEL_GPT_EMBED=256, MLP_GELU_WIDTH=1024)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln" in name or name.startswith("ln"):
            assert (p == 1).all(), name
        else:
            want = 0.01 if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02  # 0.02 / sqrt(2 * 2)
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert abs(p.mean().item()) < want / 20, name


def test_what_two_models_share_starts_equal():
    a = network(seed=5).state_dict()
    for other in ({"MLP_GELU_WIDTH": 64}, {"MODEL_GPT_BIAS": False}, {"MLP_GELU_TANH": True}):
        b = network(seed=5, **other).state_dict()
        same = [n for n in a if n in b and a[n].shape == b[n].shape]
        assert len(same) >= 15 and all(torch.equal(a[n], b[n]) for n in same)
    c = network(seed=6).state_dict()
    assert not any(torch.equal(a[n], c[n]) for n in a if n.endswith("weight") and "ln" not in n)


def test_loss_is_mean_cross_entropy_and_starts_near_ln_v():
    net, x, y = network(), tokens(4, 40), tokens(4, 40, seed=1)
    out = net(x, y)
    logits = net(x).logits
    assert out.logits is None and out.n == 160 and out.loss.shape == ()
    assert torch.equal(out.loss, F.cross_entropy(logits.view(-1, 97), y.view(-1)))
    assert net(x).loss is None and torch.equal(net(x, y, keep_logits=True).logits, logits)
    assert abs(out.loss.item() - math.log(97)) < 0.1


def test_a_short_sequence_uses_the_first_positions():
    net, x = network().double(), tokens(2, 40)
    assert (net(x[:, :7]).logits - net(x).logits[:, :7]).abs().max() < 1e-12


def test_padded_columns_are_never_predicted_in_evaluation():
    net, x = network(n_vocab=90), tokens(2, 40, n=90)
    assert torch.isfinite(net(x).logits).all()
    out = net.eval()(x, x, keep_logits=True)
    assert torch.isneginf(out.logits[..., 90:]).all()
    assert torch.isclose(out.loss, F.cross_entropy(out.logits[..., :90].flatten(0, 1), x.flatten()))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"CONFIG_MODEL_GPT_VOCAB = 97 : the tokenizer has 98 ids; set 98 or more"):
        network(n_vocab=98)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(bind.BindError, match="CONFIG_MODEL_GPT_EMBED = 32 is no multiple of"):
        network(MODEL_GPT_HEADS=5)


def test_head_is_the_token_embedding():
    net = network()
    assert net.ties == {"head": "wte.weight"}
    net(tokens(2, 8), tokens(2, 8)).loss.backward()
    unused = [i for i in range(97) if i not in tokens(2, 8)]
    assert (net.wte.weight.grad[unused] != 0).any()  # as a row of the head, never as an embedding


def test_lam_is_one_and_no_weight():
    net = network()
    assert net.lam.item() == 1.0 and "lam" not in net.state_dict()


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_everywhere_or_nowhere(bias):
    names = [n for n, _ in network(MODEL_GPT_BIAS=bias).named_parameters() if n.endswith("bias")]
    assert len(names) == (3 * 6 + 1 if bias else 0)


def test_dropout_acts_in_training_only_and_leaves_the_mean_alone():
    net, x = network(MODEL_GPT_DROPOUT='"0.5"').double(), tokens(2, 8)
    torch.manual_seed(0)
    a, b = net(x).logits, net(x).logits
    assert not torch.equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(net(x).logits, a)
    state = torch.get_rng_state()
    assert torch.equal(net.eval()(x).logits, network().double()(x).logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_is_fp32_under_autocast():
    net, x = network(), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, x, keep_logits=True)
    assert out.loss.dtype == torch.float32 and out.logits.dtype == torch.bfloat16
    assert abs(out.loss.item() - net(x, x).loss.item()) < 0.02


def test_fingerprint_tells_models_apart_and_touches_nothing():
    net, state = network(), torch.get_rng_state()
    before = {n: p.clone() for n, p in net.named_parameters()}
    first = fingerprint(net)
    assert first == fingerprint(network()) == fingerprint(network().eval())
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters()) and net.training
    assert torch.equal(torch.get_rng_state(), state)
    others = [
        {"MLP_GELU_TANH": True},
        {"MODEL_GPT_HEADS": 8},
        {"MODEL_GPT_DROPOUT": '"0.1"'},
        {"MLP_GELU_WIDTH": 64},
        {"MODEL_GPT_BIAS": False},
        {"MODEL_GPT_BLOCK": 41},
    ]
    prints = [first, fingerprint(network(seed=2)), *[fingerprint(network(**o)) for o in others]]
    assert len(set(prints)) == len(prints)


def test_facts_are_measured_and_change_nothing():
    net = network(MLP_GELU_WIDTH=64)
    assert net.facts() == {"kv_bytes_per_token": 2 * 3 * 2 * 32, "mlp_to_attention": 1.0}
    assert net.training


def test_gradients_of_a_large_batch_are_the_mean_of_micro_batches():
    net, x, y = perturbed(network().double()), tokens(4, 40), tokens(4, 40, seed=1)
    whole = torch.autograd.grad(net(x, y).loss, list(net.parameters()))
    halves = [torch.autograd.grad(net(x[i::2], y[i::2]).loss / 2, list(net.parameters())) for i in range(2)]
    for a, b, c in zip(whole, *halves, strict=True):
        assert (a - b - c).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("name", "published", "width"),
    [
        ("gpt2-124m", 124_439_808, 768),
        ("gpt2-350m", 354_823_168, 1024),
        ("gpt2-774m", 774_030_080, 1280),
        ("gpt2-1.5b", 1_557_611_200, 1600),
    ],
)
def test_the_defconfigs_have_the_published_sizes(name, published, width):
    """OpenAI's checkpoints have 50,257 rows of embedding; ours are padded to 50,304."""
    settled = kconf.settle(kconf.load(), list(configure.layers(kconf.ROOT, name)))
    cfg = config.load(settled.values)
    with torch.device("meta"):
        net = cfg.model.build(cfg.attention, cfg.mlp, 1)
    assert sum(p.numel() for p in net.parameters()) == published + (50_304 - 50_257) * width
