# SPDX-License-Identifier: MIT
"""One thread for every test process, and no surprises from the caller's environment."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in list(os.environ):
    if name.startswith(("CONFIG_", "ABLAB_")) and name != "ABLAB_GOLDEN":
        del os.environ[name]
