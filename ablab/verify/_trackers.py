# SPDX-License-Identifier: MIT
"""What trackers hold of a campaign, read back by `ablab.track` in a process of its own: none is loaded here."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from typing import Any

from ablab.kconf import ROOT
from ablab.report.load import Loaded, Trial
from ablab.run import mirror

PATIENCE_S = 1800


def used(c: Loaded, trials: Collection[Trial]) -> list[str]:
    """Trackers that the campaign was mirrored to, and those that a trial says it has but nothing was sent to."""
    sent = [files.name.replace("-", ":") for files in c.dir.mirrors()]
    on = {n for t in trials for n, v in t.values.items() if n.startswith("TRACK_") and v == "y" and n.count("_") == 1}
    silent = on - {"TRACK_CONSOLE", *map(mirror.symbol_of, sent)}
    return [*sent, *sorted(n.removeprefix("TRACK_").lower() for n in silent)]


def read(c: Loaded, name: str, trials: Collection[Trial]) -> tuple[dict[str, Any], list[str]]:
    """({project, runs}, what does not agree); without a project nothing could be read."""
    command = [sys.executable, "-m", mirror.MODULE, "read", str(c.dir.path.resolve()), name]
    options = {"cwd": ROOT, "env": mirror.environment(os.environ), "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=PATIENCE_S, stdin=subprocess.DEVNULL, **options)
    except subprocess.TimeoutExpired:
        return {}, [f"{name}: not read back after {PATIENCE_S} s"]
    said = (done.stdout if done.returncode in (0, 2) else done.stderr).strip().splitlines() or ["no text"]
    if done.returncode:
        return {}, [f"{name}: {said[-1]}"]
    found, ids = json.loads(said[-1]), {t.id for t in trials}
    wrong = [f"{name}: {i}: {text}" for i, texts in found["wrong"].items() if i in ids for text in texts]
    return {"project": found["project"], "runs": {i: run for i, run in found["runs"].items() if i in ids}}, wrong
