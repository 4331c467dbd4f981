# SPDX-License-Identifier: MIT
"""What children of the tests of local.py call."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def describe(folder: str) -> int:
    print("session", os.getsid(0))
    print("cores", sorted(os.sched_getaffinity(0)))
    print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"))
    print("on stderr", file=sys.stderr)
    return 0


def seven(folder: str) -> int:
    return 7


def die(folder: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(folder: str) -> None:
    raise RuntimeError("planted")


def sleep(folder: str) -> int:
    print("ready")
    time.sleep(60)
    return 0


def threads(folder: str) -> int:
    """Threads of this process and of the server, and whether torch came with it."""
    print(len(os.listdir("/proc/self/task")), len(os.listdir(f"/proc/{os.getppid()}/task")), "torch" in sys.modules)
    return 0


def passes(folder: str) -> int:
    """A dry run that finds nothing."""
    told = json.loads(Path(folder, "plan.json").read_text())
    print(f"{told['mode']} of {len(told['trials'])} trials")
    data = {"name": "none", "sha256": "0" * 64, "tokens": 1}
    verdict = {"data": data, "check": {"verdict": told["mode"], "sha256": None}, "trials": []}
    Path(folder, "verdict.json").write_text(json.dumps(verdict))
    return 0


def takes(folder: str, cost: float) -> int:
    """A dry run whose steps cost so much."""
    told = json.loads(Path(folder, "plan.json").read_text())
    trials = [{"group": told["trials"][0]["group"], "cost": cost}]
    Path(folder, "verdict.json").write_text(json.dumps({"trials": trials}))
    return 0


def takes_3(folder: str) -> int:
    return takes(folder, 3.0)


def takes_5(folder: str) -> int:
    return takes(folder, 5.0)


def takes_7(folder: str) -> int:
    return takes(folder, 7.0)


def refuses(folder: str) -> int:
    """A dry run that finds a fault."""
    print("R1 build: planted")
    return 1


def measures(folder: str) -> int:
    """What the child of `run.measure` writes."""
    open_ = json.loads((Path(folder) / "plan.json").read_text())["open"]
    assert open_ and all(names == ["SYS_COMPILE_AUTO", "TRAIN_BATCH_MICRO"] for names in open_.values())
    chosen = {"SYS_COMPILE_AUTO": ["SYS_COMPILE_OFF", "y", "slower"]}
    chosen["TRAIN_BATCH_MICRO"] = ["TRAIN_BATCH_MICRO", "4", "largest"]
    (Path(folder) / "verdict.json").write_text(json.dumps({"chosen": chosen, "measured": {"free": 1}}))
    return 0


def fits_nowhere(folder: str) -> int:
    """As where nothing fits."""
    return 4
