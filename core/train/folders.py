"""A folder per class: ROOT/CLASS/file, with splits as ROOT/SPLIT/CLASS/file or ROOT/CLASS/SPLIT/file.

Folders inside a class folder are searched too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_suite.errors import DataError, closest

__all__ = ["VAL_NAMES", "check_known", "class_folders", "files_below", "some", "split_folders"]

VAL_NAMES = ("val", "valid", "validation", "dev")


def class_folders(
    root: Path,
    names: tuple[str, str, str],
    given: Sequence[str],
    extensions: Sequence[str],
    what: str,
    expected: Callable[[], str],
    *,
    allow_empty: bool = False,
) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int, str]]]]:
    """(classes, split -> (name relative to the root, label, path)), sorted by name; classes are train's folders.

    Args:
        names: folders of train, val and test; "" looks for the usual ones.
        given: class names in index order; empty takes train's folders, sorted.
        extensions: of the files that count, in lower case.
        what: one of them, for messages: "cloud".
        expected: a sentence that says what a root may be.
        allow_empty: classes without a file are fine.

    Raises:
        DataError: folders are missing or hold no such file, or a split has classes that train does not have.
    """
    if not root.is_dir():
        raise DataError(f"data.root = {str(root)!r} is not a folder.")
    parts = split_folders(root, *names)
    places = {split: {p.name: p for p in _folders(folder)} for split, folder in parts.items()}
    if not places["train"]:
        raise DataError(f"{str(parts['train'])!r} has no sub-folder, so there is no class. {expected()}")
    if tuple(parts) == ("train",) and parts["train"] == root:
        places = _splits_in_classes(places["train"])
    classes = tuple(given) or tuple(sorted(places["train"]))
    for split, folders in places.items():
        check_known(split, folders, classes)
    if lost := [name for name in classes if name not in places["train"]]:
        raise DataError(f"{str(parts['train'])!r} has no folder for: {some(lost)}. {closest(lost[0], places['train'])}")
    for folder in places["train"].values() if not allow_empty else ():
        others = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        if others and not files_below(folder, extensions):
            kind = others[0].suffix
            raise DataError(f"{str(others[0])!r}: unknown extension {kind!r}. {closest(kind, extensions)}")
    splits = {}
    for split, folders in places.items():
        splits[split] = [
            (p.relative_to(root).as_posix(), label, str(p))
            for label, name in enumerate(classes)
            if name in folders
            for p in files_below(folders[name], extensions)
        ]
        if not splits[split]:
            raise DataError(f"The {split} folders of {str(root)!r} hold no {what}. {expected()}")
    return classes, splits


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


def files_below(folder: Path, extensions: Sequence[str]) -> list[Path]:
    """Every file of these extensions in a folder and the folders in it, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in extensions and p.is_file())


def check_known(split: str, names: Iterable[str], classes: Sequence[str]) -> None:
    """Every class of a split must be one of train."""
    extra = sorted(set(names) - set(classes))
    if extra and split == "train":
        raise DataError(f"Classes of train that are not in data.classes: {some(extra)}. {closest(extra[0], classes)}")
    if extra:
        raise DataError(
            f"Classes in {split} that train does not have: {some(extra)}. {closest(extra[0], classes)} "
            "Rename them, or list every class in data.classes."
        )


def some(names: Sequence[Any], limit: int = 6) -> str:
    """The first names and how many more there are."""
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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
