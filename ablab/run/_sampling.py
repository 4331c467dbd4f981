# SPDX-License-Identifier: MIT
"""Keeps the sampler of a campaign running, as a process of its own without torch."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from ablab import machine
from ablab.kconf import ROOT
from ablab.rundir import Campaign

READER = re.compile("^CONFIG_TELEM_(?!NONE)[A-Z]+=y$", re.MULTILINE)
AGAIN_S = 5.0  # between two starts
END_S = 2.0  # it ends within a sample; then it is killed, for it owns nothing


class Sampling:
    """The sampler of this runner; nothing if the campaign selects no reader."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        self._wanted = bool(READER.search(campaign.content["base"]["config"]))
        self._process: subprocess.Popen | None = None
        self._started = -AGAIN_S

    def keep(self) -> None:
        """Start it, or again if it was killed; called now and then."""
        ended = self._process is None or self._process.poll() is not None
        if not self._wanted or not ended or time.monotonic() - self._started < AGAIN_S:
            return
        self._started = time.monotonic()
        pid = os.getpid()
        command = [sys.executable, "-m", "ablab.sampler", str(self._campaign.path), f"{pid}:{machine.proc_start(pid)}"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env: Mapping[str, Any] = {**os.environ, "PYTHONPATH": path}
        with open(self._campaign.sampler_log, "ab") as log:  # its own session: ^C and our end are not its
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(command, env=env, start_new_session=True, **streams)

    def stop(self) -> None:
        """End it: the trials of this runner are over.  That of another runner goes on."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
