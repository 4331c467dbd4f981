# SPDX-License-Identifier: MIT
"""No pruning: a member like any other, so the loop holds no branch and a dense trial holds no mask."""

from ablab.prune import Prune


class None_(Prune, symbol="PRUNE_NONE"):  # noqa: N801  NOTE `None` cannot name a class
    """Strictly dense."""

    def update(self, step: int) -> None:
        """Nothing to do."""
