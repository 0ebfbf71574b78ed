"""Part segmentation with Point-BERT's head (Yu et al., CVPR 2022): features climb from the patches to the points.

    y_a, y_b, y_c = patches of norm(x) after three blocks                                 [B, G, D]
    L2, L1        = 256 and 512 farthest points of the cloud                              [B, 256, 3], [B, 512, 3]
    f2            = MLP [L2 ; y_b carried to L2]       f1 = MLP [L1 ; y_a carried to L1]   [B, 256, D], [B, 512, D]
    f2            = graph(from the patches' y_c, f2)   f1 = graph(from L2's f2, f1)
    f0            = MLP [category ; points ; f1 carried to the points]                    [B, N, D]
    parts         = W2 dropout ReLU BN W1 f0                                              [B, N, P]

``graph(v, u)`` is two edge layers over the k = 4 nearest nodes, first among the nodes with ``v``, then among its own:

    u_i = max over neighbours j of  LeakyReLU(GroupNorm(W [v_j - u_i ; u_i]))

With ``W = [W1 ; W2]`` an edge is ``W1 v_j + (W2 - W1) u_i``, two products of the nodes instead of one of every edge.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.layers import Block, growing, new_token
from peft_suite.pointcloud.models.segmentation import Propagation, check_parts, one_hot, over_points
from peft_suite.pointcloud.models.tokenizer import MiniPointNet, Pointwise
from peft_suite.pointcloud.models.transformer import Blocks, check_sizes, position_mlp

__all__ = ["BertPartSegmenter", "EdgeLayer", "Edges", "GraphUpsampling", "edges"]

INSIDE = 512  # channels between the two edge layers
GROUPS = 4  # of their group norms


class Edges(nn.Module):
    """``W [v_j - u_i ; u_i]`` over the neighbours j of every node i; the weight has a Conv2d's shape. No bias."""

    further_inputs = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(outputs, 2 * inputs, 1, 1), a=math.sqrt(5)))

    def forward(self, v: Tensor, u: Tensor, idx: Tensor) -> Tensor:
        """``v: [B, M, C], u: [B, N, C], idx: [B, N, k] -> [B, N, k, out]``."""
        return edges(self, v, self.weight, None, u, idx)


def edges(module: Any, v: Tensor, weight: Tensor | None, bias: Tensor | None, u: Tensor, idx: Tensor) -> Tensor:
    """:class:`Edges` with another weight."""
    assert weight is not None
    of_difference, of_node = weight.flatten(1).chunk(2, dim=1)
    near = kernels.group_points(F.linear(v, of_difference).contiguous(), idx)  # [B, N, k, out]
    return near + F.linear(u, of_node - of_difference, bias).unsqueeze(2)


