"""Gate: ``y = g * y`` on the output of every MLP's last matrix. Folds into it: ``W' = diag(g) W, b' = g b``."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_suite import Anatomy, Capabilities, Editor, Method, MethodConfig, Part


@dataclass(frozen=True)
class GateConfig(MethodConfig):
    """``start``: the gain at the beginning; 1 leaves the model as it is."""

    method: ClassVar[str] = "gate"
    start: float = 1.0


class GatePart(Part):
    """One gain per channel; ``layout`` as of :class:`peft_suite.Point`."""

    foldable = True
    decay = False

    def __init__(self, width: int, layout: str, start: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,) if layout == "last" else (width, 1, 1), start))

    def forward(self, y: Tensor) -> Tensor:
        """``y: [..., width]``, or ``[B, width, H, W]`` for layout "first"."""
        return y * self.gain

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gains become part of the rows."""
        gain = self.gain.flatten()
        return gain.view(-1, *[1] * (weight.ndim - 1)) * weight, None if bias is None else gain * bias


class Gate(Method[GateConfig]):
    """One gate per block: ``L * d`` parameters."""

    config_class = GateConfig
    examples: ClassVar[tuple[str, ...]] = ("gate", "gate(start=0.5)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=self.config.start == 1.0)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """After ``fc2`` of every block."""
        for block in anatomy.need_blocks("gate"):
            path = anatomy.need_weight(block, "fc2", "gate").path
            point = next(p for p in block.affine if p.path == path)
            edit.after(point, GatePart(point.width, point.layout, self.config.start), "gate")
