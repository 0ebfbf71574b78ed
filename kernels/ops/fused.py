"""Scale-and-shift and the bottleneck adapter registered with torch: schema, shapes, gradients.

Saved for backward: ``x`` and the scale of ssf (``x`` only if the scale is trained); ``x`` and the hidden rows before
the activation of the adapter (``x`` only if the down-projection is trained), and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_suite.kernels.dispatch import Form, Op
from peft_suite.kernels.reference.points import compute_dtype

__all__ = ["bottleneck_adapter", "bottleneck_adapter_backward", "ssf", "ssf_backward"]


def _op(name: str, triton: str) -> Op:
    return Op(
        name,
        Form("triton", f"peft_suite.kernels.triton.{triton}:{name}", devices=("cuda",)),
        Form("torch", f"peft_suite.kernels.cpu.torch_fused:{name}"),
        Form("reference", f"peft_suite.kernels.reference.fused:{name}", automatic=False),
    )


_SSF = _op("ssf", "ssf")
_SSF_BACKWARD = _op("ssf_backward", "ssf")
_ADAPTER = _op("bottleneck_adapter", "bottleneck")
_ADAPTER_BACKWARD = _op("bottleneck_adapter_backward", "bottleneck")


# scale and shift ----------------------------------------------------------------------------------------------------


def _ordered(x: Tensor, dim: int) -> tuple[bool, Tensor]:
    """Whether channels lie last in memory, and (O, C, I) without a copy where the memory allows it."""
    last = x.movedim(dim, -1)
    if last.is_contiguous():
        return True, last.reshape(-1, x.shape[dim], 1)
    outer, inner = 1, 1
    for n in x.shape[:dim]:
        outer = outer * n
    for n in x.shape[dim + 1 :]:
        inner = inner * n
    return False, x.contiguous().view(outer, x.shape[dim], inner)


def _restored(y: Tensor, like: Tensor, dim: int, last: bool) -> Tensor:
    return y.view(like.movedim(dim, -1).shape).movedim(-1, dim) if last else y.view(like.shape)


def _empty(x: Tensor, dim: int) -> Tensor:
    last = x.movedim(dim, -1)
    return x.new_empty(last.shape).movedim(-1, dim) if last.is_contiguous() else x.new_empty(x.shape)


@torch.library.custom_op("peft_suite::ssf", mutates_args=())
def ssf(x: Tensor, scale: Tensor, shift: Tensor, dim: int) -> Tensor:
    """x·scale + shift along axis ``dim`` ≥ 0, in the dtype and memory order of ``x``."""
    if x.numel() == 0:
        return _empty(x, dim)
    last, rows = _ordered(x, dim)
    return _restored(_SSF(x.device, rows, scale.contiguous(), shift.contiguous()), x, dim, last)


@ssf.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, dim: int) -> Tensor:
    return _empty(x, dim)


@torch.library.custom_op("peft_suite::ssf_backward", mutates_args=())
def ssf_backward(
    g: Tensor, x: Tensor | None, scale: Tensor, dim: int, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (dtype of ``g``), scale and shift (compute dtype); shape (0,) where not needed."""
    if g.numel() == 0:
        outputs = _backward_shapes(g, x, scale, dim, need_x, need_shift)
        return outputs[0], outputs[1].zero_(), outputs[2].zero_()
    last, rows = _ordered(g, dim)
    other = None
    if x is not None:
        other = x.movedim(dim, -1).reshape(rows.shape) if last else x.reshape(rows.shape)
    gx, gs, gb = _SSF_BACKWARD(g.device, rows, other, scale.contiguous(), need_x, need_shift)
    wide = compute_dtype(g)
    return (
        _restored(gx, g, dim, last) if need_x else g.new_empty(0),
        gs if x is not None else g.new_empty(0, dtype=wide),
        gb if need_shift else g.new_empty(0, dtype=wide),
    )


