"""Point-cloud operations: neighbours, sampling, grouping, interpolation.

Points are (B, N, D) and features (B, N, C), channel-last. Distances are computed from coordinate differences (products
for D > 8), in float32 for half inputs, in float64 for float64. Clouds of different sizes in one batch are given as a
padded tensor and ``lengths``; see :func:`unpack` for packed arrays.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from peft_suite.kernels import checks
from peft_suite.kernels.ops import points as ops
from peft_suite.kernels.reference.points import compute_dtype

__all__ = [
    "KNN",
    "ball_query",
    "farthest_point_sampling",
    "gather_points",
    "group_points",
    "group_relative",
    "interpolate",
    "knn",
    "knn_gather",
    "pack",
    "three_interpolate",
    "three_nn",
    "unpack",
]


class KNN(NamedTuple):
    """Nearest neighbours: ``dists`` (B, Q, k), or None where they were not asked for, and ``idx`` (B, Q, k)."""

    dists: Tensor | None
    idx: Tensor


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    lengths_q: Tensor | None = None,
    lengths_p: Tensor | None = None,
    sorted: bool = True,
    return_dists: bool = True,
    norm: int = 2,
    index_dtype: torch.dtype = torch.int64,
    pad: Literal["inf", "pytorch3d"] = "inf",
    precision: Literal["exact", "fast"] = "exact",
    refine: bool = True,
    deterministic_ties: bool = False,
    check_finite: bool = False,
) -> KNN:
    """The k nearest points of every query, nearest first, equal distances by lower index.

    ``dists = Σ_d (query_d − point_d)²`` (``norm=2``, squared) or ``Σ_d |query_d − point_d|`` (``norm=1``). ``dists`` is
    differentiable in both point sets; ``idx`` is not. A NaN distance counts as +inf.

    Args:
        query: (B, Q, D).
        points: (B, N, D), same dtype and device.
        k: neighbours. Slots beyond the number of points, and rows beyond ``lengths_q``, are padded.
        lengths_q: (B,) number of queries that count in each cloud.
        lengths_p: (B,) number of points that count in each cloud.
        sorted: False allows any order; today's back ends sort all the same.
        return_dists: False leaves ``dists`` out.
        norm: 2 or 1.
        index_dtype: torch.int64 or torch.int32.
        pad: "inf" (distance +inf, index −1) or "pytorch3d" (distance 0, index 0).
        precision: for D > 8 only: "fast" allows bfloat16 products when choosing candidates.
        refine: for D > 8 only: compute the candidates' distances again from differences, and sort by them.
        deterministic_ties: asks for the tie rule; every back end of today keeps it without being asked.
        check_finite: raise on NaN or infinity (synchronises on a GPU).

    Returns:
        KNN(dists (B, Q, k) float32 or float64, idx (B, Q, k)).

    Raises:
        KernelArgumentError: a shape, dtype, device or value is not as above; an empty cloud has queries.
        KernelBackendError: a back end asked for by name cannot run this call.

    Semantics follow KNN_CUDA 0.2 and pytorch_cluster (lower index first), distances PyTorch3D (squared).
    """
    checks.points("query", query)
    checks.points("points", points)
    checks.alike("query", query, "points", points)
    k = checks.count("k", k)
    checks.choice("norm", norm, (2, 1))
    checks.choice("pad", pad, ("inf", "pytorch3d"))
    checks.choice("precision", precision, ("exact", "fast"))
    checks.index_dtype(index_dtype)
    lengths_q = checks.lengths("lengths_q", lengths_q, query)
    lengths_p = checks.lengths("lengths_p", lengths_p, points)
    _not_empty("points", points, lengths_p, query.shape[0] * query.shape[1] * k, "queries")
    dists, idx = ops.knn(query, points, k, lengths_q, lengths_p, norm, precision, refine, index_dtype, check_finite)
    if pad == "pytorch3d":
        missing = idx < 0
        dists, idx = dists.masked_fill(missing, 0.0), idx.masked_fill(missing, 0)
    return KNN(dists if return_dists else None, idx)


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Features of neighbours: (B, N, C), (B, Q, k) -> (B, Q, k, C); slots beyond ``lengths`` (B,), and −1, are zeros.

    Raises:
        KernelArgumentError: ranks, devices or batch sizes do not fit, or an index is out of range.
    """
    checks.tensor("x", x, "(B, N, C)")
    checks.index("idx", idx, "(B, Q, k)")
    lengths = checks.lengths("lengths", lengths, x)
    if lengths is not None:
        slot = torch.arange(idx.shape[-1], device=idx.device)
        idx = idx.masked_fill(slot >= lengths[:, None, None], -1)
    return group_points(x, idx)


