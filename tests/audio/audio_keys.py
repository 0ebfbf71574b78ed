"""Key lists of the published audio checkpoints, typed from their description, with shapes for a small width.

Every published key stands beside the name that transformers 5 has for it; None is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
WIDTH, DEPTH, INNER, CLASSES = 24, 2, 48, 6


def _pairs(outer: str, inner: str | None, shape: tuple[int, ...]) -> list[tuple[str, str | None, tuple[int, ...]]]:
    bias = shape[:1]
    return [(f"{outer}.{n}", f"{inner}.{n}" if inner else None, s) for n, s in (("weight", shape), ("bias", bias))]


def original(
    patches: int, *, patch: tuple[int, int] = (16, 16), depth: int = DEPTH, head: int = CLASSES, prefix: str = "module."
) -> list[tuple[str, str | None, tuple[int, ...]]]:
    """(key, name in transformers 5, shape) of the original AST; ``qkv`` stands for three matrices there."""
    d = WIDTH
    rows: list[tuple[str, str | None, tuple[int, ...]]] = [
        ("v.cls_token", "embeddings.cls_token", (1, 1, d)),
        ("v.dist_token", "embeddings.distillation_token", (1, 1, d)),
        ("v.pos_embed", "embeddings.position_embeddings", (1, 2 + patches, d)),
        *_pairs("v.patch_embed.proj", "embeddings.patch_embeddings.projection", (d, 1, *patch)),
    ]
    for i in range(depth):
        rows += _pairs(f"v.blocks.{i}.norm1", f"layers.{i}.layernorm_before", (d,))
        rows += _pairs(f"v.blocks.{i}.attn.qkv", f"layers.{i}.attention.qkv", (3 * d, d))
        rows += _pairs(f"v.blocks.{i}.attn.proj", f"layers.{i}.attention.o_proj", (d, d))
        rows += _pairs(f"v.blocks.{i}.norm2", f"layers.{i}.layernorm_after", (d,))
        rows += _pairs(f"v.blocks.{i}.mlp.fc1", f"layers.{i}.mlp.fc1", (INNER, d))
        rows += _pairs(f"v.blocks.{i}.mlp.fc2", f"layers.{i}.mlp.fc2", (d, INNER))
    rows += _pairs("v.norm", "layernorm", (d,))
    rows += _pairs("v.head", None, (1000, d))
    rows += _pairs("v.head_dist", None, (1000, d))
    if head:
        rows += _pairs("mlp_head.0", "classifier.layernorm", (d,))
        rows += _pairs("mlp_head.1", "classifier.dense", (head, d))
    return [(prefix + key, name, shape) for key, name, shape in rows]


def ssast(patches: int, patch: tuple[int, int] = (16, 16)) -> list[tuple[str, str | None, tuple[int, ...]]]:
    """SSAST before fine-tuning: no ``mlp_head``, and what its task needs."""
    task: list[tuple[str, str | None, tuple[int, ...]]] = [
        ("module.p_input_fdim", None, ()),
        ("module.p_input_tdim", None, ()),
        ("module.mask_embed", None, (1, 1, WIDTH)),
    ]
    for name in ("cpredlayer", "gpredlayer"):
        task += _pairs(f"module.{name}.0", None, (WIDTH, WIDTH))
        task += _pairs(f"module.{name}.2", None, (patch[0] * patch[1], WIDTH))
    return [*original(patches, patch=patch, head=0), *task]


def transformers_4(patches: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Files of ASTForAudioClassification, as 4.x and 5.x write them."""
    d, base = WIDTH, "audio_spectrogram_transformer."
    rows: list[tuple[str, str, tuple[int, ...]]] = [
        ("embeddings.cls_token", "embeddings.cls_token", (1, 1, d)),
        ("embeddings.distillation_token", "embeddings.distillation_token", (1, 1, d)),
        ("embeddings.position_embeddings", "embeddings.position_embeddings", (1, 2 + patches, d)),
        (
            "embeddings.patch_embeddings.projection.weight",
            "embeddings.patch_embeddings.projection.weight",
            (d, 1, 16, 16),
        ),
        ("embeddings.patch_embeddings.projection.bias", "embeddings.patch_embeddings.projection.bias", (d,)),
        ("layernorm.weight", "layernorm.weight", (d,)),
        ("layernorm.bias", "layernorm.bias", (d,)),
    ]
    inner = {
        "layernorm_before": ("layernorm_before", (d,)),
        "attention.attention.query": ("attention.q_proj", (d, d)),
        "attention.attention.key": ("attention.k_proj", (d, d)),
        "attention.attention.value": ("attention.v_proj", (d, d)),
        "attention.output.dense": ("attention.o_proj", (d, d)),
        "layernorm_after": ("layernorm_after", (d,)),
        "intermediate.dense": ("mlp.fc1", (INNER, d)),
        "output.dense": ("mlp.fc2", (d, INNER)),
    }
    for i in range(DEPTH):
        for old, (new, shape) in inner.items():
            rows += _pairs(f"encoder.layer.{i}.{old}", f"layers.{i}.{new}", shape)  # type: ignore[arg-type]
    rows = [(base + key, name, shape) for key, name, shape in rows]
    rows += _pairs("classifier.layernorm", "classifier.layernorm", (d,))  # type: ignore[arg-type]
    rows += _pairs("classifier.dense", "classifier.dense", (CLASSES, d))  # type: ignore[arg-type]
    return rows


def deit(side: int) -> list[tuple[str, str | None, tuple[int, ...]]]:
    """Distilled DeiT: the names of ``v.`` without it, three colours, square positions."""
    rows = original(side * side, head=0, prefix="")
    rows = [(key.removeprefix("v."), name, shape) for key, name, shape in rows]
    return [(k, n, (WIDTH, 3, 16, 16) if k == "patch_embed.proj.weight" else s) for k, n, s in rows]


def filled(rows: list[tuple[str, str | None, tuple[int, ...]]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, _, shape in rows}
