"""The plain point transformer with the part-segmentation head, all of which is fresh."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.pointcloud.anatomies.common import FORWARDS, FUNCTIONALS, PLACES, norms, pre_norm_block, sites, under
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.models.segmentation import Carried, Embedded, PartSegmenter, WithCloud, carried, with_cloud
from peft_suite.pointcloud.models.tokenizer import pointwise

_HEAD = ("label_conv.", "propagation_0.", "convs1.", "bns1.", "convs2.", "bns2.", "convs3.")


def describe(model: PartSegmenter) -> Anatomy:
    """The anatomy of one model."""
    dim = model.embed_dim
    return Anatomy(
        family="point-segmenter",
        dim=dim,
        taps=True,
        blocks=tuple(pre_norm_block(model, f"blocks.blocks.{i}", dim) for i in range(len(model.blocks.blocks))),
        embed=Point("embed", dim),
        stem=sites(model, "encoder", "pos_embed"),
        norm=Point("norm", dim),
        tail=sites(model, "norm"),
        norms=norms(model),
        fresh=under(model, _HEAD),
        patch_values=3 * model.group_divider.size,
        functionals={
            **FUNCTIONALS,
            Carried.forward: carried,
            WithCloud.forward: with_cloud,
            Embedded.forward: pointwise,
        },
        block_forwards=FORWARDS,
        places=PLACES,
        head=Point("convs3", int(model.convs3.weight.shape[0])),
    )


def example() -> tuple[nn.Module, Any]:
    """A tiny random member of the family and a batch."""
    model = PartSegmenter(6, categories=3, embed_dim=24, depth=3, num_heads=2, groups=8, group_size=6)
    return model.eval(), {"points": clouds(), "category": torch.tensor([0, 2, 1])}
