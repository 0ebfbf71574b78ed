"""timm's ResNet: convolutions with batch norm.

The affine sites are the batch norms (in train mode their statistics stay frozen): scaling after the norm folds into
it, and with it into the convolution before.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import use_reentrant_ckpt
from timm.models.resnet import ResNet
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.vision.anatomies.common import FUNCTIONALS, classifier, norms, sites, under


def describe(model: ResNet) -> Anatomy:
    """The anatomy of one model. Blocks have no sub-layers with names; convolutions are matrices ``conv1 conv2 conv3``.

    Projected shortcuts (``downsample``) are counted as operations between stages.
    """
    paths = [f"layer{i}.{j}" for i in range(1, 5) for j in range(len(getattr(model, f"layer{i}")))]
    all_norms = norms(model)
    stem = [n for n in all_norms if n.split(".")[0] in ("conv1", "bn1")]
    norm: Any = model.bn1
    first: Any = next(m for m in model.conv1.modules() if isinstance(m, nn.Conv2d))
    return Anatomy(
        family="timm-resnet",
        dim=norm.weight.shape[0],
        blocks=tuple(_block(model, path) for path in paths),
        stem=sites(model, stem),
        between=sites(model, (n for n in all_norms if ".downsample." in n)),
        norms=all_norms,
        fresh=under(model, "fc."),
        image=Point("conv1", 3),
        head=classifier(model, "fc"),
        patch_values=first.weight[0].numel(),
        functionals=FUNCTIONALS,
        no_prompts="it has no tokens, only feature maps",
        reentrant=bool(model.grad_checkpointing and use_reentrant_ckpt()),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random ResNet of bottleneck blocks and a batch."""
    model = timm.create_model("resnet50", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, num_classes=5)
    return model.eval(), torch.randn(3, 3, 32, 32)


def _block(model: nn.Module, path: str) -> Block:
    block: Any = model.get_submodule(path)
    convs = [n for n in ("conv1", "conv2", "conv3") if isinstance(getattr(block, n, None), nn.Conv2d)]
    width = getattr(block, convs[-1]).out_channels
    weights = {n: Weight(f"{path}.{n}") for n in convs}
    affine = sites(model, (f"{path}.bn{i + 1}" for i in range(len(convs))))
    return Block(Point(path, width, "first"), {}, weights, affine)
