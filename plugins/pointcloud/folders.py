"""A folder per class: ROOT/CLASS/cloud.ply, with splits as ROOT/SPLIT/CLASS/cloud.ply or ROOT/CLASS/SPLIT/cloud.off.

Folders inside a class folder are searched too. The second form of splits is that of ModelNet's original meshes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.errors import DataError, closest
from peft_suite.pointcloud.formats import EXTENSIONS
from peft_suite.pointcloud.listing import VAL_NAMES, Listing, Sample, check_known, expected, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["clouds_below", "read_folder", "split_folders"]


def read_folder(config: PointDataConfig) -> Listing:
    """Samples of every split, sorted by name; classes are train's folders, sorted.

    Raises:
        DataError: folders are missing or hold no cloud, or a split has classes that train does not have.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root = {config.root!r} is not a folder.")
    parts = split_folders(root, config.train, config.val, config.test)
    places = {split: {p.name: p for p in _folders(folder)} for split, folder in parts.items()}
    if not places["train"]:
        raise DataError(f"{str(parts['train'])!r} has no sub-folder, so there is no class. {expected()}")
    if tuple(parts) == ("train",) and parts["train"] == root:
        places = _splits_in_classes(places["train"])
    classes = config.classes or tuple(sorted(places["train"]))
    for split, folders in places.items():
        check_known(split, folders, classes)
    if lost := [name for name in classes if name not in places["train"]]:
        raise DataError(f"{str(parts['train'])!r} has no folder for: {some(lost)}. {closest(lost[0], places['train'])}")
    for folder in places["train"].values() if not config.allow_empty else ():
        others = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        if others and not clouds_below(folder):
            kind = others[0].suffix
            raise DataError(f"{str(others[0])!r}: unknown extension {kind!r}. {closest(kind, EXTENSIONS)}")
    splits = {}
    for split, folders in places.items():
        splits[split] = [
            Sample(p.relative_to(root).as_posix(), label, str(p))
            for label, name in enumerate(classes)
            if name in folders
            for p in clouds_below(folders[name])
        ]
        if not splits[split]:
            raise DataError(f"The {split} folders of {config.root!r} hold no cloud. {expected()}")
    return Listing(classes, splits, layout="folder")


def split_folders(root: Path, train: str, val: str, test: str) -> dict[str, Path]:
    """The folder of every split that there is; ``root`` itself where it has no folder for train."""
    if not (root / (train or "train")).is_dir():
        if train:
            raise DataError(f"{str(root)!r} has no folder {train!r}. {closest(train, _names(root))}")
        return {"train": root}
    parts = {"train": root / (train or "train")}
    for split, wanted, usual in (("val", val, VAL_NAMES), ("test", test, ("test",))):
        found = next((root / n for n in ((wanted,) if wanted else usual) if (root / n).is_dir()), None)
        if wanted and found is None:
            raise DataError(f"{str(root)!r} has no folder {wanted!r}. {closest(wanted, _names(root))}")
        if found is not None:
            parts[split] = found
    return parts


def clouds_below(folder: Path) -> list[Path]:
    """Every cloud in a folder and the folders in it, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())


def _splits_in_classes(classes: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """ROOT/CLASS/train and ROOT/CLASS/test, where every class has both."""
    if not all((p / "train").is_dir() and (p / "test").is_dir() for p in classes.values()):
        return {"train": classes}
    return {
        split: {name: p / split for name, p in classes.items() if (p / split).is_dir()}
        for split in ("train", "val", "test")
        if any((p / split).is_dir() for p in classes.values())
    }


def _folders(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _names(root: Path) -> list[str]:
    return [p.name for p in _folders(root)] if root.is_dir() else []
