# SPDX-License-Identifier: MIT
"""What pruning does to weights, gradients and state, step by step."""

import pytest
import torch

from ablab import checkpoint
from ablab.plugin import EffectError
from ablab.prune._mask import Mask
from ablab.rundir import Checkpoint
from tests.prune.rig import made, run, train

BASE = 'CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=2\nCONFIG_PRUNE_INTERVAL=3\nCONFIG_PRUNE_SPARSITY="0.6"\n'
SPAM = "CONFIG_OPT_ADAMWSPAM=y\nCONFIG_OPT_ADAMWSPAM_INTERVAL=6\nCONFIG_OPT_ADAMWSPAM_REWARM=3\n"
SPAM += "CONFIG_OPT_ADAMWSPAM_GRACE=2\n"
OPTIMIZERS = ["", SPAM, SPAM + "CONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y\n"]


def flats(built):
    return [built.optimizer.arena.weights, *built.optimizer.flats.values()]


def zero(p):
    return p.detach() == 0


def test_the_ramp_is_followed_exactly_and_zeros_stay():
    seen = []

    def after(built, pruner):
        seen.append({n: zero(p) for n, p in pruner.weights.items()})

    built, pruner = run(BASE, after=after)
    n = pruner.size
    assert n == 16384 and set(pruner.weights) == {
        f"blocks.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attn.project.qkv", "attn.out", "mlp.up", "mlp.down")
    }
    counts = [sum(int(z.sum()) for z in s.values()) for s in seen]
    # begin 2, end 12, updates at 2 5 8 11 12; 0.6 - 0.6 (1 - y)^3
    targets = {t: 0.6 - 0.6 * (1 - (t - 2) / 10) ** 3 for t in (2, 5, 8, 11)} | {12: 0.6}
    held = 0
    for t in range(1, 17):
        held = int(targets[t] * n) if t in targets else held
        assert counts[t - 1] == held, t
    for before, now in zip(seen, seen[1:], strict=False):
        assert all((now[name] | ~before[name]).all() for name in before)  # what is zero stays zero
    everything = torch.cat([p.detach().flatten() for name, p in built.model.named_parameters() if name not in seen[0]])
    assert int((everything == 0).sum()) < 10  # nothing else was pruned


def test_under_a_budget_of_seconds_the_ramp_ends_at_its_share_and_masks_freeze():
    cfg, built, _ = made(BASE, 16)
    pruner, seen = cfg.prune.build(built.model, built.optimizer, None, 1), []
    train(built, pruner, 1, 16, 16, lambda: seen.append(pruner.sparsity()))
    assert seen[0] == 0 < seen[1] < seen[4] < seen[10] < seen[11] == seen[15] == int(0.6 * 16384) / 16384
    assert seen[11] == pytest.approx(0.6, abs=1e-4)  # 12 / 16 is the share 0.75


def test_the_smallest_weights_go():
    _, built, pruner = made(BASE + 'CONFIG_PRUNE_INITIAL="0.25"\n', 16)
    train(built, pruner, 1, 1, 16)
    plain = {n: p.detach().clone() for n, p in pruner.weights.items()}
    pruner.update(2, 2 / 16)
    kept = torch.cat([plain[n][~zero(p)].abs() for n, p in pruner.weights.items()])
    gone = torch.cat([plain[n][zero(p)].abs() for n, p in pruner.weights.items()])
    assert len(gone) == 4096 and gone.max() <= kept.min()


def test_each_layer_alike():
    _, pruner = run(BASE + "CONFIG_PRUNE_ALLOC_LAYER=y\n")
    for name, p in pruner.weights.items():
        assert int(zero(p).sum()) == int(0.6 * p.numel()), name


def test_a_tied_head_is_pruned_only_when_asked_for():
    assert "wte.weight" not in run(BASE)[1].weights
    built, pruner = run(BASE + "CONFIG_PRUNE_TIED=y\n")
    assert pruner.size == 16384 + 256 * 32 and zero(built.model.wte.weight).any()
    assert not zero(built.model.wpe.weight).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["BOOL", "BITS"])
def test_masking_gradients_alone_equals_masking_everything(optimizer, mask):
    """Zero is a fixed point of the update."""

    def everything(built, pruner):
        if pruner.held:
            pruner.mask.apply(*flats(built))

    extra = f"{BASE}{optimizer}CONFIG_PRUNE_MASK_{mask}=y\n"
    (a, _), (b, _) = run(extra, 40), run(extra, 40, everything)
    for x, y in zip(flats(a), flats(b), strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_pruned_gradients_and_state_are_zero():
    built, pruner = run(BASE)
    for p in pruner.weights.values():
        state = built.optimizer.state[p]
        assert not state["exp_avg"][zero(p)].any() and not state["exp_avg_sq"][zero(p)].any()


def test_scope_weights_leaves_gradients_and_state_alone():
    built, pruner = run(BASE + "CONFIG_PRUNE_SCOPE_WEIGHTS=y\n")
    assert pruner.sparsity() == int(0.6 * pruner.size) / pruner.size
    for p in pruner.weights.values():
        assert built.optimizer.state[p]["exp_avg"][zero(p)].ne(0).float().mean() > 0.9
    full, _ = run(BASE)
    assert not torch.equal(full.optimizer.arena.weights, built.optimizer.arena.weights)


def test_bits_and_bytes_prune_the_same():
    (a, p), (b, q) = run(BASE), run(BASE + "CONFIG_PRUNE_MASK_BITS=y\n")
    assert torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)
    assert q.nbytes * 8 == p.nbytes == 16384 and p.gauges() == q.gauges()


