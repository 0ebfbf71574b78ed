"""PointGPT: causal blocks whose residual carries the first norm's output."""

from __future__ import annotations

from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.pointcloud.anatomies.common import FORWARDS, FUNCTIONALS, PLACES, classifier, norms, sites, under
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.models.pointgpt import GPTBlock, PointGPT, gpt_block_forward


def describe(model: PointGPT) -> Anatomy:
    """The anatomy of one model."""
    dim = model.embed_dim
    tokens = ("cls_token", "cls_pos") if model.fresh_tokens else ()
    return Anatomy(
        family="pointgpt",
        dim=dim,
        blocks=tuple(_block(model, f"blocks.layers.{i}", dim) for i in range(len(model.blocks.layers))),
        embed=Point("blocks.embed", dim),
        stem=sites(model, "encoder"),
        norm=Point("blocks.ln_f", dim),
        tail=sites(model, "blocks.ln_f", "blocks.cls_norm"),
        norms=norms(model),
        fresh=under(model, ("blocks.cls_head_finetune.", "blocks.cls_norm.", *tokens)),
        prefix_tokens=2,
        class_token="cls_token",
        patch_values=3 * model.group_divider.size,
        functionals=FUNCTIONALS,
        block_forwards={**FORWARDS, GPTBlock.forward: gpt_block_forward},
        places={**PLACES, GPTBlock.forward: ("tokens", "attn_out", "mlp_out", "end")},
        head=classifier(model, "blocks.cls_head_finetune"),
        causal=True,
    )


def _block(model: nn.Module, path: str, dim: int) -> Block:
    points = {
        "norm1": Point(f"{path}.ln_1", dim),
        "attn": Point(f"{path}.attn", dim),
        "attn_out": Point(f"{path}.attn.proj", dim),
        "drop1": Point(f"{path}.drop_path1", dim),
        "norm2": Point(f"{path}.ln_2", dim),
        "mlp": Point(f"{path}.mlp", dim),
        "drop2": Point(f"{path}.drop_path2", dim),
    }
    weights = {
        **{role: Weight(f"{path}.attn.qkv", (i * dim, (i + 1) * dim)) for i, role in enumerate("qkv")},
        "o": Weight(f"{path}.attn.proj"),
        "fc1": Weight(f"{path}.mlp.0"),
        "fc2": Weight(f"{path}.mlp.2"),
    }
    order = sites(model, *(f"{path}.{name}" for name in ("ln_1", "attn", "ln_2", "mlp")))
    return Block(Point(path, dim), points, weights, order, ("attn", "mlp"))


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random member of the family and a batch."""
    return PointGPT(5, embed_dim=24, depth=2, num_heads=2, groups=8, group_size=6).eval(), clouds()
