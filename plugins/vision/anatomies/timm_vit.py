"""timm's VisionTransformer and its kin: plain ViT, DeiT with a distillation token, registers, any pooling."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from timm.layers import resolve_self_attn_mask, use_reentrant_ckpt
from timm.models.vision_transformer import Attention, ResPostBlock, VisionTransformer
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.edits import Beside
from peft_suite.vision.anatomies.common import (
    FUNCTIONALS,
    affine,
    classifier,
    grid,
    image_size,
    matrices,
    norms,
    sites,
    under,
)


def describe(model: VisionTransformer) -> Anatomy:
    """The anatomy of one model. Parallel blocks, which have no separate attention and MLP, are left out."""
    projection = model.patch_embed.proj
    return Anatomy(
        family="timm-vit",
        dim=model.embed_dim,
        blocks=tuple(_block(model, i) for i in range(len(model.blocks))) if all(map(_known, model.blocks)) else (),
        embed=Point("norm_pre", model.embed_dim),
        stem=_stem(model),
        norm=Point("norm", model.embed_dim),
        tail=sites(model, ("norm", "fc_norm")),
        norms=norms(model),
        fresh=under(model, "head.", "head_dist."),
        prefix_tokens=model.num_prefix_tokens,
        image=Point("patch_embed", 3),
        image_size=image_size(model.patch_embed),
        grid=grid(model.patch_embed),
        head=classifier(model, "head") if not hasattr(model, "head_dist") else None,
        class_token="" if model.cls_token is None else "cls_token",
        patch_values=projection.weight[0].numel() if affine(projection) else model.embed_dim,
        functionals=FUNCTIONALS,
        block_forwards={
            ViTBlock.forward: _pre_norm_block,
            ResPostBlock.forward: _post_norm_block,
            Attention.forward: _attention,
        },
        places={Attention.forward: ("prefix",)},
        reentrant=bool(model.grad_checkpointing and use_reentrant_ckpt()),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random member of the family and a batch."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    return model.eval(), torch.randn(3, 3, 32, 32)


def example_deit() -> tuple[nn.Module, Tensor]:
    """The same with a distillation token and its second head."""
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    return model.eval(), torch.randn(3, 3, 32, 32)


def example_registers() -> tuple[nn.Module, Tensor]:
    """The same with register tokens, layer scale, q/k norm, average pooling and the norm after it."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=5,
        reg_tokens=2,
        class_token=False,
        global_pool="avg",
        init_values=0.5,
        qk_norm=True,
    )
    return model.eval(), torch.randn(3, 3, 32, 32)


def _known(block: Any) -> bool:
    return isinstance(block, ViTBlock | ResPostBlock) and hasattr(block.attn, "qkv")


def _block(model: VisionTransformer, index: int) -> Block:
    block: Any = model.blocks[index]
    attn, mlp = block.attn, block.mlp
    path, dim = f"blocks.{index}", model.embed_dim
    inner = attn.qkv.out_features // 3
    points = {
        "norm1": Point(f"{path}.norm1", dim),
        "attn": Point(f"{path}.attn", dim),
        "attn_out": Point(f"{path}.attn.proj", dim),
        "drop1": Point(f"{path}.drop_path1", dim),
        "norm2": Point(f"{path}.norm2", dim),
        "mlp": Point(f"{path}.mlp", dim),
        "drop2": Point(f"{path}.drop_path2", dim),
    }
    weights = {
        **{role: Weight(f"{path}.attn.qkv", (i * inner, (i + 1) * inner)) for i, role in enumerate("qkv")},
        "o": Weight(f"{path}.attn.proj"),
        **{n: Weight(f"{path}.mlp.{n}") for n in ("fc1", "fc2") if isinstance(getattr(mlp, n, None), nn.Linear)},
    }
    order = (f"{path}.norm1", f"{path}.attn.qkv", f"{path}.attn.proj", f"{path}.norm2", *matrices(model, f"{path}.mlp"))
    return Block(Point(path, dim), points, weights, sites(model, order), ("attn", "mlp"))


def _stem(model: VisionTransformer) -> tuple[Point, ...]:
    embed = model.patch_embed
    layout: Literal["first", "last"] = "first" if isinstance(embed.proj, nn.Conv2d) else "last"
    sites = [Point("patch_embed.proj", model.embed_dim, layout)] if affine(embed.proj) else []
    if affine(getattr(embed, "norm", None)):  # hybrids embed a convolutional network's features without a norm
        sites.append(Point("patch_embed.norm", model.embed_dim))
    if affine(model.norm_pre):
        sites.append(Point("norm_pre", model.embed_dim))
    return tuple(sites)


def _pre_norm_block(
    block: Any, beside: Beside, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    n = block.norm1(x)
    x = beside.attn(x, x + block.drop_path1(block.ls1(block.attn(n, attn_mask=attn_mask, is_causal=is_causal))), n)
    n = block.norm2(x)
    return beside.mlp(x, x + block.drop_path2(block.ls2(block.mlp(n))), n)


def _post_norm_block(
    block: Any, beside: Beside, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    h = block.attn(x, attn_mask=attn_mask, is_causal=is_causal)
    x = beside.attn(x, x + block.drop_path1(block.norm1(h)), x)
    return beside.mlp(x, x + block.drop_path2(block.norm2(block.mlp(x))), x)


def _attention(
    attn: Any, beside: Beside, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attention with a place for more keys and values, which every query sees."""
    if not beside.active:
        return type(attn).forward(attn, x, attn_mask, is_causal)  # type: ignore[no-any-return]
    b, n, _ = x.shape
    gate = attn.gate(x).sigmoid() if attn.gate is not None else None
    qkv = attn.qkv(x).reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # [B, heads, N, head width]
    q, k = attn.q_norm(q), attn.k_norm(k)
    k, v = beside.through("prefix", k, v)
    mask: Any = resolve_self_attn_mask(n, q, attn_mask, is_causal)
    if mask is not None and k.shape[2] > n:
        mask = F.pad(mask, (k.shape[2] - n, 0), value=True if mask.dtype == torch.bool else 0.0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    x = attn.norm(x.transpose(1, 2).reshape(b, n, attn.attn_dim))
    return attn.proj_drop(attn.proj(x if gate is None else x * gate))  # type: ignore[no-any-return]