@ssf_backward.register_fake
def _backward_shapes(
    g: Tensor, x: Tensor | None, scale: Tensor, dim: int, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = compute_dtype(g)
    gx = _empty(g, dim) if need_x else g.new_empty(0)
    gs = g.new_empty(scale.shape if x is not None else 0, dtype=wide)
    return gx, gs, g.new_empty(scale.shape if need_shift else 0, dtype=wide)


def _ssf_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    x, scale, shift, ctx.dim = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)


def _ssf_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, scale = ctx.saved_tensors
    need_x, need_scale, need_shift = ctx.needs_input_grad[:3]
    gx, gs, gb = ssf_backward(g, x if need_scale else None, scale, ctx.dim, need_x, need_shift)
    return (
        gx if need_x else None,
        gs.to(scale.dtype) if need_scale else None,
        gb.to(ctx.shift_dtype) if need_shift else None,
        None,
    )


ssf.register_autograd(_ssf_gradient, setup_context=_ssf_context)


# bottleneck adapter -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::bottleneck_adapter", mutates_args=())
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
    """(T, D) -> y (T, E) and the hidden rows before the activation (T, r)."""
    if x.shape[0] == 0:
        return x.new_empty(0, w_up.shape[0]), x.new_empty(0, w_down.shape[0])
    parts = [None if p is None else p.contiguous() for p in (x, w_down, b_down, w_up, b_up)]
    rest = None if residual is None else residual.contiguous()
    y, h_pre = _ADAPTER(x.device, *parts, act, scale, scale_tensor, rest)
    return y, h_pre


@bottleneck_adapter.register_fake
def _(x: Tensor, w_down: Tensor, b_down: Any, w_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w_up.shape[0]), x.new_empty(x.shape[0], w_down.shape[0])


@torch.library.custom_op("peft_suite::bottleneck_adapter_backward", mutates_args=())
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
    """Gradients of x, w_down, b_down, w_up, b_up, scale_tensor; shape (0,) where not needed."""
    if g.shape[0] == 0:
        empty = _adapter_shapes(g, x, h_pre, w_down, w_up, b_up, act, scale, scale_tensor, needs)
        return tuple(e.zero_() for e in empty)
    parts = [None if p is None else p.contiguous() for p in (g, x, h_pre, w_down, w_up, b_up)]
    found = _ADAPTER_BACKWARD(g.device, *parts, act, scale, scale_tensor, needs)
    # outputs of a registered operation must not be one another
    return tuple(t if need else g.new_empty(0) for t, need in zip(found, needs))  # type: ignore[return-value]


@bottleneck_adapter_backward.register_fake
def _adapter_shapes(
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
    rank, dim = w_down.shape
    shapes: tuple[tuple[int, ...], ...] = ((g.shape[0], dim), (rank, dim), (rank,), tuple(w_up.shape), (w_up.shape[0],))
    made = [g.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs)]
    if needs[5] and scale_tensor is not None:
        made.append(scale_tensor.new_empty(()))
    else:
        made.append(g.new_empty(0))
    return tuple(made)  # type: ignore[return-value]


def _adapter_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_down, _, w_up, b_up, ctx.act, ctx.scale, scale_tensor, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    need = ctx.needs_input_grad
    ctx.save_for_backward(
        x if need[1] else None,
        output[1] if any(need[:4]) or need[7] else None,
        w_down,
        w_up,
        b_up if need[7] else None,
        scale_tensor,
    )


def _adapter_gradient(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 9
    x, h_pre, w_down, w_up, b_up, scale_tensor = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [*need[:5], need[7]]
    grads: list[Tensor | None] = [None] * 6
    if any(needs):
        if h_pre is None:  # only the output bias is trained
            h_pre = g.new_empty(g.shape[0], w_down.shape[0])
        found = bottleneck_adapter_backward(g, x, h_pre, w_down, w_up, b_up, ctx.act, ctx.scale, scale_tensor, needs)
        grads = [t if n else None for t, n in zip(found, needs)]
    return (*grads[:5], None, None, grads[5], g if need[8] else None)


bottleneck_adapter.register_autograd(_adapter_gradient, setup_context=_adapter_context)
