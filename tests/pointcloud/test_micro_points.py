"""The embedded point transformer, the script that makes its weights, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import peft_suite as ps
from peft_suite.anatomy import anatomy_of
from peft_suite.errors import FileFormatError
from peft_suite.pointcloud import demo, micro, pretrain_micro, shapes
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.data import PointDataConfig
from peft_suite.train import pretraining
from peft_suite.train.config import Recipe

ASSET = Path(micro.__file__).parent / "assets" / micro.ASSET
shipped = pytest.mark.skipif(not ASSET.exists(), reason="pretrain_micro has not made the weights yet")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_micro, "BATCH", 6)
    monkeypatch.setattr(pretrain_micro, "ROUND", 2)
    monkeypatch.setattr(pretrain_micro, "RENEWED", 3)
    monkeypatch.setattr(pretrain_micro.Stream.__init__, "__defaults__", (8,))
    monkeypatch.setattr(pretrain_micro, "probes", lambda model: {"source": 0.5})


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@shipped
def test_size_limits() -> None:
    model = micro.build(40, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == 358_888 < 400_000
    assert backbones.list("micro-points")[0].parameters == 358_888
    assert ASSET.stat().st_size < 1.5 * 2**20
    assert model(torch.randn(2, 512, 3)).shape == (2, 40)


@shipped
def test_shipped_weights_and_fresh_head() -> None:
    shipped = micro.load_weights()
    model = backbones.build(micro.NAME, 7, pretrained=True, checkpoint="", options={})
    state = model.state_dict()
    assert {k for k in state if micro.is_body(k)} == set(shipped)
    assert all(torch.equal(state[k], v) for k, v in shipped.items())
    assert {"cls_token", "cls_pos", "cls_head_finetune.0.weight"} <= set(anatomy_of(model).fresh)
    assert backbones.preprocessing(micro.NAME, model)["num_points"] == 512


@shipped
def test_metadata_tells_the_origin() -> None:
    facts = micro.read_metadata()
    assert "pretrain_micro --seed" in facts["made_by"] and facts["weights_licence"] == "Apache-2.0"
    for name in ("source", "target_whole", "target_shifted"):
        assert float(facts[f"probe_{name}"]) > float(facts[f"probe_{name}_random_weights"])


@shipped
def test_option_that_does_not_fit_the_weights() -> None:
    with pytest.raises(FileFormatError, match="pretrained=False"):
        micro.build(3, depth=3)
    assert len(micro.build(3, pretrained=False, depth=3).blocks.blocks) == 3
    assert micro.build(3, pretrained=False, channels=6)(torch.randn(2, 64, 6)).shape == (2, 3)


def test_chamfer_of_moved_points() -> None:
    a = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    assert pretrain_micro.chamfer(a, a.flip(1)).item() == 0
    assert pretrain_micro.chamfer(a, a + torch.tensor([0, 0.5, 0])).item() == pytest.approx(0.5)
    assert pretrain_micro.chamfer(a, a[:, :1]).item() == pytest.approx(0.5)  # one way 0 and 1, the other way 0


def test_loss_is_of_the_hidden_patches_alone() -> None:
    torch.manual_seed(0)
    model = pretrain_micro.Masked(micro.build(0, pretrained=False)).eval()
    assert model.seen == 13
    points, order = torch.randn(3, 512, 3), torch.rand(3, 32).argsort(1)
    loss = model(points, order)
    swapped = torch.cat((order[:, :13].flip(1), order[:, 13:].flip(1)), dim=1)
    assert model(points, swapped).item() == pytest.approx(loss.item(), rel=1e-5)
    assert model(points, order.flip(1)).item() != pytest.approx(loss.item(), rel=1e-4)


def test_pool_depends_on_the_step_alone(small: None) -> None:
    there = pretrain_micro.Stream(1)
    for step in range(6):
        points, order = there.batch(step)
    directly = pretrain_micro.Stream(1).batch(5)
    assert torch.equal(points, directly[0]) and torch.equal(order, directly[1])
    assert points.shape == (6, 512, 3) and order.shape == (6, 32)
    assert points.norm(dim=2).amax(1).tolist() == pytest.approx([1.0] * 6)


def contents(file: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Metadata and values; the order of metadata in the bytes is not settled."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata()), {k: opened.get_tensor(k).flatten().tolist() for k in opened.keys()}  # noqa: SIM118


def test_script_writes_a_loadable_file_and_resumes(small: None, threads: None, tmp_path: Path) -> None:
    straight, broken = tmp_path / "a" / "micro.safetensors", tmp_path / "b" / "micro.safetensors"
    pretrain_micro.main(["--steps", "4", "--out", str(straight)])
    assert [p.name for p in straight.parent.iterdir()] == [straight.name]

    step = pretraining.train_step
    calls: list[int] = []

    def failing(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power failure")
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "train_step", failing)
        with pytest.raises(RuntimeError):
            pretrain_micro.main(["--steps", "4", "--out", str(broken)])
    with pytest.raises(FileFormatError, match="--seed 0"):
        pretrain_micro.main(["--seed", "1", "--resume", "--out", str(broken)])
    pretrain_micro.main(["--resume", "--out", str(broken)])
    assert contents(straight) == contents(broken)
    model = micro.build(4, pretrained=False)
    assert set(load_file(straight)) == {name for name in model.state_dict() if micro.is_body(name)}


def test_minutes_become_steps(small: None) -> None:
    model = pretrain_micro.Masked(micro.build(0, pretrained=False))
    before = model.mask_token.clone()
    assert pretrain_micro.steps_in(1.0, model, 0) > pretrain_micro.steps_in(1e-9, model, 0) == 1
    assert torch.equal(model.mask_token, before)


def test_probe_tells_apart_what_features_tell_apart() -> None:
    def bars(label: int, i: int) -> Any:
        wide = [1, 0.1, 0.1] if label else [1, 1, 1]
        return np.random.default_rng([label, i]).standard_normal((512, 3)) * wide

    torch.manual_seed(0)
    model = micro.build(0, pretrained=False)
    assert pretrain_micro.probe(model, bars, 2, shots=6, tests=6) > 0.8


def test_demo_recipes_are_complete() -> None:
    chosen = demo.showcase()
    assert list(chosen.methods) == list(demo.METHODS)
    assert set(demo.RECIPES) == set(demo.METHODS)
    for recipe in demo.RECIPES.values():
        Recipe.from_dict(recipe)
    PointDataConfig.from_dict(demo.DATA)
    assert demo.DATA["root"] == "solids-shifted"


@pytest.mark.parametrize("name", list(demo.METHODS))
def test_demo_methods_fit_the_backbone(name: str) -> None:
    model = micro.build(len(shapes.TARGET), pretrained=False).eval()
    ps.adapt(model, demo.METHODS[name])
    assert model(torch.randn(2, 512, 3)).shape == (2, 10)
