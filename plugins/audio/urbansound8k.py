"""UrbanSound8K: 8,732 clips of at most 4 s in 10 classes and 10 predefined folds, which must not be reshuffled.

``ROOT/metadata/UrbanSound8K.csv`` (slice_file_name, fold, classID, class, ...) and ``ROOT/audio/fold{1..10}/NAME``;
ROOT may be UrbanSound8K or the folder that holds it. Source: Salamon, Jacoby and Bello, ACM Multimedia 2014.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.listing import Listing, Sample, below, named, present
from peft_suite.audio.tables import column, numbered, rows_of
from peft_suite.errors import DataError

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["home", "read_urbansound8k"]

META = "metadata/UrbanSound8K.csv"


def home(root: Path) -> Path | None:
    """The folder that holds the metadata."""
    return below(root, ("UrbanSound8K",), META)


def read_urbansound8k(config: AudioDataConfig) -> Listing:
    """All clips with their folds; classes are counted as ``classID`` does.

    Raises:
        DataError: missing metadata, columns or files, or an id with two names.
    """
    root = home(Path(config.root))
    if root is None:
        raise DataError(f"{config.root!r} has no {META}, so it is not UrbanSound8K.")
    table = root / META
    rows = rows_of(table)
    for name in ("slice_file_name", "fold", "classID", "class"):
        column(list(rows[0]), name, (), "", table)
    classes = named(config, numbered(rows, "classID", "class", table))
    at = {name: i for i, name in enumerate(classes)}
    samples = []
    for row in rows:
        place = f"audio/fold{row['fold']}/{row['slice_file_name']}"
        samples.append(Sample(place, (at[row["class"]],), str(root / place), fold=int(row["fold"])))
    folds = tuple(sorted({s.fold for s in samples}))
    return Listing(classes, {"train": list(present(samples, config, META))}, "urbansound8k", folds=folds)
