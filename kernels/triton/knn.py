"""k nearest neighbours for D <= 8: exact, ties by lower index, no (Q, N) matrix in memory.

A candidate is a pair (bits of its squared distance as int32, index): bits of a non-negative float order like the float,
so the pair orders by (distance, index). NaN distances become +inf; a candidate that does not exist has the largest
int32 in both places and so sorts after a real one at +inf.

Two selections:

- ``tile``: all N candidates of a row in registers, k times the smallest one is taken out. For small N.
- ``groups``: points n are dealt to S groups (n mod S) of which each keeps its four smallest candidates. A candidate not
  kept is larger than the fourth of its group, so everything up to the smallest such fourth (the bound) is certain.
  Candidates are taken out in ascending order up to the bound; a row that still lacks some scans its points again, for
  those beyond the last one taken. One scan is nearly always enough: the chance of a second is about
  S * P[Poisson(k / S) >= 4], and each scan settles at least four.

With few rows the points are split over several programs, whose sorted lists ``tile`` merges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, ceil_div, launch_guard, next_power_of_2, signature

__all__ = ["compile_cases", "knn", "knn_cannot", "knn_pass"]

NONE = tl.constexpr(2**31 - 1)
MAX_DIM = 8
TILE_LIMIT = 2048
SOA_FROM = 8192
ENOUGH_PROGRAMS = 132 * 8


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(q_ptr, row, live, D: tl.constexpr):  # type: ignore[no-untyped-def]
    # -> D tensors (BQ,)
    q0 = tl.load(q_ptr + row * D, mask=live, other=0.0).to(tl.float32)
    q1 = q0
    q2 = q0
    q3 = q0
    q4 = q0
    q5 = q0
    q6 = q0
    q7 = q0
    if D > 1:
        q1 = tl.load(q_ptr + row * D + 1, mask=live, other=0.0).to(tl.float32)
    if D > 2:
        q2 = tl.load(q_ptr + row * D + 2, mask=live, other=0.0).to(tl.float32)
    if D > 3:
        q3 = tl.load(q_ptr + row * D + 3, mask=live, other=0.0).to(tl.float32)
    if D > 4:
        q4 = tl.load(q_ptr + row * D + 4, mask=live, other=0.0).to(tl.float32)
    if D > 5:
        q5 = tl.load(q_ptr + row * D + 5, mask=live, other=0.0).to(tl.float32)
    if D > 6:
        q6 = tl.load(q_ptr + row * D + 6, mask=live, other=0.0).to(tl.float32)
    if D > 7:
        q7 = tl.load(q_ptr + row * D + 7, mask=live, other=0.0).to(tl.float32)
    return q0, q1, q2, q3, q4, q5, q6, q7


@triton.jit  # type: ignore[untyped-decorator]
def _squared(q, p_ptr, offset, inside):  # type: ignore[no-untyped-def]
    # q: (BQ,), offset and inside: (S,) -> (BQ, S)
    p = tl.load(p_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    diff = q[:, None] - p[None, :]
    return diff * diff


@triton.jit  # type: ignore[untyped-decorator]
def squared_distance(q0, q1, q2, q3, q4, q5, q6, q7, p_ptr, step, offset, inside, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_c (q_c − p_c)², summed in coordinate order; coordinate c of a point lies c·step after its offset. (BQ, S)"""
    total = _squared(q0, p_ptr, offset, inside)
    if D > 1:
        total += _squared(q1, p_ptr + step, offset, inside)
    if D > 2:
        total += _squared(q2, p_ptr + 2 * step, offset, inside)
    if D > 3:
        total += _squared(q3, p_ptr + 3 * step, offset, inside)
    if D > 4:
        total += _squared(q4, p_ptr + 4 * step, offset, inside)
    if D > 5:
        total += _squared(q5, p_ptr + 5 * step, offset, inside)
    if D > 6:
        total += _squared(q6, p_ptr + 6 * step, offset, inside)
    if D > 7:
        total += _squared(q7, p_ptr + 7 * step, offset, inside)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _order_bits(dist):  # type: ignore[no-untyped-def]
    dist = tl.where(dist == dist, dist, float("inf"))
    return dist.to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _store_slot(dist_ptr, idx_ptr, offset, value, index, mask):  # type: ignore[no-untyped-def]
    # value and index: (BQ,) pairs; a pair that does not exist is written as (+inf, -1)
    real = value != NONE
    dist = tl.where(real, value.to(tl.float32, bitcast=True), float("inf"))
    tl.store(dist_ptr + offset, dist, mask=mask)
    tl.store(idx_ptr + offset, tl.where(real, index, -1).to(idx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["Q", "N", "k", "blocks"])  # type: ignore[untyped-decorator]
def _tile_kernel(  # type: ignore[no-untyped-def]
    q_ptr, p_ptr, lq_ptr, lp_ptr, dist_ptr, idx_ptr, Q, N, k, blocks,
    D: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # q: (B, Q, D), p: (B, N, D) -> dist, idx: (B, Q, k)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    first = (pid % blocks) * BQ
    row = tl.arange(0, BQ)
    n = tl.arange(0, BN)
    exists = first + row < Q
    live = exists
    if lq_ptr is not None:
        live = live & (first + row < tl.load(lq_ptr + b).to(tl.int32))
    inside = n < N
    if lp_ptr is not None:
        inside = inside & (n < tl.load(lp_ptr + b).to(tl.int32))
    base = b * Q + first
    q0, q1, q2, q3, q4, q5, q6, q7 = load_rows(q_ptr + base * D, row, live, D)
    dist = squared_distance(q0, q1, q2, q3, q4, q5, q6, q7, p_ptr + b * N * D, 1, n * D, inside, D)
    value = tl.where(live[:, None] & inside[None, :], _order_bits(dist), NONE)  # [BQ, BN]
    offset = (base + row) * k
    for j in range(0, k):
        best = tl.min(value, axis=1)
        index = tl.min(tl.where(value == best[:, None], n[None, :], NONE), axis=1)
        _store_slot(dist_ptr, idx_ptr, offset + j, best, index, exists)
        value = tl.where(n[None, :] == index[:, None], NONE, value)


@triton.jit(do_not_specialize=["rows", "length", "k"])  # type: ignore[untyped-decorator]
def _merge_kernel(list_dist_ptr, list_idx_ptr, dist_ptr, idx_ptr, rows, length, k, BQ: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    # lists: (rows, length) -> dist, idx: (rows, k); a list entry with index -1 does not exist
    row = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    n = tl.arange(0, BN)
    exists = row < rows
    source = row[:, None] * length + n[None, :]
    mask = exists[:, None] & (n < length)[None, :]
    index = tl.load(list_idx_ptr + source, mask=mask, other=-1)
    bits = tl.load(list_dist_ptr + source, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    value = tl.where(index >= 0, bits, NONE)
    for j in range(0, k):
        best = tl.min(value, axis=1)
        chosen = tl.min(tl.where(value == best[:, None], index, NONE), axis=1)
        _store_slot(dist_ptr, idx_ptr, row * k + j, best, chosen, exists)
        value = tl.where(index == chosen[:, None], NONE, value)


@triton.jit(do_not_specialize=["Q", "N", "k", "blocks", "splits", "per_split"])  # type: ignore[untyped-decorator]
def _groups_kernel(  # type: ignore[no-untyped-def]
    q_ptr, p_ptr, lq_ptr, lp_ptr, dist_ptr, idx_ptr, Q, N, k, blocks, splits, per_split,
    D: tl.constexpr, SOA: tl.constexpr, BQ: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # q: (B, Q, D), p: (B, N, D) or (B, D, N) -> dist, idx: (B, Q, splits, k)
    # split i sees the per_split points from i * per_split
    pid = tl.program_id(0)
    split = pid % splits
    block = pid // splits
    b = (block // blocks).to(tl.int64)
    first = (block % blocks) * BQ
    row = tl.arange(0, BQ)
    lane = tl.arange(0, S)
    exists = first + row < Q
    live = exists
    if lq_ptr is not None:
        live = live & (first + row < tl.load(lq_ptr + b).to(tl.int32))
    end = N
    if lp_ptr is not None:
        end = tl.minimum(tl.load(lp_ptr + b).to(tl.int32), N)
    begin = split * per_split
    end = tl.minimum(end, begin + per_split)
    base = b * Q + first
    q0, q1, q2, q3, q4, q5, q6, q7 = load_rows(q_ptr + base * D, row, live, D)
    cloud = p_ptr + b * N * D
    offset = ((base + row) * splits + split) * k

    none = tl.full([BQ, S], NONE, tl.int32)
    done = tl.where(exists, 0, k)
    last_v = tl.full([BQ], -1, tl.int32)
    last_i = tl.full([BQ], -1, tl.int32)
    scan = 0
    while tl.min(done, axis=0) < k:
        v0 = none
        v1 = none
        v2 = none
        v3 = none
        i0 = none
        i1 = none
        i2 = none
        i3 = none
        for start in range(begin, end, S):
            n = start + lane
            inside = n < end
            if SOA:
                tile = cloud + tl.cast(start, tl.int64)
                dist = squared_distance(q0, q1, q2, q3, q4, q5, q6, q7, tile, tl.cast(N, tl.int64), lane, inside, D)
            else:
                tile = cloud + tl.cast(start, tl.int64) * D
                dist = squared_distance(q0, q1, q2, q3, q4, q5, q6, q7, tile, 1, lane * D, inside, D)
            value = tl.where(live[:, None] & inside[None, :], _order_bits(dist), NONE)
            index = tl.broadcast_to(n[None, :], [BQ, S])
            if scan > 0:
                beyond = (value > last_v[:, None]) | ((value == last_v[:, None]) & (index > last_i[:, None]))
                value = tl.where(beyond, value, NONE)
            # strict: of equal distances in a group the lower index, seen first, stays in front
            c0 = value < v0
            c1 = value < v1
            c2 = value < v2
            c3 = value < v3
            v3 = tl.where(c3, tl.where(c2, v2, value), v3)
            i3 = tl.where(c3, tl.where(c2, i2, index), i3)
            v2 = tl.where(c2, tl.where(c1, v1, value), v2)
            i2 = tl.where(c2, tl.where(c1, i1, index), i2)
            v1 = tl.where(c1, tl.where(c0, v0, value), v1)
            i1 = tl.where(c1, tl.where(c0, i0, index), i1)
            v0 = tl.where(c0, value, v0)
            i0 = tl.where(c0, index, i0)
        bound_v = tl.min(v3, axis=1)
        bound_i = tl.min(tl.where(v3 == bound_v[:, None], i3, NONE), axis=1)
        more = 1
        while more > 0:
            best = tl.min(v0, axis=1)
            chosen = tl.min(tl.where(v0 == best[:, None], i0, NONE), axis=1)
            certain = (best < bound_v) | ((best == bound_v) & (chosen <= bound_i))
            take = certain & (done < k)
            _store_slot(dist_ptr, idx_ptr, offset + done, best, chosen, take)
            last_v = tl.where(take, best, last_v)
            last_i = tl.where(take, chosen, last_i)
            done = tl.where(take, done + 1, done)
            pop = take[:, None] & (i0 == chosen[:, None])
            v0 = tl.where(pop, v1, v0)
            i0 = tl.where(pop, i1, i0)
            v1 = tl.where(pop, v2, v1)
            i1 = tl.where(pop, i2, i1)
            v2 = tl.where(pop, v3, v2)
            i2 = tl.where(pop, i3, i2)
            v3 = tl.where(pop, NONE, v3)
            i3 = tl.where(pop, NONE, i3)
            more = tl.max((take & (done < k)).to(tl.int32), axis=0)
        scan += 1


def run_tile(
    query: Tensor, points: Tensor, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    index_dtype: torch.dtype, *, block_q: int, num_warps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``tile`` selection; query (B, Q, D), points (B, N, D), contiguous."""
    (B, Q, D), N = query.shape, points.shape[1]
    dists = torch.empty(B, Q, k, device=query.device, dtype=torch.float32)
    idx = torch.empty(B, Q, k, device=query.device, dtype=index_dtype)
    blocks = ceil_div(Q, block_q)
    with launch_guard(query):
        _tile_kernel[(B * blocks,)](
            query, points, lengths_q, lengths_p, dists, idx, Q, N, k, blocks,
            D=D, BQ=block_q, BN=next_power_of_2(N), num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return dists, idx


def run_groups(
    query: Tensor, points: Tensor, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    index_dtype: torch.dtype, *, block_q: int, groups: int, num_warps: int, splits: int = 1, soa: bool = False,
    merge_q: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``groups`` selection, over ``splits`` parts of the points; arguments as in :func:`run_tile`."""
    (B, Q, D), N = query.shape, points.shape[1]
    if soa:
        points = points.transpose(1, 2).contiguous()
    blocks = ceil_div(Q, block_q)
    part_dtype = index_dtype if splits == 1 else torch.int32
    part_dists = torch.empty(B, Q, splits * k, device=query.device, dtype=torch.float32)
    part_idx = torch.empty(B, Q, splits * k, device=query.device, dtype=part_dtype)
    with launch_guard(query):
        _groups_kernel[(B * blocks * splits,)](
            query, points, lengths_q, lengths_p, part_dists, part_idx, Q, N, k, blocks, splits, ceil_div(N, splits),
            D=D, SOA=soa, BQ=block_q, S=groups, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        if splits == 1:
            return part_dists, part_idx
        dists = torch.empty(B, Q, k, device=query.device, dtype=torch.float32)
        idx = torch.empty(B, Q, k, device=query.device, dtype=index_dtype)
        width = next_power_of_2(splits * k)
        _merge_kernel[(ceil_div(B * Q, merge_q),)](
            part_dists, part_idx, dists, idx, B * Q, splits * k, k,
            BQ=merge_q, BN=width, num_warps=1 if width <= 1024 else 2, enable_fp_fusion=False,
        )  # fmt: skip
    return dists, idx


class Plan(NamedTuple):
    """What runs: ``groups`` is 0 for the ``tile`` selection."""

    block_q: int
    groups: int
    num_warps: int
    splits: int = 1


def plan(B: int, Q: int, N: int, k: int) -> Plan:
    """The selection and its block sizes by problem size."""
    # Estimates from instruction counts, not measurements. One warp a program where the row fits: then a reduction is
    # made of shuffles alone, without a barrier.
    if N <= 256 or (N <= TILE_LIMIT and k > 64):
        return Plan(block_q=2 if N <= 256 else 1, groups=0, num_warps=1 if N <= 1024 else 2)
    if k <= 16:
        block_q, groups, num_warps = 4, 64, 1
    elif k <= 32:
        block_q, groups, num_warps = 2, 128, 1
    elif k <= 64:
        block_q, groups, num_warps = 1, 256, 1
    else:
        block_q, groups, num_warps = 1, 512, 2
    splits = 1
    programs = B * ceil_div(Q, block_q)
    while 2 * splits * programs <= ENOUGH_PROGRAMS and N // (2 * splits) >= 1024 and 2 * splits * k <= TILE_LIMIT:
        splits *= 2
    return Plan(block_q, groups, num_warps, splits)


def knn_cannot(
    query: Tensor, points: Tensor, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    norm: int, precision: str, refine: bool, index_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why this back end cannot serve the call, or None."""
    if norm != 2:
        return "the Triton form computes squared Euclidean distances only (norm=2)"
    if query.shape[-1] > MAX_DIM:
        return f"the Triton form takes at most {MAX_DIM} coordinates, got {query.shape[-1]}"
    if torch.float64 in (query.dtype, points.dtype):
        return "the Triton form computes in float32, got float64"
    if max(query.shape[1], points.shape[1]) >= 2**30:
        return "the Triton form takes clouds of fewer than 2^30 points"
    return None


def knn_pass(
    query: Tensor, points: Tensor, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    norm: int, precision: str, refine: bool, index_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why another back end is expected to be faster, or None."""
    # An estimate: the neighbours of a row are taken one after the other, so time grows with k where a sort's does not.
    if k > 128:
        return "more than 128 neighbours: a sort is expected to be faster"
    return None


def knn(
    query: Tensor, points: Tensor, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    norm: int, precision: str, refine: bool, index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k nearest points of every query, ascending by (squared distance, index).

    Args:
        query: (B, Q, D), D <= 8.
        points: (B, N, D).
        lengths_q: (B,) int64; rows beyond are padding.
        lengths_p: (B,) int64; points beyond do not exist.

    Returns:
        Squared distances (B, Q, k) float32 and indices (B, Q, k); slots that do not exist hold +inf and -1.
    """
    query, points = query.contiguous(), points.contiguous()
    lengths_q = None if lengths_q is None else lengths_q.contiguous()
    lengths_p = None if lengths_p is None else lengths_p.contiguous()
    N = points.shape[1]
    chosen = plan(query.shape[0], query.shape[1], N, k)
    if chosen.groups == 0:
        return run_tile(
            query, points, k, lengths_q, lengths_p, index_dtype,
            block_q=chosen.block_q, num_warps=chosen.num_warps,
        )  # fmt: skip
    return run_groups(
        query, points, k, lengths_q, lengths_p, index_dtype, block_q=chosen.block_q, groups=chosen.groups,
        num_warps=chosen.num_warps, splits=chosen.splits, soa=N >= SOA_FROM,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The configurations :func:`plan` chooses, and the extreme coordinate counts."""
    types = {"q_ptr": "*fp32", "p_ptr": "*fp32", "dist_ptr": "*fp32", "idx_ptr": "*i64"}
    ragged = {"lq_ptr": "*i64", "lp_ptr": "*i64"}

    def case(name: str, kernel: Any, num_warps: int, constexprs: dict[str, Any], **more: str) -> CompileCase:
        options = {"enable_fp_fusion": False}
        return CompileCase(name, kernel, signature(kernel, constexprs, **types, **more), constexprs, num_warps, options)

    whole: dict[str, Any] = {"lq_ptr": None, "lp_ptr": None}
    cases = [
        case("knn-tile-256", _tile_kernel, 1, {**whole, "D": 3, "BQ": 2, "BN": 256}),
        case("knn-tile-1024", _tile_kernel, 1, {**whole, "D": 3, "BQ": 1, "BN": 1024}),
        case("knn-tile-2048", _tile_kernel, 2, {**whole, "D": 3, "BQ": 1, "BN": 2048}),
        case("knn-tile-2048-lengths", _tile_kernel, 2, {"D": 3, "BQ": 1, "BN": 2048}, **ragged),
    ]
    for k, block_q, groups, warps in ((16, 4, 64, 1), (32, 2, 128, 1), (64, 1, 256, 1), (128, 1, 512, 2)):
        for soa in (False, True):
            sizes = {"D": 3, "SOA": soa, "BQ": block_q, "S": groups}
            name = f"knn-groups-k{k}-{'soa' if soa else 'aos'}"
            cases.append(case(name, _groups_kernel, warps, {**whole, **sizes}))
    for d in (1, 8):
        sizes = {"D": d, "SOA": False, "BQ": 2, "S": 128}
        cases.append(case(f"knn-groups-d{d}-lengths", _groups_kernel, 1, sizes, **ragged))
    for width, warps in ((512, 1), (1024, 1), (2048, 2)):
        sizes = {"BQ": 1, "BN": width}
        more = {"list_dist_ptr": "*fp32", "list_idx_ptr": "*i32", "rows": "i64"}
        cases.append(case(f"knn-merge-{width}", _merge_kernel, warps, sizes, **more))
    return cases
