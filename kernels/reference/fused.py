"""Scale-and-shift and the bottleneck adapter written to be read: the definition the rest is tested against.

Raw contract of the back ends (contiguous inputs, no empty ones; ``s`` is ``scale · scale_tensor``):

- ``ssf(x (O, C, I), scale (C,), shift (C,)) -> y``: x·scale + shift, rounded once to the dtype of ``x``.
- ``ssf_backward(g, x | None, scale, need_x, need_shift) -> (gx, gs, gb)``: g·scale; Σ g·x and Σ g over O and I,
  summed and returned in the compute dtype. What is not needed (``gs`` without ``x``) has shape (0,).
- ``bottleneck_adapter(x (T, D), w_down (r, D), b_down | None, w_up (E, r), b_up | None, act, scale: float,
  scale_tensor () | None, residual (T, E) | None) -> (y (T, E), h_pre (T, r))``: h_pre = x w_downᵀ + b_down,
  y = residual + s·(act(h_pre) w_upᵀ + b_up).
- ``bottleneck_adapter_backward(g (T, E), x | None, h_pre, w_down, w_up, b_up | None, act, scale, scale_tensor | None,
  needs) -> six tensors``: gradients of x, w_down, b_down, w_up, b_up, scale_tensor; shape (0,) where ``needs`` is off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_suite.kernels.reference.points import compute_dtype

__all__ = [
    "ACTIVATIONS",
    "activation",
    "activation_slope",
    "bottleneck_adapter",
    "bottleneck_adapter_backward",
    "ssf",
    "ssf_backward",
]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "none")
_TANH: float = (2 / torch.pi) ** 0.5
_DENSITY: float = (2 * torch.pi) ** -0.5


def ssf(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y = x·scale + shift."""
    wide = compute_dtype(x)
    return (x.to(wide) * scale.to(wide)[:, None] + shift.to(wide)[:, None]).to(x.dtype)


def ssf_backward(
    g: Tensor, x: Tensor | None, scale: Tensor, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g·scale, Σ g·x, Σ g."""
    wide = compute_dtype(g)
    none = g.new_empty(0, dtype=wide)
    gx = (g.to(wide) * scale.to(wide)[:, None]).to(g.dtype) if need_x else g.new_empty(0)
    gs = (g.to(wide) * x.to(wide)).sum((0, 2)) if x is not None else none
    return gx, gs, g.to(wide).sum((0, 2)) if need_shift else none


def activation(act: str, h: Tensor) -> Tensor:
    """act(h)."""
    if act == "relu":
        return torch.where(h > 0, h, 0)
    if act == "gelu":
        return h * 0.5 * (1 + torch.erf(h / 2**0.5))
    if act == "gelu_tanh":
        return h * 0.5 * (1 + torch.tanh(_TANH * (h + 0.044715 * h**3)))
    if act == "silu":
        return h * torch.sigmoid(h)
    if act == "quick_gelu":
        return h * torch.sigmoid(1.702 * h)
    return h.clone()


def activation_slope(act: str, h: Tensor) -> Tensor:
    """act'(h)."""
    if act == "relu":
        return (h > 0).to(h.dtype)
    if act == "gelu":
        return 0.5 * (1 + torch.erf(h / 2**0.5)) + h * torch.exp(-h * h / 2) * _DENSITY
    if act == "gelu_tanh":
        t = torch.tanh(_TANH * (h + 0.044715 * h**3))
        return 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * _TANH * (1 + 3 * 0.044715 * h * h)
    if act in ("silu", "quick_gelu"):
        rate = 1.0 if act == "silu" else 1.702
        p = torch.sigmoid(rate * h)
        return p + rate * h * p * (1 - p)
    return torch.ones_like(h)


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
    """residual + s·(act(x w_downᵀ + b_down) w_upᵀ + b_up), and the hidden rows before the activation."""
    wide = compute_dtype(x)
    h_pre = x.to(wide) @ w_down.to(wide).T
    if b_down is not None:
        h_pre = h_pre + b_down.to(wide)
    y = activation(act, h_pre) @ w_up.to(wide).T
    if b_up is not None:
        y = y + b_up.to(wide)
    y = y * _total(scale, scale_tensor, wide)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype), h_pre.to(x.dtype)


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
    """The chain rule, one line a gradient."""
    wide = compute_dtype(g)
    s = _total(scale, scale_tensor, wide)
    gw, hw = g.to(wide), h_pre.to(wide)
    h = activation(act, hw)
    raw = gw @ w_up.to(wide)
    dh = s * raw * activation_slope(act, hw)
    none = g.new_empty(0)
    to_scale = none
    if needs[5]:
        total = (raw * h).sum()
        if b_up is not None:
            total = total + gw.sum(0) @ b_up.to(wide)
        to_scale = (scale * total).to(torch.float64 if scale_tensor is None else scale_tensor.dtype)
    return (
        (dh @ w_down.to(wide)).to(g.dtype) if needs[0] else none,
        (dh.T @ x.to(wide)).to(g.dtype) if needs[1] and x is not None else none,
        dh.sum(0).to(g.dtype) if needs[2] else none,
        (s * (gw.T @ h)).to(g.dtype) if needs[3] else none,
        (s * gw.sum(0)).to(g.dtype) if needs[4] else none,
        to_scale,
    )


def _total(scale: float, scale_tensor: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return scale if scale_tensor is None else scale_tensor.to(dtype) * scale
