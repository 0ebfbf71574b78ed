"""What the point transformers share: attention, MLP, drop path, the plain pre-norm block, heads, and their forwards
with the places where parts can act.

Places of a block, in order, each with the geometry as context:

==========  =====================  =====================================================================
place       values                 what they are
==========  =====================  =====================================================================
tokens      x, pos  [B, N, D]      the stream and its positions before they are added
attn_out    y, n    [B, N, D]      what the attention gives, before drop path, and what it read
mlp_out     y, n    [B, N, D]      the same of the MLP
end         x       [B, N, D]      the stream that leaves
==========  =====================  =====================================================================

``geometry.extra`` is a new dictionary in every call of a block: what one part puts there, later parts of the same call
find, and nothing is left behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Beside
from peft_suite.pointcloud.models.geometry import Geometry

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "Entry",
    "Mlp",
    "Pool",
    "attention_forward",
    "block_forward",
    "entry_forward",
    "growing",
    "mlp_head",
    "new_token",
    "pool_forward",
]


class DropPath(nn.Module):
    """Drops whole samples of a residual branch with probability ``drop_prob`` in train mode, scaling the others up."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, ...]``."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        return f"{self.drop_prob:g}"


class Attention(nn.Module):
    """Self-attention; q, k and v come from one matrix. ``causal``: a token sees itself and those before it."""

    def __init__(self, dim: int, num_heads: int, *, bias: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, D]``."""
        return self.mix(x, None)

    def mix(self, x: Tensor, beside: Beside | None) -> Tensor:
        """Attention, with a place for more keys and values, which every query sees."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        if beside is not None:
            k, v = beside.through("prefix", k, v)
        more, mask = k.shape[2] - n, None
        if self.causal and more:
            mask = torch.ones(n, n + more, dtype=torch.bool, device=x.device).tril(more)
        alone = self.causal and not more
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=alone)  # [B, heads, N, head width]
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, n, d))
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, Linear; four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, D]``."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """``x = x + pos``, then attention and MLP, each behind its norm. Positions are added again in every block."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """``x, pos: [B, N, D] -> [B, N, D]``. The geometry is for what is attached to the block."""
        x = x + pos
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


def block_forward(block: Any, beside: Beside, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
    """The described forward of :class:`Block`."""
    geometry = geometry.adding()
    x, pos = beside.through("tokens", x, pos, context=geometry)
    x = x + pos
    n = block.norm1(x)
    y, n = beside.through("attn_out", block.attn(n), n, context=geometry)
    x = beside.attn(x, x + block.drop_path1(y), n, geometry)
    n = block.norm2(x)
    y, n = beside.through("mlp_out", block.mlp(n), n, context=geometry)
    x = beside.mlp(x, x + block.drop_path2(y), n, geometry)
    return beside.through("end", x, context=geometry)[0]


def attention_forward(attn: Any, beside: Beside, x: Tensor) -> Tensor:
    """The described forward of :class:`Attention`."""
    mixed: Tensor = attn.mix(x, beside)
    return mixed


class Entry(nn.Module):
    """Where stream, positions and geometry enter the blocks, once per forward: ``x, pos: [B, N, D]``; no parameters."""

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Geometry]:
        """All three, as they are."""
        return x, pos, geometry


def entry_forward(entry: Any, beside: Beside, x: Tensor, pos: Tensor, geometry: Geometry) -> Any:
    """The described forward of :class:`Entry`: at "entry", parts get and give the triple.

    It lies outside of checkpointed blocks: what parts add to the geometry here is computed once and found by all.
    """
    return beside.extend("entry", (x, pos, geometry))


class Pool(nn.Module):
    """``[prefix tokens ; max over the patch tokens]``: ``[B, P + G, D] -> [B, (P + 1) D]``; no parameters.

    ``skip`` leading tokens are left out of both.
    """

    def __init__(self, prefix: int, skip: int = 0) -> None:
        super().__init__()
        self.prefix, self.skip = prefix, skip

    def forward(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        """``tokens: [B, N, D]``."""
        first = self.skip + self.prefix
        return torch.cat((tokens[:, self.skip : first].flatten(1), tokens[:, first:].amax(1)), dim=1)


def pool_forward(pool: Any, beside: Beside, tokens: Tensor, geometry: Geometry) -> Tensor:
    """The described forward of :class:`Pool`: at "pool", parts get and give features and tokens."""
    feature = Pool.forward(pool, tokens, geometry)
    return beside.through("pool", feature, tokens, context=geometry)[0]


def mlp_head(inputs: int, num_classes: int) -> nn.Sequential:
    """The three-layer head of the family: batch norm, ReLU and dropout 0.5 after each hidden layer of 256."""
    return nn.Sequential(
        nn.Linear(inputs, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, num_classes),
    )


def new_token(dim: int) -> nn.Parameter:
    """``[1, 1, D]``, truncated normal 0.02."""
    token = nn.Parameter(torch.empty(1, 1, dim))
    nn.init.trunc_normal_(token, std=0.02)
    return token


def growing(rate: float, depth: int) -> list[float]:
    """Drop-path rates of the blocks, linear from 0 to ``rate``."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
