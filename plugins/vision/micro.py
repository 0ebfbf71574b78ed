"""The embedded backbone: a ViT of 0.2 M parameters for 32x32 images, with weights inside the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from peft_suite.weights import Shipped

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["ARCHITECTURE", "ASSET", "NAME", "PRETRAINED_CFG", "build", "load_weights", "read_metadata"]

NAME = "micro-vit"
ASSET = "micro_vit.safetensors"
SHIPPED = Shipped("peft_suite.vision", ASSET, NAME)
load_weights, read_metadata = SHIPPED.tensors, SHIPPED.metadata
ARCHITECTURE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
PRETRAINED_CFG: dict[str, Any] = {
    "architecture": NAME,
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}


def build(num_outputs: int = 10, *, pretrained: bool = True, **options: Any) -> VisionTransformer:
    """The micro ViT: 16 patches of 8x8, four blocks of width 64; input ``[B, 3, 32, 32]``, output ``[B, num_outputs]``.

    Args:
        num_outputs: width of the head. The shipped head of ten digits is used only by the tests of the asset; a
            classifier for another task always starts from a fresh head.
        pretrained: load the shipped weights into everything but the head.
        options: extra arguments of timm's VisionTransformer, for example ``class_token=False`` without weights.

    Raises:
        FileFormatError: the shipped weights do not fit, for example because an option changed the shapes.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(**{**ARCHITECTURE, **options}, num_classes=num_outputs)
    model.pretrained_cfg = model.default_cfg = dict(PRETRAINED_CFG)
    if pretrained:
        SHIPPED.fill(model, options, lambda key: not key.startswith("head."))
    return cast("VisionTransformer", model)
