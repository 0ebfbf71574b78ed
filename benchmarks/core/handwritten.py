"""The shortest honest version of each method, written straight into a timm ViT: the baseline of the step benchmark.

Same mathematics, trained head, everything else frozen; no names, no saving, no undo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


class ScaleShift(_Wrapped):
    """``s * base(x) + t``."""

    def __init__(self, base: nn.Module, width: int, first: bool = False) -> None:
        super().__init__(base)
        shape = (width, 1, 1) if first else (width,)
        self.s = nn.Parameter(torch.ones(shape))
        self.t = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.s + self.t


class QV(_Wrapped):
    """A fused qkv with rank-r updates of q and v."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base)
        d = base.in_features
        self.aq, self.av = nn.Parameter(torch.randn(rank, d) * 0.02), nn.Parameter(torch.randn(rank, d) * 0.02)
        self.bq, self.bv = nn.Parameter(torch.zeros(d, rank)), nn.Parameter(torch.zeros(d, rank))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.base(x).chunk(3, dim=-1)
        q = q + F.linear(F.linear(x, self.aq), self.bq)
        v = v + F.linear(F.linear(x, self.av), self.bv)
        return torch.cat((q, k, v), dim=-1)


class Bottleneck(_Wrapped):
    """``h + U gelu(D h)`` after the MLP."""

    def __init__(self, base: nn.Module, dim: int, rank: int) -> None:
        super().__init__(base)
        self.down, self.up = nn.Linear(dim, rank), nn.Linear(rank, dim)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


class Prompted(_Wrapped):
    """A block that replaces P prompt tokens behind the class token before it runs; ``insert`` for the first one."""

    def __init__(self, base: nn.Module, dim: int, tokens: int, insert: bool) -> None:
        super().__init__(base)
        self.prompt = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.skip = 1 if insert else 1 + tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.base(torch.cat((x[:, :1], self.prompt.expand(len(x), -1, -1), x[:, self.skip :]), dim=1))


def ssf(model: Any) -> None:
    d = model.embed_dim
    model.patch_embed.proj = ScaleShift(model.patch_embed.proj, d, first=True)
    for b in model.blocks:
        b.norm1, b.norm2 = ScaleShift(b.norm1, d), ScaleShift(b.norm2, d)
        b.attn.qkv, b.attn.proj = ScaleShift(b.attn.qkv, 3 * d), ScaleShift(b.attn.proj, d)
        b.mlp.fc1, b.mlp.fc2 = ScaleShift(b.mlp.fc1, 4 * d), ScaleShift(b.mlp.fc2, d)
    model.norm = ScaleShift(model.norm, d)


def lora(model: Any) -> None:
    for b in model.blocks:
        b.attn.qkv = QV(b.attn.qkv, 8)


def adapter(model: Any) -> None:
    for b in model.blocks:
        b.mlp = Bottleneck(b.mlp, model.embed_dim, 8)


def vpt(model: Any) -> None:
    for i, b in enumerate(model.blocks):
        model.blocks[i] = Prompted(b, model.embed_dim, 10, insert=i == 0)


METHODS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "ssf": ("ssf", ssf),
    "vpt": ("vpt(num_tokens=10, deep=True)", vpt),
    "lora": ("lora(rank=8)", lora),
    "adapter": ("pfeiffer(bottleneck=8)", adapter),
}


def build(model: Any, name: str) -> nn.Module:
    """Freeze ``model``, write the method in, train its head."""
    model.requires_grad_(False)
    METHODS[name][1](model)
    model.head.requires_grad_(True)
    return model
