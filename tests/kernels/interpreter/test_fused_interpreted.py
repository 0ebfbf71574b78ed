"""The scale-and-shift and bottleneck kernels in Triton's interpreter: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_suite.errors import KernelBackendError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api.fused import bottleneck_adapter, ssf
from peft_suite.kernels.ops import fused as ops
from peft_suite.kernels.reference.fused import ACTIVATIONS

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def triton():
    with dispatch.use_backend("triton"):
        yield


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(leaves: list[Tensor], run: Any, dtype: torch.dtype) -> None:
    """The kernel's output and gradients against the reference's in float64."""
    ours = [t.detach().requires_grad_() for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = run(*ours)
    g = randn(*y.shape, seed=99, dtype=dtype)
    got = [y, *torch.autograd.grad(y, ours, g)]
    with dispatch.use_backend("reference"):
        true = run(*wide)
        wanted = [true, *torch.autograd.grad(true, wide, g.double())]
    for one, other, leaf in zip(got, wanted, [y, *leaves]):
        assert one.dtype == leaf.dtype
        # the gradient of one number is a sum of terms that cancel
        size = y.numel() ** 0.5 if other.numel() == 1 else other.norm().item()
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), 1), ((3, 70, 100), 2), ((2, 5, 3, 7), 1), ((4, 1030), 1)], ids=str)
def test_ssf(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    n = shape[dim]
    leaves = [randn(*shape, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype), randn(n, seed=3, dtype=dtype)]
    both(leaves, lambda x, s, b: ssf(x, s, b, channel_dim=dim), dtype)


def test_ssf_more_rows_than_programs() -> None:
    from peft_suite.kernels.triton import ssf as module

    before, module.PROGRAMS = module.PROGRAMS, 3
    try:
        leaves = [randn(60, 1024, seed=1), randn(1024, seed=2), randn(1024, seed=3)]
        both(leaves, ssf, torch.float32)
    finally:
        module.PROGRAMS = before


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((40, 6), 1), ((2, 6, 5), 1)], ids=str)
def test_ssf_frozen_subsets(needs: tuple[bool, ...], shape: tuple[int, ...], dim: int) -> None:
    leaves = [randn(*shape, seed=1), randn(6, seed=2), randn(6, seed=3)]
    g = randn(*shape, seed=4)
    x = leaves[0] if needs[1] else None
    gx, gs, gb = ops.ssf_backward(g, x, leaves[1], dim, needs[0], needs[2])
    with dispatch.use_backend("reference"):
        wanted = ops.ssf_backward(g, x, leaves[1], dim, needs[0], needs[2])
    for one, other in zip((gx, gs, gb), wanted):
        torch.testing.assert_close(one, other)


def adapter(rows: int, dim: int, rank: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((rows, dim), (rank, dim), (rank,), (width, rank), (width,), (rows, width))
    return [randn(*s, seed=i, dtype=dtype) * (0.2 if i in (1, 3) else 1) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_adapter_activations(act: str) -> None:
    leaves = [*adapter(9, 40, 5, 40, torch.float32), torch.tensor(0.7)]
    both(leaves, lambda x, wd, bd, wu, bu, r, s: bottleneck_adapter(x, wd, bd, wu, bu, act, s, r), torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "dim", "rank", "width"), [(1, 7, 1, 5), (70, 100, 12, 36), (65, 64, 64, 130)])
def test_adapter_sizes(rows: int, dim: int, rank: int, width: int, dtype: torch.dtype) -> None:
    leaves = adapter(rows, dim, rank, width, dtype)
    both(leaves, lambda x, wd, bd, wu, bu, r: bottleneck_adapter(x, wd, bd, wu, bu, "silu", 0.5, r), dtype)


def test_adapter_without_biases_and_residual() -> None:
    x, w_down, _, w_up, _, _ = adapter(20, 16, 4, 16, torch.float32)
    both([x, w_down, w_up], lambda x, wd, wu: bottleneck_adapter(x, wd, None, wu, None, "gelu", 2.0), torch.float32)


def test_adapter_zero_up_projection_is_the_residual() -> None:
    x, w_down, b_down, w_up, b_up, residual = adapter(20, 16, 4, 16, torch.float32)
    y = bottleneck_adapter(x, w_down, b_down, torch.zeros_like(w_up), torch.zeros_like(b_up), "gelu", 0.1, residual)
    assert torch.equal(y, residual)
    assert torch.equal(bottleneck_adapter(x, w_down, b_down, w_up, b_up, "gelu", 0.0, residual), residual)


@pytest.mark.parametrize("which", range(6))
def test_adapter_frozen_subsets(which: int) -> None:
    x, w_down, _, w_up, b_up, _ = adapter(20, 16, 4, 16, torch.float32)
    needs = [i == which for i in range(6)]
    g, h_pre = randn(20, 16, seed=8), randn(20, 4, seed=9)
    arguments = (g, x if needs[1] else None, h_pre, w_down, w_up, b_up, "gelu", 1.0, torch.tensor(0.5), needs)
    got = ops.bottleneck_adapter_backward(*arguments)
    with dispatch.use_backend("reference"):
        wanted = ops.bottleneck_adapter_backward(*arguments)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_cannot_says_why() -> None:
    with pytest.raises(KernelBackendError, match="float64"):
        ssf(torch.ones(2, 3).double(), torch.ones(3).double(), torch.ones(3).double())
    parts = adapter(4, 16, 65, 16, torch.float32)
    with pytest.raises(KernelBackendError, match="64 wide"):
        bottleneck_adapter(*parts[:5])
