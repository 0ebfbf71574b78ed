"""The audio plugin's backbones: AST, SSAST and wav2vec 2.0 of the published sizes, from files, folders or the hub."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.audio import micro
from peft_suite.errors import ConfigError, FileFormatError, PeftSuiteError, UnknownNameError, UnsupportedError
from peft_suite.train.contracts import BackboneInfo

if TYPE_CHECKING:
    from peft_suite.audio.models.classifier import AudioClassifier

__all__ = ["EMBEDDED", "AudioBackbones", "Spec", "backbones"]

SAMPLE_RATE = 16_000
_AUDIOSET = (-4.2677393, 4.5689974)  # mean and std of its log-mel values; Gong et al., Interspeech 2021
_SPEECH_COMMANDS = (-6.845978, 5.5654526)
_CLASSIFIER = ("pool", "head", "train_norm")  # options of AudioClassifier


@dataclass(frozen=True)
class Spec:
    """One name of the list.

    Attributes:
        family: of its anatomy, and what is built: "ast" or "wav2vec2".
        summary: one line.
        parameters: of the encoder at ``sizes``.
        sizes: fields of the encoder's configuration that the name stands for; users may override them.
        patch: rows and columns of a patch that is no square.
        hub: where the weights are published; empty where the authors give a file.
        statistics: mean and std of the log-mel values that the weights were trained with.
        target: of embedded backbones, ``"module:function"`` that also takes ``pretrained`` and brings its weights.
    """

    family: str
    summary: str
    parameters: int
    sizes: Mapping[str, Any] = field(default_factory=dict)
    patch: tuple[int, int] | None = None
    hub: str = ""
    statistics: tuple[float, float] = _AUDIOSET
    target: str = ""


def _ast(stride: int, parameters: int, hub: str) -> Spec:
    summary = f"AST, AudioSet, 12 blocks of 768, patches of 16 every {stride}"
    return Spec("ast", summary, parameters, {"frequency_stride": stride, "time_stride": stride}, hub=hub)


def _ssast(size: str, dim: int, heads: int, parameters: int, frames: bool = False) -> Spec:
    """Pre-trained without overlap: strides are the patch's sides."""
    patch = (128, 2) if frames else (16, 16)
    sizes = {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "intermediate_size": 4 * dim,
        "frequency_stride": patch[0],
        "time_stride": patch[1],
    }
    kind = "whole frames, 2 at a time" if frames else "patches of 16 without overlap"
    summary = f"SSAST-{size}, self-supervised on AudioSet and LibriSpeech, 12 blocks of {dim}, {kind}"
    return Spec("ast", summary, parameters, sizes, patch if frames else None)


PUBLISHED: Mapping[str, Spec] = {
    "ast-base": _ast(10, 86_187_264, "MIT/ast-finetuned-audioset-10-10-0.4593"),
    "ast-base-12": _ast(12, 85_909_248, "MIT/ast-finetuned-audioset-12-12-0.447"),
    "ast-base-14": _ast(14, 85_761_024, "MIT/ast-finetuned-audioset-14-14-0.443"),
    "ast-base-16": _ast(16, 85_649_664, "MIT/ast-finetuned-audioset-16-16-0.442"),
    "ast-base-speech-commands": Spec(
        "ast",
        "AST, Speech Commands v2, 12 blocks of 768, patches of 16 every 10, clips of 1 s",
        85_367_040,
        {"max_length": 128},
        hub="MIT/ast-finetuned-speech-commands-v2",
        statistics=_SPEECH_COMMANDS,
    ),
    "ssast-base": _ssast("base", 768, 12, 85_649_664),
    "ssast-small": _ssast("small", 384, 6, 21_591_168),
    "ssast-tiny": _ssast("tiny", 192, 3, 5_487_168),
    "ssast-base-frame": _ssast("base", 768, 12, 85_649_664, frames=True),
    "wav2vec2-base": Spec(
        "wav2vec2",
        "wav2vec 2.0 base, LibriSpeech 960 h, 12 blocks of 768 on raw waveforms",
        94_371_712,
        hub="facebook/wav2vec2-base-960h",
    ),
}
EMBEDDED: Mapping[str, Spec] = {  # backbones whose weights are inside the package
    micro.NAME: Spec(
        "ast",
        "embedded: 5 blocks of 96 on 24 patches of 16 x 16, sounds of 1 s, trained on generated ones",
        586_752,
        micro.ARCHITECTURE,
        statistics=micro.STATISTICS,
        target="peft_suite.audio.micro:build",
    ),
}


