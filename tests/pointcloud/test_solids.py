"""Solids, their classes, and the demo's clouds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from peft_suite.errors import DataError
from peft_suite.pointcloud import shapes, shifted
from peft_suite.pointcloud.data import PointDataConfig, source
from peft_suite.pointcloud.solids import (
    DEFORMATIONS,
    Body,
    ball,
    box,
    cone,
    cylinder,
    prism,
    regular,
    ring,
    rotation,
    surface,
)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


@pytest.mark.parametrize(
    ("body", "area", "tolerance"),
    [
        (box(0.5, 1, 2), 2 * (1 * 2 + 1 * 4 + 2 * 4), 1e-9),
        (cylinder(1, 2), 2 * math.pi * (1 + 4), 1e-9),
        (cone(1, 0, 1), math.pi * (1 + math.sqrt(5)), 1e-9),
        (ball(1), 4 * math.pi, 0.03),
        (ring(1, 0.25), 4 * math.pi**2 * 0.25, 0.02),
        (prism(regular(6, 1), 0.5), 2 * 1.5 * math.sqrt(3) + 6, 1e-9),
    ],
)
def test_areas(body: Body, area: float, tolerance: float) -> None:
    assert body.pieces.sum() == pytest.approx(area, rel=tolerance)


def test_points_are_uniform_over_the_area() -> None:
    points = box(0.5, 1, 2).draw(40000, rng())
    assert (np.abs(points) <= [0.5 + 1e-9, 1 + 1e-9, 2 + 1e-9]).all()
    on_end = np.isclose(np.abs(points[:, 2]), 2).mean()
    assert on_end == pytest.approx(4 / 28, abs=0.01)  # two ends of area 2 of a whole of 28
    disc = cylinder(1, 1e-6).draw(40000, rng())
    inner = (np.hypot(disc[:, 0], disc[:, 2]) < 0.5).mean()
    assert inner == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("body", [box(0.3, 0.6, 0.9), cylinder(0.5, 1), ball(1, 0.5), cone(1, 0.2, 0.5)])
def test_surface_points_lie_between_inside_and_outside(body: Body) -> None:
    placed = body.turned(0, 25).turned(1, 70).turned(2, -40).at(0.1, -0.2, 0.3)
    arms = placed.draw(400, rng()) - placed.origin
    assert placed.holds(placed.origin + 0.97 * arms).all()
    assert not placed.holds(placed.origin + 1.03 * arms).any()


def test_union_leaves_out_what_is_inside_and_a_cut_shows_its_wall() -> None:
    points = np.abs(surface([box(1, 1, 1), box(3, 0.2, 0.2)], 4000, rng()))
    assert not (points.max(1) < 0.99).any()  # of the bar, what is inside the cube
    assert not ((points[:, 1:] < 0.19).all(1) & (points[:, 0] < 2)).any()  # of the cube, what is inside the bar
    hole = cylinder(0.4, 2).away()
    drilled = surface([box(1, 1, 1), hole], 6000, rng())
    radius = np.hypot(drilled[:, 0], drilled[:, 2])
    wall = np.isclose(radius, 0.4, atol=0.01) & (np.abs(drilled[:, 1]) < 0.99)
    assert wall.sum() > 300
    assert not (radius < 0.38).any()
    assert (np.abs(drilled) <= 1 + 1e-9).all()


def test_cut_that_leaves_nothing_is_not_made() -> None:
    assert surface([box(1, 1, 1), box(2, 2, 2).away()], 100, rng()).shape == (100, 3)


def test_rotation_turns_bodies_and_points_alike() -> None:
    body = box(1, 0.1, 0.1).at(1)
    np.testing.assert_allclose(body.turned(1, 90).draw(50, rng()), body.draw(50, rng()) @ rotation(1, 90), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation(2, 33)), 1)


@pytest.mark.parametrize("change", DEFORMATIONS)
def test_deformations_keep_points_finite_and_near(change: Any) -> None:
    points = shapes.unit(ball(1).draw(500, rng()))
    moved = change(points, rng(3))
    assert moved.shape == points.shape and np.isfinite(moved).all()
    assert 0.1 < np.linalg.norm(moved, axis=1).max() < 4
    assert not np.allclose(moved, points)


@pytest.mark.parametrize(
    ("table", "make"), [(shapes.SOURCE, shapes.source_cloud), (shapes.TARGET, shapes.target_cloud)]
)
def test_every_class_makes_clouds(table: Mapping[str, Any], make: Any) -> None:
    for label, name in enumerate(table):
        clouds = [make(name, 300, rng(label, i)) for i in range(4)]
        for cloud in clouds:
            assert cloud.shape == (300, 3) and np.isfinite(cloud).all()
            assert np.linalg.norm(cloud, axis=1).max() == pytest.approx(1)
            np.testing.assert_allclose(cloud.mean(0), 0, atol=1e-9)
        assert not np.allclose(clouds[0], clouds[1])
        np.testing.assert_array_equal(clouds[0], make(name, 300, rng(label, 0)))


def test_no_class_is_in_both_sets() -> None:
    assert not set(shapes.SOURCE) & set(shapes.TARGET)
    assert len(shapes.TARGET) == 10


def test_scan_hides_a_side_turns_and_adds_noise() -> None:
    whole = shapes.target_cloud("chair", 1400, rng())
    seen = shifted.scan(whole, rng(1))
    assert 0.6 * 1400 - 1 <= len(seen) <= 0.85 * 1400 + 1
    nearest = np.linalg.norm(seen[:100, None] - whole[None], axis=2).min(1)
    assert nearest.mean() > 0.01
    height = np.sort(whole[:, 1])[[70, -70]]
    assert seen[:, 1].min() > height[0] - 0.3 and seen[:, 1].max() < height[1] + 0.3  # y stays up


def test_shifted_clouds_do_not_depend_on_the_call() -> None:
    first = shifted.shifted_cloud("train", 3, 5)
    shifted.shifted_cloud.cache_clear()
    np.testing.assert_array_equal(first, shifted.shifted_cloud("train", 3, 5))
    assert first.dtype == np.float32 and 800 < len(first) < 1200
    assert not np.array_equal(first[:50], shifted.shifted_cloud("test", 3, 5)[:50])
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 0


def test_solids_shifted_as_data_source() -> None:
    config = PointDataConfig(root="solids-shifted", shots=3, eval_shots=2)
    expects = {"num_points": 512, "group_size": 16, "groups": 32}
    splits = source.load(config, expects)
    assert source.classes(config) == (tuple(shapes.TARGET), False)
    assert splits.info["sizes"] == {"train": 30, "val": 20, "test": 20}
    assert set(splits.info["counts"]["train"].values()) == {3}
    points, label = splits.train[0]
    assert points.shape == (512, 3) and 0 <= label < 10
    assert splits.test[0][0].norm(dim=1).max().item() == pytest.approx(1, abs=0.1)
    assert source.load(config.replace(root="", format="solids-shifted"), expects).fingerprint == splits.fingerprint
    other = source.load(config.replace(split_seed=1), expects)
    assert {s.name for s in other.train.samples} != {s.name for s in splits.train.samples}
    names = [{s.name for s in part.samples} for part in (splits.train, splits.val, splits.test)]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    with pytest.raises(DataError, match="names 2 classes"):
        source.load(config.replace(classes=("a", "b")), expects)
