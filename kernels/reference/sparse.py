"""Sparse weight changes and exact selection, written to be read: the definition every form is tested against.

A sparse change ΔW of a frozen tensor W is zero except ΔW.flatten()[index] = values, ``index`` (E,) flat row-major
positions, sorted, unique, int32 or int64. ``effective`` = round(W + ΔW) to the dtype in which it is used, rounded once.

Raw functions of every back end (no argument checks; outputs fresh and contiguous; acc = float64 for float64, else
float32):

    sparse_linear(x (..., I), weight (O, I), values (E,), index (E,), bias (O,)|None) -> (..., O) in x.dtype
    sparse_linear_input(g (..., O), weight, values, index) -> (..., I) in g.dtype
    sddmm(a (T, M), b (T, N), index) -> (E,) acc: Σ_t a[t, index // N] · b[t, index % N]
    sparse_conv(x (B, C, *S), weight (O, C/groups, *K), values, index, bias, stride, padding, dilation, groups)
        -> (B, O, *S') in x.dtype
    sparse_conv_input(g (B, O, *S'), weight, values, index, size, stride, padding, dilation, groups) -> size, g.dtype
    conv_sddmm(g, x, kernel, index, stride, padding, dilation, groups) -> (E,) acc: weight gradient at the positions
    digit_histogram(x (n,), absolute, shift, bits, prefix) -> (2**bits,) int64: see there
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "conv_sddmm",
    "digit_histogram",
    "effective",
    "image",
    "kth_value",
    "sddmm",
    "sparse_conv",
    "sparse_conv_input",
    "sparse_linear",
    "sparse_linear_input",
]


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def effective(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """W + ΔW in ``dtype``: added in the wider of the two dtypes, rounded once."""
    dense = weight.to(torch.promote_types(weight.dtype, values.dtype), copy=True).contiguous()
    dense.view(-1)[index.long()] += values.to(dense.dtype)
    return dense.to(dtype)


def sparse_linear(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """y = x (W + ΔW)ᵀ + b."""
    acc = accumulate_dtype(x)
    y = x.reshape(-1, x.shape[-1]).to(acc) @ effective(weight, values, index, x.dtype).to(acc).T
    y = y if bias is None else y + bias.to(acc)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def sparse_linear_input(g: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """g (W + ΔW)."""
    acc = accumulate_dtype(g)
    gx = g.reshape(-1, g.shape[-1]).to(acc) @ effective(weight, values, index, g.dtype).to(acc)
    return gx.to(g.dtype).reshape(*g.shape[:-1], weight.shape[1])


def sddmm(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """(aᵀ b).flatten()[index]."""
    acc = accumulate_dtype(a)
    return (a.to(acc).T @ b.to(acc)).reshape(-1)[index.long()]


def sparse_conv(
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
    """conv(x, W + ΔW) + b in one, two or three spatial dimensions."""
    acc = accumulate_dtype(x)
    bias = None if bias is None else bias.to(acc)
    dense = effective(weight, values, index, x.dtype).to(acc)
    zeros = [0] * len(stride)
    y = torch.convolution(x.to(acc), dense, bias, stride, padding, dilation, False, zeros, groups)
    return y.to(x.dtype).contiguous()


def _convolution_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
    )
    return out


def sparse_conv_input(
    g: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of :func:`sparse_conv` with respect to its input of shape ``size``."""
    dense = effective(weight, values, index, g.dtype)
    empty = g.new_empty(1).expand(size)
    return _convolution_backward(g, empty, dense, stride, padding, dilation, groups, [True, False, False])[
        0
    ].contiguous()


def conv_sddmm(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The dense weight gradient, gathered."""
    acc = accumulate_dtype(g)
    shape = (g.shape[1], x.shape[1] // groups, *kernel)
    empty = g.new_empty(1, dtype=acc).expand(shape)
    dense = _convolution_backward(g.to(acc), x.to(acc), empty, stride, padding, dilation, groups, [False, True, False])[
        1
    ]
    return dense.reshape(-1)[index.long()]


def image(x: Tensor, absolute: bool) -> Tensor:
    """Integers in the order of x (|x| if ``absolute``): int64 for float64, int32 for everything else; −0 equals +0.

    The bits of a non-negative float are ordered already; those of a negative one are ordered backwards, so all but the
    sign are flipped.
    """
    x = x.to(accumulate_dtype(x))
    if absolute:
        return x.abs().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    bits = (x + 0.0).view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    top = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (top.bits - 1)) & top.max)


def digit_histogram(x: Tensor, absolute: bool, shift: int, bits: int, prefix: int | None) -> Tensor:
    """How many elements have each value of the digit at ``shift``, ``bits`` wide, of their :func:`image`.

    ``prefix``: count only elements whose image, shifted right by ``shift + bits``, equals it. None: count all; the
    digit is the topmost one, carries the sign, and bin 0 is its most negative value.
    """
    key = image(x, absolute)
    if prefix is None:
        digit = (key >> shift) + (1 << (bits - 1))
    else:
        digit = (key[(key >> (shift + bits)) == prefix] >> shift) & ((1 << bits) - 1)
    return torch.bincount(digit.long(), minlength=1 << bits)


def kth_value(x: Tensor, k: int, largest: bool, absolute: bool) -> tuple[float, int, int]:
    """(k-th value, elements beyond it, elements equal to it) by sorting."""
    x = x.abs() if absolute else x
    value = x.sort(descending=largest).values[k - 1]
    beyond = (x > value) if largest else (x < value)
    return value.item(), int(beyond.sum()), int((x == value).sum())
