# SPDX-License-Identifier: MIT
"""Benchmarks compare like with like, keep disturbed samples out, and never fail for want of a GPU."""

import json

import pytest
import torch

from ablab.attention.reciprocal import Fold
from benchmarks import Figure, Sample, alternate, attention, decode, gpu, is_dirty, median, peers, record, steps, versus
from benchmarks.peers import SHAPES

TINY = SHAPES["tiny"]
WIDE = {"peer": "h.1.mlp.c_fc.bias", "transformers": "transformer.h.1.mlp.c_fc.bias"}


@pytest.fixture
def candidates():
    model = steps.network(TINY)
    plain = peers.from_ablab(model.state_dict(), TINY)
    made = {"ablab": (model, lambda x, y: model(x, y).loss), "peer": (plain, plain)}
    return made | {"transformers": steps.transformers_peer(model.state_dict(), TINY)}


def test_transformers_computes_what_tanh_gelu_does(candidates):
    for block in (twin := steps.network(TINY)).blocks:
        block.mlp.act.form = "tanh"
    pair = {"tanh": (twin, lambda x, y: twin(x, y).loss), "transformers": candidates["transformers"]}
    assert max(steps.same_at_step_0(TINY, pair).values()) < 1e-5


def test_all_peers_compute_the_same_loss_and_gradients(candidates):
    del candidates["transformers"]
    assert max(steps.same_at_step_0(TINY, candidates).values()) < 1e-5


@pytest.mark.parametrize("name", ["peer", "transformers"])
def test_a_peer_with_one_other_weight_is_not_timed(candidates, name):
    with torch.no_grad():
        dict(candidates[name][0].named_parameters())[WIDE[name]][0].add_(0.1)
    with pytest.raises(AssertionError, match=f"{name}: loss or gradients differ"):
        steps.same_at_step_0(TINY, candidates)


def test_written_out_attention_equals_the_fused_one():
    slow, fast = peers.Gpt(TINY, flash=False), peers.Gpt(TINY)
    slow.load_state_dict(fast.state_dict())
    x, y = torch.randint(TINY.vocab, (2, 3, TINY.block), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(slow(x, y), fast(x, y), rtol=1e-5)


def test_reciprocal_attention_is_timed_against_its_own_mathematics():
    made = attention.candidates(Fold(attention.DIMS, 0.3, False, 0))
    got = {name: attention.step(call, 40)() for name, call in made.items()}
    assert attention.difference(got["ablab"], got["explicit"]) < 1e-5
    assert attention.difference(got["SDPA"], got["explicit"]) > 1e-2


def test_absorbed_and_expanded_decode_give_the_same_logits():
    ours = decode.Ours(TINY, TINY.block)
    peer = decode.Expanded(ours)
    assert decode.same(ours, peer) < 1e-5
    peer.cache[1][0][0, 3] += 0.1  # one key
    with pytest.raises(AssertionError, match="absorbed and expanded logits differ"):
        decode.same(ours, peer)


def test_ten_steps_of_the_loop_follow_the_peer_in_float64(tmp_path):
    assert steps.drift(TINY, tmp_path) < 1e-5


def test_the_loop_under_test_writes_its_rows(tmp_path):
    ours = steps.Ours(TINY, tmp_path)
    for _ in range(2 * steps.LOG_STEPS):
        ours.step()
    ours.loop.rows.close()
    (path,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == [10, 20]


def test_candidates_alternate():
    calls = []

    def call(name):
        calls.append(name)
        return sum(range(50_000))

    samples = alternate({"a": lambda: call("a"), "b": lambda: call("b")}, 2, 1)
    runs = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert runs[2:] == ["a", "b"] * 2 and [len(s) for s in samples.values()] == [2, 2]


def test_dirty_samples_do_not_move_the_median():
    clean, dirty = [Sample(1.0, 0.0), Sample(1.2, 0.1), Sample(1.1, 0.0)], [Sample(9.0, 0.5)] * 9
    assert median(clean + dirty) == 1.1 and not is_dirty({"a": clean + dirty})
    assert is_dirty({"a": clean, "b": dirty})


def test_a_figure_knows_whether_it_meets_its_target():
    samples = {"ours": [Sample(1.0, 0.0)] * 3, "peer": [Sample(1.2, 0.0)] * 3}
    figure = versus("row", samples, "ours", "peer", ">= 1.25")
    assert figure.value == pytest.approx(1.2) and figure.verdict == "short"
    assert [Figure("row", 2, "us", target).verdict for target in ("<= 2", ">= 3", "")] == ["ok", "short", ""]
    assert Figure("row", 2, "us", "<= 2", dirty=True).verdict == "dirty"


def test_results_hold_machine_versions_code_and_all_samples(tmp_path):
    samples = {"ours": [Sample(1.0, 0.0)] * 3, "peer": [Sample(1.2, 0.3)] * 2}
    path = record([versus("row", samples, "ours", "peer", "")], {"threads": 1}, "cpu", tmp_path / "r.json")
    content = json.loads(path.read_text())
    assert len(content["figures"][0]["samples"]["peer"]) == 2 and content["figures"][0]["dirty"]
    assert content["machine"]["cores"] > 0 and content["software"]["torch"] and content["code"]["tree"]


def test_without_a_gpu_the_check_is_skipped(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 0 and "skipped" in capsys.readouterr().out


def test_the_gpu_check_runs_in_rehearsal(tmp_path, capsys):
    assert gpu.main(["--rehearse", "--quick", "--out", str(tmp_path / "r.json")]) == 0
    rows = {f["row"]: f for f in json.loads((tmp_path / "r.json").read_text())["figures"]}
    assert not [r for r in rows if r.endswith("failed")] and "ablab against peer + compile" in rows
    assert rows["gradient error fp32 eager"]["verdict"] == rows["loss after 10 steps, fp32"]["verdict"] == "ok"