class AudioBackbones:
    """See :class:`peft_suite.train.Backbones`."""

    def list(self, pattern: str = "*") -> Sequence[BackboneInfo]:
        """Backbones by glob."""
        return [
            BackboneInfo(name, spec.family, f"{spec.summary}; {_origin(spec)}", spec.parameters)
            for name, spec in _table().items()
            if fnmatch.fnmatchcase(name, pattern)
        ]

    def build(
        self, name: str, num_outputs: int, *, pretrained: bool, checkpoint: str, options: Mapping[str, Any]
    ) -> AudioClassifier:
        """An AudioClassifier with a fresh head; see :meth:`peft_suite.train.Backbones.build`.

        ``checkpoint`` is a file of AST or SSAST, a file or folder of transformers, or a name on the hub. Options are
        the fields of ASTConfig or Wav2Vec2Config (``max_length``: frames of a clip, to which the positions are fitted;
        ``num_mel_bins``, ``frequency_stride``, ``time_stride``, ...), ``pool``, ``head`` and ``train_norm`` of
        :class:`AudioClassifier`, and ``pos_embed`` ("interpolate" or "zeros") with ``position_grid``, see
        :func:`peft_suite.audio.checkpoints.load`.

        Raises:
            UnknownNameError: no backbone of that name.
            UnsupportedError: ``pretrained`` without a checkpoint, where the weights are a file of the authors.
            PeftSuiteError: the published weights cannot be fetched.
            FileFormatError: ``checkpoint`` is missing, truncated or no weights file.
            BackboneMismatchError: ``checkpoint`` belongs to another model; every key that differs is listed.
            ConfigError: the model does not know an option, or it has no such value.
        """
        spec = _spec(name)
        if spec.target:
            from peft_suite.audio.anatomies.common import library

            sizes = {**spec.sizes, **{k: v for k, v in options.items() if k not in _CLASSIFIER}}
            _check_ast(name, _config(name, library().ASTConfig, sizes))
            module, _, attribute = spec.target.partition(":")
            make: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
            model: AudioClassifier = make(num_outputs, pretrained=pretrained and not checkpoint, **options)
            if checkpoint:
                _load(model, checkpoint)
            return model
        if pretrained and not checkpoint and not spec.hub:
            raise UnsupportedError(
                f"The weights of {name!r} are published by its authors as a file, not on the hub. Give checkpoint=PATH "
                "of their .pth file, or pretrained=False for random weights."
            )
        source = checkpoint or (spec.hub if pretrained else "")
        if source and (_on_hub(source) or source == spec.hub):
            source = _fetch(name, source)
        build = _build_ast if spec.family == "ast" else _build_wav2vec2
        return build(name, spec, num_outputs, source, dict(options))

    def preprocessing(self, name: str, model: Any) -> dict[str, Any]:
        """What the network reads.

        ``input`` is "fbank", log-mel ``[frames, mel_bins]`` normalised as ``(x - mean) / (2 std)``, or "waveform",
        which ``normalize`` brings to mean 0 and variance 1.
        """
        spec = _spec(name)
        config: Any = model.encoder.config
        mean, std = getattr(model, "statistics", None) or spec.statistics
        if config.model_type == "wav2vec2":
            normalize = bool(getattr(model, "normalize_waveform", True))
            return {"input": "waveform", "sample_rate": SAMPLE_RATE, "normalize": normalize}
        return {
            "input": "fbank",
            "sample_rate": SAMPLE_RATE,
            "frames": int(config.max_length),
            "mel_bins": int(config.num_mel_bins),
            "mean": float(mean),
            "std": float(std),
        }


backbones = AudioBackbones()


def _table() -> Mapping[str, Spec]:
    return {**EMBEDDED, **PUBLISHED}


def _spec(name: str) -> Spec:
    table = _table()
    if name not in table:
        raise UnknownNameError("backbone", name, table, "List them with: peft-suite audio backbones")
    return table[name]


def _origin(spec: Spec) -> str:
    if spec.target:
        return "weights inside the package"
    return f"weights: {spec.hub}, or checkpoint=PATH" if spec.hub else "weights: checkpoint=PATH"


def _build_ast(name: str, spec: Spec, num_outputs: int, source: str, options: dict[str, Any]) -> AudioClassifier:
    from peft_suite.audio.anatomies.common import library
    from peft_suite.audio.checkpoints import settings
    from peft_suite.audio.models.classifier import AudioClassifier
    from peft_suite.audio.models.patches import reshape_patches

    loading = {k: options.pop(k) for k in ("pos_embed", "position_grid") if k in options}
    ours = {k: options.pop(k) for k in _CLASSIFIER if k in options}
    told = settings(source).get("sizes", {}) if source else {}
    values = {**spec.sizes, **told, **options}
    config = _config(name, library().ASTConfig, values)
    _check_ast(name, config)
    encoder = library().ASTModel(config)
    if spec.patch:
        reshape_patches(encoder, spec.patch)
    model = AudioClassifier(encoder, num_outputs, **ours)
    if source:
        _load(model, source, **loading)
        _take_statistics(model, source)
    return model


