"""The run configuration: the same names in Python, in YAML and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_suite.config import Config

__all__ = ["BackboneConfig", "Recipe", "RunConfig"]


@dataclass(frozen=True)
class BackboneConfig(Config):
    """Which pre-trained model: a name of ``peft-suite PLUGIN backbones``, its weights and extra model arguments."""

    name: str = ""
    pretrained: bool = True
    checkpoint: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe(Config):
    """How to train. Defaults suit small adapters on little data.

    Attributes:
        optimizer: "adamw", "adam", "sgd", or "module:Class" of a torch optimizer.
        lr: peak learning rate (per step, not scaled by the batch).
        weight_decay: applied to matrices only unless ``decay`` says otherwise.
        decay: "matrices" decays parameters with two or more dimensions except prompts, "all" all, "none" none.
        schedule: "cosine" (to ``min_lr``), "linear" or "constant", after ``warmup_epochs`` of linear warm-up.
        batch_size: global samples per optimizer step, over all processes and accumulation steps.
        accumulate: micro-batches per optimizer step.
        clip_norm: gradient norm limit; 0 switches it off.
        precision: "no", "bf16" or "fp16" autocast.
        class_weights: "none" or "balanced" (inverse frequency, mean 1).
        mixup, cutmix: alphas through timm; 0 switches off.
        select: "val" keeps the best validation epoch, "last" the last, "test" the best test epoch (recorded as such;
            only for reproducing papers that did so).
        patience: stop after this many epochs without a better selection metric; 0 switches off.
        checkpoint_every: epochs between resumable checkpoints; 0 keeps only the one at the end or at an interruption.
        max_steps: optimizer steps of the whole run, in as many epochs as that takes; 0 lets ``epochs`` decide.
        ema: decay of an exponential moving average of the trained values, which is then what is evaluated and saved;
            0 switches it off. See :mod:`peft_suite.train.averaging`.
        sample_every: epochs between pictures, where the task can draw some; 0 draws them before and after training.
    """

    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    decay: Literal["matrices", "all", "none"] = "matrices"
    momentum: float = 0.9
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = 2.0
    min_lr: float = 0.0
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    precision: Literal["no", "bf16", "fp16"] = "no"
    select: Literal["val", "last", "test"] = "val"
    patience: int = 0
    eval_every: int = 1
    checkpoint_every: int = 1
    calibration_batches: int = 16
    max_steps: int = 0
    ema: float = 0.0
    sample_every: int = 0
    tracker: Literal["none", "tensorboard"] = "none"

    def validate(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "eval_every"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("lr", "weight_decay", "min_lr", "warmup_epochs", "clip_norm", "mixup", "cutmix", "patience"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("max_steps", "sample_every"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        self.require("ema", 0 <= self.ema < 1, "must be at least 0 and below 1")
        self.require("label_smoothing", 0 <= self.label_smoothing < 1, "must be at least 0 and below 1")
        self.require("batch_size", self.batch_size % self.accumulate == 0, "must be a multiple of accumulate")


@dataclass(frozen=True)
class RunConfig(Config):
    """One training run, complete enough to repeat it.

    ``method`` is a mapping ``{"name": ..., field: value}``, a shorthand string such as ``"vpt(num_tokens=50)"``;
    ``data`` is a mapping of the plugin's own data configuration. ``task`` is one of the plugin's further tasks, ""
    its usual one.

    With ``resample`` each seed draws its own validation split and few-shot sample (``data.split_seed`` follows
    ``seed``); without it all seeds see the same samples.
    """

    plugin: str
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] | str = "linear"
    recipe: Recipe = field(default_factory=Recipe)
    task: str = ""
    seed: int = 0
    seeds: int = 1
    resample: bool = False
    out: str = "runs/latest"
    device: str = "auto"

    @property
    def spec(self) -> str | dict[str, Any]:
        """``method`` as ``adapt`` and ``plan`` take it."""
        return self.method if isinstance(self.method, str) else dict(self.method)
