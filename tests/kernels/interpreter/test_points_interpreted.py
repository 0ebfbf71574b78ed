"""Point kernels in Triton's interpreter against plain torch: indices equal, fp32 distances equal to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_suite.kernels.triton import ball_query as ball_module
from peft_suite.kernels.triton import fps as fps_module
from peft_suite.kernels.triton import gather as gather_module
from peft_suite.kernels.triton import interpolate as interpolate_module
from peft_suite.kernels.triton import knn as knn_module

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GOLDENS = Path(__file__).resolve().parents[4] / "shared" / "goldens"
INF = float("inf")
NAN = float("nan")


def distances(query: Tensor, points: Tensor) -> Tensor:
    """(B, Q, D), (B, N, D) -> (B, Q, N) squared, fp32, summed in coordinate order."""
    diff = query.float()[:, :, None] - points.float()[:, None]
    total = diff[..., 0] * diff[..., 0]
    for c in range(1, diff.shape[-1]):
        total = total + diff[..., c] * diff[..., c]
    return total


def knn_oracle(query, points, k, lengths_q=None, lengths_p=None):  # type: ignore[no-untyped-def]
    B, Q, N = query.shape[0], query.shape[1], points.shape[1]
    dist = distances(query, points)
    dist = torch.where(dist.isnan(), INF, dist)
    out, idx = torch.full((B, Q, k), INF), torch.full((B, Q, k), -1)
    for b in range(B):
        rows = Q if lengths_q is None else int(lengths_q[b])
        count = N if lengths_p is None else int(lengths_p[b])
        value, order = dist[b, :rows, :count].sort(dim=-1, stable=True)
        out[b, :rows, : min(k, count)] = value[:, :k]
        idx[b, :rows, : min(k, count)] = order[:, :k]
    return out, idx


def fps_oracle(points, m, start, lengths=None, rule="standard"):  # type: ignore[no-untyped-def]
    B, N, D = points.shape
    xyz = torch.nn.functional.pad(points.float(), (0, 3 - D))
    picks = torch.zeros(B, m, dtype=torch.long)
    for b in range(B):
        n = N if lengths is None else int(lengths[b])
        cloud = xyz[b]
        free = cloud.isfinite().all(-1) & (torch.arange(N) < n)
        tie = torch.arange(N)
        first = INF
        if rule == "pointnet2":
            x, y, z = cloud.unbind(-1)
            free &= ((x * x + y * y) + z * z).double() > 1e-3
            log2 = min(9, int(math.log2(max(n, 1))))
            low = [int(format(i % 2**log2, f"0{max(log2, 1)}b")[::-1], 2) if log2 else 0 for i in range(N)]
            tie = torch.tensor([r * (N + 1) + i // 2**log2 for i, r in enumerate(low)])
            first = 1e10
        dist = torch.full((N,), first)
        pick = int(start[b])
        picks[b, 0] = pick
        for j in range(1, m):
            new = distances(cloud[None, pick : pick + 1], cloud[None])[0, 0]
            dist = torch.where(new < dist, new, dist)
            best = dist[free].max() if free.any() else None
            among = free & (dist == best) if best is not None else free
            pick = int(torch.where(among, tie, 2**40).argmin()) if best is not None else 0
            picks[b, j] = pick
    return picks


def ball_oracle(query, points, radius, k, lengths_q=None, lengths_p=None, pad="first"):  # type: ignore[no-untyped-def]
    B, Q, N = query.shape[0], query.shape[1], points.shape[1]
    hit = distances(query, points) < torch.tensor(radius).float().square()
    idx = torch.full((B, Q, k), 0 if pad == "first" else -1)
    for b in range(B):
        for q in range(Q if lengths_q is None else int(lengths_q[b])):
            found = hit[b, q, : N if lengths_p is None else int(lengths_p[b])].nonzero().flatten()[:k]
            if len(found) and pad == "first":
                idx[b, q] = found[0]
            idx[b, q, : len(found)] = found
    return idx


def cloud(kind: str, B: int, n: int, D: int = 3, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(B, n, D, generator=g)
    if kind == "grid":
        return (points * 2).round() / 2
    if kind == "duplicates":
        return points[:, torch.arange(n) % max(n // 3, 1)]
    if kind == "equal":
        return points[:, :1].repeat(1, n, 1)
    if kind == "collinear":
        return points[..., :1] * torch.ones(D)
    if kind == "shifted":
        return points + 100
    if kind == "period":
        # the nearest points of a query at the origin all lie in the groups of low index
        radius = torch.arange(n) % 8 + 1.0
        return torch.nn.functional.normalize(points, dim=-1) * radius[:, None]
    if kind == "nonfinite":
        points[:, n // 2, 0] = NAN
        points[:, n // 3, 1] = INF
        points[:, n // 4, 2 % D] = -INF
        return points
    return points


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1].long(), want[1])
    assert torch.equal(got[0], want[0])


KINDS = ["random", "grid", "duplicates", "equal", "collinear", "shifted", "period", "nonfinite"]


def crossed(forms: Iterable[str], thorough: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every kind of cloud for the thorough forms, the two that find most faults for the others."""
    return [(form, kind) for form in forms for kind in (KINDS if form in thorough else ("grid", "nonfinite"))]


