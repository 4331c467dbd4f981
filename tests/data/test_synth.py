# SPDX-License-Identifier: MIT
"""The synthetic source has the entropy it claims, and only a model of two tokens back reaches it."""

import math
from collections import Counter

import numpy as np

from ablab.data.synth import ENTROPY, SYMBOLS, generate


def conditional_entropy(tokens, order):
    """Nats per token given the `order` tokens before, from counts."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, order + 1)
    whole = Counter(map(tuple, windows.tolist()))
    context = Counter(map(tuple, windows[:, :-1].tolist()))
    return -sum(n * math.log(n / context[w[:-1]]) for w, n in whole.items()) / len(windows)


def test_entropy_given_two_tokens_is_the_stated_one():
    tokens = generate(200_000, 1)
    # counts underestimate by about (contexts x 3 free odds) / (2 x tokens), joins add a little
    assert abs(conditional_entropy(tokens, 2) - ENTROPY) < 0.03


def test_one_token_back_does_not_suffice():
    assert conditional_entropy(generate(200_000, 1), 1) > ENTROPY + 1
    assert conditional_entropy(generate(200_000, 1), 0) > math.log(SYMBOLS) - 0.1


def test_seeds_give_other_tokens_of_the_same_source():
    a, b = generate(5000, 1), generate(5000, 2)
    assert (a != b).mean() > 0.9 and np.array_equal(a, generate(5000, 1))
    assert a.dtype == np.uint16 and len(a) == 5000 and set(a) <= set(range(64, 96))
