"""Parts of Point-PEFT: the learned places, the memory bank, the prompts and the geometry-aware adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.edits import Part, Trained
from peft_suite.pointcloud.methods.frozen import FrozenView
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.layers import DropPath

PLACES, CACHE = "point_peft_places", "point_peft_cache"  # entries of the geometry's extra


class Around(NamedTuple):
    """Neighbourhoods of patches: M of them with S patches each; 1 table or one per cloud.

    Attributes:
        near: ``[B or 1, M, S]``, rows that form a neighbourhood.
        middle: ``[B or 1, M]``, the row it is around.
        weights: ``[B, G, M]``, how much every patch takes from every neighbourhood.
    """

    near: Tensor
    middle: Tensor
    weights: Tensor


class Places(NamedTuple):
    """Neighbourhoods of the prompted and of the other blocks, made once per forward. They live in the geometry.

    ``counted`` names blocks whose batch statistics have moved in this forward: what checkpointing computes again in
    backward meets the same set, and does not move them twice.
    """

    early: Around
    late: Around
    counted: set[int]


class Locate(Part):
    """Learned coordinates of T prompts: the cloud with them in front is sampled again; both samplings c are grouped.

    ``c2 = half of c, farthest first; near = the S nearest c of every c2;  weights ∝ 1 / (|c - c2|² + 1e-8)``.
    """

    def __init__(self, count: int, grouping: Grouping, official: bool) -> None:
        super().__init__()
        self.grouping = Grouping(grouping.groups, grouping.size, grouping.order, grouping.rule)
        self.official = official
        self.coordinates = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, 3), std=0.02))

    def forward(self, geometry: Geometry) -> Geometry:
        """Adds the entry "point_peft_places"."""
        points = geometry.points
        own = self.coordinates.to(points.dtype).expand(points.shape[0], -1, -1)
        cloud = torch.cat((own, points), dim=1)
        early = self.around(kernels.gather_points(cloud, self.grouping.sample(cloud.detach())))
        if self.official:  # rows of a batch of G each, although G + T tokens of a cloud lie there
            first = torch.arange(points.shape[0], device=points.device) * self.grouping.groups
            near, middle = early.near + first[:, None, None], early.middle + first[:, None]
            early = Around(near.flatten(0, 1)[None], middle.flatten()[None], early.weights)
        return geometry.adding(**{PLACES: Places(early, self.around(geometry.centers), set())})

    def around(self, centers: Tensor) -> Around:
        """``c: [B, G, 3]``."""
        g, rule = centers.shape[1], self.grouping.rule
        with torch.no_grad():
            middle = kernels.farthest_point_sampling(centers.detach(), g // 2, rule=rule)
            some = kernels.gather_points(centers.detach(), middle)
            near = kernels.knn(some, centers.detach(), min(self.grouping.size // 2, g), return_dists=False).idx
        gaps = (centers[:, :, None] - kernels.gather_points(centers, middle)[:, None]).square().sum(-1)
        weights = 1 / (gaps + 1e-8)
        return Around(near, middle, weights / weights.sum(2, keepdim=True))


class Enough(Exception):  # noqa: N818 - a signal, not an error
    """The feature of the frozen model is there; the rest of this forward is not needed."""


class Bank(Part):
    """Features of the training clouds and what the current ones recall of them, where the stream enters the blocks.

    ``f = max over patches of norm(frozen blocks(patches))``; rows m_k of the K most similar by cosine,
    ``w = softmax(similarities)``; cache ``[f ; Σ w_k m_k ; m_1 .. m_K]``, all without gradients.

    The frozen blocks see the patches alone, as in pre-training, so that f depends on nothing that is trained.
    """

    memory: Tensor
    length: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        recalled: int,
        blocks: Sequence[FrozenView],
        norm: FrozenView,
        skip: int,
        prefix: int,
        official: bool,
    ) -> None:
        super().__init__()
        self.blocks, self.norm = tuple(blocks), (norm,)  # tuples: the backbone's, outside the module tree
        self.recalled, self.skip, self.prefix, self.official = recalled, skip, prefix, official
        self.register_buffer("memory", torch.zeros(size, dim))
        self.register_buffer("length", torch.ones(size))
        self.watch: Callable[[Tensor], None] | None = None

    def fill(self, memory: Tensor) -> None:
        """``memory: [M, D]``."""
        self.memory.copy_(memory)
        self.length.copy_(torch.ones(len(memory)) if self.official else memory.norm(dim=1).clamp_min(1e-12))

    def forward(self, entering: tuple[Tensor, Tensor, Geometry]) -> tuple[Tensor, Tensor, Geometry]:
        """``x, pos: [B, N, D]`` and the geometry, which gets the cache, ``[B, 2 + K, D]``."""
        x, pos, geometry = entering
        with torch.no_grad():
            f = self.feature(x, pos, geometry)
            if self.watch is not None:
                self.watch(f)
                raise Enough
            return x, pos, geometry.adding(**{CACHE: self.recall(f)})

    def feature(self, x: Tensor, pos: Tensor, geometry: Geometry) -> Tensor:
        """f, ``[B, D]``."""
        h, pos = x[:, self.skip :], pos[:, self.skip :]
        for block in self.blocks:
            h = block(h, pos, geometry)
        feature: Tensor = self.norm[0](h[:, self.prefix - self.skip :]).amax(1)
        return feature

    def recall(self, f: Tensor) -> Tensor:
        """``f: [B, D] -> [B, 2 + K, D]``. An empty bank (before calibration) recalls f itself."""
        f = f.to(self.memory.dtype)
        if not len(self.memory):
            return f[:, None].expand(-1, 2 + self.recalled, -1)
        with torch.autocast(f.device.type, enabled=False):  # rounded similarities would choose other rows
            similar = (f / f.norm(dim=1, keepdim=True)) @ self.memory.T / self.length
        best = similar.topk(self.recalled, dim=1)
        rows = self.memory[best.indices]  # [B, K, D]
        mean = best.values.softmax(1)[:, None] @ rows
        return torch.cat((f[:, None], mean.to(rows.dtype), rows), dim=1)


class Bottleneck(nn.Module):
    """``W2 drop(q(W1 x + b1)) + b2`` with ``q(x) = x sigmoid(1.702 x)``."""

    def __init__(self, dim: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.ln1, self.ln2, self.dropout = nn.Linear(dim, rank), nn.Linear(rank, dim), nn.Dropout(dropout)
        for linear in (self.ln1, self.ln2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., D]``."""
        h = self.ln1(x)
        out: Tensor = self.ln2(self.dropout(h * torch.sigmoid(1.702 * h)))
        return out


