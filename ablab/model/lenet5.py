# SPDX-License-Identifier: MIT
"""LeNet-5 (LeCun et al. 1998) with batch normalisation, ReLU and max-pooling, for 1 x 32 x 32 images.

Init: weights N(0, 2 / fan_in), the classifier N(0, 1 / (3 fan_in)), biases 0; BatchNorm 1, 0.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ablab.model._image import Conv, ImageModel, ImageNetwork, classifier, he
from ablab.tensor.stage import Linear


class Lenet5Network(ImageNetwork):
    """Two convolutions, three Linear layers."""

    channels = 1

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(1, 6, 5, padding=0, bias=True), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = Conv(6, 16, 5, padding=0, bias=True), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = Linear(400, 120, True, he(400)), Linear(120, 84, True, he(120))
        self.head = classifier(84, classes)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x_BCHW = F.max_pool2d(F.relu(norm(conv(x_BCHW)), inplace=True), 2)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x_BCHW.flatten(1))))))


class Lenet5(ImageModel, symbol="MODEL_LENET5"):
    """61,750 parameters with 10 classes."""

    depth = 2

    def network(self, classes: int) -> Lenet5Network:
        return Lenet5Network(classes)
