"""VTAB-1k, FGVC, few-shot lists and CIFAR's binary version, on trees made by the tests; every preprocessing by name."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import protocol_data as made
import pytest
import torch
from PIL import Image

from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.vision import fewshot, fgvc, vtab
from peft_suite.vision.data import ImageDataConfig, source
from peft_suite.vision.transforms import VARIANTS, Preprocess, erase, resized_crop_augment

HALF = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(root: Path, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(usually it is|instead of)")
        return source.load(ImageDataConfig(root=str(root), **fields), HALF)


# ---- VTAB-1k


def test_vtab_tasks_are_those_of_the_benchmark() -> None:
    assert len(vtab.TASKS) == 19
    assert {g: len(t) for g, t in vtab.GROUPS.items()} == {"Natural": 7, "Specialized": 4, "Structured": 8}
    classes = [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    assert [t.classes for t in vtab.TASKS.values()] == classes
    assert vtab.find_task("cifar100").name == "cifar"
    assert vtab.find_task("oxford_pet").name == "oxford_iiit_pet"
    with pytest.raises(UnknownNameError, match="dmlab"):
        vtab.find_task("dmlap")


def test_vtab_splits(tmp_path: Path) -> None:
    made.vtab_task(tmp_path, "eurosat", 10)
    tune = load(tmp_path, format="vtab", task="eurosat")
    assert tune.info["sizes"] == {"train": 20, "val": 10, "test": 20}
    assert tune.info["task"] == "eurosat" and tune.info["splits"] == "tune"
    final = load(tmp_path, format="vtab", task="eurosat", splits="final")
    assert final.val is None and len(final.train) == 30 and len(final.test) == 20
    assert final.classes == tuple(map(str, range(10)))
    assert load(tmp_path / "eurosat").info["layout"] == "vtab"  # found by its lists
    assert load(tmp_path, task="eurosat").info["layout"] == "vtab"
    with pytest.raises(DataError, match="official"):
        load(tmp_path, format="vtab", task="eurosat", splits="official")


def test_vtab_aliases_and_classes_without_images(tmp_path: Path) -> None:
    place = made.vtab_task(tmp_path, "cifar", 5, folder="cifar100")  # 5 of 100 classes occur
    splits = load(tmp_path, format="vtab", task="cifar")
    assert len(splits.classes) == 100
    assert vtab.task_folder(str(tmp_path), "cifar") == place


def test_vtab_lists_may_have_any_white_space(tmp_path: Path) -> None:
    place = made.vtab_task(tmp_path, "dmlab", 6)
    for name in vtab.LISTS:
        text = (place / f"{name}.txt").read_text().replace(" ", "\t \t").replace("\n", " \r\n") + "\n\n"
        (place / f"{name}.txt").write_text(text, newline="")
    assert load(place).info["sizes"]["train"] == 12


def test_vtab_sizes_are_only_warned_about(tmp_path: Path) -> None:
    made.vtab_task(tmp_path, "kitti", 4)
    with pytest.warns(UserWarning, match="usually it is 711"):
        source.load(ImageDataConfig(root=str(tmp_path), format="vtab", task="kitti"), HALF)


def test_vtab_errors_help(tmp_path: Path) -> None:
    place = made.vtab_task(tmp_path, "dmlab", 6)
    with pytest.raises(DataError, match=r"no folder for the VTAB task 'svhn'.*dmlab"):
        load(tmp_path, format="vtab", task="svhn")
    with pytest.raises(UnknownNameError, match="VTAB task"):
        load(place.rename(tmp_path / "mine"), format="vtab")
    place = (tmp_path / "mine").rename(place)
    (place / "images/test/000000.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 12 images of test.txt do not exist.*000000"):
        load(place)
    assert "first image of test.txt" in vtab.check_layout(str(tmp_path), "dmlab")
    (place / "val200.txt").write_text("images/val200/000000.jpg\n")
    with pytest.raises(DataError, match=r"line 1: expected '<path> <label>'"):
        load(place)
    (place / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"val200.txt' does not exist.*There is: images, test.txt"):
        load(place)
    assert "val200.txt" in vtab.check_layout(str(tmp_path), "dmlab")
    made.vtab_task(tmp_path, "resisc45", 7, folder="kitti")
    with pytest.raises(DataError, match="label 4 is out of range, kitti has the classes 0 to 3"):
        load(tmp_path, format="vtab", task="kitti")
    assert "dmlab" in vtab.check_layout(str(tmp_path), "svhn")


# ---- preprocessing


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_by_hand(name: str) -> None:
    """Resize kind and normalisation of the table of published repositories."""
    torchvision = pytest.importorskip("torchvision.transforms.v2.functional")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    kind = {"vpt": "tf", "v-petl": "bilinear", "vpt-fgvc": "short", "spt-fgvc": "crop", "noah-few-shot": "crop"}
    norm = {"noah-inception": ((0.5,) * 3, (0.5,) * 3), "binary": ((0.0,) * 3, (1.0,) * 3)}
    norm |= dict.fromkeys(("ssf", "hst"), ((0.5,) * 3, (0.5,) * 3))  # the model's own: HALF here
    how = kind.get(name, "bicubic")
    if how == "tf":
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        rows, columns = (nearest_four(n, 32) for n in (50, 70))
        expected = torch.einsum("ih,chw,jw->cij", rows, pixels[0], columns)
    else:
        if how == "short":  # shorter side to 36
            image = picture.resize((50, 36), Image.Resampling.BILINEAR)
        else:
            side = 36 if how == "crop" else 32
            filter = Image.Resampling.BILINEAR if how == "bilinear" else Image.Resampling.BICUBIC
            image = picture.resize((side, side), filter)
        if how in ("short", "crop"):
            image = torchvision.center_crop(image, [32, 32])
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in norm.get(name, IMAGENET))
    goal = Preprocess.from_dict(HALF).variant(name)
    torch.testing.assert_close(goal(picture), (expected - mean) / std, atol=2e-5, rtol=0)
    assert Preprocess.from_dict(goal.to_dict()) == goal  # what an adapter's metadata keeps


def nearest_four(size: int, goal: int) -> torch.Tensor:
    """``[goal, size]`` weights of tf.image.resize's bilinear rule: half-pixel centres, no smoothing."""
    weights = torch.zeros(goal, size)
    for i in range(goal):
        place = max((i + 0.5) * size / goal - 0.5, 0)
        low = int(place)
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, size - 1)] += place - low
    return weights


