"""Free Spoken Digit Dataset: ``{digit}_{speaker}_{index}.wav`` in ROOT or ROOT/recordings.

Official split: index 0 to 4 test, the others train. ``data.speaker_out=NAME`` instead trains on everyone else and tests
on all recordings of that speaker. Few shots are drawn for every digit and speaker.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.decode import EXTENSIONS
from peft_suite.audio.listing import Listing, Sample, named
from peft_suite.errors import DataError
from peft_suite.train.folders import some

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["home", "read_fsdd"]

NAME = re.compile(r"(\d)_([^_]+)_(\d+)")
TEST = 5  # recordings of each digit and speaker, the first ones


def home(root: Path) -> Path | None:
    """The folder of the recordings: every sound in it is named as a digit."""
    for folder in (root, root / "recordings"):
        if folder.is_dir() and (found := _sounds(folder)) and all(NAME.fullmatch(p.stem) for p in found):
            return folder
    return None


def read_fsdd(config: AudioDataConfig) -> Listing:
    """All recordings; those of the official test split are named.

    Raises:
        DataError: no recordings, or files with other names.
    """
    root = Path(config.root)
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    found = _sounds(folder) if folder.is_dir() else []
    if odd := [p.name for p in found if not NAME.fullmatch(p.stem)]:
        raise DataError(f"{str(folder)!r} has files that are not named DIGIT_SPEAKER_INDEX: {some(odd)}.")
    if not found:
        raise DataError(f"{str(folder)!r} holds no recording named DIGIT_SPEAKER_INDEX, such as 7_jackson_32.wav.")
    parts = [(p, NAME.fullmatch(p.stem)) for p in found]
    entries = sorted((m[1], m[2], int(m[3]), p) for p, m in parts if m)
    classes = named(config, sorted({digit for digit, *_ in entries}))
    at = {name: i for i, name in enumerate(classes)}
    samples = [Sample(p.name, (at[digit],), str(p), speaker=who) for digit, who, _, p in entries]
    test = frozenset(p.name for _, _, index, p in entries if index < TEST)
    return Listing(classes, {"train": samples}, "fsdd", test=test, per_speaker=True)


def _sounds(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
