"""ESC-50: 2,000 clips of 5 s in 50 classes and 5 predefined folds.

``ROOT/meta/esc50.csv`` (filename, fold, target, category, ...) and ``ROOT/audio/FILENAME``; ROOT may be ESC-50,
ESC-50-master or the folder that holds it. Source: Piczak, ACM Multimedia 2015.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.listing import Listing, Sample, below, named, present
from peft_suite.audio.tables import column, numbered, rows_of
from peft_suite.errors import DataError

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["home", "read_esc50"]

META = "meta/esc50.csv"


def home(root: Path) -> Path | None:
    """The folder that holds the metadata."""
    return below(root, ("ESC-50", "ESC-50-master"), META)


def read_esc50(config: AudioDataConfig) -> Listing:
    """All clips with their folds; classes are counted as ``target`` does.

    Raises:
        DataError: missing metadata, columns or files, or a target with two names.
    """
    root = home(Path(config.root))
    if root is None:
        raise DataError(f"{config.root!r} has no {META}, so it is not ESC-50.")
    table = root / META
    rows = rows_of(table)
    for name in ("filename", "fold", "target", "category"):
        column(list(rows[0]), name, (), "", table)
    classes = named(config, numbered(rows, "target", "category", table))
    at = {name: i for i, name in enumerate(classes)}
    samples = [
        Sample(f"audio/{r['filename']}", (at[r["category"]],), str(root / "audio" / r["filename"]), fold=int(r["fold"]))
        for r in rows
    ]
    folds = tuple(sorted({s.fold for s in samples}))
    return Listing(classes, {"train": list(present(samples, config, META))}, "esc50", folds=folds)
