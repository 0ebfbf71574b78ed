"""Where the samples are: folders per class, list files, Hugging Face directories. Nothing is decoded here."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError, UnknownNameError, closest
from peft_suite.vision.cifar import PICKLED, is_cifar_binary, is_cifar_pickle

if TYPE_CHECKING:
    from PIL import Image

    from peft_suite.vision.data import ImageDataConfig

__all__ = ["EXTENSIONS", "FORMATS", "Listing", "Sample", "detect_format", "read_layout", "some"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("auto", "folder", "list", "huggingface", "vtab", "fgvc", "few-shot", "cifar-binary", "digits-shifted")
LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
VAL_NAMES = ("val", "valid", "validation", "dev")
FILE_COLUMNS = ("file", "image", "path", "filename", "file_name", "img")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: its name for people, its class indices (one, or any number when multi-label), and where it is."""

    name: str
    labels: tuple[int, ...]
    path: str = ""
    row: int = -1


@dataclass
class Listing:
    """Every sample of every split, before subsampling. ``opener`` turns a sample without a path into an image.

    ``fixed``: the protocol says what is in which split. Nothing is held out, and classes may lack training images.
    ``task`` is the protocol's name of the data.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    multi_label: bool = False
    layout: str = ""
    openers: dict[str, Callable[[Sample], Image.Image]] = field(default_factory=dict)
    fixed: bool = False
    task: str = ""


def detect_format(config: ImageDataConfig) -> str:
    """The layout of ``config.root``.

    Raises:
        UnknownNameError: ``format`` names no layout.
        DataError: there is nothing at ``root``.
    """
    if config.format not in FORMATS:
        raise UnknownNameError("data format", config.format, FORMATS)
    root = config.root
    if not root:
        raise DataError(
            "data.root is empty. Give a folder with one sub-folder per class, a CSV or JSON list, hf:NAME, or "
            "digits-shifted (built in)."
        )
    if config.format != "auto":
        return config.format
    if root == "digits-shifted":
        return root
    if root.startswith("hf:"):
        return "huggingface"
    path = Path(root)
    if path.is_file():
        if path.suffix.lower() in LIST_SUFFIXES:
            return "list"
        unpack = " Unpack the archive first." if path.suffix.lower() in (".tar", ".gz", ".tgz", ".zip") else ""
        raise DataError(
            f"data.root = {root!r} is a file but not a list. Lists end in {', '.join(LIST_SUFFIXES)}.{unpack}"
        )
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = closest(path.name, near) if near else f"The folder {str(path.parent)!r} does not exist either."
        raise DataError(f"data.root = {root!r} does not exist. {hint} Built in: digits-shifted. Downloads: hf:NAME.")
    if (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    ):
        return "huggingface"
    if (path / "train800.txt").is_file() or (path / "train800val200.txt").is_file():
        return "vtab"
    if config.task and next(path.glob("*/train800val200.txt"), None):
        return "vtab"
    if is_cifar_binary(path):
        return "cifar-binary"
    if is_cifar_pickle(path):
        raise DataError(f"data.root = {root!r} cannot be read. {PICKLED}")
    if config.task:
        raise DataError(
            f"data.task = {config.task!r} belongs to a protocol, and {root!r} does not say which. Set data.format to "
            "vtab, fgvc or few-shot."
        )
    name = config.train or "train"
    if _list_file(path, name) and not (path / name).is_dir():
        return "list"
    return "folder"


def read_layout(config: ImageDataConfig) -> Listing:
    """List the samples of every split that ``config.root`` has.

    Raises:
        DataError: empty folders, missing columns or files, labels out of range, classes that train does not have.
    """
    from peft_suite.vision.cifar import read_cifar
    from peft_suite.vision.fewshot import read_few_shot
    from peft_suite.vision.fgvc import read_fgvc
    from peft_suite.vision.huggingface import read_huggingface
    from peft_suite.vision.vtab import read_vtab

    readers = {
        "folder": _read_folder,
        "list": _read_lists,
        "huggingface": read_huggingface,
        "vtab": read_vtab,
        "fgvc": read_fgvc,
        "few-shot": read_few_shot,
        "cifar-binary": read_cifar,
    }
    listing = readers[detect_format(config)](config)
    if not listing.splits.get("train"):
        raise DataError(f"{config.root!r} has no training images. {_layouts()}")
    seen = {label for sample in listing.splits["train"] for label in sample.labels}
    empty = [name for index, name in enumerate(listing.classes) if index not in seen]
    if empty and not config.allow_empty and not listing.fixed:
        raise DataError(
            f"{len(empty)} of {len(listing.classes)} classes have no training image in {config.root!r}: "
            f"{some(empty)}. "
            "Add images, remove the class, or set allow_empty to true."
        )
    return listing


def _read_folder(config: ImageDataConfig) -> Listing:
    from torchvision.datasets.folder import find_classes, make_dataset

    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root = {config.root!r} is not a folder.")
    parts = {"train": root / (config.train or "train")}
    if not parts["train"].is_dir():
        if config.train:
            raise DataError(f"{config.root!r} has no folder {config.train!r}. {closest(config.train, _folders(root))}")
        parts = {"train": root}
    else:
        val = _first(root, (config.val,) if config.val else VAL_NAMES)
        test = _first(root, (config.test or "test",))
        for wanted, found in ((config.val, val), (config.test, test)):
            if wanted and found is None:
                raise DataError(f"{config.root!r} has no folder {wanted!r}. {closest(wanted, _folders(root))}")
        parts |= {name: part for name, part in (("val", val), ("test", test)) if part is not None}

    classes: tuple[str, ...] = ()
    splits: dict[str, list[Sample]] = {}
    for split, folder in parts.items():
        try:
            names, index = find_classes(folder)
        except FileNotFoundError as error:
            raise DataError(f"{str(folder)!r} has no sub-folder, so there is no class. {_layouts()}") from error
        if split == "train":
            classes = config.classes or tuple(names)
        check_known(split, names, classes)
        if split == "train" and (lost := [name for name in classes if name not in index]):
            raise DataError(f"{str(folder)!r} has no folder for: {some(lost)}. {closest(lost[0], names)}")
        position = {name: i for i, name in enumerate(classes)}
        found = make_dataset(folder, index, extensions=EXTENSIONS, allow_empty=True)
        splits[split] = [Sample(os.path.relpath(p, root), (position[names[i]],), p) for p, i in found]
        if not found:
            raise DataError(f"{str(folder)!r} holds no image. Images end in {', '.join(EXTENSIONS)}. {_layouts()}")
    return Listing(classes, splits, layout="folder")


def _read_lists(config: ImageDataConfig) -> Listing:
    root = Path(config.root)
    rows: dict[str, list[_Row]] = {}
    if root.is_dir():
        for split, names in (
            ("train", (config.train or "train",)),
            ("val", (config.val,) if config.val else VAL_NAMES),
            ("test", (config.test or "test",)),
        ):
            file = next((f for name in names if (f := _list_file(root, name))), None)
            if file is not None:
                rows[split] = [row for row, _ in _read_rows(file, config)]
            elif split == "train" or (split == "val" and config.val) or (split == "test" and config.test):
                have = [p.name for p in root.iterdir() if p.suffix.lower() in LIST_SUFFIXES]
                raise DataError(f"{config.root!r} has no list {names[0]!r}. {closest(names[0], have)}")
    elif root.is_file():
        spelled = {config.train or "train": "train", config.val or "val": "val", config.test or "test": "test"}
        spelled |= {} if config.val else dict.fromkeys(VAL_NAMES, "val")
        for row, split in _read_rows(root, config):
            name = spelled.get(split or (config.train or "train"))
            if name is None:
                raise DataError(f"{config.root}: {row.file!r} has split {split!r}. {closest(split, spelled)}")
            rows.setdefault(name, []).append(row)
    else:
        raise DataError(f"data.root = {config.root!r} does not exist.")
    base = Path(config.image_root) if config.image_root else (root if root.is_dir() else root.parent)
    multi = config.multi_label or bool(config.label_separator) or any(r.many for part in rows.values() for r in part)
    classes = class_names((label for row in rows.get("train", ()) for label in row.labels), config, multi)
    splits = {}
    for split, part in rows.items():
        check_known(split, {str(label) for row in part for label in row.labels}, classes)
        position = {name: i for i, name in enumerate(classes)}
        splits[split] = [
            Sample(r.file, tuple(sorted({position[str(v)] for v in r.labels})), str(base / r.file)) for r in part
        ]
        lost = [s.path for s in splits[split] if not os.path.isfile(s.path)]
        if lost and not config.skip_bad:
            raise DataError(
                f"{len(lost)} of {len(part)} files in the {split} list do not exist: {some(lost, 3)}. "
                f"Paths are relative to {str(base)!r}; set image_root for another folder, "
                "or skip_bad to leave them out."
            )
    return Listing(classes, splits, multi, "list")


@dataclass(slots=True)
class _Row:
    file: str
    labels: tuple[str | int, ...]
    many: bool


def _read_rows(file: Path, config: ImageDataConfig) -> list[tuple[_Row, str]]:
    """Rows of one list file with their split ("" when there is no such column)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        records = _records(file, text, config)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{str(file)!r} cannot be read as {file.suffix[1:].upper()}: {error}.") from error
    if not records:
        raise DataError(f"{str(file)!r} lists no image.")
    columns = list(dict.fromkeys(key for record in records[:100] for key in record))
    file_key = column(config.file_column, "file_column", FILE_COLUMNS, columns, str(file))
    label_key = column(config.label_column, "label_column", LABEL_COLUMNS, columns, str(file))
    if config.split_column and config.split_column not in columns:
        column(config.split_column, "split_column", (), columns, str(file))
    split_key = config.split_column or "split"
    rows = []
    for number, record in enumerate(records, 1):
        name, value = record.get(file_key), record.get(label_key)
        if not isinstance(name, str) or not name or value is None:
            raise DataError(f"{str(file)!r}, entry {number}: no {file_key!r} or no {label_key!r} in {record!r}.")
        many = isinstance(value, list)
        labels = value if isinstance(value, list) else split_labels(value, config)
        if not all(isinstance(v, str | int) for v in labels) or (not labels and not many and not config.is_multi):
            raise DataError(f"{str(file)!r}, entry {number} ({name}): label {value!r} is neither a name nor a number.")
        rows.append((_Row(name, tuple(labels), many), str(record.get(split_key) or "")))
    return rows


