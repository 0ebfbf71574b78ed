"""Every recipe of audio: valid, honest about its selection, true to its source, usable on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sound_data as made
import torch
from typer.testing import CliRunner, Result

import peft_suite as ps
from peft_suite.audio import listing
from peft_suite.audio.backbones import backbones
from peft_suite.audio.data import AudioDataConfig
from peft_suite.audio.recipes import ESC50, FLUENT_SPEECH, SPEECH_COMMANDS, URBANSOUND8K, book
from peft_suite.cli.app import build
from peft_suite.errors import UnknownNameError
from peft_suite.method import make_method
from peft_suite.plugins import methods
from peft_suite.train.config import Recipe
from peft_suite.train.optim import build_optimizer
from peft_suite.train.suites import NamedRecipe

FOLDER = Path(listing.__file__).resolve().parent / "recipes"
SUITES = (ESC50, URBANSOUND8K, SPEECH_COMMANDS, FLUENT_SPEECH)
STUDY = (
    "linear",
    "full",
    "ast-bitfit",
    "audio-prompts",
    "audio-prompts-shallow",
    "prefix",
    "ast-lora",
    "ast-pfeiffer",
    "ast-houlsby",
    "conformer",
    "conformer-houlsby",
)
TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_mel_bins": 32,
    "max_length": 48,
}


def cli(*words: object) -> Result:
    return CliRunner().invoke(build(), ["audio", *map(str, words)])


@pytest.fixture(params=sorted(book.recipes))
def recipe(request: pytest.FixtureRequest) -> NamedRecipe:
    return book.recipe(request.param)


def test_files_and_recipes_agree() -> None:
    assert sorted(book.recipes) == sorted(file.stem for file in FOLDER.glob("*.yaml"))
    for name, recipe in book.recipes.items():
        assert f"-{recipe.suite}" in name
        first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        weights = " --checkpoint deit.pth" if name == "full-speech-commands-ast" else ""
        assert first == (
            f"# peft-suite audio bench --suite {recipe.suite} --methods {name} --data ROOT{weights} --out runs/{name}"
        )
    for suite in SUITES:
        assert {f"{m}-{suite.name}{end}" for m in STUDY for end in ("", "-petl")} <= set(book.recipes)
        assert {f"soft-moa-{suite.name}", f"dense-moa-{suite.name}"} <= set(book.recipes)


def test_a_plan_of_every_task_on_a_tiny_stand_in(recipe: NamedRecipe) -> None:
    assert recipe.method_name in methods() and recipe.source and recipe.summary and recipe.tuning
    suite = book.suite(recipe.suite)
    assert recipe.backbone["name"] == "ast-base"
    options = {**recipe.run_fields(suite)["backbone"]["options"], **TINY}
    model = backbones.build("ast-base", 5, pretrained=False, checkpoint="", options=options)
    for task in suite.tasks:
        fields = recipe.run_fields(suite, task)
        data = AudioDataConfig.from_dict({"root": "somewhere", **fields["data"]})
        assert data.format == recipe.suite and (data.fold > 0) == (len(suite.tasks) > 1)
        make_method(fields["method"])
    plan = ps.plan(model, fields["method"])
    assert 0 < plan.trainable <= 2 * sum(p.numel() for p in model.parameters())


def test_values_of_the_card() -> None:
    frames = {"esc50": 500, "urbansound8k": 400, "speech-commands": 100, "fluent-speech": 400}
    batch = {"esc50": 32, "urbansound8k": 32, "speech-commands": 128, "fluent-speech": 32}
    epochs = {"esc50": 50, "urbansound8k": 30, "speech-commands": 75, "fluent-speech": 75}
    lr = {"linear": 1e-3, "full": 5e-5, "prefix": 1e-2, "audio-prompts": 1e-2, "audio-prompts-shallow": 1e-2}
    for suite in SUITES:
        own = suite.name
        for method in (*STUDY, "soft-moa", "dense-moa"):
            for end in ("", "-petl") if method in STUDY else ("",):
                fields = book.recipe(f"{method}-{own}{end}").run_fields(suite, suite.tasks[0])
                assert fields["backbone"]["options"]["max_length"] == frames[own]
                values = Recipe.from_dict(fields["recipe"])
                assert (values.batch_size, values.epochs) == (batch[own], epochs[own])
                assert values.lr == lr.get(method, 5e-3) and values.weight_decay == 0.1 and values.decay == "all"
                assert values.schedule == "cosine" and values.min_lr == values.warmup_epochs == values.clip_norm == 0
                assert (fields["data"]["augment"] == "petl-ast") == (own in ("esc50", "urbansound8k"))
                zeros = fields["backbone"]["options"].get("pos_embed") == "zeros"
                assert zeros == (fields["data"].get("statistics") == "audioset") == (end == "-petl")
        kernel = book.recipe(f"conformer-{own}").run_fields(suite)["method"]["kernel"]
        assert kernel == (8 if own in ("esc50", "urbansound8k") else 31)
    original = book.recipe("full-esc50-ast").run_fields(ESC50, "fold-2")
    assert original["backbone"]["options"] == {"max_length": 512, "pool": "tokens", "head": "norm"}
    assert original["recipe"]["lr"] == 1e-5 and original["recipe"]["batch_size"] == 48 and original["data"]["fold"] == 2


def test_optimizers_have_the_constants_of_their_papers() -> None:
    model = torch.nn.Linear(3, 2)
    study = build_optimizer(model, Recipe.from_dict(book.recipe("prefix-esc50").recipe))
    assert isinstance(study, torch.optim.AdamW) and study.defaults["betas"] == (0.9, 0.98)
    assert study.defaults["eps"] == 1e-6
    assert [g["weight_decay"] for g in study.param_groups] == [0.1]  # biases too
    assert study.param_groups[0]["lr"] == 1e-2
    original = build_optimizer(model, Recipe.from_dict(book.recipe("full-esc50-ast").recipe))
    assert isinstance(original, torch.optim.Adam) and original.defaults["betas"] == (0.95, 0.999)
    assert [g["weight_decay"] for g in original.param_groups] == [5e-7]


def test_no_recipe_looks_at_test_data() -> None:
    for name, recipe in book.recipes.items():
        assert recipe.selects_on != "test" and recipe.recipe["select"] in ("last", "val")
        assert (recipe.reproduces == "paper") == name.endswith("-petl")
        assert recipe.departures
    assert book.recipe("linear-esc50").run_fields(ESC50)["data"]["val_fraction"] == 0  # four folds train
    assert book.recipe("linear-esc50-petl").run_fields(ESC50)["data"]["val_fraction"] > 0  # three


def test_published_numbers_belong_to_what_they_stand_at() -> None:
    assert book.recipe("conformer-fluent-speech-petl").published["fluent-speech"] == 95.48
    assert book.recipe("ast-pfeiffer-esc50-petl").published["mean of tasks"] == 88.38
    said = book.recipe("full-esc50-ast").published
    assert sum(said[t] for t in ESC50.tasks) / 5 == pytest.approx(said["mean of tasks"])
    for name, recipe in book.recipes.items():
        assert bool(recipe.published) == name.endswith(("-petl", "-ast"))
        assert not recipe.published or recipe.published["source"]


def test_names_of_tasks_and_recipes() -> None:
    assert ESC50.find("3") == ESC50.find("Fold 3") == ESC50.find("fold_3") == "fold-3"
    assert URBANSOUND8K.find("10") == "fold-10" and SPEECH_COMMANDS.find("SpeechCommands") == "speech-commands"
    with pytest.raises(UnknownNameError, match="fold-5"):
        ESC50.find("6")
    assert book.choose("conformer", "esc50").name == "conformer-esc50"
    assert book.choose("conformer(kernel=3)", "esc50").run_fields(ESC50)["method"]["kernel"] == 3


def test_missing_data_is_said(tmp_path: Path) -> None:
    assert "esc50.csv" in ESC50.missing(str(tmp_path), "fold-1", {})
    assert "UrbanSound8K.csv" in URBANSOUND8K.missing(str(tmp_path), "fold-1", {})
    assert "testing_list.txt" in SPEECH_COMMANDS.missing(str(tmp_path), "speech-commands", {})
    assert "train_data.csv" in FLUENT_SPEECH.missing(str(tmp_path), "fluent-speech", {})
    root = made.esc50(tmp_path / "ESC-50", folds=4)
    assert ESC50.missing(str(root), "fold-4", {}) == ""
    assert "no fold 5; it has 1, 2, 3, 4" in ESC50.missing(str(root), "fold-5", {})


def test_a_fold_trains_by_its_recipe(tmp_path: Path) -> None:
    listed = json.loads(cli("recipes", "--json").output)
    assert {row["name"] for row in listed["recipes"]} == set(book.recipes)
    root = made.esc50(tmp_path / "ESC-50", each=2)
    words = [f"backbone.options.{k}={v}" for k, v in TINY.items()] + ["data.augment=spec-augment(freq=4, time=4)"]
    start = ("train", "--recipe", "ast-pfeiffer-esc50-petl", "--task", "fold-2", "--data", root, "--no-pretrained")
    more = ("--epochs", 1, "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "run")
    result = cli(*start, *more, "backbone.options.pos_embed=interpolate", *words)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["info"]["test_fold"] == 2 and record["data"]["info"]["val_fold"] == 1
    assert record["data"]["info"]["preprocessing"]["statistics"] == "audioset"
    assert record["config"]["recipe"]["optimizer"].endswith("StudyAdamW") and record["config"]["seed"] == 10
