"""SaRA and LT-SFT: what they choose, that nothing else moves, what files hold, how adapters add up."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.diffusion.methods.sara import SaRA
from peft_suite.diffusion.methods.sparse_values import SparseValues, entries_of
from peft_suite.errors import ConfigError, PeftSuiteError, UnsupportedError
from peft_suite.files import TENSORS
from peft_suite.train import DataSplits, Recipe, fit
from peft_suite.train import loop as loop_module


class Net(nn.Module):
    """Convolution, norms, an embedding, linear layers, and three parameters whose entries nobody can choose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.classes = nn.Embedding(5, 8)
        self.up = nn.Linear(128, 72)
        self.mid = nn.Linear(72, 72)
        self.tied = nn.Linear(72, 72, bias=False)
        self.twin = nn.Linear(72, 72, bias=False)
        self.twin.weight = self.tied.weight
        self.shift = nn.Parameter(torch.zeros(72))
        self.out = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, 2, 4, 4]``."""
        kind = torch.arange(len(x)) % 5
        h = F.silu(self.norm(self.conv(x)) + self.classes(kind)[:, :, None, None])
        h = F.silu(self.up(h.flatten(1)))
        h = h + F.silu(self.mid(h)) + 0.1 * self.twin(self.tied(h)) + self.shift
        return self.out(h)


ANATOMY = ps.Anatomy(family="sara-net", dim=72, blocks=())
REACHED = 2 * 8 * 9 + 8 + 16 + 40 + 72 * 129 + 72 * 73 + 73 * 3


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


ALONE = "rank_weight=0, progressive=None"  # chosen entries and nothing else


def adapted(method: str = "sara(quantile=0.2)", seed: int = 0, **options: Any) -> tuple[Net, ps.Adapter]:
    model = net(seed)
    ps.adapt(model, method, anatomy=ANATOMY, **options)
    return model, adapter_of(model)


def adapter_of(model: Any, name: str = "default") -> ps.Adapter:
    adapter = model.adapters[name]
    assert isinstance(adapter, ps.Adapter)
    return adapter


def batch(step: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 2, 4, 4, generator=generator), torch.randn(size, 3, generator=generator)


def adamw(model: nn.Module, lr: float = 0.01, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range | int, clip: float = 0.0) -> list[float]:
    events, losses = ps.events(model), []
    for step in steps if isinstance(steps, range) else range(steps):
        x, y = batch(step)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        events.before_step(step, optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        events.after_step(step, optimizer)
        losses.append(loss.item())
    return losses


def base(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("adapters.")}


def effective(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the adapted model computes with."""
    return {n: p.detach() for n, p in ps.merge(copy.deepcopy(model)).named_parameters()}


def masks(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    found = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in base(model).items()}
    for e in entries_of(adapter_of(model, name)):
        found[e.name].view(-1)[e.part.positions(e.tensor).long()] = True
    return found


