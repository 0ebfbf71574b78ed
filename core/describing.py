"""What descriptions of backbones share: affine sites, norms, names of parameters, and blocks with separate q, k and v.

Nothing here knows a model library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peft_suite.anatomy import Block, Point, Weight

__all__ = [
    "affine",
    "checkpoints_reentrantly",
    "classifier",
    "found",
    "matrices",
    "norms",
    "passes",
    "recomputing",
    "separate_block",
    "site",
    "sites",
    "under",
]

_FIRST = (nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_INNER: Mapping[str, str] = {
    "fc1": "fc1",
    "fc2": "fc2",
    "gate_proj": "gate",
    "up_proj": "fc1",
    "down_proj": "fc2",
    "intermediate_dense": "fc1",
    "output_dense": "fc2",
}


def affine(module: nn.Module | None) -> bool:
    """Whether a module has a weight of its own."""
    return isinstance(getattr(module, "weight", None), Tensor)


def site(model: nn.Module, path: str) -> Point:
    """The output of an affine operation: its width and where its channels are."""
    module: Any = model.get_submodule(path)
    first = isinstance(module, _FIRST) or "2d" in type(module).__name__
    width = module.out_features if isinstance(module, nn.Linear) else int(module.weight.shape[0])
    return Point(path, width, "first" if first else "last")


def found(model: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``; None where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def sites(model: nn.Module, paths: Iterable[str]) -> tuple[Point, ...]:
    """Those of ``paths`` that exist and have a weight."""
    return tuple(site(model, path) for path in paths if affine(found(model, path)))


def norms(model: nn.Module) -> tuple[str, ...]:
    """All normalisation layers with a weight."""
    own = ((n, m) for n, m in model.named_modules() if not n.startswith("adapters."))
    return tuple(n for n, m in own if "Norm" in type(m).__name__ and affine(m))


def under(model: nn.Module, *prefixes: str) -> tuple[str, ...]:
    """Full names of the parameters below ``prefixes``."""
    return tuple(n for n, _ in model.named_parameters() if n.startswith(prefixes))


def classifier(model: nn.Module, path: str) -> Point | None:
    """The linear layer or 1x1 convolution that gives the model's output; None where it was left away."""
    module: Any = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        return Point(path, module.out_features)
    return Point(path, module.out_channels, "first") if isinstance(module, nn.Conv2d) else None


def matrices(model: nn.Module, path: str) -> tuple[str, ...]:
    """Linear layers and convolutions below ``path``, in order."""
    root = model.get_submodule(path)
    return tuple(f"{path}.{n}" for n, m in root.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))


def passes(module: nn.Module | None) -> bool:
    """Whether a dropout or drop path does nothing."""
    return module is None or isinstance(module, nn.Identity) or getattr(module, "p", None) == 0


def separate_block(
    model: nn.Module,
    path: str,
    dim: int,
    *,
    attn: str,
    out: str,
    norm1: str,
    norm2: str,
    mlp: str = "mlp",
    ends: tuple[str, ...] = ("attn", "mlp"),
    argument: int | str = 0,
    after: bool = False,
) -> Block:
    """A transformer block whose attention has separate ``q_proj k_proj v_proj`` and returns a tuple.

    Args:
        attn, norm1, norm2, mlp: names of the modules below the block; ``out`` below the attention.
        ends: what follows the sub-layers, roles or names: (after attention, after the MLP).
        argument: of the attention, its stream.
        after: each norm follows its residual sum instead of standing before its sub-layer.
    """
    block: Any = model.get_submodule(path)
    attn, mlp = f"{path}.{attn}", f"{path}.{mlp}"
    points = {
        "norm1": Point(f"{path}.{norm1}", dim),
        "attn": Point(attn, dim, argument=argument, output=0),
        "attn_out": Point(f"{attn}.{out}", dim),
        "norm2": Point(f"{path}.{norm2}", dim),
        "mlp": Point(mlp, dim),
    }
    if passes(getattr(block, "dropout", None)) and passes(getattr(block, "drop_path", None)):
        # one dropout serves both branches; where it does nothing, the module before it is the branch's last
        for role, end in zip(("drop1", "drop2"), ends, strict=True):
            points[role] = points[end] if end in points else Point(f"{path}.{end}", dim)
    inner = model.get_submodule(mlp)
    weights = {
        **{role: Weight(f"{attn}.{role}_proj") for role in "qkv"},
        "o": Weight(f"{attn}.{out}"),
        **{role: Weight(f"{mlp}.{name}") for name, role in _INNER.items() if hasattr(inner, name)},
    }
    first = [f"{attn}.{name}" for name in ("q_proj", "k_proj", "v_proj", out)]
    second = list(matrices(model, mlp))
    at = len(first) if after else 0
    first.insert(at, f"{path}.{norm1}")
    second.insert(len(second) if after else 0, f"{path}.{norm2}")
    return Block(Point(path, dim), points, weights, sites(model, (*first, *second)), ("attn", "mlp"))


def checkpoints_reentrantly(layers: Any) -> bool:
    """Whether checkpointing is on with reentrant autograd; it is a keyword of the function that the layers hold."""
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            function: Any = getattr(layer, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's described forward under the checkpointing that the block brings along.

    From transformers 5.23 on, a layer checkpoints in its forward, which the description stands in for; before, in its
    call.
    """

    @functools.wraps(forward)
    def described(block: Any, beside: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(block, "gradient_checkpointing", False) and block.training and _in_forward(type(block)):
            inner = functools.partial(forward, block, beside, **kwargs)
            return block._gradient_checkpointing_func(inner, x, *args)
        return forward(block, beside, x, *args, **kwargs)

    return described


def _in_forward(cls: Any) -> bool:
    return bool(cls.forward.__code__.co_name == "forward_with_checkpointing")
