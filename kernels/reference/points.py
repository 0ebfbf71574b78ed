"""Point-cloud operations written to be read: the definition every back end is tested against.

Everything is computed in the given dtype (halves in float32), so that a float64 input gives a float64 oracle and a
float32 input gives the bits that the fast back ends must give. Slow: whole distance matrices, loops over batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ball_query",
    "compute_dtype",
    "farthest_point_sampling",
    "gather_rows",
    "group_relative",
    "knn",
    "pairwise",
    "pointnet2_tie_order",
    "scatter_rows",
    "three_interpolate",
]

NEAR_ORIGIN = 1e-3  # pointnet2_ops leaves out points whose squared norm is at most this


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pairwise(query: Tensor, points: Tensor, norm: int = 2) -> Tensor:
    """(..., Q, D), (..., N, D) -> (..., Q, N): Σ_d (q_d − p_d)² (norm 2) or Σ_d |q_d − p_d|, added in coordinate order.

    NaN distances become +inf, so that they sort last.
    """
    total: Tensor | None = None
    for d in range(query.shape[-1]):
        gap = query[..., :, None, d] - points[..., None, :, d]
        term = gap * gap if norm == 2 else gap.abs()
        total = term if total is None else total + term
    assert total is not None
    return torch.where(total.isnan(), torch.inf, total)


def _valid(lengths: Tensor | None, batch: int, n: int, device: torch.device) -> Tensor:
    every = torch.full((batch,), n, device=device) if lengths is None else lengths
    return torch.arange(n, device=device) < every[:, None]  # (B, n)


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    lengths_q: Tensor | None,
    lengths_p: Tensor | None,
    norm: int,
    precision: str,
    refine: bool,
    index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Squared distances (B, Q, k) ascending, ties by lower index, and indices; missing slots are +inf and −1."""
    dtype = compute_dtype(query)
    batch, n_query, _ = query.shape
    n = points.shape[1]
    distance = pairwise(query.to(dtype), points.to(dtype), norm)  # (B, Q, N)
    inside = _valid(lengths_p, batch, n, points.device)[:, None].expand_as(distance)
    distance = torch.where(inside, distance, torch.inf)  # lengths cut off a tail: real points at infinity come first
    order = torch.argsort(distance, dim=-1, stable=True)[..., :k]
    dists, idx, missing = distance.gather(-1, order), order, ~inside.gather(-1, order)
    missing |= ~_valid(lengths_q, batch, n_query, query.device)[..., None]
    dists, idx = dists.masked_fill(missing, torch.inf), idx.masked_fill(missing, -1)
    short = (batch, n_query, k - idx.shape[-1])
    dists = torch.cat([dists, dists.new_full(short, torch.inf)], -1)
    return dists, torch.cat([idx, idx.new_full(short, -1)], -1).to(index_dtype)


