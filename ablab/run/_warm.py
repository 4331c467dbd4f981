# SPDX-License-Identifier: MIT
"""Imported by the server of the children alone: what every child would do again before it begins."""

from ablab import kconf

kconf.load()
