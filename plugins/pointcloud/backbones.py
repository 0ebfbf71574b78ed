"""The point-cloud plugin's backbones: point transformers of the published sizes, to be filled from a checkpoint."""

from __future__ import annotations

import fnmatch
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_suite.errors import ConfigError, UnknownNameError, UnsupportedError
from peft_suite.train.contracts import BackboneInfo

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EMBEDDED", "PointBackbones", "Spec", "backbones", "part_backbones"]

_MODELS = "peft_suite.pointcloud.models"


@dataclass(frozen=True)
class Spec:
    """One name of the list.

    Attributes:
        target: ``"module:Class"`` of the model, or a function with its arguments.
        family: of its anatomy.
        summary: one line.
        parameters: with a head of 40 classes (50 parts).
        sizes: options that the name stands for; users may override them.
        points: of a cloud, what the weights were trained with.
        embedded: ``target`` also takes ``pretrained=True`` and brings its weights inside the package.
        normalize: how the weights expect their clouds.
        source: of another library, whose loader gets the weights: ``target`` takes ``pretrained`` too.
    """

    target: str
    family: str
    summary: str
    parameters: int
    sizes: Mapping[str, Any] = field(default_factory=dict)
    points: int = 1024
    embedded: bool = False
    normalize: str = "unit-sphere"
    source: str = ""


_PLAIN = f"{_MODELS}.transformer:PointTransformer"
_GPT = f"{_MODELS}.pointgpt:PointGPT"
_ANY = f"{_MODELS}.any2point"

CLASSIFIERS: Mapping[str, Spec] = {
    "point-bert": Spec(
        _PLAIN,
        "point-transformer",
        "Point-BERT: 12 blocks of 384, tokenizer of 256, head without batch norm",
        22_065_960,
        {"encoder_dim": 256, "head": "short", "fresh_tokens": False},
    ),
    "point-mae": Spec(_PLAIN, "point-transformer", "Point-MAE: 12 blocks of 384", 22_099_752),
    "act": Spec(
        _PLAIN, "point-transformer", "ACT: 12 blocks of 384, taught by a network of another modality", 22_099_752
    ),
    "recon": Spec(
        f"{_MODELS}.recon:ReCon", "recon", "ReCon: 12 blocks of 384 with three query tokens of their own", 43_577_640
    ),
    "recon-plain": Spec(
        _PLAIN,
        "point-transformer",
        "ReCon's weights in plain blocks, as the PEFT papers use them",
        22_099_752,
        {"fresh_tokens": False},
    ),
    "pointgpt-s": Spec(_GPT, "pointgpt", "PointGPT-S: 12 causal blocks of 384", 22_065_064),
    "pointgpt-b": Spec(
        _GPT,
        "pointgpt",
        "PointGPT-B: 12 causal blocks of 768, wider tokenizer",
        91_964_712,
        {"embed_dim": 768, "num_heads": 12, "large_encoder": True},
    ),
    "pointgpt-l": Spec(
        _GPT,
        "pointgpt",
        "PointGPT-L: 24 causal blocks of 1024, wider tokenizer",
        309_877_288,
        {"embed_dim": 1024, "depth": 24, "num_heads": 16, "large_encoder": True},
    ),
    "any2point-vision": Spec(
        f"{_ANY}:vision",
        "any2point",
        "Any2Point: a ViT reads clouds, DINOv2 ViT-B/14 (backbone.options.source)",
        85_823_208,
        source="timm",
    ),
    "any2point-language": Spec(
        f"{_ANY}:language",
        "any2point",
        "Any2Point: CLIP's text encoder reads clouds, that of ViT-L/14 (backbone.options.source)",
        85_804_776,
        source="transformers",
    ),
    "any2point-audio": Spec(
        f"{_ANY}:audio",
        "any2point",
        "Any2Point: an audio spectrogram transformer reads clouds (backbone.options.source)",
        85_804_776,
        source="transformers",
    ),
}
SEGMENTERS: Mapping[str, Spec] = {
    "point-mae": Spec(
        f"{_MODELS}.segmentation:PartSegmenter",
        "point-segmenter",
        "Point-MAE with the part-segmentation head of its paper",
        27_063_730,
        points=2048,
    ),
}
SEGMENTERS = {
    **SEGMENTERS,
    "point-bert": Spec(
        f"{_MODELS}.bert_parts:BertPartSegmenter",
        "point-segmenter",
        "Point-BERT with the part-segmentation head of its paper",
        27_085_874,
        points=2048,
    ),
    **{
        name: Spec(
            SEGMENTERS["point-mae"].target,
            "point-segmenter",
            f"{title} in plain blocks with Point-MAE's part-segmentation head",
            27_063_730,
            points=2048,
        )
        for name, title in (("act", "ACT"), ("recon-plain", "ReCon's weights"))
    },
}
EMBEDDED: Mapping[str, Spec] = {  # backbones whose weights are inside the package
    "micro-points": Spec(
        "peft_suite.pointcloud.micro:build",
        "point-transformer",
        "embedded: 5 blocks of 72 on 32 groups of 16 points, pre-trained on generated solids",
        358_888,
        points=512,
        embedded=True,
    ),
}


