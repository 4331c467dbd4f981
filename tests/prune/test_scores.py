# SPDX-License-Identifier: MIT
"""Scores by hand, their medians, the masks they agree on, and what each method is."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ablab import checkpoint
from ablab.optim import Impl
from ablab.optim.adamw import FlatAdamW
from ablab.optim.sgd import FlatSgd
from ablab.prune import Alloc, Pattern, Scope, Store
from ablab.prune._schedule import Curve, Ramp, by_depth
from ablab.prune.displacement import ByDisplacement
from ablab.prune.movement import ByMovement
from ablab.prune.state import ByState, Direction, Score, splitmix64
from ablab.rundir import Checkpoint
from tests.prune.rig import made, run, train

RAMP = Ramp(0.0, 0.5, Curve.LINEAR, 1, 1, 2, None)
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")


def section(**changes):
    base = {"alloc": Alloc.GLOBAL, "alloc_cap": None, "pattern": Pattern.FREE, "mask": Store.BOOL}
    return SimpleNamespace(
        **{**base, "scope": Scope.FULL, "tied": False, "skip_first": False, "skip_last": False, **changes}
    )


class Net(nn.Module):
    """Linear weights of the sizes asked for."""

    ties: dict = {}

    def __init__(self, *shapes, dtype=torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(b, a, bias=False, dtype=dtype) for a, b in shapes)


def by_state(kind, w, m, v, direction=Direction.AWAY, eps=1e-3, seed=1, **changes):
    """A pruner over one weight with these moments, ready to be asked for scores."""
    net = Net((1, len(w)))
    groups = [{"name": "decay", "params": [net.layers[0].weight], "weight_decay": 0.0, "lr": 0.0}]
    optimizer = FlatAdamW(groups, 0.9, 0.95, 1e-8, Impl.FUSED)
    with torch.no_grad():
        net.layers[0].weight.copy_(w[None])
        for name, values in (("exp_avg", m), ("exp_avg_sq", v)):
            optimizer.flats[name][: len(w)] = values
    config = SimpleNamespace(score=kind, bitter5=direction, eps=eps)
    pruner = ByState(net, optimizer, section(**changes), RAMP, config, seed)
    pruner.prepare()
    return pruner


def scores(*args, **kwargs):
    pruner = by_state(*args, **kwargs)
    return pruner.score(pruner.parts[0][0])


W = [0.5, -0.1, 0.02, -0.3, 0.04, 0.2, -0.07, 0.01]
M = [1e-3, 2e-3, -5e-4, 4e-3, -1e-4, 3e-4, 6e-4, -7e-4]
V = [4e-6, 9e-6, 1e-6, 1.6e-5, 2.5e-7, 4e-8, 6.4e-7, 3.6e-6]


def by_hand(kind, direction):
    """The table, in Python's floats."""
    median = lambda y: sorted(y)[3]  # the lower one of eight
    a, u, r = [abs(w) for w in W], [abs(m) for m in M], [math.sqrt(v) for v in V]
    eu, er, ev = (1e-3 * median(y) for y in (u, r, V))
    sign = 1 if direction is Direction.TOWARD else -1
    rows = zip(W, M, V, a, u, r, strict=True)
    rule = {
        "BITTER0": lambda w, m, v, a_, u_, r_: a_ * a_ * u_ / (r_ + er),
        "BITTER1": lambda w, m, v, a_, u_, r_: a_,
        "BITTER2": lambda w, m, v, a_, u_, r_: a_,
        "BITTER3": lambda w, m, v, a_, u_, r_: a_ * math.sqrt(u_ + eu),
        "BITTER4": lambda w, m, v, a_, u_, r_: a_ * math.sqrt(u_ + eu),
        "BITTER5": lambda w, m, v, a_, u_, r_: sign * math.copysign(1, w) * m / (r_ + er) + 0.1 * a_ / median(a),
        "BITTER6": lambda w, m, v, a_, u_, r_: a_ * math.sqrt(u_ + eu) * u_ / math.sqrt(v + ev),
        "BITTER7": lambda w, m, v, a_, u_, r_: a_ * (v + ev) ** 0.25,
        "BITTER8": lambda w, m, v, a_, u_, r_: a_ / median(a) * (v / median(V) + 1e-3) ** 0.25,
    }[kind.name]
    return [rule(*row) for row in rows]


