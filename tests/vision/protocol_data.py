"""Tiny trees in the layouts of the protocols: coloured noise, so that a small model can learn them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def image(path: Path, label: int, number: int, size: tuple[int, int] = (32, 32)) -> None:
    """A noisy plain picture whose colour tells the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(label).integers(30, 226, 3)
    noise = np.random.default_rng([label, number]).integers(-25, 26, (size[1], size[0], 3))
    Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(path)


def vtab_task(root: Path, task: str, classes: int, folder: str = "", test: int = 2) -> Path:
    """One VTAB task with 2 (train800), 1 (val200) and ``test`` images per class."""
    place = root / (folder or task)
    lists: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
    for name, each in (("train800", 2), ("val200", 1), ("test", test)):
        for label in range(classes):
            for i in range(each):
                file = f"images/{name}/{label:03d}{i:03d}.jpg"
                image(place / file, label, i + 100 * len(name))
                lists[name].append(f"{file} {label}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (place / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return place


def fgvc_json(place: Path, images: str, ids: list[int | str]) -> Path:
    """VPT's three JSON files with images."""
    for split, each in (("train", 2), ("val", 1), ("test", 1)):
        rows = {}
        for label, key in enumerate(ids):
            for i in range(each):
                name = f"{key}/{split}{i}.jpg"
                image(place / images / name, label, i, (40, 32))
                rows[name] = key
        (place / f"{split}.json").write_text(json.dumps(rows))
    return place


def few_shot(place: Path, images: str, classes: int, shots: int = 1, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """NOAH's lists with images."""

    def write(name: str, each: int) -> None:
        lines = []
        for label in range(classes):
            for i in range(each):
                file = f"class {label}/{name[:5]}{name[-1]}{i}.jpg"
                image(place / images / file, label, i)
                lines.append(f"{file} {label}")
        target = place / "annotations" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines) + "\n")

    for seed in seeds:
        write(f"train_meta.list.num_shot_{shots}.seed_{seed}", shots)
    write("val_meta.list", 1)
    write("test_meta.list", 1)
    return place


def cifar_binary(place: Path, hundred: bool, each: int = 2) -> Path:
    """The binary version with ``each`` images per file."""
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = ("train.bin", "test.bin") if hundred else (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
    classes = 100 if hundred else 10
    count = classes * each
    for name in names:
        records = b""
        for i in range(count):
            label = i % classes
            head = bytes([label // 5, label]) if hundred else bytes([label])
            records += head + rng.integers(0, 256, 3072, dtype=np.uint8).tobytes()
        (place / name).write_bytes(records)
    return place
