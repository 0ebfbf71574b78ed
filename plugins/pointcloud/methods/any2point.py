"""Any2Point (Tang et al., ECCV 2024): adapters guided by voxels in space and by cells in the source's own grid.

For a frozen transformer of another modality that reads tokens of a cloud (backbones "any2point-..."). Per block, u what
the MLP adds and A a bottleneck without residual:

    x  = x + u + s A(u)                              A = W_up drop(quick gelu(W_down u))
    v3 = gelu(BN3(max + mean of x over its voxel))   tokens of one voxel in space
    y  = x + attention_m(LN_m x)                     per view m: narrow, tokens of one cell of m's projection
    vm = gelu(BN_m(mean of y over its cell))
    x  = x + c Σ_m w_m vm                            w_m ∝ cos(vm, v3) + 1, patches only

The attentions, one per view, are shared by all blocks. Voxels and cells are found once per forward, from the centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from peft_suite.anatomy import Anatomy, Point
from peft_suite.config import MethodConfig
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.pointcloud.methods.any2point_parts import Guide, Locate, Mixing, ParallelBottleneck
from peft_suite.pointcloud.models.any2point_positions import Projection


class Published(NamedTuple):
    """Settings of a modality: width of A, c, edge of a cell in patches or positions of the source, edge of a voxel."""

    bottleneck: int
    guide: float
    cell: float
    voxel: float


PUBLISHED = {
    "vision": Published(8, 0.7, 26 / 14, 0.16),  # 26 pixels, in patches of 14
    "language": Published(16, 0.3, 2.0, 0.08),
    "audio": Published(12, 0.5, 1.0, 0.16),
}


@dataclass(frozen=True)
class Any2PointConfig(MethodConfig):
    """Any2Point. None stands for the published value of the backbone's modality: vision, language, audio.

    Attributes:
        bottleneck: inner width of A: 8, 16, 12.
        dropout: inside A.
        scale: s.
        guide: c, of what voxels and cells add: 0.7, 0.3, 0.5.
        cell: edge of a cell in patches of the source's grid, or positions of its text: 26 / 14, 2, 1.
        voxel: edge of a voxel in the units of the cloud: 0.16, 0.08, 0.16.
        attention: width of the narrow attentions.
        heads: of these, a divisor of ``attention``.
        pooling: over cells: "mean", or "mean_max", the sum of both.
        official: the published code: batch norm of a view counts every empty cell of its grid as a row of zeros.
    """

    method: ClassVar[str] = "any2point"
    bottleneck: int | None = None
    dropout: float = 0.1
    scale: float = 0.3
    guide: float | None = None
    cell: float | None = None
    voxel: float | None = None
    attention: int = 12
    heads: int = 6
    pooling: Literal["mean", "mean_max"] = "mean"
    official: bool = False

    def validate(self) -> None:
        for name in ("bottleneck", "attention", "heads"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "must be at least 1")
        self.require("heads", self.attention % self.heads == 0, f"must divide attention = {self.attention}")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        for name in ("cell", "voxel"):
            value = getattr(self, name)
            self.require(name, value is None or value > 0, "must be above 0")


class Any2Point(Method[Any2PointConfig]):
    """On DINOv2 ViT-B, tokenizer, class token and norm included and the head not, 800,760 parameters are trained."""

    config_class = Any2PointConfig
    examples = (
        "any2point(bottleneck=3, attention=4, heads=2, voxel=0.9)",
        "any2point(bottleneck=3, attention=4, heads=2, voxel=0.9, pooling=mean_max, official=True)",
    )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, needs_geometry=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the parts.

        Raises:
            UnsupportedError: the backbone does not borrow its positions from another modality.
        """
        paths, config, dim = edit.having("projected"), self.config, anatomy.dim
        if not paths:
            raise UnsupportedError(
                "any2point guides tokens by the grid of a source of another modality, and "
                f"{anatomy.family} has none. Use the backbone any2point-vision, any2point-language or any2point-audio."
            )
        project = edit.module(paths[0])
        assert isinstance(project, Projection)
        usual = PUBLISHED[project.modality]
        width, guide, cell, voxel = (
            getattr(usual, n) if getattr(config, n) is None else getattr(config, n) for n in Published._fields
        )
        views = project.count
        edit.inside(Point(paths[0], 3), "projected", Locate(project.grid, cell, voxel, config.official), "any2point")
        mixing = Mixing(dim, views, config.attention, config.heads)
        for i, block in enumerate(anatomy.need_blocks("any2point")):
            adapter = ParallelBottleneck(dim, width, config.dropout, config.scale)
            edit.inside(block.point, "mlp_out", adapter, "any2point_adapter")
            part = Guide(i, dim, anatomy.prefix_tokens, views, mixing, guide, config.pooling)
            edit.inside(block.point, "end", part, "any2point")
