"""Sentences around a new word, for textual inversion: about a thing, or about a style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from peft_suite.errors import ConfigError

__all__ = ["OBJECT", "STYLE", "sentence", "sentences"]

OBJECT = (
    "a photo of a {}",
    "a picture of a {}",
    "a photo of one {}",
    "a photo of the {}",
    "a sharp photo of a {}",
    "a blurry photo of a {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a close view of a {}",
    "a {} seen from afar",
    "a small {} in a photo",
    "a large {} in a photo",
    "a {} in front of a plain background",
    "a drawing of a {}",
)
STYLE = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a drawing in the style of {}",
    "a portrait in the style of {}",
    "a landscape in the style of {}",
    "a small picture in the style of {}",
    "a large picture in the style of {}",
    "a bright picture in the style of {}",
    "a dark picture in the style of {}",
    "a colourful picture in the style of {}",
)


def sentences(kind: Literal["object", "style"]) -> Sequence[str]:
    """The list of one kind.

    Raises:
        ConfigError: another kind.
    """
    if kind not in ("object", "style"):
        raise ConfigError(f"templates of kind {kind!r} do not exist: choose object or style.")
    return OBJECT if kind == "object" else STYLE


def sentence(kind: Literal["object", "style"], number: int, words: str) -> str:
    """The sentence of a running number, with ``words`` in its place."""
    chosen = sentences(kind)
    return chosen[number % len(chosen)].format(words)
