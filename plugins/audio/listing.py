"""Where the sounds are: which layout a folder has, and every sample of every split. Nothing is decoded here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.audio.decode import EXTENSIONS, Clip
from peft_suite.errors import DataError, UnknownNameError, closest
from peft_suite.train.folders import some

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["FORMATS", "Listing", "Sample", "below", "detect_format", "expected", "named", "present", "read_layout"]

_AT = "peft_suite.audio"
READERS: Mapping[str, str] = {  # layout -> "module:reader"
    "folder": f"{_AT}.folders:read_folder",
    "csv": f"{_AT}.tables:read_csv",
    "esc50": f"{_AT}.esc50:read_esc50",
    "urbansound8k": f"{_AT}.urbansound8k:read_urbansound8k",
    "speech-commands": f"{_AT}.speech_commands:read_speech_commands",
    "fluent-speech": f"{_AT}.fluent_speech:read_fluent_speech",
    "fsdd": f"{_AT}.fsdd:read_fsdd",
    "sounds-shifted": f"{_AT}.shifted:read_shifted",
}
FORMATS = ("auto", *READERS)
TABLES = (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sound: its name for people, its classes (one, or any number when multi-label), and its file.

    ``speaker`` is "" and ``fold`` 0 where the layout knows none; ``row`` is the number of a sound without a file.
    """

    name: str
    labels: tuple[int, ...]
    path: str
    speaker: str = ""
    fold: int = 0
    row: int = -1

    @property
    def label(self) -> int:
        """The first class, -1 for none."""
        return self.labels[0] if self.labels else -1


@dataclass
class Listing:
    """Every sample of every split, before folds and subsampling.

    A layout with folds or speakers has all its samples in "train"; which of them test is decided by
    :func:`peft_suite.audio.splits.arrange`.

    Attributes:
        folds: numbers of the predefined folds.
        test: names of the samples that the layout's own split tests, where that is not a split of its own.
        per_speaker: few shots are drawn for every class and speaker.
        readers: split -> sound of a sample; splits without one read the file ``sample.path``.
        notes: facts for the report.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    layout: str
    multi_label: bool = False
    folds: tuple[int, ...] = ()
    test: frozenset[str] = frozenset()
    per_speaker: bool = False
    readers: dict[str, Callable[[Sample], Clip]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def speakers(self) -> tuple[str, ...]:
        """Everyone who speaks, sorted."""
        return tuple(sorted({s.speaker for part in self.splits.values() for s in part if s.speaker}))


def detect_format(config: AudioDataConfig) -> str:
    """The layout of ``config.root``.

    Raises:
        UnknownNameError: ``format`` names no layout.
        DataError: there is nothing at ``root``, or nothing that is known.
    """
    if config.format not in FORMATS:
        raise UnknownNameError("data format", config.format, FORMATS)
    if "sounds-shifted" in (config.format, config.root):
        return "sounds-shifted"
    if not config.root:
        raise DataError(f"data.root is empty. {expected()}")
    path = Path(config.root)
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = closest(path.name, near) if near else f"The folder {str(path.parent)!r} does not exist either."
        raise DataError(f"data.root = {config.root!r} does not exist. {hint}")
    if config.format != "auto":
        return config.format
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return "csv"
        raise DataError(f"data.root = {config.root!r} is a file but no table ({', '.join(TABLES)}). {expected()}")
    from peft_suite.audio import esc50, fluent_speech, fsdd, speech_commands, urbansound8k

    modules = {
        "esc50": esc50,
        "urbansound8k": urbansound8k,
        "fluent-speech": fluent_speech,
        "speech-commands": speech_commands,
        "fsdd": fsdd,
    }
    for name, module in modules.items():
        if module.home(path) is not None:
            return name
    train = config.train or "train"
    if (path / train).is_file() or any((path / f"{train}{suffix}").is_file() for suffix in TABLES):
        return "csv"
    return "folder"


def read_layout(config: AudioDataConfig) -> Listing:
    """List every sample that ``config.root`` has.

    Raises:
        DataError: empty folders, missing files or columns, unknown classes.
    """
    layout = detect_format(config)
    module, _, name = READERS[layout].partition(":")
    listing: Listing = getattr(importlib.import_module(module), name)(config)
    if not listing.splits.get("train"):
        raise DataError(f"{config.root!r} ({layout}) has no training sounds. {expected()}")
    return listing


def below(root: Path, names: Sequence[str], mark: str) -> Path | None:
    """The folder that holds ``mark``: ``root`` itself, or one of ``names`` in it."""
    return next((p for p in (root, *(root / name for name in names)) if (p / mark).exists()), None)


def named(config: AudioDataConfig, usual: Sequence[str]) -> tuple[str, ...]:
    """The layout's classes in the order of ``data.classes``, which must name the same ones."""
    if not config.classes:
        return tuple(usual)
    if set(config.classes) != set(usual):
        odd = sorted(set(config.classes) ^ set(usual))
        raise DataError(
            f"data.classes and the classes of {config.root!r} differ in: {some(odd)}. {closest(odd[0], usual)} "
            "Give all of them in the order that you want, or leave data.classes empty."
        )
    return config.classes


def present(samples: Sequence[Sample], config: AudioDataConfig, where: str) -> Sequence[Sample]:
    """``samples``, checked to be on disk unless bad files are skipped later."""
    lost = [s.path for s in samples if not Path(s.path).is_file()]
    if lost and not config.skip_bad:
        raise DataError(
            f"{len(lost)} of {len(samples)} files that {where} lists do not exist: {some(lost, 3)}. "
            "Complete the data, or set skip_bad (--skip-bad) to leave them out."
        )
    return samples


def expected() -> str:
    """What a root may be."""
    sets = ", ".join(name for name in READERS if name not in ("folder", "csv", "sounds-shifted"))
    return (
        "Expected ROOT/CLASS/sound.wav, ROOT/train/CLASS/sound.wav with optional ROOT/val and ROOT/test, a CSV table "
        f"with the columns path and label, or the folder of a data set ({sets}). Sounds end in "
        f"{', '.join(EXTENSIONS)}."
    )
