"""Shared parts of the numba back ends: cached compilation, a fork-safe thread helper, and a bucketed kd-tree build."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numba
import numpy as np
import torch

from peft_suite.kernels.cpu.numba_vector import ranks

__all__ = ["LEAF", "SUPER", "Tree", "build_tree", "jit", "lengths_array", "parallel_for", "points_array"]

LEAF = 16  # points in a leaf of the search tree: one 512-bit or two 256-bit vectors of fp32
SUPER = 16  # leaves under one box of the upper level
_LOW = np.int64(0xFFFFFFFF)


def jit(function: Callable[..., Any]) -> Any:
    """Compile without the interpreter lock, without fast-math (no contraction, no re-association), cached on disk.

    The compiled code is kept next to the source or, where that is read-only, in the user's cache folder; where
    neither can be written the function compiles anew in every process.
    """
    try:
        return numba.njit(nogil=True, cache=True, boundscheck=False)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return numba.njit(nogil=True, boundscheck=False)(function)


# ----------------------------------------------------------------------------------------------------------------------
# threads

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """Threads do not survive a fork: the child starts without a pool and with a lock nobody holds."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _submit(function: Callable[[], None], helpers: int) -> list[Future[None]]:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = ThreadPoolExecutor(helpers, thread_name_prefix="peft_suite_kernels"), helpers
        return [_pool.submit(function) for _ in range(helpers)]


def parallel_for(function: Callable[[int], Any], items: int) -> None:
    """Call function(0) ... function(items - 1) on at most `torch.get_num_threads()` threads, the caller among them.

    Plain Python threads around compiled code that holds no interpreter lock. Unlike numba's own threading layers this
    may be entered from several Python threads at once and after a fork (data-loader workers), and it follows
    `torch.set_num_threads`, which loaders set to 1 in their workers.
    """
    threads = min(torch.get_num_threads(), items)
    if threads <= 1:
        for item in range(items):
            function(item)
        return
    counter = count()

    def work() -> None:
        while (item := next(counter)) < items:
            function(item)

    helpers = _submit(work, threads - 1)
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


# ----------------------------------------------------------------------------------------------------------------------
# arrays


def points_array(points: torch.Tensor) -> np.ndarray[Any, Any]:
    """(B, N, D <= 3) of any float type -> C-contiguous (B, N, 3) array of fp32 (fp64 stays), missing axes zero.

    A zero third coordinate leaves `((dx*dx + dy*dy) + dz*dz)` bit-equal to the shorter sum.
    """
    points = points.detach()
    if points.dtype not in (torch.float32, torch.float64):
        points = points.to(torch.float32)
    if points.shape[-1] < 3:
        points = torch.nn.functional.pad(points, (0, 3 - points.shape[-1]))
    array: np.ndarray[Any, Any] = points.contiguous().numpy()
    return array


def lengths_array(lengths: torch.Tensor | None, batch: int, full: int) -> np.ndarray[Any, Any]:
    """(B,) int64; a missing tensor means that every cloud is full."""
    if lengths is None:
        return np.full(batch, full, np.int64)
    array: np.ndarray[Any, Any] = np.minimum(lengths.detach().to(torch.int64).contiguous().numpy(), full)
    return array


# ----------------------------------------------------------------------------------------------------------------------
# tree


@dataclass(frozen=True)
class Tree:
    """Flat bucketed kd-tree of B clouds: full leaves of `leaf` points in depth-first order, two levels of boxes.

    Slots past the last point hold +inf coordinates and index 2^31 - 1; boxes past the last leaf are +inf.
    """

    points: np.ndarray[Any, Any]  # (B, L, 3, leaf)
    index: np.ndarray[Any, Any]  # (B, L, leaf) int32: place in the cloud
    box: np.ndarray[Any, Any]  # (B, L / SUPER, 6, SUPER): lower corner x y z, upper corner x y z
    upper: np.ndarray[Any, Any]  # (B, ceil(L / SUPER / 16), 6, 16) boxes of SUPER leaves each
    finite: np.ndarray[Any, Any]  # (B,) int64: points in the tree
    other: np.ndarray[Any, Any]  # (B, N) int32: ascending indices of the points left out, from the front
    others: np.ndarray[Any, Any]  # (B,) int64: how many were left out


