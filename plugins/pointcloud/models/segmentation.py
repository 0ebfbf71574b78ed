"""Part segmentation with the plain point transformer, as in Point-MAE (ShapeNetPart).

    X      = [norm(x_a) ; norm(x_b) ; norm(x_c)]                three blocks' outputs         [B, G, 3D]
    cloud  = [max X ; mean X ; label embedding]                                               [B, 6D + 64]
    f      = ReLU BN W2 ReLU BN W1 [points ; X interpolated]    from centres to points        [B, N, 1024]
    parts  = W5 ReLU BN W4 dropout ReLU BN W3 [f ; cloud]                                     [B, N, P]

There is no class token. Two exact rewritings: W1 acts on the G centres before the interpolation instead of on the N
points after it (both are linear), and W3 acts on the cloud's vector once instead of beside every point. Point-BERT's
head is :class:`peft_suite.pointcloud.models.bert_parts.BertPartSegmenter`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.edits import Beside
from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.layers import Block, growing
from peft_suite.pointcloud.models.tokenizer import MiniPointNet, Pointwise, pointwise
from peft_suite.pointcloud.models.transformer import Blocks, check_sizes, position_mlp

__all__ = [
    "Carried",
    "Embedded",
    "PartSegmenter",
    "Propagation",
    "Summary",
    "WithCloud",
    "carried",
    "check_parts",
    "one_hot",
    "over_points",
    "summary_forward",
    "with_cloud",
]


class Carried(Pointwise):
    """``W [cloud ; points ; features interpolated from centres to points]``; see :func:`carried`."""

    further_inputs = True

    def forward(  # type: ignore[override]
        self, x: Tensor, points: Tensor, centers: Tensor, cloud: Tensor | None = None
    ) -> Tensor:
        """``x: [B, G, C], points: [B, N, 3], centers: [B, G, 3] -> [B, N, out]``; ``cloud: [B, C']`` or none."""
        return carried(self, x, self.weight, self.bias, points, centers, cloud)


class WithCloud(Pointwise):
    """``W [x ; cloud]`` with one vector per cloud beside every point; see :func:`with_cloud`."""

    further_inputs = True

    def forward(self, x: Tensor, cloud: Tensor) -> Tensor:  # type: ignore[override]
        """``x: [B, N, C], cloud: [B, C'] -> [B, N, out]``."""
        return with_cloud(self, x, self.weight, self.bias, cloud)


def carried(
    module: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    points: Tensor,
    centers: Tensor,
    cloud: Tensor | None = None,
) -> Tensor:
    """The matrix acts on the centres' features, the result is carried to the points by inverse squared distance."""
    assert weight is not None
    first = 0 if cloud is None else cloud.shape[1]
    of_cloud, of_point, of_feature = weight.squeeze(-1).tensor_split((first, first + 3), dim=1)
    wide = kernels.interpolate(points, centers, F.linear(x, of_feature), k=min(3, centers.shape[1]), power=2)
    out = wide.to(x.dtype) + F.linear(points.to(x.dtype), of_point, bias)
    return out if cloud is None else out + F.linear(cloud.to(x.dtype), of_cloud).unsqueeze(1)


def with_cloud(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, cloud: Tensor) -> Tensor:
    """The matrix's second part acts once per cloud."""
    assert weight is not None
    of_point, of_cloud = weight.squeeze(-1).tensor_split((x.shape[-1],), dim=1)
    return F.linear(x, of_point) + F.linear(cloud, of_cloud, bias).unsqueeze(1)


class Propagation(nn.Module):
    """From the centres' features to the points': ``[B, G, C] -> [B, N, widths[1]]``.

    ``beside``: numbers that come before the features: the 3 coordinates, and what is known of the whole cloud.
    """

    def __init__(self, features: int, widths: tuple[int, int] = (1536, 1024), beside: int = 3) -> None:
        super().__init__()
        self.mlp_convs = nn.ModuleList((Carried(beside + features, widths[0]), Pointwise(*widths)))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, x: Tensor, points: Tensor, centers: Tensor, cloud: Tensor | None = None) -> Tensor:
        """``x: [B, G, C]``, ``points: [B, N, 3]``, ``centers: [B, G, 3]``, ``cloud: [B, beside - 3]`` or none."""
        x = self.mlp_convs[0](x, points, centers, cloud)
        x = F.relu(over_points(self.mlp_bns[0], x))
        return F.relu(over_points(self.mlp_bns[1], self.mlp_convs[1](x)))


class Summary(nn.Module):
    """Features of the patches and of the whole cloud: ``x: [B, G, 3D] -> x, [max ; mean]: [B, 6D]``; no parameters.

    ``taps``: the blocks that the features come from.
    """

    def __init__(self, taps: tuple[int, int, int]) -> None:
        super().__init__()
        self.taps = taps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, G, 3D]``."""
        return x, torch.cat((x.amax(1), x.mean(1)), dim=1)


def summary_forward(summary: Any, beside: Beside, x: Tensor) -> tuple[Tensor, Tensor]:
    """The described forward of :class:`Summary`: at "summary", parts get and give tokens and the cloud's features."""
    tokens, cloud = beside.through("summary", *Summary.forward(summary, x))
    return tokens, cloud


