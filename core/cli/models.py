"""Data for an opened model: the configuration that training stored, a split, targets counted like its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError
from peft_suite.train.contracts import DataConfig, DataSource, DataSplits
from peft_suite.train.opening import Opened

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["aligned", "pick_split", "saved_data"]


def saved_data(opened: Opened, source: DataSource, root: str | None, changes: Mapping[str, Any]) -> DataConfig:
    """The data configuration that training stored, with another ``root`` and changed fields."""
    values = dict(opened.metadata.get("data_config") or {})
    if root is not None:
        kept = ("val_fraction", "split_seed", "multi_label", "label_separator", "skip_bad", "workers")
        values = {k: v for k, v in values.items() if k in kept} | {"root": root}
    return source.config.from_dict({**values, "augment": "none", **changes})


def pick_split(data: DataSplits, wanted: str) -> tuple[str, Dataset[Any]]:
    """The split to measure on: ``wanted``, or the first there is of test, val and train."""
    splits = {name: getattr(data, name) for name in ("test", "val", "train")}
    there = [name for name, split in splits.items() if split is not None and len(split)]
    if wanted == "auto" and there:
        return there[0], splits[there[0]]
    if wanted not in there:
        raise DataError(
            f"There is no {wanted} split with samples in this data. Choose one of: {', '.join(there) or 'none'}."
        )
    return wanted, splits[wanted]


def aligned(data: DataSplits, dataset: Dataset[Any], opened: Opened) -> Dataset[Any]:
    """``dataset`` with targets counted like the adapter's classes.

    Raises:
        DataError: the data has classes that the adapter does not know.
    """
    if tuple(data.classes) == opened.classes:
        return dataset
    unknown = [c for c in data.classes if c not in opened.classes]
    if unknown or data.multi_label or opened.multi_label:
        what = f"the classes {', '.join(unknown[:6])}" if unknown else "other classes or another order"
        raise DataError(
            f"The data has {what}, but {opened.path} was trained on {len(opened.classes)} classes: "
            f"{', '.join(opened.classes[:12])}{' ...' if len(opened.classes) > 12 else ''}. Rename them to match."
        )
    from peft_suite.cli.renumber import Renumbered

    return Renumbered(dataset, [opened.classes.index(c) for c in data.classes])
