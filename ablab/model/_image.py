# SPDX-License-Identifier: MIT
"""What image classifiers share: loss and top-1 count, a convolution that is drawn by name, counted FLOPs.

B batch, C channels, H W pixels, K classes.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.model import Model, Network, Output
from ablab.tensor.stage import BlockMember, Drawn, Linear

CLASSES = 10  # where no data set says how many


def he(fan_in: int) -> float:
    """Standard deviation before a ReLU (He et al. 2015, https://arxiv.org/abs/1502.01852)."""
    return (2 / fan_in) ** 0.5


class Conv(nn.Conv2d, Drawn):
    """nn.Conv2d that keeps the size at stride 1 unless told, drawn by name; its bias starts at 0."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, padding: int = -1, bias: bool = False):
        super().__init__(n_in, n_out, kernel, stride, kernel // 2 if padding < 0 else padding, bias=bias)
        self.std = {"weight": he(n_in * kernel**2)}

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ImageNetwork(Network):
    """Pixels to loss or logits; a subclass computes `logits`."""

    channels: int

    @abstractmethod
    def logits(self, x_BCHW: Tensor) -> Tensor:
        """[B, K]."""

    def forward(self, x_BCHW: Tensor, y_B: Tensor | None = None, keep_logits: bool = False) -> Output:
        logits_BK = self.logits(x_BCHW)
        if y_B is None:
            return Output(None, 0, logits_BK)
        wide_BK = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
        hits = (logits_BK.argmax(1) == y_B).sum()
        return Output(F.cross_entropy(wide_BK, y_B), y_B.numel(), logits_BK if keep_logits else None, hits)

    @torch.no_grad()
    def flops_per_token(self, length: int) -> int:
        """Six per multiply-add of a convolution or matrix product, counted on an image of `length` pixels a side."""
        found: list[int] = []

        def count(module: nn.Module, _: tuple, out: Tensor) -> None:
            found.append(module.weight.numel() * out.shape[2:].numel())

        hooks = [m.register_forward_hook(count) for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        tensors = {n: torch.empty_like(t, device="meta") for n, t in [*self.named_parameters(), *self.named_buffers()]}
        training = self.training
        self.eval()
        torch.func.functional_call(self, tensors, (torch.empty(1, self.channels, length, length, device="meta"),))
        self.train(training)
        for hook in hooks:
            hook.remove()
        return 6 * sum(found)

    def example(self) -> Tensor:
        n = 2 * self.channels * 32 * 32
        return ((torch.arange(n) * 7919 % 255) / 127 - 1).view(2, self.channels, 32, 32)  # a prime scatters the values


class ImageModel(Model):
    """Base of the members: no blocks, so nothing of other families is built in."""

    length = 1

    @abstractmethod
    def network(self, classes: int) -> ImageNetwork: ...

    def build(
        self,
        attention: Sequence[BlockMember],
        mlp: Sequence[BlockMember],
        seed: int,
        n_vocab: int | None = None,
    ) -> ImageNetwork:
        network = self.network(n_vocab or CLASSES)
        network._draw(seed)
        return network


def classifier(n_in: int, classes: int) -> Linear:
    """The last layer, N(0, 1 / (3 fan_in)): the variance that torch gives it, the loss starts near ln(K).

    With less (0.01, Goyal et al. 2017) its weights are the smallest of the network, and a global threshold at 90 %
    takes all of them before they have grown: what follows is a constant, and no gradient comes back.
    """
    return Linear(n_in, classes, True, 1 / math.sqrt(3 * n_in))
