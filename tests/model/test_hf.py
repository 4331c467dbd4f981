# SPDX-License-Identifier: MIT
"""Parity with GPT2LMHeadModel of transformers through the weight mapping."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from ablab.model import _hf
from tests.blocks import network, tokens

SIZES = [(2, 2, 32, 16, 61), (3, 4, 64, 40, 97)]  # layers, heads, width, context, vocabulary
FORMS = {False: "gelu", True: "gelu_new"}


def pair(size, tanh=False, dtype=torch.float64, padded=0):
    """(theirs, ours), ours with the weights of theirs."""
    layers, heads, width, context, vocab = size
    torch.manual_seed(3)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            activation_function=FORMS[tanh],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms off their init
            p.add_(torch.randn_like(p) * 0.05)
    ours = network(
        n_vocab=vocab,
        MODEL_GPT_LAYERS=layers,
        MODEL_GPT_HEADS=heads,
        MODEL_GPT_EMBED=width,
        MODEL_GPT_BLOCK=context,
        MODEL_GPT_VOCAB=vocab + padded,
        MLP_GELU_WIDTH=4 * width,
        MLP_GELU_TANH=tanh,
    ).to(dtype)
    ours.load_state_dict(_hf.from_hf(theirs.state_dict(), vocab + padded))
    return theirs, ours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_and_gradients_equal_theirs(size, tanh, dtype, tolerance):
    theirs, ours = pair(size, tanh, dtype)
    x, y = tokens(3, size[3], n=size[4]), tokens(3, size[3], seed=1, n=size[4])
    out = ours(x, y, keep_logits=True)
    logits = theirs(x).logits
    assert (out.logits - logits).abs().max() < tolerance
    out.loss.backward()
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    assert abs(out.loss.item() - loss.item()) < tolerance
    grads = _hf.to_hf({n: p.grad for n, p in ours.named_parameters()})
    for name, p in theirs.named_parameters():
        assert (grads[name] - p.grad).abs().max() < tolerance, name


def test_the_two_forms_of_gelu_are_told_apart():
    theirs, ours = pair(SIZES[0], tanh=True)
    _, erf = pair(SIZES[0], tanh=False)
    x = tokens(2, 16, n=61)
    assert (ours(x).logits - theirs(x).logits).abs().max() < 1e-10
    assert (erf(x).logits - theirs(x).logits).abs().max() > 1e-6


def test_mapping_there_and_back_is_exact():
    theirs, ours = pair(SIZES[0], padded=3)
    back = _hf.to_hf(ours.state_dict(), 61)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[n], t) for n, t in theirs.state_dict().items())


def test_padded_columns_change_nothing_in_evaluation():
    theirs, ours = pair(SIZES[0], padded=3)
    x, y = tokens(2, 16, n=61), tokens(2, 16, seed=1, n=61)
    out = ours.eval()(x, y, keep_logits=True)
    want = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert (out.loss - want).abs() < 1e-10
    assert torch.isneginf(out.logits[..., 61:]).all() and torch.isfinite(out.logits[..., :61]).all()
    assert ours.train()(x, y).loss > out.loss + 1e-4  # padding takes part in training: a zero row adds e^0


def test_published_file_layout_is_read():
    """The files on the hub have no prefix, no head and hold mask buffers."""
    theirs, ours = pair(SIZES[0])
    state = {n.removeprefix("transformer."): t for n, t in theirs.state_dict().items() if "lm_head" not in n}
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in _hf.from_hf(state, 61).items())


def test_what_has_no_counterpart_is_refused():
    theirs, ours = pair(SIZES[0])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.gate\.x\.g: no such tensor"):
        _hf.to_hf({**ours.state_dict(), "blocks.0.attn.gate.x.g": torch.ones(1)})
    with pytest.raises(ValueError, match="no such tensor"):
        _hf.from_hf({**theirs.state_dict(), "score.weight": torch.ones(1, 1)}, 61)
    with pytest.raises(ValueError, match="CONFIG_MODEL_GPT_VOCAB = 60"):
        _hf.from_hf(theirs.state_dict(), 60)
