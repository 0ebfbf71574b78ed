"""The demo's data, "sounds-shifted": sounds that the embedded backbone has never heard, in a noisy room.

Ten classes of :data:`peft_suite.audio.synth.TARGET`, with reverberation and, at 0 to 15 dB below them, background
noise. Nothing is stored: sound number i of a split is made by a generator that depends on the split, the class and i
alone. The seed of a run chooses which sounds of the pool train.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from peft_suite.audio.decode import Clip
from peft_suite.audio.listing import Listing, Sample, named
from peft_suite.audio.synth import RATE, SIZE, TARGET, TIME, Array, levelled, noise

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["NAME", "SIZES", "read_shifted", "room", "shifted_sound"]

NAME = "sounds-shifted"
SIZES = {"train": 40, "val": 10, "test": 40}  # sounds of each class
NOISE = (0.0, 15.0)  # dB between sound and background
REVERBERATION = (0.2, 0.8)  # seconds until the room is 60 dB quieter
TAIL = (0.1, 0.6)  # energy of what the room adds, of a sound of 1
_EDITION = 1  # part of every name, so that another way to make sounds has another fingerprint


def read_shifted(config: AudioDataConfig) -> Listing:
    """Every sound of every split."""
    classes = named(config, tuple(TARGET))
    splits = {
        split: [
            Sample(f"{name}/{split}-{_EDITION}/{i:03d}", (label,), "", row=i)
            for label, name in enumerate(classes)
            for i in range(size)
        ]
        for split, size in SIZES.items()
    }
    readers = {split: functools.partial(_read, split, classes) for split in splits}
    return Listing(classes, splits, NAME, readers=dict(readers))


def _read(split: str, classes: tuple[str, ...], sample: Sample) -> Clip:
    samples = shifted_sound(split, classes[sample.label], sample.row)
    return Clip(samples, RATE, len(samples) / RATE)


@functools.cache
def shifted_sound(split: str, name: str, number: int) -> Array:
    """Sound ``number`` of a class and a split, float32 ``[16000]``; the same on every call."""
    rng = np.random.default_rng([*split.encode(), *name.encode(), number, _EDITION])
    samples = levelled(room(TARGET[name](rng), rng), rng)
    samples.flags.writeable = False  # every caller gets this one
    return samples


def room(x: Array, rng: np.random.Generator) -> Array:
    """``x * h + n``: what a microphone in a noisy room hears of a sound ``[16000]``.

    The impulse response h is 1, then noise that decays exponentially; n has a random colour.
    """
    tail = rng.standard_normal(SIZE) * 10 ** (-3 * TIME / rng.uniform(*REVERBERATION))
    tail[0] = 0
    tail *= np.sqrt(rng.uniform(*TAIL) / np.square(tail).sum())
    tail[0] = 1
    heard = np.fft.irfft(np.fft.rfft(x, 2 * SIZE) * np.fft.rfft(tail, 2 * SIZE))[:SIZE]
    loudness = np.sqrt(np.square(heard).mean()) * 10 ** (-rng.uniform(*NOISE) / 20)
    result: Array = heard + loudness * noise(rng, rng.uniform(-1, 0))
    return result
