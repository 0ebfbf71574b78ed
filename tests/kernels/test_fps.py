"""Farthest point sampling: exact picks on every back end, by both rules."""

from __future__ import annotations

import math

import pytest
import torch
from clouds import KINDS, Place, cloud, places
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_suite import kernels
from peft_suite.errors import KernelArgumentError
from peft_suite.kernels.reference.points import pointnet2_tie_order

PLACES = places("torch", "numba")


def same(place: Place, points: torch.Tensor, m: int, **options: object) -> None:
    """The place's picks are the reference's."""
    with kernels.use_backend("reference"):
        wanted = kernels.farthest_point_sampling(points, m, **options)  # type: ignore[arg-type]
    with place() as device:
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        found = kernels.farthest_point_sampling(points.to(device), m, **moved)  # type: ignore[arg-type]
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("place", PLACES)
@given(
    kind=st.sampled_from(KINDS),
    rule=st.sampled_from(("standard", "pointnet2")),
    batch=st.integers(1, 3),
    n=st.integers(1, 150),
    m=st.integers(1, 60),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_picks_of_the_reference(place: Place, kind, rule, batch, n, m, dtype, seed, data) -> None:  # type: ignore[no-untyped-def]
    options: dict[str, object] = {"rule": rule, "start": data.draw(st.integers(0, n - 1))}
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch))
        options["lengths"] = torch.tensor(lengths)
        options["start"] = torch.tensor([data.draw(st.integers(0, max(v - 1, 0))) for v in lengths])
    same(place, cloud(kind, batch, n, 3, dtype, seed) * 0.1, m, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["normal", "grid", "identical", "shifted", "holes"])
@pytest.mark.parametrize(("n", "m"), [(1024, 128), (2048, 90), (8192, 60), (9001, 50), (20000, 40)])
def test_sizes_where_other_code_paths_begin(place: Place, kind: str, n: int, m: int) -> None:
    for rule in ("standard", "pointnet2"):
        same(place, cloud(kind, 1, n), m, rule=rule, start=n // 2)


@pytest.mark.parametrize("place", PLACES)
def test_every_point_once_then_repeats(place: Place) -> None:
    points = cloud("normal", 2, 40)
    with place() as device:
        idx = kernels.farthest_point_sampling(points.to(device), 45, index_dtype=torch.int32).cpu()
    assert idx.dtype == torch.int32
    assert all(len(set(row[:40].tolist())) == 40 for row in idx)
    assert (idx[:, 40:] == 0).all()  # exhausted: the lowest index again and again


@pytest.mark.parametrize("place", places("torch", "numba", "reference"))
def test_points_near_the_origin_are_left_out_by_the_old_rule(place: Place) -> None:
    points = torch.tensor([[[0.0, 0, 0], [0.01, 0, 0], [1, 0, 0], [0, 0.03, 0], [0, 0, 2]]])
    with place() as device:
        for rule, wanted in (("pointnet2", [0, 4, 2, 4, 4]), ("standard", [0, 4, 2, 3, 1])):
            picks = kernels.farthest_point_sampling(points.to(device), 5, rule=rule)  # type: ignore[arg-type]
            assert picks[0].tolist() == wanted


def test_tie_order_is_the_thread_block_reduction() -> None:
    """The closed form against a thread-by-thread simulation of scan and tree reduction."""
    make = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 13, 64, 100, 511, 512, 700, 3000):
        value = torch.randint(0, 3, (n,), generator=make).tolist()
        threads = min(512, 1 << int(math.log2(n)))
        slots = []
        for t in range(threads):
            best = (-1, 0)
            for i in range(t, n, threads):
                if value[i] > best[0]:
                    best = (value[i], i)
            slots.append(best)
        step = threads // 2
        while step:
            for t in range(step):
                if slots[t + step][0] > slots[t][0]:
                    slots[t] = slots[t + step]
            step //= 2
        rank = pointnet2_tie_order(n).tolist()
        assert slots[0][1] == min((i for i in range(n) if value[i] == max(value)), key=lambda i: rank[i])


