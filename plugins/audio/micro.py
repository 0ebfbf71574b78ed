"""The embedded backbone: an audio spectrogram transformer of 0.59 M parameters for sounds of one second, with its
weights inside the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_suite.weights import Shipped

if TYPE_CHECKING:
    from peft_suite.audio.models.classifier import AudioClassifier

__all__ = ["ARCHITECTURE", "ASSET", "NAME", "STATISTICS", "build", "is_body", "load_weights", "read_metadata"]

NAME = "micro-ast"
ASSET = "micro_ast.safetensors"
SHIPPED = Shipped("peft_suite.audio", ASSET, NAME)
load_weights, read_metadata = SHIPPED.tensors, SHIPPED.metadata
STATISTICS = (-8.2, 5.4)  # mean and standard deviation of the log-mel values of the source sounds
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "num_mel_bins": 64,
    "max_length": 96,  # frames: 0.975 s
    "frequency_stride": 16,
    "time_stride": 16,  # 4 x 6 patches of 16 x 16
}
_CLASSIFIER = ("pool", "head", "train_norm")


def build(num_outputs: int = 10, *, pretrained: bool = True, **options: Any) -> AudioClassifier:
    """Five blocks of width 96 on 24 patches: ``[B, 96, 64] -> [B, num_outputs]``.

    Args:
        num_outputs: width of the head, which is fresh.
        pretrained: load the shipped weights.
        options: other fields of ASTConfig, and ``pool``, ``head`` and ``train_norm`` of :class:`AudioClassifier`.

    Raises:
        FileFormatError: the shipped weights do not fit, for example because an option changed the shapes.
    """
    from transformers import ASTConfig, ASTModel

    from peft_suite.audio.models.classifier import AudioClassifier

    ours = {key: options.pop(key) for key in _CLASSIFIER if key in options}
    model = AudioClassifier(ASTModel(ASTConfig(**{**ARCHITECTURE, **options})), num_outputs, **ours)
    if pretrained:
        SHIPPED.fill(model, options, is_body)
    return model


def is_body(key: str) -> bool:
    """Whether a key of the state dict belongs to what was pre-trained."""
    return key.startswith("encoder.")
