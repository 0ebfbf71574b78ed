"""Where the clouds are: which layout a folder has, and every sample of every split. No cloud is read here."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError, UnknownNameError, closest
from peft_suite.pointcloud.formats import EXTENSIONS, MESHES, Cloud
from peft_suite.train.folders import VAL_NAMES, check_known, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = [
    "FORMATS",
    "VAL_NAMES",
    "Listing",
    "Sample",
    "check_known",
    "detect_format",
    "layout_classes",
    "read_layout",
    "some",
]

_AT = "peft_suite.pointcloud"
READERS: Mapping[str, str] = {  # layout -> "module:reader"; a module may have classes(config) for a cheap answer
    "folder": f"{_AT}.folders:read_folder",
    "modelnet": f"{_AT}.modelnet:read_modelnet",
    "scanobjectnn": f"{_AT}.scanobjectnn:read_scanobjectnn",
    "few-shot": f"{_AT}.fewshot:read_few_shot",
    "shapenetpart": f"{_AT}.shapenetpart:read_shapenetpart",
    "hdf5": f"{_AT}.hdf5:read_hdf5",
    "mesh-views": f"{_AT}.views:read_views",
    "solids-shifted": f"{_AT}.shifted:read_shifted",
}
FORMATS = ("auto", *READERS)
HDF5 = (".h5", ".hdf5")


@dataclass(frozen=True, slots=True)
class Sample:
    """One cloud: its name for people, its class, and where it is: a file, or a row of a file that holds many."""

    name: str
    label: int
    path: str = ""
    row: int = -1


@dataclass
class Listing:
    """Every sample of every split, before subsampling.

    Attributes:
        readers: split -> cloud of a sample; splits without one read the file ``sample.path``.
        normalize: what "auto" means for this layout.
        fixed: the layout says what is in which split: nothing is held out, nothing drawn, classes may be empty.
        notes: facts for the report.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    layout: str = ""
    readers: dict[str, Callable[[Sample], Cloud]] = field(default_factory=dict)
    normalize: str = "unit-sphere"
    fixed: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def detect_format(config: PointDataConfig) -> str:
    """The layout of ``config.root``.

    Raises:
        UnknownNameError: ``format`` names no layout.
        DataError: there is nothing at ``root``, or nothing that is known.
    """
    if config.format not in FORMATS:
        raise UnknownNameError("data format", config.format, FORMATS)
    if "solids-shifted" in (config.format, config.root):
        return "solids-shifted"
    if not config.root:
        raise DataError(f"data.root is empty. {expected()}")
    if config.format != "auto":
        return config.format
    path = Path(config.root)
    if path.is_file():
        if path.suffix.lower() in HDF5:
            return "hdf5"
        raise DataError(f"data.root = {config.root!r} is a file but not HDF5 ({', '.join(HDF5)}). {expected()}")
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = closest(path.name, near) if near else f"The folder {str(path.parent)!r} does not exist either."
        raise DataError(f"data.root = {config.root!r} does not exist. {hint}")
    inside = [p.name for p in path.iterdir()]
    if "synsetoffset2category.txt" in inside:
        return "shapenetpart"
    if any(re.fullmatch(r"modelnet\d+_(shape_names\.txt|(train|test)_\d+pts_fps\.dat)", n) for n in inside):
        return "modelnet"
    if any(re.fullmatch(r"ply_data_train\d*\.h5|modelnet\d+_(normal_resampled|ply_hdf5_2048)", n) for n in inside):
        return "modelnet"
    if {"main_split", "main_split_nobg"} & set(inside) or "training_objectdataset.h5" in inside:
        return "scanobjectnn"
    if any(re.fullmatch(r"\d+way_?\d+shot", n) for n in inside):
        return "few-shot"
    if any(n.lower().endswith(HDF5) for n in inside):
        return "hdf5"
    if not any((path / n).is_dir() for n in inside) and any(n.lower().endswith(MESHES) for n in inside):
        return "mesh-views"
    return "folder"


def read_layout(config: PointDataConfig) -> Listing:
    """List the samples of every split that ``config.root`` has.

    Raises:
        DataError: empty folders, missing files or keys, labels out of range, classes that train does not have.
    """
    layout = detect_format(config)
    module, _, name = READERS[layout].partition(":")
    listing: Listing = getattr(importlib.import_module(module), name)(config)
    if not listing.splits.get("train"):
        raise DataError(f"{config.root!r} ({layout}) has no training clouds. {expected()}")
    seen = {sample.label for sample in listing.splits["train"]}
    empty = [name for index, name in enumerate(listing.classes) if index not in seen]
    if empty and not config.allow_empty and not listing.fixed:
        raise DataError(
            f"{len(empty)} of {len(listing.classes)} classes have no training cloud in {config.root!r}: {some(empty)}. "
            "Add clouds, remove the class, or set allow_empty to true."
        )
    return listing


def layout_classes(config: PointDataConfig) -> tuple[str, ...]:
    """Class names in index order, without reading clouds where the layout allows."""
    module = importlib.import_module(READERS[detect_format(config)].partition(":")[0])
    names = getattr(module, "classes", None)
    result: tuple[str, ...] = names(config) if names is not None else read_layout(config).classes
    return result


def named(config: PointDataConfig, usual: Sequence[str], where: str) -> tuple[str, ...]:
    """``data.classes`` if given, as many as the layout has, else its usual names."""
    if config.classes and len(config.classes) != len(usual):
        raise DataError(f"data.classes names {len(config.classes)} classes, and {where} has {len(usual)}.")
    return config.classes or tuple(usual)


def expected() -> str:
    """What a root may be."""
    return (
        "Expected ROOT/CLASS/cloud.ply, ROOT/train/CLASS/cloud.ply with optional ROOT/val and ROOT/test, an HDF5 file, "
        f"the folder of a data set ({', '.join(n for n in READERS if n != 'solids-shifted')}), or solids-shifted "
        f"(built in). Clouds end in {', '.join(EXTENSIONS)}."
    )
