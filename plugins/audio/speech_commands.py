"""Speech Commands v2: 35 words of at most 1 s, with the official lists of validation and test files.

``ROOT/WORD/SPEAKER_nohash_N.wav``, ``ROOT/validation_list.txt`` and ``ROOT/testing_list.txt``; everything else trains.
Folders that begin with an underscore (background noise) are no words. Words are sorted by name; a checkpoint that
counts them in another order is served by ``data.classes``. Source: Warden, arXiv 1804.03209 (2018).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.folders import sounds_below
from peft_suite.audio.listing import Listing, Sample, below, named, present
from peft_suite.errors import DataError, closest

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["home", "read_speech_commands"]

LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}


def home(root: Path) -> Path | None:
    """The folder that holds the lists."""
    return below(root, ("speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02"), LISTS["test"])


def read_speech_commands(config: AudioDataConfig) -> Listing:
    """The official three splits.

    Raises:
        DataError: a list is missing, or names a file of no word folder or one that does not exist.
    """
    root = home(Path(config.root))
    if root is None or not all((root / name).is_file() for name in LISTS.values()):
        raise DataError(f"{config.root!r} has not both {' and '.join(LISTS.values())}, so it is not Speech Commands.")
    words = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    if not words:
        raise DataError(f"{str(root)!r} has no folder of a word.")
    classes = named(config, words)
    at = {word: i for i, word in enumerate(classes)}
    splits: dict[str, list[Sample]] = {"train": []}
    listed: set[str] = set()
    for split, file in LISTS.items():
        samples = []
        for name in (root / file).read_text("utf-8").split():
            word = name.partition("/")[0]
            if word not in at:
                raise DataError(f"{file} of {config.root!r} names {name!r}. {closest(word, words)}")
            samples.append(_sample(root, name, at[word]))
        splits[split] = list(present(samples, config, file))
        listed |= {s.name for s in samples}
    for word in words:
        names = (p.relative_to(root).as_posix() for p in sounds_below(root / word))
        splits["train"] += [_sample(root, name, at[word]) for name in names if name not in listed]
    return Listing(classes, {k: part for k, part in splits.items() if part}, "speech-commands")


def _sample(root: Path, name: str, label: int) -> Sample:
    return Sample(name, (label,), str(root / name), speaker=Path(name).name.partition("_nohash_")[0])