@pytest.mark.parametrize("kind", [k for k in Score if k not in (Score.RANDOM, Score.BITTER9)])
@pytest.mark.parametrize("direction", Direction)
def test_scores_are_those_of_the_table(kind, direction):
    got = scores(kind, *map(torch.tensor, (W, M, V)), direction=direction)
    close = 4e-3 if kind is Score.BITTER8 else 1e-6  # fp16 has 11 bits
    assert got.tolist() == pytest.approx(by_hand(kind, direction), rel=close)


def test_the_random_score_is_that_of_splitmix64():
    assert splitmix64(torch.tensor(0)).item() == 0xE220A8397B1DCDAF - (1 << 64)  # its published first output
    got = scores(Score.RANDOM, *map(torch.tensor, (W, M, V)), seed=7)

    def mix(x):
        z = (x + 0x9E3779B97F4A7C15) % (1 << 64)
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return z ^ (z >> 31)

    stream = mix(mix(7))
    assert got.tolist() == [mix(stream + i * 0x9E3779B97F4A7C15) >> 40 for i in range(8)]
    assert not torch.equal(got, scores(Score.RANDOM, *map(torch.tensor, (W, M, V)), seed=8))


def synthetic(n=1 << 21):
    """Weights and moments with the spread of trained ones."""
    torch.manual_seed(0)
    w, v, m = torch.randn(n), torch.randn(n), torch.randn(n)
    w = 0.02 * w * torch.exp(torch.randn(n) / 2)
    v = 8e-9 * torch.exp(2 * v)
    return w, 0.3 * v.sqrt() * m, v


def kept(kind, data, **kwargs):
    s = scores(kind, *data, **kwargs)
    return s > s.kthvalue(len(s) // 2).values


def agreement(a, b):
    """Share of what one keeps that the other keeps too."""
    return float((a & b).sum() / a.sum())


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Score.RANDOM, 0.50),
        (Score.BITTER0, 0.857),
        (Score.BITTER1, 1.0),
        (Score.BITTER2, 1.0),
        (Score.BITTER3, 0.812),
        (Score.BITTER5, 0.614),
        (Score.BITTER6, 0.700),
        (Score.BITTER7, 0.860),
        (Score.BITTER8, 0.860),
    ],
)
def test_how_far_scores_agree_with_magnitude(kind, wanted):
    data = synthetic()
    assert agreement(kept(Score.BITTER1, data), kept(kind, data)) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("kind", [Score.BITTER0, Score.BITTER3, Score.BITTER5, Score.BITTER6, Score.BITTER7])
def test_masks_do_not_depend_on_the_scale_of_gradients(kind):
    w, m, v = synthetic(1 << 18)
    assert agreement(kept(kind, (w, m, v)), kept(kind, (w, m * 1e-3, v * 1e-6))) > 0.9999


def test_half_precision_ranks_like_full():
    data = synthetic(1 << 18)
    assert agreement(kept(Score.BITTER7, data), kept(Score.BITTER8, data)) > 0.999


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns at itself
def test_the_compiled_score_ranks_like_full():
    data = synthetic(1 << 18)
    assert agreement(kept(Score.BITTER7, data), kept(Score.BITTER9, data)) > 0.999
    torch._dynamo.reset()


@pytest.mark.parametrize(("direction", "low", "high"), [(Direction.AWAY, 0.8, 1.0), (Direction.TOWARD, 0.0, 0.2)])
def test_which_moving_weights_are_kept(direction, low, high):
    w, m, v = synthetic(1 << 18)
    away = w * m < 0  # Adam moves w by -m
    assert low <= float(away[kept(Score.BITTER5, (w, m, v), direction=direction)].float().mean()) <= high


