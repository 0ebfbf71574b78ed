"""Any2Point: the blocks of a transformer of another modality, reading clouds through a tokenizer that always trains.

Tokenizer, class token, final norm and head are fresh, so nothing of them counts as frozen stem or tail.
"""

from __future__ import annotations

from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.pointcloud.anatomies.common import (
    FORWARDS,
    FUNCTIONALS,
    PLACES,
    classifier,
    norms,
    pre_norm_block,
    under,
)
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.models.any2point import Any2Point, audio, language, vision
from peft_suite.pointcloud.models.any2point_blocks import SourceBlock, source_block_forward
from peft_suite.pointcloud.models.any2point_positions import Projection, projection_forward
from peft_suite.pointcloud.models.any2point_tokenizer import Pyramid, pyramid_forward


def describe(model: Any2Point) -> Anatomy:
    """The anatomy of one model."""
    dim = model.embed_dim
    return Anatomy(
        family="any2point",
        dim=dim,
        blocks=tuple(pre_norm_block(model, f"blocks.blocks.{i}", dim) for i in range(len(model.source_blocks))),
        embed=Point("embed", dim),
        norm=Point("norm", dim),
        norms=norms(model),
        fresh=under(model, ("encoder.", "cls_token", "cls_pos", "norm.", "cls_head_finetune.")),
        prefix_tokens=1,
        class_token="cls_token",
        patch_values=3 * model.group_divider.size,
        functionals=FUNCTIONALS,
        block_forwards={
            **FORWARDS,
            SourceBlock.forward: source_block_forward,
            Pyramid.forward: pyramid_forward,
            Projection.forward: projection_forward,
        },
        places={
            **PLACES,
            SourceBlock.forward: ("tokens", "attn_out", "mlp_out", "end"),
            Pyramid.forward: ("geometry",),
            Projection.forward: ("projected",),
        },
        head=classifier(model, "cls_head_finetune"),
    )


def example() -> tuple[nn.Module, Tensor]:
    """A tiny random member of the family, on a ViT with layer scale, and a batch."""
    return tiny_vision(), clouds()


def example_language() -> tuple[nn.Module, Tensor]:
    """The same on a text encoder."""
    return tiny_language(), clouds()


def example_audio() -> tuple[nn.Module, Tensor]:
    """The same on a spectrogram transformer."""
    return tiny_audio(), clouds()


_SIZES: dict[str, object] = {"groups": 8, "group_size": 6, "last_width": 4}


def tiny_vision(classes: int = 5, **options: object) -> Any2Point:
    """Two blocks of width 24 on eight tokens, a table of 4 x 4 positions."""
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.5}
    sizes = {"source": "vit_tiny_patch16_224", "source_options": vit, **_SIZES, **options}
    return vision(classes, **sizes).eval()  # type: ignore[arg-type]


def tiny_language(classes: int = 5, **options: object) -> Any2Point:
    """Two blocks of width 24 on eight tokens, nine positions."""
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 7, "max_position_embeddings": 9}
    return language(classes, **{"source_options": text, **_SIZES, **options}).eval()  # type: ignore[arg-type]


def tiny_audio(classes: int = 5, **options: object) -> Any2Point:
    """Two blocks of width 24 on eight tokens, a table of 3 x 5 positions."""
    sound = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sound |= {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "frequency_stride": 4, "time_stride": 4}
    return audio(classes, **{"source_options": sound, **_SIZES, **options}).eval()  # type: ignore[arg-type]