FORMS = {
    "tile": lambda *a: knn_module.run_tile(*a, block_q=4, num_warps=1),
    "groups": lambda *a: knn_module.run_groups(*a, block_q=8, groups=32, num_warps=1),
    "groups-again": lambda *a: knn_module.run_groups(*a, block_q=8, groups=8, num_warps=1),
    "groups-soa": lambda *a: knn_module.run_groups(*a, block_q=4, groups=16, num_warps=1, soa=True),
    "split": lambda *a: knn_module.run_groups(*a, block_q=8, groups=16, num_warps=1, splits=3, merge_q=16),
}


@pytest.mark.parametrize(("form", "kind"), crossed(FORMS, ("tile", "groups-again")))
def test_knn_selects_exactly(form: str, kind: str) -> None:
    points = cloud(kind, 2, 75)
    query = torch.cat([points[:, :5], cloud("random", 2, 2, seed=1)], 1)
    same(FORMS[form](query, points, 11, None, None, torch.int64), knn_oracle(query, points, 11))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), [(1, 3), (5, 9), (37, 35)])
def test_knn_pads_what_does_not_exist(form: str, n: int, k: int) -> None:
    points, query = cloud("grid", 2, n), cloud("grid", 2, 3, seed=1)
    same(FORMS[form](query, points, k, None, None, torch.int64), knn_oracle(query, points, k))


@pytest.mark.parametrize("form", FORMS)
def test_knn_lengths(form: str) -> None:
    points, query = cloud("nonfinite", 4, 40), cloud("random", 4, 6, seed=1)
    lengths_q, lengths_p = torch.tensor([6, 0, 3, 5]), torch.tensor([40, 7, 0, 21])
    got = FORMS[form](query, points, 9, lengths_q, lengths_p, torch.int64)
    same(got, knn_oracle(query, points, 9, lengths_q, lengths_p))


@pytest.mark.parametrize("form", FORMS)
def test_knn_of_empty_clouds(form: str) -> None:
    dists, idx = FORMS[form](torch.zeros(1, 2, 3), torch.zeros(1, 0, 3), 2, None, torch.tensor([0]), torch.int64)
    assert (dists == INF).all() and (idx == -1).all()