class Prompts(Part):
    """``P = drop(E) + cache + A(cache)``, put behind the prefix without a position."""

    needs_context = True

    def __init__(self, dim: int, count: int, prefix: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.prefix = prefix
        self.prompt = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, dim), std=0.02))
        self.adapter = Bottleneck(dim, rank, dropout)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """``x, pos: [B, N, D] -> [B, N + T, D]``."""
        cache = geometry.extra[CACHE]
        prompt = self.dropout(self.prompt.expand(x.shape[0], -1, -1)) + cache + self.adapter(cache)
        nowhere = torch.zeros_like(prompt, dtype=pos.dtype)
        k = self.prefix
        return torch.cat((x[:, :k], prompt, x[:, k:]), 1), torch.cat((pos[:, :k], nowhere, pos[:, k:]), 1)


class Undropped(Part):
    """The attention's branch is never dropped: what entered drop path leaves it."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y, x: [B, N, D]``."""
        return x


class Apart(Trained):
    """Trained biases and norms of blocks that never fold: the memory is of the frozen blocks, which keep their own."""

    foldable = False


class OfMlp(Part):
    """``u + scale · A(u)`` for what the MLP adds."""

    def __init__(self, dim: int, rank: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.adapter, self.scale = Bottleneck(dim, rank, dropout), scale

    def forward(self, u: Tensor) -> Tensor:
        """``u: [B, N, D]``."""
        out: Tensor = u + self.scale * self.adapter(u)
        return out


class Mixing(nn.Module):
    """Attention inside neighbourhoods, of narrow heads: ``n + drop path(attention(norm n))``, then the maximum.

    Norm and qkv act on single rows, so both are computed once per row and gathered after, and the maximum keeps its
    places instead of its input: nothing of the neighbourhoods' full width ``[B, M, S, D]`` is kept for backward.
    """

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.norm3 = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * width, bias=False), nn.Linear(width, dim)

    def forward(self, rows: Tensor, near: Tensor, drop_path: DropPath) -> Tensor:
        """``rows: [T, R, D], near: [T, M, S] -> [T, M, D]``."""
        t, m, s = near.shape
        qkv = kernels.group_points(self.qkv(self.norm3(rows)), near)  # [T, M, S, 3 width]
        q, k, v = qkv.view(t * m, s, 3, self.heads, self.width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.width**-0.5)  # [T M, heads, S, head width]
        n = drop_path(self.proj(mixed.transpose(1, 2).reshape(t * m, s, self.width)))
        together = n.view(t, m, s, -1) + kernels.group_points(rows, near)
        pooled: Tensor = together.max(2).values
        return pooled


