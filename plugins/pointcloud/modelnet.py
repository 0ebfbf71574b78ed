"""ModelNet40 and ModelNet10 in the three layouts in which they are published.

- ``txt``: ``modelnet40_shape_names.txt`` (class = line), ``modelnet40_{train,test}.txt`` (ids such as
  ``night_stand_0001``, whose class is what stands before the last ``_``), ``CLASS/ID.txt`` with 10,000 lines of x, y, z
  and normal.
- ``dat``: pickles ``modelnet40_{train,test}_8192pts_fps.dat`` of two lists: points ``[8192, 6]`` and labels ``[1]``.
  Read without running anything that they hold, see :mod:`peft_suite.pointcloud.pickles`.
- ``hdf5``: ``ply_data_{train0...,test0...}.h5`` with 2048 points each.

ROOT is the folder of these files or the one above. ``variant``: "40" or "10", with "-txt", "-dat" or "-hdf5" to insist
on a layout; "" takes what is there, .dat first (8192 farthest points are all that a network is shown anyway).

Source: Wu et al., CVPR 2015; the resampled version by Qi et al., NeurIPS 2017.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_suite.errors import DataError, UnknownNameError, closest
from peft_suite.pointcloud.formats import Cloud, table
from peft_suite.pointcloud.listing import Listing, Sample, named, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["NAMES", "classes", "read_modelnet"]

VARIANTS = ("", *(f"{n}{kind}" for n in ("40", "10") for kind in ("", "-txt", "-dat", "-hdf5")))
SIZES = {"40": {"train": 9843, "test": 2468}, "10": {"train": 3991, "test": 908}}
NAMES: dict[str, tuple[str, ...]] = {
    "40": (
        "airplane",
        "bathtub",
        "bed",
        "bench",
        "bookshelf",
        "bottle",
        "bowl",
        "car",
        "chair",
        "cone",
        "cup",
        "curtain",
        "desk",
        "door",
        "dresser",
        "flower_pot",
        "glass_box",
        "guitar",
        "keyboard",
        "lamp",
        "laptop",
        "mantel",
        "monitor",
        "night_stand",
        "person",
        "piano",
        "plant",
        "radio",
        "range_hood",
        "sink",
        "sofa",
        "stairs",
        "stool",
        "table",
        "tent",
        "toilet",
        "tv_stand",
        "vase",
        "wardrobe",
        "xbox",
    ),
    "10": ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet"),
}
_FOLDERS = ("", "modelnet{n}_normal_resampled", "modelnet{n}_ply_hdf5_2048", "ModelNet/modelnet{n}_normal_resampled")


class _Pickled:
    """Points of one pickled split, opened when its length is needed."""

    def __init__(self, file: Path) -> None:
        from peft_suite.pointcloud.pickles import load_numbers

        value = load_numbers(file)
        if not (isinstance(value, list | tuple) and len(value) == 2 and len(value[0]) == len(value[1])):
            raise DataError(f"{str(file)!r} does not hold a list of clouds and a list of as many labels.")
        self.points: list[Any] = list(value[0])
        self.labels = [int(np.asarray(label).reshape(-1)[0]) for label in value[1]]

    def __call__(self, sample: Sample) -> Cloud:
        return table(np.asarray(self.points[sample.row]))


def classes(config: PointDataConfig) -> tuple[str, ...]:
    """The names of shape_names.txt, or the usual ones; no cloud is read."""
    number, _, folder = _find(config)
    return named(config, _names(folder, number), f"ModelNet{number}")


def read_modelnet(config: PointDataConfig) -> Listing:
    """Train and test.

    Raises:
        DataError: files are missing or damaged, ids of no known class, labels out of range.
    """
    number, kind, folder = _find(config)
    names = _names(folder, number)
    reader = {"txt": _txt, "dat": _dat, "hdf5": _hdf5}[kind]
    listing = reader(folder, number, names)
    listing.classes = named(config, names, f"ModelNet{number}")
    listing.notes["variant"] = f"{number}-{kind}"
    wrong = [
        f"{split} {len(listing.splits[split]):,} instead of {n:,}"
        for split, n in SIZES[number].items()
        if kind != "hdf5" and len(listing.splits[split]) != n
    ]
    if wrong:
        warnings.warn(
            f"ModelNet{number}: {', '.join(wrong)}. Results may not compare with published ones.", stacklevel=3
        )
    return listing


def _find(config: PointDataConfig) -> tuple[str, str, Path]:
    """("40" or "10", layout, folder)."""
    if config.variant not in VARIANTS:
        raise UnknownNameError("ModelNet variant", config.variant, VARIANTS[1:], "Set data.variant.")
    number, _, kind = config.variant.partition("-")
    root = Path(config.root)
    for n in (number,) if number else ("40", "10"):
        for sub in _FOLDERS:
            folder = root / sub.format(n=n)
            for k in (kind,) if kind else ("dat", "txt", "hdf5"):
                if folder.is_dir() and _has(folder, n, k):
                    return n, k, folder
    inside = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else []
    n = number or "40"
    raise DataError(
        f"{config.root!r} has no ModelNet{n}{f' as {kind}' if kind else ''}: expected "
        f"modelnet{n}_{{train,test}}_8192pts_fps.dat, modelnet{n}_{{shape_names,train,test}}.txt with CLASS/ID.txt, or "
        f"ply_data_train0.h5. There is: {', '.join(inside) or 'nothing'}."
    )


def _has(folder: Path, number: str, kind: str) -> bool:
    if kind == "txt":
        lists = [folder / f"modelnet{number}_{split}.txt" for split in ("train", "test")]
        first = next((line.strip() for p in lists if p.is_file() for line in p.open() if line.strip()), "")
        return all(p.is_file() for p in lists) and (not first or (folder / first.rpartition("_")[0]).is_dir())
    if kind == "dat":
        return all(_dat_file(folder, number, split) for split in ("train", "test"))
    return number == "40" and any(folder.glob("ply_data_train*.h5"))


def _names(folder: Path, number: str) -> tuple[str, ...]:
    file = folder / f"modelnet{number}_shape_names.txt"
    file = file if file.is_file() else folder / "shape_names.txt"
    return tuple(file.read_text("utf-8-sig").split()) if file.is_file() else NAMES[number]


def _txt(folder: Path, number: str, names: tuple[str, ...]) -> Listing:
    position = {name: i for i, name in enumerate(names)}
    splits: dict[str, list[Sample]] = {}
    for split in ("train", "test"):
        file = folder / f"modelnet{number}_{split}.txt"
        splits[split] = []
        for line, key in enumerate(file.read_text("utf-8-sig").split(), 1):
            name = key.rpartition("_")[0]
            if name not in position:
                raise DataError(f"{str(file)!r}, line {line}: {key!r} is of no known class. {closest(name, names)}")
            splits[split].append(Sample(f"{name}/{key}", position[name], str(folder / name / f"{key}.txt")))
        lost = [s.path for s in splits[split] if not Path(s.path).is_file()]
        if lost:
            raise DataError(f"{len(lost)} of {len(splits[split])} clouds of {file.name} do not exist: {some(lost, 3)}.")
    return Listing(names, splits, layout="modelnet")


def _dat_file(folder: Path, number: str, split: str) -> Path | None:
    """The pickle with 8192 points, else the one with most."""
    found = {}
    for file in folder.glob(f"modelnet{number}_{split}_*pts_fps.dat"):
        if match := re.fullmatch(rf"modelnet{number}_{split}_(\d+)pts_fps\.dat", file.name):
            found[int(match[1])] = file
    return found.get(8192) or (found[max(found)] if found else None)


def _dat(folder: Path, number: str, names: tuple[str, ...]) -> Listing:
    listing = Listing(names, {}, layout="modelnet")
    for split in ("train", "test"):
        file = _dat_file(folder, number, split)
        assert file is not None
        reader = _Pickled(file)
        if bad := [v for v in reader.labels if not 0 <= v < len(names)]:
            raise DataError(f"{str(file)!r}: label {bad[0]} is out of range, there are {len(names)} classes.")
        listing.readers[split] = reader
        listing.splits[split] = [Sample(f"{file.name}[{i}]", v, str(file), i) for i, v in enumerate(reader.labels)]
    return listing


def _hdf5(folder: Path, number: str, names: tuple[str, ...]) -> Listing:
    from peft_suite.pointcloud.hdf5 import ArrayReader, list_arrays

    files = {split: sorted(str(p) for p in folder.glob(f"ply_data_{split}*.h5")) for split in ("train", "test")}
    if not files["test"]:
        raise DataError(f"{str(folder)!r} has no ply_data_test*.h5.")
    splits = list_arrays(files, folder, "data", "label")
    if most := max((s.label for part in splits.values() for s in part if s.label >= len(names)), default=0):
        raise DataError(f"{str(folder)!r}: label {most} is out of range, there are {len(names)} classes.")
    return Listing(names, splits, layout="modelnet", readers=dict.fromkeys(splits, ArrayReader("data")))
