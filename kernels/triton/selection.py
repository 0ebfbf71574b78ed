"""Digit histograms for radix selection: one read of the elements, counts in registers, no atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, ceil_div, launch_guard, signature

__all__ = ["compile_cases", "digit_histogram", "digit_histogram_cannot", "digit_histogram_pass"]

BLOCK = 2048
PROGRAMS = 132 * 4


@triton.jit(do_not_specialize=["n", "steps", "prefix"])  # type: ignore[untyped-decorator]
def _histogram_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, n, steps, prefix,
    ABSOLUTE: tl.constexpr, TOP: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # x (n,) float32 -> out (programs, 2**BITS) int32
    pid = tl.program_id(0).to(tl.int64)
    counts = tl.zeros((1 << BITS,), dtype=tl.int32)
    for step in range(0, steps):
        at = (pid * steps + step) * BLOCK + tl.arange(0, BLOCK)
        live = at < n
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        if ABSOLUTE:
            key = tl.abs(x).to(tl.int32, bitcast=True)
        else:
            key = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
            key = key ^ ((key >> 31) & 0x7FFFFFFF)
        if TOP:
            digit = (key >> SHIFT) + (1 << (BITS - 1))
        else:
            digit = (key >> SHIFT) & ((1 << BITS) - 1)
            live = live & ((key >> (SHIFT + BITS)) == prefix)
        counts += tl.histogram(tl.where(live, digit, 0), 1 << BITS, mask=live)
    tl.store(out_ptr + pid * (1 << BITS) + tl.arange(0, 1 << BITS), counts)


def digit_histogram_cannot(x: Tensor, absolute: bool, shift: int, bits: int, prefix: int | None) -> str | None:
    """float64 goes to torch."""
    return None if x.dtype == torch.float32 else f"its integer image is that of float32, not {x.dtype}"


def digit_histogram_pass(x: Tensor, absolute: bool, shift: int, bits: int, prefix: int | None) -> str | None:
    """Not chosen by itself."""
    return "not measured faster yet than torch.bincount"


def digit_histogram(x: Tensor, absolute: bool, shift: int, bits: int, prefix: int | None) -> Tensor:
    """Counts (2**bits,) int64 of one digit of the ordered integer image; see the reference."""
    x = x.contiguous()
    blocks = ceil_div(x.numel(), BLOCK)
    programs = max(1, min(PROGRAMS, blocks))
    steps = ceil_div(blocks, programs)
    out = torch.empty((programs, 1 << bits), dtype=torch.int32, device=x.device)
    with launch_guard(x):
        _histogram_kernel[(programs,)](
            x, out, x.numel(), steps, 0 if prefix is None else prefix, ABSOLUTE=absolute, TOP=prefix is None,
            SHIFT=shift, BITS=bits, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out.sum(0)


def compile_cases() -> list[CompileCase]:
    """The top and the last digit."""
    cases = []
    for name, absolute, top, shift, bits in (
        ("top", True, True, 21, 11),
        ("middle", False, False, 10, 11),
        ("last", False, False, 0, 10),
    ):
        sizes: dict[str, Any] = {"ABSOLUTE": absolute, "TOP": top, "SHIFT": shift, "BITS": bits, "BLOCK": BLOCK}
        types = signature(_histogram_kernel, sizes, x_ptr="*fp32", out_ptr="*i32", n="i64")
        options = {"enable_fp_fusion": True}
        cases.append(CompileCase(f"histogram-{name}", _histogram_kernel, types, sizes, 4, options))
    return cases
