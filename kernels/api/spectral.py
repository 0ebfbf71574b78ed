"""Public spectral functions: a batched eigen-solver for small matrices, graph Laplacians and Fourier bases, z-order."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_suite.kernels import checks
from peft_suite.kernels.ops import spectral as ops
from peft_suite.kernels.reference.points import compute_dtype

__all__ = ["FourierBasis", "MortonOrder", "eigh_small", "graph_fourier_basis", "graph_laplacian", "morton_order"]

KINDS = ("inverse", "gaussian", "knn")
DELTAS = ("cloud", "batch")
SIGNS = ("max", "none")


class FourierBasis(NamedTuple):
    """The eigenvalues ``w`` (B, G) and eigenvectors ``v`` (B, G, G) of a graph Laplacian, made once and handed on.

    ``forward`` is the graph Fourier transform vᵀx and ``inverse`` its inverse v x. The official PointGST code applies
    them in the other order: ``inverse``, its adapter, then ``forward``.
    """

    w: Tensor
    v: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, C) tokens -> (B, G, C) coefficients, in the dtype of ``x``."""
        return self.v.to(x.dtype).mT @ x

    def inverse(self, x: Tensor) -> Tensor:
        """(B, G, C) coefficients -> (B, G, C) tokens, in the dtype of ``x``."""
        return self.v.to(x.dtype) @ x

    def to(self, *args: Any, **kwargs: Any) -> FourierBasis:
        """Both tensors moved or converted, as ``Tensor.to``."""
        return FourierBasis(self.w.to(*args, **kwargs), self.v.to(*args, **kwargs))


class MortonOrder(NamedTuple):
    """``order`` (B, N) sorts points along the z-curve; ``inverse`` (B, N) puts them back."""

    order: Tensor
    inverse: Tensor


