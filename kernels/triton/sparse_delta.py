"""Sparse weight changes on GPUs: a value gradient without dense dW, a forward without a copy of W.

Both work on tiles of the weight (M, N) and need, once for each index, a plan of the tiles that hold entries: one bit a
position, the number of the first entry in each row of the tile, and the order of the entries by (tile, row, column).
Inside a tile the number of an entry is its row's first number plus how many bits of the row come before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from peft_suite.kernels.triton.common import CompileCase, ceil_div, interpreted, launch_guard, signature

__all__ = [
    "Plan",
    "compile_cases",
    "make_plan",
    "sddmm",
    "sddmm_cannot",
    "sddmm_pass",
    "sparse_linear",
    "sparse_linear_cannot",
    "sparse_linear_pass",
]

BM, BN = 64, 64  # rows and columns of a tile of the value gradient
BT = 32  # tokens of one product
LINEAR = (64, 32)  # rows and columns of a tile of the forward
LINEAR_BT = {torch.float32: 32}  # its tokens; 64 spill in float32
ENOUGH_PROGRAMS = 132 * 2
_UNMEASURED = "not measured faster yet than torch's dense product of one layer"


class Plan(NamedTuple):
    """Where the entries of an index (E,) in a weight (M, N) lie, by tiles.

    Attributes:
        tiles: (P, 2) int32, tile row and tile column of each tile that holds entries.
        bits: (P, rows, columns // 32) int32, bit c % 32 of word c // 32: the position holds an entry.
        first: (P, rows) int32, number of the row's first entry in tile order.
        order: (E,) int32, tile order -> order of the index.
        where: (tile rows, tile columns) int32, number of the tile or −1.
    """

    tiles: Tensor
    bits: Tensor
    first: Tensor
    order: Tensor
    where: Tensor


def make_plan(index: Tensor, m: int, n: int, rows: int, columns: int) -> Plan:
    """The plan of a sorted index for tiles (rows, columns); synchronises, so it belongs into set-up."""
    at = index.long()
    row, column = at // n, at % n
    wide = ceil_div(n, columns)
    place = ((row // rows) * wide + column // columns) * (rows * columns)
    place = place + (row % rows) * columns + column % columns
    place, order = place.sort()
    numbers, tile = torch.unique_consecutive(place // (rows * columns), return_inverse=True)
    inside = place % (rows * columns)
    words = torch.zeros(numbers.numel() * rows * (columns // 32), dtype=torch.int64, device=index.device)
    words.scatter_add_(0, tile * (rows * columns // 32) + inside // 32, torch.ones_like(inside) << (inside % 32))
    counts = torch.bincount(tile * rows + inside // columns, minlength=numbers.numel() * rows)
    where = torch.full((ceil_div(m, rows) * wide,), -1, dtype=torch.int32, device=index.device)
    where[numbers] = torch.arange(numbers.numel(), dtype=torch.int32, device=index.device)
    words = torch.where(words > 0x7FFFFFFF, words - (1 << 32), words)
    return Plan(
        torch.stack((numbers // wide, numbers % wide), 1).to(torch.int32).contiguous(),
        words.to(torch.int32).view(-1, rows, columns // 32),
        (counts.cumsum(0) - counts).to(torch.int32).view(-1, rows),
        order.to(torch.int32),
        where.view(-1, wide),
    )


_plans: Any = WeakIdKeyDictionary()


def _plan(index: Tensor, m: int, n: int, rows: int, columns: int) -> Plan:
    """The plan of this tensor object, kept while it lives and is not written to."""
    if index.is_inference():
        return make_plan(index, m, n, rows, columns)
    plans: dict[tuple[int, int, int, int], Plan]
    version, plans = _plans.get(index) or (-1, {})
    if version != index._version:
        plans = {}
        _plans[index] = index._version, plans
    key = (m, n, rows, columns)
    if key not in plans:
        plans[key] = make_plan(index, m, n, rows, columns)
    return plans[key]


@triton.jit  # type: ignore[untyped-decorator]
def _entries(bits_ptr, first_ptr, order_ptr, tile, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    # tile -> chosen (BM, BN) 0 or 1, number (BM, BN) of the entry in the order of the index
    row = tl.arange(0, BM)
    column = tl.arange(0, BN)
    line = tile * BM + row
    word = tl.load(bits_ptr + (line * (BN // 32))[:, None] + (column // 32)[None, :])
    chosen = (word >> (column % 32)[None, :]) & 1
    number = tl.load(first_ptr + line)[:, None] + tl.cumsum(chosen, 1) - 1
    return chosen, tl.load(order_ptr + number, mask=chosen != 0, other=0)


@triton.jit(do_not_specialize=["T", "E", "chunk"])  # type: ignore[untyped-decorator]
def _sddmm_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, tiles_ptr, bits_ptr, first_ptr, order_ptr, out_ptr, T, M, N, E, chunk, a_t, a_m, b_t, b_n,
    WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # a (T, M), b (T, N): one tile of aᵀb over tokens [split · chunk, (split + 1) · chunk) -> out (splits, E)
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    m = tl.load(tiles_ptr + 2 * tile).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, chunk, BT):
        t = split * chunk + start + tl.arange(0, BT)
        live = (t < T) & (start + tl.arange(0, BT) < chunk)
        a = tl.load(a_ptr + (m * a_m)[:, None] + (t * a_t)[None, :], mask=(m < M)[:, None] & live[None, :], other=0.0)
        b = tl.load(b_ptr + (t * b_t)[:, None] + (n * b_n)[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    chosen, entry = _entries(bits_ptr, first_ptr, order_ptr, tile, BM, BN)
    tl.store(out_ptr + split * E + entry, total, mask=chosen != 0)


def sddmm_cannot(a: Tensor, b: Tensor, index: Tensor) -> str | None:
    """float64 and mixed operands go to torch."""
    if a.dtype == torch.float64 or a.dtype != b.dtype:
        return f"its products are of one dtype up to float32, not {a.dtype} and {b.dtype}"
    return None


def sddmm_pass(a: Tensor, b: Tensor, index: Tensor) -> str | None:
    """Not chosen by itself."""
    return _UNMEASURED


def sddmm(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """(T, M), (T, N) -> (E,) float32. Split over tokens where few tiles hold entries; partial sums in a fixed order."""
    plan = _plan(index, a.shape[1], b.shape[1], BM, BN)
    tokens, tiles = a.shape[0], plan.tiles.shape[0]
    splits = max(1, min(ceil_div(ENOUGH_PROGRAMS, max(tiles, 1)), ceil_div(tokens, 4 * BT)))
    chunk = ceil_div(ceil_div(tokens, splits), BT) * BT
    splits = ceil_div(tokens, chunk)
    out = torch.empty((splits, index.numel()), dtype=torch.float32, device=a.device)
    with launch_guard(a):
        _sddmm_kernel[(tiles, splits)](
            a, b, plan.tiles, plan.bits, plan.first, plan.order, out, tokens, a.shape[1], b.shape[1], index.numel(),
            chunk, *(a.stride(0), a.stride(1), b.stride(0), b.stride(1)), WIDEN=interpreted(), BM=BM, BN=BN, BT=BT,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, values_ptr, bias_ptr, where_ptr, bits_ptr, first_ptr, order_ptr, y_ptr, T, M, N,
    BIAS: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    # x (T, N), w (M, N): y (T, M) = x (w + Δ)ᵀ + bias, the entries of Δ joining each tile of w as it is loaded
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    block = tl.program_id(1).to(tl.int64)
    m = block * BM + tl.arange(0, BM)
    across = tl.cdiv(N, BN)
    total = tl.zeros((BT, BM), dtype=tl.float32)
    for step in range(0, across):
        n = step * BN + tl.arange(0, BN)
        x = tl.load(x_ptr + (t * N)[:, None] + n[None, :], mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
        w = tl.load(w_ptr + (m * N)[:, None] + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        w = w.to(tl.float32)
        tile = tl.load(where_ptr + block * across + step).to(tl.int64)
        if tile >= 0:
            chosen, entry = _entries(bits_ptr, first_ptr, order_ptr, tile, BM, BN)
            w += tl.load(values_ptr + entry, mask=chosen != 0, other=0.0).to(tl.float32)
        w = w.to(x_ptr.dtype.element_ty)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    inside = (t < T)[:, None] & (m < M)[None, :]
    tl.store(y_ptr + (t * M)[:, None] + m[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


def sparse_linear_cannot(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> str | None:
    """float64 goes to torch."""
    if torch.float64 in (x.dtype, weight.dtype, values.dtype):
        return "it sums in float32; float64 was given"
    return None


def sparse_linear_pass(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> str | None:
    """Not chosen by itself."""
    return _UNMEASURED


def sparse_linear(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """y = x (W + ΔW)ᵀ + b, W + ΔW rounded to x's dtype tile by tile and never stored."""
    m, n = weight.shape
    flat = x.reshape(-1, n).contiguous()
    y = x.new_empty(*x.shape[:-1], m)
    if y.numel() == 0:
        return y
    (rows, columns), tokens = LINEAR, LINEAR_BT.get(x.dtype, 64)
    plan = _plan(index, m, n, rows, columns)
    weight = weight.contiguous()
    shift = weight if bias is None else bias.contiguous()
    with launch_guard(x):
        _linear_kernel[(ceil_div(flat.shape[0], tokens), ceil_div(m, rows))](
            flat, weight, values.contiguous(), shift, plan.where, plan.bits, plan.first, plan.order, y,
            flat.shape[0], m, n, BIAS=bias is not None, WIDEN=interpreted(), BM=rows, BN=columns, BT=tokens,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def compile_cases() -> list[CompileCase]:
    """Both kernels in float32 and bfloat16."""
    cases = []
    options = {"enable_fp_fusion": True}
    maps = {"tiles_ptr": "*i32", "bits_ptr": "*i32", "first_ptr": "*i32", "order_ptr": "*i32", "where_ptr": "*i32"}
    for kind in ("fp32", "bf16"):
        blocks = {"WIDEN": False, "BM": BM, "BN": BN, "BT": BT}
        types = {**maps, "a_ptr": f"*{kind}", "b_ptr": f"*{kind}", "out_ptr": "*fp32"}
        cases.append(
            CompileCase(f"sddmm-{kind}", _sddmm_kernel, signature(_sddmm_kernel, blocks, **types), blocks, 4, options)
        )
        tokens = LINEAR_BT.get(torch.float32, 64) if kind == "fp32" else 64
        blocks = {"BIAS": True, "WIDEN": False, "BM": LINEAR[0], "BN": LINEAR[1], "BT": tokens}
        types = {**maps, "x_ptr": f"*{kind}", "w_ptr": f"*{kind}", "values_ptr": "*fp32", "bias_ptr": "*fp32"}
        types["y_ptr"] = f"*{kind}"
        kernel = _linear_kernel
        cases.append(
            CompileCase(f"sparse-linear-{kind}", kernel, signature(kernel, blocks, **types), blocks, 8, options)
        )
    return cases
