"""Bottleneck adapter: both projections in one kernel, which reads x once; gradients of x and hidden rows in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.cpu.torch_fused import activation
from peft_suite.kernels.triton.common import CompileCase, ceil_div, interpreted, launch_guard, next_power_of_2

__all__ = [
    "bottleneck_adapter",
    "bottleneck_adapter_backward",
    "bottleneck_adapter_backward_cannot",
    "bottleneck_adapter_backward_pass",
    "bottleneck_adapter_cannot",
    "bottleneck_adapter_pass",
    "compile_cases",
]

WIDEST = 64
ROWS = 64
WARPS = 8
COLS = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}  # the widest without spills on sm_80 and sm_90
UNMEASURED = "no GPU has measured the kernel against what torch.compile makes of the plain expression"


@triton.jit  # type: ignore[untyped-decorator]
def _act(h, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == "relu":
        return tl.where(h > 0, h, 0.0)
    elif ACT == "gelu":
        return h * 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # ½(1 + tanh u) = sigmoid(2u)
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACT == "silu":
        return h * tl.sigmoid(h)
    elif ACT == "quick_gelu":
        return h * tl.sigmoid(1.702 * h)
    else:
        return h


@triton.jit  # type: ignore[untyped-decorator]
def _slope(h, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == "relu":
        return tl.where(h > 0, 1.0, 0.0)
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        p = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return p + h * p * (1.0 - p) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACT == "silu":
        p = tl.sigmoid(h)
        return p + h * p * (1.0 - p)
    elif ACT == "quick_gelu":
        p = tl.sigmoid(1.702 * h)
        return p + 1.702 * h * p * (1.0 - p)
    else:
        return tl.full(h.shape, 1.0, tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _operand(x, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    # the interpreter multiplies bfloat16 wrongly
    if UPCAST:
        return x.to(tl.float32)
    else:
        return x


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    wd_ptr,
    bd_ptr,
    wu_ptr,
    bu_ptr,
    s_ptr,
    res_ptr,
    y_ptr,
    h_ptr,
    scale,
    rows,
    dim,
    width,
    rank,
    ACT: tl.constexpr,
    BIAS_DOWN: tl.constexpr,
    BIAS_UP: tl.constexpr,
    LEARNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    # x (rows, dim), wd (rank, dim), wu (width, rank) -> y (rows, width), h (rows, rank)
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    r = tl.arange(0, R)
    k = tl.arange(0, K)
    row = m < rows
    unit = r < rank
    acc = tl.zeros([M, R], tl.float32)
    for start in range(0, dim, K):
        d = start + k
        x = tl.load(x_ptr + m[:, None] * dim + d[None, :], mask=row[:, None] & (d < dim)[None, :], other=0.0)
        w = tl.load(wd_ptr + r[None, :] * dim + d[:, None], mask=unit[None, :] & (d < dim)[:, None], other=0.0)
        acc = tl.dot(_operand(x, UPCAST), _operand(w, UPCAST), acc, input_precision="ieee")
    if BIAS_DOWN:
        acc += tl.load(bd_ptr + r, mask=unit, other=0.0).to(tl.float32)[None, :]
    hidden = row[:, None] & unit[None, :]
    tl.store(h_ptr + m[:, None] * rank + r[None, :], acc.to(h_ptr.dtype.element_ty), mask=hidden)
    h = _operand(_act(acc, ACT).to(x_ptr.dtype.element_ty), UPCAST)
    s = scale
    if LEARNED:
        s = scale * tl.load(s_ptr).to(tl.float32)
    for start in range(0, width, K):
        e = start + k
        w = tl.load(wu_ptr + e[None, :] * rank + r[:, None], mask=unit[:, None] & (e < width)[None, :], other=0.0)
        y = tl.dot(h, _operand(w, UPCAST), input_precision="ieee")
        if BIAS_UP:
            y += tl.load(bu_ptr + e, mask=e < width, other=0.0).to(tl.float32)[None, :]
        y = y * s
        at = m[:, None] * width + e[None, :]
        inside = row[:, None] & (e < width)[None, :]
        if RESIDUAL:
            y += tl.load(res_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    g_ptr,
    h_ptr,
    wd_ptr,
    wu_ptr,
    s_ptr,
    gx_ptr,
    dh_ptr,
    part_ptr,
    scale,
    rows,
    dim,
    width,
    rank,
    ACT: tl.constexpr,
    LEARNED: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    UPCAST: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    # g (rows, width), h (rows, rank) -> gx (rows, dim), dh (rows, rank), part (programs,) = Σ (g wu)·act(h)
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    r = tl.arange(0, R)
    k = tl.arange(0, K)
    row = m < rows
    unit = r < rank
    raw = tl.zeros([M, R], tl.float32)
    for start in range(0, width, K):
        e = start + k
        g = tl.load(g_ptr + m[:, None] * width + e[None, :], mask=row[:, None] & (e < width)[None, :], other=0.0)
        w = tl.load(wu_ptr + e[:, None] * rank + r[None, :], mask=unit[None, :] & (e < width)[:, None], other=0.0)
        raw = tl.dot(_operand(g, UPCAST), _operand(w, UPCAST), raw, input_precision="ieee")
    inside = row[:, None] & unit[None, :]
    at = m[:, None] * rank + r[None, :]
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NEED_SCALE:
        tl.store(part_ptr + tl.program_id(0), tl.sum(tl.sum(raw * _act(h, ACT), 1), 0))
    s = scale
    if LEARNED:
        s = scale * tl.load(s_ptr).to(tl.float32)
    dh = (raw * s * _slope(h, ACT)).to(dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + at, dh, mask=inside)
    if NEED_X:
        left = _operand(dh, UPCAST)
        for start in range(0, dim, K):
            d = start + k
            w = tl.load(wd_ptr + r[:, None] * dim + d[None, :], mask=unit[:, None] & (d < dim)[None, :], other=0.0)
            gx = tl.dot(left, _operand(w, UPCAST), input_precision="ieee")
            there = row[:, None] & (d < dim)[None, :]
            tl.store(gx_ptr + m[:, None] * dim + d[None, :], gx.to(gx_ptr.dtype.element_ty), mask=there)


def _cannot(x: Tensor, rank: int) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32 and x is float64"
    if rank > WIDEST:
        return f"it holds hidden rows up to {WIDEST} wide in registers, these are {rank} wide"
    return None


def bottleneck_adapter_cannot(x: Tensor, w_down: Tensor, *_: object) -> str | None:
    """float64 and wide bottlenecks stay with torch."""
    return _cannot(x, w_down.shape[0])


def bottleneck_adapter_backward_cannot(g: Tensor, x: Tensor | None, h_pre: Tensor, *_: object) -> str | None:
    """float64 and wide bottlenecks stay with torch."""
    return _cannot(g, h_pre.shape[1])


def bottleneck_adapter_pass(*_: object) -> str | None:
    """Not chosen automatically."""
    return UNMEASURED


bottleneck_adapter_backward_pass = bottleneck_adapter_pass


def _sizes(x: Tensor, rank: int) -> dict[str, object]:
    upcast = interpreted() and x.dtype == torch.bfloat16
    return {"UPCAST": upcast, "M": ROWS, "R": max(next_power_of_2(rank), 16), "K": COLS[x.dtype]}


def bottleneck_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    act: str,
    scale: float,
    scale_tensor: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(T, D) -> y (T, E), h_pre (T, r)."""
    rows, (rank, dim), width = x.shape[0], w_down.shape, w_up.shape[0]
    y, h_pre = x.new_empty(rows, width), x.new_empty(rows, rank)
    optional = [x if t is None else t for t in (b_down, b_up, scale_tensor, residual)]
    with launch_guard(x):
        _forward[(ceil_div(rows, ROWS),)](
            x,
            w_down,
            optional[0],
            w_up,
            optional[1],
            optional[2],
            optional[3],
            y,
            h_pre,
            float(scale),
            rows,
            dim,
            width,
            rank,
            ACT=act,
            BIAS_DOWN=b_down is not None,
            BIAS_UP=b_up is not None,
            LEARNED=scale_tensor is not None,
            RESIDUAL=residual is not None,
            **_sizes(x, rank),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y, h_pre


def bottleneck_adapter_backward(
    g: Tensor,
    x: Tensor | None,
    h_pre: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    act: str,
    scale: float,
    scale_tensor: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel gives gx and the hidden gradient; weight gradients are thin matrix products of torch."""
    rows, width, (rank, dim) = g.shape[0], g.shape[1], w_down.shape
    none = g.new_empty(0)
    to_x = g.new_empty(rows, dim) if needs[0] else none
    to_down = to_bias_down = to_up = to_bias_up = to_scale = none
    s = scale if scale_tensor is None else scale_tensor.to(torch.float32) * scale
    total = g.sum(0, dtype=torch.float32) if needs[4] or (needs[5] and b_up is not None) else None
    if any(needs[:3]) or needs[5]:
        programs = ceil_div(rows, ROWS)
        dh, part = torch.empty_like(h_pre), g.new_empty(programs, dtype=torch.float32)
        with launch_guard(g):
            _backward[(programs,)](
                g,
                h_pre,
                w_down,
                w_up,
                g if scale_tensor is None else scale_tensor,
                to_x,
                dh,
                part,
                float(scale),
                rows,
                dim,
                width,
                rank,
                ACT=act,
                LEARNED=scale_tensor is not None,
                NEED_X=needs[0],
                NEED_SCALE=needs[5],
                **_sizes(g, rank),
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        if needs[1] and x is not None:
            to_down = dh.t() @ x
        if needs[2]:
            to_bias_down = dh.sum(0, dtype=torch.float32).to(g.dtype)
        if needs[5]:
            value = part.sum()
            if b_up is not None and total is not None:
                value = value + torch.dot(total, b_up.to(torch.float32))
            to_scale = (value * scale).to(g.dtype if scale_tensor is None else scale_tensor.dtype)
    if needs[3]:
        to_up = ((g.t() @ activation(act, h_pre)) * s).to(g.dtype)
    if needs[4] and total is not None:
        to_bias_up = (total * s).to(g.dtype)
    return to_x, to_down, to_bias_down, to_up, to_bias_up, to_scale


def compile_cases() -> list[CompileCase]:
    """Both kernels at the narrowest and widest bottleneck, float32 and bfloat16."""
    cases = []
    for dtype, cols in (("fp32", COLS[torch.float32]), ("bf16", COLS[torch.bfloat16])):
        for rank in (16, WIDEST):
            ints = {"scale": "fp32", "rows": "i32", "dim": "i32", "width": "i32", "rank": "i32"}
            sizes: dict[str, object] = {"UPCAST": False, "M": ROWS, "R": rank, "K": cols}
            names: tuple[str, ...] = (
                "x_ptr",
                "wd_ptr",
                "bd_ptr",
                "wu_ptr",
                "bu_ptr",
                "s_ptr",
                "res_ptr",
                "y_ptr",
                "h_ptr",
            )
            flags = dict.fromkeys(("BIAS_DOWN", "BIAS_UP", "LEARNED", "RESIDUAL"), True)
            types = {**dict.fromkeys(names, f"*{dtype}"), **ints}
            cases.append(
                _case(f"bottleneck_adapter {dtype} r={rank}", _forward, types, {"ACT": "gelu", **flags, **sizes})
            )
            names = ("g_ptr", "h_ptr", "wd_ptr", "wu_ptr", "s_ptr", "gx_ptr", "dh_ptr")
            flags = dict.fromkeys(("LEARNED", "NEED_X", "NEED_SCALE"), True)
            types = {**dict.fromkeys(names, f"*{dtype}"), "part_ptr": "*fp32", **ints}
            fixed = {"ACT": "gelu", **flags, **sizes}
            cases.append(_case(f"bottleneck_adapter_backward {dtype} r={rank}", _backward, types, fixed))
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
