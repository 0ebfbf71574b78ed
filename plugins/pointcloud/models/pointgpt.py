"""PointGPT (Chen et al., NeurIPS 2023): patches in a walk over the cloud, through causal blocks.

    order = centre 0, then always the nearest centre left        (Grouping with order="walk")
    x     = [start ; class ; tokens]                             [B, 2 + G, D]
    x     = LN1(x + pos);  x = x + Attention(x);  x = x + MLP(LN2(x))        for every block, causal
    feature = [class ; max over patches] of LNc(LNf(x))          [B, 2D]

The residual carries LN1's output. Positions are sines and cosines of the coordinates, without parameters.

Two things are as in the official code, because its weights know nothing else. Its call hands 1.0 over as the
temperature of the sines, so all frequencies are one (``temperature``). And the classifier stacks the positions in the
order [class ; start ; patches], so that the start token gets the class position and the class token the start's
(``swapped_positions``). The generator that predicts patches in pre-training, and as an auxiliary loss in the official
fine-tuning, is left out; a checkpoint's keys of it are reported as not used.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_suite.edits import Beside
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.layers import Attention, DropPath, Entry, Pool, growing, new_token
from peft_suite.pointcloud.models.tokenizer import MiniPointNet
from peft_suite.pointcloud.models.transformer import check_sizes, classifier

__all__ = ["Extractor", "GPTBlock", "PointGPT", "SinePosition", "gpt_block_forward"]


class SinePosition(nn.Module):
    """``[..., 3] -> [..., D]``: F = D // 3 // 2 * 2 features per axis, zeros to fill up D.

    ``sin(2 pi x / t^(2 floor(i/2) / F))`` on even i, cos on odd i, with the temperature t.
    """

    def __init__(self, dim: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.dim, self.temperature = dim, temperature

    def forward(self, xyz: Tensor) -> Tensor:
        """``xyz: [..., 3]``."""
        features = self.dim // 3 // 2 * 2
        i = torch.arange(features, device=xyz.device, dtype=torch.float32)
        period = self.temperature ** (2 * torch.div(i, 2, rounding_mode="trunc") / features)
        angle = (xyz.float() * (2 * math.pi)).unsqueeze(-1) / period  # [..., 3, F]
        waves = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-3)
        return F.pad(waves, (0, self.dim - 3 * features)).to(xyz.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, temperature={self.temperature:g}"


class GPTBlock(nn.Module):
    """One block; see the module's text for the formulas."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, bias=True, causal=True)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """``x, pos: [B, N, D] -> [B, N, D]``."""
        x = self.ln_1(x + pos)
        x = x + self.drop_path1(self.attn(x))
        x = x + self.drop_path2(self.mlp(self.ln_2(x)))
        return x


def gpt_block_forward(block: Any, beside: Beside, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
    """The described forward of :class:`GPTBlock`, with the places of a plain block."""
    geometry = geometry.adding()
    x, pos = beside.through("tokens", x, pos, context=geometry)
    x = x + pos
    n = block.ln_1(x)
    y, n = beside.through("attn_out", block.attn(n), n, context=geometry)
    x = beside.attn(x, n + block.drop_path1(y), n, geometry)
    n = block.ln_2(x)
    y, n = beside.through("mlp_out", block.mlp(n), n, context=geometry)
    x = beside.mlp(x, x + block.drop_path2(y), n, geometry)
    return beside.through("end", x, context=geometry)[0]


class Extractor(nn.Module):
    """Start token, blocks, norms and head, under the names of the official state dict."""

    def __init__(self, dim: int, num_heads: int, rates: list[float], head: str, num_classes: int) -> None:
        super().__init__()
        self.sos = nn.Parameter(torch.randn(dim))
        self.embed = nn.Identity()  # [B, 2 + G, D]: what enters block 0
        self.entry = Entry()
        self.layers = nn.ModuleList(GPTBlock(dim, num_heads, rate) for rate in rates)
        self.ln_f = nn.LayerNorm(dim)
        self.cls_norm = nn.LayerNorm(dim)
        self.pool = Pool(prefix=1, skip=1)
        self.cls_head_finetune = classifier(head, 2 * dim, num_classes)
        self.checkpointing = False

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """``x: [B, 1 + G, D]`` without, ``pos: [B, 2 + G, D]`` with the start's; logits."""
        feature = self.pool(self.forward_tokens(x, pos, geometry), geometry)
        logits: Tensor = self.cls_head_finetune(feature)
        return logits

    def forward_tokens(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """Normed tokens ``[B, 2 + G, D]``."""
        x = self.embed(torch.cat((self.sos.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1))
        x, pos, geometry = self.entry(x, pos, geometry)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, pos, geometry, use_reentrant=False)
            else:
                x = layer(x, pos, geometry)
        out: Tensor = self.cls_norm(self.ln_f(x))
        return out


class PointGPT(nn.Module):
    """Classifier of clouds: ``[B, N, 3] -> [B, num_classes]``.

    Args:
        large_encoder: the wider mini-PointNet of PointGPT-B and L.
        fresh_tokens: the class token and its position are not in the checkpoint, so every method trains them.
        temperature, swapped_positions: see the module's text.

    Other arguments as for :class:`peft_suite.pointcloud.models.transformer.PointTransformer`; the official code has no
    drop path here.
    """

    def __init__(
        self,
        num_classes: int = 40,
        *,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        groups: int = 64,
        group_size: int = 32,
        channels: int = 3,
        large_encoder: bool = False,
        drop_path: float = 0.0,
        head: Literal["mlp", "short", "linear"] = "mlp",
        fresh_tokens: bool = True,
        temperature: float = 1.0,
        swapped_positions: bool = True,
        rule: Literal["standard", "pointnet2"] = "pointnet2",
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth, groups, group_size, channels, drop_path)
        self.embed_dim, self.fresh_tokens, self.swapped_positions = embed_dim, fresh_tokens, swapped_positions
        self.group_divider = Grouping(groups, group_size, order="walk", rule=rule)
        self.encoder = MiniPointNet(embed_dim, channels, large_encoder)
        self.cls_token, self.cls_pos = new_token(embed_dim), new_token(embed_dim)
        self.sos_pos = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = SinePosition(embed_dim, temperature)
        rates = growing(drop_path, depth)
        self.blocks = Extractor(embed_dim, num_heads, rates, head, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """``points: [B, N, 3 + C]``."""
        geometry = self.group_divider(points)
        logits: Tensor = self.blocks(*self._sequence(geometry), geometry)
        return logits

    def forward_features(self, points: Tensor) -> Tensor:
        """Normed tokens ``[B, 2 + G, D]``."""
        geometry = self.group_divider(points)
        return self.blocks.forward_tokens(*self._sequence(geometry), geometry)

    def _sequence(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        batch, dtype = geometry.centers.shape[0], self.cls_token.dtype
        tokens = self.encoder(geometry.groups.to(dtype))
        of_patches = self.pos_embed(geometry.centers).to(tokens.dtype)
        first = (self.cls_pos, self.sos_pos) if self.swapped_positions else (self.sos_pos, self.cls_pos)
        of_first = torch.cat(first, dim=1).expand(batch, -1, -1).to(tokens.dtype)
        x = torch.cat((self.cls_token.expand(batch, -1, -1).to(tokens.dtype), tokens), dim=1)
        return x, torch.cat((of_first, of_patches), dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        self.blocks.checkpointing = enable
