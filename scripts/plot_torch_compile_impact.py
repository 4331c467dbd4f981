#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What torch.compile changes: `ablab plots SET=torch_compile`, of W&B unless --source says otherwise."""

import sys

from ablab.__main__ import main

default = [] if any(w.lower().lstrip("-").startswith("source") for w in sys.argv) else ["--source", "wandb"]
sys.exit(main(["plots", "SET=torch_compile", *default, *sys.argv[1:]]))
