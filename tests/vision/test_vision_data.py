"""Image data of every layout, made by the tests, and every way in which it can be wrong."""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.vision import images as image_module
from peft_suite.vision.data import ImageDataConfig, source
from peft_suite.vision.transforms import Preprocess, to_rgb

PREPROCESSING = {
    "input_size": [3, 16, 16],
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "interpolation": "bilinear",
    "crop_pct": 0.9,
}


def picture(path: Path, value: int = 0, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(root: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    for c, (name, count) in enumerate(classes.items()):
        for i in range(count):
            picture(root / name / f"{i:03d}{suffix}", 1000 * c + i)
    return root


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def load(root: Path | str, **fields: Any) -> Any:
    return source.load(ImageDataConfig(root=str(root), **fields), PREPROCESSING)


def names(dataset: Any) -> list[str]:
    return [sample.name for sample in dataset.samples]


def test_folder_without_splits_is_split_per_class_by_seed(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 10, "dog": 5})
    splits = load(tmp_path)
    assert splits.classes == ("cat", "dog") and splits.test is None
    assert splits.info["counts"] == {"train": {"cat": 8, "dog": 4}, "val": {"cat": 2, "dog": 1}}
    assert not set(names(splits.train)) & set(names(splits.val))
    image, label = splits.train[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and label == 0
    assert names(load(tmp_path).val) == names(splits.val)
    assert any(names(load(tmp_path, split_seed=s).val) != names(splits.val) for s in range(1, 5))
    assert load(tmp_path, val_fraction=0.0).val is None
    third = load(tmp_path, test_fraction=0.2)
    assert third.info["sizes"] == {"train": 9, "test": 3, "val": 3}


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    for part, count in (("train", 4), (val, 2), ("test", 3)):
        folder(tmp_path / part, {"a": count, "b": count})
    splits = load(tmp_path)
    assert splits.info["sizes"] == {"train": 8, "val": 4, "test": 6}
    assert splits.sample_name(splits.test, 0) == "test/a/000.png"
    assert Image.open(io.BytesIO(splits.thumbnail(splits.test, 0))).size == (20, 24)
    assert source.classes(ImageDataConfig(root=str(tmp_path))) == (("a", "b"), False)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    picture(tmp_path / "a" / "000.png", 7, (40, 40))
    assert load(tmp_path).fingerprint != first


def test_few_shot_draws_by_seed(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 12, "b": 12})
    drawn = [names(load(tmp_path, shots=3, split_seed=0).train) for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6
    assert {tuple(names(load(tmp_path, shots=3, split_seed=s).train)) for s in range(4)} != {tuple(drawn[0])}
    assert load(tmp_path, eval_shots=1).info["sizes"] == {"train": 20, "val": 2}


def test_csv_with_split_column_and_default_columns(tmp_path: Path) -> None:
    folder(tmp_path / "images", {"a": 3, "b": 3})
    rows = [
        {"file": f"images/{c}/{i:03d}.png", "label": c, "split": ("train", "valid", "test")[i]}
        for c in "ab"
        for i in range(3)
    ]
    splits = load(table(tmp_path / "all.csv", rows))
    assert splits.info["sizes"] == {"train": 2, "val": 2, "test": 2} and splits.classes == ("a", "b")
    assert not splits.multi_label
    rows[0]["split"] = "trian"
    with pytest.raises(DataError, match="Did you mean 'train'"):
        load(table(tmp_path / "all.csv", rows))


def test_lists_per_split_with_named_columns_and_numbers(tmp_path: Path) -> None:
    folder(tmp_path / "pics", {"x": 12})
    for split, span in (("train", range(11)), ("val", range(2))):
        table(tmp_path / f"{split}.csv", [{"img_path": f"x/{i:03d}.png", "id": i} for i in span])
    fields = {"file_column": "img_path", "label_column": "id", "image_root": str(tmp_path / "pics")}
    assert load(tmp_path, **fields).classes == tuple(str(i) for i in range(11))
    with pytest.raises(DataError, match=r"out of range.*10"):
        load(tmp_path, num_classes=10, **fields)
    with pytest.raises(DataError, match="Set label_column"):
        load(tmp_path, **{**fields, "label_column": "idd"})
    table(tmp_path / "val.csv", [{"img_path": "x/000.png", "id": 99}])
    with pytest.raises(DataError, match="Classes in val that train does not have: 99"):
        load(tmp_path, **fields)


@pytest.mark.parametrize(
    "write",
    [
        lambda p, rows: (p / "d.json", json.dumps(rows)),
        lambda p, rows: (p / "d.json", json.dumps({r["file"]: r["label"] for r in rows})),
        lambda p, rows: (p / "d.jsonl", "\n".join(map(json.dumps, rows))),
        lambda p, rows: (p / "d.txt", "\n".join(f"{r['file']} {r['label']}" for r in rows)),
        lambda p, rows: (p / "d.tsv", "file\tlabel\n" + "\n".join(f"{r['file']}\t{r['label']}" for r in rows)),
    ],
)
def test_list_formats(tmp_path: Path, write: Callable[..., tuple[Path, str]]) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    path, text = write(
        tmp_path, [{"file": f"{c}/{i:03d}.png", "label": n} for n, c in enumerate("ab") for i in range(4)]
    )
    path.write_text(text)
    splits = load(path)
    assert splits.classes == ("0", "1") and splits.info["sizes"] == {"train": 6, "val": 2}


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_multi_label(tmp_path: Path, kind: str) -> None:
    folder(tmp_path, {"x": 8})
    labels = [["red"], ["red", "big"], ["big"], ["old", "red"], [], ["old"], ["big", "old"], ["red"]]
    if kind == "csv":
        rows = [{"file": f"x/{i:03d}.png", "labels": "|".join(v)} for i, v in enumerate(labels)]
        splits = load(table(tmp_path / "l.csv", rows), label_separator="|", val_fraction=0.0)
    else:
        path = tmp_path / "l.json"
        path.write_text(json.dumps([{"file": f"x/{i:03d}.png", "labels": v} for i, v in enumerate(labels)]))
        splits = load(path, val_fraction=0.0)
    assert splits.multi_label and splits.classes == ("big", "old", "red")
    targets = torch.stack([splits.train[i][1] for i in range(8)])
    assert targets[1].tolist() == [1, 0, 1] and targets[4].sum() == 0 and targets.dtype == torch.float32


def test_huggingface_directory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)) for _ in range(10)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    part = datasets.Dataset.from_dict({"img": images, "label": [0, 1] * 5}, features=features)
    datasets.DatasetDict({"train": part, "test": part.select(range(4))}).save_to_disk(tmp_path / "hf")
    splits = load(tmp_path / "hf")
    assert splits.classes == ("no", "yes") and splits.info["sizes"] == {"train": 8, "test": 4, "val": 2}
    assert splits.train[0][0].shape == (3, 16, 16)
    with pytest.raises(DataError, match="Set label_column"):
        load(tmp_path / "hf", label_column="lable")
    part.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one", augment="light").info["sizes"] == {"train": 8, "val": 2}


