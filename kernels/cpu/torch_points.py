"""Point operations in plain torch, on any device: always there, memory bounded by chunks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_suite.kernels.reference.points import NEAR_ORIGIN, compute_dtype, pairwise, pointnet2_tie_order

__all__ = [
    "ball_query",
    "farthest_point_sampling",
    "gather_rows",
    "group_relative",
    "knn",
    "scatter_rows",
    "three_interpolate",
]

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # distances alive at once
DIFFERENCE_DIM = 8  # up to here distances are explicit differences, whatever the precision asked


def _chunk(device: torch.device, n: int) -> int:
    return max(1, CHUNK.get(device.type, 1 << 24) // max(n, 1))


def _beyond(lengths: Tensor | None, n: int) -> Tensor | None:
    """(B, n): True where the index is not below the length."""
    if lengths is None:
        return None
    return torch.arange(n, device=lengths.device) >= lengths[:, None]


def _nearest(distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k smallest along the last axis, ascending, equal distances by lower index; distances are non-negative."""
    n = distance.shape[-1]
    if distance.dtype == torch.float32:  # non-negative float bits are monotone: one integer orders (distance, index)
        key = (distance + 0.0).view(torch.int32).to(torch.int64) << 32
        key |= torch.arange(n, device=distance.device)
        top = torch.topk(key, k, dim=-1, largest=False, sorted=True).values
        return (top >> 32).to(torch.int32).view(torch.float32), top & 0xFFFFFFFF
    dists, order = torch.sort(distance, dim=-1, stable=True)
    return dists[..., :k], order[..., :k]


