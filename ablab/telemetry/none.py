# SPDX-License-Identifier: MIT
"""Nothing is sampled: no process is started for it."""

from collections.abc import Sequence

from ablab.telemetry import Reading, Telemetry


class None_(Telemetry, symbol="TELEM_NONE"):  # noqa: N801
    """Reads nothing."""

    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        return None
