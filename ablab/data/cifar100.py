# SPDX-License-Identifier: MIT
"""CIFAR-100: 60,000 colour images of a hundred kinds (Krizhevsky 2009)."""

from ablab.data._cifar import Cifar


class Cifar100(Cifar, symbol="DATA_CIFAR100"):
    """The binary version, of a folder or fetched; fine labels."""

    classes = 100
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    md5 = {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}
    folder_name, labels = "cifar-100-binary", 2
    names = {"train": ["train.bin"], "test": ["test.bin"]}
