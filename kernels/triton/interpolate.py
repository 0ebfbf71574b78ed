"""Weighted sum of gathered rows (three_interpolate with k general)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, ceil_div, launch_guard, next_power_of_2, signature

__all__ = ["compile_cases", "three_interpolate", "three_interpolate_cannot"]

MAX_WIDTH = 512
ELEMENTS = 2048


@triton.jit(do_not_specialize=["M", "N", "k", "blocks", "col_blocks"])  # type: ignore[untyped-decorator]
def _interpolate_kernel(  # type: ignore[no-untyped-def]
    f_ptr, idx_ptr, weight_ptr, out_ptr, M, N, C, k, blocks, col_blocks, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # f: (B, M, C), idx and weight: (B, N, k) -> out: (B, N, C)
    pid = tl.program_id(0)
    col = (pid % col_blocks) * BC + tl.arange(0, BC)
    pid = pid // col_blocks
    b = (pid // blocks).to(tl.int64)
    row = (pid % blocks).to(tl.int64) * BL + tl.arange(0, BL)
    exists = row < N
    inside = (col < C)[None, :]
    total = tl.zeros([BL, BC], tl.float32)
    for j in range(0, k):
        slot = (b * N + row) * k + j
        index = tl.load(idx_ptr + slot, mask=exists, other=-1).to(tl.int64)
        real = index >= 0
        weight = tl.load(weight_ptr + slot, mask=real, other=0.0).to(tl.float32)
        source = ((b * M + index) * C)[:, None] + col[None, :]
        value = tl.load(f_ptr + source, mask=real[:, None] & inside, other=0.0).to(tl.float32)
        total += weight[:, None] * value
    target = ((b * N + row) * C)[:, None] + col[None, :]
    tl.store(out_ptr + target, total.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside)


def three_interpolate_cannot(feats: Tensor, idx: Tensor, weight: Tensor) -> str | None:
    """Why this back end cannot serve the call, or None."""
    if feats.dtype == torch.float64 or not feats.is_floating_point():
        return f"the Triton form computes in float32, got {feats.dtype}"
    return None


def three_interpolate(feats: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """out[b, i] = Σ_j weight[b, i, j] · feats[b, idx[b, i, j]], accumulated in fp32.

    Args:
        feats: (B, m, C).
        idx: (B, n, k); -1 contributes nothing.
        weight: (B, n, k) fp32.

    Returns:
        (B, n, C) in the type of feats.
    """
    return run(feats.contiguous(), idx.contiguous(), weight.contiguous(), elements=ELEMENTS)


def _block(C: int, elements: int) -> tuple[int, int]:
    width = min(next_power_of_2(C), MAX_WIDTH)
    return max(elements // width, 1), width


def run(feats: Tensor, idx: Tensor, weight: Tensor, *, elements: int) -> Tensor:
    """The launch; contiguous arguments, blocks of about ``elements``."""
    (B, M, C), (_, N, k) = feats.shape, idx.shape
    out = torch.empty(B, N, C, device=feats.device, dtype=feats.dtype)
    rows, width = _block(C, elements)
    blocks, col_blocks = ceil_div(N, rows), ceil_div(C, width)
    with launch_guard(feats):
        _interpolate_kernel[(B * blocks * col_blocks,)](
            feats, idx, weight, out, M, N, C, k, blocks, col_blocks, BL=rows, BC=width,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """Widths of coordinates and of features, fp32 and half."""
    cases = []
    for C in (3, 384):
        rows, width = _block(C, ELEMENTS)
        sizes: dict[str, Any] = {"BL": rows, "BC": width}
        for kind in ("fp32", "bf16"):
            types = {"f_ptr": f"*{kind}", "out_ptr": f"*{kind}", "idx_ptr": "*i64", "weight_ptr": "*fp32"}
            described = signature(_interpolate_kernel, sizes, **types)
            name = f"interpolate-{C}-{kind}"
            cases.append(CompileCase(name, _interpolate_kernel, described, sizes, 4, {"enable_fp_fusion": True}))
    return cases
