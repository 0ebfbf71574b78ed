"""diffusers' DiT: transformer blocks on latent patches whose norms take scale, shift and gates from time and class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.describing import norms, sites
from peft_suite.diffusion.anatomies.common import (
    FUNCTIONALS,
    forwards,
    linears,
    ready,
    reentrant,
    settle,
    transformer_block,
)


def describe(model: Any) -> Anatomy:
    """The anatomy of one DiTTransformer2DModel. Every block embeds time and class itself.

    The first one's embedding serves the end as well.

    Raises:
        BackboneError: its projections are fused, or it carries an adapter of peft.
    """
    ready(model)
    dim, patch = int(model.inner_dim), int(model.config.patch_size)
    side = int(model.config.sample_size) // patch
    return Anatomy(
        family="diffusers-dit",
        dim=dim,
        blocks=tuple(transformer_block(model, f"transformer_blocks.{i}") for i in range(len(model.transformer_blocks))),
        embed=Point("pos_embed", dim),
        stem=sites(model, linears(model, "pos_embed")),
        norm=Point("norm_out", dim),
        tail=sites(model, ("proj_out_1", "proj_out_2")),
        norms=norms(model),
        patch_values=patch * patch * int(model.config.in_channels),
        grid=(side, side),
        functionals=FUNCTIONALS,
        block_forwards=forwards(),
        no_prompts="it lays out all of its tokens as the predicted image",
        reentrant=reentrant(model),
    )


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random DiT on 4x4 latents, two channels, that predicts noise and variance, and a batch."""
    build: Any = DiTTransformer2DModel
    model = build(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=2,
    )
    for block in model.transformer_blocks:  # fresh gates hardly let a sub-layer through
        nn.init.normal_(block.norm1.linear.bias)
    batch = {"hidden_states": torch.randn(3, 2, 4, 4), "timestep": torch.tensor([3, 300, 700])}
    return settle(model), {**batch, "class_labels": torch.arange(3)}  # the last one is no class
