# SPDX-License-Identifier: MIT
"""One thread for every test process, and no surprises from the caller's environment."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in list(os.environ):
    if name.startswith(("CONFIG_", "ABLAB_")) and name != "ABLAB_GOLDEN":
        del os.environ[name]


@pytest.fixture(autouse=True)
def torch_kernels():
    """Native kernels that an earlier test of this process put in force are not: faults are planted in torch's."""
    if native := sys.modules.get("ablab.tensor.native"):
        native.settle(False)
