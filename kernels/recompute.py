"""Layer inputs that backward computes again from what autograd keeps anyway, so that nothing is kept for them.

A layer with a weight gradient keeps its input x. Where x = f(y) and f keeps y for its own gradient, both stay in
memory; but f(y) costs next to nothing:

    SiLU, GELU, Mish, Hardswish     f(y), y is kept by f
    layer norm                      w (y - mean) rstd + b, with y, mean and rstd
    product (gated units)           y z, both are kept by the product

What f keeps is read from the graph (``x.grad_fn``), so models need no change. Changes of dtype and shape between f and
the layer are made again too. Nothing is recomputed while compiling, which decides this itself, nor where hooks say what
is kept, as in activation checkpointing, which counts on the same tensors each time. To look at what is kept, use
:func:`watching`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Input", "keep", "watching"]

_PASSED = 4  # changes of dtype and shape between f and the layer


class Input(NamedTuple):
    """What is kept of a layer's input, and how it comes back."""

    make: Callable[..., Tensor] | None  # None: the input itself is kept
    shape: torch.Size
    dtype: torch.dtype

    def again(self, kept: Sequence[Tensor]) -> Tensor:
        """The input, from the kept tensors."""
        if self.make is None:
            return kept[0]
        with torch.autocast(kept[0].device.type, enabled=False):
            return self.make(*kept).to(self.dtype).reshape(self.shape)


def keep(x: Tensor) -> tuple[Input, tuple[Tensor, ...]]:
    """How an input comes back in backward, and the tensors to keep for it: x, or what is kept already."""
    found = None if torch.compiler.is_compiling() else _source(x)
    make, kept = (None, (x,)) if found is None else found
    return Input(make, x.shape, x.dtype), kept


@contextlib.contextmanager
def watching(note: Callable[[Tensor], object]) -> Iterator[None]:
    """While it lasts, ``note`` is called with every tensor that autograd keeps; nothing else changes."""

    def pack(t: Tensor) -> Tensor:
        note(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, _same):
        yield


def _same(t: Tensor) -> Tensor:
    return t


def _source(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
    node: Any = x.grad_fn
    for _ in range(_PASSED):
        if node is None or node.name() not in _SAME_ORDER:
            break
        node = node.next_functions[0][0]
    rule = _RULES.get(node.name()) if node is not None else None
    if rule is None:
        return None
    names, make = rule
    kept = tuple(_kept(node, name, x.device) for name in names)
    return None if any(t is None for t in kept) else (make(node), cast("tuple[Tensor, ...]", kept))


def _kept(node: Any, name: str, device: torch.device) -> Tensor | None:
    """What an operation keeps under a name; None where hooks may hold something else in its place."""
    try:
        raw = getattr(node, f"_raw_saved_{name}")
        if raw.unpack_hook not in (None, _same):
            return None
        found = getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError):  # an older torch; a graph that was freed
        return None
    return found if isinstance(found, Tensor) and found.device == device else None


def _gelu(node: Any) -> Callable[..., Tensor]:
    approximate = node._saved_approximate
    return lambda y: F.gelu(y, approximate=approximate)


def _layer_norm(y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias, (y - mean).mul_(rstd), weight)


# operations that keep the order of elements and save nothing
_SAME_ORDER = {"ToCopyBackward0", "CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
_RULES: dict[str, tuple[tuple[str, ...], Callable[[Any], Callable[..., Tensor]]]] = {
    "SiluBackward0": (("self",), lambda node: F.silu),
    "GeluBackward0": (("self",), _gelu),
    "MishBackward0": (("self",), lambda node: F.mish),
    "HardswishBackward0": (("self",), lambda node: F.hardswish),
    "MulBackward0": (("self", "other"), lambda node: torch.mul),
    "NativeLayerNormBackward0": (("input", "result1", "result2", "weight", "bias"), lambda node: _layer_norm),
}
