"""``peft-suite pointcloud vote`` on a tiny generated data set: the numbers, the protocol, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from peft_suite.cli.app import build
from peft_suite.pointcloud.shapes import target_cloud

SIZES = {"embed_dim": 24, "num_heads": 2, "depth": 2, "groups": 8, "group_size": 8}


def cli(*words: object) -> Result:
    return CliRunner().invoke(build(), ["pointcloud", *map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on clouds of three generated solids."""
    root = tmp_path_factory.mktemp("vote")
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("table", "mug", "rocket")):
            place = root / "clouds" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([label, i, split == "test"])
                np.save(place / f"{i}.npy", target_cloud(name, 96, rng).astype(np.float32))
    words = [f"backbone.options.{k}={v}" for k, v in SIZES.items()]
    words += ["data.num_points=48", "recipe.select=last", "data.val_fraction=0.0", "recipe.checkpoint_every=0"]
    words += ["--method", "full", "--epochs", "6", "--lr", "1e-3", "--batch-size", "12", "--device", "cpu"]
    data, out = root / "clouds", root / "run"
    result = cli("train", "--backbone", "point-mae", "--no-pretrained", "--data", data, "--out", out, *words)
    assert result.exit_code == 0, result.output
    return root / "run" / "adapter"


def vote(adapter: Path, *more: str) -> dict[str, object]:
    result = cli("vote", adapter, "--device", "cpu", "--json", *more)
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.output)
    return found


def test_one_vote_and_its_protocol(trained: Path) -> None:
    found = vote(trained, "--passes", "3")
    assert found["split"] == "test" and found["samples"] == 12 and found["repetitions"] == 1 and found["best"] is None
    assert found["protocol"] == "mean logits of 3 passes (random subset, scale-translate)"
    metrics = found["metrics"]
    assert isinstance(metrics, dict) and metrics["accuracy"] * 12 == pytest.approx(round(metrics["accuracy"] * 12))
    assert vote(trained, "--passes", "3") == found  # the views are those of the seed
    other = vote(trained, "--passes", "3", "--seed", "5")
    assert other["metrics"] != metrics  # another seed, other views, another loss
    train = vote(trained, "--passes", "1", "--split", "train", "--augment", "none")
    assert train["samples"] == 24 and str(train["protocol"]).endswith("1 passes (random subset, none)")
    text = cli("vote", trained, "--device", "cpu", "--passes", 1)
    assert (
        text.exit_code == 0
        and "12 clouds" in text.output
        and "mean logits of 1 passes" in " ".join(text.output.split())
    )


def test_the_best_of_many_only_by_a_recipe_that_reproduces_a_paper(trained: Path) -> None:
    def refused(*more: str) -> str:
        result = cli("vote", trained, "--device", "cpu", *more)
        assert result.exit_code != 0
        return " ".join(result.output.split())

    assert "chosen by the test labels" in refused("--repetitions", "4")
    assert "does not choose by test labels" in refused("--recipe", "idpt-modelnet40")
    assert "idpt-modelnet40-paper" in refused("--recipe", "idpt-modelnet40-papr")
    found = vote(trained, "--recipe", "idpt-modelnet40-paper", "--repetitions", "4", "--passes", "1")
    assert found["repetitions"] == 4 and str(found["protocol"]).startswith("BEST of 4 votes by test labels")
    metrics, best = found["metrics"], found["best"]
    assert isinstance(metrics, dict) and isinstance(best, float) and best >= metrics["accuracy"]
    single = vote(trained, "--passes", "1")
    assert single["metrics"] == metrics  # beside the best stands the first vote


def test_wrong_adapters_and_data_are_refused(trained: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(3):
            np.save(tmp_path / "d" / name / f"{i}.npy", np.random.default_rng(i).random((64, 3), np.float32))
    result = cli("vote", trained, "--data", tmp_path / "d", "--device", "cpu")
    assert result.exit_code != 0 and "other classes" in " ".join(result.output.split())
    result = cli("vote", tmp_path, "--device", "cpu")
    assert result.exit_code != 0
