"""Two halves of scikit-learn's digits: one to pre-train on, one turned by 90 degrees to adapt to ("digits-shifted").

The first 1,100 of the 1,797 images, 8x8, upright, are the *source* of the embedded UNet. The others, lying on their
side, are the *target*: the UNet has seen neither these images nor digits that lie. The data set (UCI "Optical
Recognition of Handwritten Digits", CC BY 4.0) comes with scikit-learn (BSD-3-Clause); nothing is downloaded.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from peft_suite.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLASSES", "NAME", "SIZES", "rows", "source", "target", "upright"]

NAME = "digits-shifted"
CLASSES = tuple(str(digit) for digit in range(10))
SOURCE = 1100  # images in the order of the file
SIZES = {"train": 24, "val": 8, "test": 35}  # images of each class


@functools.cache
def _raw() -> tuple[Tensor, Tensor]:
    """uint8 ``[N, 8, 8, 1]`` (the file's 0..16 as 0..255) and labels ``[N]`` of the whole data set."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "The built-in digits need scikit-learn, which is not installed. Run: pip install 'peft-suite[diffusion]'"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
    return images[..., None], torch.from_numpy(bunch.target).long()


def source() -> tuple[Tensor, Tensor]:
    """uint8 ``[1100, 8, 8, 1]`` upright and their labels: what pre-training may use."""
    images, labels = _raw()
    return images[:SOURCE], labels[:SOURCE]


def upright() -> tuple[Tensor, Tensor]:
    """The images of :func:`target` as they were written: for what an adapted model still knows of the source."""
    images, labels = _raw()
    return images[SOURCE:], labels[SOURCE:]


@functools.cache
def target() -> tuple[Tensor, Tensor]:
    """uint8 ``[697, 8, 8, 1]``, turned by 90 degrees to the left, and their labels."""
    images, labels = upright()
    return images.rot90(1, (1, 2)).contiguous(), labels


def rows(shots: int = 0, seed: int = 0) -> dict[str, list[int]]:
    """Rows of :func:`target` for ``train``, ``val`` and ``test``, the same number of each digit.

    The test images are the last of each digit whatever the seed is; the seed draws the others.

    Args:
        shots: training images of a digit; 0 means all 24.

    Raises:
        DataError: more shots than that.
    """
    import torch

    if not 0 <= shots <= SIZES["train"]:
        raise DataError(f"shots = {shots}: {NAME} has at most {SIZES['train']} training images per class.")
    _, labels = target()
    draw = torch.Generator().manual_seed(seed)
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        every = (labels == digit).nonzero().flatten()
        free, tests = every[: -SIZES["test"]], every[-SIZES["test"] :]
        order = free[torch.randperm(len(free), generator=draw)].tolist()
        splits["val"] += order[: SIZES["val"]]
        splits["train"] += order[SIZES["val"] :][: shots or SIZES["train"]]
        splits["test"] += tests.tolist()
    return splits
