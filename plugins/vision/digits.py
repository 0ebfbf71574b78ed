"""The demo's data: two halves of scikit-learn's digits, one to pre-train on, one shifted and with few labels.

The first half of the 1,797 images (in the order of the file) is the *source*: upright, grey, bright on dark. The second
half is the *target* "digits-shifted": upside down, dark on a bright ground with colours, a ramp and noise.
No target image was ever seen in pre-training. The data set (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0)
comes with scikit-learn (BSD-3-Clause); nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

    from peft_suite.vision.lists import Listing

__all__ = ["CLASSES", "DEMO_DATA", "DEMO_METHODS", "DEMO_RECIPES", "NAME", "listing", "source_half", "target_half"]

NAME = "digits-shifted"
CLASSES = tuple(str(digit) for digit in range(10))
SHIFT_SEED = 20
VAL_PER_CLASS = 5
TEST_PER_CLASS = 60
DEFAULT_SHOTS = 20

_COMMON: Mapping[str, Any] = MappingProxyType(
    # 50 validation images are too few to choose an epoch by: the last one is taken
    {"epochs": 35, "batch_size": 32, "warmup_epochs": 2.0, "eval_every": 7, "checkpoint_every": 0, "select": "last"}
)
_LR: Mapping[str, float] = MappingProxyType(
    {"linear": 0.1, "full": 0.002, "bitfit": 0.04, "lora": 0.02, "adapter": 0.01, "ssf": 0.04, "vpt": 0.03}
)

DEMO_DATA: Mapping[str, Any] = MappingProxyType({"root": NAME, "shots": DEFAULT_SHOTS, "augment": "light"})
DEMO_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "linear": "linear",
        "full": "full",
        "bitfit": "bitfit",
        "lora": "lora",
        "adapter": "adapter(bottleneck=32, insertion=parallel)",
        "ssf": "ssf",
        "vpt": "vpt(num_tokens=10, deep=True)",
    }
)
DEMO_RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: MappingProxyType({**_COMMON, "lr": lr}) for name, lr in _LR.items()}
)


@functools.cache
def _raw() -> tuple[Tensor, Tensor]:
    """Intensities ``[N, 8, 8]`` in 0..1 and labels ``[N]`` of the whole data set."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "The built-in digits need scikit-learn, which is not installed. Run: pip install 'peft-suite[vision]'"
        ) from error
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)


def source_half() -> tuple[Tensor, Tensor]:
    """``[898, 8, 8]`` intensities and labels of the half that pre-training may use."""
    images, labels = _raw()
    return images[: len(images) // 2], labels[: len(images) // 2]


@functools.cache
def target_half() -> tuple[np.ndarray[Any, Any], Tensor]:
    """``[899, 32, 32, 3]`` uint8 images of the shifted task and their labels; the same on every call."""
    import torch

    images, labels = _raw()
    half = len(images) // 2
    generator = torch.Generator().manual_seed(SHIFT_SEED)
    shifted = render_target(images[half:], generator).permute(0, 2, 3, 1)
    return (shifted * 255).round().to(torch.uint8).contiguous().numpy(), labels[half:]


def listing(shots: int, seed: int, eval_shots: int = 0) -> tuple[Listing, np.ndarray[Any, Any]]:
    """Splits of the shifted task drawn by ``seed``, balanced over the digits, and the images behind ``Sample.row``.

    Train has ``shots`` images per class, validation 5, test 60 (or ``eval_shots`` where that is fewer).

    Raises:
        DataError: more shots than there are images left.
    """
    import torch

    from peft_suite.vision.lists import Listing, Sample

    images, labels = target_half()
    most = int(labels.bincount().min()) - VAL_PER_CLASS - TEST_PER_CLASS
    if shots > most:
        raise DataError(f"shots = {shots}: {NAME} has at most {most} training images per class.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sizes = {"test": TEST_PER_CLASS, "val": VAL_PER_CLASS, "train": shots}
    splits: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        rest = order[labels[order] == digit].tolist()
        for split, size in sizes.items():
            taken, rest = rest[:size], rest[size:]
            keep = min(size, eval_shots) if eval_shots and split != "train" else size
            splits[split] += [Sample(f"digit-{row:03d}", (digit,), row=row) for row in taken[:keep]]
    return Listing(CLASSES, splits, layout=NAME), images


def upright_target() -> Tensor:
    """``[899, 8, 8]`` intensities behind :func:`target_half`, for measuring only."""
    images, _ = _raw()
    return images[len(images) // 2 :]


def render_source(digits: Tensor, generator: Generator | None) -> Tensor:
    """``[B, 8, 8]`` to bright upright grey digits on dark, ``[B, 3, 32, 32]`` in 0..1; plain without a generator."""
    import torch

    b = len(digits)
    if generator is None:
        mask = warp(digits, torch.zeros(b), torch.zeros(b, 2), torch.full((b,), 0.85))
        return (0.05 + 0.85 * mask).unsqueeze(1).expand(-1, 3, -1, -1)
    draw = functools.partial(_uniform, generator)
    mask = warp(digits, draw(-10, 10, b), draw(-0.1, 0.1, b, 2), draw(0.75, 0.95, b))
    front, back = draw(0.8, 1.0, b, 1, 1), draw(0.0, 0.1, b, 1, 1)
    return (back + (front - back) * mask).unsqueeze(1).expand(-1, 3, -1, -1)


def render_target(digits: Tensor, generator: Generator) -> Tensor:
    """``[B, 8, 8]`` to dark digits turned upside down on bright coloured ground, ``[B, 3, 32, 32]`` in 0..1."""
    import torch

    b = len(digits)
    draw = functools.partial(_uniform, generator)
    mask = warp(digits, 180 + draw(-8, 8, b), draw(-0.1, 0.1, b, 2), draw(0.7, 0.95, b)).unsqueeze(1)
    front, back = draw(0.0, 0.3, b, 3, 1, 1), draw(0.6, 1.0, b, 3, 1, 1)
    slope, axis = draw(-0.2, 0.2, b, 2, 1, 1), torch.linspace(-1, 1, 32)
    ramp = slope[:, 0] * axis[None, :, None] + slope[:, 1] * axis[None, None, :]  # [B, 32, 32]
    image = (back + ramp.unsqueeze(1)) * (1 - mask) + front * mask
    return (image + 0.05 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def warp(digits: Tensor, degrees: Tensor, shift: Tensor, scale: Tensor, size: int = 32) -> Tensor:
    """Rotate, shift and enlarge ``[B, 8, 8]`` to ``[B, size, size]``; ``scale`` is the filled share of the side."""
    import torch
    import torch.nn.functional as F

    radians = torch.deg2rad(degrees)
    cos, sin = torch.cos(radians) / scale, torch.sin(radians) / scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [len(digits), 1, size, size], align_corners=False)
    out = F.grid_sample(digits.unsqueeze(1), grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return out.squeeze(1).clamp(0, 1)


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    import torch

    return torch.rand(*shape, generator=generator) * (high - low) + low
