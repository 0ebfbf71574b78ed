"""Gather, group, scatter, interpolate: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from clouds import Place, cloud, places
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_suite import kernels
from peft_suite.errors import KernelArgumentError
from peft_suite.kernels.ops import points as ops

PLACES = places("torch")


def indices(batch: int, *shape: int, below: int, seed: int = 0, least: int = -1) -> torch.Tensor:
    """Random indices, among them −1."""
    return torch.randint(least, below, (batch, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("place", PLACES)
@given(
    batch=st.integers(1, 3),
    n=st.integers(1, 50),
    m=st.integers(1, 20),
    k=st.integers(1, 9),
    channels=st.sampled_from((1, 3, 5, 16, 129)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    index=st.sampled_from((torch.int32, torch.int64)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_values_and_gradients(place: Place, batch, n, m, k, channels, dtype, index, seed) -> None:  # type: ignore[no-untyped-def]
    x, idx = cloud("normal", batch, n, channels, dtype, seed), indices(batch, m, k, below=n, seed=seed).to(index)
    grad = cloud("normal", batch, m * k, channels, dtype, seed + 1).view(batch, m, k, channels)

    def run(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().to(device).requires_grad_()
        out = kernels.group_points(leaf, idx.to(device))
        out.backward(grad.to(device))
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        return out.detach().cpu(), leaf.grad.cpu()

    with kernels.use_backend("reference"):
        wanted = run("cpu")
    with place() as device:
        found = run(device)
    assert torch.equal(found[0], wanted[0])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
    assert float((found[1] - wanted[1]).double().norm()) <= tolerance * float(wanted[1].double().norm())


@pytest.mark.parametrize("place", PLACES)
def test_gradcheck(place: Place) -> None:
    if place.backend == "triton":
        pytest.skip("float64 goes through torch")
    with place() as device:
        x = cloud("normal", 2, 6, 2, torch.float64).to(device).requires_grad_()
        centres = cloud("normal", 2, 4, 2, torch.float64, 1).to(device).requires_grad_()
        weight = cloud("normal", 2, 4, 3, torch.float64, 2).to(device).requires_grad_()
        idx = indices(2, 4, 3, below=6).to(device)
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x: kernels.gather_points(x, idx[..., 0]), (x,))
            assert check(lambda x: kernels.group_points(x, idx, deterministic=True), (x,))
            assert check(lambda x, c: kernels.group_relative(x, c, idx), (x, centres))
            assert check(lambda x, w: kernels.three_interpolate(x, idx, w), (x, weight))


@pytest.mark.parametrize("place", PLACES)
def test_deterministic_sums(place: Place) -> None:
    with place() as device:
        g, idx = cloud("normal", 2, 5000, 16).to(device), indices(2, 5000, below=7).to(device)
        first = ops.scatter_rows(g, idx, 7, True)
        assert all(torch.equal(first, ops.scatter_rows(g, idx, 7, True)) for _ in range(10))
        exact = torch.zeros(2, 8, 16, dtype=torch.float64)
        exact.scatter_add_(1, (idx.cpu() % 8)[..., None].expand(-1, -1, 16), g.cpu().double())
        torch.testing.assert_close(first.cpu().double(), exact[:, :7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_group_relative(place: Place, index: torch.dtype) -> None:
    xyz, centers, idx = cloud("shifted", 2, 50), cloud("shifted", 2, 9, seed=1), indices(2, 9, 5, below=50).to(index)
    wanted = torch.where((idx >= 0)[..., None], kernels.group_points(xyz, idx) - centers[:, :, None], 0)
    with place() as device:
        found = kernels.group_relative(xyz.to(device), centers.to(device), idx.to(device))
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_three_interpolate(place: Place, dtype: torch.dtype, k: int) -> None:
    feats, idx = cloud("normal", 2, 30, 20, dtype), indices(2, 70, k, below=30, least=0)
    weight = torch.rand(2, 70, k)
    exact = (kernels.group_points(feats.double(), idx) * weight.double()[..., None]).sum(2)
    with place() as device:
        found = kernels.three_interpolate(feats.to(device), idx.to(device), weight.to(device))
    assert found.dtype == dtype
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert float((found.cpu().double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("place", places("torch", "numba"))
def test_three_nn_and_interpolate(place: Place) -> None:
    unknown, known, feats = cloud("normal", 2, 80), cloud("normal", 2, 20, seed=1), cloud("normal", 2, 20, 6, seed=2)
    with place() as device:
        unknown, known, feats = (t.to(device) for t in (unknown, known, feats))
        dist, idx = kernels.three_nn(unknown, known, index_dtype=torch.int32)
        assert idx.dtype == torch.int32
        whole = (unknown[:, :, None] - known[:, None]).square().sum(-1).sort(-1)
        assert torch.equal(idx.long(), whole.indices[..., :3])
        torch.testing.assert_close(dist, whole.values[..., :3].sqrt())
        for power in (1, 2):
            weight = 1 / (dist**power + 1e-8)
            weight = weight / weight.sum(-1, keepdim=True)
            wanted = kernels.three_interpolate(feats, idx, weight)
            torch.testing.assert_close(kernels.interpolate(unknown, known, feats, power=power), wanted)  # type: ignore[arg-type]
        few, at = kernels.three_nn(unknown, known[:, :2])
        assert torch.isinf(few[..., 2]).all() and (at[..., 2] == 0).all()
        one = kernels.interpolate(unknown, known[:, :1], feats[:, :1])
        assert torch.equal(one, feats[:, :1].expand(-1, 80, -1))
        same_place = kernels.interpolate(known, known, feats)
        torch.testing.assert_close(same_place, feats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_operator_contract_and_full_graph(place: Place) -> None:
    with place() as device:
        x, idx = cloud("normal", 2, 9, 4).to(device), indices(2, 5, 3, below=9).to(device)
        centres, weight = cloud("normal", 2, 5, 4).to(device), torch.rand(2, 5, 3, device=device)
        leaf = x.clone().requires_grad_()
        for given in (x, leaf):
            torch.library.opcheck(torch.ops.peft_suite.gather_rows.default, (given, idx[..., 0].contiguous(), False))
            torch.library.opcheck(torch.ops.peft_suite.scatter_rows.default, (given[:, :5], idx[..., 0], 9, True))
            torch.library.opcheck(torch.ops.peft_suite.group_relative.default, (given, centres, idx))
            torch.library.opcheck(torch.ops.peft_suite.weighted_rows.default, (given, idx, weight))

        def step(x: torch.Tensor) -> torch.Tensor:
            relative = kernels.group_relative(x, centres, idx)
            return (kernels.group_points(x, idx) * relative).sum() + kernels.three_interpolate(x, idx, weight).sum()

        run = torch.compile(step, fullgraph=True, backend="aot_eager")
        [wanted] = torch.autograd.grad(step(leaf), leaf)
        [found] = torch.autograd.grad(run(leaf), leaf)
        torch.testing.assert_close(found, wanted)


def test_ragged_batches() -> None:
    lengths = torch.tensor([3, 0, 5])
    packed = torch.randn(8, 4)
    padded = kernels.unpack(packed, lengths)
    assert padded.shape == (3, 5, 4) and (padded[1] == 0).all()
    assert torch.equal(kernels.pack(padded, lengths), packed)
    with pytest.raises(KernelArgumentError, match="add up to 8 rows"):
        kernels.unpack(packed, torch.tensor([3, 3]))
    with pytest.raises(KernelArgumentError, match="from 0 to 5"):
        kernels.pack(padded, torch.tensor([3, 0, 6]))


def test_empty() -> None:
    x = torch.zeros(2, 4, 3, requires_grad=True)
    assert kernels.gather_points(x, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 3)
    kernels.group_points(x, torch.zeros(2, 3, 0, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and (x.grad == 0).all()
    none = torch.full((2, 3), -1)
    assert (kernels.gather_points(torch.zeros(2, 0, 3), none) == 0).all()
    assert kernels.three_interpolate(x, torch.zeros(2, 0, 3, dtype=torch.int64), torch.zeros(2, 0, 3)).shape == (
        2,
        0,
        3,
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, i: kernels.gather_points(x, i), "'idx': has 3 dimensions"),
        (lambda x, i: kernels.group_points(x, i.float()), "'idx': has dtype float32"),
        (lambda x, i: kernels.group_points(x.long(), i), "'x': has dtype int64"),
        (lambda x, i: kernels.group_points(x, i + 9), "expected indices from -1 to 3"),
        (lambda x, i: kernels.group_points(x, i - 2), "'idx': holds -2"),
        (lambda x, i: kernels.group_points(x, i[:1]), "expected the batch size of 'x', 2"),
        (lambda x, i: kernels.group_relative(x, x[:, :3], i), "expected one row per centre, M = 3"),
        (lambda x, i: kernels.three_interpolate(x, i, torch.ones(2, 5, 2)), "expected one weight per index"),
        (lambda x, i: kernels.three_nn(x[..., :2], x), "expected the last dimension of 'query', 2"),
        (lambda x, i: kernels.interpolate(x, x, x, power=3), "'power': is 3"),  # type: ignore[arg-type]
        (lambda x, i: kernels.interpolate(x, x, x, k=0), "'k': is 0; expected an integer ≥ 1"),
    ],
)
def test_bad_input_names_the_argument(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KernelArgumentError) as caught:
        call(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3, dtype=torch.int64))
    assert words in str(caught.value)
