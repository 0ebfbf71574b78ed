"""Convpass (Jie & Deng, 2022): a small convolution over the patch grid beside attention and MLP.

    c(x) = Up(drop(act(Conv3x3(act(Down x)))))        Down: [r, d]   Conv: [r, r, 3, 3]   Up: [d, r]
    x = x + Attn(LN1 x) + s * c_attn(LN1 x)           x = x + MLP(LN2 x) + s * c_mlp(LN2 x)

act is QuickGELU. Patch tokens form a map; every token before the grid goes through the same convolution as a 1x1 map,
where only the centre tap acts. Swin's tokens are a map already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.vision.methods.grids import Grid


@dataclass(frozen=True)
class ConvpassConfig(MethodConfig):
    """Where the convolutions sit and how they start.

    Attributes:
        bottleneck: inner width r.
        position: "both", or "attn" alone (the paper's Convpass-attn).
        scale: s; the paper searches 0.01, 0.1, 1, 10, 100 per task.
        xavier: the convolution starts Xavier-uniform instead of as the identity; chosen per task in the paper.
        dropout: before Up.
    """

    method: ClassVar[str] = "convpass"
    bottleneck: int = 8
    position: Literal["both", "attn"] = "both"
    scale: float = 1.0
    xavier: bool = False
    dropout: float = 0.1

    def validate(self) -> None:
        self.require("bottleneck", self.bottleneck >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")


class ConvpassPart(Part):
    """``s * c(x)`` for tokens ``[B, prefix + H*W, d]`` or a map ``[B, H, W, d]``.

    ``drop_path`` is the block's own rate: samples are dropped independently of those of the branch beside, as in the
    paper's code.
    """

    def __init__(self, dim: int, config: ConvpassConfig, grid: Grid, drop_path: float) -> None:
        super().__init__()
        r = config.bottleneck
        self.down, self.up = nn.Linear(dim, r), nn.Linear(r, dim)
        self.conv = nn.Conv2d(r, r, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.scale, self.grid, self.drop_path = config.scale, grid, drop_path
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        if config.xavier:
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.zeros_(self.conv.weight)
            with torch.no_grad():
                self.conv.weight[:, :, 1, 1] += torch.eye(r)
        for layer in (self.down, self.conv, self.up):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, d]`` or ``[B, H, W, d]``, normalised."""
        h = _quick_gelu(self.down(x))
        if h.ndim == 4:
            h = self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            prefix, patches = self.grid.split(h)
            patches = self.conv(patches).flatten(2).transpose(1, 2)
            prefix = F.linear(prefix, self.conv.weight[:, :, 1, 1], self.conv.bias)  # a 1x1 map: the centre tap
            h = torch.cat((prefix, patches), dim=1)
        h = self.up(self.dropout(_quick_gelu(h)))
        if self.training and self.drop_path:
            keep = torch.rand(len(h), *[1] * (h.ndim - 1), device=h.device) >= self.drop_path
            h = h * keep / (1 - self.drop_path)
        out: Tensor = h * self.scale
        return out


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class Convpass(Method[ConvpassConfig]):
    """One convolution per block and branch: ``L * n * (2dr + r + d + 9r^2 + r)`` parameters, n branches.

    327,552 on ViT-B/16, 163,776 for "attn". Starts as an identity. Not mergeable.
    """

    config_class = ConvpassConfig
    examples = ("convpass(bottleneck=3)", "convpass-attn(bottleneck=3)")

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the parts.

        Raises:
            UnsupportedError: the blocks have no attention, or their tokens lie on no grid.
        """
        blocks = anatomy.need_blocks("convpass")
        if anatomy.grid is None or any("attn" not in block.branches for block in blocks):
            raise UnsupportedError(f"convpass convolves the token grid of attention blocks; {anatomy.family} has none.")
        grid = Grid(anatomy.grid, anatomy.prefix_tokens)
        for block in blocks:
            for branch, drop in (("attn", "drop1"), ("mlp", "drop2"))[: 2 if self.config.position == "both" else 1]:
                path = block.points[drop].path if drop in block.points else ""
                rate = float(getattr(edit.module(path), "drop_prob", None) or 0.0)
                part = ConvpassPart(block.point.width, self.config, grid, rate)
                edit.branch(block, branch, part, f"convpass_{branch}", normed=True)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()
