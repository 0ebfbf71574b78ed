"""The embedded backbone: an audio spectrogram transformer of 0.59 M parameters for sounds of one second, with its
weights inside the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from peft_suite.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

    from peft_suite.audio.models.classifier import AudioClassifier

__all__ = ["ARCHITECTURE", "ASSET", "NAME", "STATISTICS", "build", "is_body", "load_weights", "read_metadata"]

NAME = "micro-ast"
ASSET = "micro_ast.safetensors"
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
        shipped = load_weights()
        own = {key: value for key, value in model.state_dict().items() if is_body(key)}
        wrong = sorted(
            k for k in {*shipped, *own} if k not in shipped or k not in own or shipped[k].shape != own[k].shape
        )
        if wrong:
            raise FileFormatError(
                f"The weights of {NAME} do not fit the options {options}: {', '.join(wrong[:6])}. "
                "Leave these options out, or build with pretrained=False."
            )
        model.load_state_dict(dict(shipped), strict=False)
    return model


def is_body(key: str) -> bool:
    """Whether a key of the state dict belongs to what was pre-trained."""
    return key.startswith("encoder.")


def load_weights() -> Mapping[str, Tensor]:
    """The shipped tensors, in float32."""
    from safetensors.torch import load

    return {key: value.float() for key, value in load(_asset().read_bytes()).items()}


def read_metadata() -> dict[str, str]:
    """How the shipped weights were made: data, seed, steps, probes, licence."""
    raw = _asset().read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return dict(header.get("__metadata__", {}))


def _asset() -> Any:
    return resources.files("peft_suite.audio").joinpath("assets", ASSET)
