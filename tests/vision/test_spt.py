"""SPT: measuring, budgets, plans, files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import peft_suite as ps
from peft_suite.errors import AdapterError, ConfigError
from peft_suite.train import fit
from peft_suite.vision.methods.allocation import Allocation, Site, allocate, allocate_official
from peft_suite.vision.methods.spt import SPTLoRAConfig

BATCHES = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)), torch.arange(4)) for i in range(3)]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    ).eval()


def tuned(method: str) -> nn.Module:
    model = ps.adapt(tiny(), method)
    ps.events(model).calibrate(BATCHES, lambda b: nn.functional.cross_entropy(model(b[0]), b[1]))
    return model


def trained(model: nn.Module) -> int:
    return ps.summary(model).trainable - (24 * 5 + 5)


@pytest.mark.parametrize("method", ["spt-lora", "spt-adapter"])
@pytest.mark.parametrize("budget", [100, 300, 1000, 1500])
def test_budget_is_met(method: str, budget: int) -> None:
    model = tuned(f"{method}(budget={budget}, rank=2)")
    assert abs(trained(model) - budget) <= 0.01 * budget
    plan = model.adapters["default"].method.config.plan
    assert plan.total == trained(model) and plan.dead == 0


def test_budget_is_read() -> None:
    values = {"0.4M": 400_000, "80k": 80_000, 5000: 5000, "1234": 1234, 4e5: 400_000}
    assert all(SPTLoRAConfig(budget=b).values == v for b, v in values.items())
    with pytest.raises(ConfigError, match="budget"):
        SPTLoRAConfig(budget="much")
    with pytest.raises(ConfigError, match="cannot be spent"):
        tuned("spt-lora(budget=10)")
    with pytest.raises(ConfigError, match="cannot be spent"):
        tuned("spt-lora(budget=10M)")


def test_plan_before_and_after_calibration() -> None:
    before = ps.plan(tiny(), "spt-lora(budget=900, rank=2)")
    assert before.trainable == 900 + 125 and before.pending == 900 - 24 and "calibration" in str(before)
    assert any(row.edit == "reweigh" and not row.parameters for row in before.rows)
    model = tuned("spt-lora(budget=900, rank=2)")
    after = ps.plan(tiny(), model.adapters["default"].method.config)
    assert after.pending == 0 and after.trainable == ps.summary(model).trainable


def test_sensitivity_is_the_sum_of_squared_gradients() -> None:
    model = ps.adapt(tiny(), "spt-lora(budget=900, batches=2)")
    adapter = model.adapters["default"]
    loss = lambda b: nn.functional.cross_entropy(model(b[0]), b[1])  # noqa: E731
    scores = adapter.method.measure(adapter, iter(BATCHES), loss)
    plain = tiny()
    wanted = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    for x, y in BATCHES[:2]:
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        for n, p in plain.named_parameters():
            wanted[n] += p.grad.square()
    assert not {n for n in scores if n.startswith(("head", "patch_embed", "pos_embed", "cls_token"))}
    for n, s in scores.items():
        torch.testing.assert_close(s, wanted[n], rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(AdapterError, match="batch"):
        adapter.method.measure(adapter, [], loss)
    ps.activate(model)
    with pytest.raises(AdapterError, match="activate"):
        adapter.method.measure(adapter, BATCHES, loss)


@pytest.mark.parametrize(
    "method", ["spt-lora(budget=900, rank=2)", "spt-adapter(budget=900, rank=2, official=True, sweep_step=30)"]
)
def test_file_brings_the_plan(method: str, tmp_path: Path) -> None:
    model = tuned(method)
    with torch.no_grad():
        for p in model.adapters["default"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    ps.save(model, tmp_path)
    again = ps.load(tiny(), tmp_path)
    x = BATCHES[0][0]
    assert torch.equal(again(x), model(x))
    assert again.adapters["default"].method.config == model.adapters["default"].method.config
    assert not again.adapters["default"].method.capabilities.needs_calibration
    with pytest.raises(ConfigError, match="calibrate"):
        ps.adapt(tiny(), model.adapters["default"].method.config)


def test_frozen_entries_stay_bit_identical() -> None:
    model = tuned("spt-lora(budget=900, rank=2)")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("adapters.")}
    optimizer = torch.optim.AdamW(model.adapters["default"].parameters(), lr=0.01, weight_decay=0.1)
    nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    wanted = model(BATCHES[0][0])
    torch.testing.assert_close(ps.merge(model)(BATCHES[0][0]), wanted, rtol=1e-4, atol=1e-5)


def test_official_leaves_single_norm_entries_out() -> None:
    model = tuned("spt-lora(budget=600, rank=2, official=True, sweep_step=20)")
    plan = model.adapters["default"].method.config.plan
    assert plan.total == trained(model) + plan.dead
    assert not [n for n, _ in plan.entries if "norm" in n]


class Stopping(Dataset):
    """The data of a run that is interrupted at one access."""

    def __init__(self, data: Dataset, at: int) -> None:
        self.data, self.left, self.targets = data, at, data.targets

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.data[index]


@pytest.mark.parametrize("method", ["spt-lora(budget=1500, rank=2)", "snella(rank=4, interval=2, rounds=5)", "bi-lora"])
def test_a_stopped_run_resumes_to_the_same_bytes(method: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
    from train_material import RECIPE, adapted, splits

    recipe = RECIPE.replace(epochs=2, calibration_batches=2)
    options = {"seed": 5, "device": "cpu", "progress": False}
    fit(adapted(method), splits(), recipe, out=tmp_path / "whole", **options)
    data = splits()
    cut = dataclasses.replace(data, train=Stopping(data.train, 2 * 16 + 16 + 90 + 40))
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(method), cut, recipe, out=tmp_path / "cut", **options)
    model = adapted(method)
    fit(model, splits(), recipe, out=tmp_path / "cut", resume=True, **options)
    files = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if method.startswith("spt"):
        assert model.adapters["default"].method.config.plan is not None
        fit(
            again := adapted(method), splits(), recipe, out=tmp_path / "cut", resume=True, **options
        )  # finished: only loads
        assert torch.equal(again.eval()(BATCHES[0][0]), model.eval()(BATCHES[0][0]))


# allocation ----------------------------------------------------------------------------------------------------------


def table(seed: int = 0, count: int = 12) -> tuple[list[Site], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    sites, scores = [], {}
    for i in range(count):
        if i % 3:
            site = Site(f"m{i}", f"m{i}", "weight", 0, 400 + 30 * i, "q", None, 60 + 5 * i)
        else:
            site = Site(f"b{i}", f"b{i}", "bias", 0, 20 + i)
        sites.append(site)
        scores[site.name] = torch.rand(site.size, generator=g) ** (1 + i % 4)
    return sites, scores


def naive(
    sites: list[Site], scores: dict[str, Tensor], rule: tuple[float, float, bool, bool], k: int
) -> tuple[int, set[str]]:
    """The official walk at one threshold: (total, sites treated as a whole)."""
    flat = torch.cat([scores[s.name] for s in sites])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(k).indices] = True
    total, whole = 0, set()
    for site, part in zip(sites, mask.split([s.size for s in sites]), strict=True):
        n = int(part.sum())
        cost, need = (site.cost, site.cost / rule[0]) if site.role else (site.size, site.size / rule[1])
        if n >= need and (site.role or rule[2]):
            total, whole = total + cost, whole | {site.name}
        elif not rule[3]:
            total += n
    return total, whole


@pytest.mark.parametrize("rule", [(10.0, 5.0, True, False), (4.0, 2.0, False, False), (10.0, 5.0, True, True)])
@pytest.mark.parametrize("budget", [100, 400, 800])
def test_official_sweep_equals_the_naive_one(rule: tuple[float, float, bool, bool], budget: int) -> None:
    sites, scores = table()
    steps = list(range(10, 800, 10))
    made = allocate_official(sites, scores, rule, budget, steps, 7)
    totals = [(abs(naive(sites, scores, rule, k)[0] + 7 - budget), -k) for k in steps]
    k = -min(totals)[1]
    total, whole = naive(sites, scores, rule, k)
    assert (made.sensitive, made.total, {*made.matrices, *made.vectors}) == (k, total + 7, whole)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [20, 90, 250, 700])
def test_default_spends_the_budget(seed: int, budget: int) -> None:
    sites, scores = table(seed)
    rule = (10.0, 5.0, True, False)
    made: Allocation | None = allocate(sites, scores, rule, budget)
    assert made is not None and 0.99 * budget <= made.total <= budget
    whole = {*made.matrices, *made.vectors}
    _, official = naive(sites, scores, rule, made.sensitive)
    assert whole <= official  # what did not fit keeps single entries
    threshold = torch.cat([scores[s.name] for s in sites]).sort(descending=True).values[made.sensitive - 1]
    for name, index in made.entries.items():
        assert name not in whole and torch.equal(index, torch.nonzero(scores[name] >= threshold).flatten())
    assert allocate(sites, scores, rule, 10**9) is None and allocate(sites, scores, rule, 0) is None
