"""ReCon with its own blocks.

What is said of ``attn``, ``mlp`` and the norms concerns the patches. The query tokens have matrices of their own, with
the roles ``contrast_q contrast_k contrast_v contrast_o contrast_fc1 contrast_fc2``.
"""

from __future__ import annotations

from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
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
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.models.recon import ReCon, ReConBlock, recon_block_forward

_TOKENS = ("cls_token", "cls_pos", "img_token", "img_pos", "text_token", "text_pos")


def describe(model: ReCon) -> Anatomy:
    """The anatomy of one model."""
    dim = model.embed_dim
    return Anatomy(
        family="recon",
        dim=dim,
        blocks=tuple(_block(model, f"blocks.blocks.{i}", dim) for i in range(len(model.blocks.blocks))),
        embed=Point("embed", dim),
        stem=sites(model, "encoder", "pos_embed"),
        norm=Point("norm", dim),
        tail=sites(model, "norm"),
        norms=norms(model),
        fresh=under(model, ("cls_head_finetune.", *(_TOKENS if model.fresh_tokens else ()))),
        prefix_tokens=3,
        queries=True,
        class_token="cls_token",
        patch_values=3 * model.group_divider.size,
        functionals=FUNCTIONALS,
        block_forwards={**FORWARDS, ReConBlock.forward: recon_block_forward},
        places={**PLACES, ReConBlock.forward: ("tokens", "attn_out", "mlp_out", "end")},
        head=classifier(model, "cls_head_finetune"),
    )


def _block(model: nn.Module, path: str, dim: int) -> Block:
    plain = pre_norm_block(model, path, dim)
    weights = {
        **plain.weights,
        "contrast_q": Weight(f"{path}.attn_contrast.q"),
        "contrast_k": Weight(f"{path}.attn_contrast.kv", (0, dim)),
        "contrast_v": Weight(f"{path}.attn_contrast.kv", (dim, 2 * dim)),
        "contrast_o": Weight(f"{path}.attn_contrast.proj"),
        "contrast_fc1": Weight(f"{path}.mlp_contrast.fc1"),
        "contrast_fc2": Weight(f"{path}.mlp_contrast.fc2"),
    }
    order = ("norm1_contrast", "norm1", "attn_contrast", "attn", "norm2_contrast", "norm2", "mlp_contrast", "mlp")
    return Block(plain.point, plain.points, weights, sites(model, *(f"{path}.{n}" for n in order)), plain.branches)


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random member of the family and a batch."""
    return ReCon(5, embed_dim=24, depth=2, num_heads=2, groups=8, group_size=6).eval(), clouds()
