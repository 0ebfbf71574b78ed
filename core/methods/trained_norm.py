"""A LayerNorm that trains together with an adapter reading its output.

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
from peft_suite.edits import Trained
from peft_suite.method import Editor

__all__ = ["TrainedNorm", "own_norm"]


class TrainedNorm(Trained):
    """Trained copies of a LayerNorm's weight and bias; backward needs the output, not the input."""

    def __init__(self, module: nn.LayerNorm, device: torch.device | None) -> None:
        super().__init__(module, ("weight", "bias"), device)
        self.eps = module.eps

    def direct(self, weight: Tensor | None) -> bool:
        """Whether the output is what to keep: training, in one precision, and n comes back to rounding."""
        own = cast(Tensor, self.weight)
        if weight is None or weight.dtype != own.dtype or not (own.requires_grad and torch.is_grad_enabled()):
            return False
        if torch.is_autocast_enabled(own.device.type) or torch.compiler.is_compiling():
            return False
        if own.device.type == "meta" or is_fake(own):
            return False
        with torch.no_grad():
            size = own.abs()
            return bool(((size > 0.01) & (cast(Tensor, self.bias).abs() < 16 * size)).all())

    def forward(self, weight: Any, bias: Any, x: Tensor | None = None) -> Any:
        """The trained weight and bias; with ``x: [..., d]`` the norm's output."""
        if x is None:
            return super().forward(weight, bias)
        own, shift = cast(Tensor, self.weight), cast(Tensor, self.bias)
        if x.dtype != own.dtype:
            return F.layer_norm(x.to(own.dtype), x.shape[-1:], own, shift, self.eps).to(x.dtype)
        return _KeepOutput.apply(x, own, shift, self.eps)[0]  # type: ignore[no-untyped-call]


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
        if grad is not None:
            g = grad * weight
            if ctx.needs_input_grad[0]:
                to_x = r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
            to_weight, to_bias = (grad * n).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)
        if to_r is not None:  # dr/dx = -r^2 n / d
            more = to_r * r.square() * n / -n.shape[-1]
            to_x = more if to_x is None else to_x + more
        return to_x, to_weight, to_bias, None


def own_norm(anatomy: Anatomy, edit: Editor, block: Block, branch: str, method: str, *, read: bool) -> None:
    """Train the norm of a block's branch, "attn" or "mlp", by a copy; ``read``: an adapter keeps what it gives.

    Raises:
        UnsupportedError: the block has no such norm.
    """
    path = anatomy.need_point(block, {"attn": "norm1", "mlp": "norm2"}[branch], method).path
    module = edit.module(path)
    plain = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    if read and plain and module.weight is not None and module.bias is not None:
        edit.reweigh(Weight(path), TrainedNorm(cast(nn.LayerNorm, module), edit.device), "trained")
    else:
        edit.own(f"{path}.{name}" for name in ("weight", "bias") if getattr(module, name, None) is not None)
