"""timm's MLP-Mixer and ResMLP: token mixing by a matrix over positions, then a channel MLP."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import use_reentrant_ckpt
from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.edits import Beside
from peft_suite.vision.anatomies.common import (
    FUNCTIONALS,
    affine,
    classifier,
    image_size,
    matrices,
    norms,
    sites,
    under,
)


def describe(model: MlpMixer) -> Anatomy:
    """The anatomy of one model. gMLP, whose only branch gates tokens and channels together, has no described blocks.

    Token matrices act on ``[B, C, N]``: their channels are positions.
    """
    known = all(isinstance(block, MixerBlock | ResBlock) for block in model.blocks)
    dim = model.embed_dim
    return Anatomy(
        family="timm-mixer",
        dim=dim,
        blocks=tuple(_block(model, f"blocks.{i}") for i in range(len(model.blocks))) if known else (),
        embed=Point("stem", dim),
        stem=sites(model, ("stem.proj", "stem.norm")),
        norm=Point("norm", dim),
        tail=_affines(model, "norm"),
        norms=norms(model),
        fresh=under(model, "head."),
        image=Point("stem", 3),
        image_size=image_size(model.stem),
        head=classifier(model, "head"),
        patch_values=model.stem.proj.weight[0].numel(),
        functionals=FUNCTIONALS,
        block_forwards={MixerBlock.forward: _mixer_block, ResBlock.forward: _res_block},
        no_prompts="it mixes a fixed number of tokens",
        reentrant=bool(model.grad_checkpointing and use_reentrant_ckpt()),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random MLP-Mixer and a batch."""
    model = MlpMixer(**_SIZE, mlp_ratio=(0.5, 2.0))
    return model.eval(), torch.randn(3, 3, 32, 32)


def example_resmlp() -> tuple[nn.Module, Tensor]:
    """A tiny random ResMLP: one token matrix, affine layers instead of norms, layer scale."""
    model = MlpMixer(**_SIZE, mlp_ratio=2, block_layer=ResBlock, norm_layer=Affine)
    return model.eval(), torch.randn(3, 3, 32, 32)


_SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2, "num_classes": 5}


def _block(model: nn.Module, path: str) -> Block:
    block: Any = model.get_submodule(path)
    dim = block.mlp_channels.fc1.in_features
    tokens = matrices(model, f"{path}.mlp_tokens") if isinstance(block, MixerBlock) else (f"{path}.linear_tokens",)
    channels = matrices(model, f"{path}.mlp_channels")
    points = {
        "norm1": Point(f"{path}.norm1", dim),
        "norm2": Point(f"{path}.norm2", dim),
        "mlp": Point(f"{path}.mlp_channels", dim),
    }
    if isinstance(block, MixerBlock) and isinstance(block.drop_path, nn.Identity):  # drop_path serves both branches
        points["drop2"] = points["mlp"]
    weights = {
        **{f"tokens_fc{i + 1}": Weight(name) for i, name in enumerate(tokens)},
        "fc1": Weight(f"{path}.mlp_channels.fc1"),
        "fc2": Weight(f"{path}.mlp_channels.fc2"),
    }
    order = (
        *_affines(model, f"{path}.norm1"),
        *sites(model, tokens),
        *_affines(model, f"{path}.norm2"),
        *sites(model, channels),
    )
    return Block(Point(path, dim), points, weights, order, ("mlp",))


def _affines(model: nn.Module, path: str) -> tuple[Point, ...]:
    """A norm, or ResMLP's affine layer, whose scale and shift are called alpha and beta."""
    module: Any = model.get_submodule(path)
    if hasattr(module, "alpha"):
        return (Point(path, module.alpha.numel()),)
    return sites(model, (path,)) if affine(module) else ()


def _mixer_block(block: Any, beside: Beside, x: Tensor) -> Tensor:
    x = x + block.drop_path(block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2))
    n = block.norm2(x)
    return beside.mlp(x, x + block.drop_path(block.mlp_channels(n)), n)


def _res_block(block: Any, beside: Beside, x: Tensor) -> Tensor:
    x = x + block.drop_path(block.ls1 * block.linear_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2))
    n = block.norm2(x)
    return beside.mlp(x, x + block.drop_path(block.ls2 * block.mlp_channels(n)), n)
