"""Ball query: the first k points in index order inside a radius, by a scan with early exit or through a kd-tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peft_suite.kernels.cpu.numba_common import LEAF, SUPER, build_tree, jit, lengths_array, parallel_for, points_array
from peft_suite.kernels.cpu.numba_vector import box_hits, leaf_hits, lowest_bit, near_bits, ranks

__all__ = ["ball_query", "ball_query_cannot", "ball_query_pass", "warmup"]

BLOCK = 128  # queries in one unit of work
_MOST = 512  # hits that the tree path sorts; with more, a scan meets k of them soon


@jit
def _rows(cloud, count, rows):  # type: ignore[no-untyped-def]
    """cloud (N, 3) -> rows (R, 3, 16) in index order; NaN past `count` is outside every ball."""
    for r in range(rows.shape[0]):
        for i in range(16):
            place = r * 16 + i
            for a in range(3):
                rows[r, a, i] = cloud[place, a] if place < count else np.nan


@jit
def _scan(rows, x, y, z, radius, out):  # type: ignore[no-untyped-def]
    """First hits of one query in index order into out (k,) -> number of hits written, rows of 16 looked at."""
    k = out.size
    count = 0
    row = 0
    while row < rows.shape[0]:
        bits = near_bits(rows, row, x, y, z, radius)
        while bits != 0:
            out[count] = row * 16 + lowest_bit(bits)
            bits &= bits - np.uint64(1)
            count += 1
            if count == k:
                return count, row + 1
        row += 1
    return count, row


@jit
def _pad(out, count, first):  # type: ignore[no-untyped-def]
    fill = -1
    if first:
        fill = out[0] if count > 0 else 0
    for i in range(count, out.size):
        out[i] = fill


@jit
def _scan_block(rows, query, start, stop, radius, first, out):  # type: ignore[no-untyped-def]
    for q in range(start, stop):
        count, _ = _scan(rows, query[q, 0], query[q, 1], query[q, 2], radius, out[q])
        _pad(out[q], count, first)


@jit
def _probe(rows, query, count, radius, k):  # type: ignore[no-untyped-def]
    """16 of the queries scanned: mean number of points looked at and of hits taken."""
    out = np.empty(k, np.int64)
    looked = 0
    taken = 0
    for s in range(16):
        q = s * count // 16
        hits, seen = _scan(rows, query[q, 0], query[q, 1], query[q, 2], radius, out)
        looked += seen
        taken += hits
    return looked, taken / 16


@jit
def _tree_block(points, index, box, upper, kept, rows, query, start, stop, radius, first, out):  # type: ignore[no-untyped-def]
    """As _scan_block, from the leaves within reach; rows serve the queries with many hits."""
    leaves = (kept + LEAF - 1) // LEAF
    uppers = ((leaves + SUPER - 1) // SUPER + 15) // 16
    dist = np.empty(16, query.dtype)
    place = np.empty(16, np.int32)
    found = np.empty(_MOST + 16, np.int32)
    line = np.empty(_MOST + 16, np.int32)
    rank = np.empty(_MOST + 16, np.int32)
    k = out.shape[1]
    for q in range(start, stop):
        x = query[q, 0]
        y = query[q, 1]
        z = query[q, 2]
        count = 0
        u = 0
        while u < uppers and count <= _MOST:
            above = box_hits(upper, u, x, y, z, x, y, z, radius)
            while above != 0 and count <= _MOST:
                r = u * 16 + lowest_bit(above)
                above &= above - np.uint64(1)
                near = box_hits(box, r, x, y, z, x, y, z, radius)
                while near != 0 and count <= _MOST:
                    leaf = r * SUPER + lowest_bit(near)
                    near &= near - np.uint64(1)
                    bits = leaf_hits(points, index, leaf, x, y, z, radius, dist, place, 0)
                    while bits != 0:
                        i = lowest_bit(bits)
                        bits &= bits - np.uint64(1)
                        found[count] = place[i]
                        count += int(dist[i] < radius)
            u += 1
        if count > _MOST:
            count, _ = _scan(rows, x, y, z, radius, out[q])
        else:
            full = (count + 15) // 16
            for i in range(count, full * 16):
                found[i] = 0x7FFFFFFF
            ranks(found, rank, full)
            for i in range(count):
                line[np.uint32(rank[i])] = found[i]
            count = min(count, k)
            for i in range(count):
                out[q, i] = line[i]
        _pad(out[q], count, first)


def _tree_pays(rows: Any, sites: Any, counts: Any, full: int, square: Any, k: int) -> bool:
    """Whether a tree is faster than scans, judged by a few scans.

    Measured, in points that a scan looks at: a tree costs 400 for each point to build, and for each query 3500 and 60 a
    hit; sorting h hits adds h^2 / 4.
    """
    size = sites.shape[1]
    probed = [b for b in range(len(sites)) if counts[b] > 0]
    if full < 4096 or size < 64 or not probed or not np.isfinite(square):
        return False
    looked, taken = np.mean([_probe(rows[b], sites[b], counts[b], square, k) for b in probed], axis=0)
    hits = taken / max(looked, 1) * full
    return bool(looked * size > 400 * full + size * (3500 + 60 * hits + hits * hits / 4))


def ball_query(
    query: torch.Tensor,
    points: torch.Tensor,
    radius: float,
    k: int,
    lengths_q: torch.Tensor | None,
    lengths_p: torch.Tensor | None,
    pad: str,
    index_dtype: torch.dtype,
) -> torch.Tensor:
    """First k indices (B, Q, k) in index order with d^2 < radius^2: query (B, Q, D), points (B, N, D).

    pad "first": missing places repeat the first hit, 0 without any; "pytorch3d": -1.
    """
    batch, size, _ = query.shape
    full = points.shape[1]
    cloud, sites = points_array(points), points_array(query)
    count_p = lengths_array(lengths_p, batch, full)
    count_q = lengths_array(lengths_q, batch, size)
    with np.errstate(over="ignore"):
        square = sites.dtype.type(radius) * sites.dtype.type(radius)
    first = pad == "first"
    rows = np.empty((batch, (full + 15) // 16, 3, 16), cloud.dtype)
    parallel_for(lambda b: _rows(cloud[b], count_p[b], rows[b]), batch)
    indices = torch.empty((batch, size, k), dtype=torch.int64)
    out = indices.numpy()

    tree = build_tree(cloud, count_p) if _tree_pays(rows, sites, count_q, full, square, k) else None
    blocks = (size + BLOCK - 1) // BLOCK

    def one(item: int) -> None:
        b, block = divmod(item, blocks)
        start, stop = block * BLOCK, min((block + 1) * BLOCK, int(count_q[b]))
        if start < stop and tree is not None:
            _tree_block(
                tree.points[b],
                tree.index[b],
                tree.box[b],
                tree.upper[b],
                tree.finite[b],
                rows[b],
                sites[b],
                start,
                stop,
                square,
                first,
                out[b],
            )
        elif start < stop:
            _scan_block(rows[b], sites[b], start, stop, square, first, out[b])
        if block == 0:
            out[b, count_q[b] :] = 0 if first else -1

    parallel_for(one, batch * blocks)
    return indices.to(index_dtype)


def ball_query_cannot(*args: Any) -> str | None:
    """Why this form cannot run the call, if it cannot."""
    dim = args[0].shape[-1]
    return f"the numba form knows at most 3 coordinates, the points have {dim}" if dim > 3 else None


def ball_query_pass(*args: Any) -> str | None:
    """Why another form should run the call, if one is faster."""
    return None


def warmup() -> None:
    """Compile (or load from the cache) the fp32 and fp64 variants."""
    for dtype in (torch.float32, torch.float64):
        cloud = torch.rand(1, 8192, 3, dtype=dtype)
        for radius in (0.5, 1e-4):  # a scan, a tree
            ball_query(cloud, cloud, radius, 4, None, None, "first", torch.int64)
