"""The training loop: order, equivalence of batchings, determinism, selection, records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from train_material import CLASSES, RECIPE, Textures, adapted, backbone, splits

import peft_suite as ps
import peft_suite.errors as ps_errors
from peft_suite.errors import ConfigError, DataError, TrainingError
from peft_suite.method import Capabilities
from peft_suite.train import Classification, Recipe, evaluate, fit, predict
from peft_suite.train.loader import epoch_plan
from peft_suite.train.optim import build_optimizer, lr_at, parameter_groups


def losses(result):
    return [entry["train_loss"] for entry in result.history]


def train(tmp_path: Path, method: str = "lora", recipe: Recipe = RECIPE, data=None, dropout: float = 0.0, **options):
    model = adapted(method, dropout=dropout)
    return fit(model, data or splits(), recipe, out=tmp_path, seed=5, device="cpu", progress=False, **options)


# ---- order of samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "batch", "accumulate", "world"), [(90, 16, 1, 2), (33, 16, 4, 2), (5, 8, 2, 3), (1, 4, 2, 2)]
)
def test_plan_shares_every_sample_once(size, batch, accumulate, world):
    whole = [s[0].indices for s in epoch_plan(size, batch, 1, seed=3, epoch=2)]
    shares = [epoch_plan(size, batch, accumulate, seed=3, epoch=2, rank=r, world=world) for r in range(world)]
    for number, expected in enumerate(whole):
        slices = [shares[r][number][m] for m in range(accumulate) for r in range(world)]
        assert [i for s in slices if s.weight for i in s.indices] == expected
        assert all(s.indices for s in slices), "an empty slice must still run a sample, with weight 0"
    assert sorted(i for s in whole for i in s) == list(range(size))
    assert whole != [s[0].indices for s in epoch_plan(size, batch, 1, seed=3, epoch=3)] or size == 1


# ---- optimizer and schedule --------------------------------------------------------------------------------------


def test_groups_follow_the_decay_rule():
    model = adapted("lora")
    matrices, vectors = parameter_groups(model, RECIPE)
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert matrices["weight_decay"] == RECIPE.weight_decay
    assert all(p.ndim < 2 for p in vectors["params"])
    assert vectors["weight_decay"] == 0
    assert len(parameter_groups(model, RECIPE.replace(decay="none"))) == 1
    trainable = sum(p.requires_grad for p in model.parameters())
    assert len(matrices["params"]) + len(vectors["params"]) == trainable


def test_any_torch_optimizer_and_clear_refusals():
    model = adapted("bitfit")
    assert type(build_optimizer(model, RECIPE.replace(optimizer="torch.optim:NAdam"))).__name__ == "NAdam"
    with pytest.raises(ConfigError, match="Did you mean 'adam"):
        build_optimizer(model, RECIPE.replace(optimizer="adamv"))
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_optimizer(model, RECIPE.replace(optimizer="torch.optim:Nothing"))
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        build_optimizer(model, RECIPE.replace(optimizer="no_such_package.optim:AdamW8bit"))
    with pytest.raises(TrainingError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), RECIPE)


def test_schedule_formula():
    recipe = Recipe(epochs=10, lr=1.0, warmup_epochs=2, min_lr=0.1)
    assert [lr_at(s, recipe, 3) for s in range(6)] == pytest.approx([(s + 1) / 6 for s in range(6)])
    assert lr_at(6, recipe, 3) == pytest.approx(1.0)
    assert lr_at(18, recipe, 3) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert lr_at(18, recipe.replace(schedule="linear"), 3) == pytest.approx(0.55)
    assert lr_at(29, recipe.replace(schedule="constant"), 3) == 1.0


# ---- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "bitfit", "lora"])
def test_learns_and_leaves_a_complete_record(method, tmp_path):
    frozen = {k: v.clone() for k, v in backbone(dropout=0.0).state_dict().items()}
    model = adapted(method, dropout=0.0)
    result = fit(model, splits(160), RECIPE.replace(epochs=8), out=tmp_path, seed=5, device="cpu", progress=False)
    if method != "linear":
        assert result.metrics["accuracy"] > 0.85
    assert losses(result)[-1] < losses(result)[0]
    now = model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in frozen.items()), "frozen weights moved"

    record = json.loads((tmp_path / "run.json").read_text())
    assert record == result.record
    assert record["status"] == "finished"
    assert record["seed"] == 5
    assert record["method"]["name"] == method
    assert record["parameters"]["trainable"] == ps.summary(model).trainable
    assert record["adapter"]["bytes"] == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert sum(map(sum, record["confusion"])) == 41
    assert set(record["final"]["per_class"]) == set(CLASSES)
    wrong = [e for e in record["examples"] if not e["correct"]]
    assert len(wrong) == min(12, round(41 * (1 - result.metrics["accuracy"])))
    assert len(json.loads((tmp_path / "examples.json").read_text())["png"]) == len(record["examples"])
    assert record["time"]["per_step_ms"] > 0
    assert record["best"]["selected_by"] == "val"

    fresh = ps.load(backbone(dropout=0.0), tmp_path / "adapter")
    again = evaluate(fresh, Textures(41, 3), Classification(CLASSES), device="cpu")
    assert again["metrics"] == record["final"]["test"]
    assert predict(fresh, Textures(41, 3), device="cpu", batch_size=7).shape == (41, 4)


def test_equals_a_loop_written_by_hand(tmp_path):
    data, model = splits(), adapted("lora", dropout=0.0)
    open_ = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in open_ if p.ndim >= 2], "weight_decay": RECIPE.weight_decay},
        {"params": [p for p in open_ if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, expected, step = torch.optim.AdamW(groups, lr=RECIPE.lr), [], 0
    model.train()
    for epoch in range(RECIPE.epochs):
        data.train.set_epoch(epoch)
        order = torch.randperm(90, generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch))
        total = 0.0
        for batch in order.split(16):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, RECIPE, 6)
            images = torch.stack([data.train[i][0] for i in batch.tolist()])
            loss = torch.nn.functional.cross_entropy(model(images), data.train.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, step = total + loss.item() * len(batch), step + 1
        expected.append(total / 90)
    assert losses(train(tmp_path)) == pytest.approx(expected, rel=1e-6)


def test_equal_runs_give_equal_bytes(tmp_path):
    results = [train(tmp_path / n, dropout=0.1) for n in "ab"]
    assert losses(results[0]) == losses(results[1])
    files = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("extra", [{}, {"class_weights": "balanced", "label_smoothing": 0.1, "clip_norm": 1.0}])
def test_accumulation_changes_nothing(extra, tmp_path):
    plain = train(tmp_path / "a", recipe=RECIPE.replace(**extra))
    parts = train(tmp_path / "b", recipe=RECIPE.replace(accumulate=8, **extra))
    assert losses(parts) == pytest.approx(losses(plain), rel=1e-5)


def test_workers_change_nothing(tmp_path):
    assert losses(train(tmp_path / "a")) == losses(train(tmp_path / "b", workers=2))


def test_class_weights_equal_torch_on_a_whole_batch(tmp_path):
    model, data = adapted("linear", dropout=0.0), splits(64)
    weights = Classification(CLASSES).class_weights(data.train.targets)
    counts = torch.bincount(data.train.targets, minlength=4).float()
    assert weights.mean().item() == pytest.approx(1.0)
    assert torch.allclose(weights * counts, (weights * counts)[0].expand(4))
    images = torch.stack([data.train[i][0] for i in range(64)])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(images), data.train.targets, weights, label_smoothing=0.1)
    recipe = Recipe(epochs=1, batch_size=64, class_weights="balanced", label_smoothing=0.1)
    assert losses(train(tmp_path, "linear", recipe, data))[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("mixture", [{"mixup": 0.4}, {"cutmix": 1.0, "label_smoothing": 0.1}])
def test_mixup_cutmix_and_precision_train(precision, mixture, tmp_path):
    recipe = RECIPE.replace(epochs=2, batch_size=15, precision=precision, **mixture)
    result = train(tmp_path, recipe=recipe)
    assert all(math.isfinite(x) for x in losses(result))
    assert result.record["platform"]["precision"] == precision


def test_multi_label(tmp_path):
    recipe = RECIPE.replace(epochs=6, mixup=0.1, class_weights="balanced")
    result = train(tmp_path, recipe=recipe, data=splits(multi_label=True))
    assert result.record["metric"] == "map"
    assert result.record["confusion"] is None
    assert set(result.metrics) == {"loss", "map", "macro_f1", "micro_f1"}
    assert result.score > 0.5


def test_selection_and_patience(tmp_path):
    data = splits(val=0)
    with pytest.raises(ConfigError, match="val_fraction"):
        train(tmp_path / "a", data=data)
    last = train(tmp_path / "a", recipe=RECIPE.replace(select="last"), data=data)
    assert last.record["best"]["epoch"] == 3
    assert last.record["final"]["val"] is None
    best = train(tmp_path / "b", recipe=RECIPE.replace(select="test"))
    assert best.record["best"]["selected_by"] == "test"
    assert best.metrics["accuracy"] == max(e["test"]["accuracy"] for e in best.history)
    frozen = train(tmp_path / "c", recipe=RECIPE.replace(epochs=9, lr=1e-12, patience=2))
    assert len(frozen.history) == 3
    assert frozen.record["best"]["epoch"] == 0


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, recipe=RECIPE.replace(epochs=1, tracker="tensorboard"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_nan_stops_and_names_the_last_checkpoint(tmp_path):
    data = splits()
    data.train.__class__ = type("Poisoned", (Textures,), {"__getitem__": _poisoned})
    with pytest.raises(
        TrainingError, match=r"loss is nan at epoch 3, step 1 .*last good checkpoint is .*epoch 2, step 0"
    ):
        train(tmp_path, data=data)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed"
    assert "nan" in record["error"]
    assert len(record["history"]) == 2
    resumed = train(tmp_path, resume=True)  # healthy data with the same fingerprint
    assert losses(resumed) == losses(train(tmp_path / "clean"))


def _poisoned(self, index):
    image, target = Textures.__getitem__(self, index)
    return (image * math.nan if self.epoch == 2 else image), target


def test_labels_out_of_range_and_empty_data(tmp_path):
    data = splits()
    data.train.targets[7] = 9
    with pytest.raises(DataError, match="train: sample 7 has label 9, but there are 4 classes"):
        train(tmp_path, data=data)
    data.train = None
    with pytest.raises(DataError, match="no training data"):
        train(tmp_path, data=data)


def test_recipe_refusals(tmp_path):
    with pytest.raises(ConfigError, match="needs a GPU"):
        train(tmp_path, recipe=RECIPE.replace(precision="fp16"))
    with pytest.raises(ConfigError, match="patience"):
        train(tmp_path, recipe=RECIPE.replace(patience=1, select="last"))
    with pytest.raises(ConfigError, match="Unknown device"):
        fit(adapted(), splits(), RECIPE, out=tmp_path, device="cpuu")


def test_refusals_leave_an_earlier_run_alone(tmp_path):
    train(tmp_path, recipe=RECIPE.replace(epochs=1))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    data = splits()
    data.train.targets[7] = -1
    with pytest.raises(DataError):
        train(tmp_path, data=data)
    model = adapted()
    next(iter(model.adapters["default"].parts()))[1].register_parameter("lost", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ps_errors.VerificationError):
        fit(model, splits(), RECIPE, out=tmp_path, device="cpu", progress=False)
    with pytest.raises(ps_errors.AdapterError, match="carries no adapter"):
        fit(backbone(), splits(), RECIPE, out=tmp_path, device="cpu", progress=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_events_reach_the_method(tmp_path, monkeypatch):
    model = adapted("bitfit", dropout=0.0)
    method = type(model.adapters["default"].method)
    seen: dict[str, list] = {name: [] for name in ("calibrate", "before_step", "after_step", "finish", "penalty")}

    def calibrate(self, adapter, batches, loss):
        seen["calibrate"] = [[loss(batch).item() for batch in batches] for _ in range(2)]

    def penalty(self, adapter):
        seen["penalty"].append(1)
        return 0.01 * sum(p.square().sum() for p in adapter.parameters())

    monkeypatch.setattr(method, "calibrate", calibrate)
    monkeypatch.setattr(method, "penalty", penalty)
    monkeypatch.setattr(method, "capabilities", Capabilities(needs_calibration=True))
    monkeypatch.setattr(method, "before_step", lambda self, a, step, o: seen["before_step"].append((step, _grads(a))))
    monkeypatch.setattr(method, "after_step", lambda self, a, step, o: seen["after_step"].append((step, _grads(a))))
    monkeypatch.setattr(method, "finish", lambda self, adapter: seen["finish"].append(1))
    fit(
        model, splits(), RECIPE.replace(accumulate=2, calibration_batches=3), out=tmp_path, device="cpu", progress=False
    )
    assert seen["before_step"] == seen["after_step"] == [(step, True) for step in range(24)]
    assert len(seen["calibrate"][0]) == 3
    assert seen["calibrate"][0] == seen["calibrate"][1]
    assert len(seen["penalty"]) == 24
    assert len(seen["finish"]) == 1


def _grads(adapter):
    return all(p.grad is not None for p in adapter.parameters())
