# SPDX-License-Identifier: MIT
"""MNIST: 70,000 handwritten digits (LeCun et al. 1998)."""

from ablab.data._image import IdxFiles


class Mnist(IdxFiles, symbol="DATA_MNIST"):
    """IDX files of a folder, or fetched."""

    licence = "CC BY-SA 3.0"
    mean, std = (0.1307,), (0.3081,)
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    md5 = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }
