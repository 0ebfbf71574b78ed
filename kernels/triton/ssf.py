"""Scale-and-shift, forward and one-pass backward. Sums go through per-program partial sums: no atomics, repeatable."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, ceil_div, launch_guard, next_power_of_2

__all__ = [
    "compile_cases",
    "ssf",
    "ssf_backward",
    "ssf_backward_cannot",
    "ssf_backward_pass",
    "ssf_cannot",
    "ssf_pass",
]

PROGRAMS = 528  # four to each of 132 multiprocessors; fixed, so that sums are the same on every GPU
TILE = 2048
WARPS = 4
UNMEASURED = "no GPU has measured the kernel against what torch.compile makes of the plain expression"


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, s_ptr, b_ptr, y_ptr, rows, length, channels, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # x (rows, length): channels along the columns (LAST) or row modulo channels
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (r < rows)[:, None] & (c < length)[None, :]
    at = r[:, None] * length + c[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if LAST:
        s = tl.load(s_ptr + c, mask=c < length, other=0.0).to(tl.float32)[None, :]
        b = tl.load(b_ptr + c, mask=c < length, other=0.0).to(tl.float32)[None, :]
    else:
        s = tl.load(s_ptr + r % channels, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        b = tl.load(b_ptr + r % channels, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + at, (x * s + b).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward_last(  # type: ignore[no-untyped-def]
    g_ptr,
    x_ptr,
    s_ptr,
    gx_ptr,
    ps_ptr,
    pb_ptr,
    rows,
    channels,
    NEED_X: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # partial sums (programs, channels)
    first = tl.program_id(0)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    have = c < channels
    s = tl.load(s_ptr + c, mask=have, other=0.0).to(tl.float32)
    to_scale = tl.zeros([COLS], tl.float32)
    to_shift = tl.zeros([COLS], tl.float32)
    for block in range(first, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        r = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (r < rows)[:, None] & have[None, :]
        at = r[:, None] * channels + c[None, :]
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_X:
            tl.store(gx_ptr + at, (g * s[None, :]).to(gx_ptr.dtype.element_ty), mask=inside)
        if NEED_SCALE:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            to_scale += tl.sum(g * x, 0)
        if NEED_SHIFT:
            to_shift += tl.sum(g, 0)
    out = first.to(tl.int64) * channels + c
    if NEED_SCALE:
        tl.store(ps_ptr + out, to_scale, mask=have)
    if NEED_SHIFT:
        tl.store(pb_ptr + out, to_shift, mask=have)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward_inner(  # type: ignore[no-untyped-def]
    g_ptr,
    x_ptr,
    s_ptr,
    gx_ptr,
    ps_ptr,
    pb_ptr,
    rows,
    length,
    channels,
    NEED_X: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # one row is one (outer, channel); partial sums (rows,)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    have = r < rows
    s = tl.load(s_ptr + r % channels, mask=have, other=0.0).to(tl.float32)
    to_scale = tl.zeros([ROWS], tl.float32)
    to_shift = tl.zeros([ROWS], tl.float32)
    for start in range(0, length, COLS):
        c = start + tl.arange(0, COLS)
        inside = have[:, None] & (c < length)[None, :]
        at = r[:, None] * length + c[None, :]
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_X:
            tl.store(gx_ptr + at, (g * s[:, None]).to(gx_ptr.dtype.element_ty), mask=inside)
        if NEED_SCALE:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            to_scale += tl.sum(g * x, 1)
        if NEED_SHIFT:
            to_shift += tl.sum(g, 1)
    if NEED_SCALE:
        tl.store(ps_ptr + r, to_scale, mask=have)
    if NEED_SHIFT:
        tl.store(pb_ptr + r, to_shift, mask=have)


def ssf_cannot(x: Tensor, *_: object) -> str | None:
    """float64 stays with torch."""
    return "it computes in float32 and x is float64" if x.dtype == torch.float64 else None


ssf_backward_cannot = ssf_cannot


def ssf_pass(*_: object) -> str | None:
    """Not chosen automatically."""
    return UNMEASURED


ssf_backward_pass = ssf_pass


def _tile(length: int) -> tuple[int, int]:
    """(rows, columns) of a block."""
    cols = min(next_power_of_2(length), 1024)
    return max(TILE // cols, 1), cols


def ssf(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(O, C, I) -> x·scale + shift."""
    y = torch.empty_like(x)
    outer, channels, inner = x.shape
    last = inner == 1
    rows, length = (outer, channels) if last else (outer * channels, inner)
    block, cols = _tile(length)
    with launch_guard(x):
        _forward[(ceil_div(rows, block), ceil_div(length, cols))](
            x,
            scale,
            shift,
            y,
            rows,
            length,
            channels,
            LAST=last,
            ROWS=block,
            COLS=cols,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y


def ssf_backward(
    g: Tensor, x: Tensor | None, scale: Tensor, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over g and x; then a small sum over the programs' partial sums."""
    outer, channels, inner = g.shape
    last = inner == 1
    rows, length = (outer, channels) if last else (outer * channels, inner)
    block, cols = _tile(length)
    blocks = ceil_div(rows, block)
    partials = min(blocks, PROGRAMS) if last else outer
    gx = torch.empty_like(g) if need_x else g.new_empty(0)
    none = g.new_empty(0, dtype=torch.float32)
    ps = g.new_empty(partials, channels, dtype=torch.float32) if x is not None else none
    pb = g.new_empty(partials, channels, dtype=torch.float32) if need_shift else none
    flags = {"NEED_X": need_x, "NEED_SCALE": x is not None, "NEED_SHIFT": need_shift, "ROWS": block, "COLS": cols}
    tensors = (g, g if x is None else x, scale, gx, ps, pb)
    with launch_guard(g):
        if last:
            _backward_last[(partials, ceil_div(channels, cols))](
                *tensors, rows, channels, **flags, num_warps=WARPS, enable_fp_fusion=True
            )
        else:
            _backward_inner[(blocks,)](
                *tensors, rows, length, channels, **flags, num_warps=WARPS, enable_fp_fusion=True
            )
    return gx, ps.sum(0) if x is not None else none, pb.sum(0) if need_shift else none


def compile_cases() -> list[CompileCase]:
    """Forward and both backward forms at ViT-B and convolution sizes, float32 and bfloat16."""
    cases = []
    for dtype in ("fp32", "bf16"):
        pointers = {"g_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "s_ptr": f"*{dtype}", "gx_ptr": f"*{dtype}"}
        sums = {"ps_ptr": "*fp32", "pb_ptr": "*fp32"}
        needs = {"NEED_X": True, "NEED_SCALE": True, "NEED_SHIFT": True}
        for length in (768, 3136):
            rows, cols = _tile(length)
            tile = {"ROWS": rows, "COLS": cols}
            last = length == 768
            types = {"x_ptr": f"*{dtype}", "s_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
            types |= {"rows": "i32", "length": "i32", "channels": "i32"}
            fixed: dict[str, object] = {"LAST": last, **tile}
            cases.append(_case(f"ssf {dtype} {length}", _forward, types, fixed))
            types = {**pointers, **sums, "rows": "i32", **({} if last else {"length": "i32"}), "channels": "i32"}
            kernel = _backward_last if last else _backward_inner
            cases.append(_case(f"ssf_backward {dtype} {length}", kernel, types, {**needs, **tile}))
    return cases


def _case(name: str, kernel: object, types: dict[str, str], fixed: dict[str, object]) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**types, **dict.fromkeys(fixed, "constexpr")},
        constexprs=fixed,
        num_warps=WARPS,
        options={"enable_fp_fusion": True},
    )
