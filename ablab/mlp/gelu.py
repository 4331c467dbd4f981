# SPDX-License-Identifier: MIT
"""The MLP of GPT-2: Linear, GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), Linear.

B batch, T tokens, D model, F hidden.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ablab.mlp import Mlp
from ablab.tensor.stage import Act, Ctx, Dims, Down, Linear, Part, Up


class Widen(Linear, Up):
    """D to F."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims.n_embd, dims.mlp_hidden, dims.bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        return F.linear(x_BTD, self.weight, self.bias)


class Activate(Act):
    """GELU of each unit."""

    def __init__(self, tanh: bool) -> None:
        super().__init__()
        self.form = "tanh" if tanh else "none"

    def forward(self, pre_BTF: Tensor) -> Tensor:
        return F.gelu(pre_BTF, approximate=self.form)


class Narrow(Linear, Down):
    """F to D."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims.mlp_hidden, dims.n_embd, dims.bias, dims.residual_std)

    def forward(self, h_BTF: Tensor) -> Tensor:
        return F.linear(h_BTF, self.weight, self.bias)


class Gelu(Mlp, symbol="MLP_GELU"):
    """Dense hidden layer."""

    scales = {"width": "width"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MLP_GELU_*."""

        width: int
        """Hidden units F."""
        tanh: bool
        """The tanh form of GELU, in which the published GPT-2 weights were trained."""

    def hidden(self) -> int:
        return self.config.width

    def size(self, dims: Dims) -> int:
        return 2 * dims.n_embd * self.config.width + dims.bias * (dims.n_embd + self.config.width)

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return Widen(dims), Activate(self.config.tanh), Narrow(dims)
