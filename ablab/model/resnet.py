# SPDX-License-Identifier: MIT
"""ResNet-18 and ResNet-50 (He et al. 2016, https://arxiv.org/abs/1512.03385), convolutions without bias.

A bottleneck has its stride at the 3x3 convolution.  Init: convolutions N(0, 2 / fan_in), the classifier
N(0, 1 / (3 fan_in)), its bias 0; BatchNorm 1, 0, but the last of a block 0.1, 0.
With 0 (Goyal et al. 2017) a block starts as its shortcut
and its convolutions get no gradient in the first step; with 1 the loss in eval mode, before the statistics have moved,
is far from ln(K) at depth 50.
"""

from dataclasses import dataclass
from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from ablab.model._image import Conv, ImageModel, ImageNetwork, classifier

Depth = Enum("Depth", {"18": (2, 2, 2, 2), "50": (3, 4, 6, 3)})
"""Blocks of the four stages."""

LAST = 0.1  # weight of the last BatchNorm of a block


class Stem(Enum):
    """What comes before the first stage."""

    CIFAR = "cifar"
    IMAGENET = "imagenet"


class Residual(nn.Module):
    """Two 3x3 convolutions, or a bottleneck to four times the width, beside a shortcut."""

    def __init__(self, n_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        n_out = 4 * width if bottleneck else width
        if bottleneck:
            convs = Conv(n_in, width, 1), Conv(width, width, 3, stride), Conv(width, n_out, 1)
        else:
            convs = Conv(n_in, width, 3, stride), Conv(width, width, 3)
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in convs)
        nn.init.constant_(self.norms[-1].weight, LAST)
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Sequential(*([] if same else [Conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out)]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y_BCHW = norm(conv(F.relu(y_BCHW, inplace=True) if i else y_BCHW))
        return F.relu(y_BCHW + self.shortcut(x_BCHW), inplace=True)


class ResnetNetwork(ImageNetwork):
    """Stem, four stages, mean over pixels, classifier.  Grey images are three equal channels."""

    channels = 3

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, stem: Stem, width: int, classes: int) -> None:
        super().__init__()
        self.pool = stem is Stem.IMAGENET
        self.stem = Conv(3, width, 7, 2) if self.pool else Conv(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        stages, n_in = [], width
        for stage, count in enumerate(blocks):
            for i in range(count):
                wide = width << stage
                stages.append(Residual(n_in, wide, 2 if stage and not i else 1, bottleneck))
                n_in = 4 * wide if bottleneck else wide
        self.blocks = nn.Sequential(*stages)
        self.head = classifier(n_in, classes)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.expand(-1, 3, -1, -1)
        x_BCHW = F.relu(self.norm(self.stem(x_BCHW)), inplace=True)
        if self.pool:
            x_BCHW = F.max_pool2d(x_BCHW, 3, 2, 1)
        return self.head(self.blocks(x_BCHW).mean((2, 3)))


class Resnet(ImageModel, symbol="MODEL_RESNET"):
    """11,173,962 parameters at depth 18 with the CIFAR stem and 10 classes."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MODEL_RESNET_*."""

        depth: Depth
        stem: Stem
        width: int
        """Channels of the first stage; each later one doubles them."""

    @property
    def depth(self) -> int:
        return sum(self.config.depth.value)

    def network(self, classes: int) -> ResnetNetwork:
        c = self.config
        return ResnetNetwork(c.depth.value, c.depth is Depth["50"], c.stem, c.width, classes)
