"""Scale-and-shift and the bottleneck adapter in torch operations, with fewer passes over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_suite.kernels.reference.points import compute_dtype

__all__ = [
    "activation",
    "activation_backward",
    "bottleneck_adapter",
    "bottleneck_adapter_backward",
    "scale_gradient",
    "ssf",
    "ssf_backward",
]

CHUNK = 512 * 768  # elements: what stays in the second-level cache while it is read twice


def ssf(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(O, C, I) -> x·scale + shift; addcmul multiplies and adds in float32 before its one rounding."""
    y = torch.empty_like(x)
    if x.dtype == scale.dtype == shift.dtype:
        return torch.addcmul(shift[:, None], x, scale[:, None], out=y)
    wide = compute_dtype(x)
    scale, shift = scale.to(wide)[:, None], shift.to(wide)[:, None]
    for rows, out in zip(_chunks(x), _chunks(y)):
        out.copy_(torch.addcmul(shift, rows.to(wide), scale))
    return y


def ssf_backward(
    g: Tensor, x: Tensor | None, scale: Tensor, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over g and x; the product g·x exists for one chunk at a time."""
    channels, inner = g.shape[1], g.shape[2]
    wide = compute_dtype(g)
    gx = torch.empty_like(g) if need_x else g.new_empty(0)
    gs = g.new_zeros(channels if x is not None else 0, dtype=wide)
    gb = g.new_zeros(channels if need_shift else 0, dtype=wide)
    ones = None
    parts = _chunks(g)
    others = _chunks(x) if x is not None else [None] * len(parts)
    outs = _chunks(gx) if need_x else [None] * len(parts)
    for rows, other, out in zip(parts, others, outs):
        if out is not None:
            torch.mul(rows, scale[:, None], out=out)
        if other is None and not need_shift:
            continue
        rows = rows.to(wide)
        if ones is None:
            ones = rows.new_ones(rows.shape[0])
        for total, term in ((gs, None if other is None else rows * other), (gb, rows if need_shift else None)):
            if term is None:
                continue
            if inner == 1:
                total.addmv_(term[:, :, 0].t(), ones[: term.shape[0]])
            else:
                total += term.sum((0, 2))
    return gx, gs, gb


def _chunks(x: Tensor) -> list[Tensor]:
    """Along the first axis; whole on a GPU, where a launch costs more than the memory saves."""
    if x.is_cuda:
        return [x]
    return list(torch.split(x, max(CHUNK // (x.shape[1] * x.shape[2]), 1)))


def activation(act: str, h: Tensor) -> Tensor:
    """act(h), differentiable."""
    if act == "relu":
        return F.relu(h)
    if act == "gelu":
        return F.gelu(h)
    if act == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if act == "silu":
        return F.silu(h)
    if act == "quick_gelu":
        return h * torch.sigmoid(1.702 * h)
    return h


def activation_backward(act: str, grad: Tensor, h: Tensor) -> Tensor:
    """grad · act'(h)."""
    aten = torch.ops.aten
    if act == "relu":
        return aten.threshold_backward(grad, h, 0)  # type: ignore[no-any-return]
    if act in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(grad, h, approximate="tanh" if act == "gelu_tanh" else "none")  # type: ignore[no-any-return]
    if act == "silu":
        return aten.silu_backward(grad, h)  # type: ignore[no-any-return]
    if act == "quick_gelu":
        return aten.silu_backward(grad, 1.702 * h)  # type: ignore[no-any-return]
    return grad


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
    """The scale rides on the hidden rows or the matrix product, the residual on its accumulator."""
    h_pre = x @ w_down.t() if b_down is None else torch.addmm(b_down, x, w_down.t())
    h = activation(act, h_pre)
    if scale_tensor is not None:
        s = scale_tensor.to(x.dtype) * scale
        h, b_up, scale = h * s, None if b_up is None else b_up * s, 1.0
    if residual is None:
        if b_up is None:
            y = h @ w_up.t()
            return (y.mul_(scale) if scale != 1 else y), h_pre
        return torch.addmm(b_up, h, w_up.t(), beta=scale, alpha=scale), h_pre
    if b_up is None:
        return torch.addmm(residual, h, w_up.t(), alpha=scale), h_pre
    return torch.add(residual, b_up, alpha=scale).addmm_(h, w_up.t(), alpha=scale), h_pre


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
    """The gradient of the scale comes from the hidden rows, so the up-projection's output is never needed."""
    none = g.new_empty(0)
    s = scale if scale_tensor is None else scale_tensor.to(g.dtype) * scale
    to_x = to_down = to_bias_down = to_up = to_bias_up = to_scale = none
    h = activation(act, h_pre) if needs[3] or needs[5] else None
    if any(needs[:3]) or needs[5]:
        raw = g @ w_up  # (T, r)
        if needs[5]:
            to_scale = scale_gradient(g, raw, h, b_up, scale, scale_tensor)  # type: ignore[arg-type]
        if any(needs[:3]):
            dh = activation_backward(act, raw.mul_(s), h_pre)
            to_x = dh @ w_down if needs[0] else none
            to_down = dh.t() @ x if needs[1] and x is not None else none
            to_bias_down = dh.sum(0) if needs[2] else none
    if needs[3]:
        to_up = (g.t() @ h).mul_(s)  # type: ignore[operator]
    if needs[4]:
        to_bias_up = g.sum(0).mul_(s)
    return to_x, to_down, to_bias_down, to_up, to_bias_up, to_scale


def scale_gradient(
    g: Tensor, raw: Tensor, h: Tensor, b_up: Tensor | None, scale: float, scale_tensor: Tensor | None
) -> Tensor:
    """⟨g, h w_upᵀ + b_up⟩ = Σ (g w_up)·h + (Σ_t g)·b_up, summed in the compute dtype."""
    wide = compute_dtype(g)
    total = (raw.to(wide) * h.to(wide)).sum()
    if b_up is not None:
        total = total + torch.dot(g.sum(0, dtype=wide), b_up.to(wide))
    return (total * scale).to(g.dtype if scale_tensor is None else scale_tensor.dtype)
