"""From a decoded image to the tensor that the backbone expects, and back to something a person can look at."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from peft_suite.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "VARIANTS",
    "Preprocess",
    "StandardAugment",
    "Variant",
    "crop_augment",
    "erase",
    "light_augment",
    "resized_crop_augment",
    "thumbnail_png",
    "to_rgb",
]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "tf-bilinear": Image.Resampling.BILINEAR,  # without smoothing, see Preprocess.__call__
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_SHORT = 224 / 256  # the crop's share of the resized side


@dataclass(frozen=True)
class Variant:
    """How one repository prepares images. ``norm`` is (mean, std), None for what the backbone was trained with."""

    resize: str
    interpolation: str
    norm: tuple[tuple[float, ...], tuple[float, ...]] | None
    crop_pct: float = 1.0


VARIANTS: Mapping[str, Variant] = {
    # VTAB-1k: both sides to the input size, no augmentation
    "vpt": Variant("squash", "tf-bilinear", _IMAGENET),
    "noah": Variant("squash", "bicubic", _IMAGENET),
    "noah-inception": Variant("squash", "bicubic", _HALF),
    "ssf": Variant("squash", "bicubic", None),
    "hst": Variant("squash", "bicubic", None),
    "spt": Variant("squash", "bicubic", _IMAGENET),
    "snell": Variant("squash", "bicubic", _IMAGENET),
    "convpass": Variant("squash", "bicubic", _IMAGENET),
    "fact": Variant("squash", "bicubic", _IMAGENET),
    "binary": Variant("squash", "bicubic", _PLAIN),
    "v-petl": Variant("squash", "bilinear", _IMAGENET),
    # FGVC and few-shot
    "vpt-fgvc": Variant("crop", "bilinear", _IMAGENET, _SHORT),
    "spt-fgvc": Variant("squash-crop", "bicubic", _IMAGENET, _SHORT),
    "noah-few-shot": Variant("squash-crop", "bicubic", _IMAGENET, _SHORT),
}


@dataclass(frozen=True)
class Preprocess:
    """The backbone's input: size, normalisation and how an image of another shape is brought to that size.

    ``resize="crop"`` scales the shorter side to ``size / crop_pct`` and cuts the centre (timm's rule); ``"squash"``
    scales both sides and gives up the aspect ratio (the rule of VTAB); ``"squash-crop"`` scales both sides to
    ``size / crop_pct`` and cuts the centre.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    resize: str = "crop"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read what :meth:`Backbones.preprocessing` wrote; missing keys take timm's defaults.

        Raises:
            DataError: a description that this plugin cannot serve.
        """
        size = tuple(int(n) for n in values.get("input_size", (3, 224, 224)))
        mean = tuple(float(v) for v in values.get("mean", (0.485, 0.456, 0.406)))
        std = tuple(float(v) for v in values.get("std", (0.229, 0.224, 0.225)))
        if len(size) != 3 or size[0] != 3 or min(size) < 1:
            raise DataError(f"Preprocessing input_size = {size}: images are read as RGB, so it must be [3, H, W].")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise DataError(f"Preprocessing mean = {mean}, std = {std}: give three numbers each, std above 0.")
        name = str(values.get("interpolation", "bicubic"))
        if name not in _FILTERS:
            raise DataError(f"Preprocessing interpolation = {name!r}: choose one of {', '.join(_FILTERS)}.")
        crop = float(values.get("crop_pct") or 1.0)
        return cls(size[1], size[2], mean, std, name, crop, str(values.get("resize", "crop")))

    def variant(self, name: str) -> Preprocess:
        """A copy that prepares images as the named repository does, at the same size; "" changes nothing.

        Raises:
            UnknownNameError: with the closest names.
        """
        if not name:
            return self
        if name not in VARIANTS:
            raise UnknownNameError("preprocessing", name, VARIANTS, "Leave it empty for the backbone's own.")
        chosen = VARIANTS[name]
        mean, std = chosen.norm or (self.mean, self.std)
        return replace(
            self,
            mean=mean,
            std=std,
            interpolation=chosen.interpolation,
            crop_pct=chosen.crop_pct,
            resize=chosen.resize,
        )

    def override(
        self, mean: tuple[float, ...], std: tuple[float, ...], resize: str, interpolation: str = ""
    ) -> Preprocess:
        """A copy with the fields that a data configuration sets; empty values keep what the backbone says."""
        return replace(
            self,
            mean=mean or self.mean,
            std=std or self.std,
            resize=resize or self.resize,
            interpolation=interpolation or self.interpolation,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form that :meth:`from_dict` reads."""
        return {
            "input_size": [3, self.height, self.width],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "resize": self.resize,
        }

    @property
    def filter(self) -> Image.Resampling:
        return _FILTERS[self.interpolation]

    def fit(self, image: Image.Image) -> Image.Image:
        """An image of exactly ``height x width``, without randomness."""
        image = self.scaled(image)
        if image.size == (self.width, self.height):
            return image
        left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
        return image.crop((left, top, left + self.width, top + self.height))

    def scaled(self, image: Image.Image) -> Image.Image:
        """The image before the crop."""
        wide, high = int(self.width / self.crop_pct), int(self.height / self.crop_pct)
        if self.resize == "squash":
            scaled = (self.width, self.height)
        elif self.resize == "squash-crop":
            scaled = (wide, high)
        else:
            w, h = image.size
            scale = max(wide / w, high / h)  # timm floors, then scales
            scaled = (max(self.width, int(w * scale + 1e-6)), max(self.height, int(h * scale + 1e-6)))
        return image if image.size == scaled else image.resize(scaled, self.filter)

    def __call__(self, image: Image.Image) -> Tensor:
        """Fitted and normalised, ``[3, H, W]``.

        "tf-bilinear" takes the four nearest pixels however much it shrinks, without rounding, as ``tf.image.resize``
        does; Pillow averages over all that fall into one.
        """
        if self.interpolation != "tf-bilinear" or self.resize != "squash":
            return self.tensor(self.fit(image))
        import torch

        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float()
        if image.size != (self.width, self.height):
            pixels = torch.nn.functional.interpolate(
                pixels, (self.height, self.width), mode="bilinear", align_corners=False
            )
        return self._normalised(pixels[0])

    def tensor(self, image: Image.Image) -> Tensor:
        """Normalised ``[3, H, W]`` float tensor."""
        import torch

        return self._normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float())

    def _normalised(self, pixels: Tensor) -> Tensor:
        """``[3, H, W]`` in 0..255, which is overwritten."""
        import torch

        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return pixels.div_(255).sub_(mean).div_(std).contiguous()


