"""Exact k nearest neighbours of small-dimensional points: bucketed kd-tree, fp32 difference form, ties by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peft_suite.kernels.cpu.numba_common import LEAF, SUPER, build_tree, jit, lengths_array, parallel_for, points_array
from peft_suite.kernels.cpu.numba_vector import box_hits, leaf_hits, lowest_bit, pair_ranks, ranks

__all__ = ["knn", "knn_cannot", "knn_pass", "warmup"]

GROUP = 16  # queries that share one list of candidate leaves
BLOCK = 256  # queries in one unit of work
RUN = 128  # pairs that are sorted by counting; more are merged
GROW = 1.2  # squared radius tried, over the last query's k-th distance
LIST = 1.6  # squared radius of a group's list of leaves, over that


@jit
def _nth(values, count, place):  # type: ignore[no-untyped-def]
    """The value that would stand at `place` if values[:count] were sorted; reorders them."""
    low = 0
    high = count
    while high - low > 1:
        a = values[low]
        b = values[(low + high) // 2]
        c = values[high - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        less = low
        more = high
        i = low
        while i < more:
            value = values[i]
            if value < pivot:
                values[i] = values[less]
                values[less] = value
                less += 1
                i += 1
            elif value > pivot:
                more -= 1
                values[i] = values[more]
                values[more] = value
            else:
                i += 1
        if place < less:
            high = less
        elif place >= more:
            low = more
        else:
            return pivot
    return values[low]


@jit
def _smallest(dist, index, count, k, work, work_index):  # type: ignore[no-untyped-def]
    """Move the k smallest pairs (dist, then index) of the first `count` to the front, in any order."""
    for i in range(count):
        work[i] = dist[i]
    bound = _nth(work, count, k - 1)
    strict = 0
    ties = 0
    for i in range(count):
        if dist[i] < bound:
            strict += 1
        elif dist[i] == bound:
            work_index[ties] = index[i]
            ties += 1
    last = _nth(work_index, ties, k - strict - 1)
    kept = 0
    for i in range(count):
        if dist[i] < bound or (dist[i] == bound and index[i] <= last):
            d = dist[i]
            j = index[i]
            dist[kept] = d
            index[kept] = j
            kept += 1


@jit
def _merge(dist, index, size, count, k, out_dist, out_index):  # type: ignore[no-untyped-def]
    """Merge neighbouring sorted runs of `size` pairs; of every merged run only the first k are needed."""
    for start in range(0, count, 2 * size):
        middle = min(start + size, count)
        stop = min(start + 2 * size, count)
        i = start
        j = middle
        for t in range(start, min(start + k, stop)):
            less = (dist[i] < dist[j]) | ((dist[i] == dist[j]) & (index[i] < index[j]))
            left = (j >= stop) | ((i < middle) & less)  # no branches: their outcome is random
            source = i if left else j
            out_dist[t] = dist[source]
            out_index[t] = index[source]
            i += left
            j += not left


@jit
def _sort(dist, index, count, k, rank, line, line_index, out_dist, out_index):  # type: ignore[no-untyped-def]
    """First k of the `count` pairs (dist and index flat, room to a multiple of 16) by (dist, index) to the output."""
    size = max(count, 1) if count <= 192 else RUN
    for start in range(0, count, size):
        length = min(size, count - start)
        full = (length + 15) // 16
        run = dist[start:]
        run_index = index[start:]
        for i in range(length, full * 16):
            run[i] = np.inf
            run_index[i] = 0x7FFFFFFF
        ranks(run, rank, full)
        total = 0
        for i in range(length):
            total += int(rank[i])
        if 2 * total != length * (length - 1):  # equal distances share a rank
            pair_ranks(run, run_index, rank, full)
        for i in range(length):
            place = start + np.int64(rank[i])
            line[place] = run[i]
            line_index[place] = run_index[i]
    while size < count:
        _merge(line, line_index, size, count, k, dist, index)
        dist, line = line, dist
        index, line_index = line_index, index
        size *= 2
    for i in range(k):
        out_dist[i] = line[i]
        out_index[i] = line_index[i]


@jit
def _knn_block(points, index, box, upper, kept, other, others, query, order, start, stop, k, out_dist, out_index):  # type: ignore[no-untyped-def]
    """Rows order[start:stop] of one cloud's queries (Q, 3) into out_dist, out_index (Q, k).

    Every query collects all points within a guessed squared radius: at least k of them prove that the k nearest are
    there, fewer make it guess higher. Queries come in spatial order, so the last answer is a good guess.
    """
    inf = query.dtype.type(np.inf)
    leaves = (kept + LEAF - 1) // LEAF
    rows = (leaves + SUPER - 1) // SUPER
    uppers = (rows + 15) // 16
    total = kept + others
    previous = np.int64(-1)
    listed_box = np.empty((rows + 1, 6, SUPER), query.dtype)
    listed_leaf = np.empty((rows + 1) * SUPER, np.int32)
    slots = leaves + 4
    dist = np.empty(slots * LEAF, query.dtype)
    place = np.empty(slots * LEAF, np.int32)
    masks = np.empty((slots + 3) // 4 * 4, np.uint16)
    words = masks.view(np.uint64)
    room = max(slots * LEAF, (total + 15) // 16 * 16) + 16
    found = np.empty(room, query.dtype)
    found_index = np.empty(room, np.int32)
    rank = np.empty(192, np.int32)
    line = np.empty(room, query.dtype)
    line_index = np.empty(room, np.int32)
    work = np.empty(1, query.dtype)
    work_index = np.empty(1, np.int32)
    real = min(k, total)
    few = kept < 4 * LEAF or 3 * real > 2 * kept  # no use in a search
    zero = query.dtype.type(0.0)
    most = query.dtype.type(np.finfo(query.dtype).max)
    # first guess: k neighbours fill about k / 100 of a leaf's squared diagonal, on surfaces and in volumes
    diagonal = 0.0
    sample = min(leaves, 16)
    for s in range(sample):
        leaf = s * leaves // sample
        for a in range(3):
            edge = box[leaf // SUPER, a + 3, leaf % SUPER] - box[leaf // SUPER, a, leaf % SUPER]
            diagonal += edge * edge
    guess = query.dtype.type(0.012 * k * diagonal / max(sample, 1))
    if not guess > zero:
        guess = inf
    for group in range(start, stop, GROUP):
        group_stop = min(group + GROUP, stop)
        x0 = y0 = z0 = inf
        x1 = y1 = z1 = -inf
        for g in range(group, group_stop):
            q = order[g]
            x0 = min(x0, query[q, 0])
            y0 = min(y0, query[q, 1])
            z0 = min(z0, query[q, 2])
            x1 = max(x1, query[q, 0])
            y1 = max(y1, query[q, 1])
            z1 = max(z1, query[q, 2])
        listed_radius = query.dtype.type(-1.0)
        listed = 0
        for g in range(group, group_stop):
            q = order[g]
            qx = query[q, 0]
            qy = query[q, 1]
            qz = query[q, 2]
            # copies of a point stand together, and would each collect all the others
            if previous >= 0 and qx == query[previous, 0] and qy == query[previous, 1] and qz == query[previous, 2]:
                for i in range(k):
                    out_dist[q, i] = out_dist[previous, i]
                    out_index[q, i] = out_index[previous, i]
                continue
            previous = np.int64(q)
            radius = guess
            count = 0
            tries = 0
            while radius < inf and not few:
                if radius > listed_radius:
                    listed_radius = min(radius * query.dtype.type(LIST), most)  # finite: padding stays outside
                    listed = 0
                    for u in range(uppers):
                        above = box_hits(upper, u, x0, y0, z0, x1, y1, z1, listed_radius)
                        while above != 0:
                            r = u * 16 + lowest_bit(above)
                            above &= above - np.uint64(1)
                            bits = box_hits(box, r, x0, y0, z0, x1, y1, z1, listed_radius)
                            while bits != 0:
                                i = lowest_bit(bits)
                                bits &= bits - np.uint64(1)
                                lane = listed % SUPER
                                for a in range(6):
                                    listed_box[listed // SUPER, a, lane] = box[r, a, i]
                                listed_leaf[listed] = r * SUPER + i
                                listed += 1
                    for j in range(listed, (listed + SUPER - 1) // SUPER * SUPER):
                        for a in range(6):
                            listed_box[j // SUPER, a, j % SUPER] = inf
                seen = 0
                for r in range((listed + SUPER - 1) // SUPER):
                    bits = box_hits(listed_box, r, qx, qy, qz, qx, qy, qz, radius)
                    while bits != 0:
                        leaf = np.int64(listed_leaf[r * SUPER + lowest_bit(bits)])
                        bits &= bits - np.uint64(1)
                        masks[seen] = leaf_hits(points, index, leaf, qx, qy, qz, radius, dist, place, seen)
                        seen += 1
                for i in range(seen, (seen + 3) // 4 * 4):
                    masks[i] = 0
                count = 0
                for w in range((seen + 3) // 4):
                    bits = words[w]
                    while bits != 0:
                        i = w * 64 + lowest_bit(bits)
                        bits &= bits - np.uint64(1)
                        found[count] = dist[i]
                        found_index[count] = place[i]
                        count += 1
                if count >= k:
                    break
                tries += 1
                if tries > 12:
                    break
                radius = radius * query.dtype.type(max(1.25, min(1.3 * k / max(count, 1), 4.0)))
            if count < k:
                # all points; those outside the tree are infinitely far
                for leaf in range(leaves):
                    leaf_hits(points, index, leaf, qx, qy, qz, inf, found, found_index, leaf)
                for i in range(kept):
                    if not found[i] < inf:
                        found[i] = inf
                for i in range(others):
                    found[kept + i] = inf
                    found_index[kept + i] = other[i]
                count = total
            if count > 2 * real + 128:
                if work.size < count:
                    work = np.empty(room, query.dtype)
                    work_index = np.empty(room, np.int32)
                _smallest(found, found_index, count, real, work, work_index)
                count = real
            _sort(found, found_index, count, real, rank, line, line_index, out_dist[q], out_index[q])
            for i in range(real, k):
                out_dist[q, i] = inf
                out_index[q, i] = -1
            if k <= total:
                last = out_dist[q, k - 1]
                if last > zero and last < inf:
                    guess = last * query.dtype.type(GROW)


@jit
def _knn_missing(query, rows, first, stop, count, out_dist, out_index):  # type: ignore[no-untyped-def]
    """Rows of non-finite queries: all points are infinitely far, so the lowest indices; padded past `count`."""
    k = out_dist.shape[1]
    for r in range(first, stop):
        for i in range(k):
            out_dist[rows[r], i] = np.inf
            out_index[rows[r], i] = i if i < count else -1


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
    batch, size, _ = query.shape
    same = (
        query.data_ptr() == points.data_ptr()
        and query.shape == points.shape
        and query.stride() == points.stride()
        and query.dtype == points.dtype
    )
    cloud = points_array(points)
    sites = cloud if same else points_array(query)
    count_p = lengths_array(lengths_p, batch, points.shape[1])
    count_q = lengths_array(lengths_q, batch, size)
    tree = build_tree(cloud, count_p)
    query_tree = tree if same and (count_p == count_q).all() else build_tree(sites, count_q)
    dists = torch.empty((batch, size, k), dtype=torch.from_numpy(sites).dtype)
    indices = torch.empty((batch, size, k), dtype=torch.int64)
    out_dist, out_index = dists.numpy(), indices.numpy()
    blocks = (size + BLOCK - 1) // BLOCK

    def one(item: int) -> None:
        b, block = divmod(item, blocks)
        finite = int(query_tree.finite[b])
        start, stop = block * BLOCK, min((block + 1) * BLOCK, finite)
        if start < stop:
            _knn_block(
                tree.points[b],
                tree.index[b],
                tree.box[b],
                tree.upper[b],
                tree.finite[b],
                tree.other[b],
                tree.others[b],
                sites[b],
                query_tree.index[b].reshape(-1),
                start,
                stop,
                k,
                out_dist[b],
                out_index[b],
            )
        if block == 0:
            left = int(query_tree.others[b])
            if left:
                _knn_missing(sites[b], query_tree.other[b], 0, left, count_p[b], out_dist[b], out_index[b])
            if count_q[b] < size:
                out_dist[b, count_q[b] :] = np.inf
                out_index[b, count_q[b] :] = -1

    parallel_for(one, batch * blocks)
    return dists, indices.to(index_dtype)


def knn_cannot(*args: Any) -> str | None:
    """Why this form cannot run the call, if it cannot."""
    query, norm = args[0], args[5]
    if query.shape[-1] > 3:
        return f"the numba form knows at most 3 coordinates, the points have {query.shape[-1]}"
    if norm != 2:
        return f"the numba form knows norm 2 only, got norm {norm}"
    return None


def knn_pass(*args: Any) -> str | None:
    """Why another form should run the call, if one is faster (measured with k = 32, one thread)."""
    queries, size = args[0].shape[1], args[1].shape[1]
    if size >= 4096 and queries <= (4 if size < 65536 else 8):
        return f"a tree of {size} points does not pay for {queries} queries a cloud"
    return None


def warmup() -> None:
    """Compile (or load from the cache) the fp32 and fp64 variants."""
    for dtype in (torch.float32, torch.float64):
        cloud = torch.rand(1, 200, 3, dtype=dtype)
        knn(cloud, cloud, 4, None, None, 2, "exact", True, torch.int64)
        cloud[0, 0, 0] = float("nan")
        knn(cloud[:, :4], cloud, 4, None, None, 2, "exact", True, torch.int64)
