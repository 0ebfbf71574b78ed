"""kNN: every back end gives the bits of the reference, at every size, with every kind of tie and hole."""

from __future__ import annotations

import math

import pytest
import torch
from clouds import KINDS, Place, cloud, places
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_suite import kernels
from peft_suite.errors import KernelArgumentError

PLACES = places("torch", "numba", "scipy")


def same(place: Place, query: torch.Tensor, points: torch.Tensor, k: int, **options: object) -> None:
    """The place's answer is the reference's: indices equal, distances bit-equal."""
    with kernels.use_backend("reference"):
        wanted = kernels.knn(query, points, k, **options)  # type: ignore[arg-type]
    with place() as device:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        found = kernels.knn(query.to(device), points.to(device), k, **moved)  # type: ignore[arg-type]
    assert found.idx.dtype == wanted.idx.dtype
    assert found.dists is not None and wanted.dists is not None
    assert torch.equal(found.idx.cpu(), wanted.idx)
    assert torch.equal(found.dists.cpu(), wanted.dists)


@pytest.mark.parametrize("place", PLACES)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    n_query=st.integers(1, 41),
    n=st.integers(1, 131),
    k=st.integers(1, 40),
    dim=st.sampled_from((1, 2, 3, 3, 3, 5, 8)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bits_of_the_reference(place: Place, kind, batch, n_query, n, k, dim, dtype, seed, data) -> None:  # type: ignore[no-untyped-def]
    query, points = cloud(kind, batch, n_query, dim, dtype, seed), cloud(kind, batch, n, dim, dtype, seed + 1)
    options: dict[str, object] = {}
    if data.draw(st.booleans()):
        options["lengths_p"] = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch)))
        options["lengths_q"] = torch.tensor(
            data.draw(st.lists(st.integers(0, n_query), min_size=batch, max_size=batch))
        )
    same(place, query, points, k, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["normal", "grid", "identical", "shifted", "holes"])
@pytest.mark.parametrize(("n_query", "n", "k"), [(300, 2048, 32), (64, 5003, 17), (7, 9000, 64), (1100, 1024, 32)])
def test_sizes_where_other_code_paths_begin(place: Place, kind: str, n_query: int, n: int, k: int) -> None:
    same(place, cloud(kind, 2, n_query, seed=1), cloud(kind, 2, n, seed=2), k)
    same(place, cloud(kind, 1, n, seed=2)[:, :n_query], cloud(kind, 1, n, seed=2), k)