def _features(query: Tensor, points: Tensor, precision: str) -> Tensor:
    """(Q, D), (N, D) -> (Q, N): |q|² − 2q·p + |p|² after centring; bfloat16 products where precision is "fast"."""
    dot = (query.bfloat16() @ points.bfloat16().mT).to(query.dtype) if precision == "fast" else query @ points.mT
    expanded = (query * query).sum(-1)[:, None] - 2 * dot + (points * points).sum(-1)[None]
    return torch.where(expanded.isnan(), torch.inf, expanded.clamp(min=0))


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
    """Chunks of queries: differences and a top-k of packed keys; wide features by products, then refined."""
    dtype = compute_dtype(query)
    batch, n_query, dim = query.shape
    n = points.shape[1]
    wanted = min(k, n)
    dists = torch.full((batch, n_query, k), torch.inf, dtype=dtype, device=query.device)
    idx = torch.full((batch, n_query, k), -1, dtype=index_dtype, device=query.device)
    beyond_p, beyond_q = _beyond(lengths_p, n), _beyond(lengths_q, n_query)
    products = dim > DIFFERENCE_DIM and norm == 2
    step = _chunk(query.device, n * (4 if products else 1))
    slots = torch.arange(wanted, device=query.device)
    allow = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = allow and precision == "fast"
        for b in range(batch if wanted else 0):
            q, p = query[b].to(dtype), points[b].to(dtype)
            if products:
                seen = p if beyond_p is None else p[~beyond_p[b]] if query.device.type == "cpu" else p
                mean = torch.nan_to_num(seen.mean(0), 0.0, 0.0, 0.0) if seen.shape[0] else 0.0
                centred = p - mean
            for at in range(0, n_query, step):
                rows = q[at : at + step]
                candidates = min(n, 2 * wanted + 8) if products and refine else wanted
                distance = _features(rows - mean, centred, precision) if products else pairwise(rows, p, norm)
                if beyond_p is not None:
                    distance = distance.masked_fill(beyond_p[b], torch.inf)
                near, order = _nearest(distance, candidates)
                if products and refine:
                    near, order = _refine(rows, p, order, None if beyond_p is None else beyond_p[b], wanted)
                if lengths_p is not None:  # real points come first, also those at infinity: lengths cut off a tail
                    order = order.masked_fill(slots >= lengths_p[b], -1)
                if beyond_q is not None:
                    gone = beyond_q[b, at : at + step, None]
                    near, order = near.masked_fill(gone, torch.inf), order.masked_fill(gone, -1)
                dists[b, at : at + step, :wanted] = near
                idx[b, at : at + step, :wanted] = order.to(index_dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow
    return dists, idx


def _refine(rows: Tensor, p: Tensor, order: Tensor, beyond: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Candidates (Q, c) by product form -> the k nearest by explicit differences, ties by lower index."""
    order = order.sort(-1).values
    gap = rows[:, None] - p[order]
    exact = (gap * gap).sum(-1)
    exact = torch.where(exact.isnan(), torch.inf, exact)
    if beyond is not None:
        exact = exact.masked_fill(beyond[order], torch.inf)
    near, place = _nearest(exact, k)
    return near, order.gather(-1, place)


def farthest_point_sampling(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype
) -> Tensor:
    """All clouds in step, coordinates as separate rows, one arg-max a pick; no synchronisation on a GPU."""
    dtype = compute_dtype(points)
    batch, n, dim = points.shape
    device = points.device
    axes = points.to(dtype).permute(2, 0, 1).contiguous()  # (D, B, N)
    finite = torch.isfinite(axes).all(0)
    axes = axes.masked_fill_(~finite, 0)  # never candidates; keeps NaN out of the minimum
    candidate = finite
    if lengths is not None:
        candidate = candidate & (torch.arange(n, device=device) < lengths[:, None])
    pointnet2 = rule == "pointnet2"
    if pointnet2:
        norm = sum((axes[d] * axes[d] for d in range(1, dim)), axes[0] * axes[0])
        candidate = candidate & (norm.double() > NEAR_ORIGIN)
    best = torch.full((batch, n), 1e10 if pointnet2 else torch.inf, dtype=dtype, device=device)
    best.masked_fill_(~candidate, -1.0)  # never the maximum while a candidate is left
    place = axes.permute(1, 2, 0).contiguous()  # (B, N, D), to read centres from
    order = _tie_permutation(n, lengths, batch, device) if pointnet2 else None
    if order is not None:  # scan in tie order, so that the first maximum is the winner
        axes, best = axes.gather(2, order.expand(dim, -1, -1)), best.gather(1, order)
    row = torch.arange(batch, device=device)
    fallback = ~candidate.any(-1)
    picks = torch.empty(batch, m, dtype=torch.int64, device=device)
    last = start.to(torch.int64)
    gap, total = torch.empty_like(best), torch.empty_like(best)
    for j in range(m):
        picks[:, j] = last
        if j + 1 == m:
            break
        centre = place[row, last]  # (B, D)
        torch.sub(axes[0], centre[:, 0, None], out=gap)
        torch.mul(gap, gap, out=total)
        for d in range(1, dim):
            torch.sub(axes[d], centre[:, d, None], out=gap)
            gap.mul_(gap)
            total.add_(gap)
        if j == 0:  # only the start can be a point that is not finite: it moves nothing
            total.masked_fill_(~finite[row, last][:, None], torch.inf)
        torch.minimum(best, total, out=best)
        at = best.argmax(-1)
        last = at if order is None else order[row, at]
        last = torch.where(fallback, 0, last)
    return picks.to(index_dtype)


def _tie_permutation(n: int, lengths: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """(B, N): indices in the order in which pointnet2_ops prefers them among equal distances."""
    if lengths is None:
        return torch.argsort(pointnet2_tie_order(n)).to(device).expand(batch, n)
    i = torch.arange(n, device=device)
    threads = torch.pow(2, torch.floor(torch.log2(lengths.clamp(min=1).double()))).long().clamp(max=512)[:, None]
    bits = torch.log2(threads.double()).long()
    lane, reverse = i % threads, torch.zeros(batch, n, dtype=torch.int64, device=device)
    for b in range(9):
        reverse |= torch.where(b < bits, ((lane >> b) & 1) << (bits - 1 - b).clamp(min=0), 0)
    return torch.argsort(reverse * (n + 1) + i // threads, dim=-1)


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
    """Chunks of queries: mask, then the k smallest of the hit indices."""
    dtype = compute_dtype(query)
    batch, n_query, _ = query.shape
    n = points.shape[1]
    wanted = min(k, n)
    r = torch.full((), radius, dtype=dtype, device=query.device)
    place = torch.full((batch, n_query, k), n, dtype=torch.int32, device=query.device)
    beyond_p, beyond_q = _beyond(lengths_p, n), _beyond(lengths_q, n_query)
    ranks = torch.arange(n, dtype=torch.int32, device=query.device)
    step = _chunk(query.device, n)
    for b in range(batch if wanted else 0):
        q, p = query[b].to(dtype), points[b].to(dtype)
        for at in range(0, n_query, step):
            hit = pairwise(q[at : at + step], p) < r * r
            if beyond_p is not None:
                hit &= ~beyond_p[b]
            if beyond_q is not None:
                hit &= ~beyond_q[b, at : at + step, None]
            found = torch.where(hit, ranks, n)
            place[b, at : at + step, :wanted] = torch.topk(found, wanted, dim=-1, largest=False, sorted=True).values
    if pad == "first":
        filler = torch.where(place[..., :1] < n, place[..., :1], 0)
    else:
        filler = torch.full_like(place[..., :1], -1)
    return torch.where(place < n, place, filler).to(index_dtype)


def gather_rows(x: Tensor, idx: Tensor) -> Tensor:
    """(B, N, C), (B, L) -> (B, L, C); index −1 gives zeros."""
    batch, n, channels = x.shape
    if n == 0:
        return x.new_zeros(batch, idx.shape[1], channels)
    idx = idx.long()
    base = torch.arange(batch, device=x.device)[:, None] * n
    rows = x.reshape(batch * n, channels).index_select(0, (idx.clamp(min=0) + base).flatten())
    return rows.view(batch, idx.shape[1], channels).masked_fill_((idx < 0)[..., None], 0)


def scatter_rows(g: Tensor, idx: Tensor, n: int, deterministic: bool) -> Tensor:
    """(B, L, C), (B, L) -> (B, n, C): sums by destination, in float32 for halves; −1 is dropped."""
    batch, length, channels = g.shape
    out = torch.zeros(batch * n + 1, channels, dtype=compute_dtype(g), device=g.device)  # the last row takes the −1s
    idx = idx.long()
    base = torch.arange(batch, device=g.device)[:, None] * n
    to = torch.where(idx < 0, batch * n, idx + base).flatten()
    rows = g.reshape(batch * length, channels).to(out.dtype)
    if deterministic and g.is_cuda:
        order = torch.argsort(to, stable=True)  # segments in source order, reduced without atomics
        ends = torch.searchsorted(to[order], torch.arange(batch * n + 1, device=g.device), right=True)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        out = torch.segment_reduce(rows[order], "sum", lengths=counts, axis=0, unsafe=True)
    else:
        out.index_add_(0, to, rows)
    return out[:-1].view(batch, n, channels).to(g.dtype)


def group_relative(xyz: Tensor, centers: Tensor, idx: Tensor) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, k) -> (B, M, k, D): grouped minus centre; index −1 gives zeros."""
    batch, m, k = idx.shape
    grouped = gather_rows(xyz, idx.reshape(batch, m * k)).view(batch, m, k, xyz.shape[2])
    grouped -= centers[:, :, None]
    return grouped.masked_fill_((idx < 0)[..., None], 0)


def three_interpolate(feats: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """(B, m, C), (B, n, k), (B, n, k) -> (B, n, C): weighted sums of k rows, one neighbour at a time."""
    dtype = compute_dtype(feats)
    wide, weight = feats.to(dtype), weight.to(dtype)
    out: Tensor | None = None
    for j in range(idx.shape[-1]):
        row = gather_rows(wide, idx[..., j]).mul_(weight[..., j, None])
        out = row if out is None else out.add_(row)
    assert out is not None
    return out.to(feats.dtype)
