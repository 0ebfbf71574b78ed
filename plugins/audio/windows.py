"""Long recordings: windows that slide over a sound, each classified on its own, with its times.

A sound is resampled as a whole and then cut, so a window is what a clip of these samples would be. Windows start every
``hop`` seconds; the last one is moved back to end with the sound, so nothing is left out and nothing padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_suite.audio.decode import Clip, UnreadableError, decode
from peft_suite.audio.features import Preprocess
from peft_suite.errors import ConfigError, DataError
from peft_suite.train.splitting import refuse_unusable

__all__ = ["Span", "WindowDataset", "cut", "starts_of"]

LONG = 2.0  # times what the network hears: shorter sounds are one clip, as in training
KEPT_BYTES = 2**29


class Span(NamedTuple):
    """A part of a sound: file, start and end in seconds."""

    file: str
    start: float
    end: float


@dataclass(frozen=True)
class _Part:
    file: str
    first: int
    count: int


class WindowDataset(Dataset[Any]):
    """Inputs of the network, one per window; ``spans`` says where each comes from."""

    def __init__(
        self, goal: Preprocess, parts: Sequence[_Part], clips: dict[str, Clip], lengths: dict[str, int]
    ) -> None:
        self.goal, self._parts, self._clips = goal, parts, clips
        self._last: tuple[str, Clip] | None = None
        rate = goal.sample_rate
        self.spans = [
            Span(p.file, round(p.first / rate, 3), round(min(p.first + p.count, lengths[p.file]) / rate, 3))
            for p in parts
        ]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Tensor:
        part, goal = self._parts[index], self.goal
        samples = torch.from_numpy(self._clip(part.file).samples[part.first : part.first + part.count])
        return goal.finish(goal.features(samples))

    def _clip(self, file: str) -> Clip:
        if file in self._clips:
            return self._clips[file]
        if self._last is None or self._last[0] != file:  # windows of a sound follow each other
            try:
                self._last = (file, decode(file, rate=self.goal.sample_rate, channel=self.goal.channel))
            except UnreadableError as error:
                raise DataError(f"{file!r} became unreadable during the run: {error}.") from error
        return self._last[1]


def cut(
    files: Sequence[str], goal: Preprocess, *, window: float | None = None, hop: float = 0.0, skip: bool = False
) -> tuple[WindowDataset, list[tuple[str, str]]]:
    """(windows of all files in order, [(file, reason)] of those that cannot be used).

    Args:
        window: seconds; 0 takes the beginning of every sound as training does; None slides windows of what the network
            hears over sounds that are more than twice as long.
        hop: seconds from one window to the next; 0 is half a window.
        skip: leave unusable files out instead of raising.

    Raises:
        ConfigError: a window longer than what the network hears, or a hop that leaves gaps.
        DataError: unusable files, each with its reason, or none that is usable.
    """
    heard = goal.seconds
    if window is not None and not 0 <= window <= heard + 1e-6:
        raise ConfigError(f"--window {window:g}: this network hears {heard:.2f} s at most. Give 0 to {heard:.2f}.")
    width = window or heard
    if not 0 <= hop <= width:
        raise ConfigError(f"--hop {hop:g}: between windows of {width:g} s it must be above 0 and at most {width:g}.")
    rate = goal.sample_rate
    size, step = round(width * rate), max(1, round((hop or width / 2) * rate))
    parts: list[_Part] = []
    clips: dict[str, Clip] = {}
    lengths: dict[str, int] = {}
    bad: list[tuple[str, str]] = []
    kept = 0
    for file in files:
        try:
            clip = decode(file, rate=rate, channel=goal.channel)
        except UnreadableError as error:
            bad.append((file, str(error)))
            continue
        lengths[file] = len(clip.samples)
        kept += clip.samples.nbytes
        if kept <= KEPT_BYTES:
            clips[file] = clip
        slides = len(clip.samples) > LONG * heard * rate if window is None else bool(window)
        starts = starts_of(len(clip.samples), size, step) if slides else [0]
        parts += [_Part(file, start, size if slides else round(heard * rate)) for start in starts]
    if bad and (not skip or not parts):
        refuse_unusable(bad, len(files), "input", "sounds cannot be used")
    return WindowDataset(goal, parts, clips, lengths), bad


def starts_of(length: int, size: int, step: int) -> list[int]:
    """First samples of windows of ``size`` that cover ``length`` samples."""
    last = max(0, length - size)
    return [min(i * step, last) for i in range(1 + math.ceil(last / step))]
