"""Reading and checking clouds, and the data set that hands them to the loader."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_suite.errors import DataError, MissingExtraError
from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError, fault, parse
from peft_suite.pointcloud.listing import Sample
from peft_suite.pointcloud.sampling import Rule, in_order, oversampled, random_subset, repeated
from peft_suite.pointcloud.transforms import Augment, Preprocess
from peft_suite.train.epochs import EpochDataset
from peft_suite.train.reading import read_all

__all__ = ["CloudDataset", "Reading", "verify"]

Reader = Callable[[Sample], Cloud]


@dataclass(frozen=True)
class Reading:
    """How a sample becomes an array ``[N, 3 + channels]``, the same in every epoch.

    Attributes:
        goal: normalisation, channels, up axis.
        reader: cloud of a sample; None reads ``sample.path``.
        columns, mesh_points, seed, labelled: see :func:`peft_suite.pointcloud.formats.read_cloud`; the seed of a mesh
            depends on its name too.
        resample: "fps" or "random".
        point_all: farthest points that a subset is drawn from; 0 is the usual number.
        rule: of farthest point sampling.
        ordered: bring the points into farthest order and keep ``point_all`` of them.
    """

    goal: Preprocess
    reader: Reader | None = None
    columns: str = ""
    mesh_points: int = 8192
    seed: int = 0
    labelled: bool = False
    resample: str = "fps"
    point_all: int = 0
    rule: Rule = "standard"
    ordered: bool = False

    def cloud(self, sample: Sample) -> Cloud:
        """The checked cloud as it is stored; raises :class:`UnreadableError`."""
        if self.reader is not None:
            cloud = self.reader(sample)
        else:
            seed = zlib.crc32(f"{self.seed}/{sample.name}".encode())
            most = max(self.mesh_points, self.goal.num_points)
            cloud = parse(Path(sample.path), columns=self.columns, mesh_points=most, seed=seed, labelled=self.labelled)
        if reason := fault(cloud.points, self.goal.minimum):
            raise UnreadableError(reason)
        return cloud

    def points(self, sample: Sample) -> Array:
        """``[N, 3 + channels]`` float32, normalised; in farthest order where asked for."""
        return self.sampled(self.goal(self.cloud(sample)))[0]

    def sampled(self, x: Array, *beside: Array) -> tuple[Array, ...]:
        """``x`` and arrays of as many rows, in farthest order where asked for."""
        if self.ordered and self.resample == "fps":
            rows = in_order(x[:, :3], self.goal.num_points, self.most, self.rule)
            return tuple(values[rows] for values in (x, *beside))
        return x, *beside

    @property
    def most(self) -> int:
        """Farthest points that a training cloud's random subset is drawn from."""
        return max(self.point_all or oversampled(self.goal.num_points), self.goal.num_points)


class CloudDataset(EpochDataset):
    """Samples ``(points [num_points, 3 + channels], label)``; with ``targets=False`` just the points.

    Training clouds are drawn and changed by a random generator of (seed, epoch, index); others are the farthest points
    from point 0, always the same ones.

    Args:
        samples: names, labels and places.
        reading: from a sample to all its points.
        cache: the arrays of :meth:`Reading.points`, or None to read them again and again.
        train: draw a random subset of the points.
        augment: changes of the drawn points.
        seed: first part of every sample's random seed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reading: Reading,
        *,
        cache: Sequence[Array] | None = None,
        targets: bool = True,
        train: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.samples, self.reading, self.cache, self.targets = samples, reading, cache, targets
        self.train, self.augment = train, augment or Augment()
        self.ignored = 0
        channels, self.normals = reading.goal.channels, -1
        if "normals" in channels:
            before = channels[: channels.index("normals")]
            self.normals = 3 + sum({"colors": 3, "intensity": 1}[c] for c in before)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        x = self.points(index)
        rng = np.random.default_rng(self.sample_seed(index)) if self.train or self.augment.steps else None
        picked = x[self.rows(x, rng)]
        if rng is not None and self.augment.steps:
            picked = self.augment(picked, rng, self.normals)
        points = torch.from_numpy(np.ascontiguousarray(picked, np.float32))
        return (points, self.samples[index].label) if self.targets else points

    def rows(self, x: Array, rng: np.random.Generator | None) -> Array:
        """Which of all points the network sees, ``[num_points]``."""
        reading, count = self.reading, self.reading.goal.num_points
        if self.train and rng is not None:
            most = reading.most if reading.resample == "fps" else len(x)
            return random_subset(
                x, count, most, rng, ordered=reading.ordered or reading.resample == "random", rule=reading.rule
            )
        if reading.resample == "random":  # one draw for all epochs
            drawn = np.random.default_rng(zlib.crc32(f"{self.seed}/{len(x)}".encode())).permutation(len(x))
            return drawn[repeated(len(x), count)]
        if not reading.ordered:
            x = x[(rows := in_order(x[:, :3], count, count, reading.rule))]
            picks: Array = rows[repeated(len(x), count)]
            return picks
        return repeated(len(x), count)

    def points(self, index: int) -> Array:
        """All points ``[N, 3 + channels]`` of a sample."""
        if self.cache is not None:
            return self.cache[index]
        try:
            return self.reading.points(self.samples[index])
        except UnreadableError as error:
            raise DataError(f"{self.samples[index].name!r} became unreadable during the run: {error}.") from error

    def target(self, index: int) -> Any:
        """The label, without reading the cloud."""
        return self.samples[index].label


def verify(
    samples: Sequence[Sample],
    read: Callable[[Sample], Any],
    split: str,
    *,
    check: bool = True,
    skip: bool = False,
    threads: int = 0,
    cache_bytes: int = 2**30,
) -> tuple[list[Sample], list[Any] | None, list[tuple[str, str]]]:
    """(readable samples, what ``read`` made of them if that is little, [(name, reason)] of the others)."""
    if not check:
        return list(samples), None, []

    def attempt(sample: Sample) -> Any:
        try:
            return read(sample)
        except UnreadableError as error:
            return str(error)
        except (DataError, MissingExtraError):
            raise
        except Exception as error:  # arrays of odd shapes and the like
            return str(error) or type(error).__name__

    return read_all(
        samples,
        attempt,
        split,
        "clouds",
        "clouds cannot be used",
        skip=skip,
        threads=threads,
        cache_bytes=cache_bytes,
    )
