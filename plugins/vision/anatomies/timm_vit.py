"""timm's VisionTransformer and its kin: plain ViT, DeiT with a distillation token, registers, any pooling."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from timm.layers import LayerNorm, LayerNormFp32, fast_layer_norm, use_reentrant_ckpt
from timm.models.vision_transformer import Block as ViTBlock
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.edits import Beside


def describe(model: VisionTransformer) -> Anatomy:
    """The anatomy of one model. Parallel blocks, which have no separate attention and MLP, are left out."""
    head = [n for n, _ in model.named_parameters() if n.split(".")[0] in ("head", "head_dist")]
    projection = model.patch_embed.proj
    return Anatomy(
        family="timm-vit",
        dim=model.embed_dim,
        blocks=tuple(_block(model, i) for i in range(len(model.blocks))) if all(map(_known, model.blocks)) else (),
        embed=Point("norm_pre", model.embed_dim),
        stem=_stem(model),
        norm=Point("norm", model.embed_dim),
        tail=tuple(Point(n, model.embed_dim) for n in ("norm", "fc_norm") if _affine(getattr(model, n))),
        norms=tuple(n for n, m in model.named_modules() if _is_norm(m) and not n.startswith("adapters.")),
        fresh=tuple(head),
        prefix_tokens=model.num_prefix_tokens,
        patch_values=projection.weight[0].numel() if _affine(projection) else model.embed_dim,
        functionals={LayerNorm.forward: _layer_norm, LayerNormFp32.forward: _layer_norm_fp32},
        block_forwards={ViTBlock.forward: _pre_norm_block, ResPostBlock.forward: _post_norm_block},
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
    linears = [f"{path}.mlp.{n}" for n, m in mlp.named_modules() if isinstance(m, nn.Linear)]
    sites = (f"{path}.norm1", f"{path}.attn.qkv", f"{path}.attn.proj", f"{path}.norm2", *linears)
    affine = tuple(
        Point(site, _width(model.get_submodule(site))) for site in sites if _affine(model.get_submodule(site))
    )
    return Block(Point(path, dim), points, weights, affine, ("attn", "mlp"))


def _stem(model: VisionTransformer) -> tuple[Point, ...]:
    embed = model.patch_embed
    layout: Literal["first", "last"] = "first" if isinstance(embed.proj, nn.Conv2d) else "last"
    sites = [Point("patch_embed.proj", model.embed_dim, layout)] if _affine(embed.proj) else []
    if _affine(getattr(embed, "norm", None)):  # hybrids embed a convolutional network's features without a norm
        sites.append(Point("patch_embed.norm", model.embed_dim))
    if _affine(model.norm_pre):
        sites.append(Point("norm_pre", model.embed_dim))
    return tuple(sites)


def _affine(module: nn.Module | None) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _width(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.weight.shape[0])  # type: ignore[union-attr,index]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and _affine(module)


def _pre_norm_block(
    block: Any, beside: Beside, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    h = block.attn(block.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
    x = beside.attn(x, x + block.drop_path1(block.ls1(h)))
    return beside.mlp(x, x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def _post_norm_block(
    block: Any, beside: Beside, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    h = block.attn(x, attn_mask=attn_mask, is_causal=is_causal)
    x = beside.attn(x, x + block.drop_path1(block.norm1(h)))
    return beside.mlp(x, x + block.drop_path2(block.norm2(block.mlp(x))))


def _layer_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = fast_layer_norm if module._fast_norm else F.layer_norm
    return norm(x, module.normalized_shape, weight, bias, module.eps)


def _layer_norm_fp32(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps).to(x.dtype)
