"""The plain point transformer: Point-BERT, Point-MAE, ACT, ReCon's weights in plain blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.pointcloud.anatomies.common import (
    FORWARDS,
    FUNCTIONALS,
    PLACES,
    classifier,
    norms,
    pre_norm_block,
    sites,
    under,
)
from peft_suite.pointcloud.models.transformer import PointTransformer


def describe(model: PointTransformer) -> Anatomy:
    """The anatomy of one model."""
    dim = model.embed_dim
    tokens = ("cls_token", "cls_pos") if model.fresh_tokens else ()
    return Anatomy(
        family="point-transformer",
        dim=dim,
        blocks=tuple(pre_norm_block(model, f"blocks.blocks.{i}", dim) for i in range(len(model.blocks.blocks))),
        embed=Point("embed", dim),
        stem=sites(model, "encoder", "reduce_dim", "pos_embed"),
        norm=Point("norm", dim),
        tail=sites(model, "norm"),
        norms=norms(model),
        fresh=under(model, ("cls_head_finetune.", *tokens)),
        prefix_tokens=1,
        class_token="cls_token",
        patch_values=3 * model.group_divider.size,
        functionals=FUNCTIONALS,
        block_forwards=FORWARDS,
        places=PLACES,
        head=classifier(model, "cls_head_finetune"),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random member of the family and a batch."""
    return tiny(), clouds()


def example_bert() -> tuple[nn.Module, Tensor]:
    """The same with a narrower tokenizer, a pre-trained class token and the head without batch norm."""
    return tiny(encoder_dim=16, head="short", fresh_tokens=False), clouds()


def tiny(**options: object) -> PointTransformer:
    """Two blocks of width 24 on eight groups."""
    sizes: dict[str, object] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "groups": 8, "group_size": 6}
    return PointTransformer(5, **{**sizes, **options}).eval()  # type: ignore[arg-type]


def clouds(channels: int = 3) -> Tensor:
    """Three random clouds whose coordinates every floating-point type holds exactly: groups never depend on it."""
    return (torch.randint(-48, 49, (3, 40, channels)) / 32).float()
