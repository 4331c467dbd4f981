# SPDX-License-Identifier: MIT
"""Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), with decay as an L2 term in the gradient.

g += lam w;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from typing import Any

import torch

from ablab.optim import Optim
from ablab.optim.adamw import FlatAdamW, Settings


class FlatAdam(FlatAdamW):
    """torch's Adam on flat buffers."""

    fused = staticmethod(torch._fused_adam_)
    decoupled = False


class Adam(Optim, symbol="OPT_ADAM"):
    """NOTE the moments see the decay, so its strength depends on the size of the gradients."""

    state_bytes = 8
    Config = Settings

    def build(self, groups: list[dict[str, Any]]) -> FlatAdam:
        c = self.config
        return FlatAdam(groups, c.beta1, c.beta2, c.eps, self.section.impl)
