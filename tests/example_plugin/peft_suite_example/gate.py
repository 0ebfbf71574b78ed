"""Gate: ``y = g * y`` on the output of every MLP's last matrix. Folds into it: ``W' = diag(g) W, b' = g b``."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_suite import Anatomy, Capabilities, Editor, Method, MethodConfig, Part, Point


@dataclass(frozen=True)
class GateConfig(MethodConfig):
    """``start``: the gain at the beginning; 1 leaves the model as it is."""

    method: ClassVar[str] = "gate"
    start: float = 1.0


class GatePart(Part):
    """One gain per channel."""

    foldable = True
    decay = False

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), start))

    def forward(self, y: Tensor) -> Tensor:
        """``y: [..., width]``."""
        return y * self.gain

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gains become part of the rows."""
        return self.gain[:, None] * weight, None if bias is None else self.gain * bias


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
            edit.after(Point(path, block.point.width), GatePart(block.point.width, self.config.start), "gate")
