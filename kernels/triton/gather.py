"""Gather of rows by index, its scatter-add, and grouping relative to centres."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, ceil_div, launch_guard, next_power_of_2, signature

__all__ = [
    "compile_cases",
    "gather_rows",
    "gather_rows_cannot",
    "group_relative",
    "group_relative_cannot",
    "scatter_rows",
    "scatter_rows_cannot",
]

MAX_WIDTH = 512
ELEMENTS = 2048


@triton.jit(do_not_specialize=["N", "L", "blocks", "col_blocks"])  # type: ignore[untyped-decorator]
def _gather_kernel(x_ptr, idx_ptr, out_ptr, N, L, C, blocks, col_blocks, BL: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    # x: (B, N, C), idx: (B, L) -> out: (B, L, C)
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BC + tl.arange(0, BC)
    pid = pid // col_blocks
    b = (pid // blocks).to(tl.int64)
    row = (pid % blocks).to(tl.int64) * BL + tl.arange(0, BL)
    exists = row < L
    index = tl.load(idx_ptr + b * L + row, mask=exists, other=-1).to(tl.int64)
    source = (b * N + index) * C
    inside = (col < C)[None, :]
    value = tl.load(x_ptr + source[:, None] + col[None, :], mask=(index >= 0)[:, None] & inside, other=0)
    target = (b * L + row) * C
    tl.store(out_ptr + target[:, None] + col[None, :], value, mask=exists[:, None] & inside)


@triton.jit(do_not_specialize=["N", "M", "k", "blocks"])  # type: ignore[untyped-decorator]
def _relative_kernel(  # type: ignore[no-untyped-def]
    x_ptr, centre_ptr, idx_ptr, out_ptr, N, M, k, blocks,
    D: tl.constexpr, ACC: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # x: (B, N, D), centre: (B, M, D), idx: (B, M, k) -> out: (B, M, k, D)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    length = tl.cast(M, tl.int64) * k
    row = (pid % blocks).to(tl.int64) * BL + tl.arange(0, BL)
    col = tl.arange(0, BD)
    exists = row < length
    index = tl.load(idx_ptr + b * length + row, mask=exists, other=-1).to(tl.int64)
    mask = (index >= 0)[:, None] & (col < D)[None, :]
    source = ((b * N + index) * D)[:, None] + col[None, :]
    centre = ((b * M + row // k) * D)[:, None] + col[None, :]
    value = tl.load(x_ptr + source, mask=mask, other=0.0).to(ACC) - tl.load(
        centre_ptr + centre, mask=mask, other=0.0
    ).to(ACC)
    target = ((b * length + row) * D)[:, None] + col[None, :]
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (col < D)[None, :])


@triton.jit(do_not_specialize=["rows", "col_blocks"])  # type: ignore[untyped-decorator]
def _segment_sum_kernel(  # type: ignore[no-untyped-def]
    g_ptr, order_ptr, start_ptr, out_ptr, rows, C, col_blocks,
    ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # g: (B*L, C), order: (B*L,), start: (rows + 1,) -> out: (rows, C); row r sums g[order[start[r]:start[r + 1]]]
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BC + tl.arange(0, BC)
    row = (pid // col_blocks).to(tl.int64) * BR + tl.arange(0, BR)
    exists = row < rows
    begin = tl.load(start_ptr + row, mask=exists, other=0)
    count = tl.load(start_ptr + row + 1, mask=exists, other=0) - begin
    inside = (col < C)[None, :]
    total = tl.zeros([BR, BC], ACC)
    for t in range(0, tl.max(count, axis=0)):
        some = t < count
        source = tl.load(order_ptr + begin + t, mask=some, other=0)
        part = tl.load(g_ptr + (source * C)[:, None] + col[None, :], mask=some[:, None] & inside, other=0.0)
        total += part.to(ACC)
    target = (row * C)[:, None] + col[None, :]
    tl.store(out_ptr + target, total.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside)


@triton.jit(do_not_specialize=["N", "L", "blocks", "col_blocks"])  # type: ignore[untyped-decorator]
def _atomic_kernel(g_ptr, idx_ptr, out_ptr, N, L, C, blocks, col_blocks, BL: tl.constexpr, BC: tl.constexpr):  # type: ignore[no-untyped-def]
    # g: (B, L, C), idx: (B, L); adds to out: (B, N, C) in the type of out
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BC + tl.arange(0, BC)
    pid = pid // col_blocks
    b = (pid // blocks).to(tl.int64)
    row = (pid % blocks).to(tl.int64) * BL + tl.arange(0, BL)
    index = tl.load(idx_ptr + b * L + row, mask=row < L, other=-1).to(tl.int64)
    mask = (index >= 0)[:, None] & (col < C)[None, :]
    value = tl.load(g_ptr + ((b * L + row) * C)[:, None] + col[None, :], mask=mask, other=0.0)
    target = ((b * N + index) * C)[:, None] + col[None, :]
    tl.atomic_add(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=mask, sem="relaxed")


def _block(C: int, elements: int) -> tuple[int, int]:
    # rows and columns of a block of about ``elements``
    width = min(next_power_of_2(C), MAX_WIDTH)
    return max(elements // width, 1), width


def _accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def gather_rows_cannot(x: Tensor, idx: Tensor) -> str | None:
    """Why this back end cannot serve the call, or None."""
    return f"the Triton form does not take {x.dtype}" if x.is_complex() or x.dtype == torch.bool else None


def gather_rows(x: Tensor, idx: Tensor) -> Tensor:
    """out[b, l] = x[b, idx[b, l]], zeros where idx is -1; x (B, N, C), idx (B, L) -> (B, L, C)."""
    return run_gather(x.contiguous(), idx.contiguous(), elements=ELEMENTS)


def run_gather(x: Tensor, idx: Tensor, *, elements: int) -> Tensor:
    """The launch; contiguous arguments, blocks of about ``elements``."""
    (B, N, C), L = x.shape, idx.shape[1]
    out = torch.empty(B, L, C, device=x.device, dtype=x.dtype)
    rows, width = _block(C, elements)
    blocks, col_blocks = ceil_div(L, rows), ceil_div(C, width)
    # half types are moved as their bits
    half = x.dtype in (torch.float16, torch.bfloat16)
    source, target = (x.view(torch.int16), out.view(torch.int16)) if half else (x, out)
    with launch_guard(x):
        _gather_kernel[(B * blocks * col_blocks,)](
            source, idx, target, N, L, C, blocks, col_blocks, BL=rows, BC=width, num_warps=4, enable_fp_fusion=True
        )
    return out


def scatter_rows_cannot(g: Tensor, idx: Tensor, n: int, deterministic: bool) -> str | None:
    """Why this back end cannot serve the call, or None."""
    return None if g.is_floating_point() else f"the Triton form sums floating-point rows, got {g.dtype}"


def scatter_rows(g: Tensor, idx: Tensor, n: int, deterministic: bool) -> Tensor:
    """out[b, r] = Σ g[b, l] over idx[b, l] = r, accumulated in fp32 (fp64 for fp64).

    Args:
        g: (B, L, C).
        idx: (B, L); -1 is left out.
        deterministic: sum every row in the order of l, through a stable sort of idx; otherwise atomics.

    Returns:
        (B, n, C) in the type of g.
    """
    g, idx = g.contiguous(), idx.contiguous()
    if deterministic:
        return run_segment_sum(g, idx, n, elements=256)
    return run_atomic(g, idx, n, elements=ELEMENTS)


def run_segment_sum(g: Tensor, idx: Tensor, n: int, *, elements: int) -> Tensor:
    """The deterministic launch; contiguous arguments."""
    B, _, C = g.shape
    out = torch.empty(B, n, C, device=g.device, dtype=g.dtype)
    # destination row of every source row; the left-out ones sort behind all rows
    cloud = torch.arange(B, device=g.device, dtype=torch.int64)[:, None] * n
    target = torch.where(idx >= 0, idx.to(torch.int64) + cloud, B * n).flatten()
    target, order = torch.sort(target, stable=True)
    start = torch.searchsorted(target, torch.arange(B * n + 1, device=g.device, dtype=torch.int64))
    rows, width = _block(C, elements)
    col_blocks = ceil_div(C, width)
    with launch_guard(g):
        _segment_sum_kernel[(ceil_div(B * n, rows) * col_blocks,)](
            g, order, start, out, B * n, C, col_blocks, ACC=_accumulator(g.dtype)[1], BR=rows, BC=width,
            num_warps=1 if rows * width <= 256 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def run_atomic(g: Tensor, idx: Tensor, n: int, *, elements: int) -> Tensor:
    """The atomic launch; contiguous arguments."""
    B, L, C = g.shape
    out = torch.zeros(B, n, C, device=g.device, dtype=_accumulator(g.dtype)[0])
    rows, width = _block(C, elements)
    blocks, col_blocks = ceil_div(L, rows), ceil_div(C, width)
    with launch_guard(g):
        _atomic_kernel[(B * blocks * col_blocks,)](
            g, idx, out, n, L, C, blocks, col_blocks, BL=rows, BC=width, num_warps=4, enable_fp_fusion=True
        )
    return out.to(g.dtype)


def group_relative_cannot(xyz: Tensor, centers: Tensor, idx: Tensor) -> str | None:
    """Why this back end cannot serve the call, or None."""
    if xyz.shape[-1] > 64:
        return f"the Triton form takes at most 64 coordinates, got {xyz.shape[-1]}"
    return None if xyz.is_floating_point() else f"the Triton form takes floating-point coordinates, got {xyz.dtype}"


def group_relative(xyz: Tensor, centers: Tensor, idx: Tensor) -> Tensor:
    """xyz[idx] − centre in one pass, zeros where idx is -1.

    Args:
        xyz: (B, N, D).
        centers: (B, M, D).
        idx: (B, M, k).

    Returns:
        (B, M, k, D).
    """
    return run_relative(xyz.contiguous(), centers.contiguous(), idx.contiguous(), elements=1024)


def run_relative(xyz: Tensor, centers: Tensor, idx: Tensor, *, elements: int) -> Tensor:
    """The launch; contiguous arguments."""
    (B, N, D), (_, M, k) = xyz.shape, idx.shape
    dtype = torch.promote_types(xyz.dtype, centers.dtype)
    out = torch.empty(B, M, k, D, device=xyz.device, dtype=dtype)
    rows, width = _block(D, elements)
    blocks = ceil_div(M * k, rows)
    with launch_guard(xyz):
        _relative_kernel[(B * blocks,)](
            xyz, centers, idx, out, N, M, k, blocks, D=D, ACC=_accumulator(dtype)[1], BL=rows, BD=width,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """Widths of coordinates and of features, fp32 and half."""

    def case(name: str, kernel: Any, num_warps: int, constexprs: dict[str, Any], **types: str) -> CompileCase:
        options = {"enable_fp_fusion": True}
        return CompileCase(name, kernel, signature(kernel, constexprs, **types), constexprs, num_warps, options)

    cases = []
    for C in (3, 384):
        rows, width = _block(C, ELEMENTS)
        block: dict[str, Any] = {"BL": rows, "BC": width}
        for kind, bits in (("fp32", "fp32"), ("bf16", "i16")):
            types = {"x_ptr": f"*{bits}", "out_ptr": f"*{bits}", "idx_ptr": "*i64"}
            cases.append(case(f"gather-{C}-{kind}", _gather_kernel, 4, block, **types))
        for kind in ("fp32", "bf16"):
            types = {"g_ptr": f"*{kind}", "out_ptr": "*fp32", "idx_ptr": "*i64"}
            cases.append(case(f"scatter-atomic-{C}-{kind}", _atomic_kernel, 4, block, **types))
            rows, width = _block(C, 256)
            sizes = {"ACC": tl.float32, "BR": rows, "BC": width}
            types = {
                "g_ptr": f"*{kind}", "out_ptr": f"*{kind}", "order_ptr": "*i64", "start_ptr": "*i64", "rows": "i64",
            }  # fmt: skip
            warps = 1 if rows * width <= 256 else 4
            cases.append(case(f"scatter-sorted-{C}-{kind}", _segment_sum_kernel, warps, sizes, **types))
    for kind in ("fp32", "bf16"):
        rows, width = _block(3, 1024)
        sizes = {"D": 3, "ACC": tl.float32, "BL": rows, "BD": width}
        types = {"x_ptr": f"*{kind}", "centre_ptr": f"*{kind}", "out_ptr": f"*{kind}", "idx_ptr": "*i64"}
        cases.append(case(f"group-relative-{kind}", _relative_kernel, 4, sizes, **types))
    return cases
