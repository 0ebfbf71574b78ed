"""The 3D tokenizer of Any2Point (Tang et al., ECCV 2024), after Point-PN: ``[B, N, 3 + C] -> [B, G, D]``.

    x = relu(BN(W points))                                            [B, N, D / 8]
    three stages, each on farther points and twice as wide:           4G, 2G, G points;  D / 4, D / 2, D channels
        f = [x of the k nearest ; x of the centre]                    [B, n, k, 2 C]
        f = f + waves((neighbour - centre) / largest offset)          sin, cos(beta offset / alpha^(i / F))
        f = relu(f + BN(W2 relu(BN(W1 f))))                           twice, once, once
        x = max over the neighbours                                   [B, n, 2 C]

The inner width of these bottlenecks is half of the channels, in the last stage ``last_width``. With 1024 points,
G = 128 and D = 768 it is the published one with 276,672 parameters.

Farthest point sampling takes one point after the other, each the farthest from those before. So what a stage would
sample from the points of the stage before it are their first half, and one sampling of 4G points serves all three.
Offsets are divided by the largest one of a neighbourhood and axis. In the official code a flat neighbourhood divides 0
by 0 there; here it stays 0.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.edits import Beside
from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.models.geometry import Geometry, Grouping

__all__ = ["PointTokenizer", "Pyramid", "pyramid_forward", "waves"]

STAGES = "any2point_stages"  # entry of the geometry's extra: the neighbours of every stage
_BLOCKS = (2, 1, 1)  # bottlenecks of a stage


class Pyramid(Grouping):
    """Points ``[B, N, 3 + C]`` to the geometry of the last stage's G centres, with the neighbours of all stages.

    ``geometry.extra[STAGES]`` is a tuple of int64 tensors: the first stage's centres ``[B, 4 G]`` among the cloud's
    points, and for every stage the neighbours ``[B, n, k]`` of its centres among the points of the stage before it (of
    the first: the cloud's). The centres of the later stages are the first ones of the stage before.

    Args:
        groups: G.
        size: k.
        rule: of farthest point sampling.

    Attributes:
        points: of a cloud, as published: 8 G.
    """

    def __init__(self, groups: int, size: int, rule: Literal["standard", "pointnet2"] = "standard") -> None:
        if groups < 1 or size < 1 or size > 2 * groups:
            raise ConfigError(
                f"groups = {groups} and group_size = {size}: both must be at least 1, and the last stage finds a "
                f"group's points among {2 * groups}, twice the groups."
            )
        super().__init__(groups, size, "sampled", rule)
        self.points = 8 * groups

    def forward(self, points: Tensor) -> Geometry:
        """``points: [B, N, 3 + C]``. Coordinates of half precision are compared in float32.

        Raises:
            DataError: no batch of clouds, or clouds with fewer points than the first stage samples.
        """
        if points.ndim != 3 or points.shape[2] < 3:
            raise DataError(f"Point clouds are tensors [batch, points, 3 or more], got {list(points.shape)}.")
        if points.shape[1] < max(4 * self.groups, self.size):
            raise DataError(
                f"A cloud of {points.shape[1]} points cannot give the {4 * self.groups} of the tokenizer's first "
                f"stage, or a group of {self.size}. Sample more points, or build the backbone with fewer groups."
            )
        half = points.dtype in (torch.float16, torch.bfloat16)
        xyz = (points.float() if half else points)[..., :3].contiguous()
        g = self.groups
        picks = kernels.farthest_point_sampling(xyz.detach(), 4 * g, rule=self.rule)
        levels = [xyz, kernels.gather_points(xyz, picks)]
        levels += [levels[1][:, : 2 * g].contiguous(), levels[1][:, :g].contiguous()]
        with torch.no_grad():
            stages = tuple(
                kernels.knn(levels[i + 1], levels[i], self.size, return_dists=False).idx for i in range(len(_BLOCKS))
            )
        near = kernels.group_relative(levels[2], levels[3], stages[2])
        neighbors = picks.gather(1, stages[2].flatten(1)).view_as(stages[2])
        return Geometry(xyz, picks[:, :g], levels[3], neighbors, near, {STAGES: (picks, *stages)})


def pyramid_forward(module: Any, beside: Beside, points: Tensor) -> Geometry:
    """The described forward of :class:`Pyramid`: the place "geometry" takes the geometry and gives it back."""
    geometry: Geometry = beside.extend("geometry", Pyramid.forward(module, points))
    return geometry


def waves(offsets: Tensor, dim: int, alpha: float, beta: float) -> Tensor:
    """``[..., 3] -> [..., dim]``: per axis F = dim // 6 sines, then F cosines, of ``beta x / alpha^(i / F)``, then
    zeros."""
    f = dim // 6
    i = torch.arange(f, device=offsets.device, dtype=offsets.dtype)
    angle = (beta * offsets).unsqueeze(-1) / alpha ** (i / max(f, 1))  # [..., 3, F]
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(-2), (0, dim - 6 * f))


class Bottleneck(nn.Module):
    """``relu(x + BN(W2 relu(BN(W1 x))))`` on rows ``[M, C]``."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down, self.norm1 = nn.Linear(dim, width), nn.BatchNorm1d(width)
        self.up, self.norm2 = nn.Linear(width, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [M, C]``."""
        h = F.relu(self.norm1(self.down(x)))
        return F.relu(x + self.norm2(self.up(h)))


class PointTokenizer(nn.Module):
    """The tokenizer.

    Args:
        dim: D, a multiple of 8.
        channels: of a point, 3 for coordinates alone.
        last_width: inner width of the last stage's bottleneck.
        alpha, beta: of the waves.

    Raises:
        ConfigError: no such width.
    """

    def __init__(
        self, dim: int, channels: int = 3, last_width: int = 32, alpha: float = 1000.0, beta: float = 100.0
    ) -> None:
        super().__init__()
        if dim % 8 or last_width < 1 or channels < 3:
            raise ConfigError(
                f"The tokenizer doubles its width three times, so the source's {dim} must be a multiple of 8; "
                f"last_width = {last_width} must be at least 1, channels = {channels} at least 3."
            )
        self.dim, self.alpha, self.beta = dim, alpha, beta
        stem = dim // 8
        self.embed, self.norm = nn.Linear(channels, stem, bias=False), nn.BatchNorm1d(stem)
        widths = [(2 * stem, stem), (4 * stem, 2 * stem), (dim, last_width)]
        self.stages = nn.ModuleList(
            nn.Sequential(*(Bottleneck(*width) for _ in range(count)))
            for width, count in zip(widths, _BLOCKS, strict=True)
        )

    def forward(self, points: Tensor, geometry: Geometry) -> Tensor:
        """``points: [B, N, 3 + C]`` in the tokenizer's dtype, ``-> [B, G, D]``."""
        b = points.shape[0]
        x = F.relu(self.norm(self.embed(points.flatten(0, 1)))).view(b, points.shape[1], -1)
        picks, *stages = geometry.extra[STAGES]
        place = geometry.points
        for i, (stage, near) in enumerate(zip(self.stages, stages, strict=True)):
            n, k = near.shape[1:]
            middle = kernels.gather_points(x, picks) if i == 0 else x[:, :n]
            centers = kernels.gather_points(place, picks) if i == 0 else place[:, :n].contiguous()
            offsets = kernels.group_relative(place, centers, near)  # [B, n, k, 3]
            largest = offsets.abs().amax(2, keepdim=True)
            offsets = offsets / largest.clamp_min(torch.finfo(offsets.dtype).tiny)
            f = torch.cat((kernels.group_points(x, near), middle.unsqueeze(2).expand(-1, -1, k, -1)), dim=3)
            f = f + waves(offsets, f.shape[3], self.alpha, self.beta).to(f.dtype)
            x = stage(f.flatten(0, 2)).view(b, n, k, -1).amax(2)
            place = centers
        return x
