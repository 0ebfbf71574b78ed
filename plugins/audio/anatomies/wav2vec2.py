"""transformers' wav2vec 2.0: the encoder, its sequence classifier, and our :class:`AudioClassifier` on it.

Blocks of the base model have their norms behind the residual sums, those of the large ones ("stable layer norm") before
the sub-layers. Tokens are frames of the waveform; none stands before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.audio.anatomies.common import (
    BLOCK_PLACES,
    attend,
    forward_of,
    library,
    post_norm_block,
    pre_norm_block,
)
from peft_suite.audio.models.classifier import AudioClassifier, Pool, pool_forward
from peft_suite.describing import (
    affine,
    checkpoints_reentrantly,
    classifier,
    norms,
    recomputing,
    separate_block,
    sites,
    under,
)
from peft_suite.edits import Beside

if TYPE_CHECKING:
    import transformers

_NAMES = ("layer_norm", "final_layer_norm", "feed_forward")


def describe(model: transformers.Wav2Vec2Model | transformers.Wav2Vec2ForSequenceClassification) -> Anatomy:
    """The anatomy of transformers' own models."""
    base = "wav2vec2." if hasattr(model, "wav2vec2") else ""
    return describe_encoder(model, base, under(model, "projector.", "classifier.", "layer_weights"))


def describe_encoder(model: nn.Module, base: str, fresh: tuple[str, ...]) -> Anatomy:
    """The anatomy of a model whose Wav2Vec2Model has the path prefix ``base``; ``fresh`` names its head."""
    wav2vec: Any = model.get_submodule(base[:-1])
    config, ours = wav2vec.config, isinstance(model, AudioClassifier)
    stable, dim = bool(config.do_stable_layer_norm), int(config.hidden_size)
    path = f"{base}encoder"
    front = [
        f"{base}{name}"
        for root in ("feature_extractor", "feature_projection")
        for name, module in wav2vec.named_modules()
        if name.startswith(root) and affine(module)
    ]
    layer = forward_of(model, "Wav2Vec2EncoderLayerStableLayerNorm" if stable else "Wav2Vec2EncoderLayer")
    attention = forward_of(model, "Wav2Vec2Attention")
    last = _behind(model, path, dim, stable)
    norm = (f"{path}.layer_norm",)
    head = "head" if ours else "classifier"
    forwards: dict[Any, Any] = {
        layer: _stable_layer_forward if stable else _layer_forward,
        attention: _attention_forward,
    }
    places: dict[Any, tuple[str, ...]] = {layer: BLOCK_PLACES, attention: ("prefix",)}
    if ours:
        forwards[Pool.forward], places[Pool.forward] = pool_forward, ("pool",)
    if ours and stable and model.train_norm:
        fresh = (*under(model, *norm), *fresh)
    return Anatomy(
        family="wav2vec2",
        dim=dim,
        blocks=tuple(
            separate_block(
                model,
                f"{path}.layers.{i}",
                dim,
                attn="attention",
                out="out_proj",
                norm1="layer_norm",
                norm2="final_layer_norm",
                mlp="feed_forward",
                after=not stable,
            )
            for i in range(len(wav2vec.encoder.layers))
        ),
        embed=Point(f"{path}.dropout", dim),
        stem=sites(model, (*front, *(() if stable else norm))),
        norm=last,
        tail=sites(model, norm) if stable and f"{norm[0]}.weight" not in fresh else (),
        norms=norms(model),
        fresh=fresh,
        head=classifier(model, head) if f"{head}.weight" in fresh else None,
        patch_values=int(config.conv_dim[-1]),
        block_forwards=forwards,
        places=places,
        idle=tuple(n for n, _ in model.named_parameters() if n.endswith("masked_spec_embed")),
        taps=bool(getattr(config, "use_weighted_layer_sum", False)),
        reentrant=checkpoints_reentrantly(wav2vec.encoder.layers),
    )


def _behind(model: nn.Module, path: str, dim: int, stable: bool) -> Point | None:
    """The module that the tokens meet behind the last block."""
    if stable:
        return Point(f"{path}.layer_norm", dim)
    return next((Point(name, dim) for name in ("pool", "projector") if hasattr(model, name)), None)


@recomputing
def _layer_forward(block: Any, beside: Beside, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """The described forward of Wav2Vec2EncoderLayer."""
    return post_norm_block(block, beside, _NAMES, x, attention_mask, kwargs)


@recomputing
def _stable_layer_forward(block: Any, beside: Beside, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """The described forward of Wav2Vec2EncoderLayerStableLayerNorm."""
    return pre_norm_block(block, beside, _NAMES, x, attention_mask, kwargs)


def _attention_forward(
    attn: Any,
    beside: Beside,
    x: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Any = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The described forward of Wav2Vec2Attention: at "prefix", keys and values. It attends to itself only."""
    kwargs["output_attentions"] = output_attentions
    return attend(attn, beside, "out_proj", x, attention_mask, attn.dropout, **kwargs)


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random classifier of ours on the base model's layout, and waveforms."""
    return AudioClassifier(tiny(), 5).eval(), waveforms()


def example_huggingface() -> tuple[nn.Module, dict[str, Tensor]]:
    """transformers' own classifier with norms before the sub-layers, as in the large models."""
    wav2vec = library()
    config = wav2vec.Wav2Vec2Config(**SIZE, do_stable_layer_norm=True, feat_extract_norm="layer", num_labels=5)
    model: nn.Module = wav2vec.Wav2Vec2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model(waveforms())  # the first call leaves transformers' marks on the modules
    return model, {"input_values": waveforms()}


SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "initializer_range": 0.2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def tiny(**options: Any) -> nn.Module:
    """A random Wav2Vec2Model of width 24 with two blocks; one token per 20 samples."""
    wav2vec = library()
    model: nn.Module = wav2vec.Wav2Vec2Model(wav2vec.Wav2Vec2Config(**{**SIZE, **options})).eval()
    return model


def waveforms() -> Tensor:
    """Three random waveforms ``[3, 240]``."""
    return torch.randn(3, 240)
