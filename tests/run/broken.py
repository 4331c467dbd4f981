# SPDX-License-Identifier: MIT
"""A module that no server survives."""

raise SystemExit(3)
