"""What the descriptions of point transformers share: forwards, places, sites, fresh parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from peft_suite.anatomy import Block, Functional, Point, Weight
from peft_suite.describing import affine, norms
from peft_suite.pointcloud.models import layers
from peft_suite.pointcloud.models.geometry import Grouping, grouping_forward
from peft_suite.pointcloud.models.tokenizer import Pointwise, PointwiseOnMax, pointwise, pointwise_on_max

__all__ = ["FORWARDS", "FUNCTIONALS", "PLACES", "classifier", "norms", "pre_norm_block", "sites", "under"]

FUNCTIONALS: Mapping[Callable[..., Any], Functional] = {
    Pointwise.forward: pointwise,
    PointwiseOnMax.forward: pointwise_on_max,
}
FORWARDS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    layers.Block.forward: layers.block_forward,
    layers.Attention.forward: layers.attention_forward,
    layers.Pool.forward: layers.pool_forward,
    layers.Entry.forward: layers.entry_forward,
    Grouping.forward: grouping_forward,
}
PLACES: Mapping[Callable[..., Any], tuple[str, ...]] = {
    layers.Block.forward: ("tokens", "attn_out", "mlp_out", "end"),
    layers.Attention.forward: ("prefix",),
    layers.Pool.forward: ("pool",),
    layers.Entry.forward: ("entry",),
    Grouping.forward: ("geometry",),
}


def sites(model: nn.Module, *roots: str) -> tuple[Point, ...]:
    """Outputs of the affine operations at or below ``roots``, in order."""
    return tuple(
        Point(path, int(module.weight.shape[0]))
        for root in roots
        for path, module in model.named_modules()
        if (path == root or path.startswith(f"{root}.")) and affine(module)
    )


def under(model: nn.Module, prefixes: Iterable[str]) -> tuple[str, ...]:
    """Full names of the parameters that start with one of ``prefixes``."""
    return tuple(n for n, _ in model.named_parameters() if n.startswith(tuple(prefixes)))


def classifier(model: nn.Module, path: str) -> Point | None:
    """The last linear layer below ``path``; None where there is no head."""
    found = [(n, m) for n, m in model.named_modules() if n.startswith(f"{path}.") and isinstance(m, nn.Linear)]
    return Point(found[-1][0], found[-1][1].out_features) if found else None


def pre_norm_block(model: nn.Module, path: str, dim: int) -> Block:
    """The description of a :class:`peft_suite.pointcloud.models.layers.Block`."""
    points = {
        "norm1": Point(f"{path}.norm1", dim),
        "attn": Point(f"{path}.attn", dim),
        "attn_out": Point(f"{path}.attn.proj", dim),
        "drop1": Point(f"{path}.drop_path1", dim),
        "norm2": Point(f"{path}.norm2", dim),
        "mlp": Point(f"{path}.mlp", dim),
        "drop2": Point(f"{path}.drop_path2", dim),
    }
    weights = {
        **{role: Weight(f"{path}.attn.qkv", (i * dim, (i + 1) * dim)) for i, role in enumerate("qkv")},
        "o": Weight(f"{path}.attn.proj"),
        "fc1": Weight(f"{path}.mlp.fc1"),
        "fc2": Weight(f"{path}.mlp.fc2"),
    }
    order = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    affine_points = sites(model, *(f"{path}.{name}" for name in order))
    return Block(Point(path, dim), points, weights, affine_points, ("attn", "mlp"))