def randomise(adapter: ps.Adapter, seed: int = 3, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


# ---- what is chosen --------------------------------------------------------------------------------------------------


def test_wrapping_changes_nothing_and_chooses_strictly_below_theta() -> None:
    model = net()
    with torch.no_grad():
        model.mid.weight.view(-1)[:4] = torch.tensor([0.01, -0.01, 0.0099, -0.0])
    x, start = batch()[0], base(model)
    before = model(x)
    ps.adapt(model, "sara(threshold=0.01)", anatomy=ANATOMY)
    assert torch.equal(model(x), before)
    assert all(torch.equal(p, start[n]) for n, p in base(model).items())
    chosen = masks(model)
    for name, weight in start.items():
        left_out = name in ("shift", "tied.weight")
        assert torch.equal(chosen[name], (weight.abs() < 0.01) & (not left_out)), name
    assert chosen["mid.weight"].view(-1)[:4].tolist() == [False, False, True, True]
    assert chosen["norm.bias"].all() and not chosen["norm.weight"].any()
    assert ps.summary(model).trainable == sum(int(m.sum()) for m in chosen.values())
    method = adapter_of(model).method
    assert isinstance(method, SaRA)
    assert set(method.left_out) == {"shift", "tied.weight", "twin.weight"}
    assert "not to be reached: shift, tied.weight, twin.weight" in method.decision
    assert len([p for p in model.parameters() if p.requires_grad]) == sum(bool(m.any()) for m in chosen.values())


@pytest.mark.parametrize(
    ("spec", "count"), [("budget=1234", 1234), ("budget='1.5k'", 1500), ("quantile=0.1", round(0.1 * REACHED))]
)
def test_budget_is_met_exactly_and_planned_exactly(spec: str, count: int) -> None:
    model = net()
    planned = ps.plan(model, f"sara({spec})", anatomy=ANATOMY)
    with torch.device("meta"):
        blank = Net()
    assert planned.trainable == ps.plan(blank, f"sara({spec})", anatomy=ANATOMY).trainable == count
    ps.adapt(model, f"sara({spec})", anatomy=ANATOMY)
    assert ps.summary(model).trainable == count
    magnitudes = torch.cat([w.abs().flatten() for n, w in base(model).items() if n not in ("shift", "tied.weight")])
    inside = torch.cat([w.abs()[masks(model)[n]] for n, w in base(model).items()])
    assert float(inside.max()) == float(magnitudes.sort().values[count - 1])
    theta = adapter_of(model).method.threshold(adapter_of(model))  # type: ignore[attr-defined]
    assert inside.max() < theta and torch.nextafter(inside.max(), torch.tensor(1.0)) == theta


def test_ties_are_kept_in_order_and_all_entries_can_train() -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    ps.adapt(model, "sara(budget=100)", anatomy=ANATOMY)
    assert masks(model)["conv.weight"].view(-1).nonzero()[:, 0].tolist() == list(range(100))
    model, _ = adapted(f"sara(quantile=1.0, {ALONE})")
    assert ps.summary(model).trainable == REACHED
    train(model, adamw(model), 2)


def test_learning_rate_formula() -> None:
    wanted = {2e-4: 9.324e-4, 8e-4: 7.558e-4, 2e-3: 4.966e-4, 1e-2: 3.020e-5}
    for theta, rate in wanted.items():
        assert math.isclose(SaRA.learning_rate(theta), rate, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("sara", ConfigError, r"needs to know what to train.*threshold.*quantile.*budget"),
        ("sara(budget=9, quantile=0.1)", ConfigError, "budget = 9: give one of quantile and budget"),
        ("sara(budget=0.05)", ConfigError, "for a share of all entries give quantile instead"),
        ("sara(budget=many)", ConfigError, "budget = 'many'"),
        ("sara(quantile=1.5)", ConfigError, "quantile = 1.5"),
        ("sara(threshold=-1.0)", ConfigError, "threshold = -1.0"),
        ("sara(quantile=0.1, progressive=1.5)", ConfigError, "progressive = 1.5: give a step"),
        ("sara(budget='1M')", UnsupportedError, f"1,000,000 values is larger than the model, which has {REACHED:,}"),
        ("lt-sft(budget='1M')", UnsupportedError, f"larger than the model, which has {REACHED:,} entries"),
        ("sara(threshold=1e-30)", UnsupportedError, r"no weight .* below the threshold 1e-30.*1 % lie up to 0\.000"),
        ("lt-sft(form=compact, masking=dense)", ConfigError, "dense masking has the exact form alone"),
    ],
)  # fmt: skip
def test_refusals(spec: str, error: type[PeftSuiteError], message: str) -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-4)
    with pytest.raises(error, match=message):
        ps.adapt(model, spec, anatomy=ANATOMY)
    assert "adapters" not in model._modules and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("spec", ["sara(threshold=0.1)", "sara(budget=100)"])
