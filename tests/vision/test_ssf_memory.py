"""SSF keeps what something else keeps anyway, and its gradients stay those of ``s x + t``."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import peft_suite as ps
from peft_suite.vision.methods.ssf import NormScaleShift, ScaleShift, _divisible


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
    )


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward beside parameters, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, keep = {}, []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            keep.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(saved.values())


def test_gradients_equal_those_of_the_plain_formula() -> None:
    model = ps.adapt(small(), "ssf").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [m for m in model.modules() if isinstance(m, ScaleShift) and m.recover]
    assert len(parts) == 4  # qkv and fc1 of two blocks
    ours = torch.autograd.grad(model(x).square().sum(), trained)
    for part in parts:
        part.recover = False
    plain = torch.autograd.grad(model(x).square().sum(), trained)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_second_derivatives() -> None:
    part = ScaleShift(3, "last", "paper", recover=True).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda v, s, t: torch.func.functional_call(part, {"scale": s, "shift": t}, v), (
        x, part.scale, part.shift,
    ))  # fmt: skip


@pytest.mark.parametrize(("scale", "shift", "expected"), [(1.0, 0.0, True), (1e-3, 0.0, False), (0.02, 5.0, False)])
def test_what_cannot_be_divided_keeps_its_input(scale: float, shift: float, expected: bool) -> None:
    part = ScaleShift(3, "last", "identity", recover=True)
    with torch.no_grad():
        part.scale[1], part.shift[1] = scale, shift
    assert _divisible(part.scale, part.shift) is expected
    x = torch.randn(50, 3)
    g = torch.randn(50, 3)
    (part(x) * g).sum().backward()
    torch.testing.assert_close(part.scale.grad, (g * x).sum(0), rtol=1e-4, atol=1e-4)


def test_saves_less_than_the_formula_written_down() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = ps.adapt(small(), "ssf")
    kept = saved_bytes(model, x)
    for part in model.modules():
        if isinstance(part, ScaleShift):
            part.recover = False
    tokens = 2 * 17 * 32 * 4  # bytes of one residual stream
    assert saved_bytes(model, x) - kept == 2 * (3 + 4) * tokens  # qkv and fc1, two blocks
    norms = [m for m in model.modules() if isinstance(m, NormScaleShift)]
    assert len(norms) == 5


def test_a_trained_norm_beside_it_keeps_its_scale() -> None:
    """Whatever the order of activation: trained copies stand for base values, scales act on them."""
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for names in (("scales", "norms"), ("norms", "scales")):
        model = small().eval()
        torch.manual_seed(1)
        ps.adapt(model, "ssf", name="scales")
        ps.adapt(model, "norm", name="norms")
        with torch.no_grad():
            for name, p in model.adapters.named_parameters():
                p.copy_(torch.linspace(0.5, 1.5, p.numel()).view_as(p) if "head" not in name else p)
        ps.activate(model, *names)
        outputs.append(model(x).detach())
        merged = ps.merge(model)(x)
        torch.testing.assert_close(merged, outputs[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0], outputs[1])