class PartSegmenter(nn.Module):
    """Parts of clouds: ``points [B, N, 3], category [B] -> [B, N, num_parts]``.

    Args:
        num_parts: P, parts of all categories together.
        categories: the cloud's category enters as a one-hot vector of this length; 0 for none.
        taps: blocks whose outputs are used, from 0; None for the ends of the three thirds (3, 7, 11 of 12).
        groups, group_size: G = 128 and S = 32 on 2048 points.

    Other arguments as for :class:`peft_suite.pointcloud.models.transformer.PointTransformer`.
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
        channels: int = 3,
        drop_path: float = 0.1,
        taps: tuple[int, int, int] | None = None,
        rule: Literal["standard", "pointnet2"] = "pointnet2",
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth, groups, group_size, channels, drop_path)
        self.taps = check_parts(categories, taps, depth)
        self.embed_dim, self.categories = embed_dim, categories
        self.group_divider = Grouping(groups, group_size, rule=rule)
        self.encoder = MiniPointNet(embed_dim, channels)
        self.pos_embed = position_mlp(embed_dim)
        self.embed = nn.Identity()  # [B, G, D]: what enters block 0
        self.blocks = Blocks([Block(embed_dim, num_heads, rate) for rate in growing(drop_path, depth)])
        self.norm = nn.LayerNorm(embed_dim)
        self.label_conv = (
            nn.Sequential(Embedded(categories, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2)) if categories else None
        )
        self.summary = Summary(self.taps)
        self.propagation_0 = Propagation(3 * embed_dim)
        self.convs1 = WithCloud(1024 + 6 * embed_dim + (64 if categories else 0), 512)
        self.bns1, self.dp1 = nn.BatchNorm1d(512), nn.Dropout(0.5)
        self.convs2, self.bns2 = Pointwise(512, 256), nn.BatchNorm1d(256)
        self.convs3 = Pointwise(256, num_parts)

    def forward(self, points: Tensor, category: Tensor | None = None) -> Tensor:
        """``points: [B, N, 3 + C]``, ``category: [B]`` int64; without it the one-hot vector is zero. Logits.

        Raises:
            DataError: the categories' shape does not fit.
        """
        geometry = self.group_divider(points)
        x, cloud = self.summary(torch.cat(self.forward_taps(geometry), dim=2))
        if self.label_conv is not None:
            cloud = torch.cat((cloud, self.label_conv(one_hot(category, self.categories, x))), dim=1)
        f = self.propagation_0(x, geometry.points, geometry.centers)
        f = self.dp1(F.relu(over_points(self.bns1, self.convs1(f, cloud))))
        f = F.relu(over_points(self.bns2, self.convs2(f)))
        parts: Tensor = self.convs3(f)
        return parts

    def forward_taps(self, geometry: Geometry) -> list[Tensor]:
        """Normed outputs of the three blocks, ``[B, G, D]`` each."""
        dtype = self.norm.weight.dtype
        x = self.embed(self.encoder(geometry.groups.to(dtype)))
        pos = self.pos_embed(geometry.centers.to(dtype))
        outputs = self.blocks.every(x, pos, geometry)
        return [self.norm(outputs[t]) for t in self.taps]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        self.blocks.checkpointing = enable


def check_parts(categories: int, taps: tuple[int, int, int] | None, depth: int) -> tuple[int, int, int]:
    """The blocks that the head reads; ConfigError for what no model can have."""
    found = taps or tuple(max(depth * third // 3 - 1, 0) for third in (1, 2, 3))
    if categories < 0 or len(found) != 3 or not all(0 <= t < depth for t in found):
        raise ConfigError(
            f"categories = {categories}, taps = {found}: no negative number of categories, and three of the "
            f"blocks 0 to {depth - 1}."
        )
    return found[0], found[1], found[2]


def one_hot(category: Tensor | None, categories: int, like: Tensor) -> Tensor:
    """``[B] -> [B, categories]``, zeros for None.

    Raises:
        DataError: not one number per cloud.
    """
    if category is None:
        return like.new_zeros(len(like), categories)
    if category.shape != (len(like),):
        raise DataError(f"category has shape {list(category.shape)}; one number per cloud, [{len(like)}], is needed.")
    return F.one_hot(category.long(), categories).to(like.dtype)


class Embedded(nn.Module):
    """A kernel-1 convolution without bias, ``[B, in] -> [B, out]``; its weight has the shape of a Conv1d's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(outputs, inputs, 1), a=5**0.5))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, in]``."""
        return pointwise(self, x, self.weight, None)


def over_points(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm over all points of all clouds: ``[B, N, C]``."""
    normed: Tensor = norm(x.flatten(0, 1))
    return normed.view(x.shape)
