"""The command line on the embedded backbone and real digits: train, use, merge, export, compare, go on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from peft_suite.cli.app import build

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("sklearn")

SHORT = ("--backbone", "micro-vit", "--data", "digits-shifted", "--shots", "5", "--epochs", "2", "--device", "cpu")


def call(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build(), [str(w) for w in words])
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    call("vision", "train", *SHORT, "--method", "lora(rank=2)", "--out", out, "recipe.lr=1e-2")
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images per digit in a folder per class, and one digit missing."""
    image = pytest.importorskip("PIL.Image")
    from peft_suite.vision.digits import target_half

    folder = tmp_path_factory.mktemp("photos")
    images, labels = target_half()
    for digit in range(9):
        (folder / str(digit)).mkdir()
        for index in (labels == digit).nonzero().flatten().tolist()[:3]:
            image.fromarray(images[index]).save(folder / str(digit) / f"{index:03d}.png")
    return folder


def measured(*words: str | Path) -> dict[str, Any]:
    return dict(json.loads(call("vision", "eval", *words, "--json").stdout))


def test_train_writes_everything(trained: Path) -> None:
    for name in ("adapter", "run.json", "curves.png", "report.html", "examples.json", "config.yaml"):
        assert (trained / name).exists(), name
    values = yaml.safe_load((trained / "config.yaml").read_text())
    assert values["method"] == "lora(rank=2)"
    assert values["recipe"]["lr"] == 1e-2
    assert values["data"] == {"root": "digits-shifted", "shots": 5}


def test_info(trained: Path) -> None:
    facts = json.loads(call("info", trained / "adapter", "--json").stdout)
    assert facts["method"] == "lora"
    assert facts["metadata"]["backbone"]["name"] == "micro-vit"
    assert "micro-vit" in call("info", trained / "adapter").stdout


def test_eval_agrees_with_training(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    result = measured(trained / "adapter")
    assert result["split"] == "test"
    assert result["metrics"] == pytest.approx(record["final"]["test"], abs=1e-5)
    assert measured(trained / "adapter", "--split", "val")["metrics"] == pytest.approx(record["final"]["val"], abs=1e-5)
    assert "accuracy" in call("vision", "eval", trained / "adapter").stdout


def test_eval_on_a_folder_counts_classes_by_name(trained: Path, photos: Path) -> None:
    result = measured(trained / "adapter", "--data", photos, "--split", "train", "data.val_fraction=0.0")
    assert list(result["per_class"]) == [str(i) for i in range(10)]
    assert result["per_class"]["9"] is None
    assert sum(map(sum, result["confusion"])) == result["samples"]


def test_predict(trained: Path, photos: Path, tmp_path: Path) -> None:
    rows = json.loads(call("vision", "predict", trained / "adapter", photos, "--top", "3", "--json").stdout)
    assert len(rows) == 27
    assert all(len(r["top"]) == 3 and r["prediction"] == r["top"][0]["class"] for r in rows)
    call("vision", "predict", trained / "adapter", photos / "3", "--top", "2", "--out", tmp_path / "p.csv")
    table = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(table) == 3
    assert set(table[0]) == {"file", "prediction", "probability", "class_2", "probability_2"}
    call("vision", "predict", trained / "adapter", photos, "--out", tmp_path / "p.json")
    assert [r["prediction"] for r in json.loads((tmp_path / "p.json").read_text())] == [r["prediction"] for r in rows]
    call("vision", "predict", trained / "adapter", photos / "absent", code=1)
    call("vision", "predict", trained / "adapter", photos, "--out", tmp_path / "p.txt", code=1)


def test_merged_model_measures_the_same(trained: Path) -> None:
    merged = trained / "merged"
    call("vision", "merge", trained / "adapter")
    assert measured(merged)["metrics"] == pytest.approx(measured(trained / "adapter")["metrics"], abs=1e-4)
    assert "merged model already" in call("vision", "merge", merged, code=1).stderr
    weights = merged / "model.safetensors"
    call("vision", "train", *SHORT, "--checkpoint", weights, "--out", trained / "again", "--epochs", "1")
    assert measured(trained / "again" / "adapter")["samples"] == 600


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_export_to_timm(trained: Path, tmp_path: Path, format: str) -> None:
    call("vision", "export", trained / "adapter", tmp_path / "out", "--format", format)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.num_classes == 10
    assert torch.equal(model(sample()), opened(trained / "adapter")(sample()))
    assert not list(tmp_path.glob(".*"))


def test_export_to_torch(trained: Path, tmp_path: Path) -> None:
    call("vision", "export", trained / "adapter", tmp_path / "m.pt2", "--format", "torch-export")
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(sample()), opened(trained / "adapter")(sample()))


