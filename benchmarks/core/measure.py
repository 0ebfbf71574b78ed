"""Exact counts (operations, saved bytes) and interleaved timing."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts dispatched aten operations; views that cost nothing are counted too, as they cost dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One training step without the optimizer."""
    for p in model.parameters():
        p.grad = None
    torch.nn.functional.cross_entropy(model(x), y).backward()


def count(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Operations of a forward and backward, and bytes kept for backward beside parameters (each storage once)."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            keep.append(t)  # alive until the end: an address must not be reused
        return t

    with CountOps() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(model, x, y)
    return {"ops": sum(counter.ops.values()), "saved": sum(saved.values()), "by_op": dict(counter.ops)}


def forward_ops(model: nn.Module, x: Tensor) -> Counter[str]:
    """Operations of an inference forward."""
    with CountOps() as counter, torch.no_grad():
        model(x)
    return counter.ops


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int, warmup: int = 2) -> dict[str, float]:
    """Times ``ours`` and ``theirs`` in turn, in alternating order; the ratio per pair, its median and a 95 % interval.

    The interval is the distribution-free one of the median (order statistics of a binomial).
    """
    for _ in range(warmup):
        ours()
        theirs()
    a, b = [], []
    for i in range(pairs):
        for fn, times in ((ours, a), (theirs, b)) if i % 2 else ((theirs, b), (ours, a)):
            start = time.perf_counter()
            fn()
            times.append(time.perf_counter() - start)
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    half = int(0.98 * len(ratios) ** 0.5)
    low, high = max(0, len(ratios) // 2 - half), min(len(ratios) - 1, len(ratios) // 2 + half)
    return {
        "ours_s": statistics.median(a),
        "theirs_s": statistics.median(b),
        "ratio": statistics.median(ratios),
        "low": ratios[low],
        "high": ratios[high],
    }
