"""Every recipe: valid, sourced, honest about its selection, and in accordance with the numbers known for its method."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import peft_suite as ps
from peft_suite.errors import ConfigError, UnknownNameError
from peft_suite.method import make_method
from peft_suite.plugins import methods
from peft_suite.train.suites import Book, NamedRecipe, Suite, merged
from peft_suite.vision import vtab
from peft_suite.vision.data import ImageDataConfig
from peft_suite.vision.recipes import FEW_SHOT, FGVC, VTAB, book
from peft_suite.vision.transforms import VARIANTS

FOLDER = Path(vtab.__file__).resolve().parent / "recipes"


@pytest.fixture(params=sorted(book.recipes))
def recipe(request: pytest.FixtureRequest) -> NamedRecipe:
    return book.recipe(request.param)


def test_files_and_recipes_agree() -> None:
    assert sorted(book.recipes) == sorted(file.stem for file in FOLDER.glob("*.yaml"))
    for name, recipe in book.recipes.items():
        assert f"-{recipe.suite}" in name
        first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        assert (
            first == f"# peft-suite vision bench --suite {recipe.suite} --methods {name} --data ROOT --out runs/{name}"
        )


def test_method_and_data_of_every_task(recipe: NamedRecipe) -> None:
    suite = book.suite(recipe.suite)
    if recipe.method_name not in methods():
        pytest.skip(f"the method {recipe.method_name!r} is not registered yet")
    for task in suite.tasks:
        fields = recipe.run_fields(suite, task)
        make_method(fields["method"])
        ImageDataConfig.from_dict({"root": "somewhere", **fields["data"]})


def test_every_recipe_says_what_it_stands_on(recipe: NamedRecipe) -> None:
    assert recipe.source and recipe.summary and recipe.seeds
    if recipe.suite != "cifar10":  # its backbone is a file that the benchmarks make
        assert recipe.backbone["name"].partition(".")[2] in ("orig_in21k", "augreg_in21k")
    assert recipe.data.get("preprocess", "ssf") in VARIANTS
    assert recipe.recipe.get("select") in ("last", "val") or recipe.reproduces == "paper"
    if recipe.suite == "vtab":
        assert recipe.data["splits"] == "final"
        assert recipe.data["preprocess"] and recipe.tuning
    for value in (v for k, v in recipe.published.items() if k != "source"):
        assert 40 < value < 100 or value > 20
    assert not recipe.published or recipe.published["source"]


def test_published_means_agree_with_their_groups(recipe: NamedRecipe) -> None:
    said = recipe.published
    if recipe.suite == "vtab" and "Natural" in said:
        mean = sum(said[g] for g in vtab.GROUPS) / 3
        assert said["mean of groups"] == pytest.approx(mean, abs=0.11)
    if recipe.suite == "fgvc" and "cub" in said:
        assert said["mean of tasks"] == pytest.approx(sum(said[t] for t in FGVC.tasks) / 5, abs=0.11)


def test_values_of_the_cards() -> None:
    ssf = book.recipe("ssf-vtab")
    fields = ssf.run_fields(VTAB, "clevr_dist")
    assert fields["recipe"]["lr"] == 5e-2 and fields["recipe"]["weight_decay"] == 5e-2
    assert fields["backbone"]["options"] == {"drop_path_rate": 0.1}
    assert fields["backbone"]["name"] == "vit_base_patch16_224.augreg_in21k"
    assert fields["data"] == {"preprocess": "ssf", "splits": "final", "format": "vtab", "task": "clevr_dist"}
    assert book.recipe("snell-vtab").run_fields(VTAB, "patch_camelyon")["recipe"]["lr"] == 7e-4
    assert book.recipe("convpass-vtab").run_fields(VTAB, "svhn")["method"]["xavier"] is True
    assert book.recipe("bi-lora-vtab").run_fields(VTAB, "dmlab")["method"]["scale"] == 10
    assert book.recipe("snella-vtab").run_fields(VTAB, "svhn")["method"]["target"] is None
    assert book.recipe("vpt-vtab").run_fields(VTAB, "sun397")["recipe"]["lr"] == 12.5
    for name in ("ssf-vtab", "hst-vtab", "snell-vtab", "convpass-vtab", "bi-adaptformer-vtab", "bi-lora-vtab"):
        assert set(book.recipe(name).tasks) == set(VTAB.tasks)


def test_only_marked_recipes_look_at_test_data() -> None:
    looking = {n for n, r in book.recipes.items() if r.recipe.get("select") == "test"}
    assert looking == {n for n, r in book.recipes.items() if r.selects_on == "test"}
    assert all(n.endswith("-paper") and book.recipe(n).reproduces == "paper" for n in looking)
    assert book.recipe("ssf-vtab-paper").tasks == book.recipe("ssf-vtab").tasks


def test_parameter_counts_on_the_real_backbone() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_base_patch16_224", num_classes=100)
    for name, recipe in book.recipes.items():
        said = recipe.parameters
        if recipe.method_name not in methods() or not said or name.endswith("-paper"):
            continue
        counted = ps.plan(model, recipe.run_fields(book.suite(recipe.suite))["method"]).trainable
        assert counted == said["with_head_100"], name


def test_choosing() -> None:
    assert book.choose("vpt", "vtab").name == "vpt-vtab"
    assert book.choose("vpt-shallow-vtab", "vtab").method_name == "vpt"
    changed = book.choose("vpt(num_tokens=5)", "vtab")
    assert changed.method == {**book.recipe("vpt-vtab").method, "num_tokens": 5}  # type: ignore[dict-item]
    assert changed.run_fields(VTAB, "dmlab")["method"]["num_tokens"] == 5  # stronger than the task's 100
    assert changed.run_fields(VTAB, "dmlab")["recipe"]["lr"] == 0.25
    assert book.choose("lora", "few-shot").name == "lora-few-shot"
    with pytest.raises(UnknownNameError, match="recipe of the suite vtab"):
        book.choose("nothing", "vtab")
    with pytest.raises(UnknownNameError, match="ssf-vtab"):
        book.recipe("ssf-vtap")
    assert book.recipe("vpt-vtab").take_seeds(2) == [42, 44]
    assert book.recipe("ssf-vtab-paper").take_seeds(3) == [42, 43, 44]
    assert FEW_SHOT.find("food-101-4") == "food101-4" and len(FEW_SHOT.tasks) == 25
    with pytest.raises(UnknownNameError):
        FEW_SHOT.find("food101-3")


GOOD = {"suite": "toy", "method": "linear", "source": "us", "recipe": {"select": "last"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipy": {}}, "unknown field 'recipy'.*recipe"),
        ({"suite": "vtap"}, "Unknown suite 'vtap'"),
        ({"recipe": {"select": "last", "lrr": 1}}, "no field 'lrr'.*lr"),
        ({"recipe": {"select": "last", "lr": "fast"}}, "Recipe.lr = 'fast'"),
        ({"recipe": {"select": "test"}, "selects_on": "test"}, "say reproduces: paper"),
        ({"recipe": {"select": "test"}}, "selects_on = 'nothing'"),
        ({"seeds": []}, "seeds"),
        ({"tasks": {"a": [1]}}, "needs a line 'fields"),
        ({"tasks": {"fields": ["lr"], "a": [1]}}, "unknown field 'lr'"),
        ({"tasks": {"fields": ["recipe.lr"], "c": [1]}}, "Unknown task of toy 'c'"),
        ({"tasks": {"fields": ["recipe.lr"], "a": [1, 2]}}, "must be a list of 1 values"),
        ({"tasks": {"fields": ["recipe.rate"], "a": [1]}}, "no field 'rate'"),
        ({"published": {"Natura": 1}}, "Unknown result 'Natura'"),
        ({"published": {"a": "good"}}, "give numbers"),
        ({"extends": "nobody"}, "Unknown recipe to extend 'nobody'"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    suite = Suite("toy", "Toy", {"G": ("a", "b")}, lambda task: {}, lambda root, task, data: "", lambda name: name)
    (tmp_path / "good-toy.yaml").write_text(yaml.safe_dump(GOOD))
    assert Book(tmp_path, [suite]).recipe("good-toy").seeds == (0, 1, 2)
    (tmp_path / "bad-toy.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(ConfigError, match=f"Recipe bad-toy: .*{message}"):
        _ = Book(tmp_path, [suite]).recipes


def test_extending(tmp_path: Path) -> None:
    suite = Suite("toy", "Toy", {"G": ("a", "b")}, lambda task: {}, lambda root, task, data: "", lambda name: name)
    (tmp_path / "one-toy.yaml").write_text(yaml.safe_dump({**GOOD, "tasks": {"fields": ["recipe.lr"], "a": [0.5]}}))
    (tmp_path / "two-toy.yaml").write_text("extends: one-toy\nrecipe: {epochs: 7}\n")
    two = Book(tmp_path, [suite]).recipe("two-toy")
    assert two.run_fields(suite, "a")["recipe"] == {"select": "last", "epochs": 7, "lr": 0.5}
    assert "lr" not in two.run_fields(suite, "b")["recipe"]
    (tmp_path / "one-toy.yaml").write_text("extends: two-toy\n")
    with pytest.raises(ConfigError, match="to extend"):
        _ = Book(tmp_path, [suite]).recipes
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_listed_methods_that_are_not_registered() -> None:
    """A report, not a failure: recipes may name methods of plugins that are not installed."""
    open_ = sorted({r.method_name for r in book.recipes.values()} - set(methods()))
    print("recipes of methods that are not registered:", ", ".join(open_) or "none")
