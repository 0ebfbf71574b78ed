"""Part segmentation: layouts with a label for every point, the metrics, and what is wrong with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloud_data as made
import numpy as np
import pytest
import torch

from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.partlabels import IGNORE, Parts
from peft_suite.pointcloud.parts import PartDataConfig, PartSegmentation, part_counts, source
from peft_suite.pointcloud.shapenetpart import PARTS

SMALL = {"num_points": 32, "group_size": 8}
TWO = Parts(("a/0", "a/1", "a/2", "b/0", "b/1"), ("a", "b"), ((0, 1, 2), (3, 4)), ((0, 1, 2), (0, 1)))


def load(root: Path, **fields: Any) -> Any:
    return source.load(PartDataConfig(root=str(root), **fields), SMALL)


def labelled(file: Path, number: int, parts: int, columns: str = "last") -> None:
    points = made.cloud(0, number)
    label = (points[:, 0] > np.median(points[:, 0])).astype(int) * (parts - 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(file, np.concatenate([points, label[:, None]], 1), "%.6f")


def test_parts_of_shapenet() -> None:
    assert sum(len(p) for p in PARTS.values()) == 50 and len(PARTS) == 16
    spans = {n: (p[0], p[-1]) for n, p in PARTS.items()}
    assert spans["Motorbike"] == (30, 35) and spans["Table"] == (47, 49) and spans["Lamp"] == (24, 27)


def test_shapenetpart(tmp_path: Path) -> None:
    made.shapenetpart(tmp_path, {"Airplane": ("02691156", 0, 4), "Mug": ("03797390", 36, 2)})
    splits = load(tmp_path, splits="trainval", augment="part-segmentation")
    assert splits.info["categories"] == ["Airplane", "Mug"] and len(splits.classes) == 38
    inputs, target = splits.test[3]
    assert inputs["points"].shape == (32, 3) and inputs["category"] == 1 and set(target.tolist()) == {36, 37}
    assert isinstance(splits.task, PartSegmentation) and splits.classes[36] == "Mug/0"
    splits.task.check(torch.stack([splits.train.target(i) for i in range(len(splits.train))]), "train")
    batch = torch.utils.data.default_collate([splits.train[i] for i in range(3)])
    assert batch[0]["points"].shape == (3, 32, 3) and batch[0]["category"].shape == (3,) and batch[1].shape == (3, 32)
    assert source.classes(PartDataConfig(root=str(tmp_path)))[0] == splits.classes


def test_labels_follow_their_points(tmp_path: Path) -> None:
    for i in range(4):
        labelled(tmp_path / f"{i}.txt", i, 2)
    splits = load(tmp_path, augment="drop+crop+rotate", normalize="none")
    assert splits.classes == ("0", "1") and splits.info["categories"] == ["object"]
    for epoch in range(3):
        splits.train.set_epoch(epoch)
        inputs, target = splits.train[0]
        whole = np.loadtxt(tmp_path / splits.train.samples[0].name)
        height = {round(float(row[1]), 5): int(row[3]) for row in whole}  # rotation keeps y
        assert [height[round(float(y), 5)] for y in inputs["points"][:, 1]] == target.tolist()
    first, again = splits.val[0], load(tmp_path, normalize="none").val[0]
    assert torch.equal(first[0]["points"], again[0]["points"]) and torch.equal(first[1], again[1])


def test_own_data_with_categories_sidecars_and_names(tmp_path: Path) -> None:
    for i in range(3):
        labelled(tmp_path / "train" / "chair" / f"{i}.txt", i, 3)  # labels 0 and 2
        for split in ("train", "test"):
            place = tmp_path / split / "lamp"
            place.mkdir(parents=True, exist_ok=True)
            np.save(place / f"{i}.npy", made.cloud(1, i))
            (place / f"{i}.seg").write_text("\n".join(str(k % 2) for k in range(64)))
    splits = load(tmp_path, val_fraction=0.34)
    assert splits.classes == ("chair/0", "chair/2", "lamp/0", "lamp/1")
    assert splits.info["sizes"] == {"train": 4, "test": 3, "val": 2}
    (tmp_path / "parts.txt").write_text("chair back seat leg\nlamp foot shade\n")
    named = load(tmp_path, val_fraction=0.34)
    assert named.classes == ("chair/back", "chair/seat", "chair/leg", "lamp/foot", "lamp/shade")
    assert set(named.test[0][1].tolist()) == {3, 4}
    (tmp_path / "test" / "lamp" / "0.seg").unlink()
    np.full(64, 1 | 7 << 16, "<u4").tofile(tmp_path / "test" / "lamp" / "0.label")  # SemanticKITTI: the lower half
    assert load(tmp_path, val_fraction=0.34).test.both(0)[1].tolist() == [4] * 64


def test_hdf5_with_pid(tmp_path: Path) -> None:
    pid = np.tile(np.arange(64) % 3, (6, 1))
    made.hdf5(tmp_path / "a.h5", [0, 0, 0, 1, 1, 1], pid=pid)
    splits = load(tmp_path / "a.h5", val_fraction=0.34)
    assert splits.classes == tuple(f"{c}/{i}" for c in (0, 1) for i in range(3)) and len(splits.val) == 2
    made.hdf5(tmp_path / "b.h5", [0, 0, 1, 1], pid=pid[:4, :50])
    with pytest.raises(DataError, match="64 points and 50 labels"):
        load(tmp_path / "b.h5")


def test_bad_labels_are_named(tmp_path: Path) -> None:
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", made.cloud(0, i))
        (tmp_path / f"{i}.labels").write_text("\n".join(str(k % 2) for k in range(64)))
    assert load(tmp_path, val_fraction=0.0).info["sizes"] == {"train": 4}

    def refused(text: str, match: str) -> None:
        (tmp_path / "1.labels").write_text(text)
        with pytest.raises(DataError, match=match) as caught:
            load(tmp_path, val_fraction=0.0)
        assert "1.npy" in str(caught.value)
        assert load(tmp_path, val_fraction=0.0, skip_bad=True).info["skipped"] == 1

    refused("0\n1\n" * 20, r"64 points, 40 labels in 1\.labels")
    refused("0\none\n", "something else than whole numbers")
    refused("-1\n" * 64, "none of its points has a label")
    for split in ("train", "test"):
        for i in range(2):
            labelled(tmp_path / "d" / split / f"{i}.txt", i, 2 if split == "train" else 5)
    with pytest.raises(DataError, match=r"part 4 does not belong to 'object', whose parts are 0, 1"):
        load(tmp_path / "d")
    np.save(tmp_path / "d" / "train" / "2.npy", made.cloud())
    with pytest.raises(DataError, match=r"3 columns|2 columns of unknown|2\.npy"):
        load(tmp_path / "d")
    made.modelnet_txt(tmp_path / "m", ["a"])
    with pytest.raises(DataError, match="has no labels of points"):
        load(tmp_path / "m")


# ---- metrics


def onehot(parts: list[list[int]]) -> Any:
    return torch.nn.functional.one_hot(torch.tensor(parts), 5).float() * 9


def test_miou_by_hand() -> None:
    task = PartSegmentation(TWO)
    target = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [3, 3, 4, 4], [3, 3, 3, IGNORE]])
    said = onehot([[0, 0, 0, 1], [0, 0, 0, 0], [3, 3, 4, 4], [3, 4, 3, 4]])
    kept, counts = task.reduce(said, target)
    # cloud 0: part 0 2/3, part 1 1/2, part 2 absent: 1; cloud 1: all 1; cloud 2: 1; cloud 3: 2/3 and 0
    each = [(2 / 3 + 1 / 2 + 1) / 3, 1.0, 1.0, (2 / 3 + 0) / 2]
    metrics = task.metrics(kept, counts)
    assert metrics["instance_miou"] == pytest.approx(sum(each) / 4)
    assert metrics["category_miou"] == pytest.approx(((each[0] + each[1]) / 2 + (each[2] + each[3]) / 2) / 2)
    assert metrics["point_accuracy"] == pytest.approx(13 / 15)
    assert task.primary == "instance_miou"
    assert task.per_class(kept, counts)["a/1"] == pytest.approx((1 / 2 + 1) / 2)
    assert task.per_category(kept)["b"] == pytest.approx((each[2] + each[3]) / 2)
    assert task.outcome(kept, counts).target == ["a", "a", "b", "b"]
    loss = torch.nn.functional.cross_entropy(said.reshape(-1, 5), target.reshape(-1), ignore_index=IGNORE)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (task.loss(said, target).sum() / task.mass(target).sum()).item() == pytest.approx(loss.item(), rel=1e-5)


def test_predictions_are_of_the_clouds_category() -> None:
    task = PartSegmentation(TWO)
    said = onehot([[3, 3, 4, 4]]) + onehot([[0, 0, 1, 1]]) / 9  # another category's parts score higher
    kept, counts = task.reduce(said, torch.tensor([[0, 0, 1, 1]]))
    assert task.metrics(kept, counts)["instance_miou"] == 1.0


def test_weights_counts_and_checks() -> None:
    task = PartSegmentation(TWO)
    target = torch.tensor([[0, 0, 1, IGNORE], [3, 4, 4, 4]])
    counts = part_counts(target, 5)
    assert counts.tolist() == [[2, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 3, 0, 0]]
    task.check(counts, "train")
    with pytest.raises(DataError, match="first number 1"):
        task.check(part_counts(torch.tensor([[0, 1], [1, 7]]), 5), "train")
    weights = task.class_weights(counts)
    assert weights.mean().item() == pytest.approx(1) and weights[1] > weights[4]
    assert task.mass(target, weights)[0].item() == pytest.approx((2 * weights[0] + weights[1]).item())
    with pytest.raises(ConfigError, match=r"outputs \[B, N, P\]"):
        task.loss(torch.zeros(2, 5, 4), torch.zeros(2, 3).long())


def test_a_segmenter_trains_and_is_evaluated(tmp_path: Path) -> None:
    from peft_suite.pointcloud.models.segmentation import PartSegmenter
    from peft_suite.train import evaluate

    made.shapenetpart(tmp_path, {"Airplane": ("02691156", 0, 4), "Bag": ("02773838", 4, 2)}, each=2)
    splits = load(tmp_path, augment="part-segmentation")
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "groups": 8, "group_size": 8}
    model = PartSegmenter(len(splits.classes), categories=2, **sizes)
    inputs, target = torch.utils.data.default_collate([splits.train[i] for i in range(4)])
    output = model(**inputs)
    loss = splits.task.loss(output, target).sum() / splits.task.mass(target).sum()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.convs3.parameters())
    result = evaluate(model, splits.test, splits.task, batch_size=2, device="cpu")
    assert 0 <= result["metrics"]["instance_miou"] <= 1 and result["samples"] == 4


def test_parts_of_files_are_written_for_every_point(tmp_path: Path) -> None:
    from peft_suite.pointcloud.formats import read_cloud

    for name in ("chair", "lamp"):
        for i in range(3):
            labelled(tmp_path / "d" / "train" / name / f"{i}.txt", i, 2)
    splits = load(tmp_path / "d", normalize="unit-cube")
    assert splits.info["preprocessing"]["parts"] == {"chair": [0, 1], "lamp": [2, 3]}
    names, data = source.inputs([str(tmp_path / "d" / "train")], splits.info["preprocessing"])
    sample = data[5]
    assert sample["points"].shape == (32, 3) and sample["category"] == 1

    def answers() -> Any:  # the half with small x is the first part; every other category's parts score higher
        for i in range(len(data)):  # type: ignore[arg-type]
            low = data[i]["points"][:, 0] < 0
            score = torch.stack([low, ~low], 1).float()
            own = torch.zeros(32, 4) + 5
            first = 2 * data[i]["category"]
            own[:, first : first + 2] = score
            yield own[None]

    rows = source.write(names, answers(), tmp_path / "out", splits.classes)
    assert [r["category"] for r in rows] == ["chair"] * 3 + ["lamp"] * 3
    assert set(rows[5]["parts"]) == {"lamp/0", "lamp/1"} and rows[0]["file"] == names[0]
    cloud = read_cloud(rows[5]["written"])
    original = np.loadtxt(names[5])
    np.testing.assert_allclose(cloud.points, original[:, :3])  # all 64 points, as they are in the file
    assert cloud.labels is not None and set(cloud.labels.tolist()) == {2, 3} and cloud.colors is not None
    assert (cloud.labels - 2 == original[:, 3]).mean() > 0.8
    plain, unknown = source.inputs(
        [str(tmp_path / "d" / "train" / "chair"), rows[5]["written"]],
        {**splits.info["preprocessing"], "parts": {"a": [0], "b": [1, 2, 3]}},
    )
    assert unknown[0].shape == (32, 3) and len(plain) == 4  # no category is known
    with pytest.raises(DataError, match="pass these on"):
        source.write(list(names), answers(), tmp_path / "out", splits.classes)