def test_weights_that_are_not_numbers_are_refused(spec: str) -> None:
    model = net()
    with torch.no_grad():
        model.mid.weight[3, 4] = math.nan
    with pytest.raises(UnsupportedError, match=r"mid\.weight'? holds NaN"):
        ps.adapt(model, spec, anatomy=ANATOMY)


def test_a_threshold_without_weights_says_that_nothing_is_known() -> None:
    with torch.device("meta"):
        blank = Net()
    with pytest.warns(UserWarning, match="unknown before they are loaded"):
        assert ps.plan(blank, "sara(threshold=0.1)", anatomy=ANATOMY).trainable == 0


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0.0, 0.3])
def test_only_chosen_entries_move_with_weight_decay_on(own: float) -> None:
    model, adapter = adapted(f"sara(quantile=0.2, weight_decay=0.5, {ALONE})")
    start, chosen = base(model), masks(model)
    train(model, adamw(model, decay=own), 4)
    assert all(torch.equal(p, start[n]) for n, p in base(model).items())
    for name, weight in effective(model).items():
        assert torch.equal(weight[~chosen[name]], start[name][~chosen[name]]), name
        moved = weight[chosen[name]] != start[name][chosen[name]]
        assert name.startswith("classes") or moved.all(), name
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("adapters."))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_it_is_dense_adamw_with_decay_of_the_weights_and_masked_updates() -> None:
    model, _ = adapted(f"sara(quantile=0.3, weight_decay=0.4, {ALONE})")
    chosen, start = masks(model), base(model)
    dense = net()
    train(model, adamw(model), 5)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0.4)
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        F.mse_loss(dense(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in dense.named_parameters():
                p[~chosen[name]] = start[name][~chosen[name]]
    for name, p in dense.named_parameters():
        torch.testing.assert_close(effective(model)[name], p, atol=1e-6, rtol=0)


def test_micro_batches_add_up_and_nothing_dense_stays() -> None:
    whole, _ = adapted()
    parts, _ = adapted()
    x, y = batch(size=12)
    order = torch.arange(12).view(2, 6)  # class ids follow the place in the batch
    (F.mse_loss(whole(x[:6]), y[:6]) + F.mse_loss(whole(x[6:]), y[6:])).backward()
    for half in order:
        F.mse_loss(parts(x[half]), y[half]).backward()
    for a, b in zip(adapter_of(whole).parameters(), adapter_of(parts).parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = parts(x).square().sum()
    own = {p.data_ptr() for p in parts.parameters()}
    large = {parts.up.weight.numel(), parts.mid.weight.numel(), parts.conv.weight.numel()}
    assert not [t.shape for t in kept if t.numel() in large and t.data_ptr() not in own]
    loss.backward()
    assert all(p.grad is None for n, p in parts.named_parameters() if not n.startswith("adapters."))
    optimizer = adamw(parts)
    optimizer.step()
    moments = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert moments == 2 * ps.summary(parts).trainable


def test_entries_that_left_settle_and_stay_whatever_the_optimizer_does() -> None:
    for make in (
        lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05, momentum=0.9, weight_decay=0.2),
        lambda m: adamw(m, lr=0.02, decay=0.2),
        lambda m: torch.optim.NAdam([p for p in m.parameters() if p.requires_grad], lr=0.02),
    ):
        model, adapter = adapted("sara(quantile=0.3, progressive=3)")
        optimizer = make(model)
        train(model, optimizer, 3)
        theta = adapter.method.threshold(adapter)  # type: ignore[attr-defined]
        learned = {(e.name): e.part.learned(e.tensor).clone() for e in entries_of(adapter)}
        small = {n: p.abs() < theta for n, p in learned.items()}
        train(model, optimizer, range(3, 6))
        total = left = 0
        for e in entries_of(adapter):
            settled = e.part.settled(e.tensor)
            assert settled is not None and torch.equal(~settled, small[e.name])
            assert torch.equal(e.part.learned(e.tensor)[settled], learned[e.name][settled]), e.name
            moved = e.part.learned(e.tensor)[~settled] != learned[e.name][~settled]
            assert e.name.startswith("classes") or moved.all()
            total, left = total + len(settled), left + int((~settled).sum())
        assert 0 < left < total


def test_reset_state_and_skipped_step() -> None:
    model, adapter = adapted("sara(quantile=0.3, progressive=2, reset_state=True, skip_step=True)")
    optimizer = adamw(model)
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in adapter.parameters()]
    train(model, optimizer, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
    assert not optimizer.state
    train(model, optimizer, range(3, 4))
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def test_a_share_of_the_run_needs_its_length() -> None:
    model, _ = adapted("sara(quantile=0.3, progressive=0.5)")
    with pytest.raises(ConfigError, match=r"progressive = 0.5 is a share of the run.*begin\(steps\)"):
        train(model, adamw(model), 1)
    ps.events(model).begin(6)
    train(model, adamw(model), 3)
    assert not any(bool(e.part.settled(e.tensor).any()) for e in entries_of(adapter_of(model)))  # type: ignore[union-attr]
    train(model, adamw(model), range(3, 4))
    assert any(bool(e.part.settled(e.tensor).any()) for e in entries_of(adapter_of(model)))  # type: ignore[union-attr]


def test_the_nuclear_norm_reaches_the_trained_entries() -> None:
    model, adapter = adapted("sara(quantile=0.5, rank_weight=0.1, progressive=None)")
    method: Any = adapter.method
    eligible = [e for e in entries_of(adapter) if method.eligible(e)]
    assert {e.name for e in eligible} == {"up.weight", "mid.weight"}
    for e in eligible:
        weight = base(model)[e.name].requires_grad_()
        norm = torch.linalg.matrix_norm(weight * masks(model)[e.name], "nuc")
        (wanted,) = torch.autograd.grad(norm, weight)
        torch.testing.assert_close(method.rank_gradient(e.part), wanted.view(-1)[e.part.positions().long()])
    drawn = [method.draw(step, eligible).name for step in range(40)]
    assert set(drawn) == {"up.weight", "mid.weight"}
    assert drawn == [SaRA(method.config).draw(step, eligible).name for step in range(40)]  # type: ignore[union-attr]
    plain, _ = adapted(f"sara(quantile=0.5, {ALONE})")
    losses = train(plain, adamw(plain), 1), train(model, adamw(model), 1)
    assert losses[0] == losses[1], "the logged loss has no rank term"
    moved = {e.name: e.values.detach() for e in entries_of(adapter_of(plain))}
    other = [e.name for e in entries_of(adapter) if not torch.equal(e.values, moved[e.name])]
    assert other == [drawn[0]]


def test_too_few_entries_have_no_nuclear_norm() -> None:
    _, adapter = adapted("sara(budget=60)")
    assert all(adapter.method.rank_gradient(e.part) is None for e in entries_of(adapter) if e.tensor == "weight")  # type: ignore[attr-defined]


def test_clipping_sees_the_gathered_gradient_and_the_rank_term_comes_after_it() -> None:
    model, adapter = adapted("sara(quantile=0.5, rank_weight=100.0, weight_decay=0.0, progressive=None)")
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    wanted = torch.cat([p.grad for p in adapter.parameters()]).norm()  # type: ignore[misc]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    events = ps.events(model)
    events.before_step(0, optimizer)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e-6), wanted)
    optimizer.step()
    events.after_step(0, optimizer)
    assert max(float(p.detach().abs().max()) for p in adapter.parameters()) > 1.0
    assert not optimizer._optimizer_step_pre_hooks


