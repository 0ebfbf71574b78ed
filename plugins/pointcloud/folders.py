"""A folder per class: ROOT/CLASS/cloud.ply, with splits as ROOT/SPLIT/CLASS/cloud.ply or ROOT/CLASS/SPLIT/cloud.off.

Folders inside a class folder are searched too. The second form of splits is that of ModelNet's original meshes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.pointcloud.formats import EXTENSIONS
from peft_suite.pointcloud.listing import Listing, Sample, expected
from peft_suite.train.folders import class_folders, files_below, split_folders

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["clouds_below", "read_folder", "split_folders"]


def read_folder(config: PointDataConfig) -> Listing:
    """Samples of every split, sorted by name; classes are train's folders, sorted.

    Raises:
        DataError: folders are missing or hold no cloud, or a split has classes that train does not have.
    """
    names = (config.train, config.val, config.test)
    classes, found = class_folders(
        Path(config.root), names, config.classes, EXTENSIONS, "cloud", expected, allow_empty=config.allow_empty
    )
    splits = {split: [Sample(name, label, path) for name, label, path in part] for split, part in found.items()}
    return Listing(classes, splits, layout="folder")


def clouds_below(folder: Path) -> list[Path]:
    """Every cloud in a folder and the folders in it, sorted."""
    return files_below(folder, EXTENSIONS)
