"""From tokens to the classifier, for methods that add prompt tokens to a point transformer.

    feature = [prefix tokens ; prompts pooled ; patches pooled]      each piece can be left out

The prompts stand behind the prefix tokens; in front of all tokens where attention is causal, so that all see them. A
feature of another width than the backbone's gets a first layer of the classifier of its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point, Weight
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Editor

__all__ = ["Feature", "FirstLayer", "give_feature", "insert", "need_cloud_classifier", "place_of_prompts"]

Pooling = Literal["mean", "max"] | None


class Feature(Part):
    """The feature, in the place of the backbone's own: ``[B, N, D] -> [B, pieces * D]``.

    Args:
        at: where the prompts stand.
        count: how many they are.
        prefix: tokens before the patches, without the prompts.
        skip: leading ones among these that the backbone's feature leaves out.
        class_token, prompts, patches: which pieces, and how they are pooled.
    """

    def __init__(
        self, at: int, count: int, prefix: int, skip: int, class_token: bool, prompts: Pooling, patches: Pooling
    ) -> None:
        super().__init__()
        self.at, self.count, self.prefix, self.skip = at, count, prefix, skip
        self.class_token, self.prompts, self.patches = class_token, prompts, patches

    def forward(self, feature: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens: [B, P + count + G, D]``, normed."""
        prompts = tokens[:, self.at : self.at + self.count]
        first = self.skip + (self.count if self.at == 0 else 0)
        pieces = [tokens[:, first : first + self.prefix - self.skip].flatten(1)] if self.class_token else []
        pieces += pooled(prompts, self.prompts) + pooled(tokens[:, self.prefix + self.count :], self.patches)
        return torch.cat(pieces, dim=1), tokens

    def extra_repr(self) -> str:
        return f"class_token={self.class_token}, prompts={self.prompts}, patches={self.patches}"


class FirstLayer(Part):
    """Weight and bias of the classifier's first layer for ``inputs`` features; starts as torch starts a Linear."""

    def __init__(self, base: nn.Linear, inputs: int) -> None:
        super().__init__()
        own = nn.Linear(inputs, base.out_features)
        self.weight, self.bias = own.weight, own.bias
        self.replaces = sum(p.numel() for p in base._parameters.values() if p is not None)

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[out, inputs]`` and ``[out]`` in the place of the base values."""
        return self.weight, self.bias


def pooled(tokens: Tensor, how: Pooling) -> list[Tensor]:
    """One vector per cloud, ``[B, n, D] -> [B, D]``, or nothing."""
    if how is None:
        return []
    return [tokens.mean(1) if how == "mean" else tokens.max(1).values]


def insert(x: Tensor, tokens: Tensor, at: int) -> Tensor:
    """``x: [B, N, D]`` with ``tokens: [B, n, D]`` in it."""
    return torch.cat((x[:, :at], tokens, x[:, at:]), dim=1) if at else torch.cat((tokens, x), dim=1)


def place_of_prompts(anatomy: Anatomy) -> int:
    """Where prompts enter the sequence."""
    return 0 if anatomy.causal else anatomy.prefix_tokens


def need_cloud_classifier(anatomy: Anatomy, edit: Editor, method: str) -> None:
    """Raise UnsupportedError, in one sentence, unless the backbone is a point transformer that classifies clouds."""
    if not edit.having("geometry") or not edit.having("tokens"):
        raise UnsupportedError(f"{method} works on the blocks of a point transformer, and {anatomy.family} has none.")
    if not edit.having("pool") or anatomy.head is None or anatomy.norm is None or not anatomy.prefix_tokens:
        raise UnsupportedError(
            f"{method} gives its prompts to the classifier of whole clouds beside the class token, and "
            f"{anatomy.family} has no such classifier here."
        )


def give_feature(
    anatomy: Anatomy, edit: Editor, label: str, count: int, *, class_token: bool, prompts: Pooling, patches: Pooling
) -> None:
    """Let the classifier read this feature, and give it a first layer of that width where the old one does not fit."""
    (path,) = edit.having("pool")
    pool = edit.module(path)
    skip = int(pool.skip)  # type: ignore[arg-type]
    read = anatomy.prefix_tokens - skip
    part = Feature(place_of_prompts(anatomy), count, anatomy.prefix_tokens, skip, class_token, prompts, patches)
    pieces = read * class_token + (prompts is not None) + (patches is not None)
    edit.inside(Point(path, pieces * anatomy.dim), "pool", part, label)
    assert anatomy.head is not None
    root = anatomy.head.path.rpartition(".")[0]
    first, layer = next((n, m) for n, m in edit.module(root).named_modules() if isinstance(m, nn.Linear))
    if layer.in_features != pieces * anatomy.dim:
        first = f"{root}.{first}"
        edit.leave([f"{first}.{name}" for name in layer._parameters])
        edit.reweigh(Weight(first), FirstLayer(layer, pieces * anatomy.dim), f"{label}_head")