def test_missing_and_empty_roots(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        load("")
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match="Did you mean 'flowers'"):
        load(tmp_path / "flower")
    with pytest.raises(DataError, match="no sub-folder"):
        load(tmp_path / "flowers")
    (tmp_path / "flowers" / "rose").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load(tmp_path / "flowers")
    with pytest.raises(UnknownNameError, match="'folder'"):
        load(tmp_path, format="foldr")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="not a list"):
        load(tmp_path / "notes.md")


def test_class_without_image(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"no training image.*: c"):
        load(tmp_path)
    assert load(tmp_path, allow_empty=True).classes == ("a", "b", "c")


def test_val_class_that_train_does_not_have(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a": 2, "b": 2})
    folder(tmp_path / "val", {"a": 2, "zebra": 1})
    with pytest.raises(DataError, match="Classes in val that train does not have: zebra"):
        load(tmp_path)


def test_corrupt_images_are_named_or_skipped(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 6, "b": 6}, ".jpg")
    (tmp_path / "a" / "002.jpg").write_bytes(b"this is no image")
    whole = (tmp_path / "b" / "004.jpg").read_bytes()
    (tmp_path / "b" / "004.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a/002\.jpg.*skip-bad"):
        load(tmp_path, val_fraction=0.0)
    with pytest.raises(DataError, match=r"b/004\.jpg"):
        load(tmp_path, val_fraction=0.0)
    splits = load(tmp_path, skip_bad=True, val_fraction=0.0)
    assert splits.info["skipped"] == 2 and splits.info["sizes"] == {"train": 10}
    assert {entry["name"] for entry in splits.info["skipped_files"]} == {"a/002.jpg", "b/004.jpg"}
    assert [splits.train.samples[i].labels[0] for i in range(10)] == [0] * 5 + [1] * 5
    assert load(tmp_path, skip_bad=True, shots=5, val_fraction=0.0).info["counts"]["train"] == {"a": 5, "b": 5}


