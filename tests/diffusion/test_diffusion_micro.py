"""The embedded UNet, its data, the script that makes its weights, and the demo."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import peft_suite as ps
from peft_suite.diffusion import demo, micro, pretrain_micro, shifted
from peft_suite.diffusion.data import DiffusionDataConfig
from peft_suite.errors import DataError, FileFormatError
from peft_suite.train import pretraining
from peft_suite.train.config import Recipe


@functools.cache
def unet() -> nn.Module:
    return micro.build()


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_shipped_weights_are_small_and_say_where_they_come_from() -> None:
    path = Path(micro.__file__).parent / "assets" / micro.ASSET
    assert path.stat().st_size < 1.5 * 2**20
    with safe_open(path, "pt") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"F16"}  # noqa: SIM118
    facts = micro.read_metadata()
    assert facts["weights_licence"] and "pretrain_micro" in facts["made_by"] and "digits" in facts["data"]
    assert sum(p.numel() for p in unet().parameters()) == 177_553
    with pytest.raises(FileFormatError, match="do not fit the options"):
        micro.build(block_out_channels=(8, 16))


def test_it_knows_upright_digits_and_not_those_on_their_side() -> None:
    images, labels = shifted.upright()
    known = pretrain_micro.held_out_loss(unet(), images[:200], labels[:200], draws=1)
    assert known == pytest.approx(float(micro.read_metadata()["held_out_loss"]), abs=0.03)
    wrong = pretrain_micro.held_out_loss(unet(), images[:200], (labels[:200] + 5) % 10, draws=1)
    turned, _ = shifted.target()
    lying = pretrain_micro.held_out_loss(unet(), turned[:200], labels[:200], draws=1)
    assert known < 0.18 < wrong < lying and lying > 0.5


# ---- data ------------------------------------------------------------------------------------------------------------


def test_target_images_are_other_ones_turned_to_the_left() -> None:
    source, _ = shifted.source()
    turned, labels = shifted.target()
    upright, _ = shifted.upright()
    assert len(source) + len(turned) == 1797 and len(labels) == len(turned)
    assert torch.equal(turned[5, :, :, 0], upright[5, :, :, 0].rot90())
    assert upright[0, 0, 0, 0] == 0 and int(upright.max()) == 255


def test_rows_are_disjoint_balanced_and_tests_are_always_the_same() -> None:
    _, labels = shifted.target()
    first, second = shifted.rows(seed=0), shifted.rows(shots=5, seed=1)
    for split, rows in first.items():
        assert labels[rows].bincount().tolist() == [shifted.SIZES[split]] * 10
    assert len({*first["train"], *first["val"], *first["test"]}) == 670
    assert first["test"] == second["test"] and first["val"] != second["val"]
    assert len(second["train"]) == 50 and not {*second["train"]} & {*second["val"], *second["test"]}
    assert shifted.rows(shots=5, seed=1) == second
    with pytest.raises(DataError, match="at most 24"):
        shifted.rows(shots=25)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Eight images a step, a checkpoint after every other step, 20 other digits, and the threads as they were."""
    images, labels = shifted.upright()
    monkeypatch.setattr(shifted, "upright", lambda: (images[:20], labels[:20]))
    monkeypatch.setattr(pretrain_micro, "BATCH", 8)
    monkeypatch.setattr(pretrain_micro, "ROUND", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def values(path: Path) -> dict[str, list[float]]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k).flatten().tolist() for k in file.keys()}  # noqa: SIM118


def test_script_writes_a_loadable_file_and_resumes(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pretrain_micro.main(["--steps", "4", "--out", str(straight)])
    step, calls = pretraining.train_step, []

    def failing(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power failure")
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "train_step", failing)
        with pytest.raises(RuntimeError):
            pretrain_micro.main(["--steps", "4", "--out", str(broken)])
    with pytest.raises(FileFormatError, match="--seed 0"):
        pretrain_micro.main(["--seed", "1", "--resume", "--out", str(broken)])
    pretrain_micro.main(["--resume", "--out", str(broken)])
    assert values(straight) == values(broken)
    assert set(values(straight)) == set(unet().state_dict())
    assert not list(tmp_path.glob("*.partial.pt"))


def test_weights_are_a_running_mean(tmp_path: Path) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(float(self.w.detach()))
            return (self.w * x).sum()

    seen: list[float] = []
    model = Line()
    pretraining.pretrain(
        model, lambda _: (torch.ones(1),), tmp_path / "p.pt", seed=0, steps=6, lr=0.1, state=None, ema=0.5
    )
    state = torch.load(tmp_path / "p.pt", weights_only=True)
    mean = seen[0]
    for done, value in enumerate([*seen[1:], float(state["model"]["w"])], start=1):
        decay = min(0.5, (1 + done) / (10 + done))
        mean = decay * mean + (1 - decay) * value
    assert float(model.w.detach()) == pytest.approx(mean, abs=1e-6) != pytest.approx(float(state["model"]["w"]))


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_demo_is_complete() -> None:
    assert set(demo.RECIPES) == set(demo.METHODS)
    for recipe in demo.RECIPES.values():
        Recipe.from_dict(recipe)
    DiffusionDataConfig.from_dict(demo.DATA)


@pytest.mark.parametrize("name", list(demo.METHODS))
def test_demo_methods_fit_the_backbone(name: str) -> None:
    plan = ps.plan(unet(), demo.METHODS[name])
    assert 0 < plan.trainable <= 177_553


def test_demo_compares_what_it_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"full": "full", "sara": demo.METHODS["sara"]}
    monkeypatch.setattr(demo, "METHODS", quick)
    monkeypatch.setattr(shifted, "SIZES", {"train": 24, "val": 2, "test": 5})
    recipes = {name: {**demo.RECIPES[name], "epochs": 2, "eval_every": 2, "warmup_epochs": 0.0} for name in quick}
    monkeypatch.setattr(demo, "RECIPES", recipes)
    monkeypatch.setattr(demo, "DATA", {**demo.DATA, "shots": 5, "pictures": 10, "picture_steps": 2})
    for name, value in (("IMAGES", 40), ("STEPS", 4), ("JUDGE_EPOCHS", 1)):
        monkeypatch.setattr(demo, name, value)
    result = demo.run(tmp_path, seeds=1, progress=False)
    base, full, sara = result["rows"]
    assert base["method"] == demo.BASE and base["loss"] > full["loss"] and base["source_loss"] < full["source_loss"]
    assert full["trainable"] == 177_553 and sara["trainable"] < 0.11 * full["trainable"]
    assert all(0 <= r["class_accuracy"] <= 1 and r["distance"] > 0 for r in result["rows"])
    assert Path(result["report"]).is_file() and Path(result["images"]).is_file()
    record = json.loads((Path(result["best_adapter"]).parent / "run.json").read_text())
    assert {p["moment"] for p in record["pictures"]} >= {"before", "after"}
