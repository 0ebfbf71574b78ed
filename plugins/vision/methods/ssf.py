"""SSF (Lian et al., NeurIPS 2022): scale and shift the output of every affine operation.

    y = s * x + t          s, t: [C], per channel

Folds into the operation before it: Linear and Conv ``W' = diag(s) W, b' = s b + t``; norms ``w' = s w, b' = s b + t``.
Sites that follow nothing with weight and bias stay as explicit operations: ConvNeXt's last one, between the residual
sum and the pooling, ResMLP's affine layers, RMS norms.
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
        include_downsample: patch merging, downsampling and projected shortcuts as well. The paper's text suggests it;
            every published number, and so the default, is without.
        official: two deviations of the official code. It trains everything below ``head.`` because of its name: on
            ConvNeXt that is the norm between pooling and classifier. And it guesses where the channels are: on a
            feature map that is as wide as it has channels, s and t act along the width. Sites on feature maps
            (ConvNeXt, AS-MLP) then do not fold.
    """

    method: ClassVar[str] = "ssf"
    init: Literal["paper", "identity"] = "paper"
    include_downsample: bool = False
    official: bool = False


class ScaleShift(Part):
    """``s * x + t`` per channel; ``s, t: [C]``, or ``[C, 1, 1]`` for layout "first".

    ``guess``: along the last axis wherever that has C places, as the official code does.
    """

    foldable = True
    decay = False

    def __init__(self, width: int, layout: str, init: str, foldable: bool = True, guess: bool = False) -> None:
        super().__init__()
        self.foldable, self.guess = foldable, guess
        shape = (width,) if layout == "last" else (width, 1, 1)
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))
        if init == "paper":
            nn.init.normal_(self.scale, mean=1.0, std=0.02)
            nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., C]``, or ``[B, C, H, W]`` for layout "first"."""
        if self.guess and x.shape[-1] == self.scale.numel():
            return x * self.scale.flatten() + self.shift.flatten()
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

    205,824 parameters on ViT-B/16, 267,264 on Swin-B, 255,232 on ConvNeXt-B. The sites are the official code's; on
    MLP-Mixer, ResNet (after every batch norm), ConvNeXtV2 and transformers' models they are its rule, extended by us.
    """

    config_class = SSFConfig
    examples = ("ssf", "ssf(include_downsample=True, official=True)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=self.config.init == "identity")

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """One part per affine operation.

        Raises:
            UnsupportedError: the backbone describes no blocks.
        """
        blocks = anatomy.need_blocks("ssf")
        sites = [*anatomy.stem, *(point for block in blocks for point in block.affine)]
        sites += [*(anatomy.between if self.config.include_downsample else ()), *anatomy.tail]
        maps = blocks[0].point.layout == "first"  # elsewhere the official code sees tokens only
        for point in sites:
            guess = self.config.official and maps and point.layout == "first"
            # without a place for t nothing can take it in
            foldable = "bias" in edit.module(point.path)._parameters and not guess
            part = ScaleShift(point.width, point.layout, self.config.init, foldable, guess)
            edit.after(point, part, "ssf")
        if self.config.official:
            edit.own(n for n, _ in edit.model.named_parameters() if "head." in n and not n.startswith("adapters."))