@pytest.mark.parametrize("D", range(1, 9))
def test_knn_coordinate_counts(D: int) -> None:
    points, query = cloud("random", 1, 50, D), cloud("random", 1, 3, D, seed=1)
    want = knn_oracle(query, points, 6)
    for form in ("tile", "groups", "groups-soa"):
        same(FORMS[form](query, points, 6, None, None, torch.int64), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_knn_half_ranks_are_those_of_the_rounded_input(dtype: torch.dtype) -> None:
    points, query = cloud("random", 1, 60).to(dtype), cloud("random", 1, 4, seed=1).to(dtype)
    for form in ("tile", "groups"):
        same(FORMS[form](query, points, 8, None, None, torch.int32), knn_oracle(query, points, 8))


@pytest.mark.parametrize(("n", "k"), [(0, 2), (100, 5), (300, 16), (300, 33), (300, 70), (600, 130)])
def test_knn_as_planned(n: int, k: int) -> None:
    points = cloud("grid", 2, n).transpose(0, 1).contiguous().transpose(0, 1)
    query = cloud("random", 2, 10, seed=1)[:, ::5]
    args = (None, None, 2, "exact", True)
    assert knn_module.knn_cannot(query, points, k, *args, torch.int64) is None
    got = knn_module.knn(query, points, k, *args, torch.int32)
    assert got[1].dtype == torch.int32 and got[0].is_contiguous()
    same(got, knn_oracle(query, points, k))


def test_knn_plan_covers_all_sizes() -> None:
    for B, Q, N, k in [(32, 64, 1024, 32), (1, 4096, 100_000, 32), (1, 16, 100_000, 128), (32, 512, 8192, 32)]:
        chosen = knn_module.plan(B, Q, N, k)
        assert chosen.groups >= 2 * k
        assert chosen.splits * k <= knn_module.TILE_LIMIT
    assert knn_module.plan(1, 16, 100_000, 32).splits > 1
    assert knn_module.plan(8, 16, 200, 32).groups == 0


def test_knn_declines() -> None:
    x = torch.zeros(1, 1, 3)
    rest = (None, None, 2, "exact", True, torch.int64)
    assert "float64" in str(knn_module.knn_cannot(x.double(), x, 1, *rest))
    assert "coordinates" in str(knn_module.knn_cannot(torch.zeros(1, 1, 9), torch.zeros(1, 1, 9), 1, *rest))
    assert "norm" in str(knn_module.knn_cannot(x, x, 1, None, None, 1, "exact", True, torch.int64))
    assert knn_module.knn_pass(x, x, 129, *rest) is not None
    assert knn_module.knn_pass(x, x, 128, *rest) is None


FPS = {
    "registers": lambda *a: fps_module.run_registers(*a, num_warps=1),
    "tiled": lambda *a: fps_module.run_tiled(*a, tile=64, num_warps=1),
    "steps": lambda *a: fps_module.run_steps(*a, tile=64, num_warps=1),
    "spin": lambda *a: fps_module.run_spin(*a, tile=64, num_warps=1, programs=2),
}


@pytest.mark.parametrize(("form", "kind"), crossed(FPS, ("registers", "tiled")))
@pytest.mark.parametrize("rule", ["standard", "pointnet2"])
def test_fps_picks_exactly(form: str, rule: str, kind: str) -> None:
    points = cloud(kind, 2, 77)
    start = torch.tensor([0, 41])
    got = FPS[form](points, 10, start, None, rule, torch.int64)
    assert torch.equal(got, fps_oracle(points, 10, start, rule=rule))


@pytest.mark.parametrize("form", FPS)
@pytest.mark.parametrize("rule", ["standard", "pointnet2"])
@pytest.mark.parametrize("n", [1, 2, 3, 33])
def test_fps_repeats_when_exhausted(form: str, rule: str, n: int) -> None:
    points = cloud("grid", 1, n, seed=n)
    start = torch.tensor([n - 1])
    m = n + 3
    got = FPS[form](points, m, start, None, rule, torch.int32)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), fps_oracle(points, m, start, rule=rule))


@pytest.mark.parametrize("form", FPS)
@pytest.mark.parametrize("rule", ["standard", "pointnet2"])
def test_fps_lengths(form: str, rule: str) -> None:
    points = cloud("grid", 4, 70)
    lengths, start = torch.tensor([70, 1, 0, 33]), torch.tensor([3, 0, 0, 32])
    got = FPS[form](points, 7, start, lengths, rule, torch.int64)
    assert torch.equal(got, fps_oracle(points, 7, start, lengths, rule))


