"""Positions borrowed from another modality (Any2Point, Tang et al., ECCV 2024): virtual projection of the tokens.

The centres of the tokens are seen from six sides: four turns about the up axis y, and the two poles. Every view places
a centre in the source's own space, where its position table is interpolated; the position of a token is the mean of the
six.

    vision, audio:  (x, y) / (z + distance)  of the turned centre, [-1, 1] over the table's rows and columns; bilinear
    language:       <turned centre, (-1, 0, 1)>, the smallest at the first position, the largest at the last; linear

Coordinates are kept as ``plane``, fractions of the table's extent in [0, 1]. What would fall outside stays at the edge.

``official=True`` is as in the published code. Vision and audio: coordinates outside wrap around to the other edge, and
the last pixel's have half a position or none; audio: rows are stretched by height / width. Language: the last token
wraps around to the first position, the line is stretched by the batch's extent, and a token exactly on a position gets
none at all. Where positions are added differs too, see :class:`peft_suite.pointcloud.models.any2point.Any2Point`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_suite import kernels
from peft_suite.edits import Beside
from peft_suite.errors import ConfigError
from peft_suite.pointcloud.models.geometry import Geometry

__all__ = ["PLANE", "Projection", "projection_forward", "views"]

PLANE = "any2point_plane"  # entry of the geometry's extra
_LINE = (-math.sqrt(0.5), 0.0, math.sqrt(0.5))
_NEAREST = 0.05  # depth of what lies closer to a camera, or behind it


def views() -> Tensor:
    """Turns of the six views, ``[6, 3, 3]``, rows are the camera's axes; all entries are -1, 0 or 1."""

    def turn(axis: int, quarters: int) -> Tensor:
        c, s = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters % 4]
        a, b = ((1, 2), (2, 0), (0, 1))[axis]
        matrix = torch.eye(3)
        matrix[a, a] = matrix[b, b] = c
        matrix[a, b], matrix[b, a] = -s, s
        return matrix

    upright = turn(2, 1)
    sides = [turn(0, k) @ upright for k in range(4)]
    return torch.stack([*sides, turn(1, -1) @ upright, turn(1, 1) @ upright])


class Projection(nn.Module):
    """Where every view sees the tokens, and their positions.

    Args:
        table: the source's positions ``[rows * columns, D]`` or ``[length, D]``, kept frozen as a buffer.
        grid: (rows, columns) or (length,).
        modality: "vision", "language" or "audio".
        pixels: size of the source's image along ``grid``, for ``official``.
        distance: of the cameras from the origin.
        official: see the module's text.

    Attributes:
        count: V, of the views.

    Raises:
        ConfigError: cameras inside the cloud, or a table of another size.
    """

    def __init__(
        self,
        table: Tensor,
        grid: tuple[int, ...],
        modality: Literal["vision", "language", "audio"],
        pixels: tuple[int, ...],
        distance: float = 1.8,
        official: bool = False,
    ) -> None:
        super().__init__()
        if distance <= 1:
            raise ConfigError(f"distance = {distance:g}: cameras stand outside of the unit sphere, above 1.")
        if len(table) != math.prod(grid):
            raise ConfigError(f"A table of {len(table)} positions does not cover a grid of {grid}.")
        self.grid, self.modality, self.pixels = grid, modality, pixels
        self.distance, self.official = float(distance), official
        self.register_buffer("table", table.detach().clone())
        turns = views()
        self.count = len(turns)
        self.register_buffer("views", turns, persistent=False)

    def forward(self, geometry: Geometry) -> Geometry:
        """Adds the entry :data:`PLANE`: ``[B, V, G, len(grid)]`` in [0, 1], along rows then columns; no gradients."""
        with torch.no_grad():
            return geometry.adding(**{PLANE: self.plane(geometry.centers)})

    def plane(self, centers: Tensor) -> Tensor:
        """``[B, G, 3] -> [B, V, G, len(grid)]``."""
        seen = centers.unsqueeze(1) @ self.views.to(centers.dtype).mT  # type: ignore[operator]  # [B, V, G, 3]
        if self.modality == "language":
            line = seen @ torch.tensor(_LINE, dtype=seen.dtype, device=seen.device)
            low, high = line.amin(2, keepdim=True), line.amax(2, keepdim=True)
            fraction = ((line - low) / (high - low).clamp_min(torch.finfo(line.dtype).tiny)).unsqueeze(3)
        else:
            depth = seen[..., 2:] + self.distance
            plane = seen[..., :2].flip(-1) / (depth if self.official else depth.clamp_min(_NEAREST))
            if self.official and self.modality == "audio":
                height, width = self.pixels
                plane = plane * torch.tensor((height / width, 1.0), dtype=plane.dtype, device=plane.device)
            fraction = (plane + 1) / 2
        return fraction % 1 if self.official else fraction.clamp(0, 1)

    def positions(self, geometry: Geometry) -> Tensor:
        """Mean over the views: ``[B, G, D]`` in the table's dtype; no gradients."""
        plane = geometry.extra[PLANE]
        b, v, g, _ = plane.shape
        with torch.no_grad():
            idx, weight = self.corners(plane)  # [B, V, G, corners]
            idx, weight = (t.transpose(1, 2).reshape(1, b * g, -1) for t in (idx, weight / v))
            table: Any = self.table
            rows = kernels.three_interpolate(table[None].to(weight.dtype), idx, weight)
            return rows.view(b, g, -1).to(table.dtype)

    def corners(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table around every place and their shares, ``[..., 2 or 4]``."""
        idx = torch.zeros_like(plane[..., :1], dtype=torch.int64)
        weight = torch.ones_like(plane[..., :1])
        for axis, n in enumerate(self.grid):
            near, share = self.ends(plane[..., axis], n, self.pixels[axis])  # [..., 2] each
            idx = (idx.unsqueeze(-1) * n + near.unsqueeze(-2)).flatten(-2)
            weight = (weight.unsqueeze(-1) * share.unsqueeze(-2)).flatten(-2)
        return idx, weight

    def ends(self, fraction: Tensor, n: int, pixels: int) -> tuple[Tensor, Tensor]:
        """The two entries of an axis of n that lie around ``fraction``, and their shares, ``[..., 2]``."""
        if not self.official:
            at = fraction * (n - 1)
            left = at.floor().clamp(max=max(n - 2, 0))
            ends, share = torch.stack((left, left + 1), -1), at - left
            return ends.long().clamp(max=n - 1), torch.stack((1 - share, share), -1)
        if self.modality == "language":
            at = fraction * n
            at = at * ((n - 1) / (at.max() - at.min()).clamp_min(torch.finfo(at.dtype).tiny))
            left, right = at.floor().clamp(0, n - 1), at.ceil().clamp(0, n - 1)
            return torch.stack((left, right), -1).long(), torch.stack((right - at, at - left), -1)
        at = fraction * pixels / (pixels - 1) * (n - 1)
        left = at.floor()
        ends, share = torch.stack((left, left + 1), -1), at - left
        weight = torch.stack((1 - share, share), -1) * (ends < n)
        return ends.long().clamp(max=n - 1), weight

    def extra_repr(self) -> str:
        grid = " x ".join(map(str, self.grid))
        return f"{self.modality}, {grid}, distance={self.distance:g}" + (", official" if self.official else "")


def projection_forward(module: Any, beside: Beside, geometry: Geometry) -> Geometry:
    """The described forward of :class:`Projection`: at "projected", parts get and give the geometry with its plane."""
    projected: Geometry = beside.extend("projected", Projection.forward(module, geometry))
    return projected
