"""Sparse-change and selection kernels in Triton's interpreter against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_suite.errors import KernelBackendError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api.selection import kth_value
from peft_suite.kernels.api.sparse import sparse_delta_linear
from peft_suite.kernels.reference import sparse as reference
from peft_suite.kernels.triton import selection as selection_module
from peft_suite.kernels.triton import sparse_delta as module


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    if b.numel():
        assert float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) < tolerance


def chosen(m: int, n: int, share: float, seed: int = 0) -> Tensor:
    order = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))
    return order[: round(share * m * n)].sort().values.int()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BM", 16)
    monkeypatch.setattr(module, "BN", 32)
    monkeypatch.setattr(module, "BT", 16)
    monkeypatch.setattr(module, "LINEAR", (16, 32))
    monkeypatch.setattr(module, "LINEAR_BT", {torch.float32: 16})


def test_plan() -> None:
    index = chosen(37, 70, 0.1)
    plan = module.make_plan(index, 37, 70, 16, 32)
    assert plan.order.sort().values.tolist() == list(range(index.numel()))
    bits = (plan.bits[..., None] >> torch.arange(32)) & 1
    mask = torch.zeros(48, 96, dtype=torch.int64)
    for tile, (row, column) in enumerate(plan.tiles.tolist()):
        assert plan.where[row, column] == tile
        mask[row * 16 : row * 16 + 16, column * 32 : column * 32 + 32] = bits[tile].reshape(16, 32)
    dense = torch.zeros(37 * 70, dtype=torch.int64)
    dense[index.long()] = 1
    assert torch.equal(mask[:37, :70], dense.view(37, 70)) and int(mask.sum()) == index.numel()


@pytest.mark.parametrize("share", [0.002, 0.05, 1.0])
@pytest.mark.parametrize(("tokens", "m", "n"), [(1, 1, 1), (5, 16, 32), (37, 37, 70), (150, 20, 33)])
def test_value_gradient(tokens: int, m: int, n: int, share: float) -> None:
    torch.manual_seed(0)
    index = chosen(m, n, max(share, 1 / (m * n)))
    a, b = torch.randn(tokens, m), torch.randn(tokens, n)
    close(module.sddmm(a, b, index), reference.sddmm(a.double(), b.double(), index))
    at = torch.randn(m, tokens).T
    close(module.sddmm(at, b, index), reference.sddmm(at.double(), b.double(), index))


def test_value_gradient_of_clustered_entries_runs_few_tiles() -> None:
    index = torch.tensor([0, 1, 40, 41], dtype=torch.int64)
    plan = module.make_plan(index, 64, 40, 16, 32)
    assert plan.tiles.tolist() == [[0, 0]] and plan.where.ge(0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    index = chosen(20, 33, 0.1)
    a, b = torch.randn(40, 20).to(dtype), torch.randn(40, 33).to(dtype)
    got = module.sddmm(a, b, index)
    assert got.dtype == torch.float32
    close(got, reference.sddmm(a.double(), b.double(), index))
    w, v = torch.randn(20, 33).to(dtype), torch.randn(index.numel())
    close(module.sparse_linear(b, w, v, index, None), reference.sparse_linear(b, w, v, index, None), 1e-2)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("size", [(5, 33), (2, 21, 33), (0, 33), (33,)])
def test_forward_without_a_copy(size: tuple[int, ...], share: float) -> None:
    torch.manual_seed(0)
    index = chosen(20, 33, share)
    x, w, v, b = torch.randn(size), torch.randn(20, 33), torch.randn(index.numel()), torch.randn(20)
    close(module.sparse_linear(x, w, v, index, b), reference.sparse_linear(x, w, v, index, b))
    close(module.sparse_linear(x, w, v, index, None), reference.sparse_linear(x, w, v, index, None))


def test_plan_is_kept_and_renewed() -> None:
    index = chosen(20, 33, 0.05)
    first = module._plan(index, 20, 33, 16, 32)
    assert module._plan(index, 20, 33, 16, 32) is first
    assert module._plan(index, 33, 20, 16, 32) is not first
    assert module._plan(index, 20, 33, 16, 32) is first
    index[-1] = 20 * 33 - 1
    assert module._plan(index, 20, 33, 16, 32) is not first


def test_whole_step_by_name() -> None:
    torch.manual_seed(0)
    index = chosen(20, 33, 0.05)
    w, x = torch.randn(20, 33), torch.randn(6, 33, requires_grad=True)
    v = torch.randn(index.numel(), requires_grad=True)
    with dispatch.use_backend("triton"):
        ours = torch.autograd.grad(sparse_delta_linear(x, w, v, index).square().sum(), (x, v))
        with pytest.raises(KernelBackendError, match="float64"):
            sparse_delta_linear(x.double(), w, v, index)
    plain = torch.autograd.grad(sparse_delta_linear(x, w, v, index).square().sum(), (x, v))
    for one, two in zip(ours, plain):
        close(one, two)
    assert module.sddmm_pass(x, x, index) and module.sparse_linear_pass(x, w, v, index, None)


@pytest.mark.parametrize("absolute", [True, False])
def test_histogram(absolute: bool) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, -1e-45, 1.0, 1.0])])
    top = selection_module.digit_histogram(x, absolute, 21, 11, None)
    assert torch.equal(top, reference.digit_histogram(x, absolute, 21, 11, None)) and int(top.sum()) == x.numel()
    for value in (1.0, -0.5):
        key = int(reference.image(torch.tensor([value]), absolute)[0])
        for shift, bits in ((10, 11), (0, 10)):
            prefix = key >> (shift + bits)
            got = selection_module.digit_histogram(x, absolute, shift, bits, prefix)
            assert torch.equal(got, reference.digit_histogram(x, absolute, shift, bits, prefix))


def test_selection_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_suite.kernels.api import selection

    monkeypatch.setattr(selection, "_bracketed", lambda *_: None)
    monkeypatch.setitem(selection.CHUNK, "cpu", 3000)
    x = [torch.randn(40, 50), torch.randn(1700)]
    with dispatch.use_backend("triton"):
        got = kth_value(x, 700, absolute=False)
    assert got.value == torch.cat([t.view(-1) for t in x]).topk(700).values[-1].item()