@pytest.mark.parametrize("form", FPS)
@pytest.mark.parametrize("rule", ["standard", "pointnet2"])
def test_fps_without_candidates(form: str, rule: str) -> None:
    points = torch.full((1, 20, 3), NAN if rule == "standard" else 0.01)
    got = FPS[form](points, 4, torch.tensor([7]), None, rule, torch.int64)
    assert got.tolist() == [[7, 0, 0, 0]]


@pytest.mark.parametrize("rule", ["standard", "pointnet2"])
@pytest.mark.parametrize("n", [513, 1500])
def test_fps_ties_beyond_the_stride(rule: str, n: int) -> None:
    points = (cloud("random", 1, n) * 2).round()
    start = torch.tensor([0])
    want = fps_oracle(points, 6, start, rule=rule)
    assert torch.equal(fps_module.run_registers(points, 6, start, None, rule, torch.int64, num_warps=1), want)
    for run in (fps_module.run_tiled, fps_module.run_steps):
        assert torch.equal(run(points, 6, start, None, rule, torch.int64, tile=512, num_warps=1), want)


def test_fps_many_programs_a_cloud_share_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # more tiles than the limit of partial maxima: several tiles a program
    monkeypatch.setattr(fps_module, "MAX_PARTS", 4)
    points, start = cloud("grid", 1, 300), torch.tensor([9])
    got = fps_module.run_steps(points, 6, start, None, "standard", torch.int64, tile=16, num_warps=1)
    assert torch.equal(got, fps_oracle(points, 6, start))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 2, 3])
def test_fps_public_form(dtype: torch.dtype, D: int) -> None:
    points = cloud("random", 60, 2, D).to(dtype).transpose(0, 1)
    start = torch.tensor([0, 1])
    got = fps_module.farthest_point_sampling(points, 7, start, None, "standard", torch.int64)
    assert torch.equal(got, fps_oracle(points, 7, start))


def test_fps_forms_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fps_module._form(32, 8192, False) == "registers"
    assert fps_module._form(1, 20_000, False) == "tiled"
    assert fps_module._form(1, 20_000, True) == "steps"
    assert fps_module._form(1, 100_000, False) == "steps"
    assert fps_module._form(64, 100_000, False) == "tiled"
    monkeypatch.setenv(fps_module.SPIN_SWITCH, "1")
    assert fps_module._form(1, 100_000, False) == "spin"
    x = torch.zeros(1, 2, 3)
    rest = (2, torch.zeros(1, dtype=torch.long), None, "standard", torch.int64)
    assert fps_module.farthest_point_sampling_cannot(x, *rest) is None
    assert "float64" in str(fps_module.farthest_point_sampling_cannot(x.double(), *rest))
    assert "coordinates" in str(fps_module.farthest_point_sampling_cannot(torch.zeros(1, 2, 4), *rest))


def test_fps_large_cloud_once() -> None:
    points, start = cloud("random", 1, 8200), torch.tensor([5])
    got = fps_module.farthest_point_sampling(points, 5, start, None, "pointnet2", torch.int64)
    assert torch.equal(got, fps_oracle(points, 5, start, rule="pointnet2"))


@pytest.mark.parametrize("pad", ["first", "pytorch3d"])
@pytest.mark.parametrize("kind", KINDS)
def test_ball_query(pad: str, kind: str) -> None:
    points = cloud(kind, 2, 75)
    query = torch.cat([points[:, :4], torch.full((2, 1, 3), 50.0)], 1)
    got = ball_module.run(query, points, 1.0, 6, None, None, pad, torch.int64, block_q=2, tile=16, num_warps=1)
    assert torch.equal(got, ball_oracle(query, points, 1.0, 6, pad=pad))


@pytest.mark.parametrize("pad", ["first", "pytorch3d"])
def test_ball_query_lengths(pad: str) -> None:
    points, query = cloud("random", 4, 40), cloud("random", 4, 7, seed=1)
    lengths_q, lengths_p = torch.tensor([7, 0, 3, 5]), torch.tensor([40, 7, 0, 21])
    args = (query, points, 1.5, 5, lengths_q, lengths_p, pad)
    got = ball_module.run(*args, torch.int32, block_q=4, tile=8, num_warps=1)
    assert torch.equal(got.long(), ball_oracle(*args))


