"""Data sets whose random changes follow the seed, the epoch and the index, whatever process asks for a sample."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["EpochDataset"]


class EpochDataset(Dataset[Any]):
    """Base of data sets that change their training samples at random.

    The number of the epoch is in shared memory, so that the persistent workers of a loader see it change. A resumed
    run sees the same samples, whatever the number of workers.

    Args:
        seed: first part of every sample's random seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.own_epoch()

    def own_epoch(self) -> None:
        """Count epochs apart from the data set that this one is a copy of."""
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers; call it at the start of every epoch."""
        self._epoch.fill_(epoch)

    def sample_seed(self, index: int) -> int:
        """48 bits from (seed, epoch, index)."""
        text = f"{self.seed}/{self._epoch.item()}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())
