"""Scale-and-shift and the bottleneck adapter: operations, plain expressions and definitions agree, with gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_suite.errors import KernelArgumentError, KernelBackendError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api import fused
from peft_suite.kernels.api.fused import bottleneck_adapter, fold_ssf, ssf
from peft_suite.kernels.ops import fused as ops
from peft_suite.kernels.reference import fused as reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WAYS = ["plain", "operation", "reference", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    way = request.param
    if way == "triton" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    limit = 1 << 60 if way == "plain" else 0
    monkeypatch.setattr(fused, "SSF_FROM", dict.fromkeys(fused.SSF_FROM, limit))
    monkeypatch.setattr(fused, "ADAPTER_FROM", limit)
    with dispatch.use_backend(way if way in ("reference", "triton") else "auto"):
        yield "cuda" if way == "triton" else "cpu"


def close(ours: Tensor, wanted: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    ours, wanted = ours.detach().cpu().double(), wanted.detach().double()
    assert ours.shape == wanted.shape
    assert (ours - wanted).norm() <= slack * TOLERANCE[dtype] * wanted.norm().clamp(min=1e-6)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# scale and shift ----------------------------------------------------------------------------------------------------


def ssf_by_hand(x: Tensor, scale: Tensor, shift: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return x.double() * scale.double().view(shape) + shift.double().view(shape)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((3, 5), -1), ((4, 11, 13), -1), ((2, 6, 5, 3), 1), ((700, 600), 1), ((2, 3, 40, 50), -3), ((5, 4), 0)],
    ids=str,
)
def test_ssf(device: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is not the kernel's")
    channels = shape[dim]
    leaves = [
        randn(*shape, seed=1, dtype=dtype),
        randn(channels, seed=2, dtype=dtype),
        randn(channels, seed=3, dtype=dtype),
    ]
    g = randn(*shape, seed=4, dtype=dtype)
    ours = [t.to(device).requires_grad_() for t in leaves]
    wide = [t.double().requires_grad_() for t in leaves]
    y = ssf(*ours, channel_dim=dim)
    wanted = ssf_by_hand(*wide, dim)
    assert y.dtype == dtype
    close(y, wanted, dtype)
    for got, true in zip(torch.autograd.grad(y, ours, g.to(device)), torch.autograd.grad(wanted, wide, g.double())):
        assert got.dtype == dtype
        close(got, true, dtype)


def test_ssf_rounds_once(device: str) -> None:
    x, scale, shift = (randn(64, 32, seed=1).bfloat16(), randn(32, seed=2).bfloat16(), randn(32, seed=3).bfloat16())
    y = ssf(x.to(device), scale.to(device), shift.to(device)).cpu()
    assert torch.equal(y, (x.float() * scale.float() + shift.float()).bfloat16())


def test_ssf_with_wider_parameters(device: str) -> None:
    x = randn(50, 32, seed=1).bfloat16().to(device).requires_grad_()
    scale, shift = (randn(32, seed=s).to(device).requires_grad_() for s in (2, 3))
    y = ssf(x, scale, shift)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.cpu(), ssf_by_hand(*(t.detach().cpu() for t in (x, scale, shift)), -1).bfloat16())
    g = randn(50, 32, seed=4).bfloat16().to(device)
    gx, gs, gb = torch.autograd.grad(y, (x, scale, shift), g)
    assert gx.dtype == torch.bfloat16 and gs.dtype == gb.dtype == torch.float32
    close(gs, (g.double() * x.double()).sum(0).cpu(), torch.float32)
    close(gb, g.double().sum(0).cpu(), torch.float32)


def test_ssf_sums_halves_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SSF_FROM", dict.fromkeys(fused.SSF_FROM, 0))
    x = torch.full((4096, 4), 1.0, dtype=torch.bfloat16)
    scale, shift = (torch.ones(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ssf(x, scale, shift).sum().backward()
    assert scale.grad is not None and (scale.grad == 4096).all()
    assert shift.grad is not None and (shift.grad == 4096).all()


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_ssf_frozen_subsets(device: str, needed: tuple[bool, ...]) -> None:
    leaves = [randn(40, 6, seed=s).to(device) for s in (1,)] + [randn(6, seed=s).to(device) for s in (2, 3)]
    for leaf, need in zip(leaves, needed):
        leaf.requires_grad_(need)
    y = ssf(*leaves)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.square().sum().backward()
    for leaf, need in zip(leaves, needed):
        assert (leaf.grad is not None) == need


def test_ssf_keeps_x_only_for_a_trained_scale() -> None:
    def kept(scale_trained: bool) -> int:
        sizes: list[int] = []
        x, shift = randn(40, 6).requires_grad_(), randn(6).requires_grad_()
        scale = randn(6, seed=2).requires_grad_(scale_trained)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ops.ssf(x, scale, shift, 1)
        return sum(sizes)

    assert kept(True) == 40 * 6 + 6 and kept(False) == 6


def test_ssf_layouts(device: str) -> None:
    scale, shift = randn(6, seed=2).to(device), randn(6, seed=3).to(device)
    image = randn(2, 6, 4, 5).to(device)
    for x in (
        image,
        image.to(memory_format=torch.channels_last),
        image.transpose(2, 3),
        image[:, :, ::2],
        image[:1].expand(3, 6, 4, 5),
    ):
        x = x.detach().requires_grad_()
        y = ssf(x, scale, shift, channel_dim=1)
        close(y, ssf_by_hand(x.detach().cpu(), scale.cpu(), shift.cpu(), 1), torch.float32)
        (gx,) = torch.autograd.grad(y, x, torch.ones_like(x))
        close(gx, scale.cpu().view(1, 6, 1, 1).expand(x.shape), torch.float32)
    y = ssf(image.to(memory_format=torch.channels_last), scale, shift, channel_dim=1)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (2, 0)], ids=str)
def test_ssf_empty(device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    scale, shift = (torch.ones(shape[-1], device=device, requires_grad=True) for _ in range(2))
    y = ssf(x, scale, shift)
    assert y.shape == shape
    y.sum().backward()
    assert scale.grad is not None and (scale.grad == 0).all() and shift.grad is not None and (shift.grad == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 7), st.integers(0, 2))
def test_ssf_operation_is_the_plain_expression(a: int, b: int, c: int, dim: int) -> None:
    x, n = randn(a, b, c, seed=a, dtype=torch.float64), (a, b, c)[dim]
    scale, shift, g = (
        randn(n, seed=b, dtype=torch.float64),
        randn(n, seed=c, dtype=torch.float64),
        randn(a, b, c, seed=9),
    )
    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    plain, operation = ssf(*leaves, channel_dim=dim), ops.ssf(*leaves, dim)
    torch.testing.assert_close(operation, plain)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, g.double()) for y in (operation, plain))):
        torch.testing.assert_close(ours, theirs)


def test_ssf_gradcheck() -> None:
    for shape, dim in (((3, 4), 1), ((2, 3, 2, 2), 1)):
        leaves = [
            randn(*shape, dtype=torch.float64),
            randn(shape[dim], seed=2).double(),
            randn(shape[dim], seed=3).double(),
        ]
        assert torch.autograd.gradcheck(
            lambda x, s, b, dim=dim: ops.ssf(x, s, b, dim), [t.requires_grad_() for t in leaves]
        )


def test_ssf_opcheck() -> None:
    image = randn(2, 6, 4, 5)
    for x, dim in (
        (randn(5, 6), 1),
        (image, 1),
        (image.to(memory_format=torch.channels_last), 1),
        (torch.empty(0, 6), 1),
    ):
        leaves = (x.detach().requires_grad_(), randn(6, seed=2).requires_grad_(), randn(6, seed=3).requires_grad_())
        torch.library.opcheck(torch.ops.peft_suite.ssf.default, (*leaves, dim))
        torch.library.opcheck(torch.ops.peft_suite.ssf_backward.default, (x, x, randn(6), dim, True, True))
    torch.library.opcheck(torch.ops.peft_suite.ssf_backward.default, (image, None, randn(6), 1, False, True))


def test_fold_ssf() -> None:
    scale, shift = randn(8, seed=1), randn(8, seed=2)
    linear, conv, norm = torch.nn.Linear(5, 8), torch.nn.Conv2d(3, 8, 3), torch.nn.LayerNorm(8)
    for layer, x, dim in ((linear, randn(4, 5), -1), (conv, randn(2, 3, 6, 6), 1), (norm, randn(4, 8), -1)):
        wanted = ssf(layer(x), scale, shift, channel_dim=dim)
        weight, bias = fold_ssf(layer.weight, layer.bias, scale, shift)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    weight, bias = fold_ssf(linear.weight.bfloat16(), None, scale, shift)
    assert weight.dtype == bias.dtype == torch.bfloat16 and torch.equal(bias, shift.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(3), torch.ones(3)), "'x'.*int64"),
        ((torch.tensor(1.0), torch.ones(1), torch.ones(1)), "'x'"),
        ((torch.ones(2, 3), torch.ones(2), torch.ones(3)), "'scale'"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(3, 1)), "'shift'"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(3, device="meta")), "'shift'.*meta"),
    ],
)
def test_ssf_bad_input(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        ssf(*arguments)


def test_ssf_bad_axis() -> None:
    with pytest.raises(KernelArgumentError, match="'channel_dim'"):
        ssf(torch.ones(2, 3), torch.ones(3), torch.ones(3), channel_dim=2)


# bottleneck adapter -------------------------------------------------------------------------------------------------

ACTS = list(reference.ACTIVATIONS)


def adapter_parts(
    rows: int, dim: int, rank: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    shapes = {"x": (rows, dim), "w_down": (rank, dim), "b_down": (rank,), "w_up": (width, rank), "b_up": (width,)}
    sizes = {"w_down": dim**-0.5, "w_up": rank**-0.5}
    parts = {n: (randn(*s, seed=i) * sizes.get(n, 1)).to(device, dtype) for i, (n, s) in enumerate(shapes.items())}
    parts["residual"] = randn(rows, width, seed=9).to(device, dtype)
    return parts


def by_hand(parts: dict[str, Any], act: str, scale: Any) -> Tensor:
    wide = {n: None if t is None else t.double() for n, t in parts.items()}
    h = wide["x"] @ wide["w_down"].T
    h = h if wide["b_down"] is None else h + wide["b_down"]
    y = reference.activation(act, h) @ wide["w_up"].T
    y = (y if wide["b_up"] is None else y + wide["b_up"]) * (scale.double() if isinstance(scale, Tensor) else scale)
    return y if wide["residual"] is None else wide["residual"] + y


def compare(device: str, parts: dict[str, Any], act: str, scale: Any, dtype: torch.dtype) -> None:
    ours = {n: None if t is None else t.to(device).requires_grad_() for n, t in parts.items()}
    true = {n: None if t is None else t.double().requires_grad_() for n, t in parts.items()}
    our_scale, true_scale = scale, scale
    if isinstance(scale, Tensor):
        our_scale, true_scale = scale.to(device).requires_grad_(), scale.double().requires_grad_()
    y, wanted = bottleneck_adapter(**ours, act=act, scale=our_scale), by_hand(true, act, true_scale)
    assert y.dtype == dtype
    close(y, wanted, dtype)
    g = randn(*y.shape, seed=11, dtype=dtype)
    leaves = [(n, t, true[n]) for n, t in ours.items() if t is not None]
    if isinstance(scale, Tensor):
        leaves.append(("scale", our_scale, true_scale))
    got = torch.autograd.grad(y, [t for _, t, _ in leaves], g.to(device))
    exact = torch.autograd.grad(wanted, [t for _, _, t in leaves], g.double())
    for (name, leaf, _), one, other in zip(leaves, got, exact):
        assert one.dtype == leaf.dtype and one.shape == leaf.shape
        if name == "scale":  # one number, the sum of terms that cancel
            assert abs(one.item() - other.item()) <= 20 * TOLERANCE[dtype] * g.numel() ** 0.5
        else:
            close(one, other, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_adapter_activations(device: str, act: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is not the kernel's")
    scale = torch.tensor(0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    compare(device, adapter_parts(33, 40, 12, 40, dtype), act, scale, dtype)


@pytest.mark.parametrize("rank", [1, 4, 8, 12, 64])
@pytest.mark.parametrize(("rows", "dim", "width"), [(1, 7, 5), (65, 320, 320), (70, 100, 36)])
def test_adapter_sizes(device: str, rank: int, rows: int, dim: int, width: int) -> None:
    compare(device, adapter_parts(rows, dim, rank, width), "gelu", 0.5, torch.float32)


@pytest.mark.parametrize(
    "missing", [("b_down",), ("b_up",), ("residual",), ("b_up", "residual"), ("b_down", "b_up", "residual")]
)
@pytest.mark.parametrize("scale", [1.0, 2, torch.tensor(0.3), torch.tensor([-0.3])], ids=str)
def test_adapter_without_parts(device: str, missing: tuple[str, ...], scale: Any) -> None:
    parts = adapter_parts(20, 16, 4, 16)
    parts.update(dict.fromkeys(missing))
    compare(device, parts, "silu", scale, torch.float32)


def test_adapter_zero_up_projection_and_zero_scale_are_the_residual(device: str) -> None:
    parts = adapter_parts(20, 16, 4, 16, device=device)
    zero = {**parts, "w_up": torch.zeros_like(parts["w_up"]), "b_up": torch.zeros_like(parts["b_up"])}
    assert torch.equal(bottleneck_adapter(**zero, act="gelu", scale=0.1), parts["residual"])
    assert torch.equal(
        bottleneck_adapter(**zero, act="gelu", scale=torch.tensor(0.1, device=device)), parts["residual"]
    )
    assert torch.equal(bottleneck_adapter(**parts, act="gelu", scale=0.0), parts["residual"])


def test_adapter_residual_is_the_input(device: str) -> None:
    parts = adapter_parts(20, 16, 4, 16, device=device)
    x = parts["x"].requires_grad_()
    parts["residual"] = x
    (got,) = torch.autograd.grad(bottleneck_adapter(**parts, act="relu", scale=0.5).sum(), x)
    twin = {n: t.detach().cpu().double() for n, t in parts.items()}
    twin["x"] = twin["residual"] = x.detach().cpu().double().requires_grad_()
    (wanted,) = torch.autograd.grad(by_hand(twin, "relu", 0.5).sum(), twin["x"])
    close(got, wanted, torch.float32)


NAMES = ("x", "w_down", "b_down", "w_up", "b_up", "residual", "scale")


@pytest.mark.parametrize(
    "trained", [(n,) for n in NAMES] + [("w_down", "w_up"), ("x", "b_up"), ("w_up", "scale"), ()], ids=str
)
def test_adapter_frozen_subsets(device: str, trained: tuple[str, ...]) -> None:
    parts = adapter_parts(20, 16, 4, 16, device=device)
    scale = torch.tensor(0.5, device=device)
    leaves = {**parts, "scale": scale}
    for name in trained:
        leaves[name].requires_grad_()
    y = bottleneck_adapter(**parts, act="gelu", scale=scale)
    assert y.requires_grad == bool(trained)
    if trained:
        y.square().sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained), name
    every = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    all_scale = every.pop("scale")
    bottleneck_adapter(**every, act="gelu", scale=all_scale).square().sum().backward()
    for name in trained:
        wanted = all_scale.grad if name == "scale" else every[name].grad
        torch.testing.assert_close(leaves[name].grad, wanted, rtol=1e-4, atol=1e-5)


def test_adapter_keeps_only_x_and_the_hidden_rows() -> None:
    parts = adapter_parts(50, 16, 4, 16)
    scale = torch.tensor(0.5, requires_grad=True)
    for part in parts.values():
        part.requires_grad_()

    def kept(run: Any) -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            run()
        return sum(sizes.values()) - 2 * 64 - 1

    arguments = [parts[n] for n in ("x", "w_down", "b_down", "w_up", "b_up")]
    ours = kept(lambda: ops.bottleneck_adapter(*arguments, "gelu", 1.0, scale, parts["residual"]))
    plain = kept(lambda: bottleneck_adapter(**parts, act="gelu", scale=scale))
    assert ours == 50 * 16 + 50 * 4 + 16  # and the output bias
    assert plain >= 2 * 50 * 16 + 2 * 50 * 4


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 2, 2, 16)], ids=str)
def test_adapter_ranks_and_layouts(device: str, shape: tuple[int, ...]) -> None:
    parts = adapter_parts(1, 16, 4, 10, device=device)
    x, residual = randn(*shape).to(device), randn(*shape[:-1], 10).to(device)
    parts.update(x=x, residual=residual)
    y = bottleneck_adapter(**parts, act="relu", scale=0.5)
    assert y.shape == (*shape[:-1], 10)
    if len(shape) > 1:
        strided = randn(*shape[:-1], 32).to(device)[..., ::2]
        parts["x"] = strided
        dense = bottleneck_adapter(**{**parts, "x": strided.contiguous()}, act="relu", scale=0.5)
        torch.testing.assert_close(bottleneck_adapter(**parts, act="relu", scale=0.5), dense)


def test_adapter_empty(device: str) -> None:
    parts = adapter_parts(0, 16, 4, 10, device=device)
    for part in parts.values():
        part.requires_grad_()
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    y = bottleneck_adapter(**parts, act="relu", scale=scale)
    assert y.shape == (0, 10)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in (*parts.values(), scale))


@pytest.mark.parametrize("act", ACTS)
def test_adapter_gradcheck(act: str) -> None:
    parts = adapter_parts(4, 5, 3, 6, torch.float64)
    names = ["x", "w_down", "b_down", "w_up", "b_up"]
    leaves = [parts[n].requires_grad_() for n in names]
    scale, residual = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), parts["residual"].requires_grad_()

    def run(*p: Tensor) -> Tensor:
        return ops.bottleneck_adapter(*p[:5], act, 0.5, p[5], p[6])[0]

    assert torch.autograd.gradcheck(run, (*leaves, scale, residual))


def test_adapter_opcheck() -> None:
    parts = adapter_parts(5, 6, 3, 7)
    names = ["x", "w_down", "b_down", "w_up", "b_up"]
    leaves = [parts[n].requires_grad_() for n in names]
    scale = torch.tensor(0.7, requires_grad=True)
    op, backward = (
        torch.ops.peft_suite.bottleneck_adapter.default,
        torch.ops.peft_suite.bottleneck_adapter_backward.default,
    )
    torch.library.opcheck(op, (*leaves, "gelu", 1.0, scale, parts["residual"].requires_grad_()))
    torch.library.opcheck(op, (leaves[0], leaves[1], None, leaves[3], None, "relu", 0.5, None, None))
    plain = [t.detach() for t in leaves]
    g, h_pre = randn(5, 7), randn(5, 3)
    for needs in ([True] * 6, [False] * 5 + [True], [True] + [False] * 5):
        arguments = (plain[0] if needs[1] else None, h_pre, plain[1], plain[3], plain[4], "gelu", 1.0, scale.detach())
        torch.library.opcheck(backward, (g, *arguments, needs))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = adapter_parts(12, 8, 4, 8)
    parts["scale"] = torch.tensor(0.3)
    leaves = {**parts, "gamma": randn(8, seed=21), "beta": randn(8, seed=22)}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def public(gamma: Tensor, beta: Tensor, **rest: Tensor) -> Tensor:
        return ssf(bottleneck_adapter(**rest, act="gelu"), gamma, beta)

    def registered(gamma: Tensor, beta: Tensor, scale: Tensor, residual: Tensor, **rest: Tensor) -> Tensor:
        y, _ = ops.bottleneck_adapter(*rest.values(), "gelu", 1.0, scale, residual)
        return ops.ssf(y, gamma, beta, 1)

    wanted = torch.autograd.grad(public(**leaves).square().sum(), list(leaves.values()))
    for step in (public, registered):
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        got = torch.autograd.grad(compiled(**leaves).square().sum(), list(leaves.values()))
        for one, other in zip(got, wanted):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_adapter_under_autocast() -> None:
    parts = adapter_parts(20, 16, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bottleneck_adapter(**parts, act="gelu", scale=0.5)
        x = ssf(parts["x"], torch.ones(16), torch.zeros(16))
    assert y.dtype == torch.float32  # the residual's
    close(y, by_hand(parts, "gelu", 0.5), torch.bfloat16)
    assert x.dtype == torch.float32 and torch.equal(x, parts["x"])


def test_repeatable(device: str) -> None:
    parts = adapter_parts(300, 64, 16, 64, device=device)
    for part in parts.values():
        part.requires_grad_()
    gamma, beta = randn(64, seed=21).to(device).requires_grad_(), randn(64, seed=22).to(device).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = ssf(bottleneck_adapter(**parts, act="gelu", scale=0.5), gamma, beta)
        return y, *torch.autograd.grad(y.square().sum(), [*parts.values(), gamma, beta])

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


def test_triton_on_the_cpu_says_why() -> None:
    with dispatch.use_backend("triton"):
        with pytest.raises(KernelBackendError, match="ssf"):
            ssf(torch.ones(2, 3), torch.ones(3), torch.ones(3))
        with pytest.raises(KernelBackendError, match="bottleneck_adapter"):
            bottleneck_adapter(**adapter_parts(2, 3, 1, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(20, 15)}, "'w_down'"),
        ({"b_down": torch.ones(5)}, "'b_down'"),
        ({"w_up": torch.ones(16, 5)}, "'w_up'"),
        ({"b_up": torch.ones(16, dtype=torch.float64)}, "'b_up'.*float64"),
        ({"residual": torch.ones(19, 16)}, "'residual'"),
        ({"act": "mish"}, "'act'.*mish"),
        ({"scale": torch.ones(2)}, "'scale'"),
        ({"scale": "big"}, "'scale'"),
        ({"x": torch.ones(20, 16, dtype=torch.int32)}, "'x'.*int32"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_adapter_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        bottleneck_adapter(**{**adapter_parts(20, 16, 4, 16), **changes})