def pointnet2_tie_order(n: int) -> Tensor:
    """Rank of every index among equal distances in pointnet2_ops' block reduction: (bit-reversed i mod S, i div S).

    S = min(512, 2^⌊log2 n⌋) threads scan i = t, t+S, ... and keep the first maximum; a tree of log2 S steps joins
    thread t with t + S/2, then S/4, ...; the lower slot wins ties.
    """
    threads = min(512, 1 << (n.bit_length() - 1))
    bits = threads.bit_length() - 1
    i = torch.arange(n)
    lane, reverse = i % threads, torch.zeros_like(i)
    for b in range(bits):
        reverse |= ((lane >> b) & 1) << (bits - 1 - b)
    return torch.argsort(torch.argsort(reverse * n + i // threads))


def farthest_point_sampling(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype
) -> Tensor:
    """Indices (B, m): each pick is the candidate farthest from all picks before it; m beyond the cloud repeats."""
    cloud = points.to(compute_dtype(points))
    picks = torch.zeros(points.shape[0], m, dtype=torch.int64)
    for b in range(points.shape[0]):
        n = points.shape[1] if lengths is None else int(lengths[b])
        if n == 0:
            continue
        x = cloud[b, :n].cpu()
        candidate = torch.isfinite(x).all(-1)
        best = torch.full((n,), torch.inf, dtype=x.dtype)
        rank = torch.arange(n)
        if rule == "pointnet2":
            norm = pairwise(x, torch.zeros_like(x[:1]))[:, 0]
            candidate &= norm.double() > NEAR_ORIGIN
            best.fill_(1e10)
            rank = pointnet2_tie_order(n)
        last = int(start[b])
        for j in range(m):
            picks[b, j] = last
            distance = pairwise(x, x[last : last + 1])[:, 0]
            best = torch.where(distance < best, distance, best)
            if candidate.any():
                tied = candidate & (best == best[candidate].max())
                last = int(torch.where(tied, rank, n).argmin())
            else:
                last = 0
    return picks.to(device=points.device, dtype=index_dtype)


def ball_query(
    query: Tensor,
    points: Tensor,
    radius: float,
    k: int,
    lengths_q: Tensor | None,
    lengths_p: Tensor | None,
    pad: str,
    index_dtype: torch.dtype,
) -> Tensor:
    """(B, Q, k): the first k points in index order with d² < radius², not the nearest ones."""
    dtype = compute_dtype(query)
    batch, n_query, n = query.shape[0], query.shape[1], points.shape[1]
    r = torch.tensor(radius, dtype=dtype, device=query.device)
    hit = pairwise(query.to(dtype), points.to(dtype)) < r * r
    hit &= _valid(lengths_p, batch, n, points.device)[:, None]
    hit &= _valid(lengths_q, batch, n_query, query.device)[..., None]
    place = torch.where(hit, torch.arange(n, device=hit.device), n).sort(-1).values[..., :k]  # hits first, in order
    place = torch.nn.functional.pad(place, (0, k - place.shape[-1]), value=n)
    if pad == "first":
        filler = torch.where(place[..., :1] < n, place[..., :1], 0)
    else:
        filler = torch.full_like(place[..., :1], -1)
    return torch.where(place < n, place, filler).to(index_dtype)


def gather_rows(x: Tensor, idx: Tensor) -> Tensor:
    """(B, N, C), (B, L) -> (B, L, C): ``x[b, idx[b, l]]``; index −1 gives zeros."""
    rows = torch.stack([x[b][idx[b].long().clamp(min=0)] for b in range(x.shape[0])])
    return torch.where((idx >= 0)[..., None], rows, 0)


def scatter_rows(g: Tensor, idx: Tensor, n: int, deterministic: bool) -> Tensor:
    """(B, L, C), (B, L) -> (B, n, C): sums of the rows sent to each index, in order; −1 is dropped."""
    wide = g.to(compute_dtype(g))
    out = torch.zeros(g.shape[0], n, g.shape[2], dtype=wide.dtype, device=g.device)
    for b in range(g.shape[0]):
        for row in range(g.shape[1]):
            if idx[b, row] >= 0:
                out[b, idx[b, row].long()] += wide[b, row]
    return out.to(g.dtype)


def group_relative(xyz: Tensor, centers: Tensor, idx: Tensor) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, k) -> (B, M, k, D): ``xyz[b, idx] − centers``; index −1 gives zeros."""
    batch, m, k = idx.shape
    grouped = gather_rows(xyz, idx.reshape(batch, m * k)).reshape(batch, m, k, -1) - centers[:, :, None]
    return torch.where((idx >= 0)[..., None], grouped, 0)


def three_interpolate(feats: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """(B, m, C), (B, n, k), (B, n, k) -> (B, n, C): Σ_j weight_j · feats[idx_j], summed in at least float32."""
    batch, n, k = idx.shape
    wide = feats.to(compute_dtype(feats))
    rows = gather_rows(wide, idx.reshape(batch, n * k)).reshape(batch, n, k, -1)
    return (rows * weight.to(wide.dtype)[..., None]).sum(2).to(feats.dtype)
