"""Parts of Any2Point: which tokens share a voxel or a cell, the bottleneck, the narrow attentions, and the guide.

Every token carries the value of its voxel or cell, and batch norm weighs it by one over the number of tokens there:
that is batch norm over voxels and cells, without lists of unknown length. A mean over cells is one matrix product for
all views and voxels, ``[B, (1 + V) G, G] x [B, G, D]``. Norms of the views differ in scale and shift alone, so x is
normalised once, and these go into the matrices behind them. A mean over cells and the output matrix of an attention
commute, so the mean is taken where it is narrow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Part
from peft_suite.pointcloud.models.any2point_positions import PLANE
from peft_suite.pointcloud.models.geometry import Geometry

__all__ = ["KEY", "Guide", "Locate", "Mixing", "ParallelBottleneck", "Places", "largest"]

KEY = "any2point"  # of the geometry's extra entry


class Places(NamedTuple):
    """Voxels (place 0) and every view's cells (1 .. V) of the tokens, made once per forward.

    Attributes:
        same: ``[B, 1 + V, G, G]``, whether two tokens share one.
        average: the same as ``[B, 1 + V, G, G]`` float, rows add up to 1.
        first: ``[B, 1 + V, G]``, the first token of a token's voxel or cell.
        weight: ``[B, 1 + V, G]``, one over the number of tokens there.
        empty: ``[1 + V]``, voxels and cells without a token that batch norm counts as zeros.
        counted: blocks whose batch statistics have moved in this forward: what checkpointing computes again does not
            move them twice.
    """

    same: Tensor
    average: Tensor
    first: Tensor
    weight: Tensor
    empty: Tensor
    counted: set[int]


class Locate(Part):
    """Which tokens share a voxel, or a cell of a view; no parameters."""

    def __init__(self, grid: tuple[int, ...], cell: float, voxel: float, official: bool) -> None:
        super().__init__()
        self.grid, self.cell, self.voxel, self.official = grid, cell, voxel, official

    def forward(self, geometry: Geometry) -> Geometry:
        """Adds the entry "any2point"."""
        with torch.no_grad():
            centers, plane = geometry.centers, geometry.extra[PLANE]
            away = centers - centers.amin(1, keepdim=True)
            ids = [_number((away / self.voxel).floor()).unsqueeze(1)]
            spread = plane * plane.new_tensor(self.grid)  # in patches, [B, V, G, 1 or 2]
            ids.append(_number((spread / self.cell).floor()))
            place = torch.cat(ids, dim=1)  # [B, 1 + V, G]
            same = place.unsqueeze(3) == place.unsqueeze(2)
            size = same.sum(3)
            weight = 1 / size.to(centers.dtype)
            empty = centers.new_zeros(same.shape[1])
            if self.official:
                cells = centers.shape[0] * math.prod(math.ceil(n / self.cell) for n in self.grid)
                empty[1:] = cells - weight[:, 1:].sum((0, 2))
            average = same.to(weight.dtype) * weight.unsqueeze(3)
            first = same.to(torch.uint8).argmax(3)
            return geometry.adding(**{KEY: Places(same, average, first, weight, empty, set())})

    def extra_repr(self) -> str:
        return f"cell={self.cell:g}, voxel={self.voxel:g}" + (", official" if self.official else "")


def _number(index: Tensor) -> Tensor:
    """One integer for each tuple of small ones: ``[..., n] -> [...]`` int64."""
    index = index.long().clamp(0, 2**20 - 1)
    number = index[..., 0]
    for axis in range(1, index.shape[-1]):
        number = number * 2**20 + index[..., axis]
    return number


class ParallelBottleneck(Part):
    """``u + s A(u)``; xavier-uniform, biases 0."""

    def __init__(self, dim: int, width: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, u: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """``u, read: [B, N, D]``: what the MLP gives and what it has read."""
        h = self.down(u)
        return u + self.scale * self.up(self.dropout(h * torch.sigmoid(1.702 * h))), read


class Mixing(nn.Module):
    """The narrow attentions of all V views, among the tokens of a cell. One layer holds a kind of matrix of all views.

    Scores are divided by the root of the whole width, not of a head's, as in the published code.
    """

    def __init__(self, dim: int, views: int, width: int, heads: int) -> None:
        super().__init__()
        self.views, self.width, self.heads = views, width, heads
        self.gain, self.shift = nn.Parameter(torch.ones(views * dim)), nn.Parameter(torch.zeros(views * dim))
        self.qkv, self.proj = nn.Linear(dim, views * 3 * width), nn.Linear(width, views * dim)
        for layer in (self.qkv, self.proj):
            for of_view in layer.weight.chunk(views):
                nn.init.xavier_uniform_(of_view)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, same: Tensor) -> Tensor:
        """``x: [B, G, D], same: [B, V, G, G]`` to what the output matrices read, ``[B, V, G, width]``."""
        b, g, d = x.shape
        v = self.views
        of_views = self.qkv.weight.view(v, -1, d)  # [V, 3 width, D]
        weight = (of_views * self.gain.view(v, 1, d)).view_as(self.qkv.weight)
        bias = self.qkv.bias + (of_views @ self.shift.view(v, d, 1)).flatten()
        qkv = F.linear(F.layer_norm(x, (d,)), weight, bias).view(b, g, v, 3, self.heads, -1)
        q, k, values = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)  # [B V, heads, G, head width]
        mask = same.flatten(0, 1).unsqueeze(1)  # [B V, 1, G, G]
        mixed = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, scale=self.width**-0.5)
        return mixed.transpose(1, 2).reshape(b, v, g, self.width)

    def out(self, mixed: Tensor) -> Tensor:
        """``[B, V, G, width] -> [B, V, G, D]``."""
        return mixed @ self.proj.weight.view(self.views, -1, self.width).mT + self.proj.bias.view(self.views, 1, -1)


class Guide(Part):
    """What voxels and cells add to the patches at the end of a block."""

    needs_context = True

    def __init__(
        self, index: int, dim: int, prefix: int, views: int, mixing: Mixing, guide: float, pooling: str
    ) -> None:
        super().__init__()
        self.index, self.prefix, self.guide, self.both = index, prefix, guide, pooling == "mean_max"
        self.mixing = mixing if index == 0 else None  # all blocks use the first one's
        self.shared = (mixing,)
        self.norm_3d, self.norm_2d = nn.BatchNorm1d(dim), nn.BatchNorm1d(views * dim)

    def forward(self, x: Tensor, geometry: Geometry) -> tuple[Tensor]:
        """``x: [B, P + G, D]``, P tokens before the patches; what follows these is left alone."""
        places: Places = geometry.extra[KEY]
        g = geometry.centers.shape[1]
        before, patches, behind = torch.split(x, [self.prefix, g, x.shape[1] - self.prefix - g], dim=1)
        values = F.gelu(self.normed(self.pooled(patches, places), places))  # [B, 1 + V, G, D]
        space, views = values[:, :1], values[:, 1:]
        weight = F.cosine_similarity(views, space, dim=3) + 1  # [B, V, G]
        weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).eps)
        patches = patches + self.guide * (views * weight.unsqueeze(3)).sum(1)
        return (torch.cat((before, patches, behind), dim=1),)

    def pooled(self, x: Tensor, places: Places) -> Tensor:
        """Every token gets the value of its voxel and cells: ``[B, G, D] -> [B, 1 + V, G, D]``."""
        mixing = self.shared[0]
        average = places.average.to(x.dtype)
        b, v, g, _ = average.shape
        mean = (average.view(b, v * g, g) @ x).view(b, v, g, -1)
        mixed = mixing(x, places.same[:, 1:])
        views = mean[:, 1:] + mixing.out(average[:, 1:] @ mixed)
        if self.both:
            views = views + largest(x.unsqueeze(1) + mixing.out(mixed), places.first[:, 1:])
        space = mean[:, :1] + largest(x.unsqueeze(1), places.first[:, :1])
        return torch.cat((space, views), dim=1)

    def normed(self, values: Tensor, places: Places) -> Tensor:
        """Batch norm over voxels and cells, ``[B, 1 + V, G, D]``; its statistics move once per forward."""
        norms = (self.norm_3d, self.norm_2d)
        views, dim = values.shape[1], values.shape[3]
        gain, shift = (torch.cat([getattr(n, name) for n in norms]).view(views, 1, dim) for name in ("weight", "bias"))
        if not self.training:
            mean, var = (
                torch.cat([getattr(n, s) for n in norms]).view(views, 1, dim) for s in ("running_mean", "running_var")
            )
        else:
            weight = places.weight.to(values.dtype).unsqueeze(2)  # [B, 1 + V, 1, G]
            empty = places.empty.to(values.dtype).view(-1, 1, 1)
            count = weight.sum((0, 3)).unsqueeze(2) + empty  # [1 + V, 1, 1]
            mean = (weight @ values).sum(0) / count
            var = ((weight @ (values - mean).square()).sum(0) + empty * mean.square()) / count
            self.move(norms, mean, var * (count / (count - 1).clamp_min(1)), places)
        return (values - mean) * ((var + self.norm_3d.eps).rsqrt() * gain) + shift

    def move(self, norms: tuple[nn.BatchNorm1d, ...], mean: Tensor, var: Tensor, places: Places) -> None:
        """Running statistics, also when checkpointing computes the block again, once per forward."""
        if not torch.compiler.is_compiling():  # a compiled backward never moves statistics
            if self.index in places.counted:
                return
            places.counted.add(self.index)
        with torch.no_grad():
            for norm, m, v in zip(norms, (mean[:1], mean[1:]), (var[:1], var[1:]), strict=True):
                found: Any = norm
                found.num_batches_tracked.add_(1)
                found.running_mean.lerp_(m.flatten().to(found.running_mean.dtype), found.momentum)
                found.running_var.lerp_(v.flatten().to(found.running_var.dtype), found.momentum)


def largest(x: Tensor, first: Tensor) -> Tensor:
    """Maximum over the tokens with the same first one: ``[B, W, G, D], [B, W, G] -> [B, W, G, D]``."""
    index = first.unsqueeze(3).expand(-1, -1, -1, x.shape[3])
    found = torch.full_like(x, -torch.inf).scatter_reduce(2, index, x, "amax")
    return found.gather(2, index)
