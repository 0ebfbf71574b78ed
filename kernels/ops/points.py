"""Point operations registered with torch: schema, shapes, gradients. Bodies check values and choose a back end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_suite.kernels import checks
from peft_suite.kernels.dispatch import Form, Op
from peft_suite.kernels.reference.points import compute_dtype

__all__ = [
    "ball_query",
    "farthest_point_sampling",
    "gather_rows",
    "group_relative",
    "knn",
    "scatter_rows",
    "weighted_rows",
]

_TRITON, _CPU, _TORCH = "peft_suite.kernels.triton", "peft_suite.kernels.cpu", "peft_suite.kernels.cpu.torch_points"
_REFERENCE = "peft_suite.kernels.reference.points"


def _op(name: str, triton: str, *more: Form) -> Op:
    return Op(
        name,
        Form("triton", f"{_TRITON}.{triton}:{name}", devices=("cuda",)),
        *more,
        Form("torch", f"{_TORCH}:{name}"),
        Form("reference", f"{_REFERENCE}:{name}", automatic=False),
    )


def _official(name: str) -> Form:
    return Form("pointnet2_ops", f"peft_suite.kernels.official:{name}", devices=("cuda",), automatic=False)


_KNN = _op(
    "knn",
    "knn",
    Form("numba", f"{_CPU}.numba_knn:knn", devices=("cpu",)),
    Form("scipy", f"{_CPU}.scipy_knn:knn", devices=("cpu",)),
)
_FPS = _op(
    "farthest_point_sampling",
    "fps",
    Form("numba", f"{_CPU}.numba_fps:farthest_point_sampling", devices=("cpu",)),
    _official("farthest_point_sampling"),
)
_BALL = _op(
    "ball_query",
    "ball_query",
    Form("numba", f"{_CPU}.numba_ball:ball_query", devices=("cpu",)),
    _official("ball_query"),
)
_GATHER = _op("gather_rows", "gather")
_SCATTER = _op("scatter_rows", "gather")
_RELATIVE = _op("group_relative", "gather")
_INTERPOLATE = _op("three_interpolate", "interpolate")


def _clouds(query: Tensor, points: Tensor, lengths_q: Tensor | None, lengths_p: Tensor | None, finite: bool) -> None:
    checks.length_values("lengths_q", lengths_q, query.shape[1])
    checks.length_values("lengths_p", lengths_p, points.shape[1])
    checks.finite_values("query", query, finite)
    checks.finite_values("points", points, finite)


# knn ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::knn", mutates_args=())
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
    check_finite: bool,
) -> tuple[Tensor, Tensor]:
    """(B, Q, D), (B, N, D) -> distances (B, Q, k) and indices; missing slots +inf and −1."""
    _clouds(query, points, lengths_q, lengths_p, check_finite)
    shape = (query.shape[0], query.shape[1], k)
    if 0 in shape or points.shape[1] == 0:
        return (
            torch.full(shape, torch.inf, dtype=compute_dtype(query), device=query.device),
            torch.full(shape, -1, dtype=index_dtype, device=query.device),
        )
    dists, idx = _KNN(query.device, query, points, k, lengths_q, lengths_p, norm, precision, refine, index_dtype)
    return dists, idx


@knn.register_fake
def _(query: Tensor, points: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape, dtype=compute_dtype(query)), query.new_empty(shape, dtype=rest[5])


def _knn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, points, _, _, _, ctx.norm = inputs[:6]
    ctx.save_for_backward(query, points, output[1])
    ctx.mark_non_differentiable(output[1])


def _knn_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, points, idx = ctx.saved_tensors
    batch, n_query, k = idx.shape
    flat = idx.reshape(batch, n_query * k)
    gap = query[:, :, None] - gather_rows(points, flat, False).view(batch, n_query, k, -1)
    gap = (2 * gap if ctx.norm == 2 else gap.sign()).to(grad.dtype)
    # a slot without a neighbour, and a distance that is not finite, have no gradient
    live = (idx >= 0)[..., None] & torch.isfinite(gap)
    each = torch.where(live, grad[..., None] * gap, 0)
    to_query = each.sum(2).to(query.dtype) if ctx.needs_input_grad[0] else None
    to_points = None
    if ctx.needs_input_grad[1]:
        rows = -each.reshape(batch, n_query * k, -1)
        to_points = scatter_rows(rows, flat, points.shape[1], _deterministic()).to(points.dtype)
    return to_query, to_points, None, None, None, None, None, None, None, None


knn.register_autograd(_knn_backward, setup_context=_knn_context)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


# farthest point sampling --------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::farthest_point_sampling", mutates_args=())
def farthest_point_sampling(
    points: Tensor,
    m: int,
    start: Tensor,
    lengths: Tensor | None,
    rule: str,
    index_dtype: torch.dtype,
    check_finite: bool,
) -> Tensor:
    """(B, N, D), start (B,) -> (B, m) indices, repeating when the cloud is exhausted."""
    checks.length_values("lengths", lengths, points.shape[1])
    checks.index_values("start", start, 0, max(points.shape[1], 1))
    checks.finite_values("points", points, check_finite)
    if lengths is not None and checks.looks_at_values(start) and bool((start >= lengths.clamp(min=1)).any()):
        raise checks.fail("start", f"holds {start.tolist()}", f"indices below the lengths, {lengths.tolist()}")
    if points.shape[0] == 0 or m == 0 or points.shape[1] == 0:
        return torch.zeros(points.shape[0], m, dtype=index_dtype, device=points.device)
    picks: Tensor = _FPS(points.device, points, m, start, lengths, rule, index_dtype)
    return picks


@farthest_point_sampling.register_fake
def _(points: Tensor, m: int, start: Tensor, lengths: Any, rule: str, index_dtype: torch.dtype, _: bool) -> Tensor:
    return points.new_empty((points.shape[0], m), dtype=index_dtype)


# ball query ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::ball_query", mutates_args=())
def ball_query(
    query: Tensor,
    points: Tensor,
    radius: float,
    k: int,
    lengths_q: Tensor | None,
    lengths_p: Tensor | None,
    pad: str,
    index_dtype: torch.dtype,
    check_finite: bool,
) -> Tensor:
    """(B, Q, D), (B, N, D) -> (B, Q, k) indices of the first k points inside the ball."""
    _clouds(query, points, lengths_q, lengths_p, check_finite)
    shape = (query.shape[0], query.shape[1], k)
    if 0 in shape or points.shape[1] == 0:
        return torch.full(shape, 0 if pad == "first" else -1, dtype=index_dtype, device=query.device)
    found: Tensor = _BALL(query.device, query, points, radius, k, lengths_q, lengths_p, pad, index_dtype)
    return found


@ball_query.register_fake
def _(query: Tensor, points: Tensor, radius: float, k: int, lq: Any, lp: Any, pad: str, dtype: Any, _: bool) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], k), dtype=dtype)


# gather and scatter -------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::gather_rows", mutates_args=())
def gather_rows(x: Tensor, idx: Tensor, deterministic: bool) -> Tensor:
    """(B, N, C), (B, L) -> (B, L, C); index −1 gives zeros. ``deterministic`` concerns the backward's sums."""
    checks.index_values("idx", idx, -1, x.shape[1])
    if x.shape[0] * idx.shape[1] * x.shape[2] == 0:
        return x.new_empty(x.shape[0], idx.shape[1], x.shape[2])
    rows: Tensor = _GATHER(x.device, x, idx)
    return rows