@jit
def _sort_few(keys, low, high, line, rank):  # type: ignore[no-untyped-def]
    """Sort keys[low:high], at most 64 distinct int64, by counting the smaller ones of each."""
    size = high - low
    rows = (size + 15) // 16
    for i in range(size):
        line[i] = keys[low + i]
    for i in range(size, rows * 16):
        line[i] = 0x7FFFFFFFFFFFFFFF
    ranks(line, rank, rows)
    part = keys[low:high]
    for i in range(size):
        part[np.uint32(rank[i])] = line[i]


@jit
def _select(keys, low, high, place, line, rank):  # type: ignore[no-untyped-def]
    """Partition keys[low:high] (distinct int64) so that the smaller ones come before `place`; line, rank: 64 places."""
    while high - low > 64:
        size = high - low
        step = size // 32
        for s in range(32):
            line[s] = keys[low + s * step]
        ranks(line, rank, 2)
        # aim a little past the wanted place, so that it falls into the smaller part
        where = (place - low) * 32 // size
        where = where + 1 if where < 15 else (where - 1 if where > 16 else where)
        where = min(max(where, 1), 31)
        pivot = line[0]
        for s in range(32):
            if rank[s] == where:
                pivot = line[s]
        part = keys[low:high]
        bound = np.uint64(0)
        for i in range(size):
            value = part[i]
            part[i] = part[bound]
            part[bound] = value
            bound += np.uint64(value < pivot)
        middle = low + np.int64(bound)
        if place < middle:
            high = middle
        else:
            low = middle
    _sort_few(keys, low, high, line, rank)