def test_mixed_precision_and_a_step_that_the_scaler_skips() -> None:
    model, adapter = adapted(f"sara(quantile=0.3, weight_decay=0.5, {ALONE})")
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x).float(), y)
    loss.backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}  # type: ignore[union-attr]
    optimizer, events = adamw(model), ps.events(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step, bad in enumerate((True, False)):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        if bad:
            next(adapter.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        events.before_step(step, optimizer)
        scaler.step(optimizer)
        events.after_step(step, optimizer)
        scaler.update()
        assert bad == (not any(bool(p.any()) for p in adapter.parameters()))


# ---- strength, several adapters, merging -----------------------------------------------------------------------------


def test_strength_is_linear_and_zero_is_the_base_bit_for_bit() -> None:
    model = net()
    x = batch()[0]
    plain, start = model(x), base(model)
    ps.adapt(model, "sara(quantile=0.3)", anatomy=ANATOMY)
    randomise(adapter_of(model))
    trained, whole = model(x), effective(model)
    assert ps.scale(model, "default", 0.0) is model
    assert torch.equal(model(x), plain)
    for strength in (0.6, 2):
        ps.scale(model, "default", strength)
        for name, weight in effective(model).items():
            torch.testing.assert_close(weight, start[name] + strength * (whole[name] - start[name]), atol=1e-6, rtol=0)
        torch.testing.assert_close(ps.merge(copy.deepcopy(model))(x), model(x))
    ps.scale(model, "default", 1.0)
    assert torch.equal(model(x), trained)
    model(x).sum().backward()


def test_strength_of_other_methods() -> None:
    from timm import create_model

    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
    x = torch.randn(2, 3, 32, 32)
    plain = model.eval()(x)
    ps.adapt(model, "lora(rank=2)")
    for name, parameter in adapter_of(model).named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    full = model(x)
    ps.scale(model, "default", 0.5)
    half = model(x)
    assert not torch.allclose(half, full) and not torch.allclose(half, plain)
    torch.testing.assert_close(ps.merge(copy.deepcopy(model))(x), half, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ps.scale(model, "default", 0)(x), plain, atol=1e-6, rtol=0)
    for method, key in (("lora(rank=2, dora=True)", "lora"), ("bitfit", "trained"), ("ssf", "ssf")):
        ps.adapt(model, method, name=f"m{key}")
        with pytest.raises(UnsupportedError, match=f"cannot be scaled: .*{key}"):
            ps.scale(model, f"m{key}", 0.5)
    for wrong in ("half", math.nan, True):
        with pytest.raises(ConfigError, match="the strength is a finite number"):
            ps.scale(model, "default", wrong)  # type: ignore[arg-type]


def test_two_sparse_adapters_add_where_they_meet_and_switch() -> None:
    model, x = net(), batch()[0]
    start = base(model)
    ps.adapt(model, "sara(quantile=0.3)", anatomy=ANATOMY, name="style")
    ps.adapt(model, "sara(quantile=0.2)", anatomy=ANATOMY, name="subject")
    single = {}
    for seed, name in enumerate(("style", "subject")):
        randomise(adapter_of(model, name), seed)
        ps.activate(model, name)
        single[name] = (model(x), {n: w + adapter_delta(model, name, n) for n, w in start.items()})
    both = ps.activate(model, "style", "subject")(x)
    ps.scale(ps.scale(model, "style", 0.6), "subject", 0.6)
    mixed = model(x)
    assert not torch.allclose(mixed, both)
    merged = ps.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), mixed, atol=1e-5, rtol=1e-5)
    for name, weight in start.items():
        delta = sum(0.6 * (single[k][1][name] - weight) for k in single)
        torch.testing.assert_close(merged.get_parameter(name), weight + delta, atol=1e-6, rtol=0)
    for name in single:
        ps.scale(ps.activate(model, name), name, 1.0)
        assert torch.equal(model(x), single[name][0])
    ps.remove(model)
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())


