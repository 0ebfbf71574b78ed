"""Images as a denoiser reads them: upright, of the right channels and size, between -1 and 1."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.errors import DataError

__all__ = ["EXTENSIONS", "INTERPOLATIONS", "View", "as_channels", "fit", "open_image", "thumbnail"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
INTERPOLATIONS = ("lanczos", "bilinear", "bicubic", "nearest", "box")
MODES = {1: "L", 3: "RGB"}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class View:
    """What is seen of an image.

    Attributes:
        pixels: uint8 ``[H, W, C]``.
        original: height and width of the file.
        corner: top and left of the crop in the resized image; SDXL reads both.
    """

    pixels: Array
    original: tuple[int, int]
    corner: tuple[int, int]


def open_image(content: bytes | Path) -> Any:
    """A PIL image, turned as its EXIF orientation says.

    Raises:
        DataError: it is no image, or a damaged one; the reason.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return ImageOps.exif_transpose(image.copy())
    except UnidentifiedImageError:
        raise DataError("is no image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be decoded: {error}") from None


def as_channels(image: Any, channels: int) -> Any:
    """Grey or RGB; what is transparent becomes white, 16-bit grey is scaled to 8.

    Raises:
        DataError: the model reads neither 1 nor 3 channels.
    """
    from PIL import Image

    if channels not in MODES:
        raise DataError(f"The model reads {channels} channels, and images have 1 or 3: use a model of 1 or 3 channels.")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(MODES[channels])


def fit(
    image: Any,
    size: tuple[int, int],
    channels: int,
    *,
    interpolation: str = "lanczos",
    crop: tuple[float, float] = (0.5, 0.5),
) -> View:
    """Resize until ``size`` (height, width) is just covered, then crop.

    Args:
        crop: place of the crop along height and width, 0.5 is the centre.
    """
    from PIL import Image

    height, width = image.height, image.width
    image = as_channels(image, channels)
    factor = max(size[0] / height, size[1] / width)
    resized = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    if resized != (height, width):
        image = image.resize((resized[1], resized[0]), getattr(Image.Resampling, interpolation.upper()))
    top, left = (min(int(share * (r - s + 1)), r - s) for share, r, s in zip(crop, resized, size, strict=True))
    if crop == (0.5, 0.5):
        top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    pixels = np.array(image.crop((left, top, left + size[1], top + size[0])))
    return View(pixels.reshape(*size, channels), (height, width), (top, left))


def thumbnail(pixels: Array, side: int = 96) -> bytes:
    """PNG of ``[H, W, C]``, small images enlarged by a whole factor."""
    from PIL import Image

    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    longest = max(image.size)
    if longest > side:
        image.thumbnail((side, side))
    elif longest * 2 <= side:
        factor = side // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