class EdgeLayer(nn.Sequential):
    """Edges, their group norm, LeakyReLU, and the maximum over neighbours: ``[B, N, C] -> [B, N, out]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(Edges(inputs, outputs), nn.GroupNorm(GROUPS, outputs), nn.LeakyReLU(0.2))

    def forward(self, v: Tensor, u: Tensor, idx: Tensor) -> Tensor:  # type: ignore[override]
        """``v: [B, M, C], u: [B, N, C], idx: [B, N, k]``."""
        wide, norm, act = self
        x = wide(v, u, idx)
        normed = norm(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2)  # statistics over all edges of a cloud
        out: Tensor = act(normed).view(x.shape).amax(2)
        return out


class GraphUpsampling(nn.Module):
    """Features of coarse nodes into those of fine ones: ``[B, M, D], [B, N, D] -> [B, N, D]``."""

    def __init__(self, dim: int, neighbors: int = 4) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.layer1, self.layer2 = EdgeLayer(dim, INSIDE), EdgeLayer(INSIDE, dim)

    def forward(self, places: Tensor, v: Tensor, fine: Tensor, u: Tensor) -> Tensor:
        """``places: [B, M, 3]`` of ``v``, ``fine: [B, N, 3]`` of ``u``."""
        u = self.layer1(v, u, self._near(fine, places))
        out: Tensor = self.layer2(u, u, self._near(fine, fine))
        return out

    @torch.no_grad()
    def _near(self, queries: Tensor, among: Tensor) -> Tensor:
        return kernels.knn(queries, among, min(self.neighbors, among.shape[1]), return_dists=False).idx


class BertPartSegmenter(nn.Module):
    """Parts of clouds: ``points [B, N, 3], category [B] -> [B, N, num_parts]``.

    Args:
        num_parts: P, parts of all categories together.
        categories: the cloud's category enters as a one-hot vector of this length; 0 for none.
        levels: farthest points of the finer and the coarser level; clouds need as many points.
        taps: blocks whose outputs are used, from 0; None for the ends of the three thirds (3, 7, 11 of 12).
        encoder_dim: width that the tokenizer gives; ``reduce_dim`` takes it to D.

    Other arguments as for :class:`peft_suite.pointcloud.models.transformer.PointTransformer`. The class token is the
    checkpoint's; the head does not read it, but the patches do.
    """

    def __init__(
        self,
        num_parts: int = 50,
        *,
        categories: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        groups: int = 128,
        group_size: int = 32,
        encoder_dim: int = 256,
        channels: int = 3,
        drop_path: float = 0.1,
        levels: tuple[int, int] = (512, 256),
        taps: tuple[int, int, int] | None = None,
        rule: Literal["standard", "pointnet2"] = "pointnet2",
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth, groups, group_size, channels, drop_path)
        self.taps = check_parts(categories, taps, depth)
        if embed_dim % GROUPS or len(levels) != 2 or not levels[0] >= levels[1] >= 1:
            raise ConfigError(
                f"embed_dim = {embed_dim}, levels = {tuple(levels)}: the width must be a multiple of {GROUPS}, and the "
                "levels two numbers of points, the larger first."
            )
        self.embed_dim, self.categories, self.levels = embed_dim, categories, (int(levels[0]), int(levels[1]))
        self.group_divider = Grouping(groups, group_size, rule=rule)
        self.encoder = MiniPointNet(encoder_dim, channels)
        self.reduce_dim = nn.Linear(encoder_dim, embed_dim)
        self.cls_token, self.cls_pos = new_token(embed_dim), new_token(embed_dim)
        self.pos_embed = position_mlp(embed_dim)
        self.embed = nn.Identity()  # [B, 1 + G, D]: what enters block 0
        self.blocks = Blocks([Block(embed_dim, num_heads, rate) for rate in growing(drop_path, depth)])
        self.norm = nn.LayerNorm(embed_dim)
        widths = (4 * embed_dim, embed_dim)
        self.propagation_2, self.propagation_1 = Propagation(embed_dim, widths), Propagation(embed_dim, widths)
        self.propagation_0 = Propagation(embed_dim, widths, beside=3 + categories)
        self.dgcnn_pro_2, self.dgcnn_pro_1 = GraphUpsampling(embed_dim), GraphUpsampling(embed_dim)
        self.conv1, self.bn1, self.drop1 = Pointwise(embed_dim, 128), nn.BatchNorm1d(128), nn.Dropout(0.5)
        self.conv2 = Pointwise(128, num_parts)

    def forward(self, points: Tensor, category: Tensor | None = None) -> Tensor:
        """``points: [B, N, 3 + C]``, ``category: [B]`` int64; without it the one-hot vector is zero. Logits.

        Raises:
            DataError: the categories' shape does not fit, or fewer points than the finer level needs.
        """
        if points.ndim == 3 and points.shape[1] < self.levels[0]:
            raise DataError(
                f"A cloud of {points.shape[1]} points has no level of {self.levels[0]}. Sample more points, or build "
                "the backbone with smaller levels."
            )
        geometry = self.group_divider(points)
        early, middle, late = self.forward_taps(geometry)
        fine, coarse = (self._level(geometry.points, count) for count in self.levels)
        f2 = self.propagation_2(middle, coarse, geometry.centers)
        f1 = self.propagation_1(early, fine, geometry.centers)
        f2 = self.dgcnn_pro_2(geometry.centers, late, coarse, f2)
        f1 = self.dgcnn_pro_1(coarse, f2, fine, f1)
        known = one_hot(category, self.categories, f1) if self.categories else None
        f0 = self.propagation_0(f1, geometry.points, fine, known)
        parts: Tensor = self.conv2(self.drop1(F.relu(over_points(self.bn1, self.conv1(f0)))))
        return parts

    def forward_taps(self, geometry: Geometry) -> list[Tensor]:
        """Normed patches of the three blocks, ``[B, G, D]`` each."""
        batch, dtype = len(geometry.centers), self.cls_token.dtype
        tokens = self.reduce_dim(self.encoder(geometry.groups.to(dtype)))
        pos = self.pos_embed(geometry.centers.to(dtype))
        x = self.embed(torch.cat((self.cls_token.expand(batch, -1, -1).to(tokens.dtype), tokens), dim=1))
        pos = torch.cat((self.cls_pos.expand(batch, -1, -1).to(pos.dtype), pos), dim=1)
        outputs = self.blocks.every(x, pos, geometry)
        return [self.norm(outputs[t])[:, 1:] for t in self.taps]

    @torch.no_grad()
    def _level(self, points: Tensor, count: int) -> Tensor:
        """Farthest points ``[B, count, 3]``."""
        picks = kernels.farthest_point_sampling(points, count, rule=self.group_divider.rule)
        return kernels.gather_points(points, picks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        self.blocks.checkpointing = enable
