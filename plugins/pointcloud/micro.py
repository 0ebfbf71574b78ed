"""The embedded backbone: a point transformer of 0.35 M parameters for clouds of 512 points, with its weights inside the
package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from peft_suite.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

    from peft_suite.pointcloud.models.tokenizer import MiniPointNet
    from peft_suite.pointcloud.models.transformer import PointTransformer

__all__ = ["ARCHITECTURE", "ASSET", "NAME", "POINTS", "build", "is_body", "load_weights", "read_metadata"]

NAME = "micro-points"
ASSET = "micro_points.safetensors"
POINTS = 512
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 72,
    "depth": 5,
    "num_heads": 3,
    "groups": 32,
    "group_size": 16,
    "drop_path": 0.0,
    "head": "linear",  # three layers of 256 would outweigh every adapter
    "rule": "standard",
}
_FRESH = ("cls_head_finetune.", "cls_token", "cls_pos")  # masked modelling knows none of them


def build(num_outputs: int = 10, *, pretrained: bool = True, **options: Any) -> PointTransformer:
    """Five blocks of width 72 on 32 groups of 16 points: ``[B, 512, 3] -> [B, num_outputs]``.

    Args:
        num_outputs: width of the head, which is fresh like the class token and its position.
        pretrained: load the shipped weights.
        options: other arguments of :class:`peft_suite.pointcloud.models.transformer.PointTransformer`.

    Raises:
        FileFormatError: the shipped weights do not fit, for example because an option changed the shapes.
    """
    from peft_suite.pointcloud.models.transformer import PointTransformer

    sizes = {**ARCHITECTURE, **options}
    model = PointTransformer(num_outputs, **sizes)
    model.encoder = narrow_tokenizer(sizes.get("encoder_dim") or sizes["embed_dim"], sizes.get("channels", 3))
    if pretrained:
        shipped = load_weights()
        own = {key: value for key, value in model.state_dict().items() if is_body(key)}
        wrong = sorted(
            k for k in {*shipped, *own} if k not in shipped or k not in own or shipped[k].shape != own[k].shape
        )
        if wrong:
            raise FileFormatError(
                f"The weights of {NAME} do not fit the options {options}: {', '.join(wrong[:6])}. "
                "Leave these options out, or build with pretrained=False."
            )
        model.load_state_dict(dict(shipped), strict=False)
    return model


def narrow_tokenizer(dim: int, channels: int) -> MiniPointNet:
    """The mini-PointNet with a quarter of its usual widths."""
    from torch import nn

    from peft_suite.pointcloud.models.tokenizer import MiniPointNet, Pointwise, PointwiseOnMax

    net = MiniPointNet(dim, channels)
    net.first_conv = nn.Sequential(Pointwise(channels, 32), nn.BatchNorm1d(32), nn.ReLU(), Pointwise(32, 64))
    net.second_conv = nn.Sequential(PointwiseOnMax(128, 128), nn.BatchNorm1d(128), nn.ReLU(), Pointwise(128, dim))
    return net


def is_body(key: str) -> bool:
    """Whether a key of the state dict belongs to what was pre-trained."""
    return not key.startswith(_FRESH)


def load_weights() -> Mapping[str, Tensor]:
    """The shipped tensors, in float32 where they are no counters."""
    from safetensors.torch import load

    tensors = load(_asset().read_bytes())
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def read_metadata() -> dict[str, str]:
    """How the shipped weights were made: data, seed, steps, probes, licence."""
    raw = _asset().read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return dict(header.get("__metadata__", {}))


def _asset() -> Any:
    return resources.files("peft_suite.pointcloud").joinpath("assets", ASSET)