@jit
def _build(cloud, bits, skip, count, leaf, points, index, box, upper, other):  # type: ignore[no-untyped-def]
    """One cloud: cloud (N, 3), bits (N, 3) its fp32 form as int32, skip (N,) or empty -> points (kept, left out)."""
    keys = np.empty(count, np.int64)
    kept = 0
    left = 0
    for i in range(count):
        total = cloud[i, 0] - cloud[i, 0] + (cloud[i, 1] - cloud[i, 1]) + (cloud[i, 2] - cloud[i, 2])
        good = total == 0.0
        if skip.size > 0 and skip[i]:
            good = False
        if good:
            keys[kept] = i
            kept += 1
        else:
            other[left] = i
            left += 1
    line = np.empty(64, np.int64)
    rank = np.empty(64, np.int32)
    leaves = (kept + leaf - 1) // leaf
    stack = np.empty((64, 2), np.int64)  # segments in leaves; the smaller half is done first, so 64 is plenty
    depth = 0
    if leaves > 1:
        stack[0, 0] = 0
        stack[0, 1] = leaves
        depth = 1
    while depth > 0:
        depth -= 1
        first = stack[depth, 0]
        last = stack[depth, 1]
        while last - first > 1:
            low = first * leaf
            high = min(last * leaf, kept)
            step = max((high - low) // 32, 1)
            axis = 0
            widest = -1.0
            for a in range(3):
                least = np.inf
                most = -np.inf
                for i in range(low, high, step):
                    value = float(cloud[keys[i] & _LOW, a])
                    least = min(least, value)
                    most = max(most, value)
                if most - least > widest:
                    widest = most - least
                    axis = a
            for i in range(low, high):
                place = keys[i] & _LOW
                word = bits[place, axis]
                word ^= (word >> np.int32(31)) & np.int32(0x7FFFFFFF)
                keys[i] = (np.int64(word) << np.int64(32)) | place
            span = last - first
            half = span // 2
            if span > SUPER:
                half = max((half + SUPER // 2) // SUPER * SUPER, SUPER)
            _select(keys, low, high, (first + half) * leaf, line, rank)
            # go on with the smaller part, keep the larger for later
            if half <= span - half:
                stack[depth, 0] = first + half
                stack[depth, 1] = last
                last = first + half
            else:
                stack[depth, 0] = first
                stack[depth, 1] = first + half
                first = first + half
            depth += 1
    for j in range(leaves):
        x0 = y0 = z0 = cloud.dtype.type(np.inf)
        x1 = y1 = z1 = cloud.dtype.type(-np.inf)
        here = min(leaf, kept - j * leaf)
        for i in range(here):
            place = keys[j * leaf + i] & _LOW
            x = cloud[place, 0]
            y = cloud[place, 1]
            z = cloud[place, 2]
            points[j, 0, i] = x
            points[j, 1, i] = y
            points[j, 2, i] = z
            index[j, i] = place
            x0 = min(x0, x)
            y0 = min(y0, y)
            z0 = min(z0, z)
            x1 = max(x1, x)
            y1 = max(y1, y)
            z1 = max(z1, z)
        for i in range(here, leaf):
            points[j, 0, i] = np.inf
            points[j, 1, i] = np.inf
            points[j, 2, i] = np.inf
            index[j, i] = 0x7FFFFFFF
        row = box[j // SUPER]
        lane = j % SUPER
        row[0, lane] = x0
        row[1, lane] = y0
        row[2, lane] = z0
        row[3, lane] = x1
        row[4, lane] = y1
        row[5, lane] = z1
    rows = (leaves + SUPER - 1) // SUPER
    for j in range(leaves, rows * SUPER):
        for a in range(6):
            box[j // SUPER, a, j % SUPER] = np.inf
    for r in range(rows):
        here = min(SUPER, leaves - r * SUPER)
        for a in range(3):
            least = box[r, a, 0]
            most = box[r, a + 3, 0]
            for i in range(1, here):
                least = min(least, box[r, a, i])
                most = max(most, box[r, a + 3, i])
            upper[r // 16, a, r % 16] = least
            upper[r // 16, a + 3, r % 16] = most
    for r in range(rows, (rows + 15) // 16 * 16):
        for a in range(6):
            upper[r // 16, a, r % 16] = np.inf
    return kept, left


_NONE = np.empty(0, np.bool_)


def build_tree(
    cloud: np.ndarray[Any, Any],
    lengths: np.ndarray[Any, Any],
    leaf: int = LEAF,
    skip: np.ndarray[Any, Any] | None = None,
) -> Tree:
    """Trees of cloud (B, N, 3) over the first lengths[b] points, without non-finite ones and without skip (B, N).

    Splits the widest axis by partial selection at a multiple of the leaf size, so that all leaves but the last are
    full: O(N log N) time, 4-byte coordinates as keys whatever the type of the points (boxes are exact).
    """
    batch, size, _ = cloud.shape
    leaves = max((size + leaf - 1) // leaf, 1)
    rows = (leaves + SUPER - 1) // SUPER
    tree = Tree(
        np.empty((batch, leaves, 3, leaf), cloud.dtype),
        np.empty((batch, leaves, leaf), np.int32),
        np.empty((batch, rows, 6, SUPER), cloud.dtype),
        np.empty((batch, (rows + 15) // 16, 6, 16), cloud.dtype),
        np.zeros(batch, np.int64),
        np.empty((batch, size), np.int32),
        np.zeros(batch, np.int64),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        bits = cloud.astype(np.float32, copy=False).view(np.int32)

    def one(b: int) -> None:
        tree.finite[b], tree.others[b] = _build(
            cloud[b],
            bits[b],
            _NONE if skip is None else skip[b],
            lengths[b],
            leaf,
            tree.points[b],
            tree.index[b],
            tree.box[b],
            tree.upper[b],
            tree.other[b],
        )

    parallel_for(one, batch)
    return tree
