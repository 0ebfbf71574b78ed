"""Training samples of a denoiser: an image, drawn noise, a drawn timestep, the condition.

All that is drawn of a sample depends on (seed, epoch, index) alone, in a fixed order, so that a resumed run sees the
same samples whatever the number of workers. Validation draws once and for all, with timesteps spread evenly over the
images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_suite.diffusion import schedules
from peft_suite.diffusion.schedules import Schedule
from peft_suite.train.epochs import EpochDataset

__all__ = ["Clean", "Draws", "Noise", "Pairs"]

GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly


@dataclass(frozen=True)
class Noise:
    """How noise and timesteps are drawn, and errors weighted; see :mod:`peft_suite.diffusion.schedules`."""

    schedule: Schedule
    density: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    snr_gamma: float = 0.0
    weighting: str = "none"
    precondition: bool = False
    offset: float = 0.0
    perturbation: float = 0.0

    def index(self, u: Tensor) -> Tensor:
        """Index of the timestep of a number in [0, 1)."""
        return schedules.index_of(self.schedule, u, self.density, mean=self.mean, std=self.std, scale=self.scale)

    def weight(self, index: Tensor) -> Tensor:
        """Of the squared error."""
        return schedules.weight(
            self.schedule,
            index,
            snr_gamma=self.snr_gamma,
            weighting=self.weighting,
            precondition=self.precondition,
        )


@dataclass(frozen=True)
class Clean:
    """What a sample is before noise: ``values`` ``[C, H, W]`` (pixels or latents) and facts for the condition.

    ``size`` are original size, crop corner and target size, as SDXL reads them.
    """

    values: Tensor
    size: tuple[int, int, int, int, int, int]


class Draws(EpochDataset):
    """Samples ``(inputs, target)`` for :class:`peft_suite.diffusion.denoising.Denoising`.

    Args:
        samples: of :mod:`peft_suite.diffusion.listing`.
        clean: ``clean(position, generator or None) -> Clean``; without a generator nothing about the image is random.
        condition: ``condition(sample, generator or None) -> inputs`` of the denoiser besides sample and timestep.
        drop: share of training samples that get ``condition(None, None)`` instead.
        group: of a position, see :class:`peft_suite.train.DataSplits`.
        train: draw anew in every epoch.
        repeats: how often every image counts in an epoch.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        clean: Callable[[int, torch.Generator | None], Clean],
        condition: Callable[[Any, Clean, torch.Generator | None], Mapping[str, Tensor]],
        noise: Noise,
        *,
        train: bool,
        drop: float = 0.0,
        groups: Sequence[Hashable] | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.samples, self.clean, self.condition, self.noise = samples, clean, condition, noise
        self.train, self.drop, self.repeats = train, drop, repeats
        if groups is not None:  # the loop asks whether there is such an attribute
            self.group = functools.partial(_group, tuple(groups))

    def __len__(self) -> int:
        return len(self.samples) * self.repeats

    def target(self, index: int) -> int:
        """Class of a sample, without reading it."""
        return int(self.samples[index % len(self.samples)].label)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(self.sample_seed(index))
        position = index % len(self.samples)
        sample = self.samples[position]
        clean = self.clean(position, draw if self.train else None)
        z = clean.values
        u = torch.rand((), generator=draw) if self.train else torch.tensor((0.5 + index * GOLDEN) % 1)
        noise = torch.randn(z.shape, generator=draw)
        noise = noise + self.noise.offset * torch.randn(len(z), 1, 1, generator=draw)
        index_t = self.noise.index(u)
        schedule = self.noise.schedule
        added = noise
        if self.noise.perturbation and self.train:
            added = noise + self.noise.perturbation * torch.randn(z.shape, generator=draw)
        dropped = self.train and float(torch.rand((), generator=draw)) < self.drop
        place = index_t / max(schedule.steps - 1, 1)
        inputs = {
            "sample": schedules.noisy(schedule, z, added, index_t),
            "timestep": schedules.model_timestep(schedule, index_t),
            **self.condition(None if dropped else sample, clean, draw if self.train else None),
        }
        goal = {
            "target": schedules.target(schedule, z, noise, index_t),
            "weight": self.noise.weight(index_t),
            "label": torch.tensor(sample.label),
            "level": 1 - place if schedule.family == "flow" else place,
        }
        return inputs, goal


def _group(groups: Sequence[Hashable], index: int) -> Hashable:
    return groups[index % len(groups)]


class Pairs(Dataset[Any]):
    """Prior preservation (DreamBooth, Ruiz et al., CVPR 2023): sample i is instance i with a class image beside it.

    Every tensor is ``[2, ...]``, the instance first; the class image's error counts ``weight`` times. Class images are
    taken in turn, one epoch after the other.
    """

    def __init__(self, instances: Draws, classes: Draws, weight: float) -> None:
        self.instances, self.classes, self.weight = instances, classes, weight
        self.samples = instances.samples
        if hasattr(instances, "group"):
            self.group = instances.group

    def set_epoch(self, epoch: int) -> None:
        """Of both."""
        self.instances.set_epoch(epoch)
        self.classes.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.instances)

    def target(self, index: int) -> int:
        """Class of the instance."""
        return self.instances.target(index)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        epoch = int(self.instances._epoch.item())
        other = (epoch * len(self.instances) + index) % len(self.classes)
        (x, y), (x0, y0) = self.instances[index], self.classes[other]
        y0["weight"] = y0["weight"] * self.weight
        return ({k: torch.stack((x[k], x0[k])) for k in x}, {k: torch.stack((y[k], y0[k])) for k in y})