@pytest.mark.parametrize("place", PLACES)
def test_permuting_the_cloud_permutes_the_picks(place: Place) -> None:
    points, order = cloud("normal", 1, 300), torch.randperm(300, generator=torch.Generator().manual_seed(1))
    inverse = torch.argsort(order)
    with place() as device:
        plain = kernels.farthest_point_sampling(points.to(device), 50, start=7).cpu()
        moved = kernels.farthest_point_sampling(points[:, order].to(device), 50, start=int(inverse[7])).cpu()
    assert torch.equal(order[moved[0]], plain[0])


@pytest.mark.parametrize("place", PLACES)
def test_options(place: Place) -> None:
    with place() as device:
        points = cloud("normal", 3, 30).to(device)
        lengths = torch.tensor([4, 0, 30], device=device)
        idx = kernels.farthest_point_sampling(points, 6, lengths=lengths, pad="pytorch3d")
        assert (idx[0, 4:] == -1).all() and (idx[1] == -1).all() and (idx[2] >= 0).all()
        make = torch.Generator().manual_seed(3)
        one = kernels.farthest_point_sampling(points, 6, start="random", generator=make)
        two = kernels.farthest_point_sampling(points, 6, start="random", generator=make.manual_seed(3))
        assert torch.equal(one, two) and len(set(one[:, 0].tolist())) > 1
        drawn = kernels.farthest_point_sampling(points, 6, start="random", lengths=lengths)
        assert (drawn[0] < 4).all()
        assert kernels.farthest_point_sampling(points[:0], 6).shape == (0, 6)
        assert kernels.farthest_point_sampling(points, 0).shape == (3, 0)
        same(place, cloud("normal", 2, 40, 6)[..., ::2].cpu(), 9)
        same(place, cloud("normal", 2, 40, 2), 9)


@pytest.mark.parametrize("place", places("torch", "numba"))
def test_operator_contract_and_full_graph(place: Place) -> None:
    with place() as device:
        points, start = cloud("normal", 2, 20).to(device), torch.tensor([0, 3], device=device)
        torch.library.opcheck(
            torch.ops.peft_suite.farthest_point_sampling.default,
            (points, 7, start, None, "pointnet2", torch.int32, False),
        )
        run = torch.compile(lambda p: kernels.farthest_point_sampling(p, 7), fullgraph=True, backend="aot_eager")
        assert torch.equal(run(points), kernels.farthest_point_sampling(points, 7))


@pytest.mark.parametrize("place", PLACES)
def test_repeatable(place: Place) -> None:
    with place() as device:
        points = cloud("grid", 4, 900).to(device)
        first = kernels.farthest_point_sampling(points, 64)
        assert all(torch.equal(first, kernels.farthest_point_sampling(points, 64)) for _ in range(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"points": torch.zeros(4, 3)}, "'points': has 2 dimensions"),
        ({"points": torch.zeros(2, 4, 3).int()}, "'points': has dtype int32"),
        ({"m": -2}, "'m': is -2; expected an integer ≥ 0"),
        ({"points": torch.zeros(2, 0, 3)}, "'points': is an empty cloud with samples asked of it"),
        ({"start": 4}, "'start': is 4; expected an index below N = 4, a tensor (B,) or 'random'"),
        ({"start": "first"}, "'start': is 'first'"),
        ({"start": torch.tensor([0, 9])}, "'start': holds 9"),
        (
            {"start": torch.tensor([0, 3]), "lengths": torch.tensor([4, 2])},
            "'start': holds [0, 3]; expected indices below",
        ),
        ({"rule": "cuda"}, "'rule': is 'cuda'; expected one of 'standard', 'pointnet2'"),
        ({"points": torch.zeros(2, 4, 2), "rule": "pointnet2"}, "'points': has last dimension 2"),
        ({"lengths": torch.tensor([5, 1])}, "'lengths': holds 5"),
        ({"points": torch.full((2, 4, 3), math.inf), "check_finite": True}, "'points': holds inf at (0, 0, 0)"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], words: str) -> None:
    given = {"points": torch.zeros(2, 4, 3), "m": 2} | change
    with pytest.raises(KernelArgumentError) as caught:
        kernels.farthest_point_sampling(**given)  # type: ignore[arg-type]
    assert words in str(caught.value)