@gather_rows.register_fake
def _(x: Tensor, idx: Tensor, deterministic: bool) -> Tensor:
    return x.new_empty(x.shape[0], idx.shape[1], x.shape[2])


@torch.library.custom_op("peft_suite::scatter_rows", mutates_args=())
def scatter_rows(g: Tensor, idx: Tensor, n: int, deterministic: bool) -> Tensor:
    """(B, L, C), (B, L) -> (B, n, C): sums by destination; −1 is dropped."""
    checks.index_values("idx", idx, -1, n)
    if g.numel() == 0 or n == 0:
        return g.new_zeros(g.shape[0], n, g.shape[2])
    sums: Tensor = _SCATTER(g.device, g, idx, n, deterministic)
    return sums


@scatter_rows.register_fake
def _(g: Tensor, idx: Tensor, n: int, deterministic: bool) -> Tensor:
    return g.new_empty(g.shape[0], n, g.shape[2])


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, idx, ctx.deterministic = inputs
    ctx.save_for_backward(idx)
    ctx.n = x.shape[1]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_rows(grad, ctx.saved_tensors[0], ctx.n, ctx.deterministic or _deterministic()), None, None


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.deterministic = inputs[3]


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return gather_rows(grad, ctx.saved_tensors[0], ctx.deterministic), None, None, None


