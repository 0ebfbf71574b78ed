"""Small folders of images for the tests of the diffusion plugin's data and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_image(path: Path, number: int = 0, size: tuple[int, int] = (36, 40), mode: str = "RGB") -> Path:
    """A smooth picture of (height, width), another one for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] / 16
    parts = [np.sin(rows * (1 + number % 3) + k) + np.cos(columns * (1 + number % 5) - k) for k in range(3)]
    pixels = ((np.stack(parts, axis=-1) + 2) * 63).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def captioned(folder: Path, count: int = 6, sizes: tuple[tuple[int, int], ...] = ((36, 40),), **row: Any) -> Path:
    """Images beside metadata.jsonl."""
    lines = []
    for i in range(count):
        write_image(folder / f"{i}.png", i, sizes[i % len(sizes)])
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i % 3}", **row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def bare(folder: Path, count: int = 4, start: int = 0) -> Path:
    """Images alone."""
    for i in range(count):
        write_image(folder / f"{i}.png", start + i)
    return folder
