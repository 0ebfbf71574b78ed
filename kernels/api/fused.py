"""Public fused operations: scale-and-shift, the bottleneck adapter, and folding a scale-and-shift into a weight.

Each has a registered operation with a backward of its own, and the plain expression. Which one runs is measured: under
torch.compile the plain expression, which the compiler fuses; on small tensors the plain expression, which has no
overhead; on large CPU tensors the operation, which passes over memory less often and keeps less for backward. On a GPU
the plain expression runs too, unless ``PEFT_SUITE_KERNELS=triton`` asks for the kernels, until a measurement shows them
ahead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_suite.kernels import checks, dispatch
from peft_suite.kernels.cpu.torch_fused import activation
from peft_suite.kernels.ops import fused as ops
from peft_suite.kernels.reference.fused import ACTIVATIONS
from peft_suite.kernels.reference.points import compute_dtype

__all__ = ["bottleneck_adapter", "fold_ssf", "ssf"]

# elements from which the operation is ahead of the plain expression, one CPU thread, forward and backward
NEVER = 1 << 62
SSF_FROM = {torch.float32: 1 << 21, torch.float64: 1 << 21, torch.float16: NEVER, torch.bfloat16: NEVER}
ADAPTER_FROM = 1 << 18


def ssf(x: Tensor, scale: Tensor, shift: Tensor, *, channel_dim: int = -1) -> Tensor:
    """Scale and shift of features, y = x ⊙ γ + β along one axis (SSF, NeurIPS 2022).

    x of any shape with C entries along ``channel_dim``, scale and shift (C,) -> y of the shape and dtype of ``x``.
    Halves multiply and add in float32 and round once; scale and shift may be wider than ``x``. Gradients: g·γ, Σ g·x
    and Σ g, summed in float32 and rounded once (torch's own backward, which runs where all three are halves, rounds
    each product g·x as well). The axis is an argument, where the official code guesses it from sizes.

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit.
    """
    dim = _channels(x, scale, shift, channel_dim)
    same = x.dtype == scale.dtype == shift.dtype
    wanted = dispatch.current_backend()
    plain = torch.compiler.is_compiling() or (same and (x.device.type != "cpu" or x.numel() < SSF_FROM[x.dtype]))
    if wanted not in ("triton", "reference") and plain:
        shape = (-1, *[1] * (x.dim() - 1 - dim))
        gamma, beta = scale.view(shape), shift.view(shape)
        if same:
            return torch.addcmul(beta, x, gamma)
        wide = compute_dtype(x)
        return torch.addcmul(beta.to(wide), x.to(wide), gamma.to(wide)).to(x.dtype)
    y: Tensor = ops.ssf(x, scale, shift, dim)
    return y


def _channels(x: Tensor, scale: Tensor, shift: Tensor, channel_dim: int) -> int:
    """The channel axis counted from the front, after the checks."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.dtype not in checks.FLOATS:
        found = checks.shape_of(x) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise checks.fail("x", f"is {found}", "a floating tensor with at least one axis")
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int) or not -x.dim() <= channel_dim < x.dim():
        raise checks.fail("channel_dim", f"is {channel_dim!r}", f"an axis of x, {-x.dim()} to {x.dim() - 1}")
    dim = channel_dim % x.dim()
    for name, part in (("scale", scale), ("shift", shift)):
        checks.tensor(name, part, "(C,)")
        if part.shape[0] != x.shape[dim]:
            raise checks.fail(name, f"is {checks.shape_of(part)}", f"({x.shape[dim]},), the size of x along axis {dim}")
        if part.device != x.device:
            raise checks.fail(name, f"is on {part.device}", f"{x.device}, where 'x' is")
    return dim


