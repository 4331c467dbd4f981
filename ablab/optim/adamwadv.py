# SPDX-License-Identifier: MIT
"""AdamW with AMSGrad (Reddi et al. 2018, https://arxiv.org/abs/1904.09237).

AdamW, but x = max(x, v) in place of v in the denominator, with the same bias correction.
"""

from typing import Any

from ablab.optim import Optim
from ablab.optim.adamw import FlatAdamW, Settings


class Adamwadv(Optim, symbol="OPT_ADAMWADV"):
    """The denominator never falls."""

    state_bytes = 12
    Config = Settings

    def build(self, groups: list[dict[str, Any]]) -> FlatAdamW:
        c = self.config
        return FlatAdamW(groups, c.beta1, c.beta2, c.eps, self.section.impl, amsgrad=True)
