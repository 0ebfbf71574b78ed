"""The functions of ``pytorch3d.ops`` for neighbours and sampling: squared distances, int64, zeros in empty slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_suite.kernels.api import points as api

__all__ = ["ball_query", "knn_gather", "knn_points", "sample_farthest_points"]


class _Neighbours(NamedTuple):
    dists: Tensor
    idx: Tensor
    knn: Tensor | None


def knn_points(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
) -> _Neighbours:
    """The K points of p2 (B, N, D) nearest to each of p1 (B, Q, D); ``version`` is ignored. Empty slots are (0, 0)."""
    found = api.knn(p1, p2, K, lengths_q=lengths1, lengths_p=lengths2, norm=norm, sorted=return_sorted, pad="pytorch3d")
    assert found.dists is not None
    return _Neighbours(found.dists, found.idx, knn_gather(p2, found.idx, lengths2) if return_nn else None)


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, N, C), (B, Q, K) -> (B, Q, K, C), zeros in slots beyond ``lengths``."""
    return api.knn_gather(x, idx, lengths)


def ball_query(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    skip_points_outside_cube: bool = False,
) -> _Neighbours:
    """The first K points of p2 inside a ball around each of p1; empty slots are (0, −1)."""
    idx, dists = api.ball_query(
        p1, p2, radius, K, lengths_q=lengths1, lengths_p=lengths2, pad="pytorch3d", return_dists=True
    )
    return _Neighbours(dists, idx, api.group_points(p2, idx) if return_nn else None)


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | list[int] | Tensor = 50,
    random_start_point: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, N, D) -> sampled points (B, max K, D) and int64 indices; beyond min(K, length): zeros and −1."""
    many = torch.as_tensor(K, device=points.device)
    most = int(many.max())
    idx = api.farthest_point_sampling(
        points, most, lengths=lengths, start="random" if random_start_point else 0, pad="pytorch3d"
    )
    if many.dim():
        idx = idx.masked_fill(torch.arange(most, device=idx.device) >= many[:, None], -1)
    return api.gather_points(points, idx), idx
