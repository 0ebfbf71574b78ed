"""A folder per class: ROOT/CLASS/sound.wav, with splits as ROOT/SPLIT/CLASS/sound.wav or ROOT/CLASS/SPLIT/sound.wav."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.decode import EXTENSIONS
from peft_suite.audio.listing import Listing, Sample, expected
from peft_suite.train.folders import class_folders, files_below

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["read_folder", "sounds_below"]


def read_folder(config: AudioDataConfig) -> Listing:
    """Samples of every split, sorted by name; classes are train's folders, sorted.

    Raises:
        DataError: folders are missing or hold no sound, or a split has classes that train does not have.
    """
    names = (config.train, config.val, config.test)
    classes, found = class_folders(
        Path(config.root), names, config.classes, EXTENSIONS, "sound", expected, allow_empty=config.allow_empty
    )
    splits = {split: [Sample(name, (label,), path) for name, label, path in part] for split, part in found.items()}
    return Listing(classes, splits, "folder")


def sounds_below(folder: Path) -> list[Path]:
    """Every sound in a folder and the folders in it, sorted."""
    return files_below(folder, EXTENSIONS)