def test_class_lost_by_skipping(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "b" / "000.png").write_bytes(b"")
    with pytest.raises(DataError, match="no training image is left of: b"):
        load(tmp_path, skip_bad=True, val_fraction=0.0)


def test_broken_lists(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2})
    rows = [{"file": "a/000.png", "label": "x"}, {"file": "a/777.png", "label": "y"}]
    path = table(tmp_path / "l.csv", rows)
    with pytest.raises(DataError, match=r"1 of 2 files.*a/777\.png"):
        load(path)
    with pytest.raises(DataError, match="no training image is left of: y"):
        load(path, skip_bad=True)
    table(path, [{"file": "a/000.png", "lbl": "x"}])
    with pytest.raises(DataError, match="Did you mean 'lbl'"):
        load(path)
    (tmp_path / "l.json").write_text('[{"file": "a/000.png"')
    with pytest.raises(DataError, match="cannot be read as JSON"):
        load(tmp_path / "l.json")
    (tmp_path / "l.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="objects"):
        load(tmp_path / "l.json")
    table(path, [{"file": "a/000.png", "label": "-1"}, {"file": "a/001.png", "label": "0"}])
    with pytest.raises(DataError, match=r"Label -1.*out of range"):
        load(path)
    table(path, [{"file": "a/000.png", "label": ""}])
    with pytest.raises(DataError, match="neither a name nor a number"):
        load(path)
    table(path, [{"file": "a/000.png", "label": "cat"}])
    with pytest.raises(DataError, match="not in the field classes: cat"):
        load(path, classes=("dog", "bird"))


def test_config_is_checked() -> None:
    for fields in (
        {"augment": "heavy"},
        {"mean": (0.5,)},
        {"std": (0.0, 1.0, 1.0)},
        {"hflip": 2.0},
        {"eval_shots": -1},
    ):
        with pytest.raises(ConfigError):
            ImageDataConfig(root="x", **fields)  # type: ignore[arg-type]
    config = ImageDataConfig(root="x", classes=("a", "b"), mean=(0.1, 0.2, 0.3))
    assert ImageDataConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="augment"):
        ImageDataConfig.from_dict({"root": "x", "augmnt": "light"})


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path: Path, augment: str) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    train, val = (lambda s: (s.train, s.val))(load(tmp_path, augment=augment))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = train[0][0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert torch.equal(first, train[0][0])
    train.set_epoch(1)
    assert not torch.equal(first, train[0][0])
    train.set_epoch(0)
    assert torch.equal(first, train[0][0])
    before = val[0][0]
    val.set_epoch(5)
    assert torch.equal(before, val[0][0])
    assert torch.equal(pickle.loads(pickle.dumps(train.samples[0])).labels[0] * first, 0 * first)


def test_epoch_reaches_persistent_workers(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    train = load(tmp_path, augment="light").train
    loader = DataLoader(train, 4, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        train.set_epoch(epoch)
        assert torch.equal(next(iter(loader))[0], torch.stack([train[i][0] for i in range(4)]))


def test_preprocessing_rules() -> None:
    wide = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3))
    crop, squash = (Preprocess.from_dict({**PREPROCESSING, "resize": mode}) for mode in ("crop", "squash"))
    assert crop.fit(wide).size == squash.fit(wide).size == (16, 16)
    assert Preprocess.from_dict(json.loads(json.dumps(squash.to_dict()))) == squash
    black = crop.tensor(Image.new("RGB", (16, 16)))
    assert torch.equal(black, torch.full((3, 16, 16), -2.0))
    from timm.data import create_transform

    reference = create_transform(
        (3, 16, 16), interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=0.9, crop_mode="center"
    )
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    torch.testing.assert_close(crop.tensor(crop.fit(square)), reference(square), atol=1e-5, rtol=0)
    for wrong in ({"input_size": [1, 8, 8]}, {"mean": [0.5]}, {"interpolation": "cubist"}):
        with pytest.raises(DataError):
            Preprocess.from_dict({**PREPROCESSING, **wrong})


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = np.full((4, 4), 128, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    if mode != "1":
        assert abs(int(np.asarray(rgb)[0, 0, 0]) - 128) <= 1


def test_mean_and_std_override_is_recorded(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2, "b": 2})
    splits = load(tmp_path, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize="squash")
    assert splits.info["preprocessing"]["mean"] == [0.0] * 3 and splits.info["preprocessing"]["resize"] == "squash"
    listed, images = source.inputs([str(tmp_path / "a" / "000.png")], splits.info["preprocessing"])
    index = names(splits.train).index("a/000.png") if "a/000.png" in names(splits.train) else None
    dataset = splits.train if index is not None else splits.val
    assert torch.equal(images[0], dataset[names(dataset).index("a/000.png")][0]) and len(listed) == 1


def test_large_data_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    cached = load(tmp_path)
    monkeypatch.setattr(image_module, "CACHE_BYTES", 3000)
    lazy = load(tmp_path)
    assert cached.info["in_memory"] == ["train", "val"]
    assert "train" not in lazy.info["in_memory"]
    assert torch.equal(cached.train[0][0], lazy.train[0][0])
    (tmp_path / lazy.train.samples[0].name).unlink()
    with pytest.raises(DataError, match="became unreadable"):
        lazy.train[0]


def test_inputs_for_predict(tmp_path: Path) -> None:
    folder(tmp_path / "deep", {"b": 2, "a": 1})
    (tmp_path / "deep" / "readme.txt").write_text("x")
    picture(tmp_path / "one.png", 5, mode="L")
    files, images = source.inputs([str(tmp_path / "one.png"), str(tmp_path / "deep")], PREPROCESSING)
    assert [Path(f).relative_to(tmp_path).as_posix() for f in files] == [
        "one.png",
        "deep/a/000.png",
        "deep/b/000.png",
        "deep/b/001.png",
    ]
    assert len(images) == 4 and images[0].shape == (3, 16, 16) and images.ignored == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No image"):
        source.inputs([str(tmp_path / "empty")], PREPROCESSING)
    with pytest.raises(DataError, match="does not exist"):
        source.inputs([str(tmp_path / "nowhere")], PREPROCESSING)
    with pytest.raises(DataError, match=r"readme\.txt"):
        source.inputs([str(tmp_path / "deep" / "readme.txt")], PREPROCESSING)


def test_plugin_imports_neither_torch_nor_timm() -> None:
    import subprocess
    import sys

    code = "import sys, peft_suite.vision; sys.exit(bool({'torch', 'timm', 'torchvision', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
