"""Transformers of other modalities, taken apart for Any2Point: blocks, positions, class token and final norm.

The source's own library builds it and loads its weights: timm for images, transformers for text and audio. What reads
its native input (patch or token embedding, a norm before the blocks, heads) is left out. The tensors are taken over,
not copied, except q, k and v, which become one matrix.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_suite.errors import (
    BackboneMismatchError,
    ConfigError,
    MissingExtraError,
    PeftSuiteError,
    UnsupportedError,
    closest,
)
from peft_suite.pointcloud.models.any2point_blocks import SourceBlock

__all__ = ["AUDIO", "LANGUAGE", "VISION", "Source", "from_audio", "from_language", "from_vision"]

VISION, LANGUAGE = "vit_base_patch14_dinov2", "openai/clip-vit-large-patch14"
AUDIO = "MIT/ast-finetuned-audioset-10-10-0.4593"
# The text side of LANGUAGE, for random weights without a download. AUDIO has the library's default sizes.
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


class Source(NamedTuple):
    """What is taken.

    Attributes:
        blocks: in order.
        table: positions ``[rows * columns, D]`` or ``[length, D]``, without those of prefix tokens.
        grid: (rows, columns) or (length,).
        pixels: size of the native input along ``grid``; the grid itself for text.
        norm: the final norm.
        class_token: ``[1, 1, D]``, or None.
    """

    blocks: list[SourceBlock]
    table: Tensor
    grid: tuple[int, ...]
    pixels: tuple[int, ...]
    norm: nn.LayerNorm
    class_token: Tensor | None


def from_vision(name: str, options: Mapping[str, Any], weights: str, pretrained: bool) -> Source:
    """A VisionTransformer of timm, or the embedded "micro-vit".

    Args:
        name: of timm, with or without the tag of its weights.
        options: arguments of ``timm.create_model``; ``img_size`` has timm interpolate the position table.
        weights: local file instead of published weights.
        pretrained: load the published weights.

    Raises:
        UnknownNameError, UnsupportedError, PeftSuiteError, FileFormatError, BackboneMismatchError, ConfigError: see
            :meth:`peft_suite.vision.backbones.TimmBackbones.build`.
        UnsupportedError: the model is no plain ViT with learned positions.
        MissingExtraError: timm is not installed.
    """
    _need("timm", "pip install 'peft-suite[vision]'")
    from timm.models.vision_transformer import VisionTransformer

    from peft_suite.vision.backbones import backbones

    model: Any = backbones.build(name, 0, pretrained=pretrained, checkpoint=weights, options=options)
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        raise UnsupportedError(
            f"source = {name!r} is a {type(model).__name__} here, and any2point-vision reads the blocks and learned "
            f"positions of a plain ViT. Choose one such as {VISION!r}, 'vit_base_patch16_224' or 'micro-vit'."
        )
    grid = tuple(int(n) for n in model.patch_embed.grid_size)
    pixels = tuple(int(n) for n in model.patch_embed.img_size)
    table = model.pos_embed[0, -(grid[0] * grid[1]) :]
    theirs = next(
        (m for m in (model.norm, model.fc_norm) if isinstance(m, nn.LayerNorm)), nn.LayerNorm(model.embed_dim)
    )
    norm = nn.LayerNorm(model.embed_dim, eps=theirs.eps)  # timm's own class computes the same in its own forward
    norm.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)
    return Source([_timm_block(name, b) for b in model.blocks], table, grid, pixels, norm, model.cls_token)


def _timm_block(name: str, block: Any) -> SourceBlock:
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    plain = type(block) is Block and type(block.attn) is Attention
    dim = block.norm1.normalized_shape[0] if plain and isinstance(block.norm1, nn.LayerNorm) else 0
    odd = [
        what
        for what, wrong in (
            ("blocks of another kind", not plain or not dim),
            ("norms of q and k", plain and not isinstance(block.attn.q_norm, nn.Identity)),
            ("a norm inside attention", plain and not isinstance(block.attn.norm, nn.Identity)),
            ("gated attention", plain and block.attn.gate is not None),
            ("heads of another width", plain and dim and block.attn.qkv.out_features != 3 * dim),
            ("a gated MLP", not _plain_mlp(getattr(block, "mlp", None), dim)),
        )
        if wrong
    ]
    if odd:
        raise UnsupportedError(
            f"source = {name!r} has {' and '.join(odd)}, which any2point-vision does not rebuild. Choose a plain ViT "
            f"such as {VISION!r}."
        )
    kinds = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}
    kind = type(block.mlp.act)
    activation = next((n for k, n in kinds.items() if issubclass(kind, k)), kind.__name__)
    activation = "quick_gelu" if kind.__name__.lower() == "quickgelu" else activation
    state = {
        key: value
        for key, value in block.state_dict(keep_vars=True).items()
        if key.split(".")[0] in ("norm1", "norm2", "attn", "mlp", "ls1", "ls2")
    }
    hidden, bias = block.mlp.fc1.out_features, block.attn.qkv.bias is not None
    return _filled(
        state, dim, block.attn.num_heads, hidden, activation, bias, "ls1.gamma" in state, float(block.norm1.eps)
    )


def _need(library: str, install: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(f"This source comes from {library}, which is not installed. Run: {install}")


def _plain_mlp(mlp: Any, dim: int) -> bool:
    from timm.layers.mlp import Mlp

    return type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)


def from_language(name: str, options: Mapping[str, Any], pretrained: bool) -> Source:
    """CLIP's text encoder, of transformers.

    Args:
        name: of the hub, or a folder that transformers has saved.
        options: fields of its configuration.
        pretrained: load its weights.

    Raises:
        PeftSuiteError, UnsupportedError, BackboneMismatchError, ConfigError: see :func:`_transformer`.
        MissingExtraError: transformers is not installed.
    """
    _need("transformers", "pip install transformers")
    from transformers import CLIPTextConfig, CLIPTextModel

    known = CLIPTextConfig(**_CLIP_L) if name == LANGUAGE else None
    model = _transformer(name, CLIPTextModel, known, ("clip_text_model", "clip"), options, pretrained)
    config = model.config
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "proj": "self_attn.out_proj", "qkv": "self_attn.{}_proj"}
    blocks = [_transformers_block(layer, config, names) for layer in model.encoder.layers]
    table = model.embeddings.position_embedding.weight
    return Source(blocks, table, (len(table),), (len(table),), model.final_layer_norm, None)


def from_audio(name: str, options: Mapping[str, Any], pretrained: bool) -> Source:
    """An audio spectrogram transformer (AST) of transformers; arguments and errors as :func:`from_language`."""
    _need("transformers", "pip install transformers")
    from transformers import ASTConfig, ASTModel

    known = ASTConfig() if name == AUDIO else None
    model = _transformer(name, ASTModel, known, ("audio-spectrogram-transformer",), options, pretrained)
    config = model.config
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "proj": "attention.o_proj",
        "qkv": "attention.{}_proj",
    }
    blocks = [_transformers_block(layer, config, names) for layer in model.layers]
    grid = tuple(int(n) for n in model.embeddings.get_shape(config))  # frequencies, times
    places = model.embeddings.position_embeddings
    if not pretrained:  # the library starts them at zero, which would tell no token from another
        nn.init.trunc_normal_(places, std=0.02)
    table = places[0, -(grid[0] * grid[1]) :]
    pixels = (int(config.num_mel_bins), int(config.max_length))
    return Source(blocks, table, grid, pixels, model.layernorm, model.embeddings.cls_token)


def _transformers_block(layer: Any, config: Any, names: Mapping[str, str]) -> SourceBlock:
    part = layer.get_submodule
    state: dict[str, Tensor] = {}
    for own, theirs in (("norm1", names["norm1"]), ("norm2", names["norm2"]), ("attn.proj", names["proj"])):
        state |= {f"{own}.{n}": p for n, p in part(theirs).named_parameters()}
    for own in ("mlp.fc1", "mlp.fc2"):
        state |= {f"{own}.{n}": p for n, p in part(own).named_parameters()}
    qkv = [part(names["qkv"].format(role)) for role in "qkv"]
    state["attn.qkv.weight"] = torch.cat([m.weight.detach() for m in qkv])
    bias = qkv[0].bias is not None
    if bias:
        state["attn.qkv.bias"] = torch.cat([m.bias.detach() for m in qkv])
    hidden, eps = config.intermediate_size, float(config.layer_norm_eps)
    return _filled(state, config.hidden_size, config.num_attention_heads, hidden, config.hidden_act, bias, False, eps)


def _filled(state: Mapping[str, Tensor], *sizes: Any) -> SourceBlock:
    """A block of these tensors themselves."""
    with torch.device("meta"):
        block = SourceBlock(*sizes)
    block.load_state_dict(dict(state), assign=True)
    return block


def _transformer(
    name: str, cls: Any, known: Any, kinds: Iterable[str], options: Mapping[str, Any], pretrained: bool
) -> Any:
    """A model of transformers, with its own loader.

    Raises:
        PeftSuiteError: configuration or weights are not in the cache and cannot be fetched.
        UnsupportedError: another kind of model.
        BackboneMismatchError: the weights are not all there.
        ConfigError: a field that its configuration does not have.
    """
    from transformers import AutoConfig

    from peft_suite.weights import no_waiting_for_the_hub

    try:
        with no_waiting_for_the_hub():
            config = known if known is not None and not pretrained else AutoConfig.from_pretrained(name)
            if config.model_type not in kinds:
                raise UnsupportedError(
                    f"source = {name!r} is a {config.model_type!r}, not one of {', '.join(map(repr, kinds))}. Name "
                    f"another source, or a folder with such a model."
                )
            config = getattr(config, "text_config", config)
            unknown = sorted(set(options) - set(config.to_dict()))
            if unknown:
                raise ConfigError(
                    f"source_options: {type(config).__name__} has no {', '.join(unknown)}. "
                    f"{closest(unknown[0], config.to_dict())}"
                )
            for key, value in options.items():
                setattr(config, key, value)
            if not pretrained:
                return cls(config)
            model, report = cls.from_pretrained(
                name, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError) as error:
        if isinstance(error, PeftSuiteError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = (
            "cannot be read" if Path(name).is_dir() else "is neither a folder nor in the local cache, or not complete"
        )
        raise PeftSuiteError(
            f"source = {name!r} {what}: {reason} Give the folder of a model that transformers has saved, or "
            "pretrained=False for random weights."
        ) from error
    lost = sorted(map(str, {*report["missing_keys"], *report.get("mismatched_keys", ())}))
    if lost:
        raise BackboneMismatchError(
            f"source = {name!r} lacks weights of {cls.__name__}, or has them in other shapes: {', '.join(lost[:6])}. "
            "Choose the source_options that it was saved with."
        )
    return model
