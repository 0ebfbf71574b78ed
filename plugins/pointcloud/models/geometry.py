"""The geometry of a batch of clouds: made once per forward, handed to every block, stored nowhere.

    centers   = farthest points (the first is point 0)        [B, G, 3]
    neighbors = the S nearest points of every centre          [B, G, S]
    groups    = points[neighbors] - centers                   [B, G, S, 3]

Farthest points follow the rule of pointnet2_ops, on which the published checkpoints were trained: see
:func:`peft_suite.kernels.farthest_point_sampling`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from peft_suite import kernels
from peft_suite.edits import Beside
from peft_suite.errors import DataError

__all__ = ["Geometry", "Grouping", "grouping_forward", "nearest_walk"]


class Geometry(NamedTuple):
    """Coordinates and neighbours. A plain tuple of tensors, so that checkpointing and compilers see through it.

    Attributes:
        points: ``[B, N, 3]``.
        picks: ``[B, G]`` int64, the centres' places among the points.
        centers: ``[B, G, 3]``, in the order of the patch tokens.
        neighbors: ``[B, G, S]`` int64, the nearest points of every centre, nearest first.
        groups: ``[B, G, S, 3 + C]``, these relative to their centre, further channels as they are.
        extra: what methods add once per forward, by name: a spectral basis, neighbours of centres.
    """

    points: Tensor
    picks: Tensor
    centers: Tensor
    neighbors: Tensor
    groups: Tensor
    extra: dict[str, Any]

    def adding(self, **more: Any) -> Geometry:
        """The same with further entries of ``extra``."""
        return self._replace(extra={**self.extra, **more})


class Grouping(nn.Module):
    """Points ``[B, N, 3 + C]`` to their :class:`Geometry`; no parameters.

    Args:
        groups: G.
        size: S.
        order: "sampled", as farthest point sampling finds them; "walk", from centre 0 always to the nearest one left.
        rule: of farthest point sampling.
    """

    def __init__(
        self,
        groups: int,
        size: int,
        order: Literal["sampled", "walk"] = "sampled",
        rule: Literal["standard", "pointnet2"] = "pointnet2",
    ) -> None:
        super().__init__()
        self.groups, self.size, self.order, self.rule = groups, size, order, rule

    def forward(self, points: Tensor) -> Geometry:
        """``points: [B, N, 3 + C]``. Coordinates of half precision are compared in float32.

        Raises:
            DataError: no batch of clouds, or clouds with fewer points than one group needs.
        """
        if points.ndim != 3 or points.shape[2] < 3:
            raise DataError(f"Point clouds are tensors [batch, points, 3 or more], got {list(points.shape)}.")
        if points.shape[1] < self.size:
            raise DataError(
                f"A cloud of {points.shape[1]} points cannot fill a group of {self.size}. Sample more points, or build "
                "the backbone with a smaller group_size."
            )
        half = points.dtype in (torch.float16, torch.bfloat16)
        xyz = (points.float() if half else points)[..., :3].contiguous()
        picks = self.sample(xyz)
        centers = kernels.gather_points(xyz, picks)
        with torch.no_grad():
            neighbors = kernels.knn(centers, xyz, self.size, return_dists=False).idx
        near = kernels.group_relative(xyz, centers, neighbors)
        if points.shape[2] > 3:
            rest = kernels.group_points(points[..., 3:].to(xyz.dtype).contiguous(), neighbors)
            near = torch.cat((near, rest), dim=3)
        return Geometry(xyz, picks, centers, neighbors, near, {})

    @torch.no_grad()
    def sample(self, xyz: Tensor) -> Tensor:
        """Places of the centres among the points, in the order of the patches: ``[B, N, 3] -> [B, G]``."""
        picks = kernels.farthest_point_sampling(xyz, self.groups, rule=self.rule)
        if self.order == "walk":
            picks = picks.gather(1, nearest_walk(kernels.gather_points(xyz, picks)))
        return picks

    def extra_repr(self) -> str:
        return f"groups={self.groups}, size={self.size}, order={self.order}"


def nearest_walk(centers: Tensor) -> Tensor:
    """PointGPT's order: from centre 0 always on to the nearest centre not visited yet, ``[B, G, 3] -> [B, G]``."""
    gaps = (centers[:, :, None] - centers[:, None]).square().sum(-1)  # [B, G, G]
    here = torch.zeros(centers.shape[0], 1, dtype=torch.int64, device=centers.device)
    seen = torch.zeros_like(gaps[:, 0], dtype=torch.bool)
    order = []
    for _ in range(centers.shape[1]):
        order.append(here)
        seen = seen.scatter(1, here, True)
        row = gaps.gather(1, here[:, :, None].expand(-1, 1, gaps.shape[2])).squeeze(1)
        here = row.masked_fill(seen, torch.inf).argmin(1, keepdim=True)
    return torch.cat(order, dim=1)


def grouping_forward(module: Any, beside: Beside, points: Tensor) -> Geometry:
    """The described forward of :class:`Grouping`: the place "geometry" takes the geometry and gives it back."""
    geometry: Geometry = beside.extend("geometry", Grouping.forward(module, points))
    return geometry
