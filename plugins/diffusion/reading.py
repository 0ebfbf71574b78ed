"""From image files to clean tensors: pixels between -1 and 1, or latents of the pipeline's VAE, kept where they fit.

Latents are ``scaling (z - shift)`` with z drawn from the VAE's normal distribution, anew in every epoch: what is kept
is its mean and spread, so that caching changes nothing. Of flipped images both halves are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_suite.diffusion import shifted
from peft_suite.diffusion.buckets import bucket_of
from peft_suite.diffusion.caching import TensorCache, fingerprint
from peft_suite.diffusion.drawing import Clean
from peft_suite.diffusion.images import View, fit, open_image
from peft_suite.diffusion.listing import Sample
from peft_suite.errors import ConfigError, DataError, UnsupportedError
from peft_suite.train.reading import read_all

__all__ = ["Reader", "Viewing"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Viewing:
    """How an image becomes a tensor.

    Attributes:
        size: height and width.
        channels: 1 or 3.
        buckets: sizes to choose from by aspect ratio instead; () for none.
        random_crop, random_flip: of training samples.
    """

    size: tuple[int, int]
    channels: int
    interpolation: str = "lanczos"
    buckets: tuple[tuple[int, int], ...] = ()
    random_crop: bool = False
    random_flip: bool = False

    def view(self, sample: Sample, crop: tuple[float, float] = (0.5, 0.5)) -> View:
        """Decode one image.

        Raises:
            DataError: why it cannot be used.
        """
        if sample.row >= 0:
            from PIL import Image

            image: Any = Image.fromarray(shifted.target()[0][sample.row, ..., 0].numpy())
        else:
            image = open_image(sample.read())
        size = bucket_of(image.height, image.width, self.buckets) if self.buckets else self.size
        return fit(image, size, self.channels, interpolation=self.interpolation, crop=crop)


@dataclass
class Reader:
    """Images of one split.

    Attributes:
        vae: None for models that work on pixels.
        cache: folder for latents, "" for none.
        limit: bytes of a split that stay in memory.
    """

    viewing: Viewing
    vae: nn.Module | None = None
    cache: str = ""
    limit: int = 2**30
    samples: list[Sample] = field(default_factory=list)
    views: list[View] = field(default_factory=list)  # without pixels
    kept: list[Array] | None = None
    upscaled: int = 0

    def __post_init__(self) -> None:
        self.scaling, self.shift = _scale(self.vae) if self.vae is not None else (1.0, 0.0)
        told = {
            "what": "latents",
            "by": fingerprint(self.vae) if self.vae is not None and self.cache else "",
            "viewing": repr(self.viewing),
        }
        self.store = TensorCache(self.cache if self.vae is not None else "", told)

    def read(self, samples: Sequence[Sample], split: str, *, skip: bool) -> list[tuple[str, str]]:
        """Decode every image once, keep what fits, and return (name, reason) of those that cannot be used.

        Raises:
            DataError: images that cannot be used, unless ``skip``.
        """
        seen: list[View] = []

        def attempt(sample: Sample) -> Any:
            try:
                return _Read(sample, self.viewing.view(sample))
            except DataError as error:
                return str(error)

        def keep(read: _Read) -> Array:
            view = read.view
            seen.append(View(np.empty((*view.pixels.shape[:2], 0)), view.original, view.corner))
            self.upscaled += view.original[0] < view.pixels.shape[0] or view.original[1] < view.pixels.shape[1]
            if self.viewing.random_crop:
                return np.empty(0)  # no two draws see the same part
            return self._moments(read.sample, view) if self.vae is not None else view.pixels

        good, kept, bad = read_all(
            samples, attempt, split, "images", "images cannot be used", skip=skip, cache_bytes=self.limit, keep=keep
        )
        self.samples, self.views = good, seen
        self.kept = None if self.viewing.random_crop else kept
        if self.upscaled:
            warnings.warn(
                f"{self.upscaled} of {len(good)} {split} images are smaller than they are shown to the model and were "
                "enlarged; a lower data.resolution avoids that.",
                stacklevel=4,
            )
        return bad

    def groups(self) -> list[tuple[int, int]] | None:
        """Size of every sample, where they differ."""
        sizes = [view.pixels.shape[:2] for view in self.views]
        return [(h, w) for h, w in sizes] if self.viewing.buckets else None

    def pixels(self, position: int) -> Array:
        """uint8 ``[H, W, C]`` as seen without randomness, for pictures."""
        if self.vae is None and self.kept is not None:
            return self.kept[position]
        return self.viewing.view(self.samples[position]).pixels

    def clean(self, position: int, draw: torch.Generator | None) -> Clean:
        """The tensor of a sample; ``draw`` None makes no random choice."""
        flip = self.viewing.random_flip and draw is not None and bool(torch.rand((), generator=draw) < 0.5)
        view = self.views[position]
        if self.viewing.random_crop and draw is not None:
            down, right = torch.rand(2, generator=draw).tolist()
            view = self.viewing.view(self.samples[position], (down, right))
            found: Array | None = None
        else:
            found = self.kept[position] if self.kept is not None else None
            if found is None:
                whole = self.viewing.view(self.samples[position])
                found = self._moments(self.samples[position], whole) if self.vae is not None else whole.pixels
        height, width = view.pixels.shape[:2]
        size = (*view.original, *view.corner, height, width)
        if self.vae is None:
            values = _tensor(view.pixels if found is None else found)
            return Clean(values.flip(-1) if flip else values, size)
        if found is None:
            moments = self._encode(_tensor(view.pixels), flips=False)[0]
        else:
            moments = torch.from_numpy(found)[int(flip)]
        if found is None and flip:
            moments = self._encode(_tensor(view.pixels).flip(-1), flips=False)[0]
        mean, std = moments.chunk(2)  # [C, h, w] each
        z = mean if draw is None else mean + std * torch.randn(mean.shape, generator=draw)
        return Clean((z - self.shift) * self.scaling, size)

    def _moments(self, sample: Sample, view: View) -> Array:
        """``[1 or 2, 2C, h, w]``: mean and standard deviation, of the image and, where that is drawn, of its mirror."""
        flips = self.viewing.random_flip

        def make() -> dict[str, Tensor]:
            return {"moments": self._encode(_tensor(view.pixels), flips=flips)}

        if self.store.folder is None:
            return make()["moments"].numpy()
        return self.store.get(sample.read(), make)["moments"].numpy()

    @torch.no_grad()
    def _encode(self, pixels: Tensor, *, flips: bool) -> Tensor:
        assert self.vae is not None
        parameter = next(self.vae.parameters())
        both = torch.stack((pixels, pixels.flip(-1)) if flips else (pixels,))
        dist = self.vae.encode(both.to(parameter.device, parameter.dtype)).latent_dist  # type: ignore[operator]
        return torch.cat((dist.mean, dist.std), dim=1).float().cpu()


@dataclass(frozen=True)
class _Read:
    """For :func:`peft_suite.train.reading.read_all`."""

    sample: Sample
    view: View


def _tensor(pixels: Array) -> Tensor:
    """uint8 ``[H, W, C]`` -> float ``[C, H, W]`` between -1 and 1."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def _scale(vae: nn.Module) -> tuple[float, float]:
    config: Any = vae.config
    if not hasattr(vae, "encode") or config.get("scaling_factor") is None or config.get("latent_channels") is None:
        raise UnsupportedError(
            f"Latents of {type(vae).__name__} are not known here: pipelines need a VAE with a normal distribution, "
            "such as AutoencoderKL."
        )
    if config.get("latents_mean") is not None:
        raise ConfigError(f"{type(vae).__name__} scales every channel by itself (latents_mean): not supported.")
    return float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)


def as_info(bad: Sequence[tuple[str, str]], split: str) -> list[Mapping[str, str]]:
    """Left-out images for the report."""
    return [{"split": split, "name": name, "reason": reason} for name, reason in bad]
