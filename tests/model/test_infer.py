# SPDX-License-Identifier: MIT
"""Sampling: the cache changes nothing, the seed decides, and the context may run full."""

import pytest
import sample
import torch

from ablab import checkpoint, infer, journal, kconf, rundir
from ablab.rundir import RunError
from ablab.tensor.cache import Pruned
from tests.blocks import SIZES, assemble, network, perturbed, tokens


@pytest.fixture
def net():
    return perturbed(network(n_vocab=90).double(), std=0.2)


def reference(net, ids, count):
    """Greedy decoding by full forwards, with the same rule for a full context."""
    net.eval()
    seen, window = list(ids), list(ids)[-40:]
    for _ in range(count):
        if len(window) > 40:
            window = seen[-20:]
        seen.append(int(net(torch.tensor([window])).logits[0, -1].argmax()))
        window.append(seen[-1])
    return seen[len(ids) :]


@pytest.mark.parametrize("prompt", [1, 9, 40, 55])
def test_greedy_text_equals_full_forwards_beyond_the_context(net, prompt):
    ids = tokens(prompt, n=90).tolist()
    with torch.no_grad():
        want = reference(net, ids, 60)
    assert list(infer.generate(net, ids, 60, 0.0, None, 1)) == want


def test_a_pruned_cache_reads_the_prompt_token_by_token(net):
    ids, past = tokens(9, n=90).tolist(), Pruned(6, 2)
    net.eval()
    with torch.no_grad():
        logits = [net(torch.tensor([[i]]), past=past).logits for i in ids]
        want = [int(logits[-1].argmax())]
        for _ in range(11):
            want.append(int(net(torch.tensor([want[-1:]]), past=past).logits.argmax()))
    assert list(infer.generate(net, ids, 12, 0.0, None, 1, lambda: Pruned(6, 2))) == want
    whole = list(infer.generate(net, ids, 60, 0.0, None, 1))
    assert list(infer.generate(net, ids, 60, 0.0, None, 1, lambda: Pruned(40, 2))) == whole


def test_equal_seeds_give_equal_tokens_and_padding_never_appears(net):
    draws = [list(infer.generate(net, [1, 2], 60, 1.5, None, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert max(max(d) for d in draws) < 90


def test_top_1_is_greedy_and_top_k_keeps_k():
    logits, stream = torch.tensor([0.0, 3.0, 2.0, -1.0]), torch.Generator().manual_seed(0)
    assert {infer.choose(logits, 5.0, 1, stream) for _ in range(20)} == {1}
    assert {infer.choose(logits, 50.0, 2, stream) for _ in range(50)} == {1, 2}
    assert {infer.choose(logits, 50.0, 9, stream) for _ in range(200)} == {0, 1, 2, 3}


def test_samples_follow_the_softmax():
    logits, stream = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)
    hits = sum(infer.choose(logits, 0.5, None, stream) for _ in range(2000))
    assert hits / 2000 == pytest.approx(1 / (1 + torch.e**-2.0), abs=0.03)  # 4 standard errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tokens": 0}, "TOKENS=0: 1 or more"),
        ({"temperature": -1.0}, "TEMPERATURE=-1.0"),
        ({"top_k": 0}, "TOP_K"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        infer.sample(None, "x", **arguments)


@pytest.fixture
def trial(tmp_path):
    """A claimed trial of bytes with one checkpoint, the weights of another seed."""
    asked = {**SIZES, "MODEL_GPT_VOCAB": 260}
    lines = [f"CONFIG_{k}={v}" for k, v in asked.items()]
    settled = kconf.settle(kconf.load(), [kconf.parse("test", enumerate(lines, 1), "test")])
    content = sample.plan(1)
    configs = {rundir.folder_of(content["trials"][0]): settled.config()}
    (trial,) = rundir.Campaign.create(tmp_path, "demo", content, configs).trials()
    journal.Journal.of(trial.campaign).claim(trial)
    place = trial.checkpoint(10, 1)
    draft = place.begin()
    checkpoint.store(draft.model, perturbed(assemble(settled.values, seed=9)).state_dict())
    checkpoint.store(draft.state, {"lam": torch.ones(())})
    draft.seal()
    place.commit(draft)
    return trial


def test_sample_reads_the_weights_of_the_newest_checkpoint(trial):
    text = infer.sample(trial, "to be", tokens=12, seed=3)
    assert text.startswith("to be") and len(text) > 5
    assert infer.sample(trial, "to be", tokens=12, seed=3) == text
    net = perturbed(assemble(kconf.settle(kconf.load(), [kconf.lex(trial.config)]).values, seed=9, n_vocab=256))
    ids = list(b"to be")
    more = infer.generate(net, ids, 12, 0.8, None, 3)
    assert text == bytes([*ids, *more]).replace(b"\0", b"\n\n").decode(errors="replace")


def test_a_damaged_checkpoint_is_not_used(trial):
    (place,) = trial.saved()
    place.model.write_bytes(place.model.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="no checkpoint that verifies"):
        infer.sample(trial, "to be")
    assert trial.saved()  # and it is left alone
