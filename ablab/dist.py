# SPDX-License-Identifier: MIT
"""Processes that train one trial together: a group that meets over a file, and what its ranks find in common."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of one trial; the default is a process alone, for which everything here is a no-op."""

    rank: int = 0
    size: int = 1

    def mean_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its mean over the ranks.

        Called once per step with the flat gradient buffer and the loss, after accumulation and before
        `pruner.observe()`: from there on every rank holds the gradient of the whole batch.  NOTE the mean is that of
        the whole batch only if all ranks saw as many targets.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor.div_(self.size)

    def agree(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all ranks hold the same bits, by a 64-bit hash; every rank gets the same answer."""
        if self.size == 1:
            return True
        digest = blake2b(digest_size=8)
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        mine = torch.tensor(int.from_bytes(digest.digest(), "big", signed=True))
        found = [torch.zeros_like(mine) for _ in range(self.size)]
        distributed.all_gather(found, mine)
        return all(torch.equal(other, mine) for other in found)


@contextmanager
def joined(store: Path, rank: int, size: int, wait_s: float = 60.0) -> Iterator[World]:
    """The world of `size` processes of this host that name the same file, which must be new.

    A rank that waits longer than `wait_s` for another, or whose peer is gone, gets a RuntimeError.
    """
    if size == 1:
        yield World()
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it asks the name service for this host
    meeting = distributed.FileStore(str(store), size)
    distributed.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=wait_s))
    try:
        yield World(rank, size)
    finally:
        distributed.destroy_process_group()