class Aggregate(Part):
    """The geometry-aware adapter, and the bottleneck behind it; takes the T prompts off.

    ``v = gelu(BN(mixing(X))) + c X[middle];  X = X + p · weights v;  z = z + A([prefix ; X])``
    """

    needs_context = True

    def __init__(
        self, index: int, dim: int, prefix: int, prompts: int, mixing: Mixing, drop_path: float, config: Any
    ) -> None:
        super().__init__()
        self.index, self.prefix, self.prompts = index, prefix, prompts
        self.propagate, self.middle, self.official = config.propagate, config.center, config.official
        self.mixing = mixing if index == 0 else None  # all blocks use the first one's
        self.shared = (mixing,)
        self.norm = nn.BatchNorm1d(dim)
        self.drop_path = DropPath(drop_path)
        self.adapter = Bottleneck(dim, config.bottleneck, config.dropout)

    def forward(self, x: Tensor, geometry: Geometry) -> tuple[Tensor]:
        """``x: [B, P + T + G, D] -> [B, P + G, D]``."""
        once: Places = geometry.extra[PLACES]
        around = once.early if self.prompts else once.late
        patches = x[:, self.prefix + self.prompts :]
        rows = x[:, self.prefix :] if self.official else patches
        rows = rows.reshape(around.near.shape[0], -1, x.shape[2])
        v = self.shared[0](rows, around.near, self.drop_path)
        v = F.gelu(self.normed(v.flatten(0, 1), once)).view(v.shape)
        v = (v + self.middle * kernels.gather_points(rows, around.middle)).view(x.shape[0], -1, x.shape[2])
        patches = patches + self.propagate * (around.weights.to(v.dtype) @ v)
        x = torch.cat((x[:, : self.prefix], patches), dim=1)
        return (x + self.adapter(x),)

    def normed(self, v: Tensor, once: Places) -> Tensor:
        """Batch norm whose statistics move once per forward, also when checkpointing computes the block again."""
        norm, momentum = self.norm, 0.0
        if self.training and (torch.compiler.is_compiling() or self.index not in once.counted):
            if not torch.compiler.is_compiling():  # a compiled backward never moves statistics
                once.counted.add(self.index)
            norm.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
            momentum = norm.momentum or 0.0
        return F.batch_norm(
            v, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, momentum, norm.eps
        )


class Idle(Part):
    """Parameters that the published code counts and never uses. They add nothing; weight decay alone moves them."""

    def __init__(self, dim: int, prompts: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        if prompts:
            self.prompt = nn.Parameter(nn.init.trunc_normal_(torch.empty(prompts, dim), std=0.02))
            self.adapter = Bottleneck(dim, rank, dropout)

    def forward(self, y: Tensor) -> Tensor:
        """``y: [B, N, D]``."""
        return y + 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()
