"""PointGST (Liang et al., TPAMI 2025): adapt tokens in the spectrum of a graph over the patch centres.

Once per forward, from the centres c alone; d_ij are their distances and δ the smallest of a cloud:

    W = δ / d,  1 on the diagonal        L = I - D^-1/2 W D^-1/2        L = U diag(w) Uᵀ

and the same for every run of ``local`` centres along a z-curve. The columns of U are the graph's Fourier basis. Per
block, from the residual x between attention and MLP:

    h = W_d x                            [B, 1 + G, r]
    t = h of the patches                 [B, G, r]
    s = Uᵀ t                             the spectrum of the cloud, and of each run
    t' = U (s + silu(W_a LN(s)))         a norm each, W_a for both
    x + W_u (silu(h) + t'_cloud + t'_runs)     added behind the MLP; t' at patches only

W_u and W_a start at zero, so the model is the frozen one at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.anatomy import Anatomy, Point
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.pointcloud.models.geometry import Geometry, Grouping

KEY = "pointgst"  # of the geometry's extra entry


@dataclass(frozen=True)
class PointGSTConfig(MethodConfig):
    """PointGST.

    Attributes:
        rank: r, width of the bottleneck.
        local: centres of a run; the patches must divide into runs of this length.
        official: the published code's basis: distances in ``torch.cdist``'s form, which above 25 centres leaves
            rounding noise on the diagonal, δ the smallest distance of the whole batch, eigenvectors with the solver's
            signs, and U where Uᵀ belongs.
    """

    method: ClassVar[str] = "pointgst"
    rank: int = 36
    local: int = 32
    official: bool = False

    def validate(self) -> None:
        self.require("rank", self.rank >= 1, "must be at least 1")
        self.require("local", self.local >= 2, "must be at least 2")


class PointGST(Method[PointGSTConfig]):
    """One basis per forward, one adapter per block; ``r (2d + r + 6) + d`` parameters each."""

    config_class = PointGSTConfig
    examples = ("pointgst(rank=6, local=4)", "pointgst(rank=4, local=8, official=True)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_geometry=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the basis and the adapters.

        Raises:
            UnsupportedError: no point-cloud backbone, or its patches do not divide into runs.
        """
        paths, config = edit.having("geometry"), self.config
        if not paths:
            raise UnsupportedError(
                f"pointgst works on the patch centres of point clouds, and {anatomy.family} has none."
            )
        grouping = edit.module(paths[0])
        assert isinstance(grouping, Grouping)
        if grouping.groups % config.local:
            divisors = [n for n in range(2, grouping.groups + 1) if grouping.groups % n == 0]
            raise UnsupportedError(
                f"pointgst(local={config.local}) cuts the {grouping.groups} patches of a cloud into equal runs; "
                f"choose local among {', '.join(map(str, divisors)) or 'the divisors of more patches'}."
            )
        edit.inside(Point(paths[0], 3), "geometry", Spectrum(config.local, config.official), "pointgst")
        for block in anatomy.need_blocks("pointgst"):
            adapter = SpectralAdapter(block.point.width, config.rank, anatomy.prefix_tokens)
            edit.branch(block, "mlp", adapter, "pointgst")


class Spectrum(Part):
    """The transforms of a batch of clouds, ``[B, 2G, G]``: rows 0..G-1 to the spectrum of the cloud, the others to
    those of its runs, one run after the other."""

    def __init__(self, local: int, official: bool) -> None:
        super().__init__()
        self.local, self.official = local, official

    def forward(self, geometry: Geometry) -> Geometry:
        """Adds the entry "pointgst"."""
        with torch.no_grad():
            return geometry.adding(**{KEY: self.transforms(*self.bases(geometry.centers))})

    def bases(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c: [B, G, 3]`` to U ``[B, G, G]``, those of the runs ``[B, G/local, local, local]``, the z-order [B, G]."""
        b, g, _ = centers.shape
        order = kernels.morton_order(centers).order
        runs = kernels.gather_points(centers, order).view(b * g // self.local, self.local, 3)
        if self.official:
            whole, parts = (kernels.eigh_small(official_laplacian(c), sign="none")[1] for c in (centers, runs))
        else:
            whole, parts = (kernels.graph_fourier_basis(c).v for c in (centers, runs))
        return whole, parts.view(b, g // self.local, self.local, self.local), order

    def transforms(self, whole: Tensor, parts: Tensor, order: Tensor) -> Tensor:
        """Uᵀ of the cloud above those of the runs, whose columns are put where the sorted patches stand."""
        if not self.official:
            whole, parts = whole.mT, parts.mT
        b, runs, n, _ = parts.shape
        columns = order.view(b, runs, 1, n).expand(-1, -1, n, -1).reshape(b, runs * n, n)
        spread = torch.zeros_like(whole).scatter(2, columns, parts.reshape(b, runs * n, n))
        return torch.cat((whole, spread), dim=1)

    def extra_repr(self) -> str:
        return f"local={self.local}" + (", official" if self.official else "")


class SpectralAdapter(Part):
    """The adapter of one block. Global and local transforms are rows of one matrix, and all are orthogonal, so two
    batched products go there and back for both."""

    needs_context = True

    def __init__(self, dim: int, rank: int, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.down, self.up = nn.Linear(dim, rank), nn.Linear(rank, dim)
        self.mix = nn.Linear(rank, rank)
        self.norm_global, self.norm_local = nn.LayerNorm(rank), nn.LayerNorm(rank)
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in (self.up.weight, self.up.bias, self.mix.weight, self.mix.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """``x: [B, P + G, D]``, P tokens before the patches."""
        transforms = geometry.extra[KEY]
        g = transforms.shape[2]
        h = self.down(x)
        t, h = h[:, self.prefix : self.prefix + g], F.silu(h)
        s = transforms.to(t.dtype) @ t  # [B, 2G, r]
        n = torch.cat((self.norm_global(s[:, :g]), self.norm_local(s[:, g:])), dim=1)
        t = transforms.mT.to(t.dtype) @ (s + F.silu(self.mix(n)))  # [B, G, r], the sum of both
        before, patches, behind = torch.split(h, [self.prefix, g, h.shape[1] - self.prefix - g], dim=1)
        out: Tensor = self.up(torch.cat((before, patches + t, behind), dim=1))
        return out


def official_laplacian(points: Tensor) -> Tensor:
    """The Laplacian of the published code, ``[B, G, 3] -> [B, G, G]``."""
    d = torch.cdist(points, points)
    d = d / torch.where(d > 0, d, torch.inf).amin()
    eye = torch.eye(d.shape[1], dtype=d.dtype, device=d.device)
    w = 1 / (d + eye)
    root = torch.rsqrt(w.sum(2) + 1e-6)
    return eye - root[:, :, None] * w * root[:, None, :]
