"""The five fine-grained data sets of visual PEFT: CUB, NABirds, Oxford Flowers, Stanford Dogs, Stanford Cars.

``splits="tune"`` reads VPT's JSON files ``train.json``, ``val.json``, ``test.json`` (``{image path: class id}``) in the
folder of the data set; ``"final"`` trains on train and val together. ``"official"`` reads what the data sets
themselves say (SSF's protocol): index files for CUB and NABirds, MAT files for Dogs, and for Cars and Flowers the
folders ``train/CLASS`` and ``val/CLASS``, of which the latter is the *test* set. Class ids of any kind become
0..C-1 in sorted order.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError, MissingExtraError, UnknownNameError, closest

if TYPE_CHECKING:
    from peft_suite.vision.data import ImageDataConfig
    from peft_suite.vision.lists import Listing, Sample

__all__ = ["DATASETS", "FGVCSet", "check_fgvc", "find_set", "read_fgvc", "set_folder"]

_JSON = ("train", "val", "test")


@dataclass(frozen=True)
class FGVCSet:
    """One data set: classes, folder of the images, usual sizes of train, val, test, and folder names in use."""

    name: str
    classes: int
    images: str
    sizes: tuple[int, int, int]
    folders: tuple[str, ...]


_SETS = (
    FGVCSet("cub", 200, "images", (5_394, 600, 5_794), ("CUB_200_2011", "CUB", "cub200", "cub_200_2011")),
    FGVCSet("nabirds", 555, "images", (21_536, 2_393, 24_633), ("NABirds", "nabird")),
    FGVCSet(
        "flowers", 102, "", (1_020, 1_020, 6_149), ("OxfordFlower", "oxford_flowers", "OxfordFlowers", "flowers102")
    ),
    FGVCSet("dogs", 120, "Images", (10_800, 1_200, 8_580), ("Stanford-dogs", "stanford_dogs", "StanfordDogs")),
    FGVCSet("cars", 196, "", (7_329, 815, 8_041), ("Stanford-cars", "stanford_cars", "StanfordCars")),
)
DATASETS: Mapping[str, FGVCSet] = {one.name: one for one in _SETS}


def find_set(name: str) -> FGVCSet:
    """The data set of that name or folder name.

    Raises:
        UnknownNameError: with the closest names.
    """
    for one in _SETS:
        if name.lower() in (one.name, *(f.lower() for f in one.folders)):
            return one
    raise UnknownNameError("FGVC data set", name, DATASETS, "Set data.task, or give its folder as data.root.")


def set_folder(root: str, task: str) -> Path:
    """``root`` itself, or the data set's folder in it under any of its names."""
    path = Path(root)
    if not task:
        return path
    known = find_set(task)
    for name in (known.name, *known.folders):
        if (path / name).is_dir():
            return path / name
    return path


def check_fgvc(root: str, task: str, splits: str = "") -> str:
    """What is missing of a data set, in one sentence; "" when its lists are there."""
    known, folder = find_set(task), set_folder(root, task)
    if not folder.is_dir():
        return f"{str(folder)!r} does not exist."
    wanted = _official_files(known) if splits == "official" else tuple(f"{name}.json" for name in _JSON)
    lost = [name for name in wanted if not (folder / name).exists()]
    return f"{str(folder)!r} has no {', '.join(lost)}." if lost else ""


def read_fgvc(config: ImageDataConfig) -> Listing:
    """The splits of one data set.

    Raises:
        DataError: lists or images are missing, or there are more classes than the data set has.
        MissingExtraError: the Dogs' MAT files without scipy.
    """
    from peft_suite.vision.lists import Listing, Sample, some

    folder = set_folder(config.root, config.task)
    known = find_set(config.task or folder.resolve().name)
    if reason := check_fgvc(str(folder), known.name, config.splits):
        raise DataError(
            f"{reason} Expected VPT's train.json, val.json and test.json, or with data.splits=official "
            f"{', '.join(_official_files(known))}."
        )
    read = _read_official if config.splits == "official" else _read_json
    rows = read(folder, known)
    if config.splits == "final":
        rows = {"train": rows["train"] + rows["val"], "test": rows["test"]}
    ids = _ids(label for split in rows for _, label in rows[split] if split != "test")
    strange = sorted({str(label) for _, label in rows["test"]} - {str(i) for i in ids})
    if len(ids) > known.classes or strange:
        raise DataError(
            f"{str(folder)!r}: train has {len(ids)} classes and {known.name} has {known.classes}"
            + (f"; test has others: {some(strange)}." if strange else ".")
            + " Is this folder another data set? Set data.task."
        )
    _warn(known, config.splits or "tune", {split: len(part) for split, part in rows.items()}, len(ids))
    position = {label: index for index, label in enumerate(ids)}
    base = Path(config.image_root) if config.image_root else folder
    splits: dict[str, list[Sample]] = {}
    for split, part in rows.items():
        splits[split] = [Sample(name, (position[label],), str(base / name)) for name, label in part]
        lost = [s.path for s in splits[split] if not os.path.isfile(s.path)]
        if lost and not config.skip_bad:
            raise DataError(
                f"{len(lost)} of {len(part)} images of {known.name}'s {split} list do not exist: {some(lost, 3)}. "
                f"Paths are relative to {str(base / known.images)!r}."
            )
    classes = config.classes or tuple(str(label) for label in ids)
    return Listing(classes, splits, layout="fgvc", fixed=True, task=known.name)


