"""The scripts of the guides run as they stand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peft_suite.pointcloud.formats import read_cloud

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def _run(script: str, *arguments: str, folder: Path) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("open3d") is None, reason="open3d is not installed: pip install open3d")
def test_open3d_pipeline_names_most_pieces_of_a_generated_room(tmp_path: Path) -> None:
    printed = _run("open3d_pipeline.py", "--out", "named.ply", folder=tmp_path)
    right, objects = _score(printed)
    assert 6 <= right <= objects <= 9, printed
    cloud = read_cloud(tmp_path / "named.ply")
    assert cloud.colors is not None
    named = np.ptp(cloud.colors, axis=1) > 0.05  # what is not grey
    assert 0.3 < named.mean() < 0.6, "half of the points belong to furniture"
    assert len(np.unique(cloud.colors[named].round(2), axis=0)) >= 3
    assert (tmp_path / "furniture-adapter" / "adapter_model.safetensors").is_file()


def _score(printed: str) -> tuple[int, int]:
    """From "7 of 8 objects named right; the room has 8"."""
    line = next(line for line in printed.splitlines() if "objects named right" in line)
    right, _, objects = line.split()[:3]
    return int(right), int(objects)


def test_data_of_the_guide_reads_back_in_every_format(tmp_path: Path) -> None:
    printed = _run("pointcloud_data.py", "lidar", "--out", "lidar", "--broken", folder=tmp_path)
    assert "74 files" in printed
    for name in ("000.bin", "001.las", "002.pcd"):
        cloud = read_cloud(tmp_path / "lidar" / "test" / "chair" / name)
        assert cloud.intensity is not None and len(cloud.points) > 1000
        low, high = cloud.points.min(0), cloud.points.max(0)
        assert (high - low)[2] > 1, "a chair stands upright along z"


def test_checkpoint_of_the_guide_loads_and_says_what_is_fresh(tmp_path: Path) -> None:
    _run("pointcloud_checkpoint.py", "--make", "pretrain.pth", folder=tmp_path)
    printed = _run("pointcloud_checkpoint.py", "pretrain.pth", folder=tmp_path)
    assert "layout: Point-MAE or ReCon; sizes: depth 12, embed_dim 384" in printed
    assert "not in the file: cls_token, cls_pos, cls_head_finetune (14)" in printed
    assert "mask_token, MAE_decoder (11)" in printed
