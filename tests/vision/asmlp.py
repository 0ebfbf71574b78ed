"""AS-MLP (Lian et al., ICLR 2022), no larger than its rule for SSF needs: shifts along two axes between convolutions.

Feature maps are NCHW throughout, norms are GroupNorm with one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite import Anatomy, AnatomyEntry, Block, Plugin, Point, Weight
from peft_suite.plugins import plugins


class Embed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int, norm: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.GroupNorm(1, dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class AxialShift(nn.Module):
    def __init__(self, dim: int, shift_size: int) -> None:
        super().__init__()
        self.shift_size = shift_size
        self.conv1, self.conv2_1, self.conv2_2, self.conv3 = (nn.Conv2d(dim, dim, 1) for _ in range(4))
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        x = F.gelu(self.conv2_1(self._shift(x, 3))) + F.gelu(self.conv2_2(self._shift(x, 2)))
        return self.conv3(self.norm2(x))

    def _shift(self, x: Tensor, axis: int) -> Tensor:
        """Groups of channels moved by -p..p places along ``axis``, zeros moving in."""
        pad, height, width = self.shift_size // 2, x.shape[2], x.shape[3]
        groups = torch.chunk(F.pad(x, (pad,) * 4), self.shift_size, 1)
        moved = [torch.roll(group, by, axis) for group, by in zip(groups, range(-pad, pad + 1), strict=False)]
        return torch.cat(moved, 1)[:, :, pad : pad + height, pad : pad + width]


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class AxialBlock(nn.Module):
    def __init__(self, dim: int, shift_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.axial_shift = AxialShift(dim, shift_size)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.axial_shift(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.GroupNorm(1, 4 * dim), nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, 1)))


class Stage(nn.Module):
    def __init__(self, dim: int, depth: int, shift_size: int, mlp_ratio: float, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(AxialBlock(dim, shift_size, mlp_ratio) for _ in range(depth)))
        self.downsample = Merging(dim) if merge else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class ASMLP(nn.Module):
    """Keys are those of the official class."""

    def __init__(
        self,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        shift_size: int = 5,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 100,
        patch_norm: bool = True,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        last = [False] * (len(depths) - 1) + [True]
        self.patch_embed = Embed(3, embed_dim, patch_size, patch_norm)
        self.layers = nn.Sequential(
            *(Stage(d, n, shift_size, mlp_ratio, not end) for d, n, end in zip(dims, depths, last, strict=True))
        )
        self.norm = nn.GroupNorm(1, dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, 3, H, W]`` -> ``[B, classes]``."""
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean((2, 3)))


def describe(model: ASMLP) -> Anatomy:
    """SSF's official sites: nothing in the patch embedding, nothing where stages meet, not the norms between shifts."""
    blocks: list[Block] = []
    modules: dict[str, Any] = dict(model.named_modules())
    for path, block in modules.items():
        if isinstance(block, AxialBlock):
            inner = ("norm1", *(f"axial_shift.{n}" for n in ("conv1", "conv2_1", "conv2_2", "conv3")), "norm2")
            affine = [_first(modules, f"{path}.{n}") for n in (*inner, "mlp.fc1", "mlp.fc2")]
            weights = {n: Weight(f"{path}.mlp.{n}") for n in ("fc1", "fc2")}
            points = {n: _first(modules, f"{path}.{n}") for n in ("norm1", "norm2")}
            dim = block.norm1.num_channels
            points["mlp"] = Point(f"{path}.mlp", dim, "first")
            blocks.append(Block(Point(path, dim, "first"), points, weights, tuple(affine)))
    return Anatomy(
        family="as-mlp",
        dim=model.patch_embed.proj.out_channels,
        blocks=tuple(blocks),
        tail=(_first(modules, "norm"),),
        between=tuple(
            _first(modules, f"{n}.{part}")
            for n, m in modules.items()
            if isinstance(m, Merging)
            for part in ("norm", "reduction")
        ),
        norms=tuple(n for n, m in modules.items() if isinstance(m, nn.GroupNorm)),
        fresh=("head.weight", "head.bias"),
        patch_values=model.patch_embed.proj.weight[0].numel(),
        no_prompts="it has no tokens, only feature maps",
    )


def _first(modules: dict[str, Any], path: str) -> Point:
    return Point(path, modules[path].weight.shape[0], "first")


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random AS-MLP and a batch."""
    return ASMLP(10, (1, 1), 3, 4, 2.0, 5).eval(), torch.randn(2, 3, 32, 32)


plugin = Plugin(
    name="as-mlp",
    anatomies=(AnatomyEntry("as-mlp", (f"{__name__}.ASMLP",), f"{__name__}:describe", (f"{__name__}:example",)),),
)


def register() -> None:
    """Make the family known to this process."""
    if plugin.name not in {found.name for found in plugins()}:
        ps.register(plugin)
