"""Sparse weight changes against dense autograd: outputs, every gradient, dtypes, memory, compile, FSDP2."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from peft_suite.errors import KernelArgumentError, UnsupportedError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api.sparse import (
    check_index,
    rounded_away,
    sddmm,
    sparse_delta,
    sparse_delta_conv,
    sparse_delta_conv1d,
    sparse_delta_conv2d,
    sparse_delta_linear,
)
from peft_suite.kernels.cpu import torch_sparse
from peft_suite.kernels.ops import sparse as ops
from peft_suite.kernels.reference import sparse as reference


@pytest.fixture(autouse=True)
def small_weights_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the dense product is taken for weights of the sizes here."""
    monkeypatch.setattr(torch_sparse, "SAMPLE_LEAST", 0)


@pytest.fixture(params=["torch", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.use_backend(request.param):
        yield request.param


def chosen(shape: tuple[int, ...], share: float, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    numel = int(torch.Size(shape).numel())
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    return order[: round(share * numel)].sort().values.to(dtype)


def case(
    shape: tuple[int, ...], size: tuple[int, ...], share: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    index = chosen(shape, share, seed)
    x = torch.randn(size, dtype=dtype, requires_grad=True)
    values = torch.randn(index.numel(), dtype=dtype, requires_grad=True)
    bias = torch.randn(shape[0], dtype=dtype, requires_grad=True)
    return x, torch.randn(shape, dtype=dtype), values, index, bias


def dense(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W + ΔW by plain differentiable operations."""
    delta = torch.zeros(weight.numel(), dtype=values.dtype).index_put((index.long(),), values)
    return weight + delta.view(weight.shape)


def compare(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-12
) -> None:
    """Outputs and gradients of both agree in relative norm."""
    a, b = ours(), theirs()
    assert a.shape == b.shape and a.is_contiguous()
    grad = torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(1)).to(a.dtype)
    close(a, b, tolerance)
    wanted = [i for i in inputs if i.requires_grad]
    if wanted:
        for one, two in zip(torch.autograd.grad(a, wanted, grad), torch.autograd.grad(b, wanted, grad.to(b.dtype))):
            assert one.dtype == two.dtype and one.shape == two.shape
            close(one, two, tolerance)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    a, b = a.detach(), b.detach()
    gap = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30) if b.numel() else 0.0
    assert float(gap) <= tolerance, float(gap)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.08, 0.5, 1.0])
@pytest.mark.parametrize("size", [(7, 13), (2, 5, 13), (2, 3, 4, 13), (13,), (0, 13), (2, 0, 13), (130, 13)])
def test_linear(backend: str, size: tuple[int, ...], share: float) -> None:
    x, w, v, i, b = case((11, 13), size, share)
    compare(lambda: sparse_delta_linear(x, w, v, i, b), lambda: F.linear(x, dense(w, v, i), b), [x, v, b])


@pytest.mark.parametrize("frozen", ["x", "values", "bias", "x values", "x bias", "values bias"])
def test_only_wanted_gradients_are_made(frozen: str) -> None:
    x, w, v, i, b = case((11, 13), (6, 13), 0.2)
    for name, t in (("x", x), ("values", v), ("bias", b)):
        if name in frozen.split():
            t.requires_grad_(False)
    compare(lambda: sparse_delta_linear(x, w, v, i, b), lambda: F.linear(x, dense(w, v, i), b), [x, v, b])
    if frozen == "x":
        saved = saved_by(lambda: sparse_delta_linear(x, w, v, i, b))
        assert w.data_ptr() not in {s.data_ptr() for s in saved}
    if frozen == "values":
        saved = saved_by(lambda: sparse_delta_linear(x, w, v, i, b))
        assert x.data_ptr() not in {s.data_ptr() for s in saved}


def test_layouts() -> None:
    x, w, v, i, b = case((11, 13), (13, 6), 0.2)
    compare(lambda: sparse_delta_linear(x.T, w, v, i, b), lambda: F.linear(x.T, dense(w, v, i), b), [x, v, b])
    wt = w.T.contiguous().T
    y = sparse_delta_linear(x.T, wt, v, i, b)
    grad = torch.randn(11, 6, dtype=y.dtype).T
    for one, two in zip(
        torch.autograd.grad(y, (x, v), grad), torch.autograd.grad(F.linear(x.T, dense(w, v, i), b), (x, v), grad)
    ):
        close(one, two, 1e-12)
    grad = torch.ones((), dtype=y.dtype).expand(6, 11)
    y = sparse_delta_linear(x.T, wt, v, i)
    close(torch.autograd.grad(y, v, grad)[0], torch.autograd.grad(F.linear(x.T, dense(w, v, i)), v, grad)[0], 1e-12)


CONVS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((6, 4, 3, 3), (2, 4, 9, 7), {"padding": 1}),
    ((6, 4, 3, 3), (2, 4, 9, 7), {"padding": "same"}),
    ((6, 4, 2, 4), (1, 4, 9, 7), {"padding": "same"}),
    ((6, 4, 3, 3), (2, 4, 9, 7), {"padding": "valid", "stride": 2}),
    ((6, 4, 3, 3), (3, 4, 9, 8), {"padding": (2, 1), "stride": (2, 3), "dilation": (1, 2)}),
    ((6, 4, 1, 1), (2, 4, 5, 7), {}),
    ((6, 4, 1, 1), (2, 4, 5, 7), {"stride": 2, "padding": 1}),
    ((6, 2, 3, 3), (2, 4, 9, 7), {"padding": 1, "groups": 2}),
    ((12, 1, 3, 3), (2, 12, 6, 6), {"padding": 1, "groups": 12}),
    ((6, 4, 5), (2, 4, 11), {"padding": 2}),
    ((5, 3, 2, 3, 2), (1, 3, 4, 5, 4), {"padding": 1}),
    ((6, 4, 3, 3), (4, 9, 7), {"padding": 1}),
    ((6, 4, 3, 3), (0, 4, 9, 7), {"padding": 1}),
    ((6, 4, 4, 4), (2, 4, 8, 8), {"stride": 4}),
]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
@pytest.mark.parametrize(("shape", "size", "options"), CONVS)
def test_conv(
    backend: str, shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any], share: float
) -> None:
    x, w, v, i, b = case(shape, size, share)
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    compare(
        lambda: sparse_delta_conv(x, w, v, i, b, **options),
        lambda: conv(x, dense(w, v, i), b, **options),
        [x, v, b],
    )


def test_conv_in_bands_and_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sparse, "SAMPLE_ELEMENTS", 600)
    x, w, v, i, b = case((6, 4, 3, 3), (2, 4, 9, 7), 0.05)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    wl = w.to(memory_format=torch.channels_last)
    compare(
        lambda: sparse_delta_conv2d(last, wl, v, i, b, padding=1),
        lambda: F.conv2d(last, dense(w, v, i), b, padding=1).contiguous(),
        [last, v, b],
    )


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_large_weights_are_built_in_pieces(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(torch_sparse, "PIECE_BYTES", 400)
    x, w, v, i, b = case((11, 13), (5, 13), share)
    compare(lambda: sparse_delta_linear(x, w, v, i, b), lambda: F.linear(x, dense(w, v, i), b), [x, v, b])
    xc, wc, vc, ic, bc = case((6, 4, 3, 3), (2, 4, 9, 7), share)
    compare(
        lambda: sparse_delta_conv2d(xc, wc, vc, ic, bc, padding=1),
        lambda: F.conv2d(xc, dense(wc, vc, ic), bc, padding=1),
        [xc, vc, bc],
    )


def test_pieces_of_halves_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, v, i, _ = case((256, 8), (2, 8), 0.1, torch.bfloat16)
    g = torch.ones(2, 256, dtype=torch.bfloat16)
    (whole,) = torch.autograd.grad(sparse_delta_linear(x, w.abs(), v.abs(), i), x, g)
    monkeypatch.setattr(torch_sparse, "PIECE_BYTES", 16)  # a row at a time
    (parts,) = torch.autograd.grad(sparse_delta_linear(x, w.abs(), v.abs(), i), x, g)
    assert parts.dtype == torch.bfloat16
    torch.testing.assert_close(parts, whole, rtol=2**-7, atol=0)  # one rounding; added up in bfloat16, 256 terms stall


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), tokens=st.integers(0, 9), data=st.data(), wide=st.booleans())
def test_property_any_set_of_entries(rows: int, columns: int, tokens: int, data: st.DataObject, wide: bool) -> None:
    entries = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    index = torch.tensor(sorted(entries), dtype=torch.int64 if wide else torch.int32)
    torch.manual_seed(rows + columns)
    x = torch.randn(tokens, columns, dtype=torch.float64, requires_grad=True)
    w = torch.randn(rows, columns, dtype=torch.float64)
    v = torch.randn(len(entries), dtype=torch.float64, requires_grad=True)
    compare(lambda: sparse_delta_linear(x, w, v, index), lambda: F.linear(x, dense(w, v, index)), [x, v])
    a, b = x, torch.randn(tokens, rows, dtype=torch.float64, requires_grad=True)
    compare(lambda: sddmm(b, a, index), lambda: (b.T @ a).reshape(-1)[index.long()], [b, a])


def test_gradcheck() -> None:
    x, w, v, i, b = case((4, 3), (2, 2, 3), 0.4)
    assert torch.autograd.gradcheck(lambda *a: sparse_delta_linear(a[0], w, a[1], i, a[2]), (x, v, b))
    x, w, v, i, b = case((4, 2, 3, 3), (2, 2, 4, 3), 0.08)
    assert torch.autograd.gradcheck(lambda *a: sparse_delta_conv2d(a[0], w, a[1], i, a[2], 2, 1), (x, v, b))
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: sparse_delta(*a, i), (w, v))
    a = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: sddmm(*t, chosen((4, 3), 0.5)), (a, c))


def test_second_derivatives_are_refused() -> None:
    x, w, v, i, _ = case((4, 3), (2, 3), 0.4)
    (gx,) = torch.autograd.grad(sparse_delta_linear(x, w, v, i).square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        gx.sum().backward()


@pytest.mark.parametrize("shape", [(7,), (3, 5), ()])
def test_plain_path_keeps_shape_dtype_and_gradients(backend: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64)
    i = chosen(shape, 0.5)
    v = torch.randn(i.numel(), dtype=torch.float64, requires_grad=True)
    compare(lambda: sparse_delta(w, v, i), lambda: dense(w.reshape(-1), v, i).view(shape), [v])
    half = sparse_delta(torch.ones(4, dtype=torch.bfloat16), torch.full((1,), 1e-3), torch.tensor([2]), torch.float32)
    assert half.dtype == torch.float32 and half[2] == 1 + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frozen_weights_of_every_dtype(backend: str, dtype: torch.dtype) -> None:
    """Values stay float32; the sum is rounded once; the value gradient is summed in float32."""
    x, w, v, i, b = case((32, 48), (40, 48), 0.05, torch.float32)
    w, xs = w.to(dtype), x.detach().to(dtype).requires_grad_()
    y = sparse_delta_linear(xs, w, v, i, b)
    assert y.dtype == dtype
    rounded = dense(w.float(), v.detach(), i).to(dtype)
    close(y, F.linear(xs, rounded, b.to(dtype)), 3e-3 if dtype != torch.float32 else 1e-6)
    if backend == "torch":
        assert torch.equal(y, F.linear(xs, rounded, b.to(dtype)))
    grad = torch.randn(y.shape).to(dtype)
    gx, gv, gb = torch.autograd.grad(y, (xs, v, b), grad)
    assert (gx.dtype, gv.dtype, gb.dtype) == (dtype, torch.float32, torch.float32)
    exact = (grad.double().T @ xs.detach().double()).reshape(-1)[i.long()]
    close(gv, exact, 1e-6)
    close(gb, grad.double().sum(0), 1e-6)
    full = sparse_delta_linear(x, w, v, i)
    assert full.dtype == torch.float32
    close(full, F.linear(x, dense(w.float(), v, i)), 1e-6)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast(kind: str, inside: bool) -> None:
    """Under autocast the layer computes in bfloat16 whether backward runs inside the region or after it."""
    shape, size = ((32, 48), (40, 48)) if kind == "linear" else ((8, 6, 3, 3), (2, 6, 8, 8))
    x, w, v, i, b = case(shape, size, 0.05, torch.float32)

    def ours() -> Tensor:
        return sparse_delta_linear(x, w, v, i, b) if kind == "linear" else sparse_delta_conv2d(x, w, v, i, b, 1, 1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours()
        assert y.dtype == torch.bfloat16
        if inside:
            y.float().square().sum().backward()
    if not inside:
        y.float().square().sum().backward()
    got = [x.grad, v.grad, b.grad]
    assert all(g is not None and g.dtype == torch.float32 for g in got)
    for t in (x, v, b):
        t.grad = None
    ours().square().sum().backward()
    for one, two in zip(got, (x.grad, v.grad, b.grad)):
        assert one is not None and two is not None
        close(one, two, 0.02)
    saved = saved_in_autocast(ours)
    assert max(s.numel() * s.element_size() for s in saved if s.data_ptr() != w.data_ptr()) <= 2 * x.numel() + 64


def saved_in_autocast(run: Callable[[], Tensor]) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return saved_by(run)


def saved_by(run: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_saved_are_the_given_tensors_only(kind: str) -> None:
    shape, size = ((64, 48), (30, 48)) if kind == "linear" else ((16, 8, 3, 3), (2, 8, 9, 9))
    x, w, v, i, b = case(shape, size, 0.01)
    before = w.clone()

    def run() -> Tensor:
        return sparse_delta_linear(x, w, v, i, b) if kind == "linear" else sparse_delta_conv2d(x, w, v, i, b, 1, 1)

    assert {t.data_ptr() for t in saved_by(run)} == {t.data_ptr() for t in (x, w, v, i)}
    run().sum().backward()
    assert torch.equal(w, before) and w._version == 0


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at once during ``run`` beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("density", [0.0, 0.1])
def test_dense_tensors_live_for_one_layer_only(monkeypatch: pytest.MonkeyPatch, density: float) -> None:
    """Density 0: the value gradient goes through the dense product, as on GPUs."""
    monkeypatch.setattr(torch_sparse, "SAMPLE_DENSITY", density)
    side = 256
    unit = side * side * 4
    layers = [case((side, side), (1, side), 0.01, torch.float32, seed)[1:4] for seed in range(4)]
    x = torch.randn(4, side, requires_grad=True)

    def run() -> None:
        y = x
        for w, v, i in layers:
            y = sparse_delta_linear(y, w, v, i)
        y.sum().backward()

    run()
    dense = unit if density == 0 else 0  # W + ΔW has a place that stays; a dense value gradient comes on top
    assert dense <= peak_bytes(run) < dense + 0.5 * unit
    monkeypatch.setattr(torch_sparse, "_thread", threading.local())
    assert unit <= peak_bytes(run) < dense + 1.5 * unit
    assert torch_sparse._thread.buffer.numel() == unit


@pytest.mark.parametrize("least", [0, 1 << 16])
def test_small_weights_take_the_dense_product(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(torch_sparse, "SAMPLE_LEAST", least)
    sampled: list[int] = []
    add = torch_sparse._Sampled.add
    monkeypatch.setattr(torch_sparse._Sampled, "add", lambda self, p, q: (sampled.append(1), add(self, p, q))[1])
    x, w, v, i, b = case((64, 48), (30, 48), 0.05)
    compare(lambda: sparse_delta_linear(x, w, v, i, b), lambda: F.linear(x, dense(w, v, i), b), [x, v, b])
    x, w, v, i, b = case((8, 4, 3, 3), (2, 4, 9, 7), 0.05)
    compare(
        lambda: sparse_delta_conv2d(x, w, v, i, b, padding=1), lambda: F.conv2d(x, dense(w, v, i), b, padding=1), [x, v]
    )
    assert bool(sampled) is (least == 0)


def test_every_thread_has_its_own_place_for_the_changed_weight() -> None:
    x, w, v, i, b = case((96, 64), (50, 64), 0.1, torch.float32)
    _, other, v2, i2, b2 = case((96, 64), (50, 64), 0.1, torch.float32, seed=1)
    first, second = sparse_delta_linear(x, w, v, i, b), sparse_delta_linear(x, other, v2, i2, b2)
    wrong = []

    def run(expected: Tensor, *given: Tensor) -> None:
        for _ in range(100):
            if not torch.equal(sparse_delta_linear(x, *given), expected):
                wrong.append(expected)

    threads = [
        threading.Thread(target=run, args=(first, w, v, i, b)),
        threading.Thread(target=run, args=(second, other, v2, i2, b2)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_inference_left_serves_training() -> None:
    x, w, v, i, b = case((6, 5), (3, 5), 0.3, torch.float32)
    torch_sparse._thread.__dict__.clear()
    with torch.inference_mode():
        sparse_delta_linear(x, w, v, i, b)
    (grad,) = torch.autograd.grad(sparse_delta_linear(x, w, v, i, b).sum(), v)
    assert grad.abs().sum() > 0


def test_opcheck() -> None:
    x, w, v, i, b = case((6, 5), (3, 5), 0.3, torch.float32)
    torch.library.opcheck(ops.sparse_delta_linear, (x, w, v, i, b))
    torch.library.opcheck(ops.sparse_delta_linear, (x.detach(), w, v.detach(), i, None))
    torch.library.opcheck(ops.sparse_delta, (w, v, i, torch.float32))
    torch.library.opcheck(ops.sddmm, (torch.randn(3, 6, requires_grad=True), x, i))
    x, w, v, i, b = case((6, 4, 3, 3), (2, 4, 5, 5), 0.05, torch.float32)
    torch.library.opcheck(ops.sparse_delta_conv, (x, w, v, i, b, [1, 1], [1, 1], [1, 1], 1))


def step(x: Tensor, w: Tensor, v: Tensor, i: Tensor, b: Tensor, k: Tensor, kv: Tensor, ki: Tensor) -> Tensor:
    y = F.gelu(sparse_delta_linear(x, w, v, i, b))
    z = sparse_delta_conv2d(y[None, None], k, kv, ki, padding="same")
    return z.square().mean() + sparse_delta(k, kv, ki).square().mean()


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(engine: str, autocast: bool) -> None:
    x, w, v, i, b = case((6, 5), (3, 5), 0.3, torch.float32)
    _, k, kv, ki, _ = case((2, 1, 3, 3), (1,), 0.3, torch.float32)
    compiled = torch.compile(step, backend=engine, fullgraph=True)
    wanted = (x, v, b, kv)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = torch.autograd.grad(step(x, w, v, i, b, k.detach(), kv, ki), wanted)
        ours = torch.autograd.grad(compiled(x, w, v, i, b, k.detach(), kv, ki), wanted)
    for one, two in zip(ours, plain):
        close(one, two, 0.03 if autocast else 1e-5)


def test_compiled_graph_keeps_no_dense_weight() -> None:
    """The effective weight lives inside one operation, so no partitioner can decide to save it."""
    x, w, v, i, b = case((32, 24), (3, 24), 0.3, torch.float32)
    compiled = torch.compile(lambda *a: sparse_delta_linear(*a), backend="aot_eager", fullgraph=True)
    saved = saved_by(lambda: compiled(x, w, v, i, b))
    assert all(t.numel() < w.numel() or t.data_ptr() == w.data_ptr() for t in saved)


def test_repeatable() -> None:
    x, w, v, i, b = case((64, 48), (500, 48), 0.02, torch.float32)
    runs = [torch.autograd.grad(sparse_delta_linear(x, w, v, i, b).square().sum(), (x, v)) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs))


def test_rounded_away() -> None:
    w, i = torch.ones(1000, dtype=torch.bfloat16), torch.arange(1000)
    assert rounded_away(w, torch.full((1000,), 1e-3), i) == 1.0
    assert rounded_away(w, torch.full((1000,), 1e-3), i, torch.float32) == 0.0
    assert rounded_away(w, torch.full((1000,), 0.1), i) == 0.0
    assert rounded_away(w, torch.zeros(1000), i) == 0.0
    assert rounded_away(torch.zeros(1000, dtype=torch.bfloat16), torch.full((1000,), 1e-3), i) == 0.0
    torch.manual_seed(0)
    share = rounded_away(torch.randn(1000).bfloat16(), 1e-3 * torch.randn(1000), i)
    assert 0.4 < share < 0.95


def test_index_is_checked() -> None:
    good = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert check_index(good, 8) is good
    assert check_index(torch.empty(0, dtype=torch.int64), 0).numel() == 0
    for bad, numel, text in (
        (torch.tensor([0, 3, 3]), 8, "3 twice"),
        (torch.tensor([3, 0]), 8, "not sorted: 0 follows 3"),
        (torch.tensor([0, 8]), 8, "holds 8"),
        (torch.tensor([-1, 2]), 8, "holds -1"),
        (torch.tensor([0.0]), 8, "dtype float32"),
        (torch.tensor([[0]]), 8, "2 dimensions"),
        (good, 2**31 + 1, "int64"),
    ):
        with pytest.raises(KernelArgumentError, match=text):
            check_index(bad, numel)
    x, w, v, _, _ = case((4, 3), (2, 3), 0.25)
    with pytest.raises(KernelArgumentError, match="twice"):
        sparse_delta_linear(x, w, v, torch.tensor([1, 2, 2]))


def test_bad_arguments_name_themselves() -> None:
    x, w, v, i, b = case((4, 3), (2, 3), 0.25)
    free = w.clone().requires_grad_()
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("'x'", lambda: sparse_delta_linear(x[:, :2], w, v, i)),
        ("'weight'", lambda: sparse_delta_linear(x, w[None], v, i)),
        ("'weight'.*requires a gradient", lambda: sparse_delta_linear(x, free, v, i)),
        ("'values'", lambda: sparse_delta_linear(x, w, v[:1], i)),
        ("'index'", lambda: sparse_delta_linear(x, w, v, i.float())),
        ("'bias'", lambda: sparse_delta_linear(x, w, v, i, b[:2])),
        ("'x'", lambda: sparse_delta_linear(torch.ones(2, 3, dtype=torch.int64), w, v, i)),
        ("'weight'", lambda: sparse_delta_conv1d(x, w, v, i)),
        ("'x'", lambda: sparse_delta_conv2d(x, torch.ones(2, 2, 1, 1), v, i)),
        (
            "'padding'",
            lambda: sparse_delta_conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 1, 1), v, i, padding="full"),
        ),
        ("'x'", lambda: sparse_delta_conv2d(torch.ones(1, 2, 2, 4), torch.ones(2, 2, 3, 3), v, i)),
        ("'b'", lambda: sddmm(x, x.detach().float(), i)),
    ]
    for text, call in calls:
        with pytest.raises(KernelArgumentError, match=text):
            call()
    with torch.no_grad():
        assert sparse_delta_linear(x, free, v, i).shape == (2, 4)


def test_no_beta_warning() -> None:
    torch_sparse._quiet()
    x, w, v, i, b = case((64, 48), (5, 48), 0.02, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_delta_linear(x, w, v, i, b).sum().backward()


# FSDP2 on two CPU processes ------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A frozen linear layer and its trained entries."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        _, w, v, i, b = case((6, 6), (1, 6), 0.3, torch.float32, seed)
        self.weight = torch.nn.Parameter(w, requires_grad=False)
        self.bias = torch.nn.Parameter(b.detach(), requires_grad=False)
        self.values = torch.nn.Parameter(v.detach())
        self.register_buffer("index", i)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(sparse_delta_linear(x, self.weight, self.values, self.index, self.bias))


def _sharded(rank: int, port: int, queue: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = torch.nn.Sequential(Layer(0), Layer(1))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))[2 * rank : 2 * rank + 2]
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    grads = [p.grad.full_tensor().tolist() for p in model.parameters() if p.requires_grad]
    queue.put((rank, grads))
    dist.barrier()
    dist.destroy_process_group()


def test_fsdp2_gathers_the_frozen_weight_again() -> None:
    import socket

    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = context.SimpleQueue()
    workers = [context.Process(target=_sharded, args=(rank, port, queue)) for rank in range(2)]
    for w in workers:
        w.start()
    results = dict(queue.get() for _ in workers)
    for w in workers:
        w.join(60)
        assert w.exitcode == 0
    model = torch.nn.Sequential(Layer(0), Layer(1))
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(3))).square().mean().backward()
    for rank in range(2):
        for got, p in zip(results[rank], (p for p in model.parameters() if p.requires_grad)):
            assert p.grad is not None
            close(torch.tensor(got), p.grad, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype: torch.dtype) -> None:
    x, w, v, i, b = case((64, 48), (100, 48), 0.05, torch.float32)
    xs, ws = x.detach().to("cuda", dtype).requires_grad_(), w.to("cuda", dtype)
    vs, bs = v.detach().cuda().requires_grad_(), b.detach().cuda().requires_grad_()
    y = sparse_delta_linear(xs, ws, vs, i.cuda(), bs)
    grad = torch.randn(y.shape).to(y)
    _, gv, _ = torch.autograd.grad(y, (xs, vs, bs), grad)
    close(gv.cpu(), reference.sddmm(grad.cpu().double(), xs.detach().cpu().double(), i), 1e-4)
