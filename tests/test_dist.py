# SPDX-License-Identifier: MIT
"""A group of processes: means over ranks, one answer to what they agree on, and no hang when one is gone."""

import json
import os
import sys

import pytest
import torch

from ablab import dist


def ranks(folder, size, work):
    """What `work(world)` returns in each of `size` forked processes; None for one that failed."""
    sys.stdout.flush()
    pids = []
    for rank in range(size):
        if not (pid := os.fork()):
            try:
                with dist.joined(folder / "store", rank, size, wait_s=20) as world:
                    (folder / f"{rank}.json").write_text(json.dumps(work(world)))
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    places = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(p.read_text()) if p.exists() else None for p in places]


@pytest.mark.parametrize("size", [2, 4])
def test_the_mean_is_that_of_all_ranks_in_place(tmp_path, size):
    def work(world):
        grads, loss = torch.full((5,), float(world.rank)), torch.tensor(2.0 * world.rank)
        world.mean_(grads, loss)
        return [grads.tolist(), loss.item()]

    mean = (size - 1) / 2
    assert ranks(tmp_path, size, work) == [[[mean] * 5, 2 * mean]] * size


@pytest.mark.parametrize(("step", "same"), [(0, True), (1, False)])
def test_all_ranks_hear_whether_they_agree(tmp_path, step, same):
    def work(world):
        weights = torch.ones(1000)
        weights[-1] += step * world.rank * 1e-7  # one bit, on one rank
        return world.agree([weights, torch.tensor(True)])

    assert ranks(tmp_path, 2, work) == [same, same]


def test_a_rank_whose_peer_is_gone_does_not_wait(tmp_path):
    def work(world):
        if world.rank:
            os._exit(1)
        try:
            world.mean_(torch.ones(3))
        except RuntimeError:
            return "gone"

    assert ranks(tmp_path, 2, work) == ["gone", None]


def test_a_process_alone_joins_nothing():
    weights = torch.ones(3)
    with dist.joined(None, 0, 1) as world:
        world.mean_(weights)
        assert world.agree([weights]) and torch.equal(weights, torch.ones(3))
    assert not torch.distributed.is_initialized()
