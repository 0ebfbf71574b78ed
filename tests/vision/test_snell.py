"""SNELL and SNELLA: kernel, threshold, gradients, allocation."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.vision.methods.kernel_update import share_threshold
from peft_suite.vision.methods.snell import KernelUpdate, SNELLAConfig, SNELLConfig

HEAD = 100 * 768 + 100
COUNTS = {
    "snell": 1_327_872,
    "snell(rank=16)": 2_654_976,
    "snell(rank=32)": 5_309_184,
    "snella": 1_328_088,
    "snella(rank=16)": 2_655_192,
    "snella(rank=32)": 5_309_400,
}


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=100)


@pytest.mark.parametrize("method", COUNTS)
def test_counts_on_vit_base(vit: nn.Module, method: str) -> None:
    plan = ps.plan(vit, method)
    assert plan.trainable == COUNTS[method] + HEAD
    stored = 4 * (72 if method.startswith("snella") else 0)  # the sparsity of every matrix
    assert plan.adapter_bytes == 4 * (COUNTS[method] + HEAD) + stored


@pytest.mark.parametrize("numel", [1, 2, 37, 1000, 40_000, 200_003])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["random", "equal", "two"])
def test_threshold_is_torch_quantile(numel: int, share: float, kind: str) -> None:
    torch.manual_seed(numel)
    a = {"random": torch.rand(numel), "equal": torch.ones(numel), "two": (torch.arange(numel) > numel // 3).float()}[
        kind
    ]
    found = share_threshold(a, torch.tensor(share))
    assert torch.equal(found, torch.quantile(a, share))


def part(config: SNELLConfig, tail: bool = False, slices: list[tuple[int, int] | None] | None = None) -> KernelUpdate:
    torch.manual_seed(3)
    made = KernelUpdate(nn.Linear(10, 12), slices or [None], config, config.dropout, tail)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    return made


def dense(made: KernelUpdate, config: SNELLConfig, i: int, rows: slice) -> Tensor:
    """Delta of one slice by torch.cdist and plain autograd, [out, in]."""
    inner, outer = made.inner[i], made.outer[:, rows]
    k = sum(0.1 * (-1) ** h * torch.cdist(outer[h], inner[h]) for h in range(config.heads))
    share = config.sparsity
    if made.tail is not None:
        alpha, gamma, beta = made.tail[3 * i : 3 * i + 3]
        k = k + alpha * torch.softmax(k / gamma, dim=0) + beta
    elif config.mode == "official" and share == 0:
        return k
    t = torch.quantile(k.detach().abs(), share)
    if config.mode == "official":
        size = k.detach().abs()
        return k * torch.where(size > t, size, 0.0)
    return k * torch.where(k.abs() > t, k.abs() - t, 0.0)


CASES = [
    (SNELLConfig(rank=6, sparsity=0.6), False),
    (SNELLConfig(rank=6, sparsity=0.0), False),
    (SNELLConfig(rank=6, sparsity=0.6, mode="official"), False),
    (SNELLConfig(rank=6, sparsity=0.0, mode="official"), False),
    (SNELLAConfig(rank=6, sparsity=0.5), True),
    (SNELLAConfig(rank=6, heads=3, sparsity=0.0, mode="official"), True),
]


@pytest.mark.parametrize(("config", "tail"), CASES)
@pytest.mark.parametrize("way", ["direct", "weight"])
def test_update_and_gradients(config: SNELLConfig, tail: bool, way: str) -> None:
    slices: list[tuple[int, int] | None] = [(0, 4), (7, 12)]
    made = part(config, tail, slices)
    weight, bias = torch.randn(12, 10), torch.randn(12, requires_grad=True)
    x = torch.randn(5, 3, 10, requires_grad=True)
    pull = torch.randn(5, 3, 12)
    leaves = [x, bias, *made.parameters()]
    if way == "direct":
        assert made.direct(weight)
        y = made(weight, bias, x)
    else:
        y = nn.functional.linear(x, *made(weight, bias))
    found = torch.autograd.grad((y * pull).sum(), leaves)
    whole = torch.cat(
        (
            weight[:4] + dense(made, config, 0, slice(0, 4)),
            weight[4:7],
            weight[7:] + dense(made, config, 1, slice(4, 9)),
        )
    )
    other = nn.functional.linear(x, whole, bias)
    wanted = torch.autograd.grad((other * pull).sum(), leaves)
    torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    merged, _ = made.fold(nn.Linear(10, 12), weight, bias)
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sparsity_is_what_was_asked(share: float) -> None:
    made = part(SNELLConfig(rank=6, sparsity=share))
    zeros = int((made.deltas()[0] == 0).sum())
    assert abs(zeros - share * 120) <= 1


def test_translation_leaves_the_kernel() -> None:
    made = part(SNELLConfig(rank=6, sparsity=0.0, mode="official"))
    before = made.deltas()[0].detach()
    with torch.no_grad():
        made.inner.add_(0.7)
        made.outer.add_(0.7)
    torch.testing.assert_close(made.deltas()[0], before, rtol=1e-4, atol=1e-5)


def test_nothing_dense_is_kept() -> None:
    made = part(SNELLConfig(rank=6, sparsity=0.5))
    weight, x = torch.randn(12, 10), torch.randn(4, 10)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(weight, None, x)
    assert not [t for t in kept if t.shape[-2:] == (12, 10) and t is not weight and t.data_ptr() != weight.data_ptr()]


def test_dropout_takes_the_branch_only() -> None:
    made = part(SNELLConfig(rank=6, sparsity=0.5, dropout=0.5, drop_path=0.5)).train()
    weight, x = torch.randn(12, 10), torch.randn(64, 2, 10)
    torch.manual_seed(0)
    off = made(weight, None, x) - x @ weight.t()
    dropped = (off.flatten(1).abs().amax(1) < 1e-5).float().mean()
    assert 0.2 < float(dropped) < 0.8
    assert not torch.equal(made(weight, None, x), made(weight, None, x))
    made.eval()
    torch.testing.assert_close(made(weight, None, x), x @ made.fold(nn.Linear(10, 12), weight, None)[0].t())


def test_allocation_spends_the_volume() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    ps.adapt(model, "snella(rank=4, sparsity=0.0, target=0.75, interval=3, rounds=4)")
    adapter = model.adapters["default"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    parts = [(p, i) for p, i in adapter.method.matrices(adapter)]
    entries = sum((p.slices[i][1] - p.slices[i][0]) * p.fan_in for p, i in parts)
    for step in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        ps.events(model).after_step(step, optimizer)
        t = (step + 1) // 3
        if step % 3 == 2:
            left = sum((1 - float(p.sparsity[i])) * (p.slices[i][1] - p.slices[i][0]) * p.fan_in for p, i in parts)
            wanted = entries * (0.25 + 0.75 * (1 - t / 4) ** 3)
            assert math.isclose(left, wanted, abs_tol=len(parts) + 1)
