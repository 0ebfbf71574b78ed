"""The plain way: a point transformer and its parts in the torch operations that the published codes are made of.

Farthest points in a loop, neighbours by ``cdist`` and ``topk``, a tokenizer that concatenates before its third
convolution, attention with its matrix, a dense Laplacian and ``eigh``. Same values as the library's, within rounding.
"""

from __future__ import annotations

import torch
from loading import plain_fps
from torch import Tensor, nn

from peft_suite.pointcloud.models.geometry import Geometry
from peft_suite.pointcloud.models.layers import Attention
from peft_suite.pointcloud.models.tokenizer import MiniPointNet, Pointwise
from peft_suite.pointcloud.models.transformer import PointTransformer

__all__ = ["PlainTokenizer", "basis", "centers", "group", "plainly", "z_order"]


def centers(points: Tensor, count: int) -> Tensor:
    """Farthest points, ``[B, N, 3] -> [B, count, 3]``, from point 0."""
    with torch.device(points.device):
        return plain_fps(points, count)


def group(points: Tensor, middle: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The nearest points of every centre, ``[B, G, S]``, and where they lie from it, ``[B, G, S, 3]``."""
    idx = torch.cdist(middle, points).topk(size, dim=2, largest=False).indices
    rows = torch.arange(len(points), device=points.device)[:, None, None]
    return idx, points[rows, idx] - middle[:, :, None]


def z_order(points: Tensor, bits: int = 16) -> Tensor:
    """Places along the z-curve of hundredths, ``[B, G, 3] -> [B, G]``."""
    whole = (points * 100).long()
    key = torch.zeros_like(whole[..., 0])
    for i in range(bits):
        for slot, axis in enumerate((2, 0, 1)):
            key |= ((whole[..., axis] >> i) & 1) << (3 * i + slot)
    return key.argsort(dim=1, stable=True)


def basis(middle: Tensor, local: int) -> tuple[Tensor, Tensor, Tensor]:
    """PointGST's: eigenvectors for the cloud, ``[B, G, G]``, for runs along the z-curve, and that order."""
    order = z_order(middle)
    runs = middle.gather(1, order[:, :, None].expand_as(middle)).view(-1, local, 3)
    whole, parts = (torch.linalg.eigh(laplacian(c)).eigenvectors for c in (middle, runs))
    return whole, parts.view(len(middle), -1, local, local), order


def laplacian(points: Tensor) -> Tensor:
    """``I - D^-1/2 W D^-1/2`` with ``W = δ / distance`` and 1 on the diagonal, ``[B, G, 3] -> [B, G, G]``."""
    gaps = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = torch.where(gaps > 0, gaps, torch.inf).amin((1, 2), keepdim=True)
    weights = 1 / (gaps / nearest).clamp(min=1)
    root = torch.rsqrt(weights.sum(2) + 1e-6)
    eye = torch.eye(points.shape[1], device=points.device)
    return eye - root[:, :, None] * weights * root[:, None]


class PlainGrouping(nn.Module):
    """Points to their geometry."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        self.groups, self.size = groups, size

    def forward(self, points: Tensor) -> Geometry:
        """``points: [B, N, 3]``."""
        with torch.no_grad():
            middle = centers(points, self.groups)
            idx, near = group(points, middle, self.size)
        return Geometry(points, idx[:, :, 0], middle, idx, near, {})


class PlainTokenizer(nn.Module):
    """The mini-PointNet with channels first: convolution, the maximum beside every point, convolution, maximum."""

    def __init__(self, source: MiniPointNet) -> None:
        super().__init__()
        self.first = nn.Sequential(*(convolution(m) for m in source.first_conv))
        self.second = nn.Sequential(*(convolution(m) for m in source.second_conv))

    def forward(self, groups: Tensor) -> Tensor:
        """``groups: [B, G, S, 3] -> [B, G, D]``."""
        b, g, s, c = groups.shape
        f = self.first(groups.reshape(b * g, s, c).transpose(2, 1))
        together = torch.cat((f.max(2, keepdim=True).values.expand(-1, -1, s), f), dim=1)
        tokens: Tensor = self.second(together).max(2).values
        return tokens.view(b, g, -1)


def convolution(module: nn.Module) -> nn.Module:
    """A torch convolution on the same tensors; other layers as they are."""
    if not isinstance(module, Pointwise):
        return module
    outputs, inputs, _ = module.weight.shape
    found = nn.Conv1d(inputs, outputs, 1)
    found.weight, found.bias = module.weight, module.bias
    return found


class PlainAttention(nn.Module):
    """Attention that forms and keeps its matrix."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = source.num_heads, source.qkv, source.proj

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, D]``."""
        b, n, d = x.shape
        width = d // self.num_heads
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, width).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * width**-0.5).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))
        return out


def plainly(model: PointTransformer) -> nn.Module:
    """The model with every part of it the plain way, changed in place."""
    divider = model.group_divider
    model.group_divider = PlainGrouping(divider.groups, divider.size)  # type: ignore[assignment]
    model.encoder = PlainTokenizer(model.encoder)  # type: ignore[assignment]
    for block in model.blocks.blocks:
        block.attn = PlainAttention(block.attn)  # type: ignore[arg-type]
    return model
