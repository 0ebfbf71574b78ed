"""One cloud of the viewer: its points on the page, what the network takes of them, and traces of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_suite import kernels
from peft_suite.errors import DataError, closest
from peft_suite.pointcloud.clouds import CloudDataset, Reading
from peft_suite.pointcloud.formats import EXTENSIONS, Array, Cloud, UnreadableError
from peft_suite.pointcloud.listing import Sample
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.partlabels import LabelledReader, Parts
from peft_suite.pointcloud.view_page import Picture, Scene, Trace, by_value, scatter

__all__ = ["HOVER", "Look", "Shown"]

HOVER = "point %{customdata}: %{text}"
Z_UP = (".las", ".laz", ".bin")  # scans, where nobody says otherwise


@dataclass(frozen=True)
class Look:
    """How clouds are read and drawn; see :class:`peft_suite.pointcloud.view.Viewer`. ``model``: there is one."""

    reading: Reading
    grouping: Grouping
    points: int
    up: str
    model: bool


class Shown:
    """One cloud on its way to the page.

    Attributes:
        cloud: as the file has it.
        rows: of the file, which are drawn, [n].
        placed: coordinates on the page of all points, [N, 3]; ``points`` are those of ``rows``.
    """

    def __init__(self, look: Look, file: str, name: str) -> None:
        self.look, self.file, self.name = look, file, name
        self.sample = Sample(file, 0, file)
        kind = Path(file).suffix.lower()
        if kind not in EXTENSIONS:
            raise DataError(
                f"{file!r} has the unknown extension {kind!r}. {closest(kind, EXTENSIONS, 20)} Convert it to one of "
                "these."
            )
        try:
            self.cloud: Cloud = look.reading.cloud(self.sample)
        except UnreadableError as error:
            raise DataError(f"{file!r} cannot be shown: {error}. Repair it or leave it out.") from error
        self.rows = self.limited(len(self.cloud.points))
        self.up = look.up or ("z" if kind in Z_UP else "y")
        low, high = self.cloud.points.min(0).astype(np.float64), self.cloud.points.max(0).astype(np.float64)
        extent = float((high - low).max()) or 1.0
        far = np.abs(np.concatenate([low, high])).max() > 1000 * extent  # the page computes in float32
        self.offset = np.floor((low + high) / 2) if far else np.zeros(3)
        digits = max(0, 4 - math.floor(math.log10(extent)))
        self.placed: Array = np.round(self.cloud.points.astype(np.float64) - self.offset, digits)  # [N, 3]

    @property
    def points(self) -> Array:
        """The points that are drawn, [n, 3]."""
        shown: Array = self.placed[self.rows]
        return shown

    @cached_property
    def whole(self) -> Tensor:
        """All points as the network would see them, [1, N, 3 + C]."""
        try:
            return torch.from_numpy(self.look.reading.goal(self.cloud))[None]
        except UnreadableError as error:
            raise DataError(f"{self.file!r}: {error}. Give clouds like those that the model was trained on.") from error

    @cached_property
    def seen(self) -> Tensor:
        """The network's input, [1, n, 3 + C]."""
        reading = self.look.reading
        (ordered,) = reading.sampled(self.whole[0].numpy())
        points: Tensor = CloudDataset([self.sample], reading, cache=[ordered], targets=False)[0]
        return points[None]

    @cached_property
    def geometry(self) -> Geometry:
        geometry: Geometry = self.look.grouping(self.seen)
        return geometry

    @cached_property
    def seen_rows(self) -> Array:
        """Which rows of the file the network's points are, [n]."""
        found = kernels.knn(self.seen[..., :3].contiguous(), self.whole[..., :3].contiguous(), 1, return_dists=False)
        rows: Array = found.idx[0, :, 0].numpy()
        return rows

    @property
    def center_rows(self) -> Array:
        """Which rows of the file the centres are, [G]."""
        rows: Array = self.seen_rows[self.geometry.picks[0].numpy()]
        return rows

    def nearest(self, targets: Tensor) -> Tensor:
        """For every point of the file the nearest of ``targets [1, M, 3]``: [N]."""
        near = kernels.knn(self.whole[..., :3].contiguous(), targets.contiguous(), 1, return_dists=False)
        return near.idx[0, :, 0]

    def limited(self, count: int) -> Array:
        """Which of ``count`` points are drawn."""
        most = self.look.points
        if count <= most:
            return np.arange(count)
        return np.sort(np.random.default_rng(0).choice(count, most, replace=False))

    def require_groups(self) -> None:
        """Refuse a cloud that cannot fill one patch."""
        count, size = len(self.cloud.points), self.look.grouping.size
        if count < size:
            more = "Give a cloud with more points." if self.look.model else "Lower --group-size, or --show points."
            raise DataError(f"{self.file!r} has {count} points, and one group needs {size}. {more}")

    def truth(self, category: str, own: Sequence[int], names: Sequence[str]) -> tuple[Array | None, str]:
        """(the file's labels as places in ``own``, -1 for none, or None, why labels that it has are not used)."""
        labels = self.cloud.labels
        if labels is None:
            reading = self.look.reading
            try:
                found = LabelledReader(reading.columns, reading.mesh_points)(self.sample)
            except UnreadableError:
                return None, ""
            labels = found.labels if len(found.points) == len(self.cloud.points) else None
        if labels is None or (labels < 0).all():
            return None, ""
        last = [name.rpartition("/")[2] for name in names]
        spelled = [int(word) for word in last] if all(map(str.isdecimal, last)) else list(range(len(own)))
        for codes in (spelled, list(own)):  # what the files of one's own data say, and those of ShapeNetPart
            order = np.argsort(codes)
            parts = Parts((), (category,), (tuple(order.tolist()),), (tuple(sorted(codes)),))
            try:
                return parts.encode(labels, 0), ""
            except UnreadableError:
                continue
        some = ", ".join(map(str, np.unique(labels)[:6].tolist()))
        return None, f"The labels of the file ({some}) are not those of {category!r}, so they are not shown."

    def plain_traces(self) -> tuple[list[Trace], str]:
        """The points in their own colours, or by height; and which of these."""
        labels = self.cloud.labels
        more: Trace = {} if labels is None else {"text": [f"label {i}" for i in labels[self.rows].tolist()]}
        hover = "point %{customdata}" if labels is None else HOVER
        if self.cloud.colors is not None:
            levels = (self.cloud.colors[self.rows] * 255).round().clip(0, 255).astype(int)
            colors = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in levels.tolist()]
            return [scatter(self.points, self.rows, colors, hover, meta="points", **more)], "in their own colours"
        height = self.points[:, "xyz".index(self.up)]
        return [by_value(self.points, self.rows, height, self.up, hover, meta="points", **more)], "coloured by height"

    def centers(self, colors: Any, text: Sequence[str], **more: Any) -> Trace:
        """The centres as large markers."""
        rows = self.center_rows
        trace = scatter(
            self.placed[rows],
            rows,
            colors,
            "%{text} (point %{customdata})",
            size=9,
            text=list(text),
            meta="centers",
            **more,
        )
        trace["marker"]["line"] = {"width": 1, "color": "#222222"}
        return trace

    def patch_scene(self, values: Array, name: str, title: str, *, diverging: bool = False) -> Scene:
        """A number for every patch, ``[G]``, at the centres and at the points nearest to each."""
        near = self.nearest(self.geometry.centers)[self.rows].numpy()  # [n]
        limit = max(float(np.abs(values).max()), 1e-12)
        ends = {"cmin": -limit, "cmax": limit} if diverging else {"cmin": 0.0, "cmax": limit}
        text = [f"patch {g}, {values[g]:.4g}" for g in range(len(values))]
        points = by_value(
            self.points,
            self.rows,
            values[near],
            name,
            HOVER,
            diverging=diverging,
            text=[f"nearest is {text[g]}" for g in near],
            meta="points",
            **ends,
        )
        style = {k: v for k, v in points["marker"].items() if k in ("colorscale", "cmin", "cmax")}
        centers = self.centers([float(f"{v:.4g}") for v in values.tolist()], text, marker=style)
        return Scene(title, [points, centers])

    def picture(
        self,
        view: str,
        title: str,
        scenes: list[Scene],
        facts: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        drawn: int | None = None,
    ) -> Picture:
        """With what holds for every view."""
        total, notes = len(self.cloud.points), list(notes)
        told = {"file": self.file, "points": f"{total:,}", **(facts or {})}
        if drawn is None and len(self.rows) < total:
            notes.append(f"{len(self.rows):,} of {total:,} points are drawn, chosen at random (--points).")
        if self.offset.any():
            x, y, z = (f"{v:,.0f}" for v in self.offset)
            notes.append(f"Coordinates are those of the file minus ({x}, {y}, {z}).")
        if view not in ("points", "classes") and total < self.look.reading.goal.num_points:
            notes.append(f"The network takes {self.look.reading.goal.num_points:,} points, so some come several times.")
        return Picture(self.name, view, title, scenes, told, notes, self.up)