def test_variants_in_the_configuration(tmp_path: Path) -> None:
    made.vtab_task(tmp_path, "kitti", 4)
    splits = load(tmp_path, format="vtab", task="kitti", preprocess="binary", interpolation="bilinear")
    facts = splits.info["preprocessing"]
    assert facts["mean"] == [0.0] * 3 and facts["resize"] == "squash" and facts["interpolation"] == "bilinear"
    image, _ = splits.train[0]
    assert image.min() >= 0 and image.max() <= 1
    with pytest.raises(UnknownNameError, match="convpass"):
        ImageDataConfig(root="x", preprocess="convpas")
    with pytest.raises(ConfigError, match="interpolation"):
        ImageDataConfig(root="x", interpolation="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("augment", "erase"), [("crop", 0.0), ("resized-crop", 0.0), ("resized-crop", 1.0), ("light", 0)]
)
def test_augmentation_depends_on_epoch_and_index_alone(tmp_path: Path, augment: str, erase: float) -> None:
    made.fgvc_json(tmp_path / "cub", "images", [1, 2])
    train = load(tmp_path, format="fgvc", task="cub", preprocess="vpt-fgvc", augment=augment, erase=erase).train
    first = [train[0][0], train[1][0]]
    assert first[0].shape == (3, 32, 32)
    assert torch.equal(train[0][0], first[0])
    train.set_epoch(1)
    later = [train[0][0], train[1][0]]
    train.set_epoch(0)
    assert any(not torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert torch.equal(train[1][0], first[1])


def test_random_resized_crops_and_erasing_have_the_usual_sizes() -> None:
    goal = Preprocess.from_dict(HALF)
    ramp = np.tile(np.linspace(0, 255, 120, dtype=np.uint8)[None, :, None], (90, 1, 3))
    widths, holes = [], []
    for seed in range(300):
        rng = random.Random(seed)
        image = resized_crop_augment(Image.fromarray(ramp), goal, 0.5, rng)
        assert image.size == (32, 32)
        row = np.asarray(image)[16, :, 0].astype(float)
        widths.append(abs(row[-1] - row[0]) / 255)
        holes.append((erase(torch.full((3, 32, 32), 9.0), 0.25, rng) != 9).float().mean().item())
    share = np.square(widths) * 120 / 90  # of a square of that width
    assert 0.05 < share.min() < 0.2 and 0.8 < max(widths) <= 1
    touched = [h for h in holes if h]
    assert 0.15 < len(touched) / 300 < 0.35 and min(touched) > 0.01 and max(touched) < 0.36
    thin = Image.new("RGB", (200, 4))
    assert resized_crop_augment(thin, goal, 0.0, random.Random(0)).size == (32, 32)


# ---- FGVC


def test_fgvc_json_splits_and_label_order(tmp_path: Path) -> None:
    made.fgvc_json(tmp_path / "CUB_200_2011", "images", [10, 9, 101])
    tune = load(tmp_path, format="fgvc", task="cub")
    assert tune.classes == ("9", "10", "101")  # numbers sort as numbers
    assert tune.info["sizes"] == {"train": 6, "val": 3, "test": 3}
    final = load(tmp_path, format="fgvc", task="cub", splits="final")
    assert final.info["sizes"] == {"train": 9, "test": 3} and final.val is None
    label = {s.name: s.labels[0] for s in tune.train.samples}
    assert label["images/9/train0.jpg"] == 0 and label["images/101/train0.jpg"] == 2


@pytest.mark.parametrize(("task", "images"), [("cub", "images"), ("dogs", "Images"), ("cars", ""), ("flowers", "")])
def test_fgvc_image_roots(tmp_path: Path, task: str, images: str) -> None:
    made.fgvc_json(tmp_path / task, images, ["a", "b"])
    assert len(load(tmp_path / task, format="fgvc").train) == 4


def test_fgvc_official_index_files(tmp_path: Path) -> None:
    folder = tmp_path / "cub"
    rows = [(str(i), f"{i % 2 + 1:03d}/p{i}.jpg", i % 2 + 1, int(i < 4)) for i in range(6)]
    for key, name, label, _ in rows:
        made.image(folder / "images" / name, label, int(key))
    (folder / "images.txt").write_text("".join(f"{k} {n}\n" for k, n, _, _ in rows))
    (folder / "image_class_labels.txt").write_text("".join(f"{k} {c}\n" for k, _, c, _ in rows))
    (folder / "train_test_split.txt").write_text("".join(f"{k} {t}\n" for k, _, _, t in rows))
    splits = load(folder, format="fgvc", splits="official")
    assert splits.info["sizes"] == {"train": 4, "test": 2} and splits.classes == ("1", "2")


def test_fgvc_official_folders_and_matlab_lists(tmp_path: Path) -> None:
    for part, each in (("train", 2), ("val", 1)):
        for label, name in enumerate(("audi", "bmw")):
            for i in range(each):
                made.image(tmp_path / "cars" / part / name / f"{i}.jpg", label, i)
    splits = load(tmp_path, format="fgvc", task="cars", splits="official")
    assert splits.info["sizes"] == {"train": 4, "test": 2} and splits.classes == ("audi", "bmw")
    scipy = pytest.importorskip("scipy.io")
    for part in ("train", "test"):
        names = [f"n{c}/{part}{i}.jpg" for c in range(2) for i in range(2)]
        for i, name in enumerate(names):
            made.image(tmp_path / "dogs" / "Images" / name, i // 2, i)
        cells = np.array([[n] for n in names], dtype=object)
        scipy.savemat(tmp_path / "dogs" / f"{part}_list.mat", {"file_list": cells, "labels": [[1], [1], [2], [2]]})
    splits = load(tmp_path, format="fgvc", task="dogs", splits="official")
    assert splits.info["sizes"] == {"train": 4, "test": 4} and splits.classes == ("1", "2")


def test_fgvc_errors_help(tmp_path: Path) -> None:
    place = made.fgvc_json(tmp_path / "cub", "images", [1, 2])
    with pytest.warns(UserWarning, match="train 4 instead of 5,394.*2 classes instead of 200"):
        source.load(ImageDataConfig(root=str(place), format="fgvc"), HALF)
    (place / "images/1/train0.jpg").unlink()
    with pytest.raises(DataError, match="1 of 4 images of cub's train list"):
        load(place, format="fgvc")
    (place / "val.json").unlink()
    with pytest.raises(DataError, match=r"has no val.json"):
        load(place, format="fgvc")
    assert "does not exist" in fgvc.check_fgvc(str(tmp_path / "no"), "dogs")
    other = made.fgvc_json(tmp_path / "dogs", "Images", [1, 2])
    rows = json.loads((other / "test.json").read_text())
    (other / "test.json").write_text(json.dumps(dict.fromkeys(rows, 7)))
    with pytest.raises(DataError, match="test has others: 7"):
        load(other, format="fgvc")
    with pytest.raises(UnknownNameError, match="nabirds"):
        load(tmp_path, format="fgvc", task="birds")


# ---- few-shot lists


def test_few_shot_lists(tmp_path: Path) -> None:
    made.few_shot(tmp_path / "oxford-pets", "images", 3, shots=2)
    first = load(tmp_path, format="few-shot", task="oxford_pets", shots=2)
    assert first.info["sizes"] == {"train": 6, "val": 3, "test": 3} and len(first.classes) == 37
    other = load(tmp_path, format="few-shot", task="oxford_pets", shots=2, split_seed=1)
    assert {s.name for s in first.train.samples} != {s.name for s in other.train.samples}
    with pytest.raises(DataError, match=r"There is \(shots, seed\): \(2, 0\), \(2, 1\)"):
        load(tmp_path, format="few-shot", task="oxford_pets", shots=4)
    with pytest.raises(DataError, match="shots = 0"):
        load(tmp_path, format="few-shot", task="oxford_pets")
    assert "no" in fewshot.check_few_shot(str(tmp_path), "food101", 1)
    made.few_shot(tmp_path / "stanford_cars", "", 2)
    assert len(load(tmp_path, format="few-shot", task="stanford_cars", shots=1).train) == 2


# ---- CIFAR


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_binary(tmp_path: Path, hundred: bool) -> None:
    place = made.cifar_binary(tmp_path / "cifar", hundred)
    splits = load(place, val_fraction=0.0)
    classes = 100 if hundred else 10
    assert splits.info["layout"] == "cifar-binary" and len(splits.classes) == classes
    assert splits.info["sizes"] == {"train": 200 if hundred else 100, "test": 2 * classes}
    raw = (place / ("test.bin" if hundred else "test_batch.bin")).read_bytes()
    start = 2 if hundred else 1
    planes = np.frombuffer(raw[start : start + 3072], np.uint8).reshape(3, 32, 32)
    assert np.array_equal(np.asarray(splits.test.image(0)), planes.transpose(1, 2, 0))
    assert splits.test[3][1] == 3
    assert "val" in load(place).info["sizes"]  # held out of train as for any data


def test_cifar_refuses_pickles_and_damage(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"never opened.*binary version"):
        load(folder)
    place = made.cifar_binary(tmp_path / "ten", False)
    (place / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="damaged"):
        load(place)
    (tmp_path / "cifar.tar").write_bytes(b"")
    with pytest.raises(DataError, match="Unpack the archive"):
        load(tmp_path / "cifar.tar")
