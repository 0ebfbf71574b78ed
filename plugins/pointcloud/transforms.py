"""From a cloud to the array that the backbone expects, and random changes of it for training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from peft_suite.config import parse_shorthand
from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError

__all__ = ["AUGMENTS", "CHANNELS", "PUBLISHED", "Augment", "Preprocess", "from_y_up", "parse_augment", "thumbnail_png"]

CHANNELS = {"normals": 3, "colors": 3, "intensity": 1}
NORMALIZE = ("unit-sphere", "unit-cube", "none")
UP = ("x", "y", "z")
_TURN = {  # to y up, [x, y, z] @ matrix
    "x": np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
    "z": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
}


@dataclass(frozen=True)
class Preprocess:
    """The backbone's input: ``[num_points, 3 + channels]``, normalised, with y up.

    ``normalize``: "unit-sphere" takes the mean to 0 and the farthest point to distance 1; "unit-cube" the middle of the
    bounding box to 0 and its longest side to 2 (coordinates from -1 to 1); "none" changes nothing.
    ``up`` is the axis that points up in the files. ``min_points``: clouds with fewer are refused; 0 stands for
    ``group_size``.
    """

    num_points: int = 1024
    normalize: str = "unit-sphere"
    up: str = "y"
    channels: tuple[str, ...] = ()
    group_size: int = 32
    groups: int = 1
    min_points: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read what :meth:`Backbones.preprocessing` or :meth:`to_dict` wrote; missing keys take defaults.

        Raises:
            DataError: a description that this plugin cannot serve.
        """
        result = cls(
            int(values.get("num_points", 1024)),
            str(values.get("normalize", "unit-sphere")),
            str(values.get("up", "y")),
            tuple(values.get("channels", ())),
            int(values.get("group_size", 32)),
            int(values.get("groups", 1)),
            int(values.get("min_points", 0)),
        )
        for name, value, choices in (("normalize", result.normalize, NORMALIZE), ("up", result.up, UP)):
            if value not in choices:
                raise DataError(f"Preprocessing {name} = {value!r}: choose one of {', '.join(choices)}.")
        if unknown := [c for c in result.channels if c not in CHANNELS]:
            raise DataError(f"Preprocessing channel {unknown[0]!r}: choose from {', '.join(CHANNELS)}.")
        if result.num_points < max(1, result.group_size, result.groups):
            raise DataError(
                f"num_points = {result.num_points}: the backbone makes {result.groups} groups of {result.group_size} "
                f"points. Take at least {max(result.group_size, result.groups)} (data.num_points)."
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form that :meth:`from_dict` reads."""
        return {**vars(self), "channels": list(self.channels), "input_size": [self.num_points, self.width]}

    def override(self, **fields: Any) -> Preprocess:
        """A copy with the fields that a data configuration sets; empty values keep what the backbone says."""
        return self.from_dict({**replace(self, **{k: v for k, v in fields.items() if v}).to_dict()})

    @property
    def width(self) -> int:
        """Numbers per point."""
        return 3 + sum(CHANNELS[c] for c in self.channels)

    @property
    def minimum(self) -> int:
        """Points that a cloud must have."""
        return self.min_points or self.group_size

    def __call__(self, cloud: Cloud) -> Array:
        """All points of a cloud as ``[N, 3 + channels]`` float32.

        Raises:
            UnreadableError: a channel that the cloud does not have.
        """
        points = cloud.points
        if self.normalize == "unit-sphere":
            points = points - points.mean(0, dtype=np.float64)
            points = points / max(math.sqrt(np.einsum("nd,nd->n", points, points).max()), 1e-12)
        elif self.normalize == "unit-cube":
            low, high = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
            points = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-12)
        columns = [points if self.up == "y" else points @ _TURN[self.up]]
        for channel in self.channels:
            values = getattr(cloud, channel)
            if values is None:
                have = [c for c in CHANNELS if getattr(cloud, c) is not None]
                raise UnreadableError(f"it has no {channel} (channels there: {', '.join(have) or 'none'})")
            if channel == "normals" and self.up != "y":
                values = values @ _TURN[self.up]
            columns.append(values if values.ndim == 2 else values[:, None])
        return np.concatenate(columns, 1, dtype=np.float32)


def from_y_up(up: str) -> Array:
    """The matrix M for which ``p @ M`` has ``up`` up where p has y up."""
    matrix: Array = np.eye(3) if up == "y" else _TURN[up].T
    return matrix


class Change(Protocol):
    """``x [n, 3 + channels]`` and where normals begin (-1: there are none) to an array of the same shape."""

    def __call__(self, x: Array, rng: np.random.Generator, normals: int, /, **ranges: float) -> Array: ...


def scale_translate(
    x: Array, rng: np.random.Generator, normals: int, /, *, low: float = 2 / 3, high: float = 3 / 2, shift: float = 0.2
) -> Array:
    """Every axis scaled by U[low, high] and moved by U[-shift, shift], each cloud on its own."""
    factor, offset = rng.uniform(low, high, 3), rng.uniform(-shift, shift, 3)
    x[:, :3] = x[:, :3] * factor + offset
    if normals >= 0:  # they follow the inverse of the scale
        turned = x[:, normals : normals + 3] / factor
        x[:, normals : normals + 3] = turned / np.linalg.norm(turned, axis=1, keepdims=True).clip(1e-12)
    return x


def scale(x: Array, rng: np.random.Generator, normals: int, /, *, low: float = 0.9, high: float = 1.1) -> Array:
    """All axes scaled by one U[low, high]."""
    x[:, :3] *= np.float32(rng.uniform(low, high))
    return x


def translate(x: Array, rng: np.random.Generator, normals: int, /, *, shift: float = 0.1) -> Array:
    """Every axis moved by U[-shift, shift]."""
    x[:, :3] += rng.uniform(-shift, shift, 3).astype(np.float32)
    return x


def rotate(x: Array, rng: np.random.Generator, normals: int, /, *, degrees: float = 360.0) -> Array:
    """Turned about the up axis by U[-degrees/2, degrees/2]: p R with R = [[c, 0, s], [0, 1, 0], [-s, 0, c]]."""
    angle = math.radians(rng.uniform(-degrees / 2, degrees / 2))
    c, s = math.cos(angle), math.sin(angle)
    matrix = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
    x[:, :3] = x[:, :3] @ matrix
    if normals >= 0:
        x[:, normals : normals + 3] = x[:, normals : normals + 3] @ matrix
    return x


def jitter(x: Array, rng: np.random.Generator, normals: int, /, *, sigma: float = 0.01, clip: float = 0.05) -> Array:
    """Every coordinate moved by N(0, sigma), at most ``clip``."""
    x[:, :3] += (rng.standard_normal((len(x), 3), np.float32) * np.float32(sigma)).clip(-clip, clip)
    return x


def drop(x: Array, rng: np.random.Generator, normals: int, /, *, most: float = 0.5) -> Array:
    """A random U[0, most] of the points replaced by others of the cloud."""
    gone = rng.random(len(x)) < rng.uniform(0, most)
    return _refilled(x, ~gone, rng)


def crop(x: Array, rng: np.random.Generator, normals: int, /, *, most: float = 0.3) -> Array:
    """The U[0, most] of the points that lie farthest in a random direction cut off, others twice in their place."""
    direction = rng.standard_normal(3).astype(np.float32)
    height = x[:, :3] @ direction
    keep = height <= np.quantile(height, 1 - rng.uniform(0, most))
    return _refilled(x, keep, rng)


def center(x: Array, rng: np.random.Generator, normals: int, /) -> Array:
    """The mean moved to 0."""
    x[:, :3] -= x[:, :3].mean(0)
    return x


AUGMENTS: Mapping[str, Any] = {
    "scale-translate": scale_translate,
    "scale": scale,
    "translate": translate,
    "rotate": rotate,
    "jitter": jitter,
    "drop": drop,
    "crop": crop,
    "center": center,
}
PUBLISHED: Mapping[str, Mapping[str, str]] = {  # repository -> layout ("" for the others) -> augmentation
    **{name: {"": "scale-translate"} for name in ("point-bert", "point-mae", "pointgpt", "dapt", "pointgst")},
    **{name: {"": "scale-translate", "scanobjectnn": "rotate"} for name in ("recon", "idpt", "pointgst-recon")},
    "act": {"": "rotate"},
    "point-peft": {"": "scale-translate", "scanobjectnn": "scale+rotate"},
    "any2point": {"": "scale+center+rotate"},
    "part-segmentation": {"": "scale(low=0.8, high=1.25)+translate(shift=0.1)"},
}


@dataclass(frozen=True)
class Augment:
    """Changes made one after the other."""

    steps: tuple[tuple[str, Mapping[str, float]], ...] = ()

    def __call__(self, x: Array, rng: np.random.Generator, normals: int = -1) -> Array:
        """``x [n, 3 + channels]``, which is overwritten."""
        for name, ranges in self.steps:
            change: Change = AUGMENTS[name]
            x = change(x, rng, normals, **ranges)
        return x


def parse_augment(text: str, layout: str = "") -> Augment:
    """Changes from "scale-translate", "rotate+jitter(sigma=0.02)", a published recipe's name, or "none".

    Raises:
        UnknownNameError: no such change.
        ConfigError: a range that the change does not have, or that is no number.
    """
    if text in PUBLISHED:
        known = PUBLISHED[text]
        text = known.get(layout, known[""])
    if text in ("", "none"):
        return Augment()
    steps = []
    for part in re.split(r"[+,](?![^(]*\))", text):
        word, ranges = parse_shorthand(part)
        name = part.strip().partition("(")[0].strip()
        if name not in AUGMENTS:
            action = "Join several with '+'. Published recipes: " + ", ".join(PUBLISHED) + "."
            raise UnknownNameError("augmentation", name, ("none", *AUGMENTS), action)
        known_ranges = AUGMENTS[name].__kwdefaults__ or {}
        for key, value in ranges.items():
            if key not in known_ranges or isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                have = ", ".join(f"{k}={v:.3g}" for k, v in known_ranges.items()) or "no ranges"
                raise ConfigError(f"data.augment: {word}({key}={value!r}) is not possible. {name} has {have}.")
        steps.append((name, ranges))
    return Augment(tuple(steps))


def _refilled(x: Array, keep: Array, rng: np.random.Generator) -> Array:
    kept = np.flatnonzero(keep)
    if not len(kept):
        return x
    rows = np.arange(len(x))
    rows[~keep] = rng.choice(kept, len(x) - len(kept))
    filled: Array = x[rows]
    return filled


def thumbnail_png(points: Array, side: int = 160, labels: Sequence[int] | Array | None = None) -> bytes:
    """PNG bytes of a cloud ``[N, 3]`` (y up) seen obliquely; nearer points are darker, labels give colours."""
    import io

    from matplotlib import colormaps
    from PIL import Image

    turn, tilt = math.radians(35), math.radians(20)
    c, s, ct, st = math.cos(turn), math.sin(turn), math.cos(tilt), math.sin(tilt)
    p = np.asarray(points[:, :3], np.float64)
    p = p - (p.min(0) + p.max(0)) / 2
    across, depth = c * p[:, 0] - s * p[:, 2], s * p[:, 0] + c * p[:, 2]
    up, depth = ct * p[:, 1] - st * depth, st * p[:, 1] + ct * depth
    reach = max(float(np.abs(np.stack([across, up])).max()), 1e-12)
    column = np.rint((across / reach + 1) / 2 * (side - 5) + 2).astype(int)
    row = np.rint((1 - up / reach) / 2 * (side - 5) + 2).astype(int)
    near = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-12)
    shade = colormaps["Blues"](0.3 + 0.7 * near) if labels is None else colormaps["tab20"](np.asarray(labels) % 20)
    pixels = np.full((side, side, 3), 255, np.uint8)
    order = np.argsort(near)  # far ones first
    for dy in (0, 1):
        for dx in (0, 1):
            pixels[row[order] + dy, column[order] + dx] = (shade[order, :3] * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
