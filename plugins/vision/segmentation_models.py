"""Segmentation models: a timm vision transformer and a light decoder, and how methods find their points in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Block, Point, Weight, anatomy_of
from peft_suite.errors import ConfigError, UnsupportedError
from peft_suite.train.contracts import BackboneInfo
from peft_suite.vision.backbones import backbones as classifiers

__all__ = ["Segmenter", "backbones", "describe", "example", "example_up"]


class Segmenter(nn.Module):
    """Class scores per pixel from the patch tokens of a vision transformer: ``[B, 3, H, W] -> [B, C, H, W]``.

    ``decoder`` maps ``[B, d, h, w]`` to ``[B, C, h', w']``; the result is resized to the image. It is what every method
    trains afresh; HST puts its own in its place, which reads the pyramid of its side network.
    """

    def __init__(self, backbone: nn.Module, classes: int, decoder: str = "linear", width: int = 128) -> None:
        super().__init__()
        self.backbone: Any = backbone
        dim: Any = backbone.embed_dim
        if decoder == "linear":
            self.decoder: nn.Module = nn.Conv2d(dim, classes, 1)
        elif decoder == "up":
            self.decoder = UpDecoder(dim, classes, width)
        else:
            raise ConfigError(
                f"decoder = {decoder!r}: choose 'linear' (a 1x1 convolution) or 'up' (three convolutions)."
            )

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, 3, H, W]``, sides a multiple of the patch."""
        size = x.shape[2:]
        high, wide = self.backbone.patch_embed.patch_size
        tokens = self.backbone.fc_norm(self.backbone.forward_features(x))
        tokens = tokens[:, self.backbone.num_prefix_tokens :].transpose(1, 2)
        scores = self.decoder(tokens.reshape(len(x), -1, size[0] // high, size[1] // wide))
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)


class UpDecoder(nn.Sequential):
    """Two 3x3 convolutions with doubling of the map, then a 1x1: ``[B, d, h, w] -> [B, C, 4h, 4w]``."""

    def __init__(self, dim: int, classes: int, width: int) -> None:
        groups = max(g for g in (8, 4, 2, 1) if width % g == 0)
        up = [nn.GELU(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
        super().__init__(
            nn.Conv2d(dim, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            *up,
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            *up,
            nn.Conv2d(width, classes, 1),
        )


def describe(model: Segmenter) -> Anatomy:
    """The anatomy of the backbone, one level down, with the decoder as its head."""
    inner = anatomy_of(model.backbone)
    decoder = model.decoder
    last: Any = decoder if isinstance(decoder, nn.Conv2d) else list(decoder.children())[-1]
    moved = _below(inner, "backbone.")
    anatomy: Anatomy = dataclasses.replace(
        moved,
        family=f"{inner.family}-segmenter",
        fresh=tuple(n for n, _ in model.named_parameters() if n.startswith("decoder.")),
        head=Point("decoder", last.out_channels, "first"),
    )
    return anatomy


def _below(value: Any, prefix: str) -> Any:
    """Every path in an anatomy moved below a module; names of roles and families stay."""
    if isinstance(value, Point | Weight):
        return dataclasses.replace(value, path=prefix + value.path)
    if isinstance(value, Block | Anatomy):
        changes = {
            f.name: _below(getattr(value, f.name), prefix) for f in dataclasses.fields(value) if f.name in _MOVED
        }
        return dataclasses.replace(value, **changes)
    if isinstance(value, Mapping):
        return {key: _below(item, prefix) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_below(item, prefix) for item in value)
    return prefix + value if isinstance(value, str) and value else value


_MOVED = frozenset(
    {"point", "points", "weights", "affine", "blocks", "embed", "stem", "norm", "tail", "between", "norms", "fresh"}
    | {"class_token", "image", "head", "read_directly", "idle"}
)


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random segmenter with a linear decoder and a batch."""
    return _example("linear")


def example_up() -> tuple[nn.Module, Tensor]:
    """The same with the convolutional decoder."""
    return _example("up")


def _example(decoder: str) -> tuple[nn.Module, Tensor]:
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )
    for module in vit.modules():  # under timm's initial values, features of random images hardly differ
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    return Segmenter(vit, 5, decoder, width=8).eval(), torch.randn(3, 3, 32, 32)


class SegmentationBackbones:
    """The plugin's vision transformers with a decoder; ``options`` may set ``decoder`` and ``decoder_width``."""

    def list(self, pattern: str = "*") -> Sequence[BackboneInfo]:
        """Those backbones of the classification task that are plain vision transformers."""
        return [info for info in classifiers.list(pattern) if info.family == "timm-vit"]

    def build(
        self, name: str, num_outputs: int, *, pretrained: bool, checkpoint: str, options: Mapping[str, Any]
    ) -> nn.Module:
        """A segmenter with a fresh decoder; see :meth:`peft_suite.train.Backbones.build`."""
        rest = {k: v for k, v in options.items() if k not in ("decoder", "decoder_width")}
        model: Any = classifiers.build(name, 0, pretrained=pretrained, checkpoint=checkpoint, options=rest)
        if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "fc_norm"):
            raise UnsupportedError(f"Segmentation reads plain vision transformers, and {name!r} is none.")
        return Segmenter(
            model, num_outputs, str(options.get("decoder", "linear")), int(options.get("decoder_width", 128))
        )

    def preprocessing(self, name: str, model: nn.Module) -> dict[str, Any]:
        """That of the backbone; images and masks are brought to its size together."""
        assert isinstance(model, Segmenter)
        return classifiers.preprocessing(name, model.backbone)


backbones = SegmentationBackbones()
