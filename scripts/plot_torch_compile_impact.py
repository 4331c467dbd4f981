#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What torch.compile changes: `ablab plots SET=torch_compile`, of a campaign of this machine."""

import sys

from ablab.__main__ import main

sys.exit(main(["plots", "SET=torch_compile", *sys.argv[1:]]))