def _load(
    model: AudioClassifier, path: str, pos_embed: Any = "interpolate", position_grid: Sequence[int] | None = None
) -> None:
    from peft_suite.audio.checkpoints import load

    if position_grid is not None and len(position_grid) != 2:
        raise ConfigError(f"position_grid = {position_grid!r}: give two numbers, [rows, columns].")
    grid = None if position_grid is None else (int(position_grid[0]), int(position_grid[1]))
    load(model, path, pos_embed=pos_embed, grid=grid)


def _build_wav2vec2(name: str, spec: Spec, num_outputs: int, source: str, options: dict[str, Any]) -> AudioClassifier:
    """Masking and layer drop stay off: they belong to pre-training, and a skipped block leaves its adapter idle."""
    from peft_suite.audio.anatomies.common import library
    from peft_suite.audio.models.classifier import AudioClassifier

    ours = {k: options.pop(k) for k in _CLASSIFIER if k in options}
    values = {"layerdrop": 0.0, "apply_spec_augment": False, **spec.sizes, **options}
    if source:
        if not Path(source).is_dir():
            raise FileFormatError(
                f"checkpoint = {source!r} is not a folder. wav2vec 2.0 is read from folders that transformers wrote "
                "(config.json with the weights), or from the hub."
            )
        stored = library().Wav2Vec2Config.from_pretrained(source).to_dict()
        config = _config(name, library().Wav2Vec2Config, {**stored, **values})
        try:
            encoder = library().Wav2Vec2Model.from_pretrained(source, config=config)
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FileFormatError(f"checkpoint = {source!r} cannot be read: {reason}") from error
    else:
        encoder = library().Wav2Vec2Model(_config(name, library().Wav2Vec2Config, values))
    encoder.freeze_feature_encoder()
    model = AudioClassifier(encoder, num_outputs, **ours)
    if source:
        _take_statistics(model, source)
    return model


def _config(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """A configuration of transformers, which itself would take any name for a field."""
    known = set(kind().to_dict()) | {"num_attention_heads", "attn_implementation"}
    if unknown := sorted(set(values) - known):
        choices = ", ".join(sorted([*_CLASSIFIER, "pos_embed", *(k for k in known if not k.startswith("_"))]))
        raise ConfigError(f"Backbone {name!r} does not know the options {', '.join(unknown)}. It knows: {choices}.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Backbone {name!r} cannot be built with the options {dict(values)}: {error}.") from error


def _check_ast(name: str, config: Any) -> None:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in (*sizes, "frequency_stride", "time_stride", "patch_size"):
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"Backbone {name!r}: {key} = {value!r} must be a whole number of at least 1.")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"Backbone {name!r}: hidden_size = {config.hidden_size} is no multiple of num_attention_heads = "
            f"{config.num_attention_heads}."
        )
    for key in ("max_length", "num_mel_bins"):
        if getattr(config, key) < config.patch_size:
            raise ConfigError(
                f"Backbone {name!r}: {key} = {getattr(config, key)} is less than one patch of {config.patch_size}."
            )


def _take_statistics(model: Any, source: str) -> None:
    """Mean and std that a folder of transformers names for its feature extractor."""
    file = (Path(source) if Path(source).is_dir() else Path(source).parent) / "preprocessor_config.json"
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model.normalize_waveform = bool(found.get("do_normalize", True))
        if "mean" in found and "std" in found:
            model.statistics = (float(found["mean"]), float(found["std"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{str(file)!r} is no description of a feature extractor: {error}.") from error


def _on_hub(source: str) -> bool:
    """Whether it is a name ``owner/model`` rather than a path."""
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return plain and not Path(source).exists() and not source.endswith((".pth", ".pt", ".bin", ".safetensors"))


def _fetch(name: str, repository: str) -> str:
    """The folder of a model on the hub, out of its cache or over the network."""
    from huggingface_hub import snapshot_download

    from peft_suite.weights import no_waiting_for_the_hub

    try:
        with no_waiting_for_the_hub():
            return str(
                snapshot_download(repository, allow_patterns=["*.json", "model.safetensors", "pytorch_model.bin"])
            )
    except (OSError, ValueError) as error:  # every error of the hub derives from one of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeftSuiteError(
            f"The weights {repository!r} for {name!r} are not in the local cache and cannot be fetched: {reason} "
            "Give checkpoint=PATH of a downloaded file or folder, or pretrained=False for random weights."
        ) from error