def farthest_point_sampling(
    points: Tensor,
    m: int,
    *,
    lengths: Tensor | None = None,
    start: int | Literal["random"] | Tensor = 0,
    rule: Literal["standard", "pointnet2"] = "standard",
    pad: Literal["repeat", "pytorch3d"] = "repeat",
    index_dtype: torch.dtype = torch.int64,
    generator: torch.Generator | None = None,
    check_finite: bool = False,
) -> Tensor:
    """m points of every cloud, each the farthest from all points taken before it.

    ``idx[0] = start``; ``idx[j] = argmax_i min_{j' < j} |p_i − p_idx[j']|²``. Exact. No gradient: gather the
    coordinates with :func:`gather_points`.

    Args:
        points: (B, N, D). Points with a NaN or infinite coordinate are never taken, except as the start.
        m: how many. More than the cloud holds repeats (or pads, see ``pad``).
        lengths: (B,) number of points that count in each cloud.
        start: index of the first point, one for all clouds or (B,); or "random".
        rule: "standard": every point counts, equal distances by lower index. "pointnet2": as the CUDA kernel of
            pointnet2_ops, on which Point-BERT, Point-MAE, ReCon and their kin were trained: points with
            x² + y² + z² ≤ 1e-3 are never taken (the start excepted), distances start at 1e10, and equal distances go
            by (bit-reversed i mod S, i div S) with S = min(512, 2^⌊log2 N⌋). The two agree on clouds without ties and
            without points near the origin.
        pad: "repeat" or "pytorch3d" (−1 beyond the cloud's length).
        index_dtype: torch.int64 or torch.int32.
        generator: for ``start="random"``.
        check_finite: raise on NaN or infinity (synchronises on a GPU).

    Returns:
        Indices (B, m).

    Raises:
        KernelArgumentError: a shape, dtype, device or value is not as above; m > 0 of an empty cloud.
        KernelBackendError: a back end asked for by name cannot run this call.
    """
    checks.points("points", points, 3 if rule == "pointnet2" else None)
    m = checks.count("m", m)
    checks.choice("rule", rule, ("standard", "pointnet2"))
    checks.choice("pad", pad, ("repeat", "pytorch3d"))
    checks.index_dtype(index_dtype)
    lengths = checks.lengths("lengths", lengths, points)
    _not_empty("points", points, lengths, points.shape[0] * m, "samples asked of it")
    batch, n, device = points.shape[0], points.shape[1], points.device
    if isinstance(start, str):
        checks.choice("start", start, ("random",))
        room = torch.full((batch,), n, device=device) if lengths is None else lengths
        draw = torch.rand(batch, generator=generator, device=generator.device if generator else device).to(device)
        first = (draw.double() * room).long().clamp(max=max(n - 1, 0))
    elif isinstance(start, Tensor):
        first = checks.lengths("start", start, points)  # type: ignore[assignment]
    else:
        checks.count("start", start)
        if start >= max(n, 1):
            raise checks.fail("start", f"is {start}", f"an index below N = {n}, a tensor (B,) or 'random'")
        first = torch.full((batch,), start, dtype=torch.int64, device=device)
    idx: Tensor = ops.farthest_point_sampling(points, m, first, lengths, rule, index_dtype, check_finite)
    if pad == "pytorch3d":
        slot = torch.arange(m, device=device)
        most = torch.full((batch, 1), n, device=device) if lengths is None else lengths[:, None]
        idx = idx.masked_fill(slot >= most, -1)
    return idx