def _records(file: Path, text: str, config: ImageDataConfig) -> list[Mapping[str, Any]]:
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True)
        return [{k.strip(): (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in reader]
    file_key, label_key = config.file_column or FILE_COLUMNS[0], config.label_column or LABEL_COLUMNS[0]
    if kind == ".txt":
        pairs = [line.rsplit(None, 1) for line in text.splitlines() if line.strip()]
        if bad := next((n for n, pair in enumerate(pairs, 1) if len(pair) != 2), 0):
            raise DataError(f"{str(file)!r}, line {bad}: expected 'path label' with a space between them.")
        return [{file_key: path.strip(), label_key: label} for path, label in pairs]
    data = [json.loads(line) for line in text.splitlines() if line.strip()] if kind == ".jsonl" else json.loads(text)
    if isinstance(data, dict):
        return [{file_key: path, label_key: label} for path, label in data.items()]
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise DataError(
            f'{str(file)!r}: expected a list of {{"file": ..., "label": ...}} objects, or one object {{path: label}}.'
        )
    return data


def split_labels(value: Any, config: ImageDataConfig) -> list[str | int]:
    if isinstance(value, str) and config.is_multi:
        return [part.strip() for part in value.split(config.label_separator or ";") if part.strip()]
    return [] if value == "" else [value]


def class_names(labels: Iterable[str | int], config: ImageDataConfig, multi: bool) -> tuple[str, ...]:
    """Class names in index order: given, counted, or found (numbers sort as numbers)."""
    found = {str(label) for label in labels}
    if config.classes:
        return config.classes
    numbers = sorted(int(name) for name in found if name.removeprefix("-").isdecimal())
    if numbers and len(numbers) == len(found) and numbers[0] < 0:
        raise DataError(f"Label {numbers[0]} in {config.root!r} is out of range: class numbers start at 0.")
    if config.num_classes:
        wrong = sorted(name for name in found if not name.isdecimal() or int(name) >= config.num_classes)
        if wrong:
            raise DataError(
                f"Labels out of range in {config.root!r}: {some(wrong)}. With num_classes = {config.num_classes} they "
                f"are numbers from 0 to {config.num_classes - 1}."
            )
        return tuple(str(i) for i in range(config.num_classes))
    return tuple(str(n) for n in numbers) if len(numbers) == len(found) else tuple(sorted(found))


def check_known(split: str, names: Iterable[str], classes: Sequence[str]) -> None:
    """Every label of a split must be a class of train."""
    extra = sorted(set(names) - set(classes))
    if extra and split == "train":
        raise DataError(
            f"Labels of train that are not in the field classes: {some(extra)}. {closest(extra[0], classes)}"
        )
    if extra:
        raise DataError(
            f"Classes in {split} that train does not have: {some(extra)}. {closest(extra[0], classes)} "
            "Rename them, or list every class in the field classes."
        )


def column(given: str, field_name: str, usual: Sequence[str], columns: Sequence[str], where: str) -> str:
    for name in (given,) if given else usual:
        if name in columns:
            return name
    wanted = given or usual[0]
    raise DataError(
        f"{where!r} has no column {wanted!r}. {closest(wanted, columns)} Set {field_name} to the right one."
    )


def _first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if name and (root / name).is_dir()), None)


def _folders(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.is_dir()]


def _list_file(root: Path, name: str) -> Path | None:
    if Path(name).suffix.lower() in LIST_SUFFIXES:
        return root / name if (root / name).is_file() else None
    return next((root / f"{name}{suffix}" for suffix in LIST_SUFFIXES if (root / f"{name}{suffix}").is_file()), None)


def some(names: Sequence[str], limit: int = 6) -> str:
    """The first names and how many more there are."""
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _layouts() -> str:
    return "Expected ROOT/CLASS/image.jpg, or ROOT/train/CLASS/image.jpg with optional ROOT/val and ROOT/test."
