"""The functions of ``pointnet2_ops.pointnet2_utils``: features (B, C, N), int32 indices, the CUDA sampling rule.

They keep the input's dtype (the originals know float32 only), run on CPU too, and refuse nothing that the originals
accept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_suite.kernels import checks
from peft_suite.kernels.api import points as api

__all__ = [
    "GroupAll",
    "QueryAndGroup",
    "ball_query",
    "furthest_point_sample",
    "gather_operation",
    "grouping_operation",
    "three_interpolate",
    "three_nn",
]


def furthest_point_sample(xyz: Tensor, npoint: int) -> Tensor:
    """(B, N, 3) -> (B, npoint) int32, starting at index 0, points within √1e-3 of the origin left out."""
    return api.farthest_point_sampling(xyz, npoint, rule="pointnet2", index_dtype=torch.int32)


def gather_operation(features: Tensor, idx: Tensor) -> Tensor:
    """(B, C, N), (B, M) -> (B, C, M)."""
    checks.tensor("features", features, "(B, C, N)")
    return api.gather_points(features.mT, idx).mT.contiguous()


def grouping_operation(features: Tensor, idx: Tensor) -> Tensor:
    """(B, C, N), (B, M, k) -> (B, C, M, k)."""
    checks.tensor("features", features, "(B, C, N)")
    return api.group_points(features.mT, idx).permute(0, 3, 1, 2).contiguous()


def ball_query(radius: float, nsample: int, xyz: Tensor, new_xyz: Tensor) -> Tensor:
    """The first ``nsample`` of ``xyz`` (B, N, 3) in a ball around ``new_xyz`` (B, M, 3) -> (B, M, nsample) int32."""
    idx = api.ball_query(new_xyz, xyz, radius, nsample, index_dtype=torch.int32)
    assert isinstance(idx, Tensor)
    return idx


def three_nn(unknown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, 3), (B, m, 3) -> Euclidean distances (B, n, 3) and int32 indices."""
    return api.three_nn(unknown, known, index_dtype=torch.int32)


def three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """(B, C, m), (B, n, 3), (B, n, 3) -> (B, C, n); like the original, no gradient reaches ``weight``."""
    checks.tensor("features", features, "(B, C, m)")
    return api.three_interpolate(features.mT, idx, weight.detach()).mT.contiguous()


class QueryAndGroup(nn.Module):
    """Ball query and grouping: relative xyz (if ``use_xyz``) and features, (B, 3 + C, npoint, nsample)."""

    def __init__(self, radius: float, nsample: int, use_xyz: bool = True) -> None:
        super().__init__()
        self.radius, self.nsample, self.use_xyz = radius, nsample, use_xyz

    def forward(self, xyz: Tensor, new_xyz: Tensor, features: Tensor | None = None) -> Tensor:
        """xyz (B, N, 3), new_xyz (B, npoint, 3), features (B, C, N)."""
        if features is None and not self.use_xyz:
            raise checks.fail("features", "is None", "features where use_xyz is off")
        idx = ball_query(self.radius, self.nsample, xyz, new_xyz)
        relative = api.group_relative(xyz, new_xyz, idx).permute(0, 3, 1, 2)
        if features is None:
            return relative.contiguous()
        grouped = grouping_operation(features, idx)
        return torch.cat([relative, grouped], 1) if self.use_xyz else grouped


class GroupAll(nn.Module):
    """Everything as one group: absolute xyz (if ``use_xyz``) and features, (B, 3 + C, 1, N)."""

    def __init__(self, use_xyz: bool = True) -> None:
        super().__init__()
        self.use_xyz = use_xyz

    def forward(self, xyz: Tensor, new_xyz: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """xyz (B, N, 3), features (B, C, N); ``new_xyz`` is ignored."""
        grouped = xyz.mT[:, :, None]
        if features is None:
            return grouped.contiguous()
        features = features[:, :, None]
        return torch.cat([grouped, features], 1) if self.use_xyz else features
