"""The embedded backbone: a class-conditional UNet of 0.18 M parameters that draws digits of 8x8 pixels.

Its weights are inside the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft_suite.weights import Shipped

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ARCHITECTURE",
    "ASSET",
    "NAME",
    "NULL",
    "SCHEDULER",
    "build",
    "load_weights",
    "preprocessing",
    "read_metadata",
]

NAME = "micro-unet"
ASSET = "micro_unet.safetensors"
SHIPPED = Shipped("peft_suite.diffusion", ASSET, NAME)
load_weights, read_metadata = SHIPPED.tensors, SHIPPED.metadata
CLASSES = 10
NULL = 10  # row of the class embedding that stands for no class
ARCHITECTURE: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "num_class_embeds": CLASSES + 1,
    }
)
SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon",
        "clip_sample": True,
    }
)


def build(*, pretrained: bool = True, **options: Any) -> nn.Module:
    """A diffusers ``UNet2DModel``: noisy ``[B, 1, 8, 8]``, timestep, class 0..10 -> noise; 177,553 parameters.

    Args:
        pretrained: load the shipped weights.
        options: other fields of the UNet's configuration.

    Raises:
        FileFormatError: the shipped weights do not fit, for example because an option changed the shapes.
    """
    import diffusers

    make: Any = diffusers.UNet2DModel
    model: Any = make(**{**ARCHITECTURE, **options})
    if pretrained:
        SHIPPED.fill(model, options)
    model.eval()
    built: nn.Module = model
    return built


def preprocessing() -> dict[str, Any]:
    """What data and sampling need to know; ``null`` is the class that means none."""
    return {
        "pipeline": "",
        "component": "unet",
        "kind": "class",
        "size": ARCHITECTURE["sample_size"],
        "channels": ARCHITECTURE["in_channels"],
        "classes": CLASSES,
        "null": NULL,
        "scheduler": dict(SCHEDULER),
    }
