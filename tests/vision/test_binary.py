"""Low-bit adapters: code books, gradients, packed files and their exact sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.errors import ConfigError
from peft_suite.vision.methods.binary import EPSILON, QuantisedLinear, codebook

HEAD = 100 * 768 + 100


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=100)


# payload of codes and statistics, as the paper's table and README count it
SIZES = [
    ("bi-adaptformer", 589_824, 73_920),
    ("bi-lora", 1_179_648, 147_840),
    ("bi-adaptformer(bottleneck=1)", 18_432, 2_496),
    ("bi-lora(bottleneck=1)", 36_864, 4_992),
    ("bi-adaptformer(bits=2)", 589_824, 2 * 73_728 + 24 * 8),
]


@pytest.mark.parametrize(("method", "weights", "payload"), SIZES)
def test_sizes_on_vit_base(vit: nn.Module, method: str, weights: int, payload: int) -> None:
    plan = ps.plan(vit, method)
    assert plan.trainable == weights + HEAD
    assert plan.adapter_bytes == payload + 4 * HEAD


def test_bi_head_on_vit_base(vit: nn.Module) -> None:
    plan = ps.plan(vit, "bi-adaptformer(bi_head=True)")
    assert plan.trainable == 589_824 + 76_800
    assert plan.adapter_bytes == 73_920 + 76_800 // 8 + 8


def test_one_bit_level_is_the_upper_quartile() -> None:
    levels, borders = codebook(1)
    assert borders == (0.0,) and levels == pytest.approx((-0.6744897501960817, 0.6744897501960817))
    for bits in (2, 4, 8):
        levels, borders = (torch.tensor(t, dtype=torch.float64) for t in codebook(bits))
        assert len(levels) == 1 << bits and bool((levels.diff() > 0).all())
        assert torch.allclose(borders, (levels[1:] + levels[:-1]) / 2) and torch.allclose(levels, -levels.flip(0))


def reference(weight: Tensor, bits: int) -> Tensor:
    """The paper's quantised matrix by plain autograd, straight through."""
    levels, borders = (torch.tensor(t, dtype=weight.dtype) for t in codebook(bits))
    w = (weight - weight.mean()) / (weight.std() + EPSILON)
    q = levels[torch.bucketize(w.detach(), borders)]
    return (q + w - w.detach()) * weight.std() + weight.mean()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gradient_is_autograds(bits: int) -> None:
    torch.manual_seed(1)
    linear = QuantisedLinear(9, 7, bits).double()
    nn.init.normal_(linear.weight, 0.3, 2.0)
    wanted_weight = linear.weight.detach().clone().requires_grad_()
    pull = torch.randn(7, 9, dtype=torch.float64)
    (linear.quantised() * pull).sum().backward()
    wanted = reference(wanted_weight, bits)
    (wanted * pull).sum().backward()
    torch.testing.assert_close(linear.quantised(), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linear.weight.grad, wanted_weight.grad, rtol=1e-7, atol=1e-9)
    assert linear.quantised().unique().numel() <= 1 << bits


def test_shift_and_scale_pass_through() -> None:
    torch.manual_seed(2)
    linear = QuantisedLinear(8, 8, 2)
    nn.init.normal_(linear.weight)
    before = linear.quantised().detach()
    with torch.no_grad():
        linear.weight.mul_(3.0).add_(0.5)
    torch.testing.assert_close(linear.quantised(), 3.0 * before + 0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["bi-adaptformer(bottleneck=5, bits=1)", "bi-lora(bottleneck=5, bits=2, bi_head=True)"]
)
def test_packed_file(method: str, tmp_path: Path) -> None:
    """Loads exactly, saves again to the same tensors, and trains on from the values of the file."""
    x = torch.randn(3, 3, 32, 32)
    model = ps.adapt(tiny(), method)
    with torch.no_grad():
        for parameter in model.adapters["default"].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = model(x)
    ps.save(model, tmp_path / "first")
    again = ps.load(tiny(), tmp_path / "first", trainable=True)
    assert torch.equal(again(x), wanted)
    ps.save(again, tmp_path / "second")
    first, second = model.adapters["default"].stored(), again.adapters["default"].stored()
    assert all(torch.equal(second[k], v) for k, v in first.items()) and any(k.endswith("codes") for k in first)

    adapter = again.adapters["default"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    nn.functional.cross_entropy(again(x), torch.tensor([0, 1, 2])).backward()
    ps.events(again).before_step(0, optimizer)
    assert not any(bool(b.any()) for n, b in adapter.named_buffers() if n.endswith("stats"))
    torch.testing.assert_close(again(x), wanted, rtol=1e-4, atol=1e-5)  # thawed: same codes, mean and deviation
    again = ps.load(tiny(), tmp_path / "first", trainable=True)
    optimizer = torch.optim.SGD(again.adapters["default"].parameters(), lr=0.05)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(again(x), torch.tensor([0, 1, 2]))
        loss.backward()
        ps.events(again).before_step(step, optimizer)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_thirty_two_bits_are_other_methods() -> None:
    with pytest.raises(ConfigError, match="lora"):
        ps.plan(tiny(), "bi-lora(bits=32)")


def test_an_empty_outer_cell_still_thaws() -> None:
    linear = QuantisedLinear(4, 4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([0.0, 0.1, 0.1, 0.2]).repeat(4, 1))
        linear.stats.copy_(torch.tensor([0.1, 1.0]))
    linear.thaw()
    assert bool(linear.weight.isfinite().all()) and not bool(linear.stats.any())
