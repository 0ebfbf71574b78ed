"""From a cloud of any size to the points that a network sees.

Training: the farthest ``point_all`` points (from a random start), then a random subset of ``count`` in random order.
Evaluation: the farthest ``count`` from point 0. Farthest point sampling only ever appends, so the first ``count`` of
``point_all`` samples are the samples of ``count``: clouds that are sampled from point 0 are put into that order once
and cut afterwards.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from peft_suite.pointcloud.formats import Array

__all__ = ["Rule", "farthest", "in_order", "oversampled", "random_subset"]

Rule = Literal["standard", "pointnet2"]


def oversampled(count: int) -> int:
    """How many farthest points a random subset of ``count`` is drawn from: 1024 of 1200, 2048 of 2400, 4096 of 4800,
    8192 of 8192; other counts keep the ratio 75/64."""
    return 8192 if count == 8192 else -(-count * 75 // 64)


def farthest(points: Array, count: int, start: int = 0, rule: Rule = "standard") -> Array:
    """Indices ``[count]`` of farthest points of ``[N, 3]``, N at least ``count``."""
    import torch

    from peft_suite import kernels

    cloud = torch.from_numpy(np.array(points[None, :, :3], np.float32, order="C"))  # a copy: points may be read-only
    picks: Array = kernels.farthest_point_sampling(cloud, count, start=start, rule=rule)[0].numpy()
    return picks


def in_order(points: Array, count: int, point_all: int, rule: Rule = "standard") -> Array:
    """Indices of at most ``point_all`` points, farthest first from point 0.

    A cloud of at most ``count`` points is taken as it is (``standard``): its farthest points are all of them.
    """
    size = min(point_all, len(points))
    if len(points) <= count and rule == "standard":
        return np.arange(len(points))
    return farthest(points, size, 0, rule)


def random_subset(
    points: Array, count: int, point_all: int, rng: np.random.Generator, *, ordered: bool, rule: Rule = "standard"
) -> Array:
    """Indices ``[count]`` in random order for training.

    ``ordered``: the points already are in the order of :func:`in_order`. Clouds with fewer points than ``count`` give
    all of them, and some of them again.
    """
    size = min(point_all, len(points))
    if size < count:
        return np.concatenate([rng.permutation(size), rng.integers(0, size, count - size)])
    drawn = rng.permutation(size)[:count]
    if ordered or (size == len(points) and rule == "standard"):  # all of them are the farthest
        return drawn
    picks = farthest(points, size, int(rng.integers(len(points))), rule)
    chosen: Array = picks[drawn]
    return chosen


def repeated(size: int, count: int) -> Array:
    """Indices ``[count]`` of the first points, from the beginning again where there are fewer."""
    return np.arange(count) % size
