"""ReCon (Qi et al., ICML 2023): three query tokens read the patches by cross-attention; the patches never see them.

    q, v = LN1c(q + pos), LN1(v + pos)                       q: [B, 3, D]   v: [B, G, D]
    q = q + CrossAttention(q, v)      v = v + Attention(v)
    q, v = LN2c(q), LN2(v)
    q = q + MLPc(q)                   v = v + MLP(v)
    feature = [class ; image ; text ; max over patches] of norm([q ; v])      [B, 4D]

The residual carries the normalised tensors, unlike in a pre-norm block. The PEFT papers load ReCon's weights into plain
blocks instead; that is :class:`peft_suite.pointcloud.models.transformer.PointTransformer`, backbone "recon-plain".
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Beside
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.layers import Attention, DropPath, Mlp, Pool, growing, new_token
from peft_suite.pointcloud.models.tokenizer import MiniPointNet
from peft_suite.pointcloud.models.transformer import Blocks, check_sizes, classifier, position_mlp

__all__ = ["CrossAttention", "ReCon", "ReConBlock", "recon_block_forward"]

QUERIES = 3


class CrossAttention(nn.Module):
    """Queries ``[B, 3, D]`` read the patches ``[B, G, D]``; q and kv without bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """``[B, 3, D]``."""
        b, n, d = queries.shape
        width = d // self.num_heads
        q = self.q(queries).view(b, n, self.num_heads, width).transpose(1, 2)
        k, v = self.kv(patches).view(b, patches.shape[1], 2, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 3, head width]
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, n, d))
        return out


class ReConBlock(nn.Module):
    """One block; see the module's text for the formulas."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm1_contrast = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.attn_contrast = Attention(dim, num_heads), CrossAttention(dim, num_heads)
        self.drop_path1, self.drop_path1_contrast = DropPath(drop_path), DropPath(drop_path)
        self.norm2, self.norm2_contrast = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp, self.mlp_contrast = Mlp(dim), Mlp(dim)
        self.drop_path2, self.drop_path2_contrast = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """``x, pos: [B, 3 + G, D] -> [B, 3 + G, D]``."""
        x = x + pos
        q, v = self.norm1_contrast(x[:, :QUERIES]), self.norm1(x[:, QUERIES:])
        q, v = q + self.drop_path1_contrast(self.attn_contrast(q, v)), v + self.drop_path1(self.attn(v))
        q, v = self.norm2_contrast(q), self.norm2(v)
        q, v = q + self.drop_path2_contrast(self.mlp_contrast(q)), v + self.drop_path2(self.mlp(v))
        return torch.cat((q, v), dim=1)


def recon_block_forward(block: Any, beside: Beside, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
    """The described forward of :class:`ReConBlock`, with the places of a plain block; all see queries and patches."""
    geometry = geometry.adding()
    x, pos = beside.through("tokens", x, pos, context=geometry)
    x = x + pos
    q, v = block.norm1_contrast(x[:, :QUERIES]), block.norm1(x[:, QUERIES:])
    y, n = torch.cat((block.attn_contrast(q, v), block.attn(v)), dim=1), torch.cat((q, v), dim=1)
    y, n = beside.through("attn_out", y, n, context=geometry)
    y = torch.cat((block.drop_path1_contrast(y[:, :QUERIES]), block.drop_path1(y[:, QUERIES:])), dim=1)
    x = beside.attn(x, n + y, n, geometry)
    q, v = block.norm2_contrast(x[:, :QUERIES]), block.norm2(x[:, QUERIES:])
    y, n = torch.cat((block.mlp_contrast(q), block.mlp(v)), dim=1), torch.cat((q, v), dim=1)
    y, n = beside.through("mlp_out", y, n, context=geometry)
    y = torch.cat((block.drop_path2_contrast(y[:, :QUERIES]), block.drop_path2(y[:, QUERIES:])), dim=1)
    x = beside.mlp(x, n + y, n, geometry)
    return beside.through("end", x, context=geometry)[0]


class ReCon(nn.Module):
    """Classifier of clouds: ``[B, N, 3] -> [B, num_classes]``.

    Arguments as for :class:`peft_suite.pointcloud.models.transformer.PointTransformer`. ``fresh_tokens``: train the six
    query tokens and positions too; the checkpoint has them.
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
        drop_path: float = 0.2,
        head: Literal["mlp", "short", "linear"] = "mlp",
        fresh_tokens: bool = False,
        rule: Literal["standard", "pointnet2"] = "pointnet2",
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth, groups, group_size, channels, drop_path)
        self.embed_dim, self.fresh_tokens = embed_dim, fresh_tokens
        self.group_divider = Grouping(groups, group_size, rule=rule)
        self.encoder = MiniPointNet(embed_dim, channels)
        self.cls_token, self.img_token, self.text_token = (new_token(embed_dim) for _ in range(QUERIES))
        self.cls_pos, self.img_pos, self.text_pos = (new_token(embed_dim) for _ in range(QUERIES))
        self.pos_embed = position_mlp(embed_dim)
        self.embed = nn.Identity()  # [B, 3 + G, D]: what enters block 0
        rates = growing(drop_path, depth)
        self.blocks = Blocks([ReConBlock(embed_dim, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = Pool(prefix=QUERIES)
        self.cls_head_finetune = classifier(head, (QUERIES + 1) * embed_dim, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """``points: [B, N, 3 + C]``."""
        geometry = self.group_divider(points)
        logits: Tensor = self.cls_head_finetune(self.pool(self.forward_tokens(geometry), geometry))
        return logits

    def forward_features(self, points: Tensor) -> Tensor:
        """Normed tokens ``[B, 3 + G, D]``."""
        return self.forward_tokens(self.group_divider(points))

    def forward_tokens(self, geometry: Geometry) -> Tensor:
        """Normed tokens ``[B, 3 + G, D]`` of a geometry."""
        batch, dtype = geometry.centers.shape[0], self.cls_token.dtype
        tokens = self.encoder(geometry.groups.to(dtype))
        places = self.pos_embed(geometry.centers.to(dtype))
        queries = torch.cat((self.cls_token, self.img_token, self.text_token), dim=1).expand(batch, -1, -1)
        of_queries = torch.cat((self.cls_pos, self.img_pos, self.text_pos), dim=1).expand(batch, -1, -1)
        x = self.embed(torch.cat((queries.to(tokens.dtype), tokens), dim=1))
        pos = torch.cat((of_queries.to(places.dtype), places), dim=1)
        out: Tensor = self.norm(self.blocks(x, pos, geometry))
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        self.blocks.checkpointing = enable
