"""Fluent Speech Commands: 31 intents (action, object, location) of spoken commands, in the official three splits.

``ROOT/data/{train,valid,test}_data.csv`` (path, speakerId, transcription, action, object, location); paths are relative
to ROOT, which may be fluent_speech_commands_dataset or the folder that holds it. Source: Lugosch et al., Interspeech
2019.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.audio.listing import Listing, Sample, below, named, present
from peft_suite.audio.tables import column, rows_of
from peft_suite.errors import DataError, closest

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["INTENTS", "home", "read_fluent_speech"]

_ROOMS = ("kitchen", "bedroom", "washroom")
INTENTS: tuple[str, ...] = (  # "action,object,location" by published id
    "change language,none,none",
    "activate,music,none",
    "activate,lights,none",
    "deactivate,lights,none",
    "increase,volume,none",
    "decrease,volume,none",
    "increase,heat,none",
    "decrease,heat,none",
    "deactivate,music,none",
    "activate,lamp,none",
    "deactivate,lamp,none",
    *(f"activate,lights,{room}" for room in _ROOMS),
    *(f"deactivate,lights,{room}" for room in _ROOMS),
    *(f"increase,heat,{room}" for room in _ROOMS),
    *(f"decrease,heat,{room}" for room in _ROOMS),
    "bring,newspaper,none",
    "bring,juice,none",
    "bring,socks,none",
    *(f"change language,{language},none" for language in ("Chinese", "Korean", "English", "German")),
    "bring,shoes,none",
)
FILES = {"train": "data/train_data.csv", "val": "data/valid_data.csv", "test": "data/test_data.csv"}


def home(root: Path) -> Path | None:
    """The folder that holds the tables."""
    return below(root, ("fluent_speech_commands_dataset",), FILES["train"])


def read_fluent_speech(config: AudioDataConfig) -> Listing:
    """The official three splits.

    Raises:
        DataError: missing tables, columns or files, or an intent that is none of the 31.
    """
    root = home(Path(config.root))
    if root is None:
        raise DataError(f"{config.root!r} has no {FILES['train']}, so it is not Fluent Speech Commands.")
    classes = named(config, INTENTS)
    at = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split, file in FILES.items():
        table = root / file
        rows = rows_of(table)
        for name in ("path", "speakerId", "action", "object", "location"):
            column(list(rows[0]), name, (), "", table)
        samples = []
        for number, row in enumerate(rows, 2):
            intent = f"{row['action']},{row['object']},{row['location']}"
            if intent not in at:
                raise DataError(f"{str(table)!r}, line {number}: unknown intent {intent!r}. {closest(intent, INTENTS)}")
            samples.append(Sample(row["path"], (at[intent],), str(root / row["path"]), speaker=row["speakerId"]))
        splits[split] = list(present(samples, config, file))
    return Listing(classes, splits, "fluent-speech")
