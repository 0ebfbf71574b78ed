"""Two sets of classes of solids: simple bodies to pre-train on, and furniture and tools that nobody has seen there.

A class is a function from a random generator to bodies (:mod:`peft_suite.pointcloud.solids`), y up; sizes and
proportions differ from one solid to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from peft_suite.pointcloud.formats import Array
from peft_suite.pointcloud.solids import (
    DEFORMATIONS,
    Body,
    ball,
    box,
    cone,
    cylinder,
    lathe,
    prism,
    regular,
    ring,
    surface,
)

__all__ = ["SOURCE", "TARGET", "source_cloud", "target_cloud", "unit"]

Rng = np.random.Generator
Shape = Callable[[Rng], list[Body]]


# ---- to pre-train on -----------------------------------------------------------------------------------------------


def egg(rng: Rng) -> list[Body]:
    """An ellipsoid, often with a slice off."""
    u = rng.uniform
    knife = box(2, 1, 2).turned(0, u(-180, 180)).turned(1, u(0, 360))
    shift = u(0.3, 0.8) * knife.frame[1]
    return [ball(1, u(0.4, 1.6)), *([knife.at(*(knife.frame[1] + shift)).away()] if rng.random() < 0.6 else [])]


def block(rng: Rng) -> list[Body]:
    """A cuboid with a corner or a groove cut out."""
    x, y, z = rng.uniform(0.3, 1, 3)
    corner = box(0.5 * x, 0.5 * y, 0.5 * z).at(*(rng.uniform(0.4, 0.9, 3) * (x, y, z))).away()
    groove = box(2, rng.uniform(0.2, 0.5) * y, rng.uniform(0.2, 0.5) * z).at(0, y, 0).away()
    return [box(x, y, z), *[[], [corner], [groove]][rng.integers(3)]]


def drum(rng: Rng) -> list[Body]:
    """A frustum, solid or bored through."""
    bottom, top, half = rng.uniform(0.2, 0.8, 3)
    hole = cylinder(rng.uniform(0.3, 0.7) * min(bottom, top), 2).away()
    return [cone(bottom, top, half + 0.1), *([hole] if rng.random() < 0.4 else [])]


def spike(rng: Rng) -> list[Body]:
    """A cone, whole or cut short at a slant."""
    half = rng.uniform(0.4, 1.2)
    knife = box(3, 1, 3).turned(2, rng.uniform(-40, 40)).at(0, 1 + rng.uniform(0, 0.6) * half, 0).away()
    return [cone(rng.uniform(0.3, 1), 0.0, half), *([knife] if rng.random() < 0.5 else [])]


def torus(rng: Rng) -> list[Body]:
    """A ring, whole or a piece of one."""
    thick = rng.uniform(0.1, 0.45)
    part = box(2, 2, 1).at(0, 0, rng.uniform(0.9, 1.6)).away()
    whole = ring(1 - thick / 2, thick).turned(0, 90 * int(rng.integers(2)))
    return [whole, *([part] if rng.random() < 0.4 else [])]


def vessel(rng: Rng) -> list[Body]:
    """A random profile turned about the axis."""
    steps = int(rng.integers(4, 8))
    radius = rng.uniform(0.15, 0.8, steps)
    y = np.linspace(-1, 1, steps)
    outline = np.stack([np.r_[0, radius, 0], np.r_[y[0], y, y[-1]]], 1)
    return [lathe(outline)]


def star(rng: Rng) -> list[Body]:
    """A star or a regular polygon, pushed."""
    corners = int(rng.integers(3, 9))
    inner = rng.uniform(0.3, 0.8) if rng.random() < 0.6 else 0.0
    return [prism(regular(corners, 1, inner), rng.uniform(0.15, 0.9)).turned(0, 90 * int(rng.integers(2)))]


def beam(rng: Rng) -> list[Body]:
    """A rolled section: L, T, U or a cross."""
    w, h, t = rng.uniform(0.4, 1), rng.uniform(0.4, 1), rng.uniform(0.08, 0.25)
    foot = box(w, t, 1).at(0, -h, 0)
    web = box(t, h, 1)
    parts = [
        [foot, web.at(-w + t)],
        [foot, web],
        [foot, web.at(-w + t), web.at(w - t)],
        [box(w, t, 1), web],
    ][rng.integers(4)]
    along = int(rng.integers(3))
    return [p.turned(0, 90 * (along == 1)).turned(1, 90 * (along == 2)) for p in parts]


def dumbbell(rng: Rng) -> list[Body]:
    """Two lumps on a bar."""
    lump = [ball(0.4), box(0.35, 0.35, 0.35), cylinder(0.45, 0.2)][rng.integers(3)]
    big, small = rng.uniform(0.6, 1.0, 2)
    bar = cylinder(rng.uniform(0.08, 0.2), 0.8)
    lying = 90 * int(rng.integers(2))
    parts = [bar, _scaled(lump, big).at(0, 0.8, 0), _scaled(lump, small).at(0, -0.8, 0)]
    return [p.turned(2, lying) for p in parts]


def tower(rng: Rng) -> list[Body]:
    """Two to four bodies on top of each other."""
    parts, y = [], -1.0
    for _ in range(rng.integers(2, 5)):
        half, r = rng.uniform(0.15, 0.4), rng.uniform(0.2, 0.7)
        body = [box(r, half, r), cylinder(r, half), cone(r, 0.4 * r, half), ball(half)][rng.integers(4)]
        parts.append(body.at(0, y + half, 0))
        y += 1.9 * half
    return parts


def bracket(rng: Rng) -> list[Body]:
    """A plate or an angle with holes."""
    w, d, t = rng.uniform(0.5, 1), rng.uniform(0.4, 1), rng.uniform(0.08, 0.2)
    holes = [cylinder(rng.uniform(0.1, 0.25), 1).at(x * w * 0.55, 0, 0).away() for x in (-1, 1)]
    wall = box(w, rng.uniform(0.3, 0.8), t).at(0, 0.5, -d + t)
    return [box(w, t, d), *([wall] if rng.random() < 0.5 else []), *holes[: rng.integers(1, 3)]]


def heap(rng: Rng) -> list[Body]:
    """Two to four random bodies stuck into each other anywhere, perhaps one of them cut away."""
    parts = []
    for _ in range(rng.integers(2, 5)):
        a, b, c = rng.uniform(0.15, 0.7, 3)
        body = [box(a, b, c), ball(a + 0.1, 0.5 + b), cylinder(a, b), cone(a, 0.5 * a * b, c), ring(0.6, 0.3 * a)][
            rng.integers(5)
        ]
        parts.append(body.turned(0, rng.uniform(0, 180)).turned(1, rng.uniform(0, 360)).at(*rng.uniform(-0.5, 0.5, 3)))
    return [*parts[:-1], parts[-1].away()] if rng.random() < 0.4 else parts


SOURCE: Mapping[str, Shape] = {
    shape.__name__: shape
    for shape in (egg, block, drum, spike, torus, vessel, star, beam, dumbbell, tower, bracket, heap)
}


# ---- to adapt to ---------------------------------------------------------------------------------------------------


def table(rng: Rng) -> list[Body]:
    """A wide top, square or round, on four legs or on a column."""
    w, h, d = rng.uniform(0.7, 1.2), rng.uniform(0.5, 0.8), rng.uniform(0.5, 0.9)
    top = (box(w, 0.06, d) if rng.random() < 0.7 else cylinder(d, 0.06)).at(0, h, 0)
    if rng.random() < 0.25:
        return [top, cylinder(0.1, h), cylinder(0.5 * d, 0.05).at(0, -h, 0)]
    reach = 0.85 if top.half else 0.6
    return [top, *_legs(reach * (w if top.half else d), h, reach * d, rng)]


def stool(rng: Rng) -> list[Body]:
    """A small round or square seat on three or four splayed legs."""
    r, h = rng.uniform(0.3, 0.5), rng.uniform(0.5, 0.8)
    seat = (cylinder(r, 0.07) if rng.random() < 0.6 else box(r, 0.07, r)).at(0, h, 0)
    count, lean = int(rng.integers(3, 5)), rng.uniform(0, 12)
    leg = cylinder(rng.uniform(0.04, 0.07), h).turned(2, lean).at(0.65 * r + 0.1)
    legs = [leg.turned(1, 360 * i / count) for i in range(count)]
    return [seat, *legs, *([ring(0.65 * r, 0.03).at(0, -0.2 * h, 0)] if rng.random() < 0.4 else [])]


def chair(rng: Rng) -> list[Body]:
    """A seat at half height, legs, a back on one side."""
    w, h, b = rng.uniform(0.35, 0.5), rng.uniform(0.35, 0.55), rng.uniform(0.35, 0.6)
    back = box(w, b, 0.05).at(0, b, 0).turned(0, rng.uniform(-12, 0)).at(0, h, -w)
    return [box(w, 0.06, w).at(0, h, 0), back, *_legs(0.85 * w, h, 0.85 * w, rng)]


def bench(rng: Rng) -> list[Body]:
    """A long narrow seat on two boards or on legs, at times with a back."""
    w, h, d = rng.uniform(0.9, 1.3), rng.uniform(0.25, 0.4), rng.uniform(0.22, 0.35)
    board = box(0.06, h, 0.9 * d)
    under = [board.at(-0.75 * w), board.at(0.75 * w)] if rng.random() < 0.5 else _legs(0.85 * w, h, 0.8 * d, rng)
    back = box(w, rng.uniform(0.2, 0.3), 0.04).at(0, h + 0.3, -d)
    return [box(w, 0.05, d).at(0, h, 0), *under, *([back] if rng.random() < 0.35 else [])]


def sofa(rng: Rng) -> list[Body]:
    """A solid seat with a back and two arms."""
    w, h, d = rng.uniform(0.7, 1.2), rng.uniform(0.18, 0.28), rng.uniform(0.35, 0.5)
    arm = box(0.12, h + rng.uniform(0.1, 0.2), d) if rng.random() < 0.6 else cylinder(0.15, d).turned(0, 90).at(0, 0.25)
    back = box(w, rng.uniform(0.4, 0.55), 0.12).at(0, 0.2, -d)
    return [box(w, h, d), back, arm.at(-w, 0.08), arm.at(w, 0.08)]


def mug(rng: Rng) -> list[Body]:
    """A hollow vessel with one handle."""
    r, h = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.75)
    wide, thick = r * rng.uniform(0.8, 1.25), 0.07
    hollow = cone(r - thick, wide - thick, h).at(0, 0.12, 0).away()
    handle = ring(0.55 * h, 0.07).turned(0, 90).at((r + wide) / 2 + 0.05)
    return [cone(r, wide, h), handle, hollow]


def goblet(rng: Rng) -> list[Body]:
    """A bowl on a stem on a foot."""
    foot, stem, bowl = rng.uniform(0.3, 0.45), rng.uniform(0.2, 0.6), rng.uniform(0.35, 0.6)
    rim, tall = bowl * rng.uniform(0.7, 1.2), rng.uniform(0.4, 0.8)
    y = 2 * stem
    outline = [
        *((0, 0), (foot, 0), (foot, 0.06), (0.06, 0.12), (0.06, y), (bowl, y + 0.5 * tall), (rim, y + tall)),
        *((rim - 0.05, y + tall), (bowl - 0.06, y + 0.5 * tall), (0, y + 0.08)),
    ]
    return [lathe(outline)]


def lamp(rng: Rng) -> list[Body]:
    """A foot, a pole, an open shade."""
    foot, pole, shade = rng.uniform(0.25, 0.4), rng.uniform(0.5, 0.9), rng.uniform(0.3, 0.55)
    top, tall = shade * rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.35)
    hood = [(shade - 0.04, -tall), (shade, -tall), (top, tall), (top - 0.04, tall)]
    base = cylinder(foot, 0.06) if rng.random() < 0.6 else cone(foot, 0.1, 0.15)
    return [base.at(0, -pole, 0), cylinder(0.045, pole), lathe(hood).at(0, pole, 0)]


def hammer(rng: Rng) -> list[Body]:
    """A handle and across its end a head, lying or standing."""
    long, size, wide = rng.uniform(0.7, 1.1), rng.uniform(0.12, 0.22), rng.uniform(0.3, 0.5)
    head = box(wide, size, size) if rng.random() < 0.5 else cylinder(size, wide).turned(2, 90)
    claw = cone(size, 0.02, 0.3).turned(2, 90).at(-wide - 0.25)
    parts = [cylinder(rng.uniform(0.06, 0.1), long), head.at(0, long), *([claw.at(0, long)] if size > 0.17 else [])]
    return parts if rng.random() < 0.5 else [p.turned(2, 90) for p in parts]


def rocket(rng: Rng) -> list[Body]:
    """A tube with a nose and three or four fins."""
    r, half, nose = rng.uniform(0.18, 0.3), rng.uniform(0.5, 0.8), rng.uniform(0.2, 0.4)
    span, count = rng.uniform(0.25, 0.45), int(rng.integers(3, 5))
    fin = prism([(0, 0), (span, -0.25), (span, 0), (0, rng.uniform(0.3, 0.5))], 0.03).at(0.9 * r, -half, 0)
    fins = [fin.turned(1, 360 * i / count) for i in range(count)]
    return [cylinder(r, half), cone(r, 0.02, nose).at(0, half + nose, 0), *fins]


TARGET: Mapping[str, Shape] = {
    shape.__name__: shape for shape in (table, stool, chair, bench, sofa, mug, goblet, lamp, hammer, rocket)
}


def _legs(x: float, h: float, z: float, rng: Rng) -> list[Body]:
    leg = box(0.06, h, 0.06) if rng.random() < 0.5 else cylinder(0.06, h)
    return [leg.at(sx * x, 0, sz * z) for sx in (-1, 1) for sz in (-1, 1)]


def _scaled(body: Body, factor: float) -> Body:
    return Body(body.outline * factor, body.half * factor, body.frame, body.origin, body.cut)


# ---- clouds --------------------------------------------------------------------------------------------------------


def source_cloud(name: str, count: int, rng: Rng) -> Array:
    """Points ``[count, 3]`` of a deformed solid of a pre-training class, mean 0 and radius 1."""
    points = unit(surface(SOURCE[name](rng), count, rng))
    for change in DEFORMATIONS:
        if rng.random() < 0.4:
            points = change(points, rng)
    return unit(points)


def target_cloud(name: str, count: int, rng: Rng) -> Array:
    """Points ``[count, 3]`` of a whole solid of a target class, mean 0 and radius 1."""
    return unit(surface(TARGET[name](rng), count, rng))


def unit(points: Array) -> Array:
    """The mean to 0, the farthest point to distance 1."""
    points = points - points.mean(0)
    scaled: Array = points / np.linalg.norm(points, axis=1).max()
    return scaled
