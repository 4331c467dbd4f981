# SPDX-License-Identifier: MIT
"""Fashion-MNIST: 70,000 grey pictures of clothes in ten kinds (Xiao et al. 2017, https://arxiv.org/abs/1708.07747)."""

from ablab.data._image import IdxFiles


class Fashionmnist(IdxFiles, symbol="DATA_FASHIONMNIST"):
    """IDX files of a folder, such as that of the Debian package dataset-fashion-mnist."""

    licence = "MIT"

    def remedy(self) -> str:
        return f"apt-get install dataset-fashion-mnist, or set CONFIG_{self.symbol}_PATH to a folder of the IDX files"