def test_the_median_is_that_of_live_weights():
    pruner = by_state(Score.BITTER5, *map(torch.tensor, (W, M, V)))
    assert pruner.medians == pytest.approx({"a": 0.07, "r": math.sqrt(1e-6)})
    pruner.mask.put(slice(0, 8), torch.tensor([0, 1, 1, 0, 1, 1, 1, 1]).bool())
    pruner.held = 2
    pruner.prepare()
    assert pruner.medians["a"] == pytest.approx(0.04)


# methods


STATE = "CONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\nCONFIG_PRUNE_STATE_SCORE_"
BASE = 'CONFIG_PRUNE_WARMUP=2\nCONFIG_PRUNE_INTERVAL=3\nCONFIG_PRUNE_SPARSITY="0.6"\n'


@pytest.mark.parametrize("base", ["ADAMW", "ADAMWADV"])
def test_magnitude_and_its_twins_give_equal_bits(base):
    found = [run(f"{BASE}CONFIG_OPT_{base}=y\nCONFIG_PRUNE_MAGNITUDE=y\n")[0]]
    for twin in ("BITTER1", "BITTER2"):
        found.append(run(f"{BASE}CONFIG_OPT_ADAMWPRUNE_BASE_{base}=y\n{STATE}{twin}=y\n")[0])
    first, *others = (b.optimizer.arena.weights for b in found)
    assert all(torch.equal(first.view(torch.int32), other.view(torch.int32)) for other in others)


@pytest.mark.parametrize(
    "method", ["CONFIG_PRUNE_MOVEMENT", "CONFIG_PRUNE_DISPLACEMENT", *[STATE + k.name for k in Score][:-1]]
)
def test_every_method_follows_the_ramp_and_resumes(method, tmp_path):
    _, a, p = made(f"{BASE}{method}=y\n", 16)
    train(a, p, 1, 6, 16)
    other = "" if method.endswith("RANDOM") else "CONFIG_TRAIN_SEED=2\n"  # other weights to begin with
    place, (_, b, q) = Checkpoint(tmp_path / "step", 1, 1), made(f"{BASE}{method}=y\n{other}", 16)
    checkpoint.save(place, a.model, a.optimizer, {}, more=p.state())
    state = q.state()
    checkpoint.load(place, b.model, b.optimizer, state)
    q.restore(state)
    for built, pruner in ((a, p), (b, q)):
        train(built, pruner, 7, 16, 16)
        assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
        assert abs(pruner.masked() - 0.6 * pruner.size) <= 8  # DEPTH rounds in each layer
    assert torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)
    magnitude, _ = run(f"{BASE}CONFIG_PRUNE_MAGNITUDE=y\n")
    same = torch.equal(magnitude.optimizer.arena.weights, a.optimizer.arena.weights)
    assert same is method.endswith(("BITTER1", "BITTER2"))


def test_displacement_is_weight_times_its_way():
    net = Net((1, 6))
    w = net.layers[0].weight
    first = w.detach().clone()
    groups = [{"name": "decay", "params": [w], "weight_decay": 0.0, "lr": 0.0}]
    pruner = ByDisplacement(net, FlatAdamW(groups, 0.9, 0.95, 1e-8, Impl.FUSED), section(), RAMP)
    with torch.no_grad():
        w.add_(torch.tensor([[0.1, -0.2, 0.3, 0.0, 1.0, -1.0]]))
    assert torch.allclose(pruner.score(pruner.parts[0][0]), (w * (w - first)).flatten())


