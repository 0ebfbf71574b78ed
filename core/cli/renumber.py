"""A data set whose class indices are counted in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

__all__ = ["Renumbered"]


class Renumbered(Dataset[Any]):
    """``dataset`` with target ``i`` replaced by ``order[i]``."""

    def __init__(self, dataset: Dataset[Any], order: Sequence[int]) -> None:
        self._dataset, self._order = dataset, order

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        inputs, target = self._dataset[index]
        return inputs, self._order[int(target)]
