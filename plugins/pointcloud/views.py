"""One mesh, one class: clouds of a mesh as a scanner sees it, from one half of the view sphere or the other.

``ROOT/*.obj`` (and .ply, .off, .stl). The surface of every mesh is sampled by area once. A view keeps the points that
a z-buffer leaves: points are projected along a random direction onto a grid, and of each cell those within ``depth`` of
the nearest one stay. Training views look from directions with x > 0, test views from x < 0, with more noise and with a
part cut off. Clouds are centred and scaled after all that, so nothing tells how much is hidden.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_suite.config import Config
from peft_suite.errors import DataError
from peft_suite.pointcloud.formats import MESHES, Array, Cloud, UnreadableError
from peft_suite.pointcloud.listing import Listing, Sample, some
from peft_suite.pointcloud.transforms import from_y_up

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["MeshViews", "ViewsConfig", "classes", "read_views", "visible"]


@dataclass(frozen=True)
class ViewsConfig(Config):
    """How mesh-views makes clouds; pairs are (training, test).

    Attributes:
        clouds: views of each mesh; validation clouds are held out of the training ones.
        noise: standard deviation of every coordinate, of an object of radius 1.
        occlusion: up to this share of the visible points is cut off on one side.
        turn: up to so many degrees of rotation about the up axis, either way.
        tilt: views look down or up by at most so many degrees.
        surface: points on the whole surface, of which a view shows about half.
        depth: how far behind the nearest point of its cell a point is still seen.
        frame: "object" keeps the object's axes, "camera" looks along z.
        seed: of the views; ``split_seed`` changes only which of them train.
    """

    clouds: tuple[int, ...] = (40, 20)
    noise: tuple[float, ...] = (0.005, 0.02)
    occlusion: tuple[float, ...] = (0.0, 0.3)
    turn: tuple[float, ...] = (0.0, 15.0)
    tilt: float = 40.0
    surface: int = 16000
    depth: float = 0.06
    frame: str = "object"
    seed: int = 0

    def validate(self) -> None:
        for name in ("clouds", "noise", "occlusion", "turn"):
            value = getattr(self, name)
            self.require(name, len(value) == 2 and min(value) >= 0, "must be two numbers (training, test)")
        self.require("clouds", min(self.clouds) > 0, "must be at least 1")
        self.require("occlusion", max(self.occlusion) < 0.9, "must be below 0.9")
        self.require("tilt", 0 <= self.tilt <= 90, "must be between 0 and 90 degrees")
        self.require("surface", self.surface >= 1000, "must be at least 1000")
        self.require("depth", self.depth > 0, "must be above 0")
        self.require("frame", self.frame in ("object", "camera"), "must be object or camera")


def classes(config: PointDataConfig) -> tuple[str, ...]:
    """The names of the meshes."""
    return config.classes or tuple(p.stem for p in _meshes(config))


def read_views(config: PointDataConfig) -> Listing:
    """Training and test views of every mesh. With ``skip_bad``, meshes that cannot be read are left out.

    Raises:
        DataError: no meshes, two of one name, or a mesh that cannot be read.
    """
    files = _meshes(config)
    names = classes(config)
    by_name = {p.stem: p for p in files}
    if lost := [n for n in names if n not in by_name]:
        raise DataError(f"{config.root!r} has no mesh for the classes {some(lost)}. There is: {some(sorted(by_name))}.")
    views = config.views
    key = hashlib.sha256(views.to_json().encode()).hexdigest()[:8]
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for label, name in enumerate(names):
        for split, count in zip(splits, views.clouds, strict=True):
            splits[split] += [
                Sample(f"{by_name[name].name}/{split}-{key}/{i:04d}", label, str(by_name[name]), i)
                for i in range(count)
            ]
    readers = {split: MeshViews(views, split, config.up) for split in splits}
    readers["test"].surfaces = readers["train"].surfaces
    return Listing(names, splits, layout="mesh-views", readers=dict(readers), notes={"views": views.to_dict()})


class MeshViews:
    """The cloud of a view: ``sample.path`` is the mesh, ``sample.row`` the number of the view."""

    def __init__(self, config: ViewsConfig, split: str, up: str) -> None:
        self.config, self.split, self.up = config, split, "xyz".index(up)
        self.surfaces: dict[str, tuple[Array, Array]] = {}  # points and normals of radius 1

    def __call__(self, sample: Sample) -> Cloud:
        c, test = self.config, self.split == "test"
        points, normals = self._surface(sample.path)
        rng = np.random.default_rng([c.seed, test, sample.row, *Path(sample.path).stem.encode()])
        azimuth = rng.uniform(-90, 90) + 180 * test
        elevation = math.degrees(math.asin(rng.uniform(-1, 1) * math.sin(math.radians(c.tilt))))
        toward = _direction(math.radians(azimuth), math.radians(elevation), self.up)
        rows = visible(points, toward, c.depth, normals)
        if c.occlusion[test] > 0:
            height = points[rows] @ rng.standard_normal(3)
            rows = rows[height <= np.quantile(height, 1 - rng.uniform(0, c.occlusion[test]))]
        turn = _turn(math.radians(rng.uniform(-1, 1) * c.turn[test]), self.up)
        frame = turn if c.frame == "object" else np.stack(_axes(toward, self.up), 1) @ from_y_up("xyz"[self.up])
        seen = points[rows] @ frame + rng.normal(0, c.noise[test], (len(rows), 3))
        return Cloud(seen.astype(np.float32), (normals[rows] @ frame).astype(np.float32))

    def _surface(self, path: str) -> tuple[Array, Array]:
        if path not in self.surfaces:
            from peft_suite.pointcloud.formats import parse

            cloud = parse(Path(path), mesh_points=self.config.surface, seed=self.config.seed)
            if cloud.normals is None or len(cloud.points) != self.config.surface:
                raise UnreadableError(f"a mesh without faces ({len(cloud.points)} vertices)")
            points = cloud.points - cloud.points.mean(0)
            self.surfaces[path] = points / np.linalg.norm(points, axis=1).max(), cloud.normals.astype(np.float64)
        return self.surfaces[path]


def visible(points: Array, toward: Sequence[float] | Array, depth: float, normals: Array | None = None) -> Array:
    """Indices of the points ``[N, 3]`` that a far viewer in the direction ``toward`` sees.

    In each cell of a grid across the view, those at most ``depth`` behind the nearest one. The cell's side follows the
    number of points. With ``normals`` [N, 3] of either sign, points of a slanted surface may lie behind by what the
    slant makes up across a cell, or else steep sides would come out in stripes.
    """
    right, up, out = _axes(np.asarray(toward, np.float64), 1)
    across = np.stack([points @ right, points @ up], 1)
    near = points @ out
    side = (
        3.5 * (np.ptp(across, axis=0).max() + 1e-9) / math.sqrt(len(points))
    )  # four points of a ball's front in a cell
    grid = ((across - across.min(0)) / side).astype(np.int64)
    where = grid[:, 0] * (int(grid[:, 1].max()) + 1) + grid[:, 1]
    front = np.full(int(where.max()) + 1, -np.inf)
    np.maximum.at(front, where, near)
    slack: Array | float = depth
    if normals is not None:
        facing = np.abs(normals @ out).clip(0.35, 1)
        slack = depth + side * np.sqrt(1 - facing**2) / facing
    rows: Array = np.flatnonzero(near >= front[where] - slack)
    return rows


def _meshes(config: PointDataConfig) -> list[Path]:
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root = {config.root!r} is not a folder of meshes.")
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in MESHES)
    if not files:
        raise DataError(f"{config.root!r} holds no mesh ({', '.join(MESHES)}); mesh-views needs one per class.")
    stems = [p.stem for p in files]
    if twice := sorted({s for s in stems if stems.count(s) > 1}):
        raise DataError(f"{config.root!r} has two meshes named {some(twice)}; every file is a class. Rename one.")
    if not config.skip_bad:
        return files
    from peft_suite.pointcloud.formats import parse

    good = []
    for file in files:
        try:
            if parse(file, mesh_points=1000).normals is not None:
                good.append(file)
        except UnreadableError:
            continue
    return good


def _direction(azimuth: float, elevation: float, up: int) -> Array:
    """A unit vector; azimuth 0 is the axis after ``up`` (x for y up, z up)."""
    flat = [i for i in range(3) if i != up]
    vector = np.zeros(3)
    vector[flat[0]] = math.cos(elevation) * math.cos(azimuth)
    vector[flat[1]] = math.cos(elevation) * math.sin(azimuth)
    vector[up] = math.sin(elevation)
    return vector


def _axes(toward: Array, up: int) -> tuple[Array, Array, Array]:
    """Right, up and out of the picture for a viewer in the direction ``toward``."""
    out = toward / np.linalg.norm(toward)
    help_ = np.eye(3)[up] if abs(out[up]) < 0.99 else np.eye(3)[(up + 1) % 3]
    right = np.cross(help_, out)
    right /= np.linalg.norm(right)
    return right, np.cross(out, right), out


def _turn(angle: float, up: int) -> Array:
    a, b = (i for i in range(3) if i != up)
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = math.sin(angle), -math.sin(angle)
    return matrix
