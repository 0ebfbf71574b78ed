"""The tokenizer of the point transformers: a small PointNet for each group, [B, G, S, 3] -> [B, G, D].

    f = conv2(relu(bn(conv1(group))))                       [S, 256]
    h = relu(bn(conv3([max f ; f])))                        [S, 512]
    token = max conv4(h)                                    [D]

All convolutions have kernel 1, so they are products along the last axis. The third one reads each group's maximum
beside every point; its matrix acts once per group on the maximum and once per point on f, the same sum in half the
arithmetic and without the concatenation.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MiniPointNet", "Pointwise", "PointwiseOnMax", "pointwise", "pointwise_on_max"]


class Pointwise(nn.Module):
    """A convolution with kernel 1 and bias, ``[..., in] -> [..., out]``; its weight has the shape of a Conv1d's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1))
        self.bias = nn.Parameter(torch.empty(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., in]``."""
        return pointwise(self, x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class PointwiseOnMax(Pointwise):
    """A kernel-1 convolution of ``[max over S of f ; f]``: ``f: [groups, S, C]``, weight ``[out, 2C, 1]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``x: [groups, S, C]``."""
        return pointwise_on_max(self, x, self.weight, self.bias)


def pointwise(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """:class:`Pointwise` with another weight and bias."""
    assert weight is not None
    return F.linear(x, weight.squeeze(-1), bias)


def pointwise_on_max(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """:class:`PointwiseOnMax` with another weight and bias."""
    assert weight is not None
    of_max, of_point = weight.squeeze(-1).chunk(2, dim=1)
    return F.linear(x, of_point) + F.linear(x.amax(1, keepdim=True), of_max, bias)


class MiniPointNet(nn.Module):
    """The tokenizer.

    Args:
        dim: width of a token.
        channels: of a point, 3 for coordinates alone.
        large: PointGPT-B and L: one more layer, and twice to four times the widths.
    """

    def __init__(self, dim: int, channels: int = 3, large: bool = False) -> None:
        super().__init__()
        widths = (channels, 256, 512, 1024) if large else (channels, 128, 256)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += ([nn.BatchNorm1d(a), nn.ReLU()] if i else []) + [Pointwise(a, b)]
        self.first_conv = nn.Sequential(*layers)
        inner = 2 * widths[-1]
        self.second_conv = nn.Sequential(
            PointwiseOnMax(inner, inner), nn.BatchNorm1d(inner), nn.ReLU(), Pointwise(inner, dim)
        )

    def forward(self, groups: Tensor) -> Tensor:
        """``groups: [B, G, S, 3 + C] -> [B, G, dim]``."""
        b, g, s, c = groups.shape
        wide, *rest = self.second_conv
        f = self.first_conv(groups.reshape(b * g * s, c)).view(b * g, s, -1)
        h = wide(f).flatten(0, 1)  # [points, inner]: batch norm over all points
        for layer in rest:
            h = layer(h)
        tokens: Tensor = h.view(b, g, s, -1).amax(2)
        return tokens