def test_movement_equals_masking_in_the_forward_pass():
    """A dense W, a mask in front of the product: float64, 300 steps of SGD."""
    torch.manual_seed(0)
    shapes, lr, total = [(12, 10), (7, 12)], 0.05, 300
    net = Net(*shapes, dtype=torch.float64)
    dense = [layer.weight.detach().clone() for layer in net.layers]
    groups = [{"name": "decay", "params": list(net.parameters()), "weight_decay": 0.0, "lr": lr}]
    optimizer = FlatSgd(groups, 0.0, False, Impl.LOOP)
    ramp = Ramp(0.0, 0.7, Curve.CUBIC_ZG, 20, 10, 250, None)
    pruner = ByMovement(net, optimizer, section(), ramp, False)
    masks, S = [torch.ones_like(w) for w in dense], [torch.zeros_like(w) for w in dense]
    came_back = False
    for t in range(1, total + 1):
        x, y = (torch.randn(16, n, dtype=torch.float64) for n in (10, 7))
        loss = (net.layers[1](torch.tanh(net.layers[0](x))) - y).square().mean()
        loss.backward()
        pruner.observe()
        pruner.mask_gradients()
        optimizer.gate(loss.detach(), 0.0, t)
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(t, t / total)
        seen = [(w * k).requires_grad_() for w, k in zip(dense, masks, strict=True)]
        out = F.linear(torch.tanh(F.linear(x, seen[0])), seen[1])
        grads = torch.autograd.grad((out - y).square().mean(), seen)
        for i, g in enumerate(grads):
            S[i].addcmul_(g, dense[i], value=-1)
            dense[i].add_(g * masks[i], alpha=-lr)
        if ramp.due(t, 0.0):
            flat = torch.cat([s.flatten() for s in S])
            k = int(ramp.target(t, 0.0) * len(flat))
            keep = torch.ones_like(flat)
            keep[torch.sort(flat.float(), stable=True).indices[:k]] = 0
            before = masks
            masks = [p.view(w.shape) for p, w in zip(keep.split([w.numel() for w in dense]), dense, strict=True)]
            came_back |= any(bool((new > old).any()) for new, old in zip(masks, before, strict=True))
        for layer, w, k in zip(net.layers, dense, masks, strict=True):
            assert torch.equal(layer.weight, w * k), t
    assert came_back


def test_shadow_weights_may_be_halved():
    extra = f"{BASE}CONFIG_PRUNE_MOVEMENT=y\n"
    (a, p), (b, q) = run(extra, 40), run(extra + "CONFIG_PRUNE_MOVEMENT_SHADOW_BF16=y\n", 40)
    assert p.nbytes == 9 * 16384 and q.nbytes == 7 * 16384
    assert not torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)


# allocation and pattern


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.9, 0.95])
def test_shares_by_depth_have_the_mean_that_is_asked_for(share):
    for sizes in ([100], [300, 50], [10, 1000, 10, 500], [2359296, 589824] * 12):
        got = by_depth(sizes, share, 0.95)
        assert sum(n * s for n, s in zip(sizes, got, strict=True)) == pytest.approx(share * sum(sizes), rel=1e-12)
        assert got == sorted(got) and max(got) <= 0.95 + 1e-12
        k = [int(n * s) for n, s in zip(sizes, got, strict=True)]
        assert abs(sum(k) - share * sum(sizes)) <= len(sizes)
        assert all(a <= b + 1e-12 for a, b in zip(by_depth(sizes, share - 0.05, 0.95), got, strict=True))
    assert by_depth([10, 10, 10], 0.3, 0.95) == pytest.approx([0.21, 0.30, 0.39])


def test_a_pattern_zeroes_two_of_four_by_score():
    half = BASE.replace("0.6", "0.5") + "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_PATTERN_2OF4=y\n"
    _, built, pruner = made(half, 16)
    train(built, pruner, 1, 1, 16)
    seen = 0
    for t in range(2, 17):
        before = {n: p.detach().clone() for n, p in pruner.weights.items()}
        if t in (2, 5, 8, 11, 12):
            pruner.update(t, t / 16)
        else:
            train(built, pruner, t, t, 16)
        zeros = torch.cat([(p == 0).view(-1, 4).sum(1) for p in pruner.weights.values()])
        assert set(zeros.tolist()) <= {0, 2} and int((zeros > 0).sum()) >= seen
        seen = int((zeros > 0).sum())
        if t == 5:  # the groups that went lose less than any that stayed, and lose their two smallest
            lost = torch.cat([w.abs().view(-1, 4).sort().values[:, :2].sum(1) for w in before.values()])
            assert lost[zeros > 0].max() <= lost[zeros == 0].min()
            for name, w in before.items():
                gone, old = pruner.weights[name] == 0, w.abs().view(-1, 4)
                smallest = torch.zeros_like(old, dtype=torch.bool).scatter_(1, old.sort().indices[:, :2], True)
                assert (gone.view(-1, 4) <= smallest).all()
    assert seen == pruner.size // 4 and pruner.sparsity() == 0.5