def light_augment(image: Image.Image, goal: Preprocess, hflip: float, rng: random.Random) -> Image.Image:
    """The fitted image moved by at most a sixteenth of its side (border pixels repeat), and perhaps mirrored.

    On small images and few labels this beat random resized crops, which blur them, by 2 to 4 points.
    """
    pixels = np.asarray(goal.fit(image))
    dy, dx = max(1, goal.height // 16), max(1, goal.width // 16)
    padded = np.pad(pixels, ((dy, dy), (dx, dx), (0, 0)), mode="edge")
    top, left = rng.randint(0, 2 * dy), rng.randint(0, 2 * dx)
    moved = Image.fromarray(np.ascontiguousarray(padded[top : top + goal.height, left : left + goal.width]))
    return moved.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < hflip else moved


def crop_augment(image: Image.Image, goal: Preprocess, hflip: float, rng: random.Random) -> Image.Image:
    """The scaled image cut at a random place instead of the centre, and perhaps mirrored."""
    image = goal.scaled(image)
    left, top = rng.randint(0, image.width - goal.width), rng.randint(0, image.height - goal.height)
    image = image.crop((left, top, left + goal.width, top + goal.height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < hflip else image


def resized_crop_augment(image: Image.Image, goal: Preprocess, hflip: float, rng: random.Random) -> Image.Image:
    """A random part of the image (8 to 100 % of it, sides 3:4 to 4:3) scaled to the goal, and perhaps mirrored.

    As torchvision's RandomResizedCrop draws it: ten attempts, then the centre.
    """
    w, h = image.size
    for _ in range(10):
        area = w * h * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= w and 0 < high <= h:
            left, top = rng.randint(0, w - wide), rng.randint(0, h - high)
            break
    else:
        wide, high = min(w, round(h * 4 / 3)), min(h, round(w * 4 / 3))
        left, top = (w - wide) // 2, (h - high) // 2
    image = image.crop((left, top, left + wide, top + high)).resize((goal.width, goal.height), goal.filter)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < hflip else image


def erase(pixels: Tensor, probability: float, rng: random.Random) -> Tensor:
    """``[3, H, W]`` with noise N(0, 1) in a random rectangle of 2 to 33 % of it, by chance (Zhong et al. 2020)."""
    import torch

    _, h, w = pixels.shape
    if rng.random() >= probability:
        return pixels
    for _ in range(10):
        area = h * w * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < high < h and 0 < wide < w:
            top, left = rng.randint(0, h - high), rng.randint(0, w - wide)
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            pixels[:, top : top + high, left : left + wide] = torch.randn(3, high, wide, generator=generator)
            break
    return pixels


class StandardAugment:
    """timm's training transform (random resized crop, flip, colour jitter, optionally auto-augment and erasing).


    timm draws from the global generators; they are seeded for the one call and put back afterwards.
    """

    def __init__(self, goal: Preprocess, hflip: float, auto_augment: str, erase: float) -> None:
        from timm.data import create_transform

        self.apply = create_transform(
            (3, goal.height, goal.width),
            is_training=True,
            hflip=hflip,
            auto_augment=auto_augment or None,
            interpolation=goal.interpolation.removeprefix("tf-"),
            mean=goal.mean,
            std=goal.std,
            re_prob=erase,
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        with _seeded(seed):
            tensor: Tensor = self.apply(image)
        return tensor


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: 16-bit greys are scaled, transparency is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def thumbnail_png(image: Image.Image, side: int = 160) -> bytes:
    """PNG bytes, at most ``side`` pixels long; small images stay as they are."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()
