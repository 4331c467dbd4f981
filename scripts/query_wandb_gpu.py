#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""GPU use of a run: `ablab gpu`, of W&B unless --source says otherwise."""

import sys

from ablab.__main__ import main

default = [] if any(w.lower().lstrip("-").startswith("source") for w in sys.argv) else ["--source", "wandb"]
sys.exit(main(["gpu", *default, *sys.argv[1:]]))
