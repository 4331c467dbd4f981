# SPDX-License-Identifier: MIT
"""CIFAR-10: 60,000 colour images of ten kinds (Krizhevsky 2009)."""

from ablab.data._cifar import Cifar


class Cifar10(Cifar, symbol="DATA_CIFAR10"):
    """The binary version, of a folder or fetched."""

    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    md5 = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
    folder_name, labels = "cifar-10-batches-bin", 1
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
