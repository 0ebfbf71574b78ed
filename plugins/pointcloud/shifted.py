"""The demo's data, "solids-shifted": furniture and tools that the embedded backbone has never seen, as a poor scan.

Ten classes of :data:`peft_suite.pointcloud.shapes.TARGET`. Of every solid, one side is missing, its points are noisy,
and it stands turned about the up axis. Nothing is stored: cloud number i of a split is made by a generator that depends
on the split, the class and i alone. The seed of a run chooses which clouds of the pool train.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from peft_suite.pointcloud.formats import Array, Cloud
from peft_suite.pointcloud.listing import Listing, Sample, named
from peft_suite.pointcloud.shapes import TARGET, target_cloud
from peft_suite.pointcloud.solids import rotation

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["NAME", "SIZES", "classes", "read_shifted", "scan", "shifted_cloud"]

NAME = "solids-shifted"
SIZES = {"train": 40, "val": 10, "test": 40}  # clouds of each class
POINTS = 1400  # of a whole solid
HIDDEN = (0.15, 0.4)  # share of the points that is missing on one side
NOISE = (0.01, 0.03)  # of a solid of radius 1
_EDITION = 1  # part of every name, so that another way to make clouds has another fingerprint


def classes(config: PointDataConfig) -> tuple[str, ...]:
    """The solids' names."""
    return named(config, tuple(TARGET), NAME)


def read_shifted(config: PointDataConfig) -> Listing:
    """Every cloud of every split."""
    splits = {
        split: [
            Sample(f"{name}/{split}-{_EDITION}/{i:03d}", label, row=i)
            for label, name in enumerate(TARGET)
            for i in range(size)
        ]
        for split, size in SIZES.items()
    }
    readers = {split: functools.partial(_read, split) for split in splits}
    return Listing(classes(config), splits, layout=NAME, readers=dict(readers))


def _read(split: str, sample: Sample) -> Cloud:
    return Cloud(shifted_cloud(split, sample.label, sample.row))


@functools.cache
def shifted_cloud(split: str, label: int, number: int) -> Array:
    """Cloud ``number`` of a class and a split, ``[N, 3]`` float32 with 840 <= N <= 1190; the same on every call."""
    rng = np.random.default_rng([*split.encode(), label, number, _EDITION])
    points = scan(target_cloud(tuple(TARGET)[label], POINTS, rng), rng).astype(np.float32)
    points.flags.writeable = False  # every caller gets this one
    return points


def scan(points: Array, rng: np.random.Generator) -> Array:
    """What a poor scan leaves of a solid of radius 1: a side cut off, turned about y, noise."""
    side = rng.standard_normal(3) * (1, 0.5, 1)
    height = points @ side
    seen = points[height <= np.quantile(height, 1 - rng.uniform(*HIDDEN))]
    turned: Array = seen @ rotation(1, math.degrees(rng.uniform(0, 2 * math.pi)))
    return turned + rng.normal(0, rng.uniform(*NOISE), turned.shape)
