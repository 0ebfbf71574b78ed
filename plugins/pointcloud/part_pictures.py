"""Pictures of segmented clouds for the report: true parts, predicted parts and errors side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from peft_suite.pointcloud.formats import Array
from peft_suite.pointcloud.partlabels import IGNORE
from peft_suite.pointcloud.transforms import thumbnail_png

if TYPE_CHECKING:
    from peft_suite.pointcloud.parts import PartDataset

__all__ = ["ERROR", "RIGHT", "colours", "errors", "part_picture"]

SIDE = 160
RIGHT, ERROR, UNKNOWN = 15, 6, 14  # entries of tab20: light grey, red, grey


def colours(labels: Array, own: Sequence[int]) -> Array:
    """Entries of tab20 for parts ``[N]``: the parts ``own`` of a category get the strong colours first, in order."""
    strong = [0, 2, 4, 8, 10, 12, 16, 18, 1, 3, 5, 9, 11, 13, 17, 19]  # without reds and greys, which mean errors
    entry: Mapping[int, int] = {part: strong[i % len(strong)] for i, part in enumerate(own)}
    return np.array([entry.get(int(label), UNKNOWN) for label in labels], np.int64)


def errors(true: Array, said: Array) -> Array:
    """Entries of tab20 for points ``[N]``: right, wrong, without a label."""
    return np.where(true == IGNORE, UNKNOWN, np.where(true == said, RIGHT, ERROR))


def part_picture(data: PartDataset, index: int, said: Tensor) -> bytes:
    """PNG bytes: the points that the network saw, by true part, by predicted part ``said [N]``, wrong ones in red."""
    from PIL import Image, ImageDraw

    inputs, target = data[index]
    points, true = inputs["points"].numpy(), target.numpy()
    guess = said.numpy().astype(np.int64)
    own = data.parts.ranges[data.samples[index].label]
    share = float((true == guess)[true != IGNORE].mean())
    panels: list[tuple[str, Any]] = [
        ("true parts", colours(true, own)),
        ("predicted", colours(guess, own)),
        (f"{1 - share:.0%} wrong", errors(true, guess)),
    ]
    strip = Image.new("RGB", (3 * SIDE, SIDE + 14), "white")
    pen = ImageDraw.Draw(strip)
    for i, (title, shades) in enumerate(panels):
        with Image.open(io.BytesIO(thumbnail_png(points, SIDE, shades))) as panel:
            strip.paste(panel, (i * SIDE, 14))
        pen.text((i * SIDE + 4, 2), title, fill=(60, 60, 60))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()
