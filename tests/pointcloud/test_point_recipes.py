"""Every recipe of point clouds: valid, honest about its selection, true to its source, usable on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cloud_data as made
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import peft_suite as ps
from peft_suite.cli.app import build
from peft_suite.errors import UnknownNameError
from peft_suite.method import make_method
from peft_suite.plugins import methods
from peft_suite.pointcloud import fewshot
from peft_suite.pointcloud.backbones import backbones, part_backbones
from peft_suite.pointcloud.data import PointDataConfig
from peft_suite.pointcloud.listing import FORMATS
from peft_suite.pointcloud.parts import PartDataConfig
from peft_suite.pointcloud.recipes import FEW_SHOT, MODELNET40, SCANOBJECTNN, SHAPENETPART, book
from peft_suite.train.suites import NamedRecipe

FOLDER = Path(fewshot.__file__).resolve().parent / "recipes"
METHODS = ("linear", "full", "vpt", "idpt", "point-peft", "pointgst", "dapt")
TINY: dict[str, Any] = {"embed_dim": 24, "num_heads": 2, "depth": 12, "group_size": 8}


def cli(*words: object) -> Result:
    return CliRunner().invoke(build(), ["pointcloud", *map(str, words)])


@pytest.fixture(params=sorted(book.recipes))
def recipe(request: pytest.FixtureRequest) -> NamedRecipe:
    return book.recipe(request.param)


def test_files_and_recipes_agree() -> None:
    assert sorted(book.recipes) == sorted(file.stem for file in FOLDER.glob("*.yaml"))
    for name, recipe in book.recipes.items():
        assert f"-{recipe.suite}" in name
        first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        assert first == (
            f"# peft-suite pointcloud bench --suite {recipe.suite} --methods {name} --data ROOT "
            f"--checkpoint pretrain.pth --out runs/{name}"
        )
    for suite in (SCANOBJECTNN, MODELNET40, FEW_SHOT):
        assert {f"{method}-{suite.name}" for method in METHODS} <= set(book.recipes)
    assert {"linear-shapenetpart", "full-shapenetpart", "idpt-shapenetpart"} <= set(book.recipes)


def test_a_plan_of_every_task_on_a_tiny_stand_in(recipe: NamedRecipe) -> None:
    assert recipe.method_name in methods() and recipe.source and recipe.summary and recipe.tuning
    suite = book.suite(recipe.suite)
    parts = recipe.suite == "shapenetpart"
    table, config = (part_backbones, PartDataConfig) if parts else (backbones, PointDataConfig)
    for task in suite.tasks:
        fields = recipe.run_fields(suite, task)
        assert fields.get("task", "") == ("segmentation" if parts else "") and fields["data"]["format"] in FORMATS
        data = config.from_dict({"root": "somewhere", **fields["data"]})
        if recipe.suite != "few-shot":
            assert data.val_fraction == 0  # all training clouds train
        name = fields["backbone"]["name"]
        assert name in [info.name for info in table.list()]
        model = table.build(
            name, 5, pretrained=False, checkpoint="", options={**fields["backbone"].get("options", {}), **TINY}
        )
        plan = ps.plan(model, fields["method"])
        assert 0 < plan.trainable <= sum(p.numel() for p in model.parameters()) * 2
        make_method(fields["method"])


def test_only_marked_recipes_look_at_test_data() -> None:
    looking = {n for n, r in book.recipes.items() if r.recipe.get("select") == "test"}
    assert looking == {n for n, r in book.recipes.items() if r.selects_on == "test"}
    assert looking == {n for n in book.recipes if n.endswith("-paper")} and len(looking) >= 9
    for name in looking:
        assert book.recipe(name).reproduces == "paper" and "eproduces the paper's protocol" in book.recipe(name).summary
    for name, recipe in book.recipes.items():
        assert name in looking or recipe.recipe["select"] == "last"
    few = [r for r in book.recipes.values() if r.suite == "few-shot"]
    assert all(r.resample and r.seeds == tuple(range(10)) for r in few)


def test_values_of_the_cards() -> None:
    shared = {"lr": 5e-4, "weight_decay": 0.05, "batch_size": 32, "warmup_epochs": 10, "min_lr": 1e-6, "clip_norm": 10}
    for method in METHODS:
        for suite, epochs in (("scanobjectnn", 300), ("modelnet40", 300), ("few-shot", 150)):
            values = book.recipe(f"{method}-{suite}").recipe
            assert {**shared, "epochs": epochs, "select": "last"} == dict(values)
    dapt, bg = book.recipe("dapt-scanobjectnn"), "obj-bg"
    fields = {task: dapt.run_fields(SCANOBJECTNN, task) for task in SCANOBJECTNN.tasks}
    assert [fields[t]["method"]["dropout"] for t in ("obj-bg", "obj-only", "pb-t50-rs")] == [0.5, 0.0, 0.2]
    assert fields["obj-only"]["method"]["patch_token"] is None and fields[bg]["method"]["patch_token"] == "max"
    assert [fields[t]["backbone"]["options"]["drop_path"] for t in ("obj-bg", "obj-only", "pb-t50-rs")] == [
        0.3,
        0.1,
        0.3,
    ]
    assert fields[bg]["backbone"]["options"]["groups"] == 128 and fields[bg]["data"]["variant"] == bg
    model = book.recipe("dapt-modelnet40").run_fields(MODELNET40, "modelnet40")["method"]
    assert model["rank"] == 72 and model["prompt_token"] is None
    ours, paper = (
        {t: book.recipe(f"idpt-scanobjectnn{end}").run_fields(SCANOBJECTNN, t)["method"] for t in SCANOBJECTNN.tasks}
        for end in ("", "-paper")
    )
    assert all(m["prompt_layer"] == 11 and m["cls_type"] == "all" for m in ours.values())
    assert paper["obj-bg"]["cls_type"] == "promptonly" and paper["obj-only"]["prompt_layer"] == 6
    gpt = book.recipe("pointgst-scanobjectnn-pointgpt-l")
    assert gpt.backbone == {"name": "pointgpt-l", "options": {"groups": 128, "drop_path": 0.2}}
    assert (gpt.recipe["lr"], gpt.recipe["epochs"], gpt.recipe["batch_size"]) == (1e-4, 50, 64)
    assert book.recipe("pointgst-modelnet40-pointgpt-l").recipe["batch_size"] == 128
    parts = book.recipe("full-shapenetpart")
    assert parts.recipe["lr"] == 2e-4 and parts.recipe["batch_size"] == 16 and parts.data["splits"] == "trainval"


def test_published_numbers_belong_to_what_they_stand_at() -> None:
    for name in book.recipes:
        said = book.recipe(name).published
        assert all(80 < v < 100 for k, v in said.items() if k != "source") and (not said or said["source"])
    assert book.recipe("pointgst-scanobjectnn").published["pb-t50-rs"] == 85.29
    assert book.recipe("linear-scanobjectnn").published == {} == book.recipe("vpt-modelnet40").published


def test_names_of_tasks_are_found_however_they_are_spelled() -> None:
    assert SCANOBJECTNN.find("OBJ_BG") == "obj-bg" and FEW_SHOT.find("5way10shot") == "5way-10shot"
    assert SHAPENETPART.find("ShapeNetPart") == "shapenetpart"
    with pytest.raises(UnknownNameError, match="obj-only"):
        SCANOBJECTNN.find("obj-onli")
    assert book.choose("pointgst", "scanobjectnn").name == "pointgst-scanobjectnn"


def test_missing_data_is_said(tmp_path: Path) -> None:
    assert "main_split" in SCANOBJECTNN.missing(str(tmp_path), "obj-bg", {})
    assert "ModelNet40" in MODELNET40.missing(str(tmp_path), "modelnet40", {})
    assert "synsetoffset2category" in SHAPENETPART.missing(str(tmp_path), "shapenetpart", {})
    for fold in range(9):
        made.episode(tmp_path, 5, 10, fold)
    assert "lacks 1 of 10 folds of 5-way 10-shot: 9" in FEW_SHOT.missing(str(tmp_path), "5way-10shot", {})
    made.episode(tmp_path, 5, 10, 9)
    assert FEW_SHOT.missing(str(tmp_path), "5way-10shot", {}) == ""
    labels = list(range(15))
    made.hdf5(tmp_path / "main_split" / "training_objectdataset.h5", labels)
    made.hdf5(tmp_path / "main_split" / "test_objectdataset.h5", labels)
    assert SCANOBJECTNN.missing(str(tmp_path), "obj-bg", {}) == ""
    made.modelnet_txt(tmp_path / "m", ["a", "b"])
    assert MODELNET40.missing(str(tmp_path / "m"), "modelnet40", {}) == ""
    made.shapenetpart(tmp_path / "s", {"Bag": ("02773838", 4, 2)})
    assert SHAPENETPART.missing(str(tmp_path / "s"), "shapenetpart", {}) == ""


def _pretrained(path: Path, **options: Any) -> Path:
    import torch

    model = backbones.build("point-mae", 40, pretrained=False, checkpoint="", options=options)
    state = {f"MAE_encoder.{k}": v for k, v in model.state_dict().items() if "cls_" not in k}
    torch.save({"base_model": state}, path)
    return path


def test_episodes_train_by_their_recipe_and_say_why_they_cannot_validate(tmp_path: Path) -> None:
    made.episode(tmp_path / "data", 5, 10, 3)
    sizes = {"embed_dim": 24, "num_heads": 2, "depth": 2, "groups": 8, "group_size": 8}
    weights = _pretrained(tmp_path / "pretrain.pth", **sizes)
    words = [f"backbone.options.{k}={v}" for k, v in sizes.items()]
    words += ["data.num_points=32", "method.prompt_layer=1", "recipe.batch_size=25", "recipe.warmup_epochs=0"]
    start = ["train", "--recipe", "idpt-few-shot", "--task", "5way-10shot", "--data", tmp_path / "data", "--seed", 3]
    start += ["--checkpoint", weights, "--epochs", 1, "--device", "cpu"]
    result = cli(*start, "--out", tmp_path / "run", *words)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["data"]["way"] == 5 and record["data"]["info"]["fold"] == 3  # seed k, fold k
    assert record["final"]["test"]["accuracy"] is not None
    assert record["data"]["info"]["sizes"] == {"train": 50, "test": 100}
    refused = cli(*start, "--out", tmp_path / "no", *words, "recipe.select=val")
    said = " ".join(refused.output.split())
    assert refused.exit_code == 1
    assert "recipe.select=last" in said and "val_fraction does not" in said and "val_fraction=0.2" not in said


def test_parts_are_listed_and_planned_by_their_recipe(tmp_path: Path) -> None:
    listed = json.loads(cli("recipes", "--json").output)
    assert {row["name"] for row in listed["recipes"]} == set(book.recipes)
    made.shapenetpart(tmp_path, {"Bag": ("02773838", 4, 2)})
    sizes = [f"backbone.options.{k}={v}" for k, v in {**TINY, "groups": 16}.items()]
    shown = cli("train", "--recipe", "idpt-shapenetpart", "--data", tmp_path, "--dry-run", *sizes)
    assert shown.exit_code == 0, shown.output
    assert "task: segmentation" in shown.output and "idpt(generator='mlp')" in " ".join(shown.output.split())


def test_shares_are_numbers() -> None:
    values = [v for r in book.recipes.values() for k, v in r.published.items() if k != "source"]
    assert np.isfinite(values).all() and len(values) > 20
