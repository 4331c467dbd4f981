# SPDX-License-Identifier: MIT
"""Pruners: which weights are zero, and when."""

from abc import abstractmethod

from ablab.plugin import Plugin


class Prune(Plugin, family="PRUNE"):
    """Base of the pruners; the order of the calls in one step is that of docs/design.md."""

    def observe(self) -> None:
        """Called after accumulation with the dense gradients in place."""

    def mask_gradients(self) -> None:
        """Called after `observe`, before clipping."""

    @abstractmethod
    def update(self, step: int) -> None:
        """Called once after optimizer step number `step` (first 1)."""
