"""Eigen-decomposition of many small symmetric matrices: one-sided Jacobi, one program per matrix.

The matrix is shifted and scaled by its Gershgorin bounds so that the spectrum lies in [1, 2]; rotating pairs of its
vectors until all are orthogonal leaves v_i·σ_i, so no product of rotations is kept. In round r vector i meets vector
i XOR r: every pair once per sweep, without moving anything. Eigenvalues are Rayleigh quotients of the given matrix.
Residuals are relative to the width of the Gershgorin bounds: within a factor of five of LAPACK's on graph Laplacians,
where the bounds are tight, and more where they are much wider than the spectrum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, launch_guard, next_power_of_2

__all__ = ["compile_cases", "eigh_small", "eigh_small_cannot", "eigh_small_pass"]

LARGEST = 128
MAX_SWEEPS = 15
TOLERANCE = 1e-6  # of |cos| between two vectors; float32 reaches it in 6 to 12 sweeps
SMALLEST_BLOCK = 16
WARPS = {16: 1, 32: 1, 64: 4, 128: 8}  # no spills on sm_80 and sm_90


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _jacobi(a_ptr, w_ptr, v_ptr, n, N: tl.constexpr, SWEEPS: tl.constexpr, TOL2: tl.constexpr):  # type: ignore[no-untyped-def]
    base = tl.program_id(0).to(tl.int64) * n
    k = tl.arange(0, N)
    i, j = k[:, None], k[None, :]
    real = (i < n) & (j < n)
    # only the lower triangle is read, as LAPACK is asked to
    a = tl.load(a_ptr + base * n + tl.maximum(i, j) * n + tl.minimum(i, j), mask=real, other=0.0)
    bad = tl.max(tl.max(tl.where(tl.abs(a) < float("inf"), 0, 1), 1), 0)

    diagonal = tl.sum(tl.where(i == j, a, 0.0), 1)
    radius = tl.sum(tl.where(i == j, 0.0, tl.abs(a)), 1)
    low = tl.min(tl.where(k < n, diagonal - radius, float("inf")), 0)
    high = tl.max(tl.where(k < n, diagonal + radius, -float("inf")), 0)
    spread = tl.where(high > low, high - low, 1.0)
    # row i of g is the vector i; padded rows are unit vectors that meet nothing
    g = tl.where(i == j, tl.where(real, (a - low) / spread + 1.0, 1.0), a / spread)

    sweep = 0
    moving = 1
    while (sweep < SWEEPS) & (moving > 0):
        norm = tl.sum(g * g, 1)
        over = tl.zeros([N], tl.int32)
        for r in range(1, N):
            mate = k ^ r
            other = tl.gather(g, tl.broadcast_to(mate[:, None], [N, N]), 0)
            theirs = tl.gather(norm, mate, 0)
            c = tl.sum(g * other, 1)
            over = tl.maximum(over, tl.where(c * c > TOL2 * norm * theirs, 1, 0))
            # tan θ from numbers that are the same, or exactly negated, in the two vectors of a pair
            d = theirs - norm
            sign = tl.where((d > 0.0) | ((d == 0.0) & (k < mate)), 2.0, -2.0)
            below = tl.abs(d) + tl.sqrt(d * d + 4.0 * c * c)
            t = sign * c / tl.where(below > 0.0, below, 1.0)
            cosine = tl.rsqrt(1.0 + t * t)
            norm = norm - t * c
            g = cosine[:, None] * g - (cosine * t)[:, None] * other
        moving = tl.max(over, 0)
        sweep += 1

    v = g / tl.sqrt(tl.sum(g * g, 1))[:, None]
    w = tl.zeros([N], tl.float32)
    for r in range(0, n):
        row = tl.load(a_ptr + base * n + tl.maximum(k, r) * n + tl.minimum(k, r), mask=k < n, other=0.0)
        w += tl.sum(row[None, :] * v, 1) * tl.sum(tl.where(j == r, v, 0.0), 1)
    tl.store(w_ptr + base + k, tl.where(bad == 0, w, float("nan")), mask=k < n)
    tl.store(v_ptr + base * n + j * n + i, tl.where(bad == 0, v, float("nan")), mask=real)


def eigh_small_cannot(a: Tensor) -> str | None:
    """What the kernel does not hold: float64, and matrices whose two copies exceed the registers."""
    if a.dtype == torch.float64:
        return "it computes in float32 and the matrices are float64"
    if a.shape[-1] > LARGEST:
        return f"it holds matrices up to {LARGEST}×{LARGEST} in registers, these are {a.shape[-1]}×{a.shape[-1]}"
    return None


def eigh_small_pass(a: Tensor) -> str | None:
    """Where torch's own batched solver is expected to be faster (an estimate; no GPU has measured it)."""
    if a.shape[-1] <= 32 and a.shape[0] > 1:
        return "torch solves batches up to 32×32 in one launch"
    if torch.__version__ >= torch.torch_version.TorchVersion("2.12"):
        return "torch 2.12 and newer solve every batch in one launch"
    return None


def eigh_small(a: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, n) -> w (B, n) ascending, v (B, n, n) with eigenvectors as columns; no sign rule."""
    a = a.to(torch.float32).contiguous()
    batch, n = a.shape[:2]
    w, v = a.new_empty(batch, n), torch.empty_like(a)
    block = max(next_power_of_2(n), SMALLEST_BLOCK)
    with launch_guard(a):
        _jacobi[(batch,)](
            a,
            w,
            v,
            n,
            N=block,
            SWEEPS=MAX_SWEEPS,
            TOL2=TOLERANCE**2,
            num_warps=WARPS[block],
            enable_fp_fusion=True,
        )
    w, order = torch.sort(w, dim=-1, stable=True)
    return w, v.gather(2, order[:, None].expand_as(v))


def compile_cases() -> list[CompileCase]:
    """Every block size that is launched."""
    types = {"a_ptr": "*fp32", "w_ptr": "*fp32", "v_ptr": "*fp32", "n": "i32"}
    fixed = {"N": 0, "SWEEPS": MAX_SWEEPS, "TOL2": TOLERANCE**2}
    return [
        CompileCase(
            name=f"eigh_small n={n}",
            kernel=_jacobi,
            signature={**types, **dict.fromkeys(fixed, "constexpr")},
            constexprs={**fixed, "N": n},
            num_warps=warps,
            options={"enable_fp_fusion": True},
        )
        for n, warps in WARPS.items()
    ]
