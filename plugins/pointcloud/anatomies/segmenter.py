"""The plain point transformer with a part-segmentation head, Point-MAE's or Point-BERT's, all of which is fresh."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.pointcloud.anatomies.common import FORWARDS, FUNCTIONALS, PLACES, norms, pre_norm_block, sites, under
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.models.bert_parts import BertPartSegmenter, Edges, edges
from peft_suite.pointcloud.models.segmentation import (
    Carried,
    Embedded,
    PartSegmenter,
    Summary,
    WithCloud,
    carried,
    summary_forward,
    with_cloud,
)
from peft_suite.pointcloud.models.tokenizer import pointwise

_HEAD = ("label_conv.", "propagation_0.", "convs1.", "bns1.", "convs2.", "bns2.", "convs3.")
_BERT_HEAD = ("propagation_0.", "propagation_1.", "propagation_2.", "dgcnn_pro_1.", "dgcnn_pro_2.")
_BERT_END = ("conv1.", "bn1.", "conv2.")


def describe(model: PartSegmenter | BertPartSegmenter) -> Anatomy:
    """The anatomy of one model."""
    dim = model.embed_dim
    bert = isinstance(model, BertPartSegmenter)
    last = model.conv2 if isinstance(model, BertPartSegmenter) else model.convs3
    return Anatomy(
        family="point-segmenter",
        dim=dim,
        taps=True,
        blocks=tuple(pre_norm_block(model, f"blocks.blocks.{i}", dim) for i in range(len(model.blocks.blocks))),
        embed=Point("embed", dim),
        stem=sites(model, "encoder", "reduce_dim", "pos_embed"),
        norm=Point("norm", dim),
        tail=sites(model, "norm"),
        norms=norms(model),
        fresh=under(model, (*_BERT_HEAD, *_BERT_END) if bert else _HEAD),
        prefix_tokens=1 if bert else 0,
        class_token="cls_token" if bert else "",
        patch_values=3 * model.group_divider.size,
        functionals={
            **FUNCTIONALS,
            Carried.forward: carried,
            WithCloud.forward: with_cloud,
            Embedded.forward: pointwise,
            Edges.forward: edges,
        },
        block_forwards={**FORWARDS, Summary.forward: summary_forward},
        places={**PLACES, Summary.forward: ("summary",)},
        head=Point("conv2" if bert else "convs3", int(last.weight.shape[0])),
    )


def example() -> tuple[nn.Module, Any]:
    """A tiny random member of the family and a batch."""
    model = PartSegmenter(6, categories=3, embed_dim=24, depth=3, num_heads=2, groups=8, group_size=6)
    return model.eval(), {"points": clouds(), "category": torch.tensor([0, 2, 1])}


def example_bert() -> tuple[nn.Module, Any]:
    """The same with Point-BERT's head, on levels of 20 and 12 points."""
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "groups": 8, "group_size": 6, "encoder_dim": 16}
    model = BertPartSegmenter(6, categories=3, levels=(20, 12), **sizes)  # type: ignore[arg-type]
    return model.eval(), {"points": clouds(), "category": torch.tensor([0, 2, 1])}
