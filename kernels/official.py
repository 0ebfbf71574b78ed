"""The user's own build of pointnet2_ops as a back end, where one is importable; runs only when asked for by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ball_query", "farthest_point_sampling"]


def _utils() -> Any:
    from pointnet2_ops import pointnet2_utils

    return pointnet2_utils


def farthest_point_sampling_cannot(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype
) -> str | None:
    """It knows the pointnet2 rule, start 0, float32 and whole clouds."""
    if rule != "pointnet2":
        return "it knows rule='pointnet2' only"
    if lengths is not None or points.dtype != torch.float32 or bool(start.any()):
        return "it knows float32 clouds of one length that start at index 0"
    return None


def farthest_point_sampling(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype
) -> Tensor:
    """``furthest_point_sample`` of the official package."""
    picks: Tensor = _utils().furthest_point_sample(points.contiguous(), m)
    return picks.to(index_dtype)


def ball_query_cannot(query: Tensor, points: Tensor, radius: float, k: int, *rest: Any) -> str | None:
    """It knows float32, three coordinates, whole clouds and padding with the first hit."""
    lengths_q, lengths_p, pad, _ = rest
    if lengths_q is not None or lengths_p is not None or pad != "first":
        return "it knows clouds of one length and pad='first' only"
    if query.dtype != torch.float32 or query.shape[-1] != 3:
        return "it knows float32 points with three coordinates only"
    return None


def ball_query(query: Tensor, points: Tensor, radius: float, k: int, *rest: Any) -> Tensor:
    """``ball_query`` of the official package."""
    found: Tensor = _utils().ball_query(radius, k, points.contiguous(), query.contiguous())
    return found.to(rest[3])
