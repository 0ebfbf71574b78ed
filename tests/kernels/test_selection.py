"""Exact selection against sorting: ties, signs, dtypes, borders between tensors, chunks, NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_suite.errors import KernelArgumentError
from peft_suite.kernels import dispatch
from peft_suite.kernels.api import selection
from peft_suite.kernels.api.selection import kth_value, quantile, select_below, select_mask, select_topk
from peft_suite.kernels.reference import sparse as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["bracket", "radix", "small bracket", "radix reference"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every way to the answer, with chunks that cross nothing evenly."""
    monkeypatch.setitem(selection.CHUNK, "cpu", 37)
    if "radix" in request.param:
        monkeypatch.setattr(selection, "_bracketed", lambda *_: None)
    elif "small" in request.param:
        monkeypatch.setattr(selection, "COLLECT", 60)
        monkeypatch.setattr(selection, "SAMPLE", 256)
    with dispatch.use_backend("reference" if "reference" in request.param else "auto"):
        yield request.param


def oracle(tensors: list[Tensor], k: int, largest: bool, absolute: bool) -> tuple[float, int, int, list[Tensor]]:
    """Threshold and masks by a stable sort of everything."""
    x = torch.cat([t.reshape(-1).double() for t in tensors])
    key = x.abs() if absolute else x
    order = torch.sort(key + 0.0, descending=largest, stable=True).indices
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    parts = [m.view(t.shape) for m, t in zip(mask.split([t.numel() for t in tensors]), tensors)]
    if k == 0:
        return (math.inf if largest else -math.inf), 0, 0, parts
    return *reference.kth_value(x, k, largest, absolute), parts


def agree(tensors: list[Tensor], k: int, largest: bool, absolute: bool) -> None:
    value, beyond, ties, masks = oracle(tensors, k, largest, absolute)
    got = kth_value(tensors, k, largest=largest, absolute=absolute)
    assert got == (value, beyond, ties)
    for mask, wanted in zip(select_mask(tensors, k, largest=largest, absolute=absolute), masks):
        assert torch.equal(mask, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_against_sorting(dtype: torch.dtype, largest: bool, absolute: bool) -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(11, 13),
        torch.randn(0),
        torch.randn(3, 4, 5).transpose(0, 2),
        torch.randn(()),
        torch.randn(301),
    ]
    tensors = [t.to(dtype) for t in tensors]
    total = sum(t.numel() for t in tensors)
    for k in (0, 1, 2, total // 3, total - 1, total):
        agree(tensors, k, largest, absolute)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-40, -1e-45, math.inf, -math.inf]), max_size=50),
        min_size=1,
        max_size=4,
    ),
    st.data(),
    st.booleans(),
    st.booleans(),
)
def test_ties_across_borders(lists: list[list[float]], data: st.DataObject, largest: bool, absolute: bool) -> None:
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors)))
    agree(tensors, k, largest, absolute)


def test_all_equal() -> None:
    tensors = [torch.full((50,), 0.25), torch.full((70,), -0.25)]
    got = select_topk({"a": tensors[0], "b": tensors[1]}, 60)
    assert got["a"].tolist() == list(range(50)) and got["b"].tolist() == list(range(10))
    assert kth_value(tensors, 60) == (0.25, 0, 120)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randint(-4, 5, (333,)).float(), "b": torch.randint(-4, 5, (41, 7)).float()}
    results = []
    for chunk in (1, 36, 100, 10**6):
        monkeypatch.setitem(selection.CHUNK, "cpu", chunk)
        results.append(select_topk(tensors, 200))
    assert all(torch.equal(r[n], results[0][n]) for r in results for n in r)


def test_topk_forms() -> None:
    torch.manual_seed(0)
    named = {"a": torch.randn(10, 10), "b": 10 * torch.randn(50), "c": torch.randn(0)}
    everything = select_topk(named, fraction=0.2)
    assert sum(i.numel() for i in everything.values()) == 30 and list(everything) == ["a", "b", "c"]
    assert all(i.dtype == torch.int32 and bool((i[1:] > i[:-1]).all()) for i in everything.values())
    each = select_topk(named, fraction=0.2, per_tensor=True)
    assert [i.numel() for i in each.values()] == [20, 10, 0]
    assert set(each["a"].tolist()) == set(named["a"].abs().view(-1).topk(20).indices.tolist())
    budgets = select_topk(named, {"b": 3}, index_dtype=torch.int64)
    assert [i.numel() for i in budgets.values()] == [0, 3, 0] and budgets["b"].dtype == torch.int64
    small = select_topk(named.items(), 5, largest=False)
    assert sum(i.numel() for i in small.values()) == 5
    signed = select_topk(named, 1, score="value")
    assert named["b"].argmax().item() == signed["b"].item()
    scores = {name: torch.rand(t.shape) for name, t in named.items()}
    scored = select_topk(named, 40, score=lambda name, t: scores[name])
    wanted = torch.cat([s.view(-1) for s in scores.values()]).topk(40).values.min()
    assert all(bool((scores[n].view(-1)[i.long()] >= wanted).all()) for n, i in scored.items())


