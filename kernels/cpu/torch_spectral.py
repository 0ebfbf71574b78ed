"""Spectral operations in plain torch: LAPACK on the CPU, torch's solvers or a round trip through the CPU on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_suite.kernels.reference import spectral as reference
from peft_suite.kernels.reference.points import compute_dtype

__all__ = ["eigh_small", "fix_signs"]

LOOPS_ABOVE = 32  # torch before 2.12 solves larger matrices of a CUDA batch one after the other


def eigh_small(a: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, n) -> w (B, n) ascending, v (B, n, n); a matrix that is not finite gives NaN."""
    a = a.to(compute_dtype(a))
    if a.is_cuda and a.shape[0] > 1 and a.shape[-1] > LOOPS_ABOVE and not _batched_on_cuda():
        w, v = eigh_small(a.cpu())
        return w.to(a.device), v.to(a.device)
    if not a.is_cuda and bool(torch.isfinite(a.sum())):
        w, v = torch.linalg.eigh(a)
        return w, v
    # LAPACK's answer to a NaN is an exception or a wrong matrix, depending on its version
    finite = torch.isfinite(a.tril()).all(-1).all(-1)
    w, v = torch.linalg.eigh(torch.where(finite[:, None, None], a, 0))
    return torch.where(finite[:, None], w, torch.nan), torch.where(finite[:, None, None], v, torch.nan)


def fix_signs(v: Tensor) -> Tensor:
    """The rule of ``reference.fix_signs`` into a contiguous tensor, by extremes where no two magnitudes tie."""
    if v.is_cuda:
        return reference.fix_signs(v).contiguous()
    low, high = v.amin(1), v.amax(1)
    flip = -low > high
    tied = -low == high
    if bool(tied.any()):
        flip = torch.where(tied, v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0] < 0, flip)
    sign = 1 - 2 * flip.to(v.dtype)
    return torch.mul(v, sign[:, None], out=v.new_empty(v.shape))


def _batched_on_cuda() -> bool:
    return bool(torch.__version__ >= torch.torch_version.TorchVersion("2.12"))
