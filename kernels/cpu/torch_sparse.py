"""Sparse weight changes and digit counts in plain torch: always there, on CPU and GPU.

The value gradient on CPU is a sampled product, but for small weights: only the chosen entries of gᵀx are computed,
token chunk by token chunk (band by band for convolutions), so that neither the dense gradient nor tokens × entries
numbers exist. On GPUs the dense product of one layer is cheaper than gathering; it lives for that layer only.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_suite.kernels.reference.sparse import accumulate_dtype, image

__all__ = [
    "conv_sddmm",
    "digit_histogram",
    "effective",
    "sddmm",
    "sparse_conv",
    "sparse_conv_input",
    "sparse_linear",
    "sparse_linear_input",
]

PIECE_BYTES = 8 << 20  # of the changed weight on CPU at a time: large blocks leave holes in the heap
SAMPLE_ELEMENTS = 1 << 20  # operand elements of one sampled product
SAMPLE_LEAST = 1 << 16  # elements of a weight below which the dense product is faster on CPU
SAMPLE_DENSITY = 0.1  # above this share of entries the dense product is faster on CPU (benchmarks/kernels/sparse.py)
MOST_GROUPS = 8  # of a convolution that is sampled group by group


# the transient weight ------------------------------------------------------------------------------------------------


def effective(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """W + ΔW in ``dtype``, fresh: one copy of W and a rewrite of the chosen entries, each rounded once."""
    return _rewrite(weight.to(dtype, copy=True, memory_format=torch.contiguous_format), weight, values, index)


def _transient(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`effective` for one product: on CPU in the thread's buffer, which the next call overwrites."""
    if weight.device.type != "cpu":
        return effective(weight, values, index, dtype)
    return _rewrite(_buffer(weight.numel(), dtype).view(weight.shape).copy_(weight), weight, values, index)


def _rewrite(dense: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    if index.numel():
        at = index.long()
        exact = dense if torch.promote_types(weight.dtype, dense.dtype) == dense.dtype else weight.contiguous()
        wide = torch.promote_types(weight.dtype, values.dtype)
        changed = exact.view(-1).index_select(0, at).to(wide) + values.to(wide)
        dense.view(-1).scatter_(0, at, changed.to(dense.dtype))
    return dense


_thread = threading.local()


def _buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of the thread's memory for one piece: no fresh pages, no holes in the heap between what stays."""
    size = numel * dtype.itemsize
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside
            _thread.buffer = buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype)


def _pieces(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows start:stop of the effective weight), each gone when the next comes.

    ``index`` is sorted, so each piece owns a slice of it.
    """
    count = math.ceil(weight.numel() * dtype.itemsize / PIECE_BYTES) if weight.device.type == "cpu" else 1
    rows = weight.shape[0]
    if count <= 1:
        yield 0, rows, _transient(weight, values, index, dtype)
        return
    bounds = [rows * piece // count for piece in range(count + 1)]
    bounds = [low for low, high in pairwise(bounds) if low < high] + [rows]
    row = weight[0].numel()
    inner = torch.tensor([row * bound for bound in bounds[1:-1]], device=index.device, dtype=index.dtype)
    cuts = [0, *torch.searchsorted(index, inner).tolist(), index.numel()]
    for (start, stop), (low, high) in zip(pairwise(bounds), pairwise(cuts)):
        yield start, stop, _transient(weight[start:stop], values[low:high], index[low:high] - start * row, dtype)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """Of one or more terms, halves added up in float32."""
    total = first = next(parts)
    for part in parts:
        total = total.to(accumulate_dtype(first)) if total is first else total
        total += part
    return total.to(first.dtype)


# linear --------------------------------------------------------------------------------------------------------------


def sparse_linear(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """y = x (W + ΔW)ᵀ + b."""
    bias = None if bias is None else bias.to(x.dtype)
    out: Tensor | None = None
    for start, stop, piece in _pieces(weight, values, index, x.dtype):
        if stop - start == weight.shape[0]:
            return F.linear(x, piece, bias).contiguous()
        out = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
        out[..., start:stop] = F.linear(x, piece, None if bias is None else bias[start:stop])
    assert out is not None
    return out


def sparse_linear_input(g: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """g (W + ΔW)."""
    flat = g.reshape(-1, g.shape[-1])
    parts = (flat[:, start:stop] @ piece for start, stop, piece in _pieces(weight, values, index, g.dtype))
    return _sum(parts).view(*g.shape[:-1], weight.shape[1])


# sampled products ----------------------------------------------------------------------------------------------------


class _Sampled:
    """Σ over chunks of the chosen entries of P·Qᵀ, P (M, L) and Q (N, L); ``index`` flat positions in (M, N)."""

    def __init__(self, index: Tensor, m: int, n: int, dtype: torch.dtype) -> None:
        _quiet()
        step = torch.arange(m + 1, device=index.device, dtype=index.dtype) * n
        rows = torch.searchsorted(index, step, out_int32=index.dtype == torch.int32)
        zeros = torch.zeros(index.numel(), dtype=dtype, device=index.device)
        self.sums = torch.sparse_csr_tensor(rows, index % n, zeros, (m, n), check_invariants=False)

    def add(self, p: Tensor, q: Tensor) -> None:
        torch.sparse.sampled_addmm(self.sums, p, q.t(), out=self.sums)

    def values(self) -> Tensor:
        return self.sums.values()


@functools.cache
def _quiet() -> None:
    """Torch says once per process that its sparse layout is in beta; only the layout's storage is used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _samples(index: Tensor, total: int) -> bool:
    return index.device.type == "cpu" and total >= SAMPLE_LEAST and index.numel() <= SAMPLE_DENSITY * total


