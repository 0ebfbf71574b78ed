"""Ball query: exactly the first k in index order, on every back end."""

from __future__ import annotations

import pytest
import torch
from clouds import KINDS, Place, cloud, places
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_suite import kernels
from peft_suite.errors import KernelArgumentError

PLACES = places("torch", "numba")


def same(place: Place, query: torch.Tensor, points: torch.Tensor, radius: float, k: int, **options: object) -> None:
    """The place's answer is the reference's."""
    with kernels.use_backend("reference"):
        wanted = kernels.ball_query(query, points, radius, k, **options)  # type: ignore[arg-type]
    with place() as device:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        found = kernels.ball_query(query.to(device), points.to(device), radius, k, **moved)  # type: ignore[arg-type]
    assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("place", PLACES)
@given(
    kind=st.sampled_from(KINDS),
    pad=st.sampled_from(("first", "pytorch3d")),
    radius=st.sampled_from((0.1, 0.5, 0.70001, 1.0, 3.0)),
    batch=st.integers(1, 3),
    n_query=st.integers(1, 33),
    n=st.integers(1, 200),
    k=st.integers(1, 40),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_hits_of_the_reference(place: Place, kind, pad, radius, batch, n_query, n, k, dtype, seed, data) -> None:  # type: ignore[no-untyped-def]
    options: dict[str, object] = {"pad": pad}
    if data.draw(st.booleans()):
        options["lengths_p"] = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch)))
        options["lengths_q"] = torch.tensor(
            data.draw(st.lists(st.integers(0, n_query), min_size=batch, max_size=batch))
        )
    query, points = cloud(kind, batch, n_query, 3, dtype, seed), cloud(kind, batch, n, 3, dtype, seed + 1)
    same(place, query, points, radius, k, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("n_query", "n", "k", "radius"), [(512, 8192, 32, 0.2), (64, 20000, 16, 0.1), (9, 3000, 64, 5.0)]
)
def test_larger_clouds(place: Place, n_query: int, n: int, k: int, radius: float) -> None:
    points = cloud("normal", 2, n)
    same(place, points[:, :n_query], points, radius, k)


@pytest.mark.parametrize("place", places("torch", "numba", "reference"))
def test_the_sphere_itself_is_outside_and_empty_rows_are_filled(place: Place) -> None:
    points = torch.tensor([[[0.5, 0, 0], [0, 0.25, 0], [0, 0, 0.4], [9, 9, 9]]])
    query = torch.tensor([[[0.0, 0, 0], [5, 5, 5]]])
    with place() as device:
        first = kernels.ball_query(query.to(device), points.to(device), 0.5, 4)
        assert first.tolist() == [[[1, 2, 1, 1], [0, 0, 0, 0]]]  # type: ignore[union-attr]
        idx, dists = kernels.ball_query(
            query.to(device), points.to(device), 0.5, 4, pad="pytorch3d", return_dists=True, index_dtype=torch.int32
        )
        assert idx.dtype == torch.int32 and idx.tolist() == [[[1, 2, -1, -1], [-1] * 4]]
        torch.testing.assert_close(dists.cpu()[0, 0], torch.tensor([0.0625, 0.16, 0, 0]))
        assert (dists[0, 1] == 0).all()


@pytest.mark.parametrize("place", places("torch"))
def test_gradient_of_distances(place: Place) -> None:
    query = cloud("normal", 1, 4, dtype=torch.float64) * 0.3
    points = cloud("normal", 1, 9, dtype=torch.float64, seed=1) * 0.3
    with place() as device:
        inputs = [t.to(device).requires_grad_() for t in (query, points)]
        assert torch.autograd.gradcheck(
            lambda q, p: kernels.ball_query(q, p, 0.8, 4, pad="pytorch3d", return_dists=True)[1], inputs
        )


@pytest.mark.parametrize("place", PLACES)
def test_empty_and_strided(place: Place) -> None:
    with place() as device:
        points = cloud("normal", 2, 60, 6).to(device)
        assert kernels.ball_query(points[:0], points[:0], 1.0, 3).shape == (0, 60, 3)  # type: ignore[union-attr]
        assert kernels.ball_query(points[:, :0], points, 1.0, 3).shape == (2, 0, 3)  # type: ignore[union-attr]
        assert kernels.ball_query(points, points, 1.0, 0).shape == (2, 60, 0)  # type: ignore[union-attr]
    same(place, points[:, ::4, ::2].cpu(), points[:, 1::2, ::2].cpu(), 1.5, 5)


@pytest.mark.parametrize("place", PLACES)
def test_operator_contract_and_full_graph(place: Place) -> None:
    with place() as device:
        query, points = cloud("normal", 2, 5).to(device), cloud("normal", 2, 20).to(device)
        torch.library.opcheck(
            torch.ops.peft_suite.ball_query.default,
            (query, points, 0.7, 4, None, None, "first", torch.int64, False),
        )
        run = torch.compile(lambda q, p: kernels.ball_query(q, p, 0.7, 4), fullgraph=True, backend="aot_eager")
        assert torch.equal(run(query, points), kernels.ball_query(query, points, 0.7, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"radius": 0}, "'radius': is 0; expected a finite number above 0"),
        ({"radius": torch.ones(1)}, "'radius': is Tensor; expected a Python number above 0"),
        ({"k": -1}, "'k': is -1"),
        ({"pad": "inf"}, "'pad': is 'inf'; expected one of 'first', 'pytorch3d'"),
        ({"points": torch.zeros(2, 0, 3)}, "'points': is an empty cloud with queries"),
        ({"query": torch.zeros(2, 4)}, "'query': has 2 dimensions"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], words: str) -> None:
    given = {"query": torch.zeros(2, 4, 3), "points": torch.zeros(2, 5, 3), "radius": 0.5, "k": 2} | change
    with pytest.raises(KernelArgumentError) as caught:
        kernels.ball_query(**given)  # type: ignore[arg-type]
    assert words in str(caught.value)
