"""ScanObjectNN: 15 classes of scanned indoor objects, 2048 points each, in three variants of rising difficulty.

``obj-bg`` has the object with its background, ``obj-only`` without, ``pb-t50-rs`` ("hardest") boxes that are moved,
turned and scaled by half. The official loaders neither centre nor scale, so "auto" normalisation is "none" here.
Published results use ``data.num_points=2048``; they select the epoch on test data.

Source: Uy et al., ICCV 2019.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.errors import DataError, UnknownNameError
from peft_suite.pointcloud.listing import Listing, named

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["CLASSES", "VARIANTS", "classes", "read_scanobjectnn"]

CLASSES = (
    "bag",
    "bin",
    "box",
    "cabinet",
    "chair",
    "desk",
    "display",
    "door",
    "shelf",
    "table",
    "bed",
    "pillow",
    "sink",
    "sofa",
    "toilet",
)
VARIANTS = {  # folder, files, usual sizes
    "obj-bg": ("main_split", "{split}_objectdataset.h5", (2309, 581)),
    "obj-only": ("main_split_nobg", "{split}_objectdataset.h5", (2309, 581)),
    "pb-t50-rs": ("main_split", "{split}_objectdataset_augmentedrot_scale75.h5", (11416, 2882)),
}
_OTHER = {"hardest": "pb-t50-rs", "objbg": "obj-bg", "objonly": "obj-only"}


def classes(config: PointDataConfig) -> tuple[str, ...]:
    """The fifteen names."""
    return named(config, CLASSES, "ScanObjectNN")


def read_scanobjectnn(config: PointDataConfig) -> Listing:
    """Train and test of ``data.variant`` ("" is pb-t50-rs).

    Raises:
        DataError: the files are not there, lack the arrays data and label, or have labels above 14.
    """
    from peft_suite.pointcloud.hdf5 import ArrayReader, list_arrays

    asked = config.variant.lower().replace("_", "-") or "pb-t50-rs"
    variant = _OTHER.get(asked, asked)
    if variant not in VARIANTS:
        raise UnknownNameError("ScanObjectNN variant", config.variant, VARIANTS, "Set data.variant.")
    place, pattern, usual = VARIANTS[variant]
    files = {split: pattern.format(split=name) for split, name in (("train", "training"), ("test", "test"))}
    root = Path(config.root)
    tried = [root / place, root / "ScanObjectNN" / place, root / "h5_files" / place]
    tried += [root] if root.name == place or not any((root / p).is_dir() for p, _, _ in VARIANTS.values()) else []
    folder = next((f for f in tried if (f / files["train"]).is_file()), None)
    if folder is None:
        raise DataError(
            f"{config.root!r} has no {place}/{files['train']}, which {variant} needs. "
            f"Variants: {', '.join(VARIANTS)}. Set data.variant."
        )
    splits = list_arrays({s: [str(folder / name)] for s, name in files.items()}, folder, "data", "label")
    if bad := [s for part in splits.values() for s in part if s.label >= len(CLASSES)]:
        raise DataError(f"{bad[0].path!r}: label {bad[0].label} is out of range, ScanObjectNN has 15 classes.")
    sizes = tuple(len(part) for part in splits.values())
    if sizes != usual:
        warnings.warn(
            f"ScanObjectNN {variant}: {sizes[0]:,} training and {sizes[1]:,} test clouds, usually {usual[0]:,} and "
            f"{usual[1]:,}. Results may not compare with published ones.",
            stacklevel=2,
        )
    return Listing(
        classes(config),
        splits,
        layout="scanobjectnn",
        readers=dict.fromkeys(splits, ArrayReader("data")),
        normalize="none",
        notes={"variant": variant},
    )
