"""SSF (Lian et al., NeurIPS 2022): scale and shift the output of every affine operation.

    y = s * x + t          s, t: [C], per channel

Folds into the operation before it: Linear and Conv ``W' = diag(s) W, b' = s b + t``; norms ``w' = s w, b' = s b + t``.
Sites that follow nothing with weight and bias stay as explicit operations: ConvNeXt's last one, between the residual
sum and the pooling, ResMLP's affine layers, RMS norms.

What backward needs is x. Behind a norm, s and t act on the norm's own affine values, so nothing is kept; behind qkv and
fc1 the output is kept, which attention and activation keep anyway, and ``x = (y - t) / s``. Only the outputs that go
into a residual sum cost memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from peft_suite.anatomy import Anatomy, Weight
from peft_suite.config import MethodConfig
from peft_suite.edits import Part, functional_of
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

    ``guess``: along the last axis wherever that has C places, as the official code does. ``recover``: keep the output
    for backward instead of the input, where whatever reads the output keeps it as well.
    """

    foldable = True
    decay = False

    def __init__(
        self,
        width: int,
        layout: str,
        init: str,
        foldable: bool = True,
        guess: bool = False,
        recover: bool = False,
    ) -> None:
        super().__init__()
        self.foldable, self.guess, self.recover = foldable, guess, recover
        shape = (width,) if layout == "last" else (width, 1, 1)
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))
        if init == "paper":
            nn.init.normal_(self.scale, mean=1.0, std=0.02)
            nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., C]``, or ``[B, C, H, W]`` or ``[B, C, L]`` for layout "first"."""
        if self.scale.ndim == 3 and x.ndim == 3 and not self.guess:
            return x * self.scale.flatten(1) + self.shift.flatten(1)
        if self.guess and x.shape[-1] == self.scale.numel():
            return x * self.scale.flatten() + self.shift.flatten()
        if self.recover and self.scale.requires_grad and torch.is_grad_enabled() and _divisible(self.scale, self.shift):
            y: Tensor = _KeepOutput.apply(x, self.scale, self.shift)  # type: ignore[no-untyped-call]
            return y
        return x * self.scale + self.shift

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``diag(s) W`` and ``s b + t``; a missing bias becomes t."""
        scale, shift = self.scale.flatten(), self.shift.flatten()
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        return weight, shift if bias is None else bias * scale + shift

    def extra_repr(self) -> str:
        return f"width={self.scale.numel()}"


class NormScaleShift(ScaleShift):
    """SSF of a norm's output as affine values of the norm: backward needs no more than the norm keeps."""

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``s w`` and ``s b + t``."""
        scale = self.scale.flatten()
        return weight * scale, bias * scale + self.shift.flatten()


class _KeepOutput(torch.autograd.Function):
    """``y = s x + t``, keeping y: ``ds = sum(g (y - t)) / s``, sums over all axes but the last."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x * scale + shift

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.input_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        y, scale, shift = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        to_x = (grad * scale).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        to_scale = (rows * (y.flatten(0, -2) - shift)).sum(0) / scale if ctx.needs_input_grad[1] else None
        return to_x, to_scale, rows.sum(0) if ctx.needs_input_grad[2] else None


def _divisible(scale: Tensor, shift: Tensor) -> bool:
    """Whether ``(y - t) / s`` gives x back to rounding: no small s, no t that drowns it.."""
    if torch.compiler.is_compiling() or scale.device.type == "meta" or is_fake(scale):
        return False
    with torch.no_grad():
        size = scale.abs()
        return bool(((size > 0.01) & (shift.abs() < 100 * size)).all())


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
        # attention keeps q, k and v for backward, the activation what fc1 gives it
        kept = {
            block.weights[role].path for block in blocks for role in ("q", "k", "v", "fc1") if role in block.weights
        }
        for point in sites:
            guess = self.config.official and maps and point.layout == "first"
            # without a place for t nothing can take it in
            module = edit.module(point.path)
            foldable = "bias" in module._parameters and not guess
            values = (point.width, point.layout, self.config.init, foldable, guess)
            if foldable and self._is_norm(module, anatomy):
                edit.reweigh(Weight(point.path), NormScaleShift(*values), "ssf")
            else:
                recover = point.path in kept and point.layout == "last" and point.output is None
                edit.after(point, ScaleShift(*values, recover=recover), "ssf")
        if self.config.official:
            edit.own(n for n, _ in edit.model.named_parameters() if "head." in n and not n.startswith("adapters."))

    @staticmethod
    def _is_norm(module: nn.Module, anatomy: Anatomy) -> bool:
        """A norm with weight and bias of one dimension whose forward is known."""
        affine = all(
            isinstance(t, Tensor) and t.ndim == 1 for t in (getattr(module, n, None) for n in ("weight", "bias"))
        )
        return affine and functional_of(module, anatomy.functionals) is not None
