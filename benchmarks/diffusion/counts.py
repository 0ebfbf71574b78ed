"""Exact bytes, of real and of fake tensors: what autograd keeps, and what a step holds between forward and update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.kernels.recompute import watching


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """(loss, bytes of distinct storages that autograd keeps after ``forward``), parameters and buffers apart."""
    own = {address(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # alive until the end: an address must not be reused

    def note(t: Tensor) -> None:
        if address(t) not in own:
            found.setdefault(address(t), t)

    with watching(note):
        loss = forward()
    return loss, sum(t.untyped_storage().nbytes() for t in found.values())


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of distinct storages."""
    return sum({address(t): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Tensors of the optimizer's state."""
    return [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]


def address(t: Tensor) -> int:
    """Of the storage; fake tensors have none in memory, their storage object has."""
    storage: Any = t.untyped_storage()
    return int(storage._cdata)
