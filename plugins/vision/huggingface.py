"""Data sets of the Hugging Face datasets library: a directory written by save_to_disk, or a name to download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError, MissingExtraError, closest
from peft_suite.vision.lists import (
    FILE_COLUMNS,
    LABEL_COLUMNS,
    VAL_NAMES,
    Listing,
    Sample,
    check_known,
    class_names,
    column,
    split_labels,
)

if TYPE_CHECKING:
    from PIL import Image

    from peft_suite.vision.data import ImageDataConfig

__all__ = ["read_huggingface"]


def read_huggingface(config: ImageDataConfig) -> Listing:
    """List the rows of every split; images stay encoded until they are asked for."""
    data = _open_huggingface(config)
    first = data.get(config.train or "train")
    if first is None:
        raise DataError(
            f"{config.root!r} has no split {config.train or 'train'!r}. {closest(config.train or 'train', data)}"
        )
    wanted = {"train": config.train or "train", "test": config.test or "test"}
    if val := next((name for name in ((config.val,) if config.val else VAL_NAMES) if name in data), config.val):
        wanted["val"] = val
    features = first.features
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    columns = list(features)
    file_key = column(config.file_column, "file_column", (*images, *FILE_COLUMNS), columns, config.root)
    label_key = column(config.label_column, "label_column", LABEL_COLUMNS, columns, config.root)
    kind = features[label_key]
    multi = config.is_multi or isinstance(kind, list) or hasattr(kind, "feature")
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    known = tuple(getattr(inner, "names", None) or ())
    raw = {split: data[name][label_key] for split, name in wanted.items() if name in data}
    if missing := [n for s, n in wanted.items() if s not in raw and getattr(config, s)]:
        raise DataError(f"{config.root!r} has no split {missing[0]!r}. {closest(missing[0], data)}")
    rows: dict[str, list[list[str]]] = {}
    for split, values in raw.items():
        rows[split] = []
        for number, value in enumerate(values):
            labels = list(value) if isinstance(value, list | tuple) else split_labels(value, config)
            bad = [v for v in labels if not isinstance(v, str | int) or (known and not 0 <= int(v) < len(known))]
            if bad or (not labels and not multi):
                raise DataError(f"{config.root!r}, {split} row {number}: label {value!r} is out of range or no label.")
            rows[split].append([known[int(v)] if known else str(v) for v in labels])
    classes = config.classes or known or class_names((v for row in rows["train"] for v in row), config, multi)
    position = {name: i for i, name in enumerate(classes)}
    splits: dict[str, list[Sample]] = {}
    for split, part in rows.items():
        check_known(split, {v for row in part for v in row}, classes)
        splits[split] = [
            Sample(f"{wanted[split]}[{i}]", tuple(sorted({position[v] for v in row})), row=i)
            for i, row in enumerate(part)
        ]
    openers = {split: _row_opener(data[wanted[split]], file_key) for split in splits}
    return Listing(classes, splits, multi, "huggingface", openers)


def _open_huggingface(config: ImageDataConfig) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"{config.root!r} needs the Hugging Face datasets library, which is not installed. "
            "Run: pip install datasets"
        ) from error
    name = config.root.removeprefix("hf:")
    try:
        if Path(name).is_dir() and not config.root.startswith("hf:"):
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, config.subset or None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"The datasets library cannot open {config.root!r}: {reason}. Without a network, give a directory "
            "written by save_to_disk."
        ) from error
    return data if isinstance(data, dict) else {config.train or "train": data}


def _row_opener(data: Any, key: str) -> Callable[[Sample], Image.Image]:
    from PIL import Image

    def open_row(sample: Sample) -> Image.Image:
        value = data[sample.row][key]
        return value if isinstance(value, Image.Image) else Image.open(value)

    return open_row
