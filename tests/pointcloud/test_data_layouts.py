"""Every layout on trees made by the tests: folders, ModelNet, ScanObjectNN, few-shot, HDF5; what may be wrong."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import cloud_data as made
import h5py
import numpy as np
import pytest

from peft_suite.errors import DataError, UnknownNameError
from peft_suite.pointcloud.data import PointDataConfig, source

SMALL = {"num_points": 32, "group_size": 8}


def load(root: Path, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(usually|instead of)")
        return source.load(PointDataConfig(root=str(root), **fields), SMALL)


def names(dataset: Any) -> list[str]:
    return [sample.name for sample in dataset.samples]


# ---- folders


def test_folder_without_splits_is_split_per_class_by_seed(tmp_path: Path) -> None:
    made.folder(tmp_path, {"cat": 10, "dog": 5})
    splits = load(tmp_path)
    assert splits.classes == ("cat", "dog") and splits.test is None and splits.info["layout"] == "folder"
    assert splits.info["counts"] == {"train": {"cat": 8, "dog": 4}, "val": {"cat": 2, "dog": 1}}
    assert not set(names(splits.train)) & set(names(splits.val))
    assert names(load(tmp_path).val) == names(splits.val)
    assert any(names(load(tmp_path, split_seed=s).val) != names(splits.val) for s in range(1, 5))
    assert load(tmp_path, val_fraction=0.0).val is None
    assert load(tmp_path, test_fraction=0.2).info["sizes"] == {"train": 9, "test": 3, "val": 3}
    assert source.classes(PointDataConfig(root=str(tmp_path))) == (("cat", "dog"), False)


@pytest.mark.parametrize("val", ["val", "valid"])
def test_folder_with_splits(tmp_path: Path, val: str) -> None:
    for part, count in (("train", 4), (val, 2), ("test", 3)):
        made.folder(tmp_path / part, {"a": count, "b": count}, ".txt")
    splits = load(tmp_path)
    assert splits.info["sizes"] == {"train": 8, "val": 4, "test": 6}
    assert splits.sample_name(splits.test, 0) == "test/a/000.txt"
    made.folder(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match="Classes in test that train does not have: c"):
        load(tmp_path)
    with pytest.raises(DataError, match="no folder 'tset'"):
        load(tmp_path, test="tset")


def test_splits_inside_class_folders(tmp_path: Path) -> None:
    for name in ("bed", "desk"):
        for split, count in (("train", 3), ("test", 2)):
            for i in range(count):
                made.obj(tmp_path / name / split / f"{name}_{i}.obj")
    assert load(tmp_path, val_fraction=0.0, mesh_points=64).info["sizes"] == {"train": 6, "test": 4}


def test_folders_that_are_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is empty"):
        source.load(PointDataConfig(), SMALL)
    with pytest.raises(DataError, match=r"'.*chairs' does not exist"):
        load(tmp_path / "chairs")
    with pytest.raises(DataError, match="no sub-folder"):
        load(tmp_path)
    made.folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=r"1 of 3 classes have no training cloud.*hollow"):
        load(tmp_path)
    (tmp_path / "hollow" / "a.pyl").write_bytes(b"ply")
    with pytest.raises(DataError, match=r"hollow/a\.pyl': unknown extension '\.pyl'. Did you mean '\.ply'"):
        load(tmp_path)
    assert load(tmp_path, allow_empty=True).classes == ("a", "b", "hollow")
    with pytest.raises(DataError, match=r"Classes of train that are not in data\.classes: hollow"):
        load(tmp_path, classes=("b", "a"))
    with pytest.raises(UnknownNameError, match="folder"):
        load(tmp_path, format="foldr")


# ---- ModelNet


def test_modelnet_txt(tmp_path: Path) -> None:
    root = made.modelnet_txt(tmp_path / "modelnet40_normal_resampled", ["airplane", "night_stand"])
    splits = load(root, channels=("normals",))
    assert splits.classes == ("airplane", "night_stand") and splits.info["layout"] == "modelnet"
    assert splits.info["variant"] == "40-txt" and splits.info["sizes"] == {"train": 4, "test": 4, "val": 2}
    points, label = splits.test[3]
    assert points.shape == (32, 6) and label == 1
    assert abs(points[:, 3:].norm(dim=1) - 1).max() < 1e-4
    assert names(splits.test)[3] == "night_stand/night_stand_0005"
    assert load(tmp_path).info["layout"] == "modelnet"  # the folder above
    assert source.classes(PointDataConfig(root=str(root)))[0] == ("airplane", "night_stand")
    with pytest.warns(UserWarning, match="train 6 instead of 9,843"):
        source.load(PointDataConfig(root=str(root)), SMALL)
    (root / "airplane" / "airplane_0001.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 6 clouds of modelnet40_train\.txt do not exist.*airplane_0001"):
        load(root)
    (root / "modelnet40_test.txt").write_text("chair_0001\n")
    with pytest.raises(DataError, match=r"line 1: 'chair_0001' is of no known class|do not exist"):
        load(root)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_modelnet_dat(tmp_path: Path, protocol: int) -> None:
    made.modelnet_dat(tmp_path, 40, 2, protocol=protocol)
    splits = load(tmp_path, val_fraction=0.5, format="modelnet")
    assert len(splits.classes) == 40 and splits.classes[23] == "night_stand"
    assert splits.info["variant"] == "40-dat" and splits.info["sizes"] == {"train": 40, "test": 80, "val": 40}
    assert [splits.test[i][1] for i in range(80)] == [i // 2 for i in range(80)]
    made.modelnet_dat(tmp_path, 10, 1, number=10)
    assert len(load(tmp_path, variant="10", val_fraction=0.0).classes) == 10
    made.modelnet_dat(tmp_path, 11, 1, number=10)
    with pytest.raises(DataError, match="label 10 is out of range, there are 10 classes"):
        load(tmp_path, variant="10")
    with pytest.raises(DataError, match="has no ModelNet40 as txt"):
        load(tmp_path, variant="40-txt")
    with pytest.raises(UnknownNameError, match="ModelNet variant"):
        load(tmp_path, format="modelnet", variant="41")


def test_modelnet_dat_is_not_trusted(tmp_path: Path) -> None:
    made.modelnet_dat(tmp_path, 40, 1)
    with (tmp_path / "modelnet40_test_8192pts_fps.dat").open("wb") as file:
        pickle.dump([[print], [0]], file)
    with pytest.raises(DataError, match=r"modelnet40_test_8192pts_fps\.dat.*builtins\.print"):
        load(tmp_path)


def test_modelnet_hdf5(tmp_path: Path) -> None:
    root = tmp_path / "modelnet40_ply_hdf5_2048"
    made.hdf5(root / "ply_data_train0.h5", list(range(20)) * 2)
    made.hdf5(root / "ply_data_train1.h5", list(range(20, 40)) * 2)
    made.hdf5(root / "ply_data_test0.h5", list(range(40)))
    splits = load(root, val_fraction=0.0)
    assert splits.info["variant"] == "40-hdf5" and splits.info["sizes"] == {"train": 80, "test": 40}
    assert "ply_data_train1.h5[3]" in names(splits.train)


# ---- ScanObjectNN


def scan(root: Path, count: int = 15) -> Path:
    labels = [v for v in range(count) for _ in range(2)]
    for place in ("main_split", "main_split_nobg"):
        for split in ("training", "test"):
            made.hdf5(root / place / f"{split}_objectdataset.h5", labels)
    for split in ("training", "test"):
        made.hdf5(root / "main_split" / f"{split}_objectdataset_augmentedrot_scale75.h5", labels * 2)
    return root


def test_scanobjectnn(tmp_path: Path) -> None:
    scan(tmp_path)
    for variant, size in (("", 60), ("hardest", 60), ("PB_T50_RS", 60), ("obj-bg", 30), ("OBJ_ONLY", 30)):
        splits = load(tmp_path, variant=variant, val_fraction=0.5)
        assert splits.info["layout"] == "scanobjectnn" and splits.info["sizes"]["test"] == size
    assert splits.classes[:4] == ("bag", "bin", "box", "cabinet") and len(splits.classes) == 15
    raw = splits.test[0][0].numpy()
    assert raw.mean() > 2  # neither centred nor scaled
    assert load(tmp_path, normalize="unit-sphere").info["preprocessing"]["normalize"] == "unit-sphere"
    assert load(tmp_path / "main_split", variant="obj-bg").info["variant"] == "obj-bg"
    with pytest.raises(UnknownNameError, match="pb-t50-rs"):
        load(tmp_path, variant="pb-t25")
    with pytest.warns(UserWarning, match="usually 2,309 and 581"):
        source.load(PointDataConfig(root=str(tmp_path), variant="obj-bg"), SMALL)
    made.hdf5(tmp_path / "main_split" / "test_objectdataset.h5", [15] * 3)
    with pytest.raises(DataError, match=r"test_objectdataset\.h5.*label 15 is out of range"):
        load(tmp_path, variant="obj-bg")
    (tmp_path / "main_split" / "test_objectdataset.h5").unlink()
    with pytest.raises(DataError, match=r"test_objectdataset\.h5' does not exist"):
        load(tmp_path, variant="obj-bg")


# ---- HDF5


def test_hdf5_files(tmp_path: Path) -> None:
    file = made.hdf5(tmp_path / "all.h5", [0, 1, 2] * 5, normal=np.tile(made.normals(), (15, 1, 1)))
    splits = load(file, channels=("normals",))
    assert splits.info["sizes"] == {"train": 12, "val": 3} and splits.train[0][0].shape == (32, 6)
    for name in ("train_a.h5", "train_b.h5", "valid.h5", "test.hdf5"):
        made.hdf5(tmp_path / "d" / name, [0, 1])
    (tmp_path / "d" / "shape_names.txt").write_text("one\ntwo\n")
    splits = load(tmp_path / "d")
    assert splits.classes == ("one", "two") and splits.info["sizes"] == {"train": 4, "val": 2, "test": 2}
    with pytest.raises(DataError, match="label 1 is out of range, there are 1 class names"):
        load(tmp_path / "d", classes=("one",))


def test_hdf5_keys_are_listed(tmp_path: Path) -> None:
    file = made.hdf5(tmp_path / "a.h5", [0, 1, 0, 1], keys=("clouds", "what"))
    with pytest.raises(DataError, match=r"a\.h5.*Arrays there: clouds \[4, 64, 3\], what \[4\].*data\.data_key"):
        load(file)
    with pytest.raises(DataError, match=r"no array 'label or labels or class'.*what.*data\.label_key"):
        load(file, data_key="clouds")
    with pytest.raises(DataError, match=r"no array 'wat'"):
        load(file, data_key="clouds", label_key="wat")
    assert load(file, data_key="clouds", label_key="what").info["sizes"] == {"train": 2, "val": 2}


def test_hdf5_with_wrong_shapes(tmp_path: Path) -> None:
    file = tmp_path / "a.h5"

    def wrong(match: str, **arrays: Any) -> None:
        with h5py.File(file, "w") as opened:
            for key, value in arrays.items():
                opened[key] = value
        with pytest.raises(DataError, match=match):
            load(file)

    points = np.random.default_rng(0).random((4, 64, 3), np.float32)
    wrong(r"4 clouds and 'label' the shape \[3\]", data=points, label=np.zeros(3, int))
    wrong(r"shape \[4, 2\]; one label per cloud", data=points, label=np.zeros((4, 2), int))
    wrong(r"shape \[4, 64\] instead of", data=points[..., 0], label=np.zeros(4, int))
    wrong("whole numbers from 0", data=points, label=np.zeros(4))
    wrong("hold no cloud", data=points[:0], label=np.zeros(0, int))
    whole = made.hdf5(file, [0, 1] * 50).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.h5.*truncated|damaged"):
        load(file)
    file.write_bytes(b"no hdf5")
    with pytest.raises(DataError, match=r"a\.h5.*cannot be read as HDF5"):
        load(file)


# ---- few-shot


@pytest.mark.parametrize("spelling", ["{}way_{}shot", "{}way{}shot"])
def test_published_episodes(tmp_path: Path, spelling: str) -> None:
    for fold in (0, 1):
        made.episode(tmp_path, 5, 10, fold, spelling)
    splits = load(tmp_path, way=5, shots=10, fold=1)
    assert splits.info["sizes"] == {"train": 50, "test": 100} and splits.val is None
    assert splits.classes == tuple(f"class {i}" for i in range(10, 15)) and splits.info["fold"] == 1
    assert load(tmp_path, way=5, shots=10, split_seed=1).info["fold"] == 1  # follows the seed
    with pytest.raises(DataError, match="Episodes there: 5-way 10-shot fold 0, 5-way 10-shot fold 1"):
        load(tmp_path, way=10, shots=10)
    (next(tmp_path.iterdir()) / "0.pkl").write_bytes(pickle.dumps({"train": []}))
    with pytest.raises(DataError, match=r"0\.pkl' is no episode"):
        load(tmp_path, way=5, shots=10)


def test_episodes_from_any_labelled_clouds(tmp_path: Path) -> None:
    made.modelnet_txt(tmp_path, [f"thing{i}" for i in range(8)], train=5, test=6)
    config = {"way": 3, "shots": 2, "queries": 4}
    first = load(tmp_path, **config)
    assert first.info["sizes"] == {"train": 6, "test": 12} and len(first.classes) == 3 and first.val is None
    assert sorted({s.label for s in first.train.samples}) == [0, 1, 2]
    assert not set(names(first.train)) & set(names(first.test))
    assert names(load(tmp_path, **config).train) == names(first.train)
    others = [load(tmp_path, **config, fold=f) for f in range(1, 4)]
    assert any(o.classes != first.classes for o in others)
    assert source.classes(PointDataConfig(root=str(tmp_path), **config))[0] == first.classes
    for sample in first.train.samples:  # names and labels belong together
        assert sample.name.startswith(first.classes[sample.label])
    with pytest.raises(DataError, match=r"data\.way = 9, and .* has 8 classes"):
        load(tmp_path, way=9, shots=1)
    with pytest.raises(DataError, match="5 training clouds; 6 shots"):
        load(tmp_path, way=3, shots=6)
    with pytest.raises(DataError, match=r"needs data\.shots"):
        load(tmp_path, way=3)
    made.folder(tmp_path / "plain", {"a": 6, "b": 6})
    alone = load(tmp_path / "plain", way=2, shots=2, queries=3)  # without a test split: of the other training clouds
    assert alone.info["sizes"] == {"train": 4, "test": 6} and not set(names(alone.train)) & set(names(alone.test))


# ---- ShapeNetPart as categories


def test_shapenetpart_categories(tmp_path: Path) -> None:
    made.shapenetpart(tmp_path, {"Airplane": ("02691156", 0, 4), "Mug": ("03797390", 36, 2)})
    splits = load(tmp_path)
    assert splits.classes == ("Airplane", "Mug") and splits.info["sizes"] == {"train": 6, "val": 6, "test": 6}
    assert load(tmp_path, splits="trainval").info["sizes"] == {"train": 12, "test": 6}
    (tmp_path / "03797390" / "val0.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 6 clouds of shuffled_val_file_list\.json do not exist"):
        load(tmp_path)
    assert load(tmp_path, skip_bad=True).info["skipped"] == 1
