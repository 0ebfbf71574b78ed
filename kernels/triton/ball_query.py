"""Ball query for D <= 8: the first k points, in index order, with squared distance below radius²."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import CompileCase, ceil_div, launch_guard, signature
from peft_suite.kernels.triton.knn import MAX_DIM, load_rows, squared_distance

__all__ = ["ball_query", "ball_query_cannot", "compile_cases"]

NONE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["Q", "N", "k", "blocks"])  # type: ignore[untyped-decorator]
def _ball_kernel(  # type: ignore[no-untyped-def]
    q_ptr, p_ptr, lq_ptr, lp_ptr, idx_ptr, radius2, Q, N, k, blocks,
    D: tl.constexpr, REPEAT_FIRST: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # q: (B, Q, D), p: (B, N, D) -> idx: (B, Q, k)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    first = (pid % blocks) * BQ
    row = tl.arange(0, BQ)
    lane = tl.arange(0, BN)
    exists = first + row < Q
    live = exists
    if lq_ptr is not None:
        live = live & (first + row < tl.load(lq_ptr + b).to(tl.int32))
    end = N
    if lp_ptr is not None:
        end = tl.minimum(tl.load(lp_ptr + b).to(tl.int32), N)
    base = b * Q + first
    q0, q1, q2, q3, q4, q5, q6, q7 = load_rows(q_ptr + base * D, row, live, D)
    cloud = p_ptr + b * N * D
    out = idx_ptr + (base + row) * k

    count = tl.zeros([BQ], tl.int32)
    first_hit = tl.full([BQ], NONE, tl.int32)
    wanted = tl.where(live, k, 0)
    start = end * 0
    while (start < end) & (tl.max(wanted - count, axis=0) > 0):
        n = start + lane
        inside = n < end
        tile = cloud + tl.cast(start, tl.int64) * D
        dist = squared_distance(q0, q1, q2, q3, q4, q5, q6, q7, tile, 1, lane * D, inside, D)
        # a NaN distance is not below anything
        hit = (dist < radius2) & live[:, None] & inside[None, :]  # [BQ, BN]
        hits = hit.to(tl.int32)
        found = tl.sum(hits, axis=1)
        if tl.max(found, axis=0) > 0:
            slot = count[:, None] + tl.cumsum(hits, axis=1) - 1
            index = tl.broadcast_to(n[None, :], [BQ, BN])
            tl.store(out[:, None] + slot, index.to(idx_ptr.dtype.element_ty), mask=hit & (slot < k))
            first_hit = tl.minimum(first_hit, tl.min(tl.where(hit, index, NONE), axis=1))
            count += found
        start += BN
    filler = tl.where(first_hit == NONE, 0, first_hit) if REPEAT_FIRST else tl.full([BQ], -1, tl.int32)
    for begin in range(0, k, BK):
        slot = begin + tl.arange(0, BK)
        missing = exists[:, None] & (slot[None, :] >= count[:, None]) & (slot < k)[None, :]
        fill = tl.broadcast_to(filler[:, None], [BQ, BK])
        tl.store(out[:, None] + slot[None, :], fill.to(idx_ptr.dtype.element_ty), mask=missing)


def run(
    query: Tensor, points: Tensor, radius: float, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    pad: str, index_dtype: torch.dtype, *, block_q: int, tile: int, num_warps: int,
) -> Tensor:  # fmt: skip
    """The launch; query (B, Q, D), points (B, N, D), contiguous."""
    (B, Q, D), N = query.shape, points.shape[1]
    idx = torch.empty(B, Q, k, device=query.device, dtype=index_dtype)
    blocks = ceil_div(Q, block_q)
    # both the radius and its square are rounded to float32, as the reference kernels do
    radius2 = float(torch.tensor(radius, dtype=torch.float32, device="cpu").square())
    with launch_guard(query):
        _ball_kernel[(B * blocks,)](
            query, points, lengths_q, lengths_p, idx, radius2, Q, N, k, blocks,
            D=D, REPEAT_FIRST=pad == "first", BQ=block_q, BN=tile, BK=32,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return idx


def ball_query_cannot(
    query: Tensor, points: Tensor, radius: float, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    pad: str, index_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why this back end cannot serve the call, or None."""
    if query.shape[-1] > MAX_DIM:
        return f"the Triton form takes at most {MAX_DIM} coordinates, got {query.shape[-1]}"
    if torch.float64 in (query.dtype, points.dtype):
        return "the Triton form computes in float32, got float64"
    if max(query.shape[1], points.shape[1]) >= 2**30:
        return "the Triton form takes clouds of fewer than 2^30 points"
    return None


def ball_query(
    query: Tensor, points: Tensor, radius: float, k: int, lengths_q: Tensor | None, lengths_p: Tensor | None,
    pad: str, index_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The first k points by index with d² < radius², strictly.

    Args:
        query: (B, Q, D), D <= 8.
        points: (B, N, D).
        pad: ``first`` repeats the first hit (0 without one), ``pytorch3d`` writes -1.

    Returns:
        Indices (B, Q, k).
    """
    # Estimate, not measured: one warp a program, so that neither the scan nor the sums need a barrier.
    return run(
        query.contiguous(), points.contiguous(), radius, k,
        None if lengths_q is None else lengths_q.contiguous(), None if lengths_p is None else lengths_p.contiguous(),
        pad, index_dtype, block_q=4, tile=128, num_warps=1,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Both paddings, with and without lengths."""
    types = {"q_ptr": "*fp32", "p_ptr": "*fp32", "idx_ptr": "*i64", "radius2": "fp32"}
    cases = []
    for repeat in (True, False):
        for ragged in (False, True):
            sizes: dict[str, Any] = {"D": 3, "REPEAT_FIRST": repeat, "BQ": 4, "BN": 128, "BK": 32}
            lengths: dict[str, str] = {"lq_ptr": "*i64", "lp_ptr": "*i64"} if ragged else {}
            if not ragged:
                sizes.update(lq_ptr=None, lp_ptr=None)
            name = f"ball-{'first' if repeat else 'pytorch3d'}{'-lengths' if ragged else ''}"
            described = signature(_ball_kernel, sizes, **types, **lengths)
            cases.append(CompileCase(name, _ball_kernel, described, sizes, 1, {"enable_fp_fusion": False}))
    return cases
