"""Patches that are no squares, for transformers' AST: SSAST's frame models cut 128 x 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_suite.audio.positions import patch_grid

__all__ = ["patch_of", "reshape_patches"]


def patch_of(encoder: Any) -> list[int] | None:
    """[rows, columns] of an AST's patches; None where its configuration tells them, or it has none."""
    projection = getattr(getattr(getattr(encoder, "embeddings", None), "patch_embeddings", None), "projection", None)
    sides = list(getattr(projection, "kernel_size", ()))
    return sides if len(set(sides)) > 1 else None


def reshape_patches(encoder: Any, patch: tuple[int, int]) -> None:
    """Give a fresh ASTModel patches of ``(rows, columns)``; positions follow, strides stay as its configuration says.

    transformers' configuration has one side only, so its own ``from_pretrained`` does not read such a model; ours does.
    """
    config, old = encoder.config, encoder.embeddings.patch_embeddings.projection
    with torch.device(old.weight.device):
        new = nn.Conv2d(1, old.out_channels, patch, stride=old.stride)
        nn.init.trunc_normal_(new.weight, std=config.initializer_range)
        nn.init.zeros_(new.bias)  # type: ignore[arg-type]
        rows, columns = patch_grid(config.num_mel_bins, config.max_length, patch, old.stride)
        encoder.embeddings.patch_embeddings.projection = new
        encoder.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 2 + rows * columns, old.out_channels))
