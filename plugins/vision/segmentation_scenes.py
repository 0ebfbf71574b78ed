"""Scenes with known masks: pictures of single objects pasted on a textured canvas, for trying out segmentation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from peft_suite.errors import DataError
from peft_suite.vision.lists import EXTENSIONS

__all__ = ["compose", "write_scenes"]


def compose(
    pictures: Sequence[Sequence[Image.Image]], size: int, objects: int, rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """One scene and its mask ``[size, size]`` of class indices: 0 is the canvas, ``1 + i`` shows ``pictures[i]``.

    Up to ``objects`` pictures, each cut out as an ellipse or a rectangle at its own scale; later ones may hide earlier
    ones, which lose those pixels in the mask too.
    """
    noise = np.random.default_rng(rng.randrange(2**32))
    coarse = noise.integers(40, 216, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.int64)
    canvas = Image.fromarray((smooth + noise.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8))
    mask = Image.new("L", (size, size), 0)
    for _ in range(rng.randint(max(1, objects // 2), objects)):
        index = rng.randrange(len(pictures))
        side = round(size * rng.uniform(0.3, 0.55))
        picture = rng.choice(pictures[index]).resize((side, side), Image.Resampling.BICUBIC)
        shape = Image.new("L", (side, side), 0)
        draw = ImageDraw.Draw(shape)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((0, 0, side - 1, side - 1), fill=255)
        corner = (rng.randint(0, size - side), rng.randint(0, size - side))
        canvas.paste(picture, corner, shape)
        mask.paste(index + 1, (*corner, corner[0] + side, corner[1] + side), shape)
    return canvas, mask


def write_scenes(
    source: Path,
    out: Path,
    counts: dict[str, int],
    *,
    size: int = 64,
    objects: int = 4,
    per_class: int = 500,
    seed: int = 0,
) -> Path:
    """A data set of the "pairs" layout from folders of single objects, ``SOURCE/SPLIT/CLASS/IMAGE`` (CIFAR-10's form).

    Args:
        counts: scenes per split; "val" takes pictures of the training split that "train" does not use.
        per_class: pictures per class and split to choose from.

    Raises:
        DataError: ``source`` has no such folders.
    """
    names: tuple[str, ...] = ()
    for split, count in counts.items():
        folder = source / ("test" if split == "test" else "train")
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist. Give a folder with train/CLASS/IMAGE and test/CLASS/IMAGE.")
        names = names or tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        start = per_class if split == "val" else 0
        pictures = [_load(folder / name, start, per_class) for name in names]
        rng = random.Random(f"scenes/{split}/{seed}")
        for kind in ("images", "masks"):
            (out / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = compose(pictures, size, objects, rng)
            image.save(out / split / "images" / f"{i:05d}.png")
            mask.save(out / split / "masks" / f"{i:05d}.png")
    (out / "classes.txt").write_text("\n".join(("canvas", *names)) + "\n", encoding="utf-8")
    return out


def _load(folder: Path, start: int, count: int) -> list[Image.Image]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)[start : start + count]
    if not files:
        raise DataError(f"{folder} has no images from number {start} on.")
    return [Image.open(p).convert("RGB") for p in files]