@pytest.mark.parametrize("method", ["CONFIG_OPT_SGD=y\nCONFIG_PRUNE_DISPLACEMENT", f"{STATE}BITTER5"])
def test_a_group_that_lost_two_never_gets_them_back(method):
    """Some scores are negative: less than those of zeros."""
    _, built, pruner = made(f"{BASE.replace('0.6', '0.5')}{method}=y\nCONFIG_PRUNE_PATTERN_2OF4=y\n", 16)
    gone = [torch.zeros(pruner.size, dtype=torch.bool)]

    def look():
        gone.append(torch.cat([pruner.mask.words(c) == 0 for parts in pruner.parts for c in parts]))
        assert not (gone[-2] & ~gone[-1]).any()

    train(built, pruner, 1, 16, 16, look)
    assert 0 < int(gone[6].sum()) < int(gone[-1].sum()) == pruner.size // 2


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("CONFIG_PRUNE_PATTERN_2OF4=y", "CONFIG_PRUNE_SPARSITY = 0.6 : CONFIG_PRUNE_PATTERN_2OF4"),
        ('CONFIG_PRUNE_ALLOC_DEPTH=y\nCONFIG_PRUNE_ALLOC_CAP="0.5"', "ALLOC_CAP = 0.5 : less than CONFIG_PRUNE_SP"),
        ("CONFIG_PRUNE_STATE=y", "stayed n"),
        (STATE + "BITTER4=y\nCONFIG_PRUNE_ALLOC_GLOBAL=y", "stayed n"),
    ],
)
def test_what_does_not_fit_is_refused(extra, text):
    with pytest.raises(ValueError, match=text):
        made(f"{BASE}{'' if 'STATE' in extra else 'CONFIG_PRUNE_MAGNITUDE=y'}\n{extra}\n", 16)


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("CONFIG_PRUNE_MAGNITUDE", "CONFIG_PRUNE_ALLOC_DEPTH=y"),
        ("CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_ALLOC_DEPTH", 'CONFIG_PRUNE_ALLOC_CAP="0.65"'),
        (STATE + "BITTER7", 'CONFIG_PRUNE_STATE_EPS="0.9"'),
        (STATE + "BITTER5", "CONFIG_PRUNE_STATE_BITTER5_TOWARD=y"),
        (STATE + "BITTER0", "CONFIG_OPT_ADAMWPRUNE_BASE_ADAM=y"),
    ],
)
def test_turning_a_knob_changes_weights(base, line):
    a, b = run(f"{BASE}{base}=y\n")[0], run(f"{BASE}{base}=y\n{line}\n")[0]
    assert not torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)


def test_weights_whose_rows_do_not_fit_a_pattern_are_listed_and_left_alone(capsys):
    net = Net((8, 6), (5, 8))
    groups = [{"name": "decay", "params": list(net.parameters()), "weight_decay": 0.0, "lr": 0.0}]
    optimizer = FlatAdamW(groups, 0.9, 0.95, 1e-8, Impl.FUSED)
    optimizer.gate(torch.zeros(()), 0.0)
    pruner = ByDisplacement(net, optimizer, section(pattern=Pattern["2OF4"]), RAMP)
    assert capsys.readouterr().out == "not pruned, for its rows are no multiple of 4: layers.0.weight\n"
    pruner.update(2, 1.0)
    assert int((net.layers[1].weight == 0).sum()) == 20 and net.layers[0].weight.all()


@pytest.mark.parametrize("method", ["MAGNITUDE", "MOVEMENT", "DISPLACEMENT", "STATE=y\nCONFIG_OPT_ADAMWPRUNE"])
def test_two_steps_are_enough_for_a_dry_run(method):
    short = 'CONFIG_PRUNE_WARMUP=1\nCONFIG_PRUNE_INTERVAL=1\nCONFIG_PRUNE_RAMP_FRACTION="1.0"\n'
    _, pruner = run(f"{short}CONFIG_PRUNE_{method}=y\n", 2)
    assert pruner.sparsity() == 0.5