def test_export_to_onnx(trained: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    call("vision", "export", trained / "adapter", tmp_path / "m.onnx", "--format", "onnx")
    session = reference.ReferenceEvaluator(onnx.load(tmp_path / "m.onnx"))
    (said,) = session.run(None, {"input": sample().numpy()})
    torch.testing.assert_close(torch.from_numpy(said), opened(trained / "adapter")(sample()), atol=1e-4, rtol=1e-3)


def test_onnx_without_its_packages_says_what_to_install(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else real(name, *a))
    result = call("vision", "export", trained / "adapter", tmp_path / "m.onnx", "--format", "onnx", code=1)
    assert "pip install 'peft-suite[export]'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_export_to_peft(trained: Path, tmp_path: Path) -> None:
    call("vision", "export", trained / "adapter", tmp_path / "out", "--format", "peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_unmergeable_method_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "vpt"
    call("vision", "train", *SHORT, "--method", "vpt(num_tokens=2)", "--out", out, "--epochs", "1")
    result = call("vision", "merge", out / "adapter", tmp_path / "merged", code=1)
    assert "cannot be folded" in result.stderr
    call("vision", "export", out / "adapter", tmp_path / "timm", code=1)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "timm").exists()


def test_a_finished_run_is_never_replaced_by_accident(trained: Path) -> None:
    before = (trained / "run.json").read_bytes()
    words = ("vision", "train", "--config", trained / "config.yaml")
    result = call(*words, code=1)
    assert "--resume" in result.stderr
    assert "--overwrite" in result.stderr
    call(*words, "--resume")
    assert (trained / "run.json").read_bytes() == before
    changed = call(*words, "--resume", "recipe.lr=0.5", code=1)
    assert "another configuration" in changed.stderr
    call(*words, "--resume", "--overwrite", code=2)
    assert (trained / "run.json").read_bytes() == before


def test_a_refused_run_leaves_the_folder_as_it_was(trained: Path, photos: Path, tmp_path: Path) -> None:
    words = ("vision", "train", *SHORT, "data.val_fraction=0.0", "data.test_fraction=0.0")
    refused = (*words, "--data", photos)  # nothing to select by
    assert "val_fraction" in call(*refused, "--out", tmp_path / "new", code=1).stderr
    assert not (tmp_path / "new").exists()
    shutil.copytree(trained, tmp_path / "old")
    before = {p: p.read_bytes() for p in (tmp_path / "old").rglob("*") if p.is_file()}
    call(*refused, "--out", tmp_path / "old", "--overwrite", code=1)
    assert {p: p.read_bytes() for p in (tmp_path / "old").rglob("*") if p.is_file()} == before


def test_plan_takes_the_same_words_as_train() -> None:
    shown = call("vision", "plan", "--backbone", "micro-vit", "--no-pretrained", "--method", "lora(rank=2)", "--json")
    assert json.loads(shown.stdout)["trainable"] > 0


def test_ctrl_c_says_how_to_go_on_and_resume_does(tmp_path: Path, monkeypatch: Any) -> None:
    import peft_suite.train.loop as loop

    real = loop._Training.close_epoch

    def interrupt(self: Any) -> None:
        real(self)
        self.stop.wanted = True

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "close_epoch", interrupt)
        stopped = call("vision", "train", *SHORT, "--out", out, code=130)
    assert f"train --config {out / 'config.yaml'} --resume" in stopped.stderr
    assert "interrupted" in call("vision", "train", *SHORT, "--out", out, code=1).stderr
    call("vision", "train", "--out", out, "--resume")
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_seeds_get_a_summary_and_overwrite_replaces(tmp_path: Path) -> None:
    words = ("vision", "train", *SHORT, "--seeds", "2", "--epochs", "1", "--out", tmp_path)
    call(*words)
    assert (tmp_path / "summary.html").exists()
    first = (tmp_path / "seed-1" / "run.json").stat().st_mtime_ns
    call(*words, code=1)
    call(*words, "--overwrite")
    assert (tmp_path / "seed-1" / "run.json").stat().st_mtime_ns > first


def test_bench_compares_keeps_failures_and_goes_on(tmp_path: Path) -> None:
    words = ("vision", "bench", *SHORT, "--epochs", "1", "--seeds", "2", "--out", tmp_path)
    rows = json.loads(call(*words, "--methods", "linear,lora(rank=2)", "--json").stdout)["runs"]
    assert [r["status"] for r in rows] == ["finished"] * 4
    assert (tmp_path / "comparison.html").exists()
    assert all((Path(r["out"]) / "report.html").exists() for r in rows)
    times = {r["out"]: (Path(r["out"]) / "run.json").stat().st_mtime_ns for r in rows}
    shown = call(*words, "--methods", "linear,lora(rank=2),bitfit")
    assert "bitfit" in shown.stdout
    assert all((Path(out) / "run.json").stat().st_mtime_ns == time for out, time in times.items())
    call(*words, "--methods", "linear,lora(rnk=2)", code=1)


def sample() -> Any:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def opened(adapter: Path) -> Any:
    from peft_suite.cli.export import merge_in_place
    from peft_suite.train import open_adapter

    one = open_adapter(adapter)
    merge_in_place(one)
    return one.model