def sddmm(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Σ_t a[t, index // N] · b[t, index % N], (T, M), (T, N) -> (E,)."""
    acc = accumulate_dtype(a)
    if not _samples(index, a.shape[1] * b.shape[1]):
        return _dense_product(a, b, acc).view(-1).index_select(0, index.long())
    sampled = _Sampled(index, a.shape[1], b.shape[1], acc)
    chunk = max(64, SAMPLE_ELEMENTS // (a.shape[1] + b.shape[1]))
    for start in range(0, a.shape[0], chunk):
        p, q = a[start : start + chunk], b[start : start + chunk]
        sampled.add(p.t().to(acc), q.t().to(acc))
    return sampled.values()


def _dense_product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """aᵀ b in ``acc``; halves are multiplied as they are on GPUs, with float32 sums and a float32 result."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16) and a.numel() and b.numel():
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().to(acc) @ b.to(acc)


# convolution ---------------------------------------------------------------------------------------------------------


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
    bias = None if bias is None else bias.to(x.dtype)
    zeros = [0] * len(stride)
    if groups > 1:
        dense = effective(weight, values, index, x.dtype)
        return torch.convolution(x, dense, bias, stride, padding, dilation, False, zeros, groups).contiguous()
    parts = [
        torch.convolution(
            x, piece, None if bias is None else bias[start:stop], stride, padding, dilation, False, zeros, 1
        )
        for start, stop, piece in _pieces(weight, values, index, x.dtype)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).contiguous()


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

    x = g.new_empty(1).expand(size)  # only its shape is read

    def gradient(g: Tensor, dense: Tensor) -> Tensor:
        return _convolution_backward(g, x, dense, stride, padding, dilation, groups, [True, False, False])[0]

    if groups > 1:
        return gradient(g, effective(weight, values, index, g.dtype)).contiguous()
    pieces = _pieces(weight, values, index, g.dtype)
    return _sum(gradient(g[:, start:stop], piece) for start, stop, piece in pieces).contiguous()


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
    """The chosen entries of the weight gradient."""
    acc = accumulate_dtype(g)
    inner = x.shape[1] // groups * math.prod(kernel)  # K, the columns of the weight as a matrix (O, K)
    if groups > MOST_GROUPS or not _samples(index, g.shape[1] * inner):
        shape = (g.shape[1], x.shape[1] // groups, *kernel)
        if g.device.type == "cpu":
            g, x = g.to(acc), x.to(acc)
        empty = g.new_empty(1).expand(shape)
        dense = _convolution_backward(g, x, empty, stride, padding, dilation, groups, [False, True, False])[1]
        return dense.reshape(-1).index_select(0, index.long()).to(acc)
    pads = [p for amount in reversed(padding) for p in (amount, amount)]
    x = (F.pad(x, pads) if any(pads) else x).contiguous()
    rows = g.shape[1] // groups
    cuts = [0, index.numel()]
    if groups > 1:
        bounds = torch.arange(groups + 1, device=index.device, dtype=index.dtype) * (rows * inner)
        cuts = torch.searchsorted(index, bounds).tolist()
    parts = []
    for group, (low, high) in enumerate(pairwise(cuts)):
        if low == high:
            continue
        sampled = _Sampled(index[low:high] - group * rows * inner, rows, inner, acc)
        gs, xs = g.chunk(groups, 1)[group], x.chunk(groups, 1)[group]
        for sample in range(x.shape[0]):
            for p, q in _bands(gs[sample], xs[sample], kernel, stride, dilation):
                sampled.add(p.to(acc), q.to(acc))
        parts.append(sampled.values())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=acc, device=g.device)


def _bands(
    g: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(O, L) pieces of the output gradient and the (C·Πkernel, L) input windows they meet; x (C, *S) is padded."""
    channels, out = x.shape[0], tuple(g.shape[1:])
    if math.prod(kernel) == 1 and all(s == 1 for s in stride):
        yield g.reshape(g.shape[0], -1), x.reshape(channels, -1)
        return
    line = math.prod(out[1:])
    inner = channels * math.prod(kernel)
    band = max(1, SAMPLE_ELEMENTS // max(inner * line, 1))
    steps = x.stride()[1:]
    strides = (x.stride(0), *(d * s for d, s in zip(dilation, steps)), *(m * s for m, s in zip(stride, steps)))
    buffer = x.new_empty(inner * min(band, out[0]) * line)
    for start in range(0, out[0], band):
        height = min(band, out[0] - start)
        at = x.storage_offset() + start * stride[0] * steps[0]
        windows = x.as_strided((channels, *kernel, height, *out[1:]), strides, at)
        columns = buffer[: inner * height * line].view(windows.shape)
        columns.copy_(windows)
        yield g[:, start : start + height].reshape(g.shape[0], -1), columns.view(inner, -1)


# selection -----------------------------------------------------------------------------------------------------------


def digit_histogram(x: Tensor, absolute: bool, shift: int, bits: int, prefix: int | None) -> Tensor:
    """Counts of one digit of the ordered integer image; see the reference."""
    key = image(x, absolute)
    if prefix is None:
        return torch.bincount((key >> shift) + (1 << (bits - 1)), minlength=1 << bits)
    key = key[(key >> (shift + bits)) == prefix]
    return torch.bincount((key >> shift) & ((1 << bits) - 1), minlength=1 << bits)