def test_ball_query_is_strict_and_pads_wide() -> None:
    points = torch.tensor([[[0.5, 0, 0], [0.25, 0, 0], [0, 0, 0]]])
    query = torch.zeros(1, 1, 3)
    assert ball_module.ball_query(query, points, 0.5, 3, None, None, "first", torch.int64).tolist() == [[[1, 2, 1]]]
    wide = ball_module.ball_query(query, points, 0.6, 70, None, None, "pytorch3d", torch.int64)
    assert wide[0, 0, :3].tolist() == [0, 1, 2] and (wide[0, 0, 3:] == -1).all()
    # the square of the rounded radius, rounded: 0.1 and its neighbours
    line = torch.tensor([0.1]).nextafter(torch.tensor([1.0]))
    edge = torch.stack([torch.tensor([0.1]), line], 1).reshape(1, 2, 1)
    got = ball_module.ball_query(torch.zeros(1, 1, 1), edge, 0.1, 2, None, None, "pytorch3d", torch.int64)
    assert torch.equal(got, ball_oracle(torch.zeros(1, 1, 1), edge, 0.1, 2, pad="pytorch3d"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ball_query_half_and_strided(dtype: torch.dtype) -> None:
    points, query = cloud("random", 2, 64).to(dtype)[:, ::2], cloud("random", 2, 6, seed=1).to(dtype)[:, ::3]
    got = ball_module.ball_query(query, points, 1.2, 5, None, None, "first", torch.int64)
    assert torch.equal(got, ball_oracle(query, points, 1.2, 5))
    assert ball_module.ball_query_cannot(query.double(), points, 1.2, 5, None, None, "first", torch.int64) is not None


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a kernel stores it: the interpreter cuts a float32 off to bfloat16 where the GPU rounds."""
    if dtype == torch.bfloat16:
        x = (x.float().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def rows(B: int, n: int, L: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, n, (B, L), generator=torch.Generator().manual_seed(seed))


def gathered(x: Tensor, idx: Tensor) -> Tensor:
    picked = x.gather(1, idx.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return torch.where((idx >= 0)[..., None], picked, torch.zeros((), dtype=x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("C", [1, 3, 5, 37])
def test_gather(dtype: torch.dtype, C: int) -> None:
    x = (torch.randn(2, 9, C) * 10).to(dtype)
    idx = rows(2, 9, 21)
    assert torch.equal(gather_module.gather_rows(x, idx), gathered(x, idx))
    assert torch.equal(gather_module.run_gather(x, idx.int(), elements=16), gathered(x, idx))


def test_gather_wide_and_strided() -> None:
    x, idx = torch.randn(700, 2, 9).permute(1, 2, 0), rows(2, 9, 40)[:, ::4]
    assert torch.equal(gather_module.gather_rows(x, idx), gathered(x, idx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("C", [1, 3, 37])
@pytest.mark.parametrize("deterministic", [True, False])
def test_scatter(dtype: torch.dtype, C: int, deterministic: bool) -> None:
    g, idx = torch.randn(2, 31, C).to(dtype), rows(2, 7, 31)
    wide = g.double() if dtype == torch.float64 else g.float()
    want = torch.zeros(2, 7, C, dtype=wide.dtype)
    for b in range(2):
        for r in range(31):
            if idx[b, r] >= 0:
                want[b, idx[b, r]] += wide[b, r]
    # the atomic form is cast by torch, which rounds
    want = stored(want, dtype) if deterministic else want.to(dtype)
    got = gather_module.scatter_rows(g, idx, 7, deterministic)
    assert got.dtype == dtype and torch.equal(got, want)
    small = gather_module.run_segment_sum if deterministic else gather_module.run_atomic
    assert torch.equal(small(g, idx.int(), 7, elements=8), want)


def test_scatter_of_nothing() -> None:
    g, idx = torch.full((1, 4, 3), NAN), torch.full((1, 4), -1)
    for deterministic in (True, False):
        assert torch.equal(gather_module.scatter_rows(g, idx, 5, deterministic), torch.zeros(1, 5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("D", [1, 3, 6])
def test_group_relative(dtype: torch.dtype, D: int) -> None:
    xyz, centers = torch.randn(2, 9, D).to(dtype), torch.randn(2, 4, D).to(dtype)
    idx = rows(2, 9, 20).reshape(2, 4, 5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = gathered(xyz, idx.flatten(1)).reshape(2, 4, 5, D).to(wide) - centers[:, :, None].to(wide)
    want = stored(torch.where((idx >= 0)[..., None], want, torch.zeros((), dtype=wide)), dtype)
    for elements in (16, 1024):
        assert torch.equal(gather_module.run_relative(xyz, centers, idx, elements=elements), want)
    assert torch.equal(gather_module.group_relative(xyz, centers, idx.int()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("C", "k"), [(1, 1), (3, 3), (37, 5), (600, 2)])
def test_interpolate(dtype: torch.dtype, C: int, k: int) -> None:
    feats, weight = torch.randn(2, 6, C).to(dtype), torch.rand(2, 11, k)
    idx = rows(2, 6, 11 * k).reshape(2, 11, k)
    picked = gathered(feats, idx.flatten(1)).reshape(2, 11, k, C).float()
    want = torch.zeros(2, 11, C)
    for j in range(k):
        want = want + weight[..., j, None] * picked[:, :, j]
    for elements in (64, 2048):
        got = interpolate_module.run(feats, idx, weight, elements=elements)
        assert got.dtype == dtype and torch.equal(got, stored(want, dtype))
    assert interpolate_module.three_interpolate_cannot(feats.double(), idx, weight) is not None


def test_interpolate_ignores_the_weight_of_a_missing_row() -> None:
    got = interpolate_module.three_interpolate(
        torch.ones(1, 2, 3), torch.tensor([[[0, -1]]]), torch.tensor([[[0.5, INF]]])
    )
    assert torch.equal(got, torch.full((1, 1, 3), 0.5))


@pytest.mark.skipif(not (GOLDENS / "pointops-a.safetensors").exists(), reason="goldens not found")
@pytest.mark.parametrize("part", ["random", "grid"])
def test_golden(part: str) -> None:
    from safetensors.torch import load_file

    config = json.loads((GOLDENS / "pointops-a.json").read_text())["config"]
    t = {name.split(".", 1)[1]: value for name, value in load_file(GOLDENS / "pointops-a.safetensors").items()
         if name.startswith(part + ".")}  # fmt: skip
    points, start = t["points"], torch.zeros(config["batch"], dtype=torch.long)
    for form in ("registers", "steps"):
        picks = FPS[form](points, config["npoint"], start, None, "pointnet2", torch.int64)
        assert torch.equal(picks, t["fps_idx"])
    for groups in (0, 32):
        sizes = {"block_q": 32, "num_warps": 1} | ({"groups": groups} if groups else {})
        run = knn_module.run_groups if groups else knn_module.run_tile
        dists, idx = run(t["centers"], points, config["k"], None, None, torch.int64, **sizes)
        assert torch.equal(idx, t["knn_idx"])
        assert torch.allclose(dists.sqrt(), t["knn_dist"], rtol=1e-6)
        dists, idx = run(points, t["centers"].contiguous(), 3, None, None, torch.int64, **sizes)
        assert torch.equal(idx, t["three_nn_idx"])
    args = (t["ball_queries"], points, config["radius"], config["nsample"], None, None, "first", torch.int32)
    ball = ball_module.run(*args, block_q=32, tile=32, num_warps=1)
    assert torch.equal(ball, t["ball_idx"])
    feats = t["features"].transpose(1, 2)
    mixed = interpolate_module.three_interpolate(feats, t["three_nn_idx"], t["weight"]).transpose(1, 2)
    assert torch.allclose(mixed, t["interpolated"], rtol=1e-5, atol=1e-6)