def fold_ssf(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer, convolution or norm before a scale-and-shift, with it folded in: γ⊙W and γ⊙b + β.

    weight (C, ...) with output channels first, bias (C,) or None -> both in the dtype of ``weight``; halves compute in
    float32.

    Raises:
        KernelArgumentError: shapes that do not fit.
    """
    dim = _channels(weight, scale, shift, 0)
    if bias is not None and bias.shape != scale.shape:
        raise checks.fail("bias", f"is {checks.shape_of(bias)}", f"({weight.shape[dim]},)")
    wide = compute_dtype(weight)
    gamma, beta = scale.to(wide), shift.to(wide)
    folded = (weight.to(wide) * gamma.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    return folded, (beta if bias is None else bias.to(wide) * gamma + beta).to(weight.dtype)


def bottleneck_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    act: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Bottleneck adapter, y = residual + scale·(act(x W_downᵀ + b_down) W_upᵀ + b_up).

    x (..., D), w_down (r, D), b_down (r,), w_up (E, r), b_up (E,), residual (..., E) -> y (..., E); biases and residual
    may be None. ``act``: relu, gelu, gelu_tanh, silu, quick_gelu, none. ``scale`` is a number or a tensor of one
    element, which may be trained. All of one dtype, except the scale; under autocast the plain expression runs and
    follows autocast's rules. The operation keeps for backward x, the hidden rows before the activation and the weights,
    and not the up-projection's output, which the plain expression keeps where the scale is trained.

    Raises:
        KernelArgumentError: shapes, dtypes, devices or an activation that do not fit.
    """
    autocast = isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)
    _fits(x, w_down, b_down, w_up, b_up, act, scale, residual, autocast)
    wanted = dispatch.current_backend()
    asked = wanted in ("triton", "reference")
    if autocast or (
        not asked and (torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < ADAPTER_FROM)
    ):
        return _plain_adapter(x, w_down, b_down, w_up, b_up, act, scale, residual)
    lead = x.shape[:-1]
    number, learned = (1.0, scale.reshape(())) if isinstance(scale, Tensor) else (float(scale), None)
    rest = None if residual is None else residual.reshape(-1, w_up.shape[0])
    y, _ = ops.bottleneck_adapter(x.reshape(-1, x.shape[-1]), w_down, b_down, w_up, b_up, act, number, learned, rest)
    return y.view(*lead, w_up.shape[0])  # type: ignore[no-any-return]


def _plain_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    act: str,
    scale: float | Tensor,
    residual: Tensor | None,
) -> Tensor:
    y = F.linear(activation(act, F.linear(x, w_down, b_down)), w_up, b_up)
    if isinstance(scale, Tensor):
        y = y * scale.reshape(()).to(y.dtype)
    elif scale != 1:
        y = y * scale
    return y if residual is None else residual + y


def _fits(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    act: str,
    scale: float | Tensor,
    residual: Tensor | None,
    autocast: bool,
) -> None:
    if not isinstance(x, Tensor) or x.dim() == 0 or x.dtype not in checks.FLOATS:
        found = checks.shape_of(x) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise checks.fail("x", f"is {found}", "a floating tensor (..., D)")
    checks.choice("act", act, ACTIVATIONS)
    checks.tensor("w_down", w_down, "(r, D)")
    checks.tensor("w_up", w_up, "(E, r)")
    rank = w_down.shape[0]
    wanted: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("w_down", w_down, (rank, x.shape[-1])),
        ("b_down", b_down, (rank,)),
        ("w_up", w_up, (w_up.shape[0], rank)),
        ("b_up", b_up, (w_up.shape[0],)),
        ("residual", residual, (*x.shape[:-1], w_up.shape[0])),
    )
    for name, part, shape in wanted:
        if part is None:
            continue
        if tuple(part.shape) != shape:
            raise checks.fail(name, f"is {checks.shape_of(part)}", f"shape {shape}")
        if part.device != x.device or (part.dtype != x.dtype and not autocast):
            raise checks.fail(name, f"is {checks.shape_of(part)}", f"{x.dtype} on {x.device}, as 'x'")
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.device != x.device or scale.dtype not in checks.FLOATS:
            raise checks.fail("scale", f"is {checks.shape_of(scale)}", f"one floating element on {x.device}")
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise checks.fail("scale", f"is a {type(scale).__name__}", "a number or a tensor of one element")
