"""The Jacobi eigen-solver in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_suite.errors import KernelBackendError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api.spectral import eigh_small, graph_laplacian


def solve(a: Tensor) -> tuple[Tensor, Tensor]:
    with dispatch.use_backend("triton"):
        return eigh_small(a)


def check(a: Tensor, w: Tensor, v: Tensor) -> None:
    a, w, v = a.double(), w.double(), v.double()
    n = a.shape[-1]
    size = torch.linalg.matrix_norm(a, ord=2).clamp(min=1e-30)[:, None, None]
    assert torch.linalg.matrix_norm((a @ v - v * w[:, None]) / size).max() < 5e-6 * n**0.5
    assert torch.linalg.matrix_norm(v.mT @ v - torch.eye(n)).max() < 5e-6 * n**0.5
    torch.testing.assert_close(w / size[:, 0], torch.linalg.eigvalsh(a) / size[:, 0], atol=2e-6, rtol=0)


def symmetric(batch: int, n: int) -> Tensor:
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(n))
    return (x + x.mT) / 2


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 16])
def test_eigenpairs(n: int) -> None:
    a = symmetric(2, n)
    check(a, *solve(a))


def test_special_matrices_side_by_side() -> None:
    grid = torch.diag(torch.tensor([2.0, 1, 2, 1, 2, 5]))
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    a = torch.stack([torch.zeros(6, 6), torch.eye(6), -3 * torch.eye(6), grid, torch.ones(6, 6), blocks])
    check(a, *solve(a))


def test_graph_laplacian() -> None:
    points = torch.nn.functional.normalize(torch.randn(2, 14, 3), dim=-1)
    for options in ({"kind": "inverse"}, {"kind": "knn", "k": 2}):
        laplacian = graph_laplacian(points, **options)
        check(laplacian, *solve(laplacian))


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_any_size(size: float) -> None:
    a = symmetric(1, 7) * size
    check(a, *solve(a))


def test_far_from_zero() -> None:
    a = symmetric(1, 7) + 1e4 * torch.eye(7)
    check(a, *solve(a))


def test_one_bad_matrix_leaves_the_others_right() -> None:
    a = symmetric(3, 5)
    good, _ = solve(a)
    a[0, 2, 1], a[2, 4, 4] = torch.nan, torch.inf
    w, v = solve(a)
    assert w[[0, 2]].isnan().all() and v[[0, 2]].isnan().all()
    assert torch.equal(w[1], good[1])


def test_lower_triangle_sign_and_layout() -> None:
    a = symmetric(1, 6)
    w, v = solve(a)
    assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()
    other_w, other_v = solve(a.tril() + 9 * torch.ones(6, 6).triu(1))
    assert torch.equal(w, other_w) and torch.equal(v, other_v)
    wide = torch.zeros(1, 6, 12)
    wide[:, :, ::2] = a
    assert torch.equal(solve(wide[:, :, ::2])[1], v)


def test_halves() -> None:
    a = symmetric(1, 6).bfloat16()
    w, v = solve(a)
    assert w.dtype == torch.float32
    check(a.float(), w, v)


def test_what_the_kernel_cannot_says_why() -> None:
    with pytest.raises(KernelBackendError, match="float64"):
        solve(symmetric(1, 4).double())
    with pytest.raises(KernelBackendError, match="128"):
        solve(torch.zeros(1, 129, 129))
