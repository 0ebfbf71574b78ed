"""What the report shows of segmented clouds: the parts that the network said, at the points that it saw, errors red."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import cloud_data as made
import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from peft_suite.cli.app import build
from peft_suite.pointcloud.part_pictures import ERROR, RIGHT, UNKNOWN, colours, errors, part_picture
from peft_suite.pointcloud.partlabels import IGNORE
from peft_suite.pointcloud.parts import PartDataConfig, source

RED = (214, 39, 40)  # tab20's sixth entry


def panels(picture: bytes) -> list[np.ndarray[Any, Any]]:
    image = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    assert image.shape == (174, 480, 3)
    return [image[14:, i * 160 : (i + 1) * 160] for i in range(3)]


def reds(panel: np.ndarray[Any, Any]) -> int:
    return int((panel == RED).all(-1).sum())


def test_entries_of_the_colour_table() -> None:
    true, said = np.array([4, 5, IGNORE, 4]), np.array([4, 4, 4, 5])
    assert errors(true, said).tolist() == [RIGHT, ERROR, UNKNOWN, ERROR]
    assert colours(true, (4, 5)).tolist() == [0, 2, UNKNOWN, 0]
    assert len(set(colours(np.arange(6), range(6)).tolist()) | {RIGHT, ERROR, UNKNOWN}) == 9


def test_a_picture_shows_the_points_that_the_network_saw(tmp_path: Path) -> None:
    made.shapenetpart(tmp_path, {"Airplane": ("02691156", 0, 4), "Mug": ("03797390", 36, 2)})
    splits = source.load(PartDataConfig(root=str(tmp_path)), {"num_points": 32, "group_size": 8})
    target = splits.test[4][1]
    assert splits.picture is part_picture
    right = panels(part_picture(splits.test, 4, target))
    assert np.array_equal(right[0], right[1]) and reds(right[2]) == 0
    swapped = torch.where(target == 36, 37, 36)
    wrong = panels(part_picture(splits.test, 4, swapped))
    assert np.array_equal(wrong[0], right[0]) and not np.array_equal(wrong[1], wrong[0])
    assert reds(wrong[2]) > 60 and reds(wrong[0]) == reds(wrong[1]) == 0


def test_what_the_task_keeps_is_what_was_said(tmp_path: Path) -> None:
    made.shapenetpart(tmp_path, {"Airplane": ("02691156", 0, 4), "Mug": ("03797390", 36, 2)})
    splits = source.load(PartDataConfig(root=str(tmp_path)), {"num_points": 32, "group_size": 8})
    target = torch.stack([splits.test[i][1] for i in (0, 4)])
    output = torch.randn(2, 32, len(splits.classes), generator=torch.Generator().manual_seed(0))
    kept, counts = splits.task.reduce(output, target)
    outcome = splits.task.outcome(kept, counts)
    own = [slice(0, 4), slice(36, 38)]
    for i, part in enumerate(own):
        assert torch.equal(outcome.maps[i], output[i][:, part].argmax(1) + part.start)
    accuracy = splits.task.metrics(kept, counts)["point_accuracy"]
    assert abs(float((outcome.maps == target).float().mean()) - accuracy) < 1e-6


def test_the_report_has_them(tmp_path: Path) -> None:
    made.shapenetpart(tmp_path / "d", {"Airplane": ("02691156", 0, 4), "Mug": ("03797390", 36, 2)})
    sizes = {"embed_dim": 24, "num_heads": 2, "depth": 3, "groups": 8, "group_size": 8}
    words = [f"backbone.options.{k}={v}" for k, v in sizes.items()]
    words += ["task=segmentation", "data.num_points=32", "backbone.options.categories=2"]
    words += ["--method", "linear", "--epochs", "1", "--batch-size", "6", "--device", "cpu"]
    words += ["--data", str(tmp_path / "d"), "--out", str(tmp_path / "run")]
    start = ["pointcloud", "train", "--backbone", "point-mae", "--no-pretrained"]
    result = CliRunner().invoke(build(), [*start, *words])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    stored = json.loads((tmp_path / "run" / "examples.json").read_text())["png"]
    assert len(stored) == len(record["examples"]) == 6 and {e["correct"] for e in record["examples"]} == {True, False}
    for image in stored:
        three = panels(base64.b64decode(image))
        assert all((panel != 255).any() for panel in three)  # every panel shows points
    page = (tmp_path / "run" / "report.html").read_text()
    shown = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert set(stored) <= set(shown)
