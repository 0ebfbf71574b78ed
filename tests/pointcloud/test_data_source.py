"""What the network sees: sampling, normalisation, channels, augmentation, determinism; and bad clouds on the way."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import cloud_data as made
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from peft_suite import kernels
from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.pointcloud.data import PointDataConfig, source
from peft_suite.pointcloud.formats import Cloud
from peft_suite.pointcloud.sampling import farthest, in_order, oversampled, random_subset
from peft_suite.pointcloud.transforms import AUGMENTS, PUBLISHED, Preprocess, parse_augment

SMALL = {"num_points": 32, "group_size": 8}


def load(root: Path, preprocessing: Any = SMALL, **fields: Any) -> Any:
    return source.load(PointDataConfig(root=str(root), **fields), preprocessing)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a[i][0], b[i][0]) for i in range(len(a)))


# ---- sampling


def test_table_of_oversampling() -> None:
    assert [oversampled(n) for n in (1024, 2048, 4096, 8192)] == [1200, 2400, 4800, 8192]


def test_farthest_order_has_every_prefix() -> None:
    p = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    order = in_order(p, 64, 100)
    assert order[0] == 0 and len(order) == 100
    assert np.array_equal(order[:64], farthest(p, 64))
    assert np.array_equal(farthest(p, 20), kernels.farthest_point_sampling(torch.from_numpy(p)[None], 20)[0].numpy())
    assert in_order(p[:50], 64, 75).tolist() == list(range(50))
    other = in_order(p * 0.001, 64, 100, "pointnet2")  # all points are near the origin: only the start is ever taken
    assert set(other.tolist()) == {0}


def test_random_subsets_of_farthest_points() -> None:
    p = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    rng = np.random.default_rng(1)
    drawn = random_subset(p, 64, 75, rng, ordered=False)
    assert len(set(drawn.tolist())) == 64
    ordered = p[in_order(p, 64, 75)]
    picks = random_subset(ordered, 64, 75, rng, ordered=True)
    assert max(picks) < 75 and len(set(picks.tolist())) == 64
    few = random_subset(p[:40], 64, 75, rng, ordered=False)
    assert len(few) == 64 and set(few.tolist()) == set(range(40))
    spread = [  # farthest points lie wider apart than random ones
        torch.cdist(*2 * [torch.from_numpy(p[rows])]).fill_diagonal_(9).min(1).values.mean()
        for rows in (drawn, rng.permutation(300)[:64])
    ]
    assert spread[0] > 1.2 * spread[1]


def test_evaluation_takes_the_farthest_points_and_training_a_random_subset(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 4, "b": 4}, count=100)
    splits = load(tmp_path, val_fraction=0.25)
    whole = Preprocess.from_dict(SMALL)(Cloud(np.load(tmp_path / splits.val.samples[0].name)))
    np.testing.assert_array_equal(splits.val[0][0].numpy(), whole[farthest(whole, 32)])
    assert splits.val.cache[0].shape == (38, 3) and splits.train.cache[0].shape == (100, 3)
    assert same(splits.val, load(tmp_path, val_fraction=0.25, verify="none").val)  # without the cache
    first = load(tmp_path, val_fraction=0.25, fps_start="first").train
    assert first.cache[0].shape == (38, 3)
    seen = {tuple(row) for row in first[0][0].tolist()}
    assert len(seen) == 32 and seen <= {tuple(row) for row in first.cache[0].tolist()}
    plain = load(tmp_path, val_fraction=0.25, resample="random")
    assert same(plain.val, load(tmp_path, val_fraction=0.25, resample="random").val)
    assert len({tuple(row) for row in plain.val[0][0].tolist()}) == 32
    assert len(load(tmp_path, num_points=128).train[0][0]) == 128  # clouds of 100 points
    assert len(load(tmp_path, num_points=128).val[0][0]) == 128


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 6, "b": 6}, count=100)
    fields = {"augment": "scale-translate+rotate+jitter+drop+crop"}
    one, two = load(tmp_path, **fields).train, load(tmp_path, **fields).train
    first = [one[i][0] for i in range(len(one))]
    one.set_epoch(3)
    third = [one[i][0] for i in reversed(range(len(one)))][::-1]
    two.set_epoch(3)
    assert all(torch.equal(a, two[i][0]) for i, a in enumerate(third))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    batches = DataLoader(two, batch_size=5, num_workers=2)
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack(third))
    other = load(tmp_path, **fields, split_seed=1).train
    other.set_epoch(3)
    assert not torch.equal(other[0][0], third[0])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one[0]
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


# ---- normalisation, axes, channels


def test_normalisations() -> None:
    cloud = Cloud(made.cloud(2).astype(np.float64) * 50 + [691_000, 5_334_000, 100])
    sphere = Preprocess.from_dict({**SMALL, "normalize": "unit-sphere"})(cloud)
    np.testing.assert_allclose(sphere.mean(0), 0, atol=1e-6)
    assert np.linalg.norm(sphere, axis=1).max() == pytest.approx(1)
    cube = Preprocess.from_dict({**SMALL, "normalize": "unit-cube"})(cloud)
    assert np.abs(cube).max() == pytest.approx(1) and np.allclose(cube.max(0), -cube.min(0), atol=1e-6)
    np.testing.assert_array_equal(
        Preprocess.from_dict({**SMALL, "normalize": "none"})(cloud), cloud.points.astype(np.float32)
    )
    small = Preprocess.from_dict(SMALL)(Cloud(made.cloud(2)))  # far from the origin, and yet not rounded away
    np.testing.assert_allclose(sphere, small, atol=1e-4)


def test_up_axis_turns_points_and_normals() -> None:
    p, n = np.array([[1.0, 2, 3], [0, 0, 0]]), made.normals(2)
    for up, row in (("z", [1, 3, -2]), ("x", [-2, 1, 3]), ("y", [1, 2, 3])):
        goal = Preprocess.from_dict({**SMALL, "normalize": "none", "up": up, "channels": ["normals"]})
        x = goal(Cloud(p, normals=n))
        assert x[0, :3].tolist() == row
        np.testing.assert_allclose(x[:, 3:] @ x[0, :3], n @ p[0], rtol=1e-5)


def test_channels(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(3):
        colors = np.random.default_rng(i).integers(0, 256, (64, 3))
        np.savez(tmp_path / "a" / f"{i}.npz", xyz=made.cloud(0, i), colors=colors, normals=made.normals())
    splits = load(tmp_path, channels=("colors", "normals"), augment="rotate")
    points = splits.train[0][0]
    assert points.shape == (32, 9) and splits.train.normals == 6
    assert points[:, 3:6].min() >= 0 and points[:, 3:6].max() <= 1
    assert (points[:, 6:].norm(dim=1) - 1).abs().max() < 1e-5
    assert splits.info["preprocessing"]["input_size"] == [32, 9]
    with pytest.raises(DataError, match=r"it has no intensity \(channels there: normals, colors\)"):
        load(tmp_path, channels=("intensity",))


# ---- augmentation


def test_ranges_of_every_change() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((500, 3)), made.normals(500)], 1).astype(np.float32)

    def run(text: str, repeat: int = 50) -> list[Any]:
        return [parse_augment(text)(x.copy(), np.random.default_rng(i), 3) for i in range(repeat)]

    for y in run("scale-translate"):
        scale = np.ptp(y[:, :3], axis=0) / np.ptp(x[:, :3], axis=0)
        shift = y[:, :3].mean(0) - scale * x[:, :3].mean(0)
        assert (scale > 2 / 3 - 1e-4).all() and (scale < 1.5 + 1e-4).all() and (abs(shift) < 0.2 + 1e-4).all()
        np.testing.assert_allclose(np.linalg.norm(y[:, 3:], axis=1), 1, rtol=1e-5)
    angles = []
    for y in run("rotate"):
        np.testing.assert_allclose(y[:, 1], x[:, 1])
        np.testing.assert_allclose(np.linalg.norm(y[:, :3], axis=1), np.linalg.norm(x[:, :3], axis=1), rtol=1e-5)
        np.testing.assert_allclose((y[:, :3] * y[:, 3:]).sum(1), (x[:, :3] * x[:, 3:]).sum(1), atol=1e-5)
        angles.append(math.atan2(y[0, 2], y[0, 0]))
    assert max(angles) - min(angles) > 5
    for y in run("jitter(sigma=0.1, clip=0.15)"):
        assert 0.05 < abs(y - x)[:, :3].max() <= 0.15 + 1e-6 and np.array_equal(y[:, 3:], x[:, 3:])
    for name, most in (("drop", 0.5), ("crop", 0.3)):
        gone = [1 - len(np.unique(y[:, 0])) / 500 for y in run(name)]
        assert most / 2 < max(gone) <= most + 0.08 and min(gone) < 0.1
        assert all({tuple(r) for r in y[:9].tolist()} <= {tuple(r) for r in x.tolist()} for y in run(name, 3))
    assert all(abs(y[:, :3].mean(0)).max() < 1e-5 for y in run("translate+center", 3))


def test_augmentations_by_name() -> None:
    assert [n for n, _ in parse_augment("rotate+jitter(sigma=0.02, clip=0.1), drop").steps] == [
        "rotate",
        "jitter",
        "drop",
    ]
    for name in PUBLISHED:
        assert parse_augment(name).steps and parse_augment(name, "scanobjectnn").steps
    assert parse_augment("recon", "scanobjectnn").steps == (("rotate", {}),)
    assert parse_augment("recon", "modelnet").steps == (("scale-translate", {}),)
    assert parse_augment("none").steps == () and set(AUGMENTS) >= {
        "scale-translate",
        "rotate",
        "jitter",
        "drop",
        "crop",
    }
    with pytest.raises(UnknownNameError, match=r"'rotate'.*Published recipes: .*point-mae"):
        PointDataConfig(root="x", augment="rotat")
    with pytest.raises(ConfigError, match=r"rotate has degrees=360"):
        PointDataConfig(root="x", augment="rotate(angle=3)")
    with pytest.raises(ConfigError, match=r"jitter has sigma=0\.01, clip=0\.05"):
        PointDataConfig(root="x", augment="jitter(sigma=big)")


# ---- bad clouds


def test_bad_clouds_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 6, "b": 6})
    nan = made.cloud()
    nan[5] = np.nan
    np.save(tmp_path / "a" / "nan.npy", nan)
    np.save(tmp_path / "a" / "few.npy", made.cloud(count=5))
    np.save(tmp_path / "b" / "same.npy", np.ones((64, 3)))
    (tmp_path / "b" / "cut.npy").write_bytes((tmp_path / "b" / "000.npy").read_bytes()[:200])
    made.obj(tmp_path / "b" / "points.obj", faces=made.SIDES[:0])
    with pytest.raises(DataError, match=r"clouds cannot be used.*skip_bad"):
        load(tmp_path, val_fraction=0.0)
    try:
        load(tmp_path, val_fraction=0.0)
    except DataError as error:
        text = str(error)
    for name, reason in (
        ("a/nan.npy", "1 of 64 points have a coordinate that is NaN"),
        ("a/few.npy", "5 points, and at least 8 are needed"),
        ("b/same.npy", "all 64 points are equal"),
        ("b/cut.npy", "not readable as NPY"),
        ("b/points.obj", "a mesh without faces"),
    ):
        assert name in text and reason in text
    assert text.startswith("5 of 17 train clouds")
    splits = load(tmp_path, val_fraction=0.0, skip_bad=True)
    assert splits.info["skipped"] == 5 and splits.info["sizes"] == {"train": 12}
    assert {row["name"] for row in splits.info["skipped_files"]} >= {"a/nan.npy", "b/points.obj"}
    few = load(tmp_path, val_fraction=0.0, skip_bad=True, shots=4)
    assert few.info["counts"]["train"] == {"a": 4, "b": 4}  # shots are drawn from the good ones
    assert load(tmp_path, val_fraction=0.0, skip_bad=True, min_points=4).info["skipped"] == 4
    unread = load(tmp_path, val_fraction=0.0, verify="none").train
    index = next(i for i, s in enumerate(unread.samples) if s.name == "b/cut.npy")
    with pytest.raises(DataError, match=r"b/cut\.npy' became unreadable during the run"):
        unread[index]
    for file in (tmp_path / "b").glob("0*.npy"):
        file.unlink()
    with pytest.raises(DataError, match="no training cloud is left of: b"):
        load(tmp_path, val_fraction=0.0, skip_bad=True)


def test_shots_eval_shots_and_fingerprint(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 12, "b": 12})
    three = load(tmp_path, shots=3, eval_shots=1)
    assert three.info["sizes"] == {"train": 6, "val": 2}
    drawn = [s.name for s in three.train.samples]
    assert drawn == [s.name for s in load(tmp_path, shots=3).train.samples]
    assert drawn != [s.name for s in load(tmp_path, shots=3, split_seed=4).train.samples]
    assert three.fingerprint == load(tmp_path, shots=3, eval_shots=1).fingerprint != load(tmp_path).fingerprint
    before = load(tmp_path).fingerprint
    np.save(tmp_path / "a" / "000.npy", made.cloud(count=70))
    assert load(tmp_path).fingerprint != before


def test_large_splits_are_read_again(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 5, "b": 5})
    kept, reread = load(tmp_path), load(tmp_path, cache_mib=0)
    assert reread.info["in_memory"] == [] and kept.info["in_memory"] == ["train", "val"]
    assert same(kept.train, reread.train) and same(kept.val, reread.val)


def test_configuration_is_checked() -> None:
    for fields, match in (
        ({"num_points": -1}, "num_points"),
        ({"channels": ("normal",)}, "channels"),
        ({"channels": ("normals", "normals")}, "twice"),
        ({"point_all": 100, "num_points": 200}, "point_all"),
        ({"columns": "x y"}, "columns"),
        ({"fold": -2}, "fold"),
        ({"test_fraction": 0.9}, "leaves nothing"),
        ({"views": {"clouds": (0, 1)}}, "clouds"),
    ):
        with pytest.raises(ConfigError, match=match):
            PointDataConfig.from_dict({"root": "x", **fields})
    again = PointDataConfig.from_dict(PointDataConfig(root="x", augment="rotate", channels=("normals",)).to_dict())
    assert again.channels == ("normals",)
    with pytest.raises(DataError, match=r"num_points = 4: the backbone makes 1 groups of 8 points"):
        Preprocess.from_dict({"num_points": 4, "group_size": 8})


# ---- inputs of predict, pictures


def test_inputs_are_prepared_as_in_evaluation(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 3, "b": 3}, count=100)
    (tmp_path / "a" / "notes.md").write_text("x")
    splits = load(tmp_path, val_fraction=0.4, up="z", normalize="unit-cube")
    names, data = source.inputs([str(tmp_path)], splits.info["preprocessing"])
    assert len(names) == 6 and data.ignored == 1  # type: ignore[attr-defined]
    index = next(i for i, n in enumerate(names) if n.endswith(splits.val.samples[0].name))
    assert torch.equal(data[index], splits.val[0][0])
    with pytest.raises(DataError, match="does not exist"):
        source.inputs([str(tmp_path / "c")], {})
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"No cloud in .* \(0 other files\)"):
        source.inputs([str(tmp_path / "c")], {})
    with pytest.raises(DataError, match=r"unknown extension '\.md'"):
        source.inputs([str(tmp_path / "a" / "notes.md")], {})


def test_thumbnails(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 3})
    splits = load(tmp_path)
    picture = Image.open(io.BytesIO(splits.thumbnail(splits.train, 0)))
    assert picture.size == (160, 160) and np.asarray(picture).min() < 200
