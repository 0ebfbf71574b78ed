"""timm's Swin and SwinV2: windows of an NHWC grid, four stages of growing width."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import use_reentrant_ckpt
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.edits import Beside
from peft_suite.vision.anatomies.common import FUNCTIONALS, classifier, grid, image_size, matrices, norms, sites, under
from peft_suite.vision.anatomies.swin_prompts import prompted_block, prompted_merging


def describe(model: SwinTransformer | SwinTransformerV2) -> Anatomy:
    """The anatomy of one model. Tokens are NHWC between blocks; merging stands at the start of stages 1 to 3.

    SwinV2 hands the weight of ``attn.qkv`` to ``F.linear`` itself: no edit can act there, and methods that need the
    fused projection are refused.
    """
    stages: Any = model.layers
    embed: Any = model.patch_embed
    paths = [f"layers.{i}.blocks.{j}" for i, stage in enumerate(stages) for j in range(len(stage.blocks))]
    merging = [n for i in range(len(model.layers)) for n in _merging(model, f"layers.{i}.downsample")]
    last = model.num_features
    return Anatomy(
        family="timm-swin",
        dim=model.embed_dim,
        blocks=tuple(_block(model, path) for path in paths),
        stem=sites(model, ("patch_embed.proj", "patch_embed.norm")),
        norm=Point("norm", last),
        tail=sites(model, ("norm",)),
        between=sites(model, merging),
        norms=norms(model),
        fresh=under(model, "head."),
        image=Point("patch_embed", 3),
        image_size=image_size(model.patch_embed),
        grid=grid(model.patch_embed),
        head=classifier(model, "head.fc"),
        patch_values=embed.proj.weight[0].numel(),
        functionals=FUNCTIONALS,
        block_forwards={
            SwinTransformerBlock.forward: _pre_norm_block,
            SwinTransformerV2Block.forward: _post_norm_block,
            PatchMerging.forward: prompted_merging,
        },
        places={SwinTransformerBlock.forward: ("prompts",), PatchMerging.forward: ("prompts",)},
        read_directly=tuple(f"{p}.attn.qkv" for p in paths if _reads_qkv(model.get_submodule(p))),
        no_prompts="its attention works on windows of a grid, in which extra tokens have no place",
        reentrant=any(stage.grad_checkpointing for stage in model.layers) and bool(use_reentrant_ckpt()),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random Swin with one shifted block in the first stage, and a batch."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 2),
        mlp_ratio=2,
        num_classes=5,
    )
    return model.eval(), torch.randn(2, 3, 32, 32)


def example_v2() -> tuple[nn.Module, Tensor]:
    """A tiny random SwinV2."""
    model = timm.create_model(
        "swinv2_tiny_window8_256",
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 2),
        mlp_ratio=2,
        num_classes=5,
    )
    return model.eval(), torch.randn(2, 3, 32, 32)


def _block(model: nn.Module, path: str) -> Block:
    block: Any = model.get_submodule(path)
    dim, inner = block.norm1.weight.shape[0], block.attn.qkv.out_features // 3
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
        "fc1": Weight(f"{path}.mlp.fc1"),
        "fc2": Weight(f"{path}.mlp.fc2"),
    }
    attn, mlp = (f"{path}.attn.qkv", f"{path}.attn.proj"), matrices(model, f"{path}.mlp")
    norm1, norm2 = f"{path}.norm1", f"{path}.norm2"
    post = isinstance(block, SwinTransformerV2Block)
    order = (*attn, norm1, *mlp, norm2) if post else (norm1, *attn, norm2, *mlp)
    return Block(Point(path, dim), points, weights, sites(model, order), ("attn", "mlp"))


def _merging(model: nn.Module, path: str) -> tuple[str, ...]:
    names = ("reduction", "norm") if isinstance(model, SwinTransformerV2) else ("norm", "reduction")
    return tuple(f"{path}.{n}" for n in names)


def _reads_qkv(block: Any) -> bool:
    attn = block.attn
    return getattr(attn, "q_bias", None) is not None and not attn.qkv_bias_separate


def _pre_norm_block(block: Any, beside: Beside, x: Tensor) -> Tensor:
    if beside.has("prompts"):
        return prompted_block(block, beside, x)
    n = block.norm1(x)
    x = beside.attn(x, x + block.drop_path1(block._attn(n)), n)
    n = block.norm2(x)
    return beside.mlp(x, x + block.drop_path2(block.mlp(n)), n)


def _post_norm_block(block: Any, beside: Beside, x: Tensor) -> Tensor:
    x = beside.attn(x, x + block.drop_path1(block.norm1(block._attn(x))), x)
    return beside.mlp(x, x + block.drop_path2(block.norm2(block.mlp(x))), x)
