"""Farthest point sampling for up to three coordinates.

The kernels walk a cloud by *position*, an order in which the tie rule reads "the lowest position wins":

- ``standard``: position = index.
- ``pointnet2``: ties go to the smallest (bit reversal of n mod S, n div S), S = min(512, 2^floor(log2 N)). With
  R = ceil(N / S), position = reversal * R + n div S, so both directions are arithmetic.

Distances start at +inf (1e10 under ``pointnet2``); a point that can never be picked has -1, which no update changes.
A winner is found as the largest distance, compared by its bits as int32, then the lowest position that has it.

P and ``chunk`` are multiples of a tile, so they stay open to specialisation: known to divide by 16, loads are wide.

Four forms, the same picks:

- ``registers``: one program a cloud, all points in registers (N <= 8192).
- ``tiled``: one program a cloud, coordinates and distances in a scratch buffer, read tile by tile at every pick.
- ``steps``: one launch a pick, many programs a cloud. Every program finds the last pick again from the partial maxima
  which the launch before left, updates its points, and leaves its own. No program waits for another.
- ``spin``: one cooperative launch, many programs a cloud that meet at every pick in a counter of their own. It was
  never run on a GPU, so it is taken only when PEFT_SUITE_FPS_SPIN=1 asks for it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_suite.kernels.triton.common import (
    CompileCase,
    ceil_div,
    interpreted,
    launch_guard,
    next_power_of_2,
    signature,
)

__all__ = ["compile_cases", "farthest_point_sampling", "farthest_point_sampling_cannot"]

NONE = tl.constexpr(2**31 - 1)
REGISTER_LIMIT = 8192
STEPS_FROM = 65536
STEPS_FROM_IN_GRAPH = 16384
STEPS_CLOUDS = 16
MAX_PARTS = 1024  # partial maxima of a cloud: every program reads all of them at every pick
SPIN_SWITCH = "PEFT_SUITE_FPS_SPIN"
SPIN_PROGRAMS = 128
SPIN_CAP = 1 << 22


@triton.jit  # type: ignore[untyped-decorator]
def _stride_log2(n):  # type: ignore[no-untyped-def]
    # log2 S = min(9, floor(log2 n)), 0 for n < 2
    log2 = n * 0
    for i in tl.static_range(1, 10):
        log2 += (n >= (1 << i)).to(tl.int32)
    return log2


@triton.jit  # type: ignore[untyped-decorator]
def _reverse(x, bits):  # type: ignore[no-untyped-def]
    # the low ``bits`` (at most 9) bits of x in reverse order
    x = ((x & 0x5555) << 1) | ((x >> 1) & 0x5555)
    x = ((x & 0x3333) << 2) | ((x >> 2) & 0x3333)
    x = ((x & 0x0F0F) << 4) | ((x >> 4) & 0x0F0F)
    x = ((x & 0x00FF) << 8) | ((x >> 8) & 0x00FF)
    return x >> (16 - bits)


@triton.jit  # type: ignore[untyped-decorator]
def _index_at(pos, log2, rows, POINTNET2: tl.constexpr):  # type: ignore[no-untyped-def]
    if POINTNET2:
        return ((pos % rows) << log2) + _reverse(pos // rows, log2)
    else:
        return pos


@triton.jit  # type: ignore[untyped-decorator]
def _order(n, POINTNET2: tl.constexpr):  # type: ignore[no-untyped-def]
    # -> log2 S, R, number of positions
    log2 = n * 0
    rows = n
    if POINTNET2:
        log2 = _stride_log2(n)
        rows = tl.maximum((n + (1 << log2) - 1) >> log2, 1)
    return log2, rows, rows << log2


@triton.jit  # type: ignore[untyped-decorator]
def _start_state(p_ptr, pos, n, log2, rows, positions, POINTNET2: tl.constexpr):  # type: ignore[no-untyped-def]
    # -> x, y, z, first distance of the points at ``pos``
    index = _index_at(pos, log2, rows, POINTNET2)
    inside = (pos < positions) & (index < n)
    at = p_ptr + tl.where(inside, index, 0).to(tl.int64) * 3
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(at + 2, mask=inside, other=0.0).to(tl.float32)
    # a NaN or infinite coordinate is the only one that differs from itself times zero
    picked = inside & (x * 0.0 == 0.0) & (y * 0.0 == 0.0) & (z * 0.0 == 0.0)
    if POINTNET2:
        picked = picked & (((x * x + y * y) + z * z).to(tl.float64) > 1e-3)
        return x, y, z, tl.where(picked, 1e10, -1.0)
    else:
        return x, y, z, tl.where(picked, float("inf"), -1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _load_centre(p_ptr, index):  # type: ignore[no-untyped-def]
    at = p_ptr + tl.cast(index, tl.int64) * 3
    return tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32), tl.load(at + 2).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _squared(x, y, z, cx, cy, cz):  # type: ignore[no-untyped-def]
    dx = x - cx
    dy = y - cy
    dz = z - cz
    return (dx * dx + dy * dy) + dz * dz


@triton.jit  # type: ignore[untyped-decorator]
def _valid_count(len_ptr, b, N):  # type: ignore[no-untyped-def]
    n = N
    if len_ptr is not None:
        n = tl.minimum(tl.load(len_ptr + b).to(tl.int32), N)
    return n


@triton.jit(do_not_specialize=["N", "m"])  # type: ignore[untyped-decorator]
def _registers_kernel(  # type: ignore[no-untyped-def]
    p_ptr, start_ptr, len_ptr, idx_ptr, N, m, POINTNET2: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # p: (B, N, 3) -> idx: (B, m)
    b = tl.program_id(0).to(tl.int64)
    n = _valid_count(len_ptr, b, N)
    log2, rows, positions = _order(n, POINTNET2)
    pos = tl.arange(0, BN)
    cloud = p_ptr + b * N * 3
    x, y, z, dist = _start_state(cloud, pos, n, log2, rows, positions, POINTNET2)
    pick = tl.load(start_ptr + b).to(tl.int32)
    out = idx_ptr + b * m
    tl.store(out, pick.to(idx_ptr.dtype.element_ty))
    for j in range(1, m):
        cx, cy, cz = _load_centre(cloud, pick)
        new = _squared(x, y, z, cx, cy, cz)
        dist = tl.where(new < dist, new, dist)
        bits = dist.to(tl.int32, bitcast=True)
        best = tl.max(bits, axis=0)
        winner = tl.min(tl.where(bits == best, pos, NONE), axis=0)
        pick = tl.where(best < 0, 0, _index_at(winner, log2, rows, POINTNET2))
        tl.store(out + j, pick.to(idx_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "B"])  # type: ignore[untyped-decorator]
def _prepare_kernel(  # type: ignore[no-untyped-def]
    p_ptr, len_ptr, state_ptr, N, P, B, POINTNET2: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # p: (B, N, 3) -> state: (4, B, P) = x, y, z, distance by position; P is a multiple of BN
    tiles = P // BN
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    pos = (pid % tiles) * BN + tl.arange(0, BN)
    n = _valid_count(len_ptr, b, N)
    log2, rows, positions = _order(n, POINTNET2)
    x, y, z, dist = _start_state(p_ptr + b * N * 3, pos, n, log2, rows, positions, POINTNET2)
    at = state_ptr + b * P + pos
    plane = tl.cast(B, tl.int64) * P
    tl.store(at, x)
    tl.store(at + plane, y)
    tl.store(at + 2 * plane, z)
    tl.store(at + 3 * plane, dist)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(state_ptr, plane, begin, end, cx, cy, cz, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    # updates the distances at positions begin..end of one cloud -> (largest, its lowest position), as bits and int32
    lane = tl.arange(0, BN)
    top = tl.full([BN], -1, tl.int32)
    top_pos = tl.full([BN], NONE, tl.int32)
    for first in range(begin, end, BN):
        pos = first + lane
        at = state_ptr + pos
        dist = tl.load(at + 3 * plane)
        new = _squared(tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane), cx, cy, cz)
        nearer = new < dist
        tl.store(at + 3 * plane, new, mask=nearer)
        bits = tl.where(nearer, new, dist).to(tl.int32, bitcast=True)
        better = bits > top
        top = tl.where(better, bits, top)
        top_pos = tl.where(better, pos, top_pos)
    best = tl.max(top, axis=0)
    return best, tl.min(tl.where(top == best, top_pos, NONE), axis=0)


@triton.jit(do_not_specialize=["N", "B", "m"])  # type: ignore[untyped-decorator]
def _tiled_kernel(  # type: ignore[no-untyped-def]
    p_ptr, start_ptr, len_ptr, state_ptr, idx_ptr, N, P, B, m, POINTNET2: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # p: (B, N, 3), state: (4, B, P) -> idx: (B, m); P is a multiple of BN
    b = tl.program_id(0).to(tl.int64)
    n = _valid_count(len_ptr, b, N)
    log2, rows, positions = _order(n, POINTNET2)
    cloud = p_ptr + b * N * 3
    state = state_ptr + b * P
    plane = tl.cast(B, tl.int64) * P
    pick = tl.load(start_ptr + b).to(tl.int32)
    out = idx_ptr + b * m
    tl.store(out, pick.to(idx_ptr.dtype.element_ty))
    for j in range(1, m):
        cx, cy, cz = _load_centre(cloud, pick)
        best, winner = _sweep(state, plane, 0, positions, cx, cy, cz, BN)
        pick = tl.where(best < 0, 0, _index_at(winner, log2, rows, POINTNET2))
        tl.store(out + j, pick.to(idx_ptr.dtype.element_ty))
        # the next pick reads distances which other threads may have written
        tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _packed(best, winner):  # type: ignore[no-untyped-def]
    # one int64 whose maximum is the largest distance and, of equal ones, the lowest position; -1 for no candidate
    key = (tl.cast(best, tl.int64) << 32) | (0x7FFFFFFF - winner).to(tl.int64)
    return tl.where(best < 0, tl.cast(-1, tl.int64), key)


@triton.jit  # type: ignore[untyped-decorator]
def _unpacked_index(key, log2, rows, POINTNET2: tl.constexpr):  # type: ignore[no-untyped-def]
    winner = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
    return tl.where(key < 0, 0, _index_at(winner, log2, rows, POINTNET2))


@triton.jit(do_not_specialize=["N", "B", "m", "j", "G"])  # type: ignore[untyped-decorator]
def _step_kernel(  # type: ignore[no-untyped-def]
    p_ptr, start_ptr, len_ptr, state_ptr, part_ptr, idx_ptr, N, P, B, m, j, G, chunk,
    POINTNET2: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    # part: (2, B, G) int64, read at j - 1 and written at j modulo 2; writes pick j; chunk is a multiple of BN
    pid = tl.program_id(0)
    g = pid % G
    b = (pid // G).to(tl.int64)
    n = _valid_count(len_ptr, b, N)
    log2, rows, positions = _order(n, POINTNET2)
    if j == 0:
        pick = tl.load(start_ptr + b).to(tl.int32)
    else:
        slot = tl.arange(0, BG)
        keys = tl.load(part_ptr + (((j - 1) % 2) * tl.cast(B, tl.int64) + b) * G + slot, mask=slot < G, other=-1)
        pick = _unpacked_index(tl.max(keys, axis=0), log2, rows, POINTNET2)
    if g == 0:
        tl.store(idx_ptr + b * m + j, pick.to(idx_ptr.dtype.element_ty))
    if j + 1 < m:
        cx, cy, cz = _load_centre(p_ptr + b * N * 3, pick)
        begin = g * chunk
        end = tl.minimum(begin + chunk, positions)
        best, winner = _sweep(state_ptr + b * P, tl.cast(B, tl.int64) * P, begin, end, cx, cy, cz, BN)
        tl.store(part_ptr + ((j % 2) * tl.cast(B, tl.int64) + b) * G + g, _packed(best, winner))


@triton.jit(do_not_specialize=["N", "B", "m", "G"])  # type: ignore[untyped-decorator]
def _spin_kernel(  # type: ignore[no-untyped-def]
    p_ptr, start_ptr, len_ptr, state_ptr, slot_ptr, count_ptr, idx_ptr, N, P, B, m, G, chunk,
    POINTNET2: tl.constexpr, BN: tl.constexpr, ALONE: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    # slot: (B, m) int64 of -1, count: (B, m) int32 of 0, one of each a pick, so nothing is ever reset.
    # ALONE: one program a cloud, nobody to wait for. CAP: polls after which a program gives up; its picks are then -1.
    pid = tl.program_id(0)
    g = pid % G
    b = (pid // G).to(tl.int64)
    n = _valid_count(len_ptr, b, N)
    log2, rows, positions = _order(n, POINTNET2)
    cloud = p_ptr + b * N * 3
    state = state_ptr + b * P
    plane = tl.cast(B, tl.int64) * P
    begin = g * chunk
    end = tl.minimum(begin + chunk, positions)
    pick = tl.load(start_ptr + b).to(tl.int32)
    out = idx_ptr + b * m
    if g == 0:
        tl.store(out, pick.to(idx_ptr.dtype.element_ty))
    met = 1
    for j in range(1, m):
        cx, cy, cz = _load_centre(cloud, pick)
        best, winner = _sweep(state, plane, begin, end, cx, cy, cz, BN)
        key = _packed(best, winner)
        if not ALONE:
            tl.atomic_max(slot_ptr + b * m + j, key, sem="relaxed")
            arrived = tl.atomic_add(count_ptr + b * m + j, 1, sem="acq_rel") + 1
            polls = 0
            while (arrived < G) & (polls < CAP) & (met > 0):
                arrived = tl.atomic_add(count_ptr + b * m + j, 0, sem="acquire")
                polls += 1
            met = tl.where(arrived < G, 0, met)
            key = tl.atomic_max(slot_ptr + b * m + j, tl.cast(-1, tl.int64), sem="relaxed")
        pick = _unpacked_index(key, log2, rows, POINTNET2)
        if g == 0:
            tl.store(out + j, tl.where(met > 0, pick, -1).to(idx_ptr.dtype.element_ty))
        tl.debug_barrier()


def _three(points: Tensor) -> Tensor:
    # (B, N, D <= 3) -> (B, N, 3); a zero coordinate adds nothing to a distance, not even a rounding
    if points.shape[-1] < 3:
        points = torch.nn.functional.pad(points, (0, 3 - points.shape[-1]))
    return points.contiguous()


def run_registers(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype,
    *, num_warps: int,
) -> Tensor:  # fmt: skip
    """The ``registers`` form; points (B, N, 3) contiguous."""
    B, N, _ = points.shape
    idx = torch.empty(B, m, device=points.device, dtype=index_dtype)
    with launch_guard(points):
        _registers_kernel[(B,)](
            points, start, lengths, idx, N, m, POINTNET2=rule == "pointnet2", BN=next_power_of_2(N),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return idx


def _prepare(points: Tensor, lengths: Tensor | None, rule: str, tile: int) -> Tensor:
    B, N, _ = points.shape
    # under "pointnet2" up to S - 1 positions more than points
    more = min(512, 1 << max(N.bit_length() - 1, 0)) - 1 if rule == "pointnet2" else 0
    P = ceil_div(N + more, tile) * tile
    state = torch.empty(4, B, P, device=points.device, dtype=torch.float32)
    block = min(tile, 1024)
    _prepare_kernel[(B * (P // block),)](
        points, lengths, state, N, P, B, POINTNET2=rule == "pointnet2", BN=block, num_warps=4, enable_fp_fusion=False
    )
    return state


def run_tiled(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype,
    *, tile: int, num_warps: int,
) -> Tensor:  # fmt: skip
    """The ``tiled`` form; points (B, N, 3) contiguous."""
    B, N, _ = points.shape
    idx = torch.empty(B, m, device=points.device, dtype=index_dtype)
    with launch_guard(points):
        state = _prepare(points, lengths, rule, tile)
        _tiled_kernel[(B,)](
            points, start, lengths, state, idx, N, state.shape[-1], B, m, POINTNET2=rule == "pointnet2", BN=tile,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return idx


def run_steps(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype,
    *, tile: int, num_warps: int,
) -> Tensor:  # fmt: skip
    """The ``steps`` form; points (B, N, 3) contiguous."""
    B, N, _ = points.shape
    idx = torch.empty(B, m, device=points.device, dtype=index_dtype)
    with launch_guard(points):
        state = _prepare(points, lengths, rule, tile)
        P = state.shape[-1]
        chunk = ceil_div(P // tile, MAX_PARTS) * tile
        G = ceil_div(P, chunk)
        parts = torch.empty(2, B, G, device=points.device, dtype=torch.int64)
        for j in range(m):
            _step_kernel[(B * G,)](
                points, start, lengths, state, parts, idx, N, P, B, m, j, G, chunk, POINTNET2=rule == "pointnet2",
                BN=tile, BG=next_power_of_2(G), num_warps=num_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return idx


def run_spin(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype,
    *, tile: int, num_warps: int, programs: int,
) -> Tensor:  # fmt: skip
    """The ``spin`` form; all programs of a launch must be resident at once, so clouds go in waves of a few."""
    B, N, _ = points.shape
    idx = torch.empty(B, m, device=points.device, dtype=index_dtype)
    with launch_guard(points):
        state = _prepare(points, lengths, rule, tile)
        P = state.shape[-1]
        G = 1 if interpreted() else min(programs, P // tile)
        chunk = ceil_div(P // tile, G) * tile
        G = ceil_div(P, chunk)
        wave = max(programs // G, 1)
        slots = torch.full((B, m), -1, device=points.device, dtype=torch.int64)
        counts = torch.zeros(B, m, device=points.device, dtype=torch.int32)
        for first in range(0, B, wave):
            some = slice(first, min(first + wave, B))
            count = some.stop - some.start
            part = state[:, some].contiguous()
            _spin_kernel[(count * G,)](
                points[some], start[some], None if lengths is None else lengths[some], part, slots[some], counts[some],
                idx[some], N, P, count, m, G, chunk, POINTNET2=rule == "pointnet2", BN=tile, ALONE=G == 1,
                CAP=SPIN_CAP, num_warps=num_warps, enable_fp_fusion=False, launch_cooperative_grid=True,
            )  # fmt: skip
    return idx


def _warps(N: int) -> int:
    if N <= 512:
        return 2
    if N <= 2048:
        return 4
    return 8 if N <= 4096 else 16


def _form(B: int, N: int, capturing: bool) -> str:
    if N <= REGISTER_LIMIT:
        return "registers"
    if os.environ.get(SPIN_SWITCH) == "1":
        return "spin"
    # Estimates, not measurements. One program reads 16 bytes a point and pick at about 64 bytes a clock: 14 µs a pick
    # at 100k points. A launch costs about 3 µs in a CUDA graph and 12 µs outside, where Python issues it.
    if B <= STEPS_CLOUDS and (STEPS_FROM_IN_GRAPH if capturing else STEPS_FROM) < N:
        return "steps"
    return "tiled"


def farthest_point_sampling_cannot(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype
) -> str | None:
    """Why this back end cannot serve the call, or None."""
    if points.shape[-1] > 3:
        return f"the Triton form takes at most three coordinates, got {points.shape[-1]}"
    if points.dtype == torch.float64:
        return "the Triton form computes in float32, got float64"
    if points.shape[1] >= 2**30:
        return "the Triton form takes clouds of fewer than 2^30 points"
    return None


def farthest_point_sampling(
    points: Tensor, m: int, start: Tensor, lengths: Tensor | None, rule: str, index_dtype: torch.dtype
) -> Tensor:
    """m points of each cloud, each the farthest from those before it.

    Args:
        points: (B, N, D), D <= 3.
        start: (B,) int64, the first pick.
        lengths: (B,) int64; points beyond do not exist.
        rule: ``standard`` (ties by lowest index) or ``pointnet2`` (the tie order of pointnet2_ops, and points with
            x² + y² + z² <= 1e-3 are never picked).

    Returns:
        Indices (B, m); repeated when a cloud has no new point left.
    """
    points, start = _three(points), start.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    B, N, _ = points.shape
    capturing = points.is_cuda and torch.cuda.is_current_stream_capturing()
    form = _form(B, N, capturing)
    if form == "registers":
        return run_registers(points, m, start, lengths, rule, index_dtype, num_warps=_warps(N))
    if form == "tiled":
        return run_tiled(points, m, start, lengths, rule, index_dtype, tile=4096, num_warps=16)
    if form == "steps":
        return run_steps(points, m, start, lengths, rule, index_dtype, tile=1024, num_warps=4)
    return run_spin(points, m, start, lengths, rule, index_dtype, tile=1024, num_warps=4, programs=SPIN_PROGRAMS)


def compile_cases() -> list[CompileCase]:
    """Every form, in the sizes that run."""
    types = {
        "p_ptr": "*fp32", "start_ptr": "*i64", "idx_ptr": "*i64", "state_ptr": "*fp32", "part_ptr": "*i64",
        "slot_ptr": "*i64", "count_ptr": "*i32",
    }  # fmt: skip

    def case(name: str, kernel: Any, num_warps: int, constexprs: dict[str, Any], **more: str) -> CompileCase:
        options = {"enable_fp_fusion": False}
        return CompileCase(name, kernel, signature(kernel, constexprs, **types, **more), constexprs, num_warps, options)

    cases = []
    for pointnet2 in (False, True):
        rule: dict[str, Any] = {"POINTNET2": pointnet2, "len_ptr": None}
        mark = "pointnet2" if pointnet2 else "standard"
        for n in (1024, 2048, 8192):
            cases.append(case(f"fps-registers-{n}-{mark}", _registers_kernel, _warps(n), {**rule, "BN": n}))
        cases.append(case(f"fps-prepare-{mark}", _prepare_kernel, 4, {**rule, "BN": 1024}))
        cases.append(case(f"fps-tiled-{mark}", _tiled_kernel, 16, {**rule, "BN": 4096}))
        cases.append(case(f"fps-step-{mark}", _step_kernel, 4, {**rule, "BN": 1024, "BG": 128}))
        spin = {**rule, "BN": 1024, "ALONE": False, "CAP": SPIN_CAP}
        cases.append(case(f"fps-spin-{mark}", _spin_kernel, 4, spin))
        lengths = {"POINTNET2": pointnet2, "BN": 2048}
        cases.append(case(f"fps-registers-2048-{mark}-lengths", _registers_kernel, 4, lengths, len_ptr="*i64"))
    return cases
