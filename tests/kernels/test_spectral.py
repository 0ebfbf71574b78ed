"""The small eigen-solver, graph Laplacians, Fourier bases and z-order against definitions in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_suite.errors import KernelArgumentError, KernelBackendError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api import spectral
from peft_suite.kernels.api.spectral import eigh_small, graph_fourier_basis, graph_laplacian, morton_order
from peft_suite.kernels.reference import spectral as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest):
    kind = "cuda" if request.param == "triton" else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with dispatch.use_backend(request.param):
        yield kind


def symmetric(batch: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x + x.mT) / 2).to(dtype)


def check(a: Tensor, w: Tensor, v: Tensor) -> None:
    """Eigenpairs of the lower triangle, orthonormal, ascending; residuals relative to the 2-norm.

    The Jacobi kernel scales by Gershgorin's bounds, which can be wider than the spectrum: there, relative to those.
    """
    jacobi = w.is_cuda
    a, w, v = (t.detach().cpu().double() for t in (a, w, v))
    a = a.tril() + a.tril(-1).mT
    n = a.shape[-1]
    norm = a.abs().sum(2).amax(1) if jacobi else torch.linalg.matrix_norm(a, 2)
    size = norm.clamp(min=1e-300)[:, None, None]
    limit = 5e-6 * n**0.5
    assert torch.linalg.matrix_norm((a @ v - v * w[:, None]) / size).max() < limit
    assert torch.linalg.matrix_norm(v.mT @ v - torch.eye(n)).max() < limit
    assert (w.diff(dim=1) >= 0).all()
    torch.testing.assert_close(w / size[:, 0], torch.linalg.eigvalsh(a) / size[:, 0], atol=2e-6, rtol=0)


def cloud(batch: int, group: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(batch, group, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


# eigen-solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 16, 31, 32, 33, 64, 100, 128])
def test_eigenpairs(device: str, n: int) -> None:
    a = symmetric(3, n).to(device)
    w, v = eigh_small(a)
    assert w.dtype == v.dtype == torch.float32 and v.is_contiguous()
    check(a, w, v)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_eigenpairs_of_any_size(device: str, size: float) -> None:
    a = symmetric(2, 10).to(device) * size
    check(a, *eigh_small(a))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(12, 12),
        torch.eye(12),
        torch.eye(12) * -3,
        torch.diag(torch.tensor([2.0, 1, 2, 1, 2, 5])),
        torch.ones(9, 9),
        torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)),
    ],
    ids=["zero", "identity", "negative", "diagonal", "ones", "blocks"],
)
def test_repeated_eigenvalues(device: str, matrix: Tensor) -> None:
    a = matrix[None].to(device)
    check(a, *eigh_small(a))


def test_disconnected_graph(device: str) -> None:
    points = torch.cat([cloud(2, 10), cloud(2, 10, seed=1) + 100], 1).to(device)
    laplacian = graph_laplacian(points, "knn", k=3)
    w, v = eigh_small(laplacian)
    check(laplacian, w, v)
    assert (w[:, :2].abs() < 1e-5).all()


def test_one_bad_matrix_leaves_the_others_right(device: str) -> None:
    a = symmetric(5, 12).to(device)
    good, _ = eigh_small(a)
    a[1, 3, 2] = torch.nan
    a[3, 0, 0] = torch.inf
    w, v = eigh_small(a)
    for bad in (1, 3):
        assert w[bad].isnan().all() and v[bad].isnan().all()
    for rest in (0, 2, 4):
        torch.testing.assert_close(w[rest], good[rest], atol=1e-5, rtol=0)


def test_only_the_lower_triangle_counts(device: str) -> None:
    a = symmetric(2, 8).to(device)
    w, v = eigh_small(a)
    noisy = a.tril() + torch.full_like(a, torch.nan).triu(1).nan_to_num(nan=7.0)
    other_w, other_v = eigh_small(noisy)
    assert torch.equal(w, other_w) and torch.equal(v, other_v)


def test_sign_rule(device: str) -> None:
    _, v = eigh_small(symmetric(4, 20).to(device))
    top = v.abs().argmax(1, keepdim=True)
    assert (v.gather(1, top) > 0).all()
    _, raw = eigh_small(symmetric(4, 20).to(device), sign="none")
    torch.testing.assert_close(raw.abs(), v.abs())


def test_sign_tie_goes_to_the_lowest_row() -> None:
    v = torch.tensor([[[-0.5, 0.5], [0.5, -0.5]]])
    assert torch.equal(reference.fix_signs(v), torch.tensor([[[0.5, 0.5], [-0.5, -0.5]]]))


def test_permutation_keeps_eigenvalues(device: str) -> None:
    a = symmetric(2, 17).to(device)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(eigh_small(a)[0], eigh_small(a[:, order][:, :, order])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_compute_in_float32(dtype: torch.dtype) -> None:
    a = symmetric(2, 12, dtype)
    w, v = eigh_small(a)
    assert w.dtype == v.dtype == torch.float32
    check(a, w, v)


def test_float64_and_layouts() -> None:
    a = symmetric(2, 9, torch.float64)
    w, v = eigh_small(a)
    torch.testing.assert_close(a @ v, v * w[:, None], atol=1e-13, rtol=0)
    wide = torch.zeros(2, 9, 18, dtype=torch.float64)
    wide[:, :, ::2] = a
    torch.testing.assert_close(eigh_small(wide[:, :, ::2])[0], w)
    torch.testing.assert_close(eigh_small(a.mT)[0], w)
    one = a[:1].expand(3, 9, 9)
    torch.testing.assert_close(eigh_small(one)[0], w[:1].expand(3, 9))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    w, v = eigh_small(torch.empty(shape, device=device))
    assert w.shape == shape[:2] and v.shape == shape


def test_gradient() -> None:
    def energy(x: Tensor) -> tuple[Tensor, Tensor]:
        w, v = eigh_small((x + x.mT) / 2)
        return w, v

    x = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(energy, (x,))
        w, v = eigh_small((x + x.mT) / 2)
        ours = torch.autograd.grad((w**2).sum() + (v[:, 0] ** 3).sum(), x)[0]
        tw, tv = torch.linalg.eigh((x + x.mT) / 2)
        theirs = torch.autograd.grad((tw**2).sum() + (reference.fix_signs(tv)[:, 0] ** 3).sum(), x)[0]
    torch.testing.assert_close(ours, theirs)


def test_gradient_warns_once() -> None:
    spectral._warn_gaps.cache_clear()
    a = symmetric(1, 3).requires_grad_()
    with pytest.warns(UserWarning, match="gaps between eigenvalues"):
        eigh_small(a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigh_small(a)
        eigh_small(a.detach())


@pytest.mark.parametrize("sign", ["max", "none"])
def test_opcheck(sign: str) -> None:
    torch.library.opcheck(torch.ops.peft_suite.eigh_small.default, (symmetric(2, 6), sign))
    torch.library.opcheck(torch.ops.peft_suite.eigh_small.default, (symmetric(2, 4).requires_grad_(), sign))


def test_reference_agrees_on_values() -> None:
    a = symmetric(3, 12)
    w, v = eigh_small(a)
    ref_w, ref_v = reference.eigh_small(a)
    torch.testing.assert_close(w, ref_w, atol=2e-6, rtol=0)
    torch.testing.assert_close(v, reference.fix_signs(ref_v), atol=1e-4, rtol=0)


def test_triton_on_the_cpu_says_why() -> None:
    with dispatch.use_backend("triton"), pytest.raises(KernelBackendError, match="eigh_small"):
        eigh_small(symmetric(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": torch.zeros(3, 3)}, "'a'.*2 dimensions"),
        ({"a": torch.zeros(2, 3, 4)}, "'a'.*not square"),
        ({"a": torch.zeros(2, 3, 3, dtype=torch.int64)}, "'a'.*int64"),
        ({"a": torch.zeros(2, 3, 3), "sign": "first"}, "'sign'.*first"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        eigh_small(**arguments)


# Laplacians ---------------------------------------------------------------------------------------------------------

KINDS = [
    {"kind": "inverse"},
    {"kind": "inverse", "delta": "batch"},
    {"kind": "gaussian"},
    {"kind": "gaussian", "delta": "batch"},
    {"kind": "gaussian", "sigma": 0.4},
    {"kind": "knn", "k": 4},
    {"kind": "knn", "k": 99},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("where", DEVICES)
def test_laplacian_follows_the_definition(options: dict, normalized: bool, where: str) -> None:
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for group in (1, 2, 33, 64):
        points = cloud(3, group) + 5
        ours = graph_laplacian(points.to(where), normalized=normalized, **options).cpu()
        wanted = reference.graph_laplacian(points.double(), normalized=normalized, **options)
        assert ours.dtype == torch.float32 and torch.equal(ours, ours.mT)
        torch.testing.assert_close(ours.double(), wanted, atol=1e-4 if not normalized else 2e-5, rtol=1e-4)
        if not normalized:
            assert ours.sum(2).abs().max() < 1e-4 * group
        elif options["kind"] != "knn":
            w = torch.linalg.eigvalsh(ours)
            assert w.min() > -1e-5 and w.max() < 2 + 1e-5


def test_inverse_weights_by_hand() -> None:
    # distances 1, 2, 3 on a line: δ = 1, weights 1, 1/2, 1/3
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
    weights = torch.tensor([[[1, 1, 1 / 3], [1, 1, 1 / 2], [1 / 3, 1 / 2, 1]]])
    degree = weights.sum(2)
    root = (degree + 1e-6).rsqrt()
    torch.testing.assert_close(graph_laplacian(points), torch.eye(3) - weights * root[:, :, None] * root[:, None])
    torch.testing.assert_close(graph_laplacian(points, normalized=False), torch.diag_embed(degree) - weights)


def test_delta_of_the_batch_is_faithful_and_of_the_cloud_is_batch_invariant() -> None:
    points = cloud(3, 40)
    points[1] *= 0.01
    alone = torch.cat([graph_laplacian(p[None]) for p in points])
    assert torch.equal(graph_laplacian(points), alone)
    faithful = graph_laplacian(points, delta="batch")
    assert (faithful[0] - alone[0]).abs().max() > 0.01
    distance = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    delta = distance[distance > 0].min()
    weights = 1 / (distance / delta + torch.eye(40))
    root = (weights.sum(2) + 1e-6).rsqrt()
    wanted = torch.eye(40) - root[:, :, None] * weights * root[:, None]
    torch.testing.assert_close(faithful.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_coinciding_points_stay_finite(options: dict) -> None:
    points = cloud(2, 12)
    points[0, 3] = points[0, 7]
    points[1] = points[1, :1]
    laplacian = graph_laplacian(points, **options)
    assert torch.isfinite(laplacian).all()
    if options["kind"] == "inverse":
        twins = reference.graph_weights(points, **options)
        assert twins[0, 3, 7] == 1 and (twins[1] == 1).all()
    check(laplacian, *graph_fourier_basis(points, **options))


def test_a_cloud_with_nan_leaves_the_others_right() -> None:
    points = cloud(3, 12)
    good = graph_fourier_basis(points)
    points[1, 5, 0] = torch.nan
    basis = graph_fourier_basis(points)
    assert basis.v[1].isnan().all()
    for rest in (0, 2):
        torch.testing.assert_close(basis.w[rest], good.w[rest], atol=1e-5, rtol=0)


def test_far_from_the_origin() -> None:
    points = (cloud(2, 64) * 64).round() / 64
    torch.testing.assert_close(graph_laplacian(points + 128), graph_laplacian(points), atol=0, rtol=0)


def test_laplacian_dtypes_and_gradients() -> None:
    points = cloud(2, 16)
    assert graph_laplacian(points.double()).dtype == torch.float64
    half = graph_laplacian(points.half())
    assert half.dtype == torch.float32
    assert torch.equal(half, graph_laplacian(points.half().float()))
    assert not graph_laplacian(points.requires_grad_()).requires_grad
    assert not graph_fourier_basis(points).v.requires_grad


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_laplacian_empty(shape: tuple[int, ...]) -> None:
    assert graph_laplacian(torch.empty(shape)).shape == (shape[0], shape[1], shape[1])
    assert graph_fourier_basis(torch.empty(shape)).v.shape == (shape[0], shape[1], shape[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosine"}, "'kind'.*cosine"),
        ({"delta": "all"}, "'delta'"),
        ({"kind": "knn"}, "'k'"),
        ({"k": 3}, "'k'"),
        ({"kind": "knn", "k": 0}, "'k'"),
        ({"sigma": 1.0}, "'sigma'"),
        ({"kind": "gaussian", "sigma": 0.0}, "'sigma'"),
    ],
)
def test_laplacian_bad_options(options: dict, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        graph_laplacian(cloud(1, 4), **options)
    with pytest.raises(KernelArgumentError, match="'points'"):
        graph_laplacian(cloud(1, 4)[0])


# bases --------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(group=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_basis_transforms_there_and_back(group: int, seed: int, scale: float) -> None:
    points = cloud(2, group, seed) * scale
    basis = graph_fourier_basis(points)
    w, v = basis
    check(graph_laplacian(points), w, v)
    x = torch.randn(2, group, 5)
    torch.testing.assert_close(basis.inverse(basis.forward(x)), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.forward(x), v.mT @ x)
    assert basis.to(torch.float64).forward(x.double()).dtype == torch.float64
    assert basis.forward(x.bfloat16()).dtype == torch.bfloat16


def test_basis_gives_tokens_gradients() -> None:
    basis = graph_fourier_basis(cloud(2, 6, dtype=torch.float64))
    x = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: basis.inverse(torch.tanh(basis.forward(t))), (x,))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler: str) -> None:
    def step(points: Tensor, x: Tensor) -> Tensor:
        basis = graph_fourier_basis(points)
        return basis.inverse(torch.relu(basis.forward(x)))

    points, x = cloud(2, 12), torch.randn(2, 12, 4)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(points, x), step(points, x), atol=1e-4, rtol=0)


def test_repeatable(device: str) -> None:
    points = cloud(4, 64).to(device)
    first, second = graph_fourier_basis(points), graph_fourier_basis(points)
    assert torch.equal(first.v, second.v) and torch.equal(first.w, second.w)


# z-order ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bits=st.sampled_from([3, 10, 16, 20]), scale=st.sampled_from([1.0, 100.0]))
def test_morton_follows_the_definition(data: st.DataObject, bits: int, scale: float) -> None:
    coordinate = st.one_of(st.integers(-4, 4), st.floats(-2, 2, width=32), st.sampled_from([torch.nan, torch.inf]))
    count = data.draw(st.integers(0, 9))
    points = torch.tensor(data.draw(st.lists(coordinate, min_size=count * 3, max_size=count * 3)), dtype=torch.float32)
    points = points.view(1, count, 3)
    order, inverse = morton_order(points, scale=scale, bits=bits)
    keys = reference.morton_keys(points, scale, bits)[0]
    assert order[0].tolist() == sorted(range(count), key=keys.__getitem__)
    assert torch.equal(order.gather(1, inverse), torch.arange(count)[None])


def test_morton_by_hand() -> None:
    # 100·c truncated: (0, 1, 0) -> key 4, (1, 0, 0) -> 2, (0, 0, 1) -> 1, (−1, 0, 0) -> every x bit
    points = torch.tensor([[[0, 0.019, 0], [0.01, 0, 0], [0, 0, 0.0101], [-0.01, 0, 0], [0.009, -0.009, 0]]])
    assert morton_order(points).order.tolist() == [[4, 2, 1, 0, 3]]


def test_morton_bad_input() -> None:
    with pytest.raises(KernelArgumentError, match="'points'"):
        morton_order(torch.zeros(1, 4, 2))
    with pytest.raises(KernelArgumentError, match="'bits'"):
        morton_order(torch.zeros(1, 4, 3), bits=21)
    with pytest.raises(KernelArgumentError, match="'scale'"):
        morton_order(torch.zeros(1, 4, 3), scale=0)


def test_numpy_agrees() -> None:
    a = symmetric(4, 24)
    np.testing.assert_allclose(eigh_small(a)[0].numpy(), np.linalg.eigh(a.double().numpy())[0], atol=2e-5)
