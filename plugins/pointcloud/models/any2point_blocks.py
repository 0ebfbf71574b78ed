"""Blocks of a transformer of another modality, reading tokens of a cloud.

    x = x + pos
    x = x + drop path(ls1 attention(LN1 x))
    x = x + drop path(ls2 MLP(LN2 x))

One class for all sources: ViTs of timm, CLIP's text encoder, spectrogram transformers. They differ in width, heads,
bias of q, k, v, layer scale, activation and the norms' epsilon. Every token sees every token, also in blocks that were
trained with causal attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.edits import Beside
from peft_suite.errors import UnsupportedError
from peft_suite.pointcloud.models.geometry import Geometry
from peft_suite.pointcloud.models.layers import Attention, DropPath

__all__ = ["LayerScale", "QuickGELU", "SourceBlock", "source_block_forward"]


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}


class LayerScale(nn.Module):
    """A factor per channel: ``gamma x``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., D]``."""
        return x * self.gamma


class SourceMlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, D]``."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class SourceBlock(nn.Module):
    """One block.

    Args:
        dim: D.
        num_heads: attention heads.
        hidden: inner width of the MLP.
        activation: a name of ``ACTIVATIONS``.
        bias: of q, k and v.
        layer_scale: whether the branches are scaled per channel.
        eps: of the norms.

    Raises:
        UnsupportedError: the source has another activation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        activation: str = "gelu",
        bias: bool = True,
        layer_scale: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"The source's activation {activation!r} is not known here; choose a source with one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, bias=bias)
        self.ls1: nn.Module = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path1, self.drop_path2 = DropPath(0.0), DropPath(0.0)
        self.mlp = SourceMlp(dim, hidden, activation)
        self.ls2: nn.Module = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """``x, pos: [B, N, D] -> [B, N, D]``. The geometry is for what is attached to the block."""
        x = x + pos
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def source_block_forward(block: Any, beside: Beside, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
    """The described forward of :class:`SourceBlock`, with the places of a plain block; layer scale lies before them."""
    geometry = geometry.adding()
    x, pos = beside.through("tokens", x, pos, context=geometry)
    x = x + pos
    n = block.norm1(x)
    y, n = beside.through("attn_out", block.ls1(block.attn(n)), n, context=geometry)
    x = beside.attn(x, x + block.drop_path1(y), n, geometry)
    n = block.norm2(x)
    y, n = beside.through("mlp_out", block.ls2(block.mlp(n)), n, context=geometry)
    x = beside.mlp(x, x + block.drop_path2(y), n, geometry)
    return beside.through("end", x, context=geometry)[0]