_Rows = dict[str, list[tuple[str, Any]]]


def _read_json(folder: Path, known: FGVCSet) -> _Rows:
    rows: _Rows = {}
    for name in _JSON:
        file = folder / f"{name}.json"
        try:
            values = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{str(file)!r} cannot be read: {error}.") from error
        if not isinstance(values, dict) or not all(isinstance(v, int | str) for v in values.values()) or not values:
            raise DataError(f"{str(file)!r}: expected one object {{image path: class id}}.")
        rows[name] = [(os.path.join(known.images, path), label) for path, label in values.items()]
    return rows


def _official_files(known: FGVCSet) -> tuple[str, ...]:
    return {
        "cub": ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
        "nabirds": ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
        "dogs": ("train_list.mat", "test_list.mat"),
    }.get(known.name, ("train", "val"))


def _read_official(folder: Path, known: FGVCSet) -> _Rows:
    if known.name in ("cub", "nabirds"):
        paths, labels, training = (_index(folder / name) for name in _official_files(known))
        rows: _Rows = {"train": [], "test": []}
        for key, path in paths.items():
            if key not in labels or training.get(key) not in ("0", "1"):
                raise DataError(f"{str(folder)!r}: image {key} has no class, or no 0 or 1 in train_test_split.txt.")
            split = "train" if training[key] == "1" else "test"
            rows[split].append((os.path.join(known.images, path), int(labels[key])))
        return rows
    if known.name == "dogs":
        return {name: _mat(folder / f"{name}_list.mat", known.images) for name in ("train", "test")}
    from torchvision.datasets.folder import make_dataset

    from peft_suite.vision.lists import EXTENSIONS

    rows = {}
    for split, name in (("train", "train"), ("test", "val")):
        names = sorted(p.name for p in (folder / name).iterdir() if p.is_dir())
        found = make_dataset(folder / name, {c: i for i, c in enumerate(names)}, EXTENSIONS, allow_empty=True)
        rows[split] = [(os.path.relpath(path, folder), names[i]) for path, i in found]
        if not found:
            raise DataError(f"{str(folder / name)!r} holds no {name}/CLASS/image.jpg.")
    return rows


def _index(file: Path) -> dict[str, str]:
    """Lines ``id value``."""
    pairs = [line.split(None, 1) for line in file.read_text("utf-8").splitlines() if line.strip()]
    if bad := next((n for n, pair in enumerate(pairs, 1) if len(pair) != 2), 0):
        raise DataError(f"{str(file)!r}, entry {bad}: expected 'id value'.")
    return {key: value.strip() for key, value in pairs}


def _mat(file: Path, images: str) -> list[tuple[str, Any]]:
    """``file_list`` and ``labels`` of a MAT 5 file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError(
            "The official lists of Stanford Dogs are MAT files and need scipy. Run: pip install scipy"
        ) from error
    try:
        values = loadmat(file)
        names = [str(entry.item() if hasattr(entry, "item") else entry) for entry in values["file_list"].ravel()]
        labels = [int(v) for v in values["labels"].ravel()]
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"{str(file)!r} has no file_list and labels of equal length: {error}.") from error
    return [(os.path.join(images, name), label) for name, label in zip(names, labels, strict=True)]


def _ids(labels: Iterable[Any]) -> Sequence[Any]:
    found = set(labels)
    numbers = all(isinstance(label, int) for label in found)
    return sorted(found) if numbers else sorted(found, key=str)


def _warn(known: FGVCSet, splits: str, sizes: Mapping[str, int], classes: int) -> None:
    train, val, test = known.sizes
    usual = {"train": train, "val": val, "test": test} if splits == "tune" else {"train": train + val, "test": test}
    wrong = [f"{split} {sizes[split]:,} instead of {n:,}" for split, n in usual.items() if sizes[split] != n]
    if classes != known.classes:
        wrong.append(f"{classes} classes instead of {known.classes}")
    if wrong:
        warnings.warn(
            f"FGVC {known.name}: {', '.join(wrong)}. Results may not compare with published ones. "
            f"{closest(known.name, DATASETS) if classes != known.classes else ''}".rstrip(),
            stacklevel=3,
        )