@pytest.mark.parametrize("extra", ["", "CONFIG_PRUNE_MASK_BITS=y\n", "CONFIG_PRUNE_SCOPE_WEIGHTS=y\n"])
@pytest.mark.parametrize("at", [1, 4, 5, 6, 12])  # 5 is an update, 12 the end of the ramp
def test_resume_is_bitwise_equal(tmp_path, extra, at):
    _, a, p = made(BASE + extra, 16)
    train(a, p, 1, at, 16)
    place = Checkpoint(tmp_path / "step", 1, 1)
    checkpoint.save(place, a.model, a.optimizer, {}, more=p.state())
    _, b, q = made(BASE + extra, 16)
    state = q.state()
    checkpoint.load(place, b.model, b.optimizer, state)
    q.restore(state)
    assert p.gauges() == q.gauges()
    for built, pruner in ((a, p), (b, q)):
        train(built, pruner, at + 1, 16, 16)
    assert all(torch.equal(x, y) for x, y in zip(flats(a), flats(b), strict=True))
    assert torch.equal(p.mask.held, q.mask.held)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("apply", lambda self, *flats: None),  # masks that nobody applies
        ("put", lambda self, where, stay: None),  # masks that do not change
    ],
)
def test_pruning_that_has_no_effect_is_an_error(monkeypatch, name, fault):
    monkeypatch.setattr(Mask, name, fault)
    with pytest.raises(EffectError, match="effect at step 5: prune/zeros: expected"):
        run(BASE)


def test_weights_that_are_zero_beyond_the_mask_are_an_error():
    _, built, pruner = made(BASE, 16)
    train(built, pruner, 1, 4, 16)
    with torch.no_grad():
        for name, p in pruner.weights.items():
            p.mul_("attn" in name)
    with pytest.raises(EffectError, match="6458 in the mask and 8[0-9]{3} in the weights"):
        pruner.update(5, 5 / 16)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ('CONFIG_PRUNE_RAMP_FRACTION="0.12"', "WARMUP = 2 : the ramp must end after it and within 16 steps"),
        ("CONFIG_PRUNE_RAMP_BY_STEP=y\nCONFIG_PRUNE_RAMP_STEP=17", "within 16 steps, but"),
        ("CONFIG_PRUNE_RAMP_BY_STEP=y\nCONFIG_PRUNE_RAMP_STEP=17", "step 17; set CONFIG_PRUNE_RAMP_STEP to 16 or less"),
        ("CONFIG_PRUNE_RAMP_BY_STEP=y\nCONFIG_PRUNE_RAMP_STEP=2", "ends it at step 2; lower it below 2, or raise that"),
        ('CONFIG_PRUNE_INITIAL="0.7"', "INITIAL = 0.7 : more than CONFIG_PRUNE_SPARSITY = 0.6"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(extra, text):
    with pytest.raises(ValueError, match=text):
        made(BASE + extra, 16)


BY_STEP = "CONFIG_PRUNE_RAMP_BY_STEP=y\nCONFIG_PRUNE_RAMP_STEP=12\n"


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("", 'CONFIG_PRUNE_SPARSITY="0.3"'),
        ("", 'CONFIG_PRUNE_INITIAL="0.1"'),
        ("", "CONFIG_PRUNE_CURVE_LINEAR=y"),
        ("", "CONFIG_PRUNE_CURVE_CUBIC_IN=y"),
        ("", "CONFIG_PRUNE_WARMUP=3"),
        ("", 'CONFIG_PRUNE_RAMP_FRACTION="0.5"'),
        (BY_STEP, "CONFIG_PRUNE_RAMP_STEP=14"),
        ("", "CONFIG_PRUNE_INTERVAL=2"),
        ("", "CONFIG_PRUNE_ALLOC_LAYER=y"),
        ("", "CONFIG_PRUNE_SCOPE_WEIGHTS=y"),
        ("", "CONFIG_PRUNE_TIED=y"),
    ],
)
def test_turning_a_knob_changes_weights(base, line):
    others = "\n".join(s for s in (BASE + base).split() if s.partition("=")[0] != line.partition("=")[0])
    a, b = run(BASE + base)[0], run(f"{others}\n{line}\n")[0]
    assert not torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)
    assert torch.equal(run(BASE)[0].optimizer.arena.weights, run(BASE + BY_STEP)[0].optimizer.arena.weights)


def test_dense_training_holds_no_mask():
    _, pruner = run("")
    assert pruner.nbytes == 0 and pruner.state() == {} and pruner.gauges().keys() == {"sparsity"}
    assert pruner.sparsity() < 1e-4