def test_masks_keep_names() -> None:
    masks = select_mask({"a": torch.tensor([[1.0, -3.0]]), "b": torch.tensor([2.0])}, 2)
    assert isinstance(masks, dict) and masks["a"].tolist() == [[False, True]] and masks["b"].tolist() == [True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_is_strict(dtype: torch.dtype) -> None:
    t = torch.tensor([0.5, -0.25, 0.0, -0.5, 0.125], dtype=dtype)
    assert select_below({"t": t}, 0.5)["t"].tolist() == [1, 2, 4]
    assert select_below([("t", t)], 0.0)["t"].numel() == 0


@pytest.mark.parametrize("interpolation", ["linear", "lower", "higher", "midpoint", "nearest"])
def test_quantile(interpolation: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(401, dtype=torch.float64)
    for q in (0.0, 0.1, 0.25, 0.5, 0.9, 0.995, 1.0):
        wanted = torch.quantile(x, q, interpolation=interpolation).item()
        assert quantile([x[:100], x[100:]], q, interpolation=interpolation) == pytest.approx(wanted, rel=1e-12)
        assert quantile(x.abs(), q, interpolation=interpolation) == quantile(
            x, q, interpolation=interpolation, absolute=True
        )
    ties = torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert quantile(ties, 0.5) == 1.0 and quantile(ties, 5 / 6) == pytest.approx(1.5)


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    kth_value([torch.randn(100), torch.randn(30)], 10, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (130, 130) and all(0 < d <= t == 130 for d, t in seen)


def test_requires_grad_and_parameters_are_fine() -> None:
    layer = torch.nn.Linear(5, 4)
    assert sum(i.numel() for i in select_topk(layer.named_parameters(), 7).values()) == 7


def test_bad_arguments() -> None:
    x = torch.randn(300)
    bad = x.clone()
    bad[255] = math.nan
    calls: list[tuple[str, Any]] = [
        ("'1' holds NaN at flat position 255", lambda: kth_value([x, bad], 5)),
        ("'w' holds NaN", lambda: select_topk({"w": bad}, 5)),
        ("holds NaN", lambda: quantile(bad, 0.5)),
        ("'k'", lambda: kth_value([x], 301)),
        ("'k'", lambda: kth_value([x], -1)),
        ("'k'", lambda: kth_value([x], 1.5)),  # type: ignore[arg-type]
        ("'k'", lambda: select_topk({"w": x})),
        ("'k'", lambda: select_topk({"w": x}, {"v": 1})),
        ("'fraction'", lambda: select_topk({"w": x}, fraction=1.5)),
        ("'score'", lambda: select_topk({"w": x}, 1, score="size")),
        ("'score'", lambda: select_topk({"w": x}, 1, score=lambda n, t: t[:3])),
        ("'tensors'", lambda: kth_value([x.long()], 1)),
        ("'tensors'", lambda: kth_value([x.to("meta")], 1)),
        ("'tensors'", lambda: kth_value(x, 1)),  # type: ignore[arg-type]
        ("'q'", lambda: quantile(x, 1.5)),
        ("hold no elements", lambda: quantile([], 0.5)),
    ]
    for text, call in calls:
        with pytest.raises(KernelArgumentError, match=text):
            call()


def test_memory_is_bounded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the list (8 MB): one chunk, and what is collected."""
    import tracemalloc

    monkeypatch.setitem(selection.CHUNK, "cpu", 4096)
    monkeypatch.setattr(selection, "COLLECT", 20_000)
    monkeypatch.setattr(selection, "SAMPLE", 8192)
    tensors = [torch.randn(10_000) for _ in range(200)]
    tracemalloc.start()
    got = kth_value(tensors, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got.value == torch.cat(tensors).abs().topk(1000).values.min()
    assert peak < 500_000