def adapter_delta(model: nn.Module, adapter: str, name: str) -> Tensor:
    delta = torch.zeros_like(model.get_parameter(name)).view(-1)
    for e in entries_of(adapter_of(model, adapter)):
        if e.name == name:
            delta[e.part.positions(e.tensor).long()] = e.values.detach()
    return delta.view_as(model.get_parameter(name))


# ---- files -----------------------------------------------------------------------------------------------------------


def size_of(folder: Path) -> tuple[int, int]:
    """(bytes of the tensor file, tensors in it)."""
    return (folder / TENSORS).stat().st_size, len(load_file(folder / TENSORS))


def test_exact_files_have_eight_bytes_a_value_and_restore_everything(tmp_path: Path) -> None:
    model, adapter = adapted("sara(quantile=0.3, progressive=2)")
    train(model, adamw(model), 4)
    count, settled = ps.summary(model).trainable, [e.part.settled(e.tensor) for e in entries_of(adapter)]
    assert any(bool(s.any()) for s in settled if s is not None)
    ps.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    assert sum(t.nbytes for t in stored.values()) == 8 * count == ps.summary(model).adapter_bytes
    size, tensors = size_of(tmp_path / "a")
    assert size <= 8 * count + 1024 * tensors
    fresh = net()
    ps.load(fresh, tmp_path / "a", anatomy=ANATOMY, trainable=True)
    x = batch()[0]
    assert torch.equal(fresh(x), model(x))
    for e, before in zip(entries_of(adapter_of(fresh)), settled, strict=True):
        after = e.part.settled(e.tensor)
        assert after is not None and before is not None and torch.equal(after, before)
    ps.save(fresh, tmp_path / "b")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    losses = [train(m, adamw(m), range(4, 6)) for m in (model, fresh)]
    assert losses[0] == losses[1], "a loaded adapter trains on as the one that was saved"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_fit_a_base_in_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model, adapter = adapted("sara(threshold=0.02)")
    randomise(adapter)
    ps.save(model, tmp_path)
    rounded = net().to(dtype)
    inside = sum(
        int((p.abs() < 0.02).sum()) for n, p in rounded.named_parameters() if n not in ("shift", "tied.weight")
    )
    ps.load(rounded, tmp_path, anatomy=ANATOMY, check="shapes")
    found = {e.name: (e.part.positions(e.tensor), e.values) for e in entries_of(adapter_of(rounded))}
    for e in entries_of(adapter):
        assert torch.equal(found[e.name][0], e.part.positions(e.tensor)) and torch.equal(found[e.name][1], e.values)
    assert dtype is torch.float16 or inside != ps.summary(model).trainable, "rounding would have chosen others"


