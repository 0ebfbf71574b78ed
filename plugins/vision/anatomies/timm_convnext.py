"""timm's ConvNeXt and ConvNeXtV2: one residual branch per block, a depthwise convolution and then a channel MLP."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from timm.layers import use_reentrant_ckpt
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.edits import Beside
from peft_suite.vision.anatomies.common import FUNCTIONALS, classifier, matrices, norms, sites, under


def describe(model: ConvNeXt) -> Anatomy:
    """The anatomy of one model. Blocks have an MLP branch only; its un-normalised input is the convolution's output.

    The last affine site is the feature map before pooling (``norm_pre``, usually an Identity).
    """
    stages: Any = model.stages
    paths = [f"stages.{i}.blocks.{j}" for i, stage in enumerate(stages) for j in range(len(stage.blocks))]
    convs = [n for i in range(len(model.stages)) for n in (f"stages.{i}.downsample.0", f"stages.{i}.downsample.1")]
    convs += [f"{path}.shortcut.conv" for path in paths]
    last = Point("norm_pre", model.num_features, "first")
    first: Any = next(m for m in model.stem.modules() if isinstance(m, nn.Conv2d))
    return Anatomy(
        family="timm-convnext",
        dim=stages[0].blocks[0].conv_dw.out_channels,
        blocks=tuple(_block(model, path) for path in paths),
        stem=sites(model, (f"stem.{n}" for n, _ in model.stem.named_modules() if n)),
        norm=last,
        tail=(last,),
        between=sites(model, convs),
        norms=norms(model),
        fresh=under(model, "head.fc."),
        image=Point("stem", 3),
        head=classifier(model, "head.fc"),
        patch_values=first.weight[0].numel(),
        functionals=FUNCTIONALS,
        block_forwards={ConvNeXtBlock.forward: _forward},
        no_prompts="it has no tokens, only feature maps",
        reentrant=any(stage.grad_checkpointing for stage in model.stages) and bool(use_reentrant_ckpt()),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random ConvNeXt and a batch."""
    return _example("convnext_tiny"), torch.randn(2, 3, 64, 64)


def example_v2() -> tuple[nn.Module, Tensor]:
    """A tiny random ConvNeXtV2: response norm instead of layer scale, 1x1 convolutions instead of Linear layers."""
    return _example("convnextv2_atto"), torch.randn(2, 3, 64, 64)


def _example(name: str) -> nn.Module:
    """With torch's initial values: under timm's, features of random images hardly differ from the biases."""
    model = timm.create_model(name, dims=(8, 12, 16, 24), depths=(1, 1, 1, 1), num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    return model.eval()


def _block(model: nn.Module, path: str) -> Block:
    block: Any = model.get_submodule(path)
    dim = block.conv_dw.out_channels
    layout: Literal["first", "last"] = "first" if block.use_conv_mlp else "last"
    points = {
        "norm2": Point(f"{path}.norm", dim, layout),
        "mlp": Point(f"{path}.mlp", dim, layout),
        "drop2": Point(f"{path}.drop_path", dim, "first"),
    }
    weights = {"fc1": Weight(f"{path}.mlp.fc1"), "fc2": Weight(f"{path}.mlp.fc2")}
    order = (f"{path}.conv_dw", f"{path}.norm", *matrices(model, f"{path}.mlp"))
    return Block(Point(path, dim, "first"), points, weights, sites(model, order), ("mlp",))


def _forward(block: Any, beside: Beside, x: Tensor) -> Tensor:
    shortcut = x
    wide = block.conv_dw(x)  # [B, C, H, W]
    last = wide.permute(0, 2, 3, 1)
    n = block.norm(wide if block.use_conv_mlp else last)
    x = block.mlp(n) if block.use_conv_mlp else block.mlp(n).permute(0, 3, 1, 2)
    read = n.permute(0, 2, 3, 1) if block.use_conv_mlp else n
    if block.gamma is not None:
        x = x.mul(block.gamma.reshape(1, -1, 1, 1))
    x = block.drop_path(x) + block.shortcut(shortcut)
    return beside.mlp(last, x.permute(0, 2, 3, 1), read).permute(0, 3, 1, 2)