def ball_query(
    query: Tensor,
    points: Tensor,
    radius: float,
    k: int,
    *,
    lengths_q: Tensor | None = None,
    lengths_p: Tensor | None = None,
    pad: Literal["first", "pytorch3d"] = "first",
    return_dists: bool = False,
    index_dtype: torch.dtype = torch.int64,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The first k points, in index order, that lie strictly inside a ball around every query: ``d² < radius²``.

    Not the nearest k. ``radius²`` is squared in the compute dtype, as the CUDA kernels do.

    Args:
        query: (B, Q, D).
        points: (B, N, D), same dtype and device.
        radius: a number above 0.
        k: slots per query.
        lengths_q, lengths_p: (B,) numbers of queries and points that count.
        pad: "first" as pointnet2_ops: empty slots repeat the first hit, a query without a hit gets index 0;
            "pytorch3d": −1.
        return_dists: also return squared distances (B, Q, k), differentiable, 0 where the index is −1.
        index_dtype: torch.int64 or torch.int32.
        check_finite: raise on NaN or infinity (synchronises on a GPU).

    Returns:
        idx (B, Q, k), or (idx, dists).

    Raises:
        KernelArgumentError: a shape, dtype, device or value is not as above; an empty cloud has queries.
        KernelBackendError: a back end asked for by name cannot run this call.
    """
    checks.points("query", query)
    checks.points("points", points)
    checks.alike("query", query, "points", points)
    radius = checks.positive("radius", radius)
    k = checks.count("k", k)
    checks.choice("pad", pad, ("first", "pytorch3d"))
    checks.index_dtype(index_dtype)
    lengths_q = checks.lengths("lengths_q", lengths_q, query)
    lengths_p = checks.lengths("lengths_p", lengths_p, points)
    _not_empty("points", points, lengths_p, query.shape[0] * query.shape[1] * k, "queries")
    idx: Tensor = ops.ball_query(query, points, radius, k, lengths_q, lengths_p, pad, index_dtype, check_finite)
    if not return_dists:
        return idx
    dtype = compute_dtype(query)
    gap = group_points(points.to(dtype), idx) - query.to(dtype)[:, :, None]
    return idx, torch.where(idx >= 0, (gap * gap).sum(-1), 0.0)


def gather_points(x: Tensor, idx: Tensor, *, deterministic: bool = False) -> Tensor:
    """Rows of every cloud: (B, N, C), (B, M) -> (B, M, C), ``out[b, i] = x[b, idx[b, i]]``; index −1 gives zeros.

    Args:
        x: (B, N, C) of any floating dtype; differentiable.
        idx: (B, M) int32 or int64.
        deterministic: the gradient's sums are added in a fixed order on a GPU too (always on CPU, and whenever
            ``torch.use_deterministic_algorithms(True)`` is set).

    Raises:
        KernelArgumentError: ranks, devices or batch sizes do not fit, or (on CPU or in debug mode) an index is out of
            range.
    """
    checks.tensor("x", x, "(B, N, C)")
    checks.index("idx", idx, "(B, M)")
    checks.alike("x", x, "idx", idx, last=False, dtype=False)
    rows: Tensor = ops.gather_rows(x, idx, deterministic)
    return rows


def group_points(x: Tensor, idx: Tensor, *, deterministic: bool = False) -> Tensor:
    """Neighbourhoods: (B, N, C), (B, M, k) -> (B, M, k, C); as :func:`gather_points` otherwise."""
    checks.tensor("x", x, "(B, N, C)")
    checks.index("idx", idx, "(B, M, k)")
    checks.alike("x", x, "idx", idx, last=False, dtype=False)
    batch, m, k = idx.shape
    rows: Tensor = ops.gather_rows(x, idx.reshape(batch, m * k), deterministic)
    return rows.view(batch, m, k, x.shape[2])


def group_relative(xyz: Tensor, centers: Tensor, idx: Tensor) -> Tensor:
    """Neighbourhoods relative to their centres: (B, N, D), (B, M, D), (B, M, k) -> (B, M, k, D).

    ``out = xyz[idx] − centers`` in one pass; index −1 gives zeros. Differentiable in ``xyz`` and ``centers``.

    Raises:
        KernelArgumentError: ranks, dtypes, devices or sizes do not fit, or an index is out of range.
    """
    checks.points("xyz", xyz)
    checks.points("centers", centers)
    checks.alike("xyz", xyz, "centers", centers)
    checks.index("idx", idx, "(B, M, k)")
    checks.alike("xyz", xyz, "idx", idx, last=False, dtype=False)
    if idx.shape[1] != centers.shape[1]:
        raise checks.fail("idx", f"is {checks.shape_of(idx)}", f"one row per centre, M = {centers.shape[1]}")
    grouped: Tensor = ops.group_relative(xyz, centers, idx)
    return grouped


@torch.no_grad()
def three_nn(unknown: Tensor, known: Tensor, *, index_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """The three nearest known points: (B, n, 3), (B, m, 3) -> Euclidean distances (B, n, 3) ascending, and indices.

    Equal distances go by lower index. With m < 3 the missing slots are (inf, 0). No gradient, as in pointnet2_ops.

    Raises:
        KernelArgumentError: ranks, dtypes, devices or sizes do not fit, or ``known`` is empty.
    """
    dists, idx = knn(unknown, known, 3, index_dtype=index_dtype)
    assert dists is not None
    return dists.sqrt(), idx.clamp(min=0)


def three_interpolate(feats: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows: (B, m, C), (B, n, k), (B, n, k) -> (B, n, C), ``Σ_j weight_j · feats[idx_j]``.

    Usually k = 3 and the weights of each row sum to 1. Differentiable in ``feats`` and ``weight``; summed in float32
    for half features.

    Raises:
        KernelArgumentError: ranks, devices or sizes do not fit, or an index is out of range.
    """
    checks.tensor("feats", feats, "(B, m, C)")
    checks.index("idx", idx, "(B, n, k)")
    checks.tensor("weight", weight, "(B, n, k)")
    checks.alike("feats", feats, "idx", idx, last=False, dtype=False)
    if weight.shape != idx.shape or weight.device != idx.device:
        raise checks.fail("weight", f"is {checks.shape_of(weight)}", f"one weight per index, {checks.shape_of(idx)}")
    sums: Tensor = ops.weighted_rows(feats, idx, weight)
    return sums


