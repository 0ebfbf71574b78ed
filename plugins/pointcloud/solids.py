"""Solids made of simple bodies, and points drawn from their surface.

A body is a polygon turned about the y axis (points are (radius, y)), or pushed along z (points are (x, y)). A solid is
the union of bodies minus the union of others. A point of a body's surface belongs to the solid's where

    no other body holds it and no cut does          (bodies)
    some body holds it and no other cut does        (cuts)

so bodies are sampled by area and what does not belong is left out. Bodies that touch should overlap a little.
All functions are numpy over whole arrays; y is up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peft_suite.pointcloud.formats import Array

__all__ = [
    "DEFORMATIONS",
    "Body",
    "ball",
    "box",
    "cone",
    "cylinder",
    "lathe",
    "prism",
    "rectangle",
    "regular",
    "ring",
    "rotation",
    "surface",
]

Deformation = Callable[[Array, np.random.Generator], Array]

_ROUND = 20  # corners of a circle
_TRIES = 20


def rotation(axis: int, degrees: float) -> Array:
    """R [3, 3] for which ``p @ R`` is p turned about a coordinate axis."""
    a, b = (i for i in range(3) if i != axis)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix: Array = np.eye(3)
    matrix[a, a] = matrix[b, b] = c
    matrix[a, b], matrix[b, a] = s, -s
    return matrix


@dataclass(frozen=True)
class Body:
    """A turned or pushed polygon somewhere in space.

    Attributes:
        outline: ``[K, 2]``, closed by itself. A turned one may begin and end on the axis.
        half: half the length of a pushed body; 0: the body is turned.
        frame: ``[3, 3]``, rows are the body's own axes.
        origin: ``[3]``.
        cut: taken away instead of added.
    """

    outline: Array
    half: float
    frame: Array
    origin: Array
    cut: bool = False

    def at(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Body:
        """Moved by (x, y, z)."""
        return replace(self, origin=self.origin + np.array([x, y, z]))

    def turned(self, axis: int, degrees: float) -> Body:
        """Turned about a coordinate axis through 0."""
        matrix = rotation(axis, degrees)
        return replace(self, frame=self.frame @ matrix, origin=self.origin @ matrix)

    def away(self) -> Body:
        """The same as a cut."""
        return replace(self, cut=True)

    @property
    def pieces(self) -> Array:
        """Areas ``[K]`` of what the edges sweep, and of a pushed body the two ends': ``[K + 2]``."""
        a, b = self.outline, np.roll(self.outline, -1, 0)
        length = np.hypot(*(b - a).T)
        if not self.half:
            areas: Array = math.pi * (a[:, 0] + b[:, 0]) * length
            return areas
        end = abs((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()) / 2
        return np.append(2 * self.half * length, [end, end])

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Points ``[count, 3]``, uniform over the surface."""
        areas = self.pieces
        piece = np.searchsorted(np.cumsum(areas), rng.random(count) * areas.sum()).clip(max=len(areas) - 1)
        u, v = rng.random(count), rng.random(count)
        edge = np.minimum(piece, len(self.outline) - 1)
        a, b = self.outline[edge], np.roll(self.outline, -1, 0)[edge]
        if not self.half:
            ra, rb = a[:, 0], b[:, 0]
            r = np.sqrt(ra**2 + u * (rb**2 - ra**2))  # wider rings hold more points
            slope = np.abs(rb - ra) > 1e-9
            t = np.where(slope, (r - ra) / np.where(slope, rb - ra, 1), u)
            angle = 2 * math.pi * v
            y = a[:, 1] + t * (b[:, 1] - a[:, 1])
            local = np.stack([r * np.cos(angle), y, r * np.sin(angle)], 1)
        else:
            flat = a + u[:, None] * (b - a)
            z = self.half * (2 * v - 1)
            end = piece >= len(self.outline)
            flat[end] = self._fill(int(end.sum()), rng)
            z[end] = np.where(piece[end] == len(self.outline), -self.half, self.half)
            local = np.concatenate([flat, z[:, None]], 1)
        points: Array = local @ self.frame + self.origin
        return points

    def holds(self, points: Array) -> Array:
        """Which of the points ``[N, 3]`` are inside: ``[N]`` bool."""
        x, y, z = ((points - self.origin) @ self.frame.T).T
        if not self.half:
            return _within(self.outline, np.hypot(x, z), y)
        inside: Array = (np.abs(z) < self.half) & _within(self.outline, x, y)
        return inside

    def _fill(self, count: int, rng: np.random.Generator) -> Array:
        """Points ``[count, 2]`` of the polygon's area."""
        low, span = self.outline.min(0), np.ptp(self.outline, axis=0)
        found: Array = np.empty((0, 2))
        while len(found) < count:
            drawn = low + span * rng.random((3 * (count - len(found)) + 8, 2))
            found = np.concatenate([found, drawn[_within(self.outline, *drawn.T)]])
        return found[:count]


def _within(outline: Array, x: Array, y: Array) -> Array:
    """Which points of a plane lie in a polygon: a ray to the right crosses its edges an odd number of times."""
    a, b = outline, np.roll(outline, -1, 0)
    rise = b[:, 1] - a[:, 1]
    slope = (b[:, 0] - a[:, 0]) / np.where(rise == 0, 1, rise)
    spans = (a[:, 1] > y[:, None]) != (b[:, 1] > y[:, None])  # [N, K]
    inside: Array = (spans & (x[:, None] < a[:, 0] + (y[:, None] - a[:, 1]) * slope)).sum(1) % 2 == 1
    return inside


def surface(bodies: Sequence[Body], count: int, rng: np.random.Generator) -> Array:
    """Points ``[count, 3]`` of a solid's surface, uniform by area. Cuts that leave nothing are not made."""
    areas = np.array([body.pieces.sum() for body in bodies])
    found: list[Array] = []
    missing = count
    for attempt in range(_TRIES):
        shares = rng.multinomial(2 * missing + 32, areas / areas.sum())
        for i, (body, share) in enumerate(zip(bodies, shares, strict=True)):
            points = body.draw(int(share), rng)
            others = [other for j, other in enumerate(bodies) if j != i]
            found.append(points[_belongs(body, points, others)])
        missing = count - sum(map(len, found))
        if missing <= 0:
            drawn = np.concatenate(found)
            chosen: Array = drawn[rng.permutation(len(drawn))[:count]]
            return chosen
        if attempt == 3 and missing > 0.8 * count:
            break
    return surface([body for body in bodies if not body.cut], count, rng)


def _belongs(body: Body, points: Array, others: Sequence[Body]) -> Array:
    keep = np.ones(len(points), bool)
    held = np.zeros(len(points), bool)
    for other in others:
        inside = other.holds(points)
        if other.cut or not body.cut:
            keep &= ~inside
        else:
            held |= inside
    return keep & held if body.cut else keep


# ---- bodies, centred at 0 ------------------------------------------------------------------------------------------


def lathe(outline: Sequence[tuple[float, float]] | Array) -> Body:
    """The polygon of (radius, y) turned about y."""
    return Body(np.asarray(outline, np.float64), 0.0, np.eye(3), np.zeros(3))


def prism(outline: Sequence[tuple[float, float]] | Array, half: float) -> Body:
    """The polygon of (x, y) pushed from -half to half along z."""
    return Body(np.asarray(outline, np.float64), half, np.eye(3), np.zeros(3))


def box(x: float, y: float, z: float) -> Body:
    """Half sizes."""
    return prism(rectangle(x, y), z)


def cylinder(radius: float, half: float) -> Body:
    """Upright."""
    return cone(radius, radius, half)


def cone(bottom: float, top: float, half: float) -> Body:
    """Upright, with a flat top of that radius."""
    return lathe([(0, -half), (bottom, -half), (top, half), (0, half)])


def ball(radius: float, squash: float = 1.0) -> Body:
    """A ball, or with ``squash`` an ellipsoid of that height."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, _ROUND // 2 + 1)
    return lathe(radius * np.stack([np.cos(angle).clip(0), squash * np.sin(angle)], 1))


def ring(radius: float, thickness: float) -> Body:
    """Lying flat."""
    return lathe(regular(_ROUND, thickness) + np.array([radius, 0.0]))


def rectangle(x: float, y: float) -> Array:
    """Half sizes."""
    return np.array([(-x, -y), (x, -y), (x, y), (-x, y)])


def regular(corners: int, radius: float, inner: float = 0.0) -> Array:
    """A regular polygon, or with ``inner`` a star."""
    angle = np.arange(corners * (2 if inner else 1)) * (math.pi / corners if inner else 2 * math.pi / corners)
    r = np.where(np.arange(len(angle)) % 2 == 1, inner, radius) if inner else np.full(len(angle), radius)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 1)


# ---- deformations: points [N, 3] of about radius 1 and height from -1 to 1 -----------------------------------------


def stretch(p: Array, rng: np.random.Generator) -> Array:
    """Every axis on its own by up to a third."""
    return np.asarray(p * rng.uniform(0.75, 1.33, 3))


def taper(p: Array, rng: np.random.Generator) -> Array:
    """Wider at the top or at the bottom."""
    width = 1 + rng.uniform(-0.4, 0.4) * p[:, 1:2]
    return np.concatenate([p[:, :1] * width, p[:, 1:2], p[:, 2:] * width], 1)


def twist(p: Array, rng: np.random.Generator) -> Array:
    """Turned about y the more the higher."""
    angle = rng.uniform(-1.2, 1.2) * p[:, 1]
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c * p[:, 0] + s * p[:, 2], p[:, 1], c * p[:, 2] - s * p[:, 0]], 1)


def bend(p: Array, rng: np.random.Generator) -> Array:
    """The y axis onto an arc in the plane of x and y."""
    curve = rng.uniform(0.2, 0.8) * rng.choice([-1, 1])
    angle, radius = curve * p[:, 1], 1 / curve - p[:, 0]
    return np.stack([1 / curve - radius * np.cos(angle), radius * np.sin(angle), p[:, 2]], 1)


DEFORMATIONS: tuple[Deformation, ...] = (stretch, taper, twist, bend)
