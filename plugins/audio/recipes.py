"""The suites of audio classification and the recipes of its papers, one YAML file per method and suite in ``recipes/``.

``METHOD-SUITE`` has the learning rate, batch and epochs of the study of parameter-efficient methods (Cappellazzo et
al., MLSP 2024) and what its text means: position embeddings fitted to the clips, statistics of the data set, methods
that start as the frozen model, and on ESC-50 the data set's own protocol, four folds to train on. ``METHOD-SUITE-petl``
repeats what the published code ran: position embeddings zero and frozen, AudioSet's statistics, its start values, three
folds to train on. ``full-SUITE-ast`` are the recipes of the Audio Spectrogram Transformer (Gong et al., Interspeech
2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_suite.errors import DataError, UnknownNameError
from peft_suite.train.suites import Book, Suite

__all__ = ["ESC50", "FLUENT_SPEECH", "SPEECH_COMMANDS", "URBANSOUND8K", "book"]


def _folded(name: str, summary: str, group: str, count: int) -> Suite:
    """A data set of predefined folds: each tests once, and the mean over them is its result."""
    folds = {f"fold-{number}": number for number in range(1, count + 1)}
    return Suite(
        name,
        summary,
        {group: tuple(folds)},
        fields=lambda task: {"data": {"format": name, "fold": folds[task]}},
        missing=_missing(name),
        find=_finder(name, tuple(folds)),
    )


def _split(name: str, summary: str, group: str) -> Suite:
    """A data set with its own training, validation and test files."""
    return Suite(
        name,
        summary,
        {group: (name,)},
        fields=lambda task: {"data": {"format": name}},
        missing=_missing(name),
        find=_finder(name, (name,)),
    )


def _finder(suite: str, tasks: Sequence[str]) -> Callable[[str], str]:
    """Names of tasks however their words are joined, folds also by their number: ``3`` and ``Fold3`` are ``fold-3``."""
    plain = {_letters(task): task for task in tasks}

    def find(name: str) -> str:
        wanted = _letters(name)
        for known in (wanted, f"fold{wanted}"):
            if known in plain:
                return plain[known]
        raise UnknownNameError(f"task of {suite}", name, tasks)

    return find


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _missing(format: str) -> Callable[[str, str, Mapping[str, Any]], str]:
    def missing(root: str, task: str, data: Mapping[str, Any]) -> str:
        from peft_suite.audio.data import AudioDataConfig
        from peft_suite.audio.listing import read_layout

        fold = int(task.removeprefix("fold-")) if task.startswith("fold-") else 0
        try:
            listing = read_layout(AudioDataConfig(root=root, format=format, skip_bad=True))
        except DataError as error:
            return str(error)
        if fold and fold not in listing.folds:
            return f"{root!r} has no fold {fold}; it has {', '.join(map(str, listing.folds))}."
        return ""

    return missing


ESC50 = _folded("esc50", "ESC-50, 2,000 clips of 5 s in 50 classes, five folds", "ESC-50", 5)
URBANSOUND8K = _folded(
    "urbansound8k", "UrbanSound8K, 8,732 clips of city sounds in 10 classes, ten folds", "UrbanSound8K", 10
)
SPEECH_COMMANDS = _split("speech-commands", "Speech Commands v2, 35 spoken words of 1 s", "Speech Commands")
FLUENT_SPEECH = _split("fluent-speech", "Fluent Speech Commands, 31 intents of spoken commands", "Fluent Speech")

book = Book("peft_suite.audio", (ESC50, URBANSOUND8K, SPEECH_COMMANDS, FLUENT_SPEECH))
