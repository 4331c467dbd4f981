# SPDX-License-Identifier: MIT
"""Which weights are pruned: matrices and kernels, but for those that are left out."""

from types import SimpleNamespace

import pytest
from torch import nn

from ablab import kconf
from ablab.prune import prunable


class Images(nn.Module):
    """Two convolutions, two Linear, one norm."""

    ties: dict[str, str] = {}

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.wide, self.classes = nn.Linear(8, 8), nn.Linear(8, 10)


@pytest.mark.parametrize(
    ("first", "last", "left"),
    [
        (False, False, "stem body wide classes"),
        (True, False, "body wide classes"),
        (False, True, "stem body wide"),
        (True, True, "body wide"),
    ],
)
def test_the_first_convolution_and_the_classifier_can_stay_dense(first, last, left):
    section = SimpleNamespace(tied=False, skip_first=first, skip_last=last)
    assert [*prunable(Images(), section)] == [f"{name}.weight" for name in left.split()]


def test_a_dense_trial_counts_them_all():
    assert len(prunable(Images())) == 4


def test_a_model_without_convolutions_or_classifier_is_not_asked():
    tree = kconf.load()
    assert all("!MODEL_GPT" in tree.symbols[f"PRUNE_SKIP_{which}"].depends for which in ("FIRST", "LAST"))
