# SPDX-License-Identifier: MIT
"""ablab: a kernel-style ablation lab for training research."""
