"""Inputs that come back in backward from what autograd keeps: gradients, what is kept, where it must not happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_suite.kernels import recompute
from peft_suite.kernels.api.sparse import sparse_delta_conv2d, sparse_delta_linear

NORM = nn.LayerNorm(6, dtype=torch.float64)
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu in place": lambda y: F.silu(y * 1, inplace=True),
    "gelu": F.gelu,
    "gelu of tanh": lambda y: F.gelu(y, approximate="tanh"),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "layer norm": lambda y: F.layer_norm(y, (6,), NORM.weight, NORM.bias, 1e-3),
    "gated": lambda y: y * F.gelu(y.flip(-1)),
    "gated, spread": lambda y: y * F.silu(y[:, :1]),
    "seen otherwise": lambda y: F.silu(y.transpose(0, 1)).reshape(-1, 6).view(y.shape),
}


def layer(x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(output, values) of a sparse layer behind ``x`` (..., 6) or (B, 6, H, W)."""
    make = torch.Generator().manual_seed(seed)
    shape = (5, 6) if x.dim() == 3 else (5, 6, 3, 3)
    weight = torch.randn(shape, generator=make, dtype=x.dtype)
    index = torch.randperm(weight.numel(), generator=make)[: weight.numel() // 3].sort().values
    values = torch.zeros(index.numel(), dtype=x.dtype, requires_grad=True)
    if x.dim() == 3:
        return sparse_delta_linear(x, weight, values, index), values
    return sparse_delta_conv2d(x, weight, values, index, padding=1), values


def gradients(before: Callable[[Tensor], Tensor], y: Tensor, *, kept: bool) -> tuple[list[Tensor], bool]:
    """(gradients of values and y, whether the layer's input was among what autograd kept)."""
    y = y.clone().requires_grad_(True)
    seen: set[int] = set()
    with recompute.watching(lambda t: seen.add(t.untyped_storage().data_ptr())):
        x = before(y * 1.0)
        address = x.untyped_storage().data_ptr()
        out, values = layer(x if not kept else x + 0)  # behind an addition, x is kept
    return list(torch.autograd.grad(out.square().sum(), (values, y))), address in seen


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("size", [(4, 3, 6), (2, 6, 5, 6)], ids=["linear", "conv"])
def test_the_input_is_not_kept_and_gradients_are_the_same(name: str, size: tuple[int, ...]) -> None:
    y = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, kept = gradients(BEFORE[name], y, kept=False)
    plain, _ = gradients(BEFORE[name], y, kept=True)
    assert not kept
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "before",
    [lambda y: y + 1, lambda y: y * 2.0, lambda y: y * torch.ones(6, dtype=y.dtype), F.softplus, torch.sigmoid],
    ids=["sum", "number", "frozen factor", "softplus", "sigmoid"],
)
def test_all_other_inputs_are_kept(before: Callable[[Tensor], Tensor]) -> None:
    x = before(torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True) * 1)
    how, tensors = recompute.keep(x)
    assert how.make is None and len(tensors) == 1 and tensors[0] is x and how.again(tensors) is x


def test_an_input_without_history_is_kept() -> None:
    x = torch.randn(2, 3, 6)
    assert recompute.keep(x)[1][0] is x
    with torch.no_grad():
        x = F.silu(torch.randn(2, 3, 6, requires_grad=True))
    assert recompute.keep(x)[1][0] is x


def test_a_map_in_front_of_halves_comes_back_in_their_precision() -> None:
    y = torch.randn(2, 3, 6, requires_grad=True) * 1
    x = F.silu(y).to(torch.bfloat16).view(6, 6)
    how, tensors = recompute.keep(x)
    assert tensors[0].data_ptr() == y.data_ptr()
    again = how.again(tensors)
    assert again.dtype == torch.bfloat16 and torch.equal(again, x)
    norm = nn.LayerNorm(6).to(torch.bfloat16)
    x = norm(y.to(torch.bfloat16))
    how, tensors = recompute.keep(x)
    torch.testing.assert_close(how.again(tensors), x, rtol=2e-2, atol=2e-2)


def test_autocast_of_backward_does_not_reach_it() -> None:
    y = torch.randn(4, 3, 6, requires_grad=True) * 1
    how, tensors = recompute.keep(F.silu(y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(how.again(tensors), F.silu(y))


def test_checkpointing_runs_a_block_twice_and_no_more() -> None:
    calls = 0

    def block(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return layer(F.silu(y * 1.0))[0]

    y = torch.randn(2, 3, 6, requires_grad=True)
    out: Tensor = checkpoint(block, y, use_reentrant=False)
    assert calls == 1
    (grad,) = torch.autograd.grad(out.square().sum(), y)
    assert calls == 2
    torch.testing.assert_close(grad, torch.autograd.grad(block(y).square().sum(), y)[0])


@pytest.mark.parametrize("pack", [lambda t: t, lambda t: (t.clone(),)], ids=["itself", "elsewhere"])
def test_hooks_see_the_input_and_are_not_asked_for_more(pack: Callable[[Tensor], Any]) -> None:
    y = torch.randn(2, 3, 6, requires_grad=True) * 1
    unpacked = 0

    def unpack(held: Any) -> Any:
        nonlocal unpacked
        unpacked += 1
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        x = F.silu(y)
        assert recompute.keep(x)[1][0] is x
    assert unpacked == 0


def test_a_freed_graph_is_no_source() -> None:
    x = F.silu(torch.randn(2, 3, 6, requires_grad=True) * 1)
    x.sum().backward()
    assert recompute.keep(x)[1][0] is x


def test_writing_into_the_source_is_noticed() -> None:
    y = torch.randn(2, 3, 6, requires_grad=True) * 1
    out, _ = layer(F.silu(y))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_compiled_layers_give_the_same_gradients() -> None:
    weight, index = torch.randn(5, 6), torch.arange(0, 30, 4)
    values, y = torch.zeros(8, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)

    def step(y: Tensor, values: Tensor) -> Tensor:
        return sparse_delta_linear(F.silu(y), weight, values, index)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    a = torch.autograd.grad(compiled(y, values).square().sum(), (y, values))
    b = torch.autograd.grad(step(y, values).square().sum(), (y, values))
    torch.testing.assert_close(a, b)
