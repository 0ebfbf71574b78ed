"""Sample order and batches that do not depend on how many processes or micro-batches share the work.

An epoch is a permutation drawn from (seed, epoch), cut into global batches of ``batch_size``; the last one may be
shorter. Where a data set has ``group(index)``, every group is cut by itself and a global batch holds one group, so that
samples of different shapes never meet. Each global batch is cut into ``accumulate * world`` consecutive slices:
micro-batch ``m`` of process ``r`` takes slice ``m * world + r``. A slice that comes out empty repeats one sample with
weight 0, so that every process runs the same number of forward passes.
"""

from __future__ import annotations

import signal
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["MicroBatch", "batches", "epoch_plan", "global_batches", "groups_of", "indexed_loader", "targets_of"]


class MicroBatch(NamedTuple):
    """Sample indices of one forward pass; ``weight`` is 0.0 for an empty slice, else 1.0."""

    indices: list[int]
    weight: float


def epoch_plan(
    size: int,
    batch_size: int,
    accumulate: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    groups: Sequence[Hashable] | None = None,
) -> list[list[MicroBatch]]:
    """The micro-batches of one process, one list per optimizer step.

    Args:
        size: samples in the data set.
        batch_size: global samples per step.
        accumulate: micro-batches per step and process.
        groups: of every sample, see :func:`groups_of`.
    """
    steps = []
    for batch in global_batches(size, batch_size, seed=seed, epoch=epoch, groups=groups):
        share = -(-len(batch) // (accumulate * world))
        slices = [batch[k * share : (k + 1) * share] for k in range(rank, accumulate * world, world)]
        steps.append([MicroBatch(s, 1.0) if s else MicroBatch(batch[:1], 0.0) for s in slices])
    return steps


def global_batches(
    size: int, batch_size: int, *, seed: int, epoch: int, groups: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Sample indices of every optimizer step; their number does not depend on the epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(size, generator=generator).tolist()
    if groups is None:
        return [order[start : start + batch_size] for start in range(0, size, batch_size)]
    parts: dict[Hashable, list[int]] = {}
    for index in order:
        parts.setdefault(groups[index], []).append(index)
    cut = [part[start : start + batch_size] for part in parts.values() for start in range(0, len(part), batch_size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def groups_of(dataset: Dataset[Any]) -> list[Hashable] | None:
    """``dataset.group(index)`` of every sample; None where it has no groups."""
    group = getattr(dataset, "group", None)
    return [group(i) for i in range(len(dataset))] if group else None  # type: ignore[arg-type]


def batches(
    dataset: Dataset[Any], plan: Sequence[Sequence[MicroBatch]], *, workers: int = 0, seed: int = 0, pin: bool = False
) -> Iterator[list[tuple[Any, Tensor, float]]]:
    """Yield per step the list of ``(inputs, targets, weight)`` that ``plan`` asks for."""
    flat = [micro for step in plan for micro in step]
    stream = iter(indexed_loader(dataset, [m.indices for m in flat], workers=workers, seed=seed, pin=pin))
    for step in plan:
        yield [(*_pair(next(stream)), micro.weight) for micro in step]


def indexed_loader(
    dataset: Dataset[Any], indices: Sequence[Sequence[int]], *, workers: int = 0, seed: int = 0, pin: bool = False
) -> DataLoader[Any]:
    """A DataLoader over given batches of indices that leaves the global random state alone."""
    return DataLoader(
        dataset,
        batch_sampler=[list(batch) for batch in indices],
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed % 2**63),  # else each iteration draws from torch's global state
        worker_init_fn=_ignore_interrupt,
        pin_memory=pin,
    )


def targets_of(dataset: Dataset[Any]) -> Tensor:
    """All targets, without decoding samples where the data set has ``target(index)`` or a sequence ``targets``.

    Returns:
        int64 ``[N]``, or float ``[N, C]`` for multi-label data.
    """
    targets: Any = getattr(dataset, "targets", None)
    size = len(dataset)  # type: ignore[arg-type]
    if callable(getattr(dataset, "target", None)):
        targets = [dataset.target(i) for i in range(size)]  # type: ignore[attr-defined]
    elif not hasattr(targets, "__len__"):
        targets = [dataset[i][1] for i in range(size)]
    if not isinstance(targets, Tensor):
        targets = torch.stack([torch.as_tensor(t) for t in targets])
    result: Tensor = targets
    return result


def _pair(sample: Any) -> tuple[Any, Any]:
    inputs, targets = sample
    return inputs, targets


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group; workers must outlive it so that the loop can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