class PointBackbones:
    """See :class:`peft_suite.train.Backbones`."""

    def __init__(self, table: Callable[[], Mapping[str, Spec]]) -> None:
        self._table = table

    def list(self, pattern: str = "*") -> Sequence[BackboneInfo]:
        """Backbones by glob."""
        return [
            BackboneInfo(name, spec.family, self._summary(spec), spec.parameters)
            for name, spec in self._table().items()
            if fnmatch.fnmatchcase(name, pattern)
        ]

    @staticmethod
    def _summary(spec: Spec) -> str:
        here = "weights inside the package" if spec.embedded else "weights: checkpoint=PATH"
        return f"{spec.summary}; {f'weights: {spec.source} fetches them' if spec.source else here}"

    def build(
        self, name: str, num_outputs: int, *, pretrained: bool, checkpoint: str, options: Mapping[str, Any]
    ) -> nn.Module:
        """A backbone with a fresh head; see :meth:`peft_suite.train.Backbones.build`.

        Options are the model's: ``groups``, ``group_size``, ``depth``, ``embed_dim``, ``num_heads``, ``channels``,
        ``drop_path``, ``head``, ``fresh_tokens``, ``rule`` and what else its class knows.

        Raises:
            UnknownNameError: no backbone of that name.
            UnsupportedError: ``pretrained`` without a checkpoint, where the weights are not inside the package.
            FileFormatError: ``checkpoint`` is missing, truncated or no weights file.
            BackboneMismatchError: ``checkpoint`` belongs to another model; every key that differs is listed.
            ConfigError: the model does not know an option, or it has no such value.
        """
        spec = self._spec(name)
        own_loader = spec.embedded or bool(spec.source)
        if pretrained and not checkpoint and not own_loader:
            raise UnsupportedError(
                f"The weights of {name!r} are published by its authors, not in this package. Give checkpoint=PATH of "
                "their .pth file, or pretrained=False for random weights."
            )
        module, _, attribute = spec.target.partition(":")
        make: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        extra = {"pretrained": pretrained and not checkpoint} if own_loader else {}
        try:
            model: nn.Module = make(num_outputs, **{**spec.sizes, **options}, **extra)
        except TypeError as error:
            raise ConfigError(
                f"Backbone {name!r} cannot be built with the options {dict(options)}: {error}."
            ) from error
        if checkpoint:
            from peft_suite.pointcloud.checkpoints import load

            load(model, checkpoint)
        elif not pretrained and not spec.source:
            from peft_suite.pointcloud.models.transformer import start_from_scratch

            start_from_scratch(model)
        return model

    def preprocessing(self, name: str, model: nn.Module) -> dict[str, Any]:
        """Points per cloud, normalisation and up axis that the weights were trained with, and the size of a group."""
        spec, grouping = self._spec(name), getattr(model, "group_divider", None)
        return {
            "num_points": int(getattr(grouping, "points", 0))
            or max(spec.points, 16 * int(getattr(grouping, "groups", 1))),  # 64 of 1024, 128 of 2048, ...
            "normalize": spec.normalize,
            "up": "y",
            "channels": [],
            "group_size": int(getattr(grouping, "size", 1)),
            "groups": int(getattr(grouping, "groups", 1)),
        }

    def _spec(self, name: str) -> Spec:
        table = self._table()
        if name not in table:
            raise UnknownNameError("backbone", name, table, "List them with: peft-suite pointcloud backbones")
        return table[name]


backbones = PointBackbones(lambda: {**EMBEDDED, **CLASSIFIERS})
part_backbones = PointBackbones(lambda: SEGMENTERS)