def interpolate(
    unknown: Tensor, known: Tensor, feats: Tensor, k: int = 3, power: Literal[1, 2] = 1, eps: float = 1e-8
) -> Tensor:
    """Features carried to unknown points by inverse distance: (B, n, D), (B, m, D), (B, m, C) -> (B, n, C).

    ``w_j = 1 / (d_j^power + eps)``, normalised over the k nearest. ``power=1`` is the feature propagation of PointNet++
    (pointnet2_ops); ``power=2`` that of the segmentation heads of the Point-MAE family, whose expanded distances can
    come out negative for coincident points: here they cannot. Differentiable in ``feats`` only.

    Raises:
        KernelArgumentError: ranks, dtypes, devices or sizes do not fit, or ``known`` is empty.
    """
    checks.choice("power", power, (1, 2))
    checks.count("k", k, least=1)
    with torch.no_grad():
        dists, idx = knn(unknown, known, k)
        assert dists is not None
        weight = 1 / ((dists.sqrt() if power == 1 else dists) + eps)  # a missing slot: 1 / inf = 0
        weight = weight / weight.sum(-1, keepdim=True)
    return three_interpolate(feats, idx, weight)


def unpack(packed: Tensor, lengths: Tensor) -> Tensor:
    """Packed clouds (ΣN_b, C) and their lengths (B,) -> padded (B, max N_b, C), zeros beyond each length.

    Raises:
        KernelArgumentError: the lengths do not add up to the rows.
    """
    checks.tensor("packed", packed, "(sum of N, C)")
    checks.tensor("lengths", lengths, "(B,)", checks.INTEGERS)
    if int(lengths.sum()) != packed.shape[0] or bool((lengths < 0).any()):
        raise checks.fail("lengths", f"is {lengths.tolist()}", f"lengths that add up to {packed.shape[0]} rows")
    parts = torch.split(packed, lengths.tolist())
    if not parts:
        return packed.new_zeros(0, 0, packed.shape[1])
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def pack(padded: Tensor, lengths: Tensor) -> Tensor:
    """Padded clouds (B, N, C) -> packed (ΣN_b, C), the inverse of :func:`unpack`.

    Raises:
        KernelArgumentError: a length is negative or above N.
    """
    checks.tensor("padded", padded, "(B, N, C)")
    lengths = checks.lengths("lengths", lengths, padded)  # type: ignore[assignment]
    checks.length_values("lengths", lengths, padded.shape[1])
    inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return padded[inside]


def _not_empty(argument: str, points: Tensor, lengths: Tensor | None, asked: int, what: str) -> None:
    if points.shape[1] == 0 and lengths is None and asked > 0:
        raise checks.fail(
            argument, f"is an empty cloud with {what}: {checks.shape_of(points)}", "N ≥ 1, or lengths of 0"
        )
