"""transformers' ViT, DINOv2 (with and without registers) and CLIP vision towers.

q, k and v are separate Linear layers, attention modules return tuples, models return mappings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point
from peft_suite.describing import checkpoints_reentrantly, classifier, norms, recomputing, separate_block, sites, under
from peft_suite.edits import Beside
from peft_suite.errors import BackboneError, MissingExtraError

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class _Names:
    """Where one architecture keeps what: paths below the encoder, then below a block."""

    blocks: str
    projection: str
    norm: str
    norm1: str
    attn: str
    out: str
    norm2: str
    enter: str = "embeddings"
    ends: tuple[str, ...] = ("attn", "mlp")  # what follows the sub-layers: (after attention, after the MLP)
    argument: int | str = 0


_VIT = _Names(
    "layers",
    "embeddings.patch_embeddings.projection",
    "layernorm",
    "layernorm_before",
    "attention",
    "o_proj",
    "layernorm_after",
)
_DINO = _Names(
    "encoder.layer",
    "embeddings.patch_embeddings.projection",
    "layernorm",
    "norm1",
    "attention",
    "o_proj",
    "norm2",
    ends=("layer_scale1", "layer_scale2"),
)
_CLIP = _Names(
    "encoder.layers",
    "embeddings.patch_embedding",
    "post_layernorm",
    "layer_norm1",
    "self_attn",
    "out_proj",
    "layer_norm2",
    enter="pre_layrnorm",
    argument="hidden_states",
)


def describe_vit(model: transformers.ViTModel | transformers.ViTForImageClassification) -> Anatomy:
    """The anatomy of a ViT, with or without classifier."""
    return _describe("transformers-vit", model, _VIT, "vit.", {_forward_of(model, "ViTLayer"): _vit_block})


def describe_dinov2(model: transformers.Dinov2Model | transformers.Dinov2ForImageClassification) -> Anatomy:
    """The anatomy of a DINOv2, with or without registers and classifier. The mask token serves pre-training only."""
    prefix = "dinov2_with_registers." if "Registers" in type(model).__name__ else "dinov2."
    name = "Dinov2WithRegistersLayer" if "Registers" in type(model).__name__ else "Dinov2Layer"
    return _describe("transformers-dinov2", model, _DINO, prefix, {_forward_of(model, name): _dino_block})


def describe_clip(model: transformers.CLIPVisionModel | transformers.CLIPVisionModelWithProjection) -> Anatomy:
    """The anatomy of a CLIP vision tower, bare, with projection or with classifier.

    The last norm sees the pooled class token only, and the classifier does without it.
    """
    forwards = {_forward_of(model, "CLIPEncoderLayer"): _clip_block}
    return _describe("transformers-clip", model, _CLIP, "vision_model.", forwards)


def _describe(family: str, model: nn.Module, names: _Names, prefix: str, forwards: dict[Any, Any]) -> Anatomy:
    base = prefix if hasattr(model, prefix[:-1]) else ""
    encoder: Any = model.get_submodule(base[:-1])
    try:
        layers: Any = encoder.get_submodule(names.blocks)
        projection: Any = encoder.get_submodule(names.projection)
    except AttributeError as error:
        raise BackboneError(
            f"This {type(model).__name__} is built otherwise than in transformers 5 ({error}). Update transformers."
        ) from error
    dim = projection.out_channels
    idle = [n for n, _ in model.named_parameters() if n.endswith("embeddings.mask_token")]
    pooled = names is _CLIP
    if pooled and hasattr(model, "classifier"):
        idle += under(model, f"{base}{names.norm}.")
    tail = () if f"{base}{names.norm}.weight" in idle else sites(model, (f"{base}{names.norm}",))
    stem = (f"{base}{names.projection}", *([f"{base}{names.enter}"] if pooled else []))
    embed: Any = encoder.embeddings
    tokens = getattr(embed, "register_tokens", None)
    side = int(encoder.config.image_size)
    return Anatomy(
        family=family,
        dim=dim,
        blocks=tuple(_block(model, names, f"{base}{names.blocks}.{i}", dim) for i in range(len(layers))),
        embed=Point(f"{base}{names.enter}", dim),
        stem=sites(model, stem),
        norm=None if pooled else Point(f"{base}{names.norm}", dim),
        tail=tail,
        norms=tuple(n for n in norms(model) if f"{n}.weight" not in idle),
        fresh=under(model, "classifier."),
        prefix_tokens=1 + (0 if tokens is None else tokens.shape[1]),
        class_token=f"{base}embeddings.{'class_embedding' if pooled else 'cls_token'}",
        image=Point(f"{base}{names.projection}", 3, "first"),
        image_size=(side, side),
        grid=(side // projection.stride[0], side // projection.stride[1]),
        head=classifier(model, "classifier") if hasattr(model, "classifier") else None,
        patch_values=projection.weight[0].numel(),
        block_forwards=forwards,
        # interpolated position embeddings come from the table itself
        read_directly=(f"{base}embeddings.position_embedding",) if pooled else (),
        idle=tuple(idle),
        reentrant=checkpoints_reentrantly(layers),
    )


def _block(model: nn.Module, names: _Names, path: str, dim: int) -> Block:
    return separate_block(
        model,
        path,
        dim,
        attn=names.attn,
        out=names.out,
        norm1=names.norm1,
        norm2=names.norm2,
        ends=names.ends,
        argument=names.argument,
    )


def _forward_of(model: nn.Module, name: str) -> Any:
    return next((type(m).forward for m in model.modules() if type(m).__name__ == name), None)


@recomputing
def _vit_block(block: Any, beside: Beside, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    n = block.layernorm_before(x)
    x = beside.attn(x, block.dropout(block.attention(n, attention_mask, **kwargs)[0]) + x, n)
    n = block.layernorm_after(x)
    return beside.mlp(x, block.dropout(block.mlp(n)) + x, n)


@recomputing
def _dino_block(block: Any, beside: Beside, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    n = block.norm1(x)
    h, _ = block.attention(n, attention_mask=attention_mask, **kwargs)
    x = beside.attn(x, block.drop_path(block.layer_scale1(h)) + x, n)
    n = block.norm2(x)
    return beside.mlp(x, block.drop_path(block.layer_scale2(block.mlp(n))) + x, n)


@recomputing
def _clip_block(block: Any, beside: Beside, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    n = block.layer_norm1(x)
    h, _ = block.self_attn(hidden_states=n, attention_mask=attention_mask, **kwargs)
    x = beside.attn(x, x + h, n)
    n = block.layer_norm2(x)
    return beside.mlp(x, x + block.mlp(n), n)


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random ViT with classifier and a batch."""
    library = _library()
    config = library.ViTConfig(**_SIZE, intermediate_size=48)
    return library.ViTForImageClassification(config).eval(), _batch()


def example_registers() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random DINOv2 with registers and classifier: layer scale, two inputs of the head."""
    library = _library()
    config = library.Dinov2WithRegistersConfig(**_SIZE, mlp_ratio=2, num_register_tokens=2)
    return library.Dinov2WithRegistersForImageClassification(config).eval(), _batch()


def example_classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random CLIP vision tower with a classifier on the mean of its tokens."""
    library = _library()
    size = {k: v for k, v in _SIZE.items() if k != "num_labels"}
    vision = {**size, "intermediate_size": 48}
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = library.CLIPConfig(vision_config=vision, text_config=text, num_labels=5)
    return library.CLIPForImageClassification(config).eval(), _batch()


def example_projection() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random CLIP vision tower with projection."""
    library = _library()
    config = library.CLIPVisionConfig(**_SIZE, intermediate_size=48, projection_dim=12)
    return library.CLIPVisionModelWithProjection(config).eval(), _batch()


_SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "initializer_range": 0.2,  # with the usual 0.02 features of random images hardly differ from the biases
}


def _batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "transformers' vision models need transformers, which is not installed. Run: pip install transformers"
        ) from error
    return transformers
