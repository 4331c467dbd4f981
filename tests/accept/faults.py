# SPDX-License-Identifier: MIT
"""Children of the acceptance tests: real training with a planted fault."""

import math
import os
import signal
import socket
from pathlib import Path

from ablab.rundir import AttemptDir

AT = 12
"""The step before which a fault strikes; the tiny trial saves at 20 and 40."""


def by_seed(path: str) -> int:
    """Trials with seeds 2, 5 and 8 meet a NaN, an exhausted memory and an exception."""
    import torch

    def nan(loop) -> None:
        next(iter(loop.built.model.parameters())).data.fill_(math.nan)

    def oom(loop) -> None:
        raise torch.OutOfMemoryError("planted: tried to allocate 640.00 GiB")

    def error(loop) -> None:
        raise RuntimeError("planted")

    return _train(path, {2: nan, 5: oom, 8: error}.get(AttemptDir.open(Path(path)).trial.record["seed"]))


def killed(path: str) -> int:
    """The first attempt of each trial is killed between two checkpoints."""

    def kill(loop) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return _train(path, kill if path.endswith("/1") else None, 27)


def offline(path: str) -> int:
    """Training on a machine without network: any connection is an error."""
    from ablab import train

    cut_network()
    return train.main(path)


def offline_check(folder: str) -> int:
    from ablab import check

    cut_network()
    return check.main(folder)


def cut_network() -> None:
    def refuse(self, address) -> None:
        raise AssertionError(f"a connection to {address}")

    socket.socket.connect = socket.socket.connect_ex = refuse


def _train(path: str, fault, at: int = AT) -> int:
    from ablab import train

    step = train.Loop.train_step

    def faulty(loop) -> None:
        if fault and loop.step == at:
            fault(loop)
        step(loop)

    train.Loop.train_step = faulty
    return train.main(path)
