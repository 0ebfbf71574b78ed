"""(IA)3 (Liu et al., NeurIPS 2022): learned vectors that scale keys, values and the MLP's inner activations.

    k = l_k * (x W_k^T + b_k)      v = l_v * (x W_v^T + b_v)      mlp = (l_ff * act(x W_1^T + b_1)) W_2^T + b_2

l_k, l_v: [d], l_ff: [4d], all ones at the start. Written for T5; on vision transformers the same three places. Folds
into rows of the key and value projections (and their biases) and into columns of the MLP's second matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method

Rows = tuple[int, int]


@dataclass(frozen=True)
class IA3Config(MethodConfig):
    """Which matrices are scaled.

    Attributes:
        targets: roles of the anatomy; ``fc2`` is scaled at its input (the activations), all others at their output.
    """

    method: ClassVar[str] = "ia3"
    targets: tuple[str, ...] = ("k", "v", "fc2")

    def validate(self) -> None:
        self.require("targets", bool(self.targets), "name at least one matrix, for example k")


class ScaleOutput(Part):
    """``y * s`` in the given rows of the output; ``s``: the rows' scales, stacked."""

    foldable = True
    decay = False

    def __init__(self, out: int, slices: Sequence[Rows | None], first: bool) -> None:
        super().__init__()
        self.out, self.first = out, first
        self.slices: tuple[Rows, ...] = tuple(sorted((0, out) if s is None else s for s in slices))
        self.scale = nn.Parameter(torch.ones(sum(stop - start for start, stop in self.slices)))

    def rows(self) -> Tensor:
        """The scales of the whole output, 1 outside the slices: ``[out]``."""
        pieces, at, row = [], 0, 0
        for start, stop in self.slices:
            pieces += [self.scale.new_ones(start - at), self.scale[row : row + stop - start]]
            at, row = stop, row + stop - start
        return torch.cat([*pieces, self.scale.new_ones(self.out - at)])

    def forward(self, y: Tensor) -> Tensor:
        """``y: [..., out]``, or ``[B, out, H, W]`` of a convolution."""
        scale = self.rows()
        return y * (scale[:, None, None] if self.first else scale)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``diag(s) W`` and ``s b``."""
        scale = self.rows()
        return weight * scale.view(-1, *[1] * (weight.ndim - 1)), None if bias is None else bias * scale

    def extra_repr(self) -> str:
        return f"rows={list(self.slices)} of {self.out}"


class ScaleInput(Part):
    """``x * s`` before a matrix; ``s: [in]``."""

    foldable = True
    decay = False

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., in]``, or ``[B, in, H, W]`` of a convolution."""
        return x * (self.scale[:, None, None] if self.first else self.scale)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W diag(s)``; the bias stays."""
        return weight * self.scale.view(1, -1, *[1] * (weight.ndim - 2)), bias

    def extra_repr(self) -> str:
        return f"width={self.scale.numel()}"


class IA3(Method[IA3Config]):
    """One vector per target: ``L * (d + d + 4d)`` parameters, 55,296 on ViT-B/16."""

    config_class = IA3Config
    examples = ("ia3", "ia3(targets=[fc2])")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Group output targets by module and attach.

        Raises:
            UnsupportedError: no block has such a matrix.
        """
        for target in self.config.targets:
            anatomy.with_weight(target, "ia3")
        for block in anatomy.need_blocks("ia3"):
            outputs: dict[str, list[Rows | None]] = {}
            for target in (t for t in self.config.targets if t in block.weights):
                weight = block.weights[target]
                if target == "fc2":
                    module = self._matrix(edit, weight.path)
                    width = module.weight.shape[1]
                    first = isinstance(module, nn.Conv2d)
                    edit.before(Point(weight.path, width), ScaleInput(width, first), "ia3")
                elif weight.rows not in outputs.setdefault(weight.path, []):
                    outputs[weight.path].append(weight.rows)
            for path, slices in outputs.items():
                module = self._matrix(edit, path)
                width, whole = module.weight.shape[0], None in slices
                part = ScaleOutput(width, [None] if whole else slices, isinstance(module, nn.Conv2d))
                edit.after(Point(path, width), part, "ia3")

    @staticmethod
    def _matrix(edit: Editor, path: str) -> nn.Linear | nn.Conv2d:
        module = edit.module(path)
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            return module
        raise UnsupportedError(
            f"ia3 scales Linear layers and convolutions without groups; {path} is a {type(module).__name__}."
        )
