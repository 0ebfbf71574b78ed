"""Sparse weight changes registered with torch: schema, shapes, gradients. Bodies check the index and choose a back end.

Saved for backward are only the given tensors, and of them only those that a wanted gradient reads; the effective weight
is built again, and so is an input that its operation can give again (:mod:`peft_suite.kernels.recompute`). Nothing is
written into the frozen weight, so the weight may be a parameter that FSDP2 gathers anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_suite.errors import UnsupportedError
from peft_suite.kernels import checks, recompute
from peft_suite.kernels.cpu.torch_sparse import effective
from peft_suite.kernels.dispatch import Form, Op
from peft_suite.kernels.reference.sparse import accumulate_dtype

__all__ = ["HISTOGRAM", "check_sorted", "sddmm", "sparse_delta", "sparse_delta_conv", "sparse_delta_linear"]

_TRITON = "peft_suite.kernels.triton"
_TORCH, _REFERENCE = "peft_suite.kernels.cpu.torch_sparse", "peft_suite.kernels.reference.sparse"


def _op(name: str, *first: Form) -> Op:
    return Op(
        name, *first, Form("torch", f"{_TORCH}:{name}"), Form("reference", f"{_REFERENCE}:{name}", automatic=False)
    )


_LINEAR = _op("sparse_linear", Form("triton", f"{_TRITON}.sparse_delta:sparse_linear", devices=("cuda",)))
_LINEAR_INPUT = _op("sparse_linear_input")
_SDDMM = _op("sddmm", Form("triton", f"{_TRITON}.sparse_delta:sddmm", devices=("cuda",)))
_CONV = _op("sparse_conv")
_CONV_INPUT = _op("sparse_conv_input")
_CONV_SDDMM = _op("conv_sddmm")
HISTOGRAM = _op("digit_histogram", Form("triton", f"{_TRITON}.selection:digit_histogram", devices=("cuda",)))


def check_sorted(argument: str, index: Tensor, numel: int) -> None:
    """Raise unless the values of ``index`` are sorted, unique and in [0, numel)."""
    if index.numel() == 0:
        return
    low, high = int(index[0]), int(index[-1])
    rising = index[1:] > index[:-1]
    if not bool(rising.all()):
        at = int(torch.nonzero(~rising)[0])
        here, after = int(index[at]), int(index[at + 1])
        found = f"holds {here} twice" if here == after else f"is not sorted: {after} follows {here}"
        raise checks.fail(argument, f"{found}, at position {at + 1}", "sorted positions, each once")
    if low < 0 or high >= numel:
        bad = low if low < 0 else high
        raise checks.fail(argument, f"holds {bad}", f"flat positions from 0 to {numel - 1}")


def _look(index: Tensor, numel: int) -> None:
    if checks.looks_at_values(index):
        check_sorted("index", index, numel)


def _no_second(what: str) -> Any:
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            f"The gradient of {what} was differentiated again (create_graph=True); sparse changes have first "
            f"derivatives only. Use sparse_delta(weight, values, index) with torch's own layer function instead."
        )

    return backward


# the weight itself ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::sparse_delta", mutates_args=())
def sparse_delta(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """W + ΔW in ``dtype``."""
    _look(index, weight.numel())
    return effective(weight, values, index, dtype)


@sparse_delta.register_fake
def _(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _delta_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, values, index, _ = inputs
    ctx.dtypes = weight.dtype, values.dtype
    ctx.save_for_backward(index)


def _delta_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    to_weight = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    to_values = None
    if ctx.needs_input_grad[1]:
        to_values = grad.reshape(-1).index_select(0, index).to(ctx.dtypes[1])
    return to_weight, to_values, None, None


sparse_delta.register_autograd(_delta_backward, setup_context=_delta_context)


# sampled product -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::sddmm", mutates_args=())
def sddmm(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """(T, M), (T, N) -> (E,): Σ_t a[t, index // N] · b[t, index % N]."""
    if a.shape[0] == 0 or index.numel() == 0:
        return a.new_zeros(index.numel(), dtype=accumulate_dtype(a))
    out: Tensor = _SDDMM(a.device, a, b, index)
    return out


@sddmm.register_fake
def _(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    return a.new_empty(index.numel(), dtype=accumulate_dtype(a))


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, index = inputs
    ctx.shape = a.shape[1], b.shape[1]
    ctx.dtypes = a.dtype, b.dtype
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None, index)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, index = ctx.saved_tensors
    to_a = sddmm_backward(grad, b, index, *ctx.shape, True).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    to_b = sddmm_backward(grad, a, index, *ctx.shape, False).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return to_a, to_b, None


sddmm.register_autograd(_sddmm_backward, setup_context=_sddmm_context)


@torch.library.custom_op("peft_suite::sddmm_backward", mutates_args=())
def sddmm_backward(grad: Tensor, other: Tensor, index: Tensor, m: int, n: int, first: bool) -> Tensor:
    """Gradient of :func:`sddmm` for its first operand (other = b) or its second (other = a)."""
    with torch.autocast(grad.device.type, enabled=False):
        dense = grad.new_zeros(m * n)
        dense.scatter_(0, index.long(), grad)
        dense = dense.view(m, n)
        return other.to(grad.dtype) @ (dense.T if first else dense)


@sddmm_backward.register_fake
def _(grad: Tensor, other: Tensor, index: Tensor, m: int, n: int, first: bool) -> Tensor:
    return grad.new_empty(other.shape[0], m if first else n)


sddmm_backward.register_autograd(_no_second("sddmm"))


# linear --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::sparse_delta_linear", mutates_args=())
def sparse_delta_linear(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """(..., I) -> (..., O): y = x (W + ΔW)ᵀ + b."""
    _look(index, weight.numel())
    out: Tensor = _LINEAR(x.device, x, weight, values, index, bias)
    return torch.ops.aten._unsafe_view(out, out.shape)  # type: ignore[no-any-return]  # no view: a layer behind may write into it


@sparse_delta_linear.register_fake
def _(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("peft_suite::sparse_delta_linear_backward", mutates_args=())
def sparse_delta_linear_backward(grad: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """(..., O) -> (..., I): the input's gradient."""
    out: Tensor = _LINEAR_INPUT(grad.device, grad, weight, values, index)
    return out


@sparse_delta_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


sparse_delta_linear_backward.register_autograd(_no_second("sparse_delta_linear"))


def _keep(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> None:
    """Save what the wanted gradients read: the input's needs weight and values, the values' needs the input."""
    to_x, to_values = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    ctx.dtypes = values.dtype, None if bias is None else bias.dtype
    ctx.input, kept = recompute.keep(x) if to_values else (None, ())
    ctx.shape = x.shape
    ctx.save_for_backward(
        weight if to_x else None,
        values if to_x else None,
        index if to_x or to_values else None,
        *kept,
    )


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, *inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, values, index, *kept = ctx.saved_tensors
    to_x = to_values = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = sparse_delta_linear_backward(grad, weight, values, index)
    flat = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[2]:
        x = ctx.input.again(kept)
        to_values = sddmm(flat, x.reshape(-1, x.shape[-1]), index).to(ctx.dtypes[0])
    if ctx.needs_input_grad[4]:
        to_bias = flat.sum(0, dtype=accumulate_dtype(grad)).to(ctx.dtypes[1])
    return to_x, None, to_values, None, to_bias


sparse_delta_linear.register_autograd(_linear_backward, setup_context=_linear_context)


# convolution ---------------------------------------------------------------------------------------------------------


def _output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)]


@torch.library.custom_op("peft_suite::sparse_delta_conv", mutates_args=())
def sparse_delta_conv(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """(B, C, *S) -> (B, O, *S'): conv(x, W + ΔW) + b."""
    _look(index, weight.numel())
    out: Tensor = _CONV(x.device, x, weight, values, index, bias, stride, padding, dilation, groups)
    return out


@sparse_delta_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    size = _output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty(x.shape[0], weight.shape[0], *size)


@torch.library.custom_op("peft_suite::sparse_delta_conv_backward", mutates_args=())
def sparse_delta_conv_backward(
    grad: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of the input, which had the shape ``size``."""
    if math.prod(grad.shape) == 0:
        return grad.new_zeros(list(size))
    out: Tensor = _CONV_INPUT(grad.device, grad, weight, values, index, size, stride, padding, dilation, groups)
    return out


@sparse_delta_conv_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return grad.new_empty(list(size))


@torch.library.custom_op("peft_suite::sparse_delta_conv_values", mutates_args=())
def sparse_delta_conv_values(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """(E,): the weight gradient at the positions ``index``."""
    if grad.numel() == 0 or index.numel() == 0:
        return grad.new_zeros(index.numel(), dtype=accumulate_dtype(grad))
    out: Tensor = _CONV_SDDMM(grad.device, grad, x, kernel, index, stride, padding, dilation, groups)
    return out


@sparse_delta_conv_values.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return grad.new_empty(index.numel(), dtype=accumulate_dtype(grad))


sparse_delta_conv_backward.register_autograd(_no_second("sparse_delta_conv"))
sparse_delta_conv_values.register_autograd(_no_second("sparse_delta_conv"))


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, *inputs[:5])
    ctx.kernel = inputs[1].shape[2:]
    ctx.geometry = inputs[5:]


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, values, index, *kept = ctx.saved_tensors
    to_x = to_values = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = sparse_delta_conv_backward(grad, weight, values, index, ctx.shape, *ctx.geometry)
    if ctx.needs_input_grad[2]:
        x = ctx.input.again(kept)
        to_values = sparse_delta_conv_values(grad, x, ctx.kernel, index, *ctx.geometry).to(ctx.dtypes[0])
    if ctx.needs_input_grad[4]:
        over = [d for d in range(grad.dim()) if d != 1]
        to_bias = grad.sum(over, dtype=accumulate_dtype(grad)).to(ctx.dtypes[1])
    return to_x, None, to_values, None, to_bias, None, None, None, None


sparse_delta_conv.register_autograd(_conv_backward, setup_context=_conv_context)
