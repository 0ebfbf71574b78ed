"""The plain point transformer: classifier of Point-BERT (Yu et al., CVPR 2022), Point-MAE (Pang et al., ECCV 2022) and
ACT (Dong et al., ICLR 2023), and of the PEFT papers' ReCon.

    tokens  = mini-PointNet(groups)                    [B, G, D]
    pos     = MLP(centers)                             [B, G, D]
    x       = [class ; tokens]                         [B, 1 + G, D]
    x       = block(x + pos)  for every block
    feature = [x_class ; max over patches] of norm(x)  [B, 2D]
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_suite.errors import ConfigError
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.layers import Block, Entry, Pool, growing, mlp_head, new_token
from peft_suite.pointcloud.models.tokenizer import MiniPointNet

__all__ = ["Blocks", "PointTransformer", "position_mlp", "start_from_scratch"]


class Blocks(nn.Module):
    """The blocks in a row; each gets the stream, the positions and the geometry."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.entry = Entry()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointing = False

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """``x, pos: [B, N, D] -> [B, N, D]``."""
        return self.every(x, pos, geometry)[-1]

    def every(self, x: Tensor, pos: Tensor, geometry: Geometry) -> list[Tensor]:
        """The outputs of all blocks."""
        x, pos, geometry = self.entry(x, pos, geometry)
        outputs = []
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, pos, geometry, use_reentrant=False)
            else:
                x = block(x, pos, geometry)
            outputs.append(x)
        return outputs


class PointTransformer(nn.Module):
    """Classifier of clouds: ``[B, N, 3] -> [B, num_classes]``.

    Args:
        num_classes: outputs; 0 leaves the head away and gives the feature ``[B, 2D]``.
        embed_dim: D.
        depth: blocks.
        num_heads: attention heads, a divisor of D.
        groups: G, patches of a cloud.
        group_size: S, points of a patch.
        encoder_dim: width that the tokenizer gives; where it is not D, a Linear ``reduce_dim`` follows (Point-BERT).
        channels: of a point: 3 coordinates, and what comes with them (normals, colours).
        drop_path: of the last block; it grows linearly from 0.
        head: "mlp", three layers with batch norm; "short", Point-BERT's two without; "linear".
        fresh_tokens: the class token and its position are not in the checkpoint, so every method trains them.
        rule: of farthest point sampling, see :class:`peft_suite.pointcloud.models.geometry.Grouping`.
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
        encoder_dim: int | None = None,
        channels: int = 3,
        drop_path: float = 0.1,
        head: Literal["mlp", "short", "linear"] = "mlp",
        fresh_tokens: bool = True,
        rule: Literal["standard", "pointnet2"] = "pointnet2",
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth, groups, group_size, channels, drop_path)
        encoder_dim = encoder_dim or embed_dim
        self.embed_dim, self.fresh_tokens = embed_dim, fresh_tokens
        self.group_divider = Grouping(groups, group_size, rule=rule)
        self.encoder = MiniPointNet(encoder_dim, channels)
        self.reduce_dim = nn.Identity() if encoder_dim == embed_dim else nn.Linear(encoder_dim, embed_dim)
        self.cls_token, self.cls_pos = new_token(embed_dim), new_token(embed_dim)
        self.pos_embed = position_mlp(embed_dim)
        self.embed = nn.Identity()  # [B, 1 + G, D]: what enters block 0
        rates = growing(drop_path, depth)
        self.blocks = Blocks([Block(embed_dim, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = Pool(prefix=1)
        self.cls_head_finetune = classifier(head, 2 * embed_dim, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """``points: [B, N, 3 + C]``."""
        geometry = self.group_divider(points)
        feature = self.pool(self.forward_tokens(geometry), geometry)
        logits: Tensor = self.cls_head_finetune(feature)
        return logits

    def forward_features(self, points: Tensor) -> Tensor:
        """Normed tokens ``[B, 1 + G, D]``."""
        return self.forward_tokens(self.group_divider(points))

    def forward_tokens(self, geometry: Geometry) -> Tensor:
        """Normed tokens ``[B, 1 + G, D]`` of a geometry."""
        batch, dtype = geometry.centers.shape[0], self.cls_token.dtype
        tokens = self.reduce_dim(self.encoder(geometry.groups.to(dtype)))
        pos = self.pos_embed(geometry.centers.to(dtype))
        x = self.embed(torch.cat((self.cls_token.expand(batch, -1, -1).to(tokens.dtype), tokens), dim=1))
        pos = torch.cat((self.cls_pos.expand(batch, -1, -1).to(pos.dtype), pos), dim=1)
        out: Tensor = self.norm(self.blocks(x, pos, geometry))
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        self.blocks.checkpointing = enable


def position_mlp(dim: int) -> nn.Sequential:
    """Linear, GELU, Linear on the centres: ``[B, G, 3] -> [B, G, D]``."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


def classifier(kind: str, inputs: int, num_classes: int) -> nn.Module:
    """A head on features ``[B, inputs]``; none for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    if kind == "mlp":
        return mlp_head(inputs, num_classes)
    if kind == "short":
        return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, num_classes))
    if kind == "linear":
        return nn.Sequential(nn.Linear(inputs, num_classes))
    raise ConfigError(f"head = {kind!r}: choose 'mlp', 'short' or 'linear'.")


def check_sizes(
    embed_dim: int, num_heads: int, depth: int, groups: int, group_size: int, channels: int, drop_path: float
) -> None:
    """Raise ConfigError for sizes that no model can have."""
    for name, value in {"embed_dim": embed_dim, "num_heads": num_heads, "depth": depth, "groups": groups}.items():
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1.")
    if embed_dim % num_heads:
        raise ConfigError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}.")
    if group_size < 1 or channels < 3:
        raise ConfigError(f"group_size = {group_size} must be at least 1, channels = {channels} at least 3.")
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path = {drop_path}: must be at least 0 and below 1.")


def start_from_scratch(model: Any) -> None:
    """The family's initialisation for training without a checkpoint: truncated normal 0.02, biases 0.

    With a checkpoint, what it lacks keeps torch's defaults, as in the official code.
    """
    from peft_suite.pointcloud.models.tokenizer import Pointwise

    for module in model.modules():
        if isinstance(module, nn.Linear | Pointwise):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
