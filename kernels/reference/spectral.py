"""Eigen-decompositions, graph Laplacians and z-order written to be read: the definition the rest is tested against.

Raw contract of the back ends: ``eigh_small(a (B, n, n)) -> (w (B, n) ascending, v (B, n, n))``, eigenvectors as
columns, no sign rule; only the lower triangle counts; halves give float32; a matrix that is not finite gives NaN and
leaves the others right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_suite.kernels.reference.points import compute_dtype

__all__ = ["eigh_small", "fix_signs", "graph_laplacian", "graph_weights", "morton_keys"]


def eigh_small(a: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix after the other, in float64, by LAPACK on the CPU."""
    wide = a.detach().to("cpu", torch.float64).tril()
    pairs = []
    for matrix in wide:
        if torch.isfinite(matrix).all():
            pairs.append(tuple(torch.linalg.eigh(matrix)))
        else:
            pairs.append((torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)))
    w, v = (torch.stack(part) for part in zip(*pairs))
    return w.to(a.device, compute_dtype(a)), v.to(a.device, compute_dtype(a))


def fix_signs(v: Tensor) -> Tensor:
    """(B, n, n) with the entry of largest magnitude in each column made positive; the lowest row wins a tie."""
    row = v.abs().argmax(dim=-2, keepdim=True)  # the first of equal ones
    return torch.where(v.gather(-2, row) < 0, -v, v)


def graph_weights(
    points: Tensor, kind: str = "inverse", sigma: float | None = None, k: int | None = None, delta: str = "cloud"
) -> Tensor:
    """(B, G, D) -> (B, G, G) symmetric weights with 1 on the diagonal; see ``api.spectral.graph_laplacian``."""
    x = points.to(compute_dtype(points))
    squared = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for d in range(x.shape[2]):
        gap = x[:, :, None, d] - x[:, None, :, d]
        squared = squared + gap * gap
    distance = squared.sqrt()
    eye = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    axes = (0, 1, 2) if delta == "batch" else (1, 2)

    if kind == "inverse":
        nearest = torch.where(distance > 0, distance, torch.inf).amin(axes, keepdim=True)
        weights = 1 / torch.clamp(distance / nearest, min=1)
    elif kind == "gaussian":
        if sigma is None:
            pairs = squared.shape[1] * (squared.shape[1] - 1) * (squared.shape[0] if delta == "batch" else 1)
            width = distance.sum(axes, keepdim=True) / max(pairs, 1)
            width = torch.where(width == 0, 1, width)
        else:
            width = torch.full((1, 1, 1), sigma, dtype=x.dtype, device=x.device)
        weights = torch.exp(-squared / (2 * width * width))
    else:
        assert k is not None
        order = torch.where(eye, torch.inf, distance).sort(dim=2, stable=True).indices
        near = torch.zeros_like(distance).scatter(2, order[:, :, : min(k, x.shape[1] - 1)], 1.0)
        weights = torch.maximum(near, near.mT) + distance * 0  # NaN stays NaN
    return torch.where(eye & ~distance.isnan(), 1, weights)


def graph_laplacian(
    points: Tensor,
    kind: str = "inverse",
    normalized: bool = True,
    sigma: float | None = None,
    k: int | None = None,
    delta: str = "cloud",
    eps: float = 1e-6,
) -> Tensor:
    """I − D^{-1/2} W D^{-1/2}, or D − W."""
    weights = graph_weights(points, kind, sigma, k, delta)
    degree = weights.sum(2)
    eye = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    if not normalized:
        return eye * degree[:, :, None] - weights
    root = torch.rsqrt(degree + eps)
    return eye - weights * (root[:, :, None] * root[:, None, :])


def morton_keys(points: Tensor, scale: float = 100.0, bits: int = 16) -> list[list[int]]:
    """Bit by bit, in Python integers: (B, N, 3) -> keys; a point that is not finite has the largest key."""
    keys = []
    for cloud in points.tolist():
        row = []
        for point in cloud:
            scaled = torch.tensor(point, dtype=compute_dtype(points)) * scale
            if not torch.isfinite(scaled).all():
                row.append(2 ** (3 * bits))
                continue
            x, y, z = (int(c) for c in scaled.tolist())  # int() truncates toward zero
            row.append(sum((((c >> i) & 1) << (3 * i + slot)) for i in range(bits) for slot, c in enumerate((z, x, y))))
        keys.append(row)
    return keys
