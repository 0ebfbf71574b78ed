"""Views of meshes, and voting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cloud_data as made
import numpy as np
import pytest
import torch
from torch import nn

from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.data import PointDataConfig, source
from peft_suite.pointcloud.views import MeshViews, ViewsConfig, visible
from peft_suite.pointcloud.voting import vote

SMALL = {"num_points": 64, "group_size": 8}
VIEWS = {"clouds": (6, 4), "surface": 2000}


def ball(count: int = 4000) -> Any:
    p = np.random.default_rng(0).standard_normal((count, 3))
    return p / np.linalg.norm(p, axis=1, keepdims=True)


def meshes(root: Path) -> Path:
    import trimesh

    root.mkdir(exist_ok=True)
    trimesh.creation.icosphere().export(root / "ball.ply")
    trimesh.creation.cylinder(0.3, 2).export(root / "rod.off")
    made.obj(root / "box.obj")
    return root


def load(root: Path, **fields: Any) -> Any:
    config = {"root": str(root), "views": VIEWS, "augment": "none", **fields}
    return source.load(PointDataConfig.from_dict(config), SMALL)


# ---- visibility


def test_half_of_a_ball_is_visible() -> None:
    p = ball()
    for toward in ([1, 0, 0], [0.3, -0.8, 0.2], [0, 1, 0]):
        unit = np.array(toward) / np.linalg.norm(toward)
        rows = visible(p, toward, 0.06, p)
        height = p[rows] @ unit
        assert (height > -0.05).mean() > 0.93  # what lies behind is hidden
        front = p @ unit > 0.2
        assert np.isin(np.flatnonzero(front), rows).mean() > 0.97  # what lies in front is seen


def test_what_stands_in_front_hides_the_rest() -> None:
    rng = np.random.default_rng(0)
    near = np.concatenate([np.full((2000, 1), 0.5), rng.uniform(-0.5, 0.5, (2000, 2))], 1)
    far = near - [1.0, 0, 0]
    rows = visible(np.concatenate([near, far]), [1, 0, 0], 0.06)
    assert (rows < 2000).sum() == 2000 and (rows >= 2000).mean() < 0.05


def test_views_of_the_two_halves(tmp_path: Path) -> None:
    import trimesh

    trimesh.creation.icosphere(4).export(tmp_path / "ball.ply")
    config = ViewsConfig(noise=(0.0, 0.0), occlusion=(0.0, 0.3), turn=(0.0, 0.0), surface=4000)
    from peft_suite.pointcloud.listing import Sample

    for split, sign in (("train", 1), ("test", -1)):
        reader = MeshViews(config, split, "y")
        clouds = [reader(Sample("v", 0, str(tmp_path / "ball.ply"), i)) for i in range(12)]
        means = np.stack([c.points.mean(0) for c in clouds])
        assert (sign * means[:, 0] > -0.15).all() and sign * means[:, 0].mean() > 0.1
        assert abs(means[:, 1]).max() < 0.5 and np.ptp(means[:, 2]) > 0.3
        sizes = [len(c.points) for c in clouds]
        assert (min(sizes) < 0.85 * max(sizes)) == (split == "test")  # only test clouds are cut


def test_mesh_views_as_data(tmp_path: Path) -> None:
    splits = load(meshes(tmp_path / "m"))
    assert splits.info["layout"] == "mesh-views" and splits.classes == ("ball", "box", "rod")
    assert splits.info["sizes"] == {"train": 15, "test": 12, "val": 3}
    assert splits.info["views"]["clouds"] == [6, 4]
    again = load(tmp_path / "m")
    assert all(torch.equal(splits.train[i][0], again.train[i][0]) for i in range(15))
    assert again.fingerprint == splits.fingerprint != load(tmp_path / "m", views={**VIEWS, "seed": 1}).fingerprint
    other = load(tmp_path / "m", split_seed=1)
    assert all(torch.equal(splits.test[i][0], other.test[i][0]) for i in range(12))  # test clouds stay
    assert load(tmp_path / "m", shots=2).info["sizes"]["train"] == 6
    for frame in ("object", "camera"):
        for up in ("y", "z", "x"):
            points = load(tmp_path / "m", views={**VIEWS, "frame": frame}, up=up).train[0][0]
            assert points.shape == (64, 3) and points.norm(dim=1).max() <= 1 + 1e-5
    assert source.classes(PointDataConfig(root=str(tmp_path / "m")))[0] == splits.classes


def test_camera_frame_looks_along_z_whatever_is_up(tmp_path: Path) -> None:
    meshes(tmp_path / "m")
    quiet = {**VIEWS, "frame": "camera", "noise": (0.0, 0.0), "occlusion": (0.0, 0.0)}
    for up in ("y", "z"):
        splits = load(tmp_path / "m", views=quiet, up=up, normalize="none")
        one = splits.train[[s.label for s in splits.train.samples].index(0)][0]  # the ball
        assert one[:, 2].mean() > 0.3 and abs(one[:, :2].mean()) < 0.2


def test_meshes_that_cannot_be_used(tmp_path: Path) -> None:
    meshes(tmp_path)
    made.obj(tmp_path / "points.obj", faces=made.SIDES[:0])
    with pytest.raises(DataError, match=r"points\.obj.*a mesh without faces"):
        load(tmp_path)
    assert load(tmp_path, skip_bad=True).classes == ("ball", "box", "rod")
    (tmp_path / "points.obj").unlink()
    made.obj(tmp_path / "ball.obj")
    with pytest.raises(DataError, match="two meshes named ball"):
        load(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no mesh"):
        load(tmp_path / "none", format="mesh-views")


@pytest.mark.skipif("PEFT_SUITE_MESHES" not in os.environ, reason="PEFT_SUITE_MESHES names no folder of meshes")
def test_real_meshes() -> None:
    root = os.environ["PEFT_SUITE_MESHES"]
    views = {"clouds": (3, 2), "surface": 6000}
    splits = source.load(PointDataConfig.from_dict({"root": root, "views": views, "skip_bad": True}), {})
    count = len([p for p in Path(root).iterdir() if p.suffix in (".obj", ".ply", ".off", ".stl")])
    assert len(splits.classes) == count and splits.info["skipped"] == 0
    for data in (splits.train, splits.test):
        for i in range(len(data)):
            points, label = data[i]
            assert points.shape == (1024, 3) and torch.isfinite(points).all() and 0 <= label < count


# ---- voting


class Nearest(nn.Module):
    """Logits from the mean height of a cloud, which random subsets move."""

    def forward(self, points: Any) -> Any:
        spread = points.std(1)
        return torch.stack([spread[:, 0], spread[:, 1], spread[:, 2]], 1)


def test_votes(tmp_path: Path) -> None:
    splits = load(meshes(tmp_path / "m"))
    one = vote(Nearest(), splits.test, passes=4, device="cpu")
    assert one.logits.shape == (12, 3) and one.best is None and len(one.history) == 1
    assert one.protocol == "mean logits of 4 passes (random subset, scale-translate)"
    again = vote(Nearest(), splits.test, passes=4, device="cpu", batch_size=5)
    assert torch.allclose(again.logits, one.logits) and one.to_dict()["protocol"] == one.protocol
    assert not torch.allclose(vote(Nearest(), splits.test, passes=4, device="cpu", seed=1).logits, one.logits)
    before = splits.test[0][0]
    assert not splits.test.train and torch.equal(before, splits.test[0][0])  # the data set itself is unchanged
    many = vote(Nearest(), splits.test, passes=2, repetitions=5, reproduces="paper", device="cpu")
    assert many.best == max(many.history) >= many.history[0] and len(many.history) == 5
    assert many.protocol.startswith("BEST of 5 votes by test labels")
    assert many.metrics["accuracy"] == pytest.approx(many.history[0])  # the honest number stays the first vote's
    with pytest.raises(ConfigError, match="chosen by the test labels"):
        vote(Nearest(), splits.test, repetitions=299)
    with pytest.raises(ConfigError, match="at least 1"):
        vote(Nearest(), splits.test, passes=0)
