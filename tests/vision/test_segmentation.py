"""Segmentation: metrics, layouts, joint transforms, models, runs from the configuration and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.testing import conformance
from peft_suite.train import RunConfig, evaluate, run
from peft_suite.vision.segmentation import IGNORE, Segmentation, pixel_counts
from peft_suite.vision.segmentation_data import SegmentationDataConfig, source
from peft_suite.vision.segmentation_models import Segmenter, backbones
from peft_suite.vision.segmentation_scenes import write_scenes

PLUGIN = "vision"
CLASSES = ("sky", "grass", "wall")
FACTS = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

test_conformance = conformance(
    "linear",
    "lora(rank=2)",
    "vpt(num_tokens=3, deep=True)",
    "hst(dims=[8, 12], heads=[2, 3])",
    "convpass(bottleneck=3)",
    backbones=["timm-vit-segmenter"],
)


def image(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path: Path, values: Any, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if palette:
        picture = picture.convert("P")
        picture.putdata(list(np.asarray(values).flatten()))
    picture.save(path)


def pairs(root: Path, count: int = 6) -> Path:
    for i in range(count):
        image(root / "train" / "images" / f"{i}.jpg", seed=i)
        mask(root / "train" / "masks" / f"{i}.png", np.full((30, 40), i % 3))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


# ---- task --------------------------------------------------------------------------------------------------------


def test_metrics_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    torch.manual_seed(0)
    task = Segmentation(CLASSES)
    logits, target = torch.randn(5, 3, 8, 8), torch.randint(0, 3, (5, 8, 8))
    target[0, :2] = IGNORE
    kept = [task.reduce(logits[i : i + 2], target[i : i + 2]) for i in (0, 2, 4)]
    output, counts = (torch.cat(parts) for parts in zip(*kept, strict=True))
    found = task.metrics(output, counts)
    known = target != IGNORE
    wanted = multiclass_jaccard_index(logits, target, 3, ignore_index=IGNORE, average="macro")
    assert found["miou"] == pytest.approx(float(wanted))
    said = logits.argmax(1)
    assert found["pixel_accuracy"] == pytest.approx(float((said == target)[known].float().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, target, ignore_index=IGNORE)), rel=1e-5)
    ious = task.per_class(output, counts)
    assert np.mean([v for v in ious.values() if v is not None]) == pytest.approx(found["miou"])
    matrix = np.array(task.confusion(output, counts))
    assert matrix.sum() == int(known.sum()) and matrix.diagonal().sum() == int((said == target).sum())
    assert len(task.outcome(output, counts).correct) == 5


def test_a_class_that_occurs_nowhere_is_left_out() -> None:
    task = Segmentation(CLASSES)
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 1] = 1.0
    found = task.metrics(*task.reduce(logits, torch.ones(1, 4, 4, dtype=torch.long)))
    assert found["miou"] == 1.0
    assert task.per_class(*task.reduce(logits, torch.ones(1, 4, 4, dtype=torch.long)))["sky"] is None


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 1.5])])
def test_the_loss_is_a_mean_over_pixels(weights: torch.Tensor | None) -> None:
    task = Segmentation(CLASSES)
    logits, target = torch.randn(3, 3, 6, 6), torch.randint(0, 3, (3, 6, 6))
    target[1] = IGNORE
    found = task.loss(logits, target, class_weights=weights).sum() / task.mass(target, weights).sum()
    torch.testing.assert_close(found, F.cross_entropy(logits, target, weights, ignore_index=IGNORE))
    with pytest.raises(ConfigError, match=r"\[N, H, W\]"):
        task.loss(logits, target[:, 0, 0])


def test_counts_checks_and_weights() -> None:
    task = Segmentation(CLASSES)
    target = torch.tensor([[[0, 0, 1], [IGNORE, 1, 0]], [[2, 1, 1], [1, 1, 1]]])
    counts = pixel_counts(target, 3)
    assert counts.tolist() == [[3, 2, 0, 1, 0], [0, 5, 1, 0, 0]]
    weights = task.class_weights(counts)
    torch.testing.assert_close(weights * torch.tensor([3.0, 7.0, 1.0]), torch.full((3,), float(weights[2])))
    assert float(weights.mean()) == pytest.approx(1)
    task.check(counts, "train")
    with pytest.raises(DataError, match="neither a class"):
        task.check(pixel_counts(torch.tensor([[[7]]]), 3), "train")
    with pytest.raises(DataError, match="every pixel"):
        task.check(pixel_counts(torch.full((1, 2, 2), IGNORE), 3), "train")


# ---- data --------------------------------------------------------------------------------------------------------


def test_pairs(tmp_path: Path) -> None:
    config = SegmentationDataConfig(root=str(pairs(tmp_path)), val_fraction=0.34)
    assert source.classes(config) == (CLASSES, False)
    data = source.load(config, FACTS)
    assert (len(data.train), len(data.val), data.test) == (4, 2, None)  # type: ignore[arg-type]
    x, y = data.train[0]
    assert x.shape == (3, 32, 32) and y.shape == (32, 32) and y.dtype == torch.int64
    assert isinstance(data.task, Segmentation) and data.task.classes == CLASSES
    assert data.picture is not None
    assert data.picture(data.train, 0, torch.zeros(64, 64, dtype=torch.uint8))[:4] == b"\x89PNG"
    limited = source.load(config.replace(limit=2), FACTS)
    assert len(limited.train) == 2 and limited.fingerprint != data.fingerprint  # type: ignore[arg-type]


def test_voc(tmp_path: Path) -> None:
    values = np.zeros((30, 40), dtype=np.uint8)
    values[:10], values[10:12] = 15, 255
    for split, name in (("train", "a"), ("val", "b")):
        image(tmp_path / "JPEGImages" / f"{name}.jpg")
        mask(tmp_path / "SegmentationClass" / f"{name}.png", values, palette=True)
        file = tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}\n")
    data = source.load(SegmentationDataConfig(root=str(tmp_path)), {**FACTS, "input_size": (3, 30, 40)})
    assert data.classes[15] == "person" and len(data.classes) == 21
    assert torch.equal(data.val[0][1], torch.from_numpy(values).long())  # type: ignore[index]
    file.write_text("b\nmissing\n")
    with pytest.raises(DataError, match="missing"):
        source.load(SegmentationDataConfig(root=str(tmp_path)), FACTS)


def test_ade20k(tmp_path: Path) -> None:
    for folder in ("training", "validation"):
        image(tmp_path / "images" / folder / "x.jpg", (8, 8))
        mask(tmp_path / "annotations" / folder / "x.png", np.arange(64).reshape(8, 8) % 4)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t.\t.\t.\t.\twall\n2\t.\t.\t.\t.\tb\n3\t.\t.\t.\t.\tc\n"
    )
    data = source.load(SegmentationDataConfig(root=str(tmp_path)), {**FACTS, "input_size": (3, 8, 8)})
    assert data.classes == ("wall", "b", "c")
    assert data.train[0][1][0].tolist() == [IGNORE, 0, 1, 2] * 2  # type: ignore[index]


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_image_and_mask_move_together(tmp_path: Path, augment: str) -> None:
    values = np.random.default_rng(0).integers(0, 3, (4, 4)).repeat(16, 0).repeat(16, 1)
    picture = np.stack([values * 100] * 3, 2).astype(np.uint8)
    for kind, name in (("images", picture), ("masks", values)):
        (tmp_path / "train" / kind).mkdir(parents=True)
        Image.fromarray(np.asarray(name, dtype=np.uint8)).save(tmp_path / "train" / kind / "0.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    config = SegmentationDataConfig(root=str(tmp_path), augment=augment, val_fraction=0.0)
    facts = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "nearest"}
    train: Any = source.load(config, facts).train
    seen = set()
    for epoch in range(12):
        train.set_epoch(epoch)
        x, y = train[0]
        shown = ((x[0] * 0.5 + 0.5) * 255 / 100).round().long()
        inside = y != IGNORE
        assert float((shown[inside] == y[inside]).float().mean()) > 0.98
        again = train[0]
        assert torch.equal(again[0], x) and torch.equal(again[1], y)
        seen.add(tuple(y.flatten().tolist()))
    assert len(seen) > 8
    assert train.target(0)[-1] == 0


def test_data_errors(tmp_path: Path) -> None:
    def load(**options: Any) -> Any:
        return source.load(SegmentationDataConfig(root=str(tmp_path), **options), FACTS)

    with pytest.raises(DataError, match="none of the segmentation layouts"):
        load()
    pairs(tmp_path)
    (tmp_path / "train" / "masks" / "2.png").rename(tmp_path / "train" / "masks" / "9.png")
    with pytest.raises(DataError, match="no partner"):
        load()
    (tmp_path / "train" / "masks" / "9.png").rename(tmp_path / "train" / "masks" / "2.png")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match="does not name its classes"):
        load()
    image(tmp_path / "train" / "masks" / "2.png")
    train = load(classes=CLASSES, val_fraction=0.0).train
    with pytest.raises(DataError, match="class indices"):
        train[2]
    mask(tmp_path / "train" / "masks" / "2.png", np.zeros((5, 5)))
    with pytest.raises(DataError, match="Make them equal"):
        load(classes=CLASSES, val_fraction=0.0).train[2]
    with pytest.raises(ConfigError, match="limit"):
        SegmentationDataConfig(shots=4)


def test_scenes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(4):
                image(tmp_path / "objects" / split / name / f"{i}.jpg", (16, 16), seed=i)
    out = write_scenes(tmp_path / "objects", tmp_path / "a", {"train": 3, "val": 2, "test": 2}, size=32, per_class=2)
    write_scenes(tmp_path / "objects", tmp_path / "b", {"train": 3, "val": 2, "test": 2}, size=32, per_class=2)
    assert (out / "classes.txt").read_text().split() == ["canvas", "cat", "dog"]
    for file in sorted(out.rglob("*.png")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(out)).read_bytes()
    values = np.asarray(Image.open(out / "train" / "masks" / "00000.png"))
    assert values.shape == (32, 32) and set(np.unique(values)) <= {0, 1, 2} and (values > 0).any()


# ---- models and runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["linear", "up"])
def test_models(decoder: str) -> None:
    options = {"decoder": decoder, "decoder_width": 16}
    model = backbones.build("micro-vit", 7, pretrained=True, checkpoint="", options=options)
    assert isinstance(model, Segmenter)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7, 32, 32)
    assert ps.plan(model, "linear").trainable == sum(p.numel() for p in model.decoder.parameters())
    assert backbones.preprocessing("micro-vit", model)["input_size"] == [3, 32, 32]
    anatomy = ps.anatomy_of(model)
    modules = dict(model.named_modules())
    assert all(b.point.path in modules and b.points["attn"].path in modules for b in anatomy.blocks)
    assert {b.name for b in backbones.list("micro*")} == {"micro-vit"}
    with pytest.raises(ConfigError, match="decoder"):
        backbones.build("micro-vit", 7, pretrained=False, checkpoint="", options={"decoder": "deep"})


def test_run_resume_and_evaluate(tmp_path: Path) -> None:
    values = {
        "plugin": PLUGIN,
        "task": "segmentation",
        "backbone": {"name": "micro-vit"},
        "data": {"root": str(pairs(tmp_path / "data", 9)), "augment": "light"},
        "method": "lora(rank=2)",
        "recipe": {"epochs": 2, "batch_size": 4, "lr": 0.01, "class_weights": "balanced"},
        "out": str(tmp_path / "run"),
        "device": "cpu",
    }
    result: Any = run(RunConfig.from_dict(values), progress=False)
    record = result.record
    assert record["metric"] == "miou" and set(record["final"]["val"]) >= {"miou", "pixel_accuracy", "loss"}
    assert len(record["confusion"]) == 3
    pictures = json.loads((tmp_path / "run" / "examples.json").read_text())["png"]
    assert pictures and all(pictures)
    assert result.report.read_text().count("data:image/png") >= len(pictures)

    from peft_suite.train import open_adapter

    opened = open_adapter(tmp_path / "run" / "adapter")
    assert opened.task == "segmentation" and isinstance(opened.model, Segmenter)
    data = source.load(
        SegmentationDataConfig.from_dict(opened.metadata["data_config"]), opened.metadata["preprocessing"]
    )
    assert data.task is not None and data.val is not None
    found = evaluate(opened.model, data.val, data.task, batch_size=2, device="cpu")
    assert found["metrics"]["miou"] == pytest.approx(record["final"]["val"]["miou"])


def test_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from peft_suite.cli.app import build

    def call(*words: str) -> Any:
        return CliRunner().invoke(build(), [PLUGIN, *words])

    root, out = str(pairs(tmp_path / "data")), str(tmp_path / "run")
    words = ["task=segmentation", "--backbone", "micro-vit", "--data", root, "--method", "linear"]
    done = call("train", *words, "--epochs", "1", "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    measured = call("eval", f"{out}/adapter", "--device", "cpu", "--json")
    assert measured.exit_code == 0 and "miou" in json.loads(measured.stdout)["metrics"]
    refused = call("predict", f"{out}/adapter", root)
    assert refused.exit_code != 0 and "--out FOLDER" in refused.output
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for name, size in (("a.png", (40, 30)), ("a.bmp", (20, 20)), ("more/b.png", (32, 32))):
        Image.new("RGB", size, "red").save(photos / name)
    masks = tmp_path / "masks"
    predicted = call("predict", f"{out}/adapter", str(photos), "--out", str(masks), "--device", "cpu", "--json")
    assert predicted.exit_code == 0, predicted.output
    rows = json.loads(predicted.stdout)
    assert json.loads((masks / "predictions.json").read_text()) == rows
    assert {str(p.relative_to(masks)) for p in masks.rglob("*.png")} == {"a.png.png", "a.bmp.png", "more/b.png"}
    for row in rows:
        assert Image.open(row["written"]).size == Image.open(row["file"]).size
        assert sum(row["classes"].values()) == pytest.approx(1, abs=1e-3)
    planned = call("plan", *words, "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["trainable"] == 64 * 3 + 3


def test_mixup_and_unknown_tasks_are_refused(tmp_path: Path) -> None:
    values = {
        "plugin": PLUGIN,
        "task": "segmentation",
        "backbone": {"name": "micro-vit"},
        "data": {"root": str(pairs(tmp_path / "data"))},
        "recipe": {"epochs": 1, "mixup": 0.2},
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(ConfigError, match="mix class labels"):
        run(RunConfig.from_dict(values), progress=False)
    with pytest.raises(UnknownNameError, match="segmentation"):
        run(RunConfig.from_dict({**values, "task": "segment"}), progress=False)
