"""Sparse weight changes: frozen tensors of which a few chosen entries are trained.

ΔW is zero except ``ΔW.flatten()[index] = values``. What is trained, stored and given a moment by the optimizer is
``values``, one number an entry; the weight itself is neither copied for the length of a step nor written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_suite.kernels import checks
from peft_suite.kernels.ops import sparse as ops

__all__ = [
    "check_index",
    "rounded_away",
    "sddmm",
    "sparse_delta",
    "sparse_delta_conv",
    "sparse_delta_conv1d",
    "sparse_delta_conv2d",
    "sparse_delta_conv3d",
    "sparse_delta_linear",
]

_INT32 = 2**31


def check_index(index: Tensor, numel: int) -> Tensor:
    """Check once, when a sparse change is made, that ``index`` can address a tensor of ``numel`` elements.

    Args:
        index: (E,) int32 or int64, flat row-major positions.
        numel: elements of the tensor that is changed.

    Returns:
        ``index``, contiguous.

    Raises:
        KernelArgumentError: wrong rank or dtype; a position twice, out of order or out of range; int32 for a tensor
            of 2³¹ elements or more.
    """
    index = checks.index("index", index, "(E,)")
    if index.dtype == torch.int32 and numel > _INT32:
        raise checks.fail("index", f"is int32 for a tensor of {numel} elements", "int64 above 2147483648 elements")
    ops.check_sorted("index", index, numel)
    return index.contiguous()


def _change(weight: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    values = checks.tensor("values", values, "(E,)")
    index = checks.index("index", index, "(E,)")
    if not isinstance(weight, Tensor) or weight.dtype not in checks.FLOATS:
        found = checks.shape_of(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise checks.fail("weight", f"is {found}", "a floating tensor")
    if values.shape[0] != index.shape[0]:
        raise checks.fail("values", f"has {values.shape[0]} entries", f"one for each of the {index.shape[0]} positions")
    for name, other in (("values", values), ("index", index)):
        if other.device != weight.device:
            raise checks.fail(name, f"is on {other.device}", f"{weight.device}, where 'weight' is")
    return values, index


def _layer(
    x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks common to the layers; x in the dtype of the computation."""
    values, index = _change(weight, values, index)
    if not isinstance(x, Tensor) or x.dtype not in checks.FLOATS:
        found = checks.shape_of(x) if isinstance(x, Tensor) else type(x).__name__
        raise checks.fail("x", f"is {found}", "a floating tensor")
    if x.device != weight.device:
        raise checks.fail("x", f"is on {x.device}", f"{weight.device}, where 'weight' is")
    if weight.requires_grad and torch.is_grad_enabled():
        raise checks.fail(
            "weight",
            "requires a gradient",
            "a frozen weight (requires_grad_(False)); for a trained one use sparse_delta with the layer's own function",
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise checks.fail("bias", f"is {checks.shape_of(bias)}", f"({weight.shape[0]},), one for each row of 'weight'")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, values, index


def sparse_delta(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W + ΔW as a new tensor: for norms, biases and embeddings, where a copy costs nothing.

    Args:
        weight: any shape.
        values: (E,) what is added.
        index: (E,) sorted flat positions.
        dtype: of the result, rounded once; None: the weight's.

    Gradients: of ``values`` the chosen entries; of ``weight``, if it requires one, all of it.
    """
    values, index = _change(weight, values, index)
    out: Tensor = ops.sparse_delta(weight, values, index, weight.dtype if dtype is None else dtype)
    return out


def sparse_delta_linear(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W + ΔW)ᵀ + b with frozen W.

    Args:
        x: (..., I). Its dtype, or autocast's, is the dtype of the computation: W + ΔW is rounded to it once. A
            float32 x with a bfloat16 weight therefore loses no small change.
        weight: (O, I), any floating dtype; must not require a gradient.
        values: (E,) trained entries of ΔW, usually float32.
        index: (E,) int32 or int64, sorted flat positions in (O, I); see :func:`check_index`.
        bias: (O,) or None.

    Returns:
        (..., O) in the dtype of the computation.

    Gradients: x, values (summed in float32 or wider), bias. Saved for backward: x, weight, values and index
    themselves; W + ΔW is built again. First derivatives only.

    Raises:
        KernelArgumentError: shapes or devices that do not fit, or a weight that requires a gradient.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise checks.fail("weight", _shape(weight), "a matrix (O, I)")
    x, values, index = _layer(x, weight, values, index, bias)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise checks.fail("x", f"is {checks.shape_of(x)}", f"last dimension {weight.shape[1]}, the columns of 'weight'")
    out: Tensor = ops.sparse_delta_linear(x, weight, values, index, bias)
    return out


def sparse_delta_conv(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv(x, W + ΔW) + b with frozen W in one, two or three spatial dimensions, as the weight has.

    Args:
        x: (B, C, *S) or (C, *S).
        weight: (O, C / groups, *K).
        values, index, bias: as for :func:`sparse_delta_linear`.
        stride, padding, dilation, groups: as for torch's convolutions; padding also ``"same"`` or ``"valid"``. Other
            padding modes: pad x first.

    Returns:
        (B, O, *S') or (O, *S'), contiguous.

    Gradients, dtypes and errors are those of :func:`sparse_delta_linear`. On GPUs, a half-precision x gives value
    gradients that cuDNN rounded to that precision.
    """
    if not isinstance(weight, Tensor) or weight.dim() not in (3, 4, 5):
        raise checks.fail("weight", _shape(weight), "(O, C / groups, *K) with one to three kernel dimensions")
    x, values, index = _layer(x, weight, values, index, bias)
    dims = weight.dim() - 2
    if x.dim() not in (dims + 1, dims + 2):
        raise checks.fail("x", f"is {checks.shape_of(x)}", f"(B, C, *S) or (C, *S) with {dims} spatial dimensions")
    single = x.dim() == dims + 1
    x = x.unsqueeze(0) if single else x
    groups = checks.count("groups", groups, 1)
    if x.shape[1] != weight.shape[1] * groups:
        raise checks.fail("x", f"is {checks.shape_of(x)}", f"{weight.shape[1] * groups} channels")
    if weight.shape[0] % groups:
        raise checks.fail("groups", f"is {groups}", f"a divisor of the {weight.shape[0]} output channels")
    steps = _each("stride", stride, dims, 1)
    spread = _each("dilation", dilation, dims, 1)
    if isinstance(padding, str):
        checks.choice("padding", padding, ("same", "valid"))
        x, pads = _same(x, weight, spread, steps) if padding == "same" else (x, [0] * dims)
    else:
        pads = _each("padding", padding, dims, 0)
    for n, k, p, d in zip(x.shape[2:], weight.shape[2:], pads, spread):
        if n + 2 * p < d * (k - 1) + 1:
            raise checks.fail("x", f"is {checks.shape_of(x)}", f"at least {d * (k - 1) + 1 - 2 * p} in each dimension")
    y: Tensor = ops.sparse_delta_conv(x, weight, values, index, bias, steps, pads, spread, groups)
    return y.squeeze(0) if single else y


def sparse_delta_conv1d(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`sparse_delta_conv` of a weight (O, C / groups, k)."""
    return _conv(1, x, weight, values, index, bias, stride, padding, dilation, groups)


def sparse_delta_conv2d(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`sparse_delta_conv` of a weight (O, C / groups, k, k)."""
    return _conv(2, x, weight, values, index, bias, stride, padding, dilation, groups)


def sparse_delta_conv3d(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`sparse_delta_conv` of a weight (O, C / groups, k, k, k)."""
    return _conv(3, x, weight, values, index, bias, stride, padding, dilation, groups)


def _conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    if not isinstance(weight, Tensor) or weight.dim() != dims + 2:
        raise checks.fail("weight", _shape(weight), f"(O, C / groups, *K) with {dims} kernel dimensions")
    return sparse_delta_conv(x, weight, values, index, bias, stride, padding, dilation, groups)


def _shape(value: object) -> str:
    return f"is {checks.shape_of(value)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"


def _each(argument: str, value: int | Sequence[int], dims: int, least: int) -> list[int]:
    """One number for each spatial dimension."""
    sizes = [value] * dims if isinstance(value, int) else list(value)
    if len(sizes) == 1:
        sizes = sizes * dims
    if len(sizes) != dims:
        raise checks.fail(argument, f"is {value}", f"one number or {dims}")
    return [checks.count(argument, size, least) for size in sizes]


def _same(x: Tensor, weight: Tensor, dilation: Sequence[int], stride: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Padding that keeps the size; what an even kernel needs more on the far side is put there beforehand."""
    if any(s != 1 for s in stride):
        raise checks.fail("padding", "is 'same' with a stride", "stride 1, or numbers")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if any(t % 2 for t in total):
        x = F.pad(x, [p for t in reversed(total) for p in (0, t % 2)])
    return x, [t // 2 for t in total]


def sddmm(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Chosen entries of aᵀb: Σ_t a[t, index // N] · b[t, index % N].

    Args:
        a: (T, M).
        b: (T, N), same dtype.
        index: (E,) sorted flat positions in (M, N).

    Returns:
        (E,), float64 for float64 operands, float32 for all others. First derivatives only.
    """
    a, b = checks.tensor("a", a, "(T, M)"), checks.tensor("b", b, "(T, N)")
    checks.alike("a", a, "b", b, last=False)
    index = checks.index("index", index, "(E,)")
    if index.device != a.device:
        raise checks.fail("index", f"is on {index.device}", f"{a.device}, where 'a' is")
    out: Tensor = ops.sddmm(a, b, index)
    return out


def rounded_away(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> float:
    """Share of the non-zero values that W + ΔW loses to rounding in ``dtype`` (default: the weight's), 0 to 1.

    A bfloat16 weight near 1 cannot take a change of 1e-3. Where this is large, give the layer a float32 input.
    """
    values, index = _change(weight, values, index)
    with torch.no_grad():
        base = weight.reshape(-1).index_select(0, index)
        wide = torch.promote_types(torch.promote_types(weight.dtype, values.dtype), torch.float32)
        target = weight.dtype if dtype is None else dtype
        changed = (base.to(wide) + values.to(wide)).to(target)
        live = values != 0
        lost = live & (changed == base.to(target))
        return float(lost.sum()) / max(int(live.sum()), 1)
