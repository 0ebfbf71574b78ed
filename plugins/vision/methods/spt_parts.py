"""The parts of SPT: what measures, and the modules that sensitive matrices get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Part
from peft_suite.methods.lora import LoRAConfig
from peft_suite.methods.lora_parts import LinearLoRA, Rows, SlicedLoRA

if TYPE_CHECKING:
    from peft_suite.vision.methods.spt import SPTConfig


class Probe(Part):
    """Lets calibration see the gradients of a module's frozen weight and bias; otherwise it does nothing."""

    foldable = True

    def __init__(self) -> None:
        super().__init__()
        self.measuring = False
        self.leaves: dict[str, Tensor] = {}

    def open(self, on: bool) -> None:
        """Start or stop measuring."""
        self.measuring, self.leaves = on, {}

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The same values; while measuring, as leaves with a gradient."""
        if not self.measuring:
            return weight, bias
        found = {n: t for n, t in (("weight", weight), ("bias", bias)) if t is not None}
        self.leaves = {n: self.leaves.get(n, t.detach().requires_grad_()) for n, t in found.items()}
        return self.leaves.get("weight"), self.leaves.get("bias")

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Nothing to fold."""
        return weight, bias


def _drop_path(x: Tensor, rate: float) -> Tensor:
    keep = 1 - rate
    return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class BranchLoRA(SlicedLoRA):
    """LoRA with drop path on its branch, which is linear: dropping a sample's input drops its branch."""

    def __init__(self, shape: Rows, slices: Sequence[Rows | None], config: LoRAConfig, drop_path: float) -> None:
        super().__init__(shape, slices, config)
        self.drop_path = drop_path

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [..., out]``, ``x: [..., in]``."""
        x = _drop_path(x, self.drop_path) if self.training and self.drop_path else x
        return LinearLoRA.forward(self, y, x) if self.whole else super().forward(y, x)


class OutputAdapter(Part):
    """``h + U gelu(D drop(h))`` in the given rows of a matrix's output h, each with its own U and D."""

    def __init__(
        self, out: int, slices: Sequence[Rows | None], fan_in: int | None, config: SPTConfig, dropout: float
    ) -> None:
        super().__init__()
        self.out, self.dropout, self.drop_path = out, dropout, config.drop_path
        self.slices: tuple[Rows, ...] = tuple(sorted((0, out) if s is None else s for s in slices))
        bias, r = config.structured_vector, config.rank
        self.down = nn.ModuleList(nn.Linear(fan_in or stop - start, r, bias) for start, stop in self.slices)
        self.up = nn.ModuleList(nn.Linear(r, stop - start, bias) for start, stop in self.slices)
        for linear in cast("Iterable[nn.Linear]", (*self.down, *self.up)):
            if config.init == "official":
                nn.init.trunc_normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
        if config.init == "zero_up":
            for down, up in zip(self.down, self.up, strict=True):
                nn.init.kaiming_uniform_(cast(nn.Linear, down).weight, a=math.sqrt(5))
                nn.init.zeros_(cast(nn.Linear, up).weight)

    def branch(self, i: int, h: Tensor) -> Tensor:
        """``U gelu(D drop(h))`` of slice i."""
        h = F.dropout(h, self.dropout) if self.training and self.dropout else h
        h = self.up[i](F.gelu(self.down[i](h)))
        return _drop_path(h, self.drop_path) if self.training and self.drop_path else h

    def forward(self, y: Tensor) -> Tensor:
        """``y: [..., out]``."""
        pieces, at = [], 0
        for i, (start, stop) in enumerate(self.slices):
            h = y[..., start:stop]
            pieces += [y[..., at:start], h + self.branch(i, h)]
            at = stop
        pieces = [p for p in (*pieces, y[..., at:]) if p.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def extra_repr(self) -> str:
        return f"rows={list(self.slices)} of {self.out}"


class BesideAdapter(OutputAdapter):
    """``y + U gelu(D x)``: the attention's output projection, in the official code, has its adapter beside it."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``y: [..., out]``, ``x: [..., in]``."""
        return y + self.branch(0, x)
