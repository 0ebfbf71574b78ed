"""The embedded backbone: a point transformer of 0.35 M parameters for clouds of 512 points, with its weights inside the
package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_suite.weights import Shipped

if TYPE_CHECKING:
    from peft_suite.pointcloud.models.tokenizer import MiniPointNet
    from peft_suite.pointcloud.models.transformer import PointTransformer

__all__ = ["ARCHITECTURE", "ASSET", "NAME", "POINTS", "build", "is_body", "load_weights", "read_metadata"]

NAME = "micro-points"
ASSET = "micro_points.safetensors"
SHIPPED = Shipped("peft_suite.pointcloud", ASSET, NAME)
load_weights, read_metadata = SHIPPED.tensors, SHIPPED.metadata
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
        SHIPPED.fill(model, options, is_body)
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
