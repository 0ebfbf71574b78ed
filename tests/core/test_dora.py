"""DoRA computed from a layer's output, against the same update in weight space."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.methods.lora_parts import DoRA

LAYERS = {
    "linear": lambda: nn.Linear(12, 18),
    "no bias": lambda: nn.Linear(12, 18, bias=False),
    "convolution": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2),
    "1x1": lambda: nn.Conv2d(6, 8, 1, bias=False),
}
ROWS = {"whole": (None,), "gaps": ((0, 6), (12, 18)), "all slices": ((0, 6), (6, 12), (12, 18))}


class Stream(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Identity(), layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.first(x))
        return y


def adapted(layer: nn.Module, rows: tuple[tuple[int, int] | None, ...] = (None,), **options: object) -> nn.Module:
    """A layer with DoRA somewhere off its start."""
    roles = {f"r{i}": ps.Weight("layer", r) for i, r in enumerate(rows)}
    point = ps.Point("layer", 18)
    anatomy = ps.Anatomy("t", 18, (ps.Block(point, {}, roles, (point,)),))
    spec = {"name": "lora", "rank": 3, "alpha": 6, "targets": tuple(roles), "dora": True, **options}
    model = ps.adapt(Stream(layer), spec, anatomy=anatomy)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def part_of(model: nn.Module) -> DoRA:
    (part,) = (e.part for e in model.adapters["default"].edits if isinstance(e.part, DoRA))
    return part


def input_of(layer: nn.Module) -> Tensor:
    shape = (4, 6, 9, 7) if isinstance(layer, nn.Conv2d) else (4, 5, 12)
    return torch.randn(shape, dtype=layer.weight.dtype, requires_grad=True)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients of the input and of everything that trains."""
    y = model(x)
    return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *model.adapters.parameters()])]


CASES = [*((name, "whole") for name in LAYERS), ("linear", "gaps"), ("no bias", "gaps"), ("linear", "all slices")]


@pytest.mark.parametrize(("name", "rows"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_those_of_the_weight(
    name: str, rows: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = adapted(LAYERS[name](), ROWS[rows]).to(dtype)
    x = input_of(model.layer)
    found = results(model, x)
    merged = copy.deepcopy(model)
    ps.merge(merged)
    monkeypatch.setattr(DoRA, "direct", lambda *_: False)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for a, b in zip([*found, merged(x)], [*results(model, x), found[0]], strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < tolerance


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_nothing_of_the_size_of_the_weight_is_kept(name: str) -> None:
    model = adapted(LAYERS[name]())
    weight, kept = model.layer.weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(input_of(model.layer))
    own = {p.data_ptr() for p in model.parameters()}
    assert kept
    assert not [t.shape for t in kept if t.numel() == weight.numel() and t.data_ptr() not in own]


def test_a_trained_weight_below_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = adapted(nn.Linear(12, 18))
    weight = model.layer.weight.requires_grad_()
    x, kept = input_of(model.layer), []
    for direct in (True, False):
        monkeypatch.setattr(DoRA, "direct", lambda self, w, b=None, x=None, on=direct: on)
        kept.append(torch.autograd.grad(model(x).square().sum(), weight)[0])
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-4)


def test_rows_of_zeros_stay_zero() -> None:
    layer = nn.Linear(12, 18)
    with torch.no_grad():
        layer.weight[3] = 0
    spec = {"name": "lora", "rank": 3, "targets": ("layer",), "dora": True}
    model = ps.adapt(Stream(layer), spec, anatomy=ps.Anatomy("t", 18, ()))
    found = results(model, input_of(layer))
    assert all(bool(t.isfinite().all()) for t in found)
    assert torch.equal(found[0][..., 3], layer.bias[3].expand(4, 5))
    ps.merge(model)
    assert bool((model.layer.weight[3] == 0).all())


def test_lengths_are_exact_under_autocast() -> None:
    model = adapted(nn.Linear(12, 18))
    part, weight = part_of(model), model.layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        found = part.length(weight)
        assert model(torch.randn(2, 12)).dtype is torch.bfloat16
    torch.testing.assert_close(found, (weight + part.delta()).norm(dim=1))


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_reads_one_vector(dora: bool) -> None:
    model = adapted(nn.Linear(12, 18), dora=dora)
    x = torch.randn(12)
    torch.testing.assert_close(model(x), model(x[None])[0])