def test_compact_files_have_four_bytes_a_value(tmp_path: Path) -> None:
    model, adapter = adapted("sara(quantile=0.3, form=compact)")
    randomise(adapter, size=1e-5)
    wanted = {e.name: (e.part.positions(e.tensor).clone(), e.values.detach().clone()) for e in entries_of(adapter)}
    ps.save(model, tmp_path)
    size, tensors = size_of(tmp_path)
    count = ps.summary(model).trainable
    assert sum(t.nbytes for t in load_file(tmp_path / TENSORS).values()) <= 4 * count + 4 * tensors
    assert size <= 4 * count + 1024 * tensors
    fresh = net()
    ps.load(fresh, tmp_path, anatomy=ANATOMY)
    for e in entries_of(adapter_of(fresh)):
        index, values = wanted[e.name]
        assert torch.equal(e.part.positions(e.tensor), index)
        error = (e.values - values).abs()
        assert bool((error <= values.abs() * 2**-11 + float(values.abs().max()) * 2**-38).all())
        assert not torch.equal(e.values, values)


def test_compact_gaps_cross_what_sixteen_bits_hold(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(700, 300)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            return out

    model = Wide()
    places = [7, 65542, 65543, 209998]
    with torch.no_grad():
        model.fc.weight.fill_(1.0).view(-1)[places] = 0.0
        model.fc.bias.fill_(1.0)
    blank = copy.deepcopy(model)
    ps.adapt(model, "sara(budget=4, form=compact)", anatomy=ANATOMY)
    with torch.no_grad():
        next(adapter_of(model).parameters()).copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    ps.save(model, tmp_path)
    ps.load(blank, tmp_path, anatomy=ANATOMY)
    [entries] = entries_of(adapter_of(blank))
    assert entries.part.positions().tolist() == places and entries.values.tolist() == [1.0, -2.0, 0.5, 0.0]


def test_a_part_loads_sizes_of_its_own_without_the_adapter_being_chosen_again(tmp_path: Path) -> None:
    model, adapter = adapted("sara(budget=300)")
    randomise(adapter)
    ps.save(model, tmp_path)
    other = net(seed=5)  # other weights, where other entries would be chosen
    ps.load(other, tmp_path, anatomy=ANATOMY, check="shapes")
    assert {n: m.tolist() for n, m in masks(other).items()} == {n: m.tolist() for n, m in masks(model).items()}
    assert all(isinstance(p, SparseValues) for _, p in adapter_of(other).parts())


@pytest.mark.parametrize("spec", ["sara(budget=300)", {"name": "subset", "of": "sara(budget=300)", "off": ["mid"]}])
def test_a_file_is_loaded_without_ranking_the_weights(tmp_path: Path, monkeypatch: Any, spec: Any) -> None:
    model = ps.adapt(net(), spec, anatomy=ANATOMY)
    randomise(adapter_of(model))
    ps.save(model, tmp_path)

    def ranked(*_: Any) -> None:
        raise AssertionError("the positions are in the file")

    monkeypatch.setattr(SaRA, "choose", ranked)
    fresh = ps.load(net(), tmp_path, anatomy=ANATOMY)
    same, wanted = effective(fresh), effective(model)
    assert all(torch.equal(same[n], w) for n, w in wanted.items())
    with pytest.raises(AssertionError, match="in the file"):
        ps.adapt(net(), spec, anatomy=ANATOMY)


def test_fake_weights_are_planned_and_not_adapted() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Net()
        found = ps.plan(fake, "sara(budget=300)", anatomy=ANATOMY)
        assert found.trainable == ps.plan(net(), "sara(budget=300)", anatomy=ANATOMY).trainable == 300
        with pytest.raises(UnsupportedError, match="not loaded"):
            ps.adapt(fake, "sara(budget=300)", anatomy=ANATOMY)


# ---- in the training loop --------------------------------------------------------------------------------------------


class Points(torch.utils.data.Dataset[Any]):
    """Three noisy classes."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(size) % 3
        means = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(9))
        self.x = means[self.targets] + 0.3 * torch.randn(size, 2, 4, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.targets[index])


def data() -> DataSplits:
    return DataSplits(Points(30, 1), Points(12, 2), None, ("a", "b", "c"), fingerprint="points")


RECIPE = Recipe(epochs=2, batch_size=8, accumulate=2, lr=0.01, warmup_epochs=0, clip_norm=1.0, select="last")


def run(out: Path, method: str, stop_at: int | None = None, resume: bool = False) -> tuple[Net, dict[str, Any]]:
    model, _ = adapted(method)
    if stop_at is None:
        result = fit(model, data(), RECIPE, out=out, resume=resume, device="cpu", progress=False)
        return model, result.record
    with pytest.MonkeyPatch.context() as patch:
        step = loop_module._Training.train_step

        def stopping(self: Any, micros: Any) -> tuple[float, bool]:
            loss, stop = step(self, micros)
            return loss, stop or self.epoch * self.steps + self.step + 1 == stop_at

        patch.setattr(loop_module._Training, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data(), RECIPE, out=out, device="cpu", progress=False)
    return model, {}


@pytest.mark.parametrize(
    ("method", "stops"),
    [
        ("sara(quantile=0.3, progressive=0.5, rank_weight=0.01)", (2, 6)),  # before and after the second look
        ("sara(quantile=0.3, progressive=3, official=True)", (4,)),  # right after it, while the weights are mirrored
        ("lt-sft(budget=500, steps=6, lr=0.01)", (3,)),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bytes(method: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    model, record = run(tmp_path / "whole", method)
    losses = [e["train_loss"] for e in record["history"]]
    assert losses[-1] < losses[0]
    for stop in stops:
        run(tmp_path / f"cut{stop}", method, stop_at=stop)
        _, again = run(tmp_path / f"cut{stop}", method, resume=True)
        assert [e["train_loss"] for e in again["history"]] == losses
        files = [(tmp_path / n / "adapter" / TENSORS).read_bytes() for n in ("whole", f"cut{stop}")]
        assert files[0] == files[1]
    if "lt-sft" in method:
        assert ps.summary(model).trainable == 500
    else:
        assert any(bool(e.part.settled(e.tensor).any()) for e in entries_of(adapter_of(model)))  # type: ignore[union-attr]


# ---- LT-SFT ----------------------------------------------------------------------------------------------------------


def calibrated(method: str) -> tuple[Net, ps.Adapter]:
    model, _ = adapted(method)

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(pair[0]), pair[1])

    ps.events(model).calibrate([batch(0), batch(1)], loss)
    return model, adapter_of(model)


def test_lt_sft_keeps_what_moved_most_and_starts_again_from_the_base() -> None:
    model, _ = calibrated("lt-sft(budget=400, steps=5, lr=0.01)")
    start, x = base(model), batch()[0]
    assert torch.equal(model(x), net()(x)) and ps.summary(model).trainable == 400
    dense = net()
    optimizer = torch.optim.AdamW([p for n, p in dense.named_parameters() if n not in ("shift", "tied.weight")], lr=0.01, weight_decay=0.0)  # fmt: skip  # noqa: E501
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 5)
        optimizer.zero_grad()
        F.mse_loss(dense(batch(step % 2)[0]), batch(step % 2)[1]).backward()
        optimizer.step()
    moved = {n: (p.detach() - start[n]).abs() for n, p in dense.named_parameters()}
    least = torch.cat([m.flatten() for m in moved.values()]).sort(descending=True).values[399]
    for name, mask in masks(model).items():
        assert torch.equal(mask, moved[name] >= least), name
    train(model, adamw(model, decay=0.1), 3)
    for name, weight in effective(model).items():
        assert torch.equal(weight[~masks(model)[name]], start[name][~masks(model)[name]])


def test_lt_sft_trains_alike_with_dense_masking(tmp_path: Path) -> None:
    sparse, _ = calibrated("lt-sft(budget=400, steps=5, lr=0.01)")
    dense, adapter = calibrated("lt-sft(budget=400, steps=5, lr=0.01, masking=dense)")
    optimizer = adamw(dense)
    losses = train(sparse, adamw(sparse), 4), train(dense, optimizer, 4)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, weight in effective(dense).items():
        torch.testing.assert_close(weight, effective(sparse)[name], atol=1e-6, rtol=0)
    trained = sum(p.numel() for p in adapter.parameters())
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim) == 2 * trained > 400
    for name, model in (("sparse", sparse), ("dense", dense)):
        ps.save(model, tmp_path / name)
        assert sum(t.nbytes for t in load_file(tmp_path / name / TENSORS).values()) == 8 * 400
        fresh = ps.load(net(), tmp_path / name, anatomy=ANATOMY)
        assert torch.equal(fresh(batch()[0]), model(batch()[0]))


def test_lt_sft_refuses_what_it_cannot_calibrate_with() -> None:
    model, adapter = adapted("lt-sft(budget=400, steps=5)")
    events = ps.events(model)

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch()

    with pytest.raises(PeftSuiteError, match="calibrated with 1 batches and phase 1 needs 5"):
        events.calibrate(once(), lambda pair: F.mse_loss(model(pair[0]), pair[1]))
    with pytest.raises(PeftSuiteError, match="loss of phase 1 is nan at step 1 of 5"):
        events.calibrate([batch()], lambda pair: model(pair[0]).sum() * math.nan)
    plan = {"entries": [["mid.weight", 3]]}
    with pytest.raises(ConfigError, match="cannot start from a plan alone"):
        ps.adapt(net(), {"name": "lt-sft", "plan": plan}, anatomy=ANATOMY)
    assert re.match(r"lt-sft\(", str(adapter.method.config))
