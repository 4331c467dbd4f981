# SPDX-License-Identifier: MIT
"""The cut against a stable sort."""

import random

import pytest
import torch

from ablab.prune._threshold import LOW, around, cut, kept, keys

KINDS = ("normal", "positive", "tied", "subnormal", "signed zeros")


def scores(kind, sizes, seed):
    torch.manual_seed(seed)
    draw = {
        "normal": torch.randn,
        "positive": torch.rand,
        "tied": lambda n: torch.randint(-2, 3, (n,)).float(),
        "subnormal": lambda n: torch.randint(-9, 9, (n,)).int().view(torch.int32).abs().view(torch.float32),
        "signed zeros": lambda n: torch.randint(-1, 2, (n,)).float() * 0.0,
    }[kind]
    return [draw(n) for n in sizes]


def masks(chunks, k):
    where, seen, found = cut(lambda: iter(chunks), k), 0, []
    for c in chunks:
        stay, seen = kept(c, where, seen)
        found.append(stay)
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_that_of_a_stable_sort(kind):
    dice = random.Random(kind)
    for case in range(80):
        sizes = [dice.randint(1, 300) for _ in range(dice.randint(1, 5))]
        chunks = scores(kind, sizes, case)
        everything = torch.cat(chunks)
        n = len(everything)
        k = dice.choice([0, 1, n - 1, n, dice.randint(0, n)])
        order = torch.sort(everything, stable=True).indices  # -0 and +0 are equal there too
        wanted = torch.ones(n, dtype=torch.bool)
        wanted[order[:k]] = False
        got = masks([keys(c) for c in chunks], k)
        assert torch.equal(got, wanted) and int(got.sum()) == n - k, (case, k, n)


@pytest.mark.parametrize("kind", KINDS)
def test_no_guess_changes_the_cut(kind):
    dice, hits = random.Random(kind), 0
    for case in range(40):
        chunks = [keys(c) for c in scores(kind, [dice.randint(1, 300) for _ in range(3)], case)]
        chunks[1][::2] = LOW
        everything = torch.cat(chunks)
        k = dice.choice([0, 1, len(everything), dice.randint(0, len(everything))])
        wanted = cut(lambda: iter(chunks), k)
        sample = around(everything[::3], k / len(everything))
        for guess in (sample, (LOW + 1, -LOW - 1), (5, 5), (wanted.key + 1, -LOW - 1), (LOW + 1, wanted.key - 1)):
            assert cut(lambda: iter(chunks), k, guess) == wanted, (case, k, guess)
        hits += sample[0] <= wanted.key <= sample[1] or wanted.key == LOW
    assert hits > 35  # a sample is worth its pass


def test_magnitudes_are_ranked_without_a_second_copy():
    c = torch.tensor([-5.0, 3.0, -0.0, 0.0, 2.0, -1e-40])
    assert torch.equal(keys(c, None, True), keys(c.abs()))
    words = torch.tensor([-1, 0, -1, 0, -1, 0], dtype=torch.int32)
    assert torch.equal(keys(c, words, True), keys(c.abs(), words))


def test_dead_elements_go_first():
    c, words = torch.tensor([-5.0, 3.0, -7.0, 0.5, 2.0]), torch.tensor([-1, 0, -1, 0, -1], dtype=torch.int32)
    k = keys(c, words)
    assert (k == LOW).tolist() == [False, True, False, True, False]
    assert masks([k], 2).tolist() == [True, False, True, False, True]
    assert masks([k], 3).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_score_that_is_not_finite_is_an_error(bad):
    c = torch.randn(50)
    c[7] = bad
    with pytest.raises(ValueError, match="not finite"):
        cut(lambda: [keys(c)], 10)
    with pytest.raises(ValueError, match="not finite"):
        cut(lambda: [keys(c)], 10, (LOW + 1, 0))
    words = torch.full((50,), -1, dtype=torch.int32)
    words[7] = 0  # a dead one has no score
    assert cut(lambda: [keys(c, words)], 10, (LOW + 1, 0)).ties
    assert cut(lambda: [keys(c, words)], 10).ties