@pytest.mark.parametrize("place", PLACES)
def test_against_float64(place: Place) -> None:
    query, points = cloud("normal", 3, 77, seed=3), cloud("normal", 3, 500, seed=4)
    exact = (query.double()[:, :, None] - points.double()[:, None]).square().sum(-1).sort(-1).values[..., :9]
    with place() as device:
        dists, _ = kernels.knn(query.to(device), points.to(device), 9)
    torch.testing.assert_close(dists.cpu().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", PLACES)
def test_far_from_the_origin_nothing_is_lost(place: Place) -> None:
    make = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(1, 600, 3, generator=make), dim=-1) + 100
    exact = (points.double()[:, :50, None] - points.double()[:, None]).square().sum(-1).sort(-1)
    with place() as device:
        found = kernels.knn(points[:, :50].to(device), points.to(device), 32)
    assert found.dists is not None
    assert float(found.dists.min()) == 0
    torch.testing.assert_close(found.dists.cpu().double(), exact.values[..., :32], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_strides(place: Place) -> None:
    points = cloud("normal", 2, 90, 6)
    same(place, points[:, ::3, ::2], points[:, 1::2, ::2], 5)
    same(place, points[:, :20, :3].mT.contiguous().mT, points[:1, :, :3].expand(2, -1, -1), 5)


@pytest.mark.parametrize("place", places("torch"))
@pytest.mark.parametrize("dim", [9, 64, 257])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_features(place: Place, dim: int, precision: str) -> None:
    query, points = cloud("shifted", 2, 31, dim, seed=1), cloud("shifted", 2, 400, dim, seed=2)
    exact = (query.double()[:, :, None] - points.double()[:, None]).square().sum(-1)
    lengths = torch.tensor([400, 123])
    exact[1, :, 123:] = torch.inf
    with place() as device:
        found = kernels.knn(
            query.to(device),
            points.to(device),
            20,
            precision=precision,
            lengths_p=lengths.to(device),  # type: ignore[arg-type]
        )
    wanted = exact.sort(-1)
    assert found.dists is not None
    recall = (found.idx.cpu()[..., :, None] == wanted.indices[..., None, :20]).any(-1).double().mean()
    assert float(recall) > (0.9999 if precision == "exact" else 0.97)
    at = exact.gather(-1, found.idx.cpu())
    torch.testing.assert_close(found.dists.cpu().double(), at, rtol=1e-5, atol=0)


@pytest.mark.parametrize("place", places("torch"))
def test_norm_1(place: Place) -> None:
    same(place, cloud("grid", 2, 20), cloud("grid", 2, 60, seed=5), 7, norm=1)


@pytest.mark.parametrize("place", PLACES)
def test_options(place: Place) -> None:
    query, points = cloud("normal", 2, 5), cloud("normal", 2, 3, seed=1)
    with place() as device:
        query, points = query.to(device), points.to(device)
        found = kernels.knn(query, points, 5, index_dtype=torch.int32)
        assert found.idx.dtype == torch.int32
        assert (found.idx[..., 3:] == -1).all() and torch.isinf(found.dists[..., 3:]).all()  # type: ignore[index]
        zeros = kernels.knn(query, points, 5, pad="pytorch3d")
        assert (zeros.idx[..., 3:] == 0).all() and (zeros.dists[..., 3:] == 0).all()  # type: ignore[index]
        assert kernels.knn(query, points, 2, return_dists=False).dists is None
        for shape in ((0, 4, 3), (2, 0, 3)):
            assert kernels.knn(query.new_empty(shape), points[: shape[0]], 2).idx.shape == (*shape[:2], 2)
        assert kernels.knn(query, points, 0).idx.shape == (2, 5, 0)
        empty = kernels.knn(query, points[:, :0], 2, lengths_p=torch.zeros(2, dtype=torch.int64, device=device))
        assert (empty.idx == -1).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("k", [2, 6])
def test_gradient_of_distances(place: Place, k: int) -> None:
    query = cloud("normal", 2, 6, dtype=torch.float64).requires_grad_()
    points = cloud("normal", 2, 5, dtype=torch.float64, seed=1).requires_grad_()
    if place.backend == "triton":
        pytest.skip("Triton computes float32; see test_gradient_in_float32")

    def finite(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        dists = kernels.knn(q, p, k).dists
        assert dists is not None
        return dists[torch.isfinite(dists)]

    with place() as device:
        inputs = [t.detach().to(device).requires_grad_() for t in (query, points)]
        assert torch.autograd.gradcheck(finite, inputs)
        assert torch.autograd.gradgradcheck(finite, inputs)


@pytest.mark.parametrize("place", PLACES)
def test_gradient_in_float32(place: Place) -> None:
    query, points = cloud("normal", 2, 40), cloud("normal", 2, 90, seed=1)
    weight = cloud("normal", 2, 40, 8, seed=2)

    def gradients(device: str) -> list[torch.Tensor]:
        q, p = (t.to(device).requires_grad_() for t in (query, points))
        dists = kernels.knn(q, p, 8).dists
        assert dists is not None
        return [g.cpu() for g in torch.autograd.grad((dists * weight.to(device)).sum(), (q, p))]

    with kernels.use_backend("reference"):
        wanted = gradients("cpu")
    with place() as device:
        for found, target in zip(gradients(device), wanted):
            assert float((found - target).norm() / target.norm()) < 1e-5


@pytest.mark.parametrize("place", PLACES)
def test_repeatable(place: Place) -> None:
    with place() as device:
        query, points = cloud("grid", 2, 200).to(device), cloud("grid", 2, 700, seed=1).to(device)
        first = kernels.knn(query, points, 20)
        for _ in range(3):
            again = kernels.knn(query, points, 20)
            assert torch.equal(first.idx, again.idx) and torch.equal(first.dists, again.dists)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", places("torch", "numba"))
def test_operator_contract_and_full_graph(place: Place) -> None:
    with place() as device:
        query, points = cloud("normal", 2, 6).to(device), cloud("normal", 2, 11, seed=1).to(device)
        lengths = torch.tensor([3, 11], device=device)
        for given in ((query, points), (query.clone().requires_grad_(), points.clone().requires_grad_())):
            torch.library.opcheck(
                torch.ops.peft_suite.knn.default, (*given, 4, None, lengths, 2, "exact", True, torch.int64, False)
            )
        run = torch.compile(lambda q, p: kernels.knn(q, p, 4, pad="pytorch3d"), fullgraph=True, backend="aot_eager")
        assert torch.equal(run(query, points).idx, kernels.knn(query, points, 4).idx)


def test_autocast_leaves_coordinates_alone() -> None:
    query, points = cloud("shifted", 2, 30), cloud("shifted", 2, 300, seed=1)
    wide = cloud("normal", 2, 300, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, features = kernels.knn(query, points, 9), kernels.knn(wide, wide, 9)
    assert torch.equal(inside.idx, kernels.knn(query, points, 9).idx)
    assert inside.dists is not None and inside.dists.dtype == torch.float32
    assert torch.equal(features.idx, kernels.knn(wide, wide, 9).idx)


def test_offsets_past_two_to_the_31_are_planned_on_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, points = torch.empty(32, 100_000, 3), torch.empty(32, 200_000, 3)
        found = kernels.knn(query, points, 1024)
    assert found.idx.shape == (32, 100_000, 1024) and found.idx.numel() > 2**31


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(4, 3)}, "'query': has 2 dimensions: float32 (4, 3) on cpu; expected 3, (B, N, D)"),
        ({"query": [[0.0]]}, "'query': is a list; expected a tensor"),
        ({"query": torch.zeros(2, 4, 3, dtype=torch.int64)}, "'query': has dtype int64"),
        (
            {"query": torch.zeros(2, 4, 3).double()},
            "'points': is float32 (2, 5, 3) on cpu; expected the dtype of 'query'",
        ),
        ({"query": torch.zeros(3, 4, 3)}, "expected the batch size of 'query', 3"),
        ({"query": torch.zeros(2, 4, 2)}, "expected the last dimension of 'query', 2"),
        ({"query": torch.zeros(2, 4, 3, device="meta")}, "'points': is on cpu; expected meta"),
        ({"k": -1}, "'k': is -1; expected an integer ≥ 0"),
        ({"k": 2.0}, "'k': is 2.0"),
        ({"points": torch.zeros(2, 0, 3)}, "'points': is an empty cloud with queries"),
        ({"norm": 3}, "'norm': is 3; expected one of 2, 1"),
        ({"pad": "zero"}, "'pad': is 'zero'; expected one of 'inf', 'pytorch3d'"),
        ({"index_dtype": torch.int16}, "'index_dtype': is torch.int16"),
        ({"lengths_p": torch.tensor([6, 1])}, "'lengths_p': holds 6; expected lengths from 0 to 5"),
        ({"lengths_q": torch.tensor([1])}, "'lengths_q': is int64 (1,) on cpu; expected one length per cloud, (2,)"),
        ({"query": torch.full((2, 4, 3), math.nan), "check_finite": True}, "'query': holds nan at (0, 0, 0)"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], words: str) -> None:
    given = {"query": torch.zeros(2, 4, 3), "points": torch.zeros(2, 5, 3), "k": 2} | change
    with pytest.raises(KernelArgumentError) as caught:
        kernels.knn(**given)  # type: ignore[arg-type]
    assert words in str(caught.value)
