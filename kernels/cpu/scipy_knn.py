"""k nearest neighbours through scipy's cKDTree, made exact: it proposes, the kernels' own arithmetic decides.

The tree rounds and breaks ties in its own way. It is asked for k + 8 candidates, whose distances are computed again as
`((dx*dx + dy*dy) + dz*dz)` in the type of the points and sorted by (distance, index). A query is certain when its k-th
distance lies below everything the tree left out by more than rounding can move; the others are computed in full.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree

__all__ = ["knn", "knn_cannot", "knn_pass", "warmup"]

EXTRA = 8
_CHUNK = 1 << 18  # pairs computed at once for the uncertain queries


def _squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(..., D) -> squared distances summed in coordinate order; NaN becomes +inf."""
    total = (a[..., 0] - b[..., 0]).square()
    for axis in range(1, a.shape[-1]):
        total = total + (a[..., axis] - b[..., axis]).square()
    return torch.where(total == total, total, torch.inf)


def _sorted(dists: torch.Tensor, index: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns by (distance, index), first k."""
    index, order = torch.sort(index, dim=-1)
    dists, order = torch.sort(dists.gather(-1, order), dim=-1, stable=True)
    return dists[..., :k], index.gather(-1, order)[..., :k]


def _full(query: torch.Tensor, points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, D), (N, D) by all pairs."""
    step = max(_CHUNK // points.shape[0], 1)
    parts = [torch.sort(_squares(q[:, None], points), dim=-1, stable=True) for q in torch.split(query, step)]
    return torch.cat([d[:, :k] for d, _ in parts]), torch.cat([i[:, :k] for _, i in parts])


def _one(query: torch.Tensor, points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One cloud, k <= N."""
    finite = points.isfinite().all(-1)
    certain = query.isfinite().all(-1)
    there = int(finite.sum())
    if there < k + EXTRA or not bool(certain.any()):
        return _full(query, points, k)
    place = finite.nonzero()[:, 0]
    taken = min(k + EXTRA, there)
    kept = points[place].double().numpy()
    tree = cKDTree(kept, balanced_tree=False, compact_nodes=False)
    sites = query.double().numpy()
    if not bool(certain.all()):
        sites = np.where(certain[:, None].numpy(), sites, 0.0)
    far, index = tree.query(sites, k=taken, workers=torch.get_num_threads())
    index = place[torch.from_numpy(index.reshape(len(sites), taken))]
    dists, index = _sorted(_squares(query[:, None], points[index]), index, k)
    if taken < there:
        # relative rounding of D differences, squares and sums stays under (D + 4) eps; denormals get an absolute part
        kind = torch.finfo(query.dtype)
        slack = 4 * (query.shape[1] + 4) * max(kind.eps, 1e-15)
        left_out = torch.from_numpy(far.reshape(len(sites), taken)[:, -1]) ** 2
        certain &= dists[:, -1].double() * (1 + slack) + 64 * kind.tiny < left_out
    certain &= dists[:, -1] < torch.inf
    if not bool(certain.all()):
        dists[~certain], index[~certain] = _full(query[~certain], points, k)
    return dists, index


def knn(
    query: torch.Tensor,
    points: torch.Tensor,
    k: int,
    lengths_q: torch.Tensor | None,
    lengths_p: torch.Tensor | None,
    norm: int,
    precision: str,
    refine: bool,
    index_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances ascending and indices, ties by lower index: query (B, Q, D), points (B, N, D) -> (B, Q, k).

    Places that do not exist hold +inf and -1; a NaN distance counts as +inf.
    """
    query, points = query.detach(), points.detach()
    if query.dtype not in (torch.float32, torch.float64):
        query, points = query.float(), points.float()
    batch, size, _ = query.shape
    dists = torch.full((batch, size, k), torch.inf, dtype=query.dtype)
    index = torch.full((batch, size, k), -1, dtype=torch.int64)
    for b in range(batch):
        q = size if lengths_q is None else int(lengths_q[b])
        n = points.shape[1] if lengths_p is None else int(lengths_p[b])
        real = min(k, n)
        if q and real:
            dists[b, :q, :real], index[b, :q, :real] = _one(query[b, :q], points[b, :n], real)
    return dists, index.to(index_dtype)


def knn_cannot(*args: Any) -> str | None:
    """Why this form cannot run the call, if it cannot."""
    query, norm = args[0], args[5]
    if norm != 2:
        return f"the scipy form knows norm 2 only, got norm {norm}"
    if query.shape[-1] > 8:
        return f"the scipy form serves at most 8 coordinates, the points have {query.shape[-1]}"
    return None


def knn_pass(*args: Any) -> str | None:
    """Why another form should run the call, if one is faster (measured against torch, one thread)."""
    queries, size, k = args[0].shape[1], args[1].shape[1], args[2]
    if queries * size < 1 << 18:
        return f"a tree does not pay for {queries} queries of {size} points a cloud"
    if 16 * k > size:
        return f"a tree does not pay for {k} of {size} points"
    return None


def warmup() -> None:
    """Nothing to compile."""
