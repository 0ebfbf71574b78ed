"""diffusers' UNets: residual convolution blocks and attention on several scales, with skip connections between them.

A block is a residual block: a ResnetBlock2D (branch "mlp", its output being that of its last convolution), a
BasicTransformerBlock, or an Attention on a feature map with its own group norm. Resolution and width change between
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.describing import affine, norms, sites
from peft_suite.diffusion.anatomies.common import (
    FUNCTIONALS,
    attention_weights,
    forwards,
    linears,
    ready,
    reentrant,
    settle,
    transformer_block,
)

_STEM = ("encoder_hid_proj", "time_embedding", "class_embedding", "add_embedding", "conv_in")


def describe(model: Any) -> Anatomy:
    """The anatomy of one UNet2DConditionModel or UNet2DModel.

    Raises:
        BackboneError: its projections are fused, or it carries an adapter of peft.
    """
    ready(model)
    dim = int(model.conv_in.out_channels)
    blocks = tuple(_blocks(model))
    inside = {point.path for block in blocks for point in block.affine}
    stem = sites(model, linears(model, *_STEM))
    around = {point.path for point in stem} | {"conv_norm_out", "conv_out"}
    other = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.GroupNorm) and n not in inside]
    final = Point("conv_norm_out", dim, "first") if affine(getattr(model, "conv_norm_out", None)) else None
    return Anatomy(
        family="diffusers-unet" if isinstance(model, UNet2DConditionModel) else "diffusers-unet2d",
        dim=dim,
        blocks=blocks,
        stem=stem,
        norm=final,
        tail=sites(model, ("conv_norm_out", "conv_out")),
        between=sites(model, (n for n in other if n not in around)),
        norms=norms(model),
        functionals=FUNCTIONALS,
        block_forwards=forwards(),
        idle=("time_proj.weight",) if affine(model.time_proj) and not isinstance(model.time_proj, nn.Embedding) else (),
        no_prompts="it has no token sequence, only feature maps",
        reentrant=reentrant(model),
    )


def _blocks(model: nn.Module) -> Iterator[Block]:
    """Residual blocks in the order of the forward: down, middle, up."""
    modules = dict(model.named_modules())
    for stage in (*_children(modules, "down_blocks"), "mid_block", *_children(modules, "up_blocks")):
        for path in _order(modules, stage):
            yield from _inside(model, path, modules)


def _children(modules: Iterable[str], path: str) -> list[str]:
    """Paths right below ``path``."""
    return [n for n in modules if n.startswith(f"{path}.") and "." not in n[len(path) + 1 :]]


def _order(modules: Iterable[str], stage: str) -> list[str]:
    """What a stage runs: convolution blocks and attention in turns, then the rest, such as resampling."""
    convolutions, attentions = (_children(modules, f"{stage}.{kind}") for kind in ("resnets", "attentions"))
    first = convolutions[: stage == "mid_block"]  # the middle begins with one convolution block more
    turns = zip_longest(attentions, convolutions[1:]) if first else zip_longest(convolutions, attentions)
    rest = (n for n in _children(modules, stage) if not n.endswith((".resnets", ".attentions")))
    return [*first, *(path for pair in turns for path in pair if path is not None), *rest]


def _inside(model: nn.Module, path: str, modules: dict[str, nn.Module]) -> Iterator[Block]:
    """The blocks at and below a path."""
    below = [n for n in modules if n == path or n.startswith(f"{path}.")]
    for name in below:
        module: Any = modules[name]
        if isinstance(module, Transformer2DModel):
            last = len(module.transformer_blocks) - 1
            for i, inner in enumerate(module.transformer_blocks):
                assert isinstance(inner, BasicTransformerBlock)
                before = (f"{name}.norm", f"{name}.proj_in") if i == 0 else ()
                after = (f"{name}.proj_out",) if i == last else ()
                yield transformer_block(model, f"{name}.transformer_blocks.{i}", before, after)
        elif isinstance(module, ResnetBlock2D) or type(module).__name__ == "ResnetBlockCondNorm2D":
            yield _resnet(model, name)
        elif isinstance(module, Attention) and module.residual_connection:
            yield _attention(model, name)


def _resnet(model: nn.Module, path: str) -> Block:
    """A residual convolution block; its second convolution is what an adapter calls the sub-layer."""
    block: Any = model.get_submodule(path)
    out = int(block.conv2.out_channels)
    last = Point(f"{path}.conv2", out, "first")
    points = {"mlp": last, "drop2": last}
    if affine(block.norm2):
        points["norm2"] = Point(f"{path}.norm2", int(block.norm2.weight.shape[0]), "first")
    names = {"conv1": "conv1", "conv2": "conv2", "temb": "time_emb_proj"}
    weights = {r: Weight(f"{path}.{n}") for r, n in names.items() if affine(getattr(block, n, None))}
    order = ("norm1", "norm1.linear", "conv1", "time_emb_proj", "norm2", "norm2.linear", "conv2")
    return Block(Point(path, out, "first"), points, weights, sites(model, (f"{path}.{n}" for n in order)))


def _attention(model: nn.Module, path: str) -> Block:
    """An attention on a feature map ``[B, C, H, W]`` that holds its norm and its residual sum itself."""
    attn: Any = model.get_submodule(path)
    dim = int(attn.query_dim)
    points = {"attn_out": Point(f"{path}.to_out.0", dim), "drop1": Point(f"{path}.to_out.1", dim)}
    if affine(attn.group_norm):
        points["norm1"] = Point(f"{path}.group_norm", dim, "first")
    order = sites(model, (f"{path}.group_norm", *linears(model, path)))
    return Block(Point(path, dim, "first"), points, attention_weights(model, path), order)


SIZE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
CROSS: dict[str, Any] = {
    **SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 2,  # the number of heads, in this class
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
}


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random text-conditional UNet, as Stable Diffusion's, and a batch."""
    build: Any = UNet2DConditionModel
    return settle(build(**CROSS)), conditions()


def example_sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """The same as in SDXL: two blocks per stack, linear projections, pooled text and sizes as added conditions."""
    more = {
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 10,
    }
    batch: dict[str, Any] = conditions()
    batch["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 10), "time_ids": torch.randn(2, 6)}
    build: Any = UNet2DConditionModel
    return settle(build(**CROSS, **more)), batch


def example_pixels() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random class-conditional UNet on pixels, one channel."""
    build: Any = UNet2DModel
    model = build(
        **SIZE,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=2,
    )
    batch = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 700]), "class_labels": torch.arange(2)}
    return settle(model), batch


def conditions() -> dict[str, Tensor]:
    """Two noisy latents ``[2, 4, 8, 8]``, their timesteps, and text ``[2, 3, 12]``."""
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 3, 12),
    }
