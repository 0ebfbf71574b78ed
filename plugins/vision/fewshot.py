"""Few-shot fine-grained classification with NOAH's lists: 1, 2, 4, 8 or 16 images per class, three draws each.

``FOLDER/annotations/train_meta.list.num_shot_{shots}.seed_{split_seed}`` trains, ``val_meta.list`` validates and
``test_meta.list`` tests; lines are ``<path> <label>``, relative to ``FOLDER/images`` (Stanford Cars: to FOLDER).
``data.shots`` and ``data.split_seed`` choose the list, so nothing is drawn here.

Source: Zhang et al., "Neural Prompt Search" (arXiv 2206.04673).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    from peft_suite.vision.data import ImageDataConfig
    from peft_suite.vision.lists import Listing, Sample

__all__ = [
    "DATASETS",
    "SEEDS",
    "SHOTS",
    "FewShotSet",
    "check_few_shot",
    "few_shot_folder",
    "find_few_shot",
    "read_few_shot",
]

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class FewShotSet:
    """One data set: classes, folder of the images, folder names in use."""

    name: str
    classes: int
    images: str
    folders: tuple[str, ...]


_SETS = (
    FewShotSet("food101", 101, "images", ("food-101",)),
    FewShotSet("stanford_cars", 196, "", ("stanford-cars", "cars")),
    FewShotSet("oxford_flowers", 102, "images", ("oxford-flowers102", "oxford_flowers102", "flowers")),
    FewShotSet("fgvc_aircraft", 100, "images", ("fgvc-aircraft", "aircraft")),
    FewShotSet("oxford_pets", 37, "images", ("oxford-pets", "pets")),
)
DATASETS: Mapping[str, FewShotSet] = {one.name: one for one in _SETS}


def find_few_shot(name: str) -> FewShotSet:
    """The data set of that name or folder name.

    Raises:
        UnknownNameError: with the closest names.
    """
    for one in _SETS:
        if name.lower() in (one.name, *one.folders):
            return one
    raise UnknownNameError("few-shot data set", name, DATASETS, "Set data.task, or give its folder as data.root.")


def few_shot_folder(root: str, task: str) -> Path:
    """``root`` itself, or the data set's folder in it under any of its names."""
    path = Path(root)
    if task:
        known = find_few_shot(task)
        for name in (known.name, *known.folders):
            if (path / name).is_dir():
                return path / name
    return path


def check_few_shot(root: str, task: str, shots: int, seed: int = 0) -> str:
    """What is missing of a data set, in one sentence; "" when the three lists are there."""
    folder = few_shot_folder(root, task) / "annotations"
    lost = [name for name in _lists(shots, seed).values() if not (folder / name).is_file()]
    return f"{str(folder)!r} has no {', '.join(lost)}." if lost else ""


def read_few_shot(config: ImageDataConfig) -> Listing:
    """Train, validation and test of one draw.

    Raises:
        DataError: no list for that many shots and that seed, images missing, labels out of range.
    """
    from peft_suite.vision.lists import Listing

    folder = few_shot_folder(config.root, config.task)
    known = find_few_shot(config.task or folder.resolve().name)
    lists = _lists(config.shots, config.split_seed)
    if not config.shots or (reason := check_few_shot(str(folder), known.name, config.shots, config.split_seed)):
        have = _available(folder)
        raise DataError(
            (reason if config.shots else "data.shots = 0: a few-shot task needs a number of images per class.")
            + (f" There is (shots, seed): {', '.join(map(str, have))}." if have else f" {_expected(folder)}")
            + " Set data.shots and data.split_seed."
        )
    base = Path(config.image_root) if config.image_root else folder / known.images
    splits = {
        split: _read(folder / "annotations" / name, base, known, config.skip_bad) for split, name in lists.items()
    }
    classes = config.classes or tuple(str(i) for i in range(known.classes))
    return Listing(classes, splits, layout="few-shot", fixed=True, task=known.name)


def _lists(shots: int, seed: int) -> dict[str, str]:
    return {
        "train": f"train_meta.list.num_shot_{shots}.seed_{seed}",
        "val": "val_meta.list",
        "test": "test_meta.list",
    }


def _available(folder: Path) -> list[tuple[int, int]]:
    names = os.listdir(folder / "annotations") if (folder / "annotations").is_dir() else []
    found = (re.fullmatch(r"train_meta\.list\.num_shot_(\d+)\.seed_(\d+)", name) for name in names)
    return sorted((int(m[1]), int(m[2])) for m in found if m)


def _expected(folder: Path) -> str:
    return f"Expected {folder / 'annotations'}/{{{','.join(_lists(1, 0).values())}}}."


def _read(file: Path, base: Path, known: FewShotSet, skip_bad: bool) -> list[Sample]:
    from peft_suite.vision.lists import Sample, some

    samples = []
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        words = line.rsplit(None, 1)  # Stanford Cars and Aircraft have spaces in their paths
        if not words:
            continue
        if len(words) != 2 or not words[1].isdecimal():
            raise DataError(f"{str(file)!r}, line {number}: expected '<path> <label>', found {line.strip()!r}.")
        if int(words[1]) >= known.classes:
            raise DataError(
                f"{str(file)!r}, line {number}: label {words[1]} is out of range, {known.name} has the classes 0 to "
                f"{known.classes - 1}."
            )
        name = words[0].strip()
        samples.append(Sample(name, (int(words[1]),), str(base / name)))
    lost = [s.path for s in samples if not os.path.isfile(s.path)]
    if lost and not skip_bad:
        raise DataError(
            f"{len(lost)} of {len(samples)} images of {file.name} do not exist: {some(lost, 3)}. Paths are relative to "
            f"{str(base)!r}; set image_root for another folder."
        )
    return samples
