"""Exact farthest point sampling over a bucketed kd-tree: only buckets that the new pick can change are touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peft_suite.kernels.cpu.numba_common import SUPER, build_tree, jit, lengths_array, parallel_for, points_array
from peft_suite.kernels.cpu.numba_vector import box_near, equal_bits, greatest, leaf_shrink, lowest_bit, lowest_key

__all__ = ["farthest_point_sampling", "farthest_point_sampling_cannot", "farthest_point_sampling_pass", "warmup"]


@jit
def _reverse(word, bits):  # type: ignore[no-untyped-def]
    """The lowest `bits` bits of a word in reverse order."""
    out = 0
    for _ in range(bits):
        out = (out << 1) | (word & 1)
        word >>= 1
    return out


@jit
def _reversed_keys(index, keys, bits, depth):  # type: ignore[no-untyped-def]
    """keys = bit_reverse(i mod 2^bits) * depth + i div 2^bits for every i in index (flat arrays)."""
    table = np.empty(1 << bits, np.int64)
    for i in range(1 << bits):
        table[i] = _reverse(i, bits) * depth
    for i in range(index.size):
        place = index[i]
        keys[i] = table[place & ((1 << bits) - 1)] + (place >> bits)


@jit
def _sample(points, keys, box, upper, kept, cloud, start, first, bits, depth, out):  # type: ignore[no-untyped-def]
    """Picks of one cloud into out (m,); points (L, 3, W), keys (L, W) int32 order ties, bits < 0: key = index."""
    size = points.shape[2]
    rows = size // 16
    leaves = (kept + size - 1) // size
    groups = (leaves + SUPER - 1) // SUPER
    uppers = (groups + 15) // 16
    kind = points.dtype.type
    dist = np.empty(leaves * size, points.dtype)
    for i in range(kept):
        dist[i] = first
    for i in range(kept, leaves * size):
        dist[i] = -1.0
    far = np.empty(groups * SUPER, points.dtype)
    for j in range(groups * SUPER):
        far[j] = first if j < leaves else kind(-1.0)
    far_upper = np.empty(uppers * 16, points.dtype)
    for r in range(uppers * 16):
        far_upper[r] = first if r < groups else kind(-1.0)
    flat_keys = keys.reshape(-1)
    pick = start
    for step in range(out.size):
        out[step] = pick
        if step + 1 == out.size:
            break
        if kept == 0:
            pick = 0
            continue
        x = cloud[pick, 0]
        y = cloud[pick, 1]
        z = cloud[pick, 2]
        if (x - x) + (y - y) + (z - z) == 0.0:
            if leaves == 1:
                far_upper[0] = leaf_shrink(points, 0, rows, x, y, z, dist)
                far[0] = far_upper[0]
            else:
                for u in range(uppers):
                    above = box_near(upper, u, x, y, z, far_upper, u * 16)
                    while above != 0:
                        r = u * 16 + lowest_bit(above)
                        above &= above - np.uint64(1)
                        bits_here = box_near(box, r, x, y, z, far, r * SUPER)
                        if bits_here != 0:
                            while bits_here != 0:
                                j = r * SUPER + lowest_bit(bits_here)
                                bits_here &= bits_here - np.uint64(1)
                                far[j] = leaf_shrink(points, j, rows, x, y, z, dist)
                            far_upper[r] = greatest(far, r * SUPER, 1)
        best = greatest(far_upper, 0, uppers)
        key = np.int32(0x7FFFFFFF)
        for u in range(uppers):
            above = equal_bits(far_upper, u * 16, best)
            while above != 0:
                r = u * 16 + lowest_bit(above)
                above &= above - np.uint64(1)
                bits_here = equal_bits(far, r * SUPER, best)
                while bits_here != 0:
                    j = r * SUPER + lowest_bit(bits_here)
                    bits_here &= bits_here - np.uint64(1)
                    key = min(key, lowest_key(dist, flat_keys, j * size, rows, best))
        pick = np.int64(key)
        if bits >= 0:
            pick = _reverse(pick // depth, bits) + ((pick % depth) << bits)


def _leaf(size: int, picks: int) -> int:
    """Points in a bucket, a multiple of 16; one bucket is brute force."""
    if size <= 1024 or picks <= 96:
        return (size + 15) // 16 * 16
    return 256 if size <= 16384 else 128


def farthest_point_sampling(
    points: torch.Tensor,
    m: int,
    start: torch.Tensor,
    lengths: torch.Tensor | None,
    rule: str,
    index_dtype: torch.dtype,
) -> torch.Tensor:
    """Indices (B, m) of exact farthest point sampling of points (B, N, D), the first pick being start (B,).

    A bucket whose box is at least as far from the new pick as the largest distance left in it cannot change.
    rule "standard": ties by lowest index; "pointnet2": distances start at 1e10, points with |p|^2 <= 1e-3 are never
    picked, ties by bit-reversed index (pointnet2_ops).
    """
    batch, size, _ = points.shape
    cloud = points_array(points)
    counts = lengths_array(lengths, batch, size)
    skip = None
    first = cloud.dtype.type(np.inf)
    if rule == "pointnet2":
        first = cloud.dtype.type(1e10)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = cloud * cloud
            skip = ((squares[..., 0] + squares[..., 1]) + squares[..., 2]).astype(np.float64) <= 1e-3
    tree = build_tree(cloud, counts, _leaf(size, m), skip)
    starts = start.detach().to(torch.int64).contiguous().numpy()
    picks = torch.empty((batch, m), dtype=torch.int64)
    out = picks.numpy()

    def one(b: int) -> None:
        keys, bits, depth = tree.index[b], -1, 1
        if rule == "pointnet2" and counts[b] > 0:
            bits = min(int(counts[b]).bit_length() - 1, 9)
            depth = (int(counts[b]) + (1 << bits) - 1) >> bits
            keys = np.empty_like(keys)
            kept = int(tree.finite[b])
            _reversed_keys(tree.index[b].reshape(-1)[:kept], keys.reshape(-1)[:kept], bits, depth)
        _sample(
            tree.points[b],
            keys,
            tree.box[b],
            tree.upper[b],
            tree.finite[b],
            cloud[b],
            starts[b],
            first,
            bits,
            depth,
            out[b],
        )

    parallel_for(one, batch)
    return picks.to(index_dtype)


def farthest_point_sampling_cannot(*args: Any) -> str | None:
    """Why this form cannot run the call, if it cannot."""
    dim = args[0].shape[-1]
    return f"the numba form knows at most 3 coordinates, the points have {dim}" if dim > 3 else None


def farthest_point_sampling_pass(*args: Any) -> str | None:
    """Why another form should run the call, if one is faster."""
    return None


def warmup() -> None:
    """Compile (or load from the cache) the fp32 and fp64 variants."""
    start = torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        for rule in ("standard", "pointnet2"):
            farthest_point_sampling(torch.rand(1, 100, 3, dtype=dtype), 2, start, None, rule, torch.int64)
