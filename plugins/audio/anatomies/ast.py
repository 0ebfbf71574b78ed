"""transformers' Audio Spectrogram Transformer: the encoder, its classifier, and our :class:`AudioClassifier` on it."""

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
    pre_norm_block,
)
from peft_suite.audio.models.classifier import AudioClassifier, Pool, pool_forward
from peft_suite.describing import checkpoints_reentrantly, classifier, norms, recomputing, separate_block, sites, under
from peft_suite.edits import Beside
from peft_suite.errors import BackboneError

if TYPE_CHECKING:
    import transformers

BASE = "audio_spectrogram_transformer"


def describe(model: transformers.ASTModel | transformers.ASTForAudioClassification) -> Anatomy:
    """The anatomy of transformers' own models. The classifier pools the class and the distillation token."""
    return describe_encoder(model, f"{BASE}." if hasattr(model, BASE) else "", under(model, "classifier."))


def describe_encoder(model: nn.Module, base: str, fresh: tuple[str, ...]) -> Anatomy:
    """The anatomy of a model whose AST has the path prefix ``base``; ``fresh`` names its head."""
    encoder: Any = model.get_submodule(base[:-1])
    try:
        layers: Any = encoder.layers
        embeddings: Any = encoder.embeddings
        projection: Any = embeddings.patch_embeddings.projection
    except AttributeError as error:
        raise BackboneError(
            f"This {type(model).__name__} is built otherwise than in transformers 5 ({error}). Update transformers; "
            "files of older versions load as they are."
        ) from error
    ours, dim = isinstance(model, AudioClassifier), int(projection.out_channels)
    pool = Pool.forward if ours else type(encoder).forward
    layer, attention = forward_of(model, "ASTLayer"), forward_of(model, "ASTAttention")
    head = "head" if ours else "classifier.dense"
    if ours and model.train_norm:
        fresh = (*under(model, f"{base}layernorm."), *fresh)
    return Anatomy(
        family="ast",
        dim=dim,
        blocks=tuple(
            separate_block(
                model,
                f"{base}layers.{i}",
                dim,
                attn="attention",
                out="o_proj",
                norm1="layernorm_before",
                norm2="layernorm_after",
            )
            for i in range(len(layers))
        ),
        embed=Point(f"{base}embeddings", dim),
        stem=sites(model, (f"{base}embeddings.patch_embeddings.projection",)),
        norm=Point(f"{base}layernorm", dim),
        tail=() if f"{base}layernorm.weight" in fresh else sites(model, (f"{base}layernorm",)),
        norms=norms(model),
        fresh=fresh,
        prefix_tokens=2,
        class_token=f"{base}embeddings.cls_token",
        grid=grid(encoder.config, projection),
        head=classifier(model, head) if f"{head}.weight" in fresh else None,
        patch_values=projection.weight[0].numel(),
        block_forwards={
            layer: _layer_forward,
            attention: _attention_forward,
            pool: pool_forward if ours else _encoder_forward,
        },
        places={layer: BLOCK_PLACES, attention: ("prefix",), pool: ("pool",)},
        reentrant=checkpoints_reentrantly(layers),
    )


def grid(config: Any, projection: Any) -> tuple[int, int]:
    """(frequency rows, time columns) of the patches: ``(size - patch) // stride + 1`` each."""
    sizes = (int(config.num_mel_bins), int(config.max_length))
    rows, columns = (
        (size - patch) // stride + 1
        for size, patch, stride in zip(sizes, projection.kernel_size, projection.stride, strict=True)
    )
    return rows, columns


@recomputing
def _layer_forward(block: Any, beside: Beside, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """The described forward of ASTLayer."""
    return pre_norm_block(block, beside, ("layernorm_before", "layernorm_after", "mlp"), x, attention_mask, kwargs)


def _attention_forward(
    attn: Any, beside: Beside, x: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The described forward of ASTAttention: at "prefix", keys and values."""
    return attend(attn, beside, "o_proj", x, attention_mask, attn.attention_dropout, **kwargs)


def _encoder_forward(encoder: Any, beside: Beside, *args: Any, **kwargs: Any) -> Any:
    """The described forward of ASTModel: at "pool", parts get and give the pooled feature and the tokens."""
    output = type(encoder).forward(encoder, *args, **kwargs)
    if not beside.has("pool"):
        return output
    if isinstance(output, tuple):
        return (output[0], beside.through("pool", output[1], output[0])[0], *output[2:])
    output["pooler_output"] = beside.through("pool", output.pooler_output, output.last_hidden_state)[0]
    return output


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random classifier of ours and a batch: mean over all tokens, linear head."""
    return AudioClassifier(tiny(), 5).eval(), spectrograms()


def example_huggingface() -> tuple[nn.Module, dict[str, Tensor]]:
    """transformers' classifier: mean of two tokens, LayerNorm and Linear."""
    ast = library()
    model = ast.ASTForAudioClassification(ast.ASTConfig(**SIZE, num_labels=5))
    return model.eval(), {"input_values": spectrograms()}


def example_encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    """The bare encoder."""
    return tiny(), {"input_values": spectrograms()}


def example_original() -> tuple[nn.Module, Tensor]:
    """A classifier of ours built as the original: mean of two tokens, norm before the head, final norm left frozen."""
    return AudioClassifier(tiny(), 5, "tokens", head="norm", train_norm=False).eval(), spectrograms()


SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_mel_bins": 32,
    "max_length": 46,
    "initializer_range": 0.2,  # with the usual 0.02 features of random inputs hardly differ from the biases
}


def tiny(**options: Any) -> nn.Module:
    """A random ASTModel of width 24 with two blocks: 2 x 4 patches of 16 x 16, strides of 10."""
    ast = library()
    model: nn.Module = ast.ASTModel(ast.ASTConfig(**{**SIZE, **options})).eval()
    return model


def spectrograms() -> Tensor:
    """Three random normalised spectrograms ``[3, 46, 32]``."""
    return torch.randn(3, 46, 32)
