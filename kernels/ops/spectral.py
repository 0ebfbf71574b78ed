"""The small eigen-solver registered with torch: schema, shapes, gradient, sign rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_suite.kernels import checks
from peft_suite.kernels.cpu.torch_spectral import fix_signs
from peft_suite.kernels.dispatch import Form, Op
from peft_suite.kernels.reference.points import compute_dtype

__all__ = ["eigh_small"]

_EIGH = Op(
    "eigh_small",
    Form("triton", "peft_suite.kernels.triton.eigh:eigh_small", devices=("cuda",)),
    Form("torch", "peft_suite.kernels.cpu.torch_spectral:eigh_small"),
    Form("reference", "peft_suite.kernels.reference.spectral:eigh_small", automatic=False),
)


@torch.library.custom_op("peft_suite::eigh_small", mutates_args=())
def eigh_small(a: Tensor, sign: str) -> tuple[Tensor, Tensor]:
    """(B, n, n) -> w (B, n) ascending, v (B, n, n) with eigenvectors as columns."""
    checks.finite_values("a", a)
    if a.numel() == 0:
        return a.new_empty(a.shape[:2], dtype=compute_dtype(a)), a.new_empty(a.shape, dtype=compute_dtype(a))
    w, v = _EIGH(a.device, a)
    return w, fix_signs(v) if sign == "max" else v.contiguous()


@eigh_small.register_fake
def _(a: Tensor, sign: str) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=compute_dtype(a)), a.new_empty(a.shape, dtype=compute_dtype(a))


def _context(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, to_w: Tensor | None, to_v: Tensor | None) -> tuple[Tensor | None, None]:
    w, v = ctx.saved_tensors
    if to_w is None and to_v is None:
        return None, None
    # V (diag(gw) + (Vᵀ gV) / (w_j − w_i)) Vᵀ
    inner = torch.zeros_like(v)
    if to_v is not None:
        gap = w[:, None, :] - w[:, :, None]
        gap.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        inner = (v.mT @ to_v) / gap
    if to_w is not None:
        inner = inner + torch.diag_embed(to_w)
    return (v @ inner @ v.mT).to(ctx.dtype), None


eigh_small.register_autograd(_backward, setup_context=_context)
