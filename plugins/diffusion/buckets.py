"""Aspect-ratio buckets: images keep their shape, as far as possible, at about the same number of pixels.

Sides are multiples of ``step``; every bucket has at most ``resolution^2`` pixels, and so many that another step would
exceed them. A batch holds images of one bucket only (``group(index)`` of the data set). NovelAI, 2022.
"""

from __future__ import annotations

import math

__all__ = ["bucket_of", "bucket_sizes"]


def bucket_sizes(resolution: int, step: int, ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket whose sides differ by at most ``ratio``, from tall to wide."""
    found = {(resolution, resolution)}
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if long <= ratio * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda size: (size[1] / size[0], size)))


def bucket_of(height: int, width: int, buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, in octaves; of equals the one with more pixels."""
    wanted = math.log(width / height)
    return min(buckets, key=lambda size: (round(abs(math.log(size[1] / size[0]) - wanted), 9), -size[0] * size[1]))