def eigh_small(a: Tensor, *, sign: str = "max") -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of many small symmetric matrices: a = v diag(w) vᵀ.

    a (B, n, n) -> w (B, n) ascending, v (B, n, n) with eigenvectors as columns. Only the lower triangle is read.
    float16 and bfloat16 are computed and returned in float32. A matrix that holds NaN or infinity gives NaN and leaves
    the others right.

    An eigenvector is defined up to its sign. ``sign="max"`` makes the entry of largest magnitude positive, the lowest
    row winning a tie; ``sign="none"`` leaves what the solver gave. What no rule can fix: magnitudes that are equal only
    before rounding tie differently from solver to solver, and vectors of equal or nearly equal eigenvalues are any
    orthonormal basis of their common space. So compare subspaces or ``v diag(w) vᵀ`` between devices, never ``v``
    itself, and record the solver with weights that were trained on its vectors.

    Differentiable: the gradient through ``v`` divides by the gaps between eigenvalues and is not finite where two are
    equal; a warning says so once.

    Raises:
        KernelArgumentError: ``a`` is not a batch of square floating matrices, or the sign rule does not exist.
    """
    a = checks.tensor("a", a, "(B, n, n)")
    if a.shape[1] != a.shape[2]:
        raise checks.fail("a", f"is not square: {checks.shape_of(a)}", "(B, n, n)")
    checks.choice("sign", sign, SIGNS)
    if a.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_gaps()
    w, v = ops.eigh_small(a, sign)
    return w, v


@functools.cache
def _warn_gaps() -> None:
    warnings.warn(
        "eigh_small: the gradient of eigenvectors divides by the gaps between eigenvalues; it is large where they are "
        "close and not finite where they are equal.",
        stacklevel=3,
    )


@torch.no_grad()
def graph_laplacian(
    points: Tensor,
    kind: str = "inverse",
    normalized: bool = True,
    sigma: float | None = None,
    k: int | None = None,
    delta: str = "cloud",
    eps: float = 1e-6,
) -> Tensor:
    """The Laplacian of a graph over points: I − D^{-1/2} W D^{-1/2}, or D − W when ``normalized`` is off.

    points (B, G, D) -> (B, G, G), exactly symmetric, float32 (float64 for float64); D = row sums of W, with ``eps``
    added before the inverse root. W has 1 on the diagonal; between two points at distance d

    - ``"inverse"``: δ/d, δ being the smallest positive distance; points that coincide weigh 1. PointGST (TPAMI 2025).
    - ``"gaussian"``: exp(−d²/(2σ²)); ``sigma`` defaults to the mean distance between points.
    - ``"knn"``: 1 if one is among the ``k`` nearest of the other, else 0; ties go to the lower index.

    ``delta="cloud"`` takes δ, or the default σ, from each cloud; ``"batch"`` takes one for all, as PointGST's code
    does, which makes the answer for a cloud depend on its neighbours in the batch. Where points coincide that code
    divides by zero; ours does not. Distances are differences squared and summed, never the product form, in which
    ``torch.cdist`` loses δ to rounding above 25 points. Not differentiable.

    Raises:
        KernelArgumentError: wrong rank or dtype, an unknown kind or delta, or ``sigma`` and ``k`` that the kind lacks.
    """
    points = checks.points("points", points)
    checks.choice("kind", kind, KINDS)
    checks.choice("delta", delta, DELTAS)
    if (k is None) == (kind == "knn"):
        raise checks.fail("k", f"is {k} for kind {kind!r}", "an integer ≥ 1 for kind 'knn' and None for the others")
    if k is not None:
        checks.count("k", k, 1)
    if sigma is not None:
        if kind != "gaussian":
            raise checks.fail("sigma", f"is {sigma} for kind {kind!r}", "None; only kind 'gaussian' has a width")
        checks.positive("sigma", sigma)

    x = points.to(compute_dtype(points))
    group = x.shape[1]
    if x.numel() == 0:
        return x.new_empty(x.shape[0], group, group)
    squared = _squared_distances(x)
    over = (0, 1, 2) if delta == "batch" else (1, 2)
    if kind == "inverse":
        distance = squared.sqrt_()
        nearest = torch.where(distance > 0, distance, torch.inf).amin(over, keepdim=True)
        weights = distance.div_(nearest).clamp_(min=1).reciprocal_()  # 1 on the diagonal and where points coincide
    elif kind == "gaussian":
        width = squared.new_full((1, 1, 1), sigma) if sigma is not None else _mean_distance(squared, over)
        weights = torch.exp(squared / (-2 * width * width))
    else:
        assert k is not None
        weights = _nearest(squared, min(k, group - 1))

    degree = weights.sum(2)
    if normalized:
        root = torch.rsqrt(degree + eps)
        laplacian = weights.mul_(root[:, :, None] * root[:, None, :]).neg_()
        laplacian.diagonal(dim1=1, dim2=2).add_(1)
    else:
        laplacian = weights.neg_()
        laplacian.diagonal(dim1=1, dim2=2).add_(degree)
    return laplacian


def _squared_distances(x: Tensor) -> Tensor:
    """(B, G, D) -> (B, G, G), summed in coordinate order."""
    gap = x[:, :, None, 0] - x[:, None, :, 0]
    total = gap * gap
    for d in range(1, x.shape[2]):
        gap = x[:, :, None, d] - x[:, None, :, d]
        total += gap * gap
    return total


def _mean_distance(squared: Tensor, over: tuple[int, ...]) -> Tensor:
    """Over distinct pairs; 1 where all points coincide."""
    group = squared.shape[1]
    pairs = group * (group - 1) * (squared.shape[0] if 0 in over else 1)
    mean = squared.sqrt().sum(over, keepdim=True) / max(pairs, 1)
    return torch.where(mean == 0, 1, mean)


def _nearest(squared: Tensor, k: int) -> Tensor:
    """0/1 weights: i among the k nearest of j, or the reverse; 1 on the diagonal; NaN where a distance is."""
    ranked = squared.clone()
    ranked.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    order = ranked.sort(dim=2, stable=True).indices[:, :, :k]
    near = torch.zeros_like(squared).scatter_(2, order, 1.0)
    weights = torch.maximum(near, near.mT)
    weights.diagonal(dim1=1, dim2=2).fill_(1)
    return torch.where(squared.isnan(), torch.nan, weights)


def graph_fourier_basis(
    points: Tensor,
    kind: str = "inverse",
    normalized: bool = True,
    sigma: float | None = None,
    k: int | None = None,
    delta: str = "cloud",
    eps: float = 1e-6,
    *,
    sign: str = "max",
) -> FourierBasis:
    """Eigenvectors of the graph Laplacian of points (B, G, D), as a basis to share between layers.

    The arguments are those of :func:`graph_laplacian` and the sign rule of :func:`eigh_small`; PointGST's own basis is
    ``delta="batch", sign="none"``. Not differentiable.
    """
    laplacian = graph_laplacian(points, kind, normalized, sigma, k, delta, eps)
    return FourierBasis(*eigh_small(laplacian, sign=sign))


@torch.no_grad()
def morton_order(points: Tensor, *, scale: float = 100.0, bits: int = 16) -> MortonOrder:
    """The z-order of points (B, N, 3) -> permutations (B, N) int64, there and back.

    Coordinates times ``scale`` are truncated toward zero; the lowest ``bits`` of their two's complement are interleaved
    as y, x, z from the highest (so negative coordinates sort after positive ones), as PointGST does. Ties keep their
    order; points that are not finite come last.

    Raises:
        KernelArgumentError: not (B, N, 3), or ``bits`` outside 1 to 20.
    """
    points = checks.points("points", points, 3)
    if checks.count("bits", bits, 1) > 20:
        raise checks.fail("bits", f"is {bits}", "at most 20, so that a key fits 64 bits")
    scaled = points.to(compute_dtype(points)) * checks.positive("scale", scale)
    finite = torch.isfinite(scaled).all(-1)
    whole = torch.where(finite[..., None], scaled, 0).to(torch.int64)
    apart = _spread(whole & ((1 << bits) - 1))
    key = apart[..., 2] | apart[..., 0] << 1 | apart[..., 1] << 2
    key = torch.where(finite, key, 1 << (3 * bits))
    order = key.argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return MortonOrder(order, torch.empty_like(order).scatter_(1, order, places))


def _spread(x: Tensor) -> Tensor:
    """The lowest 21 bits of int64 numbers, two zeros between each and the next."""
    for shift, mask in (
        (32, 0x001F00000000FFFF),
        (16, 0x001F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | x << shift) & mask
    return x
