"""A LayerNorm, trained or frozen, whose output an adapter reads.

The adapter keeps that output for backward anyway; so the norm keeps it too, instead of its input:

    y = w * n + b,  n = (x - mean) * r          n = (y - b) / w in backward

Where a small w or a large b would drown n in rounding, and in mixed precision, the norm works as usual.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Block, Weight
from peft_suite.edits import Part, Trained
from peft_suite.method import Editor

__all__ = ["FrozenNorm", "TrainedNorm", "keep_output", "own_norm"]

_BRANCHES = {"attn": "norm1", "mlp": "norm2"}


class TrainedNorm(Trained):
    """Trained copies of a LayerNorm's weight and bias; backward needs the output, not the input."""

    def __init__(self, module: nn.LayerNorm, device: torch.device | None) -> None:
        super().__init__(module, ("weight", "bias"), device)
        self.eps = module.eps

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Whether the output is what to keep: training, in one precision, and n comes back to rounding."""
        own = cast(Tensor, self.weight)
        if weight is None or weight.dtype != own.dtype or not (own.requires_grad and torch.is_grad_enabled()):
            return False
        if torch.is_autocast_enabled(own.device.type) or torch.compiler.is_compiling():
            return False
        if own.device.type == "meta" or is_fake(own):
            return False
        return _invertible(own, cast(Tensor, self.bias))

    def forward(self, weight: Any, bias: Any, x: Tensor | None = None) -> Any:
        """The trained weight and bias; with ``x: [..., d]`` the norm's output."""
        if x is None:
            return super().forward(weight, bias)
        own, shift = cast(Tensor, self.weight), cast(Tensor, self.bias)
        if x.dtype != own.dtype:
            return F.layer_norm(x.to(own.dtype), x.shape[-1:], own, shift, self.eps).to(x.dtype)
        return _KeepOutput.apply(x, own, shift, self.eps)[0]  # type: ignore[no-untyped-call]


class FrozenNorm(Part):
    """Nothing to train: the frozen norm's output is kept for backward in the place of its input. Folds to nothing."""

    foldable = True
    neutral = True

    def __init__(self, module: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = module.eps
        self.known: tuple[Tensor, Tensor, int, int, bool] | None = None  # weight, bias, their versions, invertible?

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Whether it acts: training eagerly in one precision, and n comes back to rounding."""
        if x is None or weight is None or bias is None or weight.requires_grad or bias.requires_grad:
            return False
        if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        alike = x.dtype == weight.dtype == bias.dtype and x.dtype in (torch.float32, torch.float64)
        if not alike or torch.is_autocast_enabled(x.device.type) or x.device.type == "meta" or is_fake(x):
            return False
        return self._invertible(weight, bias)

    def forward(self, weight: Any, bias: Any, x: Tensor | None = None) -> Any:
        """Weight and bias as they are; with ``x: [..., d]`` the norm's output."""
        if x is None:
            return weight, bias
        return _KeepOutput.apply(x, weight, bias, self.eps)[0]  # type: ignore[no-untyped-call]

    def _invertible(self, weight: Tensor, bias: Tensor) -> bool:
        """Looked at once: frozen values do not change, and on a GPU every look waits for it."""
        known, versions = self.known, (weight._version, bias._version)
        if known is None or known[0] is not weight or known[1] is not bias or known[2:4] != versions:
            self.known = known = (weight, bias, *versions, _invertible(weight, bias))
        return known[4]

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As they are."""
        return weight, bias


def _invertible(weight: Tensor, bias: Tensor) -> bool:
    """n comes back from y to rounding."""
    with torch.no_grad():
        size = weight.abs()
        return bool(((size > 0.01) & (bias.abs() < 16 * size)).all())


class _KeepOutput(torch.autograd.Function):
    """``y = w n + b`` and r, both outputs, so that backward can be differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, _, r = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return y, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, r, weight, bias = ctx.saved_tensors
        grad, to_r = grads
        n = (y - bias) / weight
        to_x = to_weight = to_bias = None
        if grad is not None and to_r is None and not torch.is_grad_enabled():  # one kernel: n is its own normalisation
            shape, ones = n.shape[-1:], torch.ones_like(r)
            wanted = list(ctx.needs_input_grad[:3])
            to_x, to_weight, to_bias = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), n, shape, torch.zeros_like(r), ones, weight, bias, wanted
            )
            return None if to_x is None else to_x.mul_(r), to_weight, to_bias, None
        if grad is not None:
            g = grad * weight
            if ctx.needs_input_grad[0]:
                to_x = r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
            if ctx.needs_input_grad[1]:
                to_weight = (grad * n).flatten(0, -2).sum(0)
            if ctx.needs_input_grad[2]:
                to_bias = grad.flatten(0, -2).sum(0)
        if to_r is not None:  # dr/dx = -r^2 n / d
            more = to_r * r.square() * n / -n.shape[-1]
            to_x = more if to_x is None else to_x + more
        return to_x, to_weight, to_bias, None


def own_norm(anatomy: Anatomy, edit: Editor, block: Block, branch: str, method: str, *, read: bool) -> None:
    """Train the norm of a block's branch, "attn" or "mlp", by a copy; ``read``: an adapter keeps what it gives.

    Raises:
        UnsupportedError: the block has no such norm.
    """
    path = anatomy.need_point(block, _BRANCHES[branch], method).path
    module = edit.module(path)
    if read and _plain(module):
        edit.reweigh(Weight(path), TrainedNorm(cast(nn.LayerNorm, module), edit.device), "trained")
    else:
        edit.own(f"{path}.{name}" for name in ("weight", "bias") if getattr(module, name, None) is not None)


def keep_output(edit: Editor, block: Block, branch: str) -> None:
    """Let the frozen norm of a branch keep what it gives, which an adapter reads; nothing where there is no such norm.

    Saves one ``[B, N, d]`` of activations a norm.
    """
    point = block.points.get(_BRANCHES[branch])
    if point is not None and _plain(module := edit.module(point.path), point.layout):
        edit.reweigh(Weight(point.path), FrozenNorm(cast(nn.LayerNorm, module)), "kept")


def _plain(module: nn.Module, layout: str = "") -> bool:
    if not isinstance(module, nn.LayerNorm) or (type(module) is not nn.LayerNorm and layout != "last"):
        return False
    return len(module.normalized_shape) == 1 and module.weight is not None and module.bias is not None