gather_rows.register_autograd(_gather_backward, setup_context=_gather_context)
scatter_rows.register_autograd(_scatter_backward, setup_context=_scatter_context)


# grouping relative to a centre --------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::group_relative", mutates_args=())
def group_relative(xyz: Tensor, centers: Tensor, idx: Tensor) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, k) -> (B, M, k, D): ``xyz[idx] − centers``."""
    checks.index_values("idx", idx, -1, xyz.shape[1])
    if idx.numel() == 0 or xyz.shape[1] == 0:
        return xyz.new_zeros(*idx.shape, xyz.shape[2])
    grouped: Tensor = _RELATIVE(xyz.device, xyz, centers, idx)
    return grouped


@group_relative.register_fake
def _(xyz: Tensor, centers: Tensor, idx: Tensor) -> Tensor:
    return xyz.new_empty(*idx.shape, xyz.shape[2])


def _relative_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.n = inputs[0].shape[1]


def _relative_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (idx,) = ctx.saved_tensors
    batch, m, k = idx.shape
    to_xyz = to_centers = None
    if ctx.needs_input_grad[0]:
        rows, flat = grad.reshape(batch, m * k, -1), idx.reshape(batch, m * k)
        to_xyz = scatter_rows(rows, flat, ctx.n, _deterministic())
    if ctx.needs_input_grad[1]:
        to_centers = -torch.where((idx >= 0)[..., None], grad, 0).sum(2)
    return to_xyz, to_centers, None


group_relative.register_autograd(_relative_backward, setup_context=_relative_context)


# weighted sums of rows ----------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::weighted_rows", mutates_args=())
def weighted_rows(feats: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """(B, m, C), (B, n, k), (B, n, k) -> (B, n, C): Σ_j weight_j · feats[idx_j]."""
    checks.index_values("idx", idx, -1, feats.shape[1])
    if idx.numel() == 0 or feats.shape[2] == 0 or feats.shape[1] == 0:
        return feats.new_zeros(idx.shape[0], idx.shape[1], feats.shape[2])
    sums: Tensor = _INTERPOLATE(feats.device, feats, idx, weight)
    return sums


@weighted_rows.register_fake
def _(feats: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    return feats.new_empty(idx.shape[0], idx.shape[1], feats.shape[2])


def _weighted_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weighted_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    feats, idx, weight = ctx.saved_tensors
    batch, n, k = idx.shape
    wide = compute_dtype(feats)
    flat = idx.reshape(batch, n * k)
    to_feats = to_weight = None
    if ctx.needs_input_grad[0]:
        rows = (grad.to(wide)[:, :, None] * weight.to(wide)[..., None]).reshape(batch, n * k, -1)
        to_feats = scatter_rows(rows, flat, feats.shape[1], _deterministic()).to(feats.dtype)
    if ctx.needs_input_grad[2]:
        rows = gather_rows(feats, flat, False).view(batch, n, k, -1)
        to_weight = (grad.to(wide)[:, :, None] * rows.to(wide)).sum(-1).to(weight.dtype)
    return to_feats, None, to_weight


weighted_rows.register_autograd(_weighted_backward, setup_context=_weighted_context)
