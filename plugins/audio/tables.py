"""CSV tables: the columns path and label, and optionally split, fold and speaker.

ROOT is one table, or a folder with train.csv and optional val.csv and test.csv. Paths are relative to the table's
folder or ``data.audio_root``. With ``data.label_separator`` (or ``data.multi_label``, then ";") a row has several
labels. A table with a fold column and no split column is cross-validated: ``data.fold`` tests.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.listing import TABLES, Listing, Sample, present
from peft_suite.errors import DataError, closest
from peft_suite.train.folders import VAL_NAMES, check_known, some

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["column", "numbered", "read_csv", "rows_of"]

PATHS = ("path", "file", "filename", "file_name", "audio")
LABELS = ("label", "labels", "class", "category", "target")

Row = Mapping[str, str]


def read_csv(config: AudioDataConfig) -> Listing:
    """Samples of one table or of a table per split.

    Raises:
        DataError: no table, missing columns (the found ones are listed), unknown splits or classes, missing files.
    """
    root = Path(config.root)
    tables = _tables(root, config)
    base = Path(config.audio_root) if config.audio_root else (root if root.is_dir() else root.parent)
    found: dict[str, list[tuple[str, tuple[str, ...], str, int]]] = {}
    by_fold = False
    for split, table in tables.items():
        rows = rows_of(table)
        columns = list(rows[0])
        path = column(columns, config.path_column, PATHS, "path_column", table)
        label = column(columns, config.label_column, LABELS, "label_column", table)
        parts = _optional(columns, config.split_column, "split", "split_column", table) if split == "" else ""
        fold = _optional(columns, config.fold_column, "fold", "fold_column", table)
        speaker = _optional(columns, config.speaker_column, "speaker", "speaker_column", table)
        by_fold = bool(fold) and (not parts or bool(config.fold)) and len(tables) == 1
        for number, row in enumerate(rows, 2):
            where = f"{str(table)!r}, line {number}"
            if not row[path]:
                raise DataError(f"{where}: the column {path!r} is empty.")
            labels = _labels(row[label], config)
            if not labels and not config.is_multi:
                raise DataError(f"{where}: the column {label!r} is empty.")
            if not config.is_multi and ";" in row[label] and row[label] not in config.classes:
                raise DataError(
                    f"{where}: the label {row[label]!r} looks like several. Set data.multi_label=true, which separates "
                    "them at ';', or, if it is the name of one class, list all classes in data.classes."
                )
            name = split or (_split(row[parts], config, where) if parts and not by_fold else "train")
            number_of = _fold(row[fold], where) if fold else 0
            found.setdefault(name, []).append((row[path], labels, row[speaker] if speaker else "", number_of))
    classes = config.classes or _names(v for _, labels, _, _ in found.get("train", ()) for v in labels)
    splits = {}
    for split, entries in found.items():
        check_known(split, {v for _, labels, _, _ in entries for v in labels}, classes)
        at = {name: i for i, name in enumerate(classes)}
        samples = [
            Sample(p, tuple(sorted({at[v] for v in labels})), str(base / p), who, fold)
            for p, labels, who, fold in entries
        ]
        splits[split] = list(present(samples, config, f"the {split} table (paths are relative to {str(base)!r})"))
    folds = tuple(sorted({s.fold for s in splits.get("train", ())})) if by_fold else ()
    return Listing(classes, splits, "csv", config.is_multi, folds)


def rows_of(table: Path, delimiter: str = "") -> list[Row]:
    """The rows by column name.

    Raises:
        DataError: not readable as a table, or without rows.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
        mark = delimiter or ("\t" if table.suffix.lower() == ".tsv" else ",")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        rows: list[Row] = [
            {k.strip(): (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in reader
        ]
    except FileNotFoundError as error:
        raise DataError(f"{str(table)!r} does not exist.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(table)!r} cannot be read as a table: {error}.") from error
    if not rows:
        raise DataError(f"{str(table)!r} lists no sound.")
    return rows


def column(columns: Sequence[str], given: str, usual: Sequence[str], field: str, table: Path) -> str:
    """The name of a column: the given one, or the first usual one.

    Raises:
        DataError: lists the columns that there are.
    """
    for name in (given,) if given else usual:
        if name in columns:
            return name
    hint = f" Set data.{field}." if field else ""
    raise DataError(f"{str(table)!r} has no column {(given or usual[0])!r}. Columns there: {', '.join(columns)}.{hint}")


def numbered(rows: Sequence[Row], number: str, name: str, table: Path) -> list[str]:
    """Class names of a data set that numbers them, in the order of the numbers.

    Raises:
        DataError: a number or fold that is none, or a number with two names.
    """
    names: dict[int, str] = {}
    for row in rows:
        for key in (number, "fold"):
            if not row[key].isdecimal():
                raise DataError(f"{str(table)!r}: {key} {row[key]!r} is no number.")
        if names.setdefault(int(row[number]), row[name]) != row[name]:
            raise DataError(f"{str(table)!r}: {number} {row[number]} is {names[int(row[number])]!r} and {row[name]!r}.")
    return [names[key] for key in sorted(names)]


def _optional(columns: Sequence[str], given: str, usual: str, field: str, table: Path) -> str:
    if given:
        return column(columns, given, (), field, table)
    return usual if usual in columns else ""


def _tables(root: Path, config: AudioDataConfig) -> dict[str, Path]:
    """Split -> table; "" for one table of all splits."""
    if root.is_file():
        return {"": root}
    have = sorted(p.name for p in root.iterdir() if p.suffix.lower() in TABLES) if root.is_dir() else []
    tables = {}
    for split, given, usual in (
        ("train", config.train, ("train",)),
        ("val", config.val, VAL_NAMES),
        ("test", config.test, ("test",)),
    ):
        names = [given] if given else [f"{name}{suffix}" for name in usual for suffix in TABLES]
        found = next((n for n in names if n in have), "")
        if not found and (given or split == "train"):
            raise DataError(f"{str(root)!r} has no table {names[0]!r}. {closest(names[0], have)}")
        if found:
            tables[split] = root / found
    return tables


def _split(text: str, config: AudioDataConfig, where: str) -> str:
    spelled = {config.train or "train": "train", config.val or "val": "val", config.test or "test": "test"}
    spelled |= {} if config.val else dict.fromkeys(VAL_NAMES, "val")
    if (text or "train") not in spelled:
        raise DataError(f"{where}: split {text!r}. {closest(text, spelled)}")
    return spelled[text or "train"]


def _fold(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise DataError(f"{where}: fold {text!r} is no number from 1.")
    return int(text)


def _labels(text: str, config: AudioDataConfig) -> tuple[str, ...]:
    if config.is_multi:
        return tuple(part.strip() for part in text.split(config.label_separator or ";") if part.strip())
    return (text,) if text else ()


def _names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sorted; numbers as numbers."""
    found = set(labels)
    if found and all(name.isdecimal() for name in found):
        return tuple(sorted(found, key=int))
    if not found:
        raise DataError(f"The training table names no label ({some(sorted(found)) or 'every label is empty'}).")
    return tuple(sorted(found))
