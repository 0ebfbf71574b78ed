"""SSF (Lian et al., NeurIPS 2022): scale and shift the output of every affine operation.

    y = s * x + t          s, t: [C], per channel

Folds into the operation before it: Linear and Conv ``W' = diag(s) W, b' = s b + t``; norms ``w' = s w, b' = s b + t``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class SSFConfig(MethodConfig):
    """SSF.

    Attributes:
        init: "paper": s ~ N(1, 0.02), t ~ N(0, 0.02), so a fresh adapter is close to, not exactly, the frozen model;
            "identity": s = 1, t = 0.
    """

    method: ClassVar[str] = "ssf"
    init: Literal["paper", "identity"] = "paper"


class ScaleShift(Part):
    """``s * x + t`` per channel; ``s, t: [C]``, or ``[C, 1, 1]`` for layout "first"."""

    foldable = True
    decay = False

    def __init__(self, width: int, layout: str, init: str) -> None:
        super().__init__()
        shape = (width,) if layout == "last" else (width, 1, 1)
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))
        if init == "paper":
            nn.init.normal_(self.scale, mean=1.0, std=0.02)
            nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., C]``, or ``[B, C, H, W]`` for layout "first"."""
        return x * self.scale + self.shift

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``diag(s) W`` and ``s b + t``; a missing bias becomes t."""
        scale, shift = self.scale.flatten(), self.shift.flatten()
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        return weight, shift if bias is None else bias * scale + shift

    def extra_repr(self) -> str:
        return f"width={self.scale.numel()}"


class SSF(Method[SSFConfig]):
    """A scale and a shift after every affine operation of stem and blocks and after the final norm.

    205,824 parameters on ViT-B/16. The sites are the official code's.
    """

    config_class = SSFConfig

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=self.config.init == "identity")

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """One part per affine operation.

        Raises:
            UnsupportedError: the backbone describes no blocks.
        """
        sites = [*anatomy.stem, *(point for block in anatomy.need_blocks("ssf") for point in block.affine)]
        for point in [*sites, *anatomy.tail]:
            edit.after(point, ScaleShift(point.width, point.layout, self.config.init), "ssf")
