"""Decoding and checking images, and the data set that hands them to the loader."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from peft_suite.errors import DataError
from peft_suite.train.epochs import EpochDataset
from peft_suite.train.reading import read_all
from peft_suite.vision.lists import Sample
from peft_suite.vision.transforms import (
    Preprocess,
    StandardAugment,
    crop_augment,
    erase,
    light_augment,
    resized_crop_augment,
    to_rgb,
)

__all__ = ["ImageDataset", "Opener", "decode", "verify"]

CACHE_BYTES = 256 * 2**20

AUGMENTS = {"light": light_augment, "crop": crop_augment, "resized-crop": resized_crop_augment}

Opener = Callable[[Sample], Image.Image]
Pixels = np.ndarray[Any, Any]


class ImageDataset(EpochDataset):
    """Samples ``(image [3, H, W], target)``; with ``targets=None`` just the image.

    Args:
        samples: names, labels and places.
        goal: size and normalisation.
        targets: number of classes for 0/1 vectors, 0 for an index, None for no target.
        augment: "none", a key of ``AUGMENTS``, or "standard" (with ``standard`` given).
        erase: probability that noise covers a part of an augmented image.
        seed: first part of every sample's random seed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        goal: Preprocess,
        targets: int | None,
        *,
        opener: Opener | None = None,
        cache: Sequence[Pixels] | None = None,
        augment: str = "none",
        standard: StandardAugment | None = None,
        hflip: float = 0.0,
        erase: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.samples, self.goal, self.targets = samples, goal, targets
        self.opener, self.cache = opener, cache
        self.augment, self.standard, self.hflip, self.erase = augment, standard, hflip, erase
        self.ignored = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        image = self.image(index)
        if self.standard is not None:
            pixels = self.standard(image, self.sample_seed(index))
        elif self.augment in AUGMENTS:
            rng = random.Random(self.sample_seed(index))
            pixels = self.goal.tensor(AUGMENTS[self.augment](image, self.goal, self.hflip, rng))
            pixels = erase(pixels, self.erase, rng) if self.erase else pixels
        else:
            pixels = self.goal(image)
        return pixels if self.targets is None else (pixels, self.target(index))

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image, before any resizing."""
        if self.cache is not None:
            return Image.fromarray(self.cache[index])
        try:
            return decode(self.samples[index], self.opener)
        except Exception as error:
            raise DataError(f"{self.samples[index].name!r} became unreadable during the run: {error}.") from error

    def target(self, index: int) -> Any:
        labels = self.samples[index].labels
        if not self.targets:
            return labels[0]
        vector = torch.zeros(self.targets)
        vector[list(labels)] = 1.0
        return vector


def decode(sample: Sample, opener: Opener | None) -> Image.Image:
    if opener is not None:
        return to_rgb(opener(sample))
    with Image.open(sample.path) as image:
        image.load()
        return to_rgb(image)


def _check_one(sample: Sample, opener: Opener | None) -> Pixels | str:
    """The pixels ``[H, W, 3]``, or what is wrong with the file."""
    try:
        if opener is None:
            with Image.open(sample.path) as image:
                image.verify()  # checksums, where the format has them; the file must be opened again to decode
        return np.asarray(decode(sample, opener))
    except FileNotFoundError:
        return "the file does not exist"
    except Exception as error:
        return str(error).split(" <_io")[0].split(" '")[0] or type(error).__name__


def verify(
    samples: Sequence[Sample], opener: Opener | None, split: str, *, check: bool = True, skip: bool = False
) -> tuple[list[Sample], list[Any] | None, list[tuple[str, str]]]:
    """(readable samples, their pixels if these are few, [(name, reason)] of the others)."""
    if not check:
        return list(samples), None, []
    return read_all(
        samples,
        lambda sample: _check_one(sample, opener),
        split,
        "images",
        "images cannot be read",
        skip=skip,
        threads=1 if opener is not None else 0,
        cache_bytes=CACHE_BYTES,
    )
