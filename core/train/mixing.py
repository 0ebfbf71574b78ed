"""Mixup and cutmix: samples of a batch are blended, and their targets with them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.errors import ConfigError
from peft_suite.train.config import Recipe
from peft_suite.train.task import Classification, Task

__all__ = ["Mixing", "make_mixing"]


class Mixing:
    """``inputs, targets = mixing(inputs, targets)`` within a micro-batch, by timm; targets come back soft."""

    def __init__(self, mixup: Any, smoothing: float, classes: int, multi_label: bool) -> None:
        self.mixup, self.smoothing, self.classes, self.multi_label = mixup, smoothing, classes, multi_label

    def __call__(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Of an odd number of samples the last stays as it is."""
        if not isinstance(inputs, Tensor):
            raise ConfigError("Recipe.mixup and Recipe.cutmix need inputs that are one tensor per sample.")
        even = len(inputs) // 2 * 2
        mixed, soft = self.mixup(inputs[:even].clone(), targets[:even])
        if even == len(inputs):
            return mixed, soft
        if self.multi_label:
            rest = targets[even:].float() * (1 - self.smoothing) + 0.5 * self.smoothing
        else:
            hot = nn.functional.one_hot(targets[even:], self.classes).float()
            rest = hot * (1 - self.smoothing) + self.smoothing / self.classes
        return torch.cat([mixed, inputs[even:]]), torch.cat([soft, rest])


def make_mixing(recipe: Recipe, task: Task, multi_label: bool) -> Mixing | None:
    """What the recipe asks for, or None.

    Raises:
        ConfigError: the task has no class labels to mix, or timm is not installed.
    """
    if not recipe.mixup and not recipe.cutmix:
        return None
    if not isinstance(task, Classification):
        raise ConfigError("Recipe.mixup and Recipe.cutmix mix class labels; set both to 0 for this task.")
    try:
        mixup: Any = importlib.import_module("timm.data").Mixup
    except ImportError as error:
        raise ConfigError(
            "Recipe.mixup and Recipe.cutmix use timm, which is not installed. Run: pip install 'peft-suite[vision]', "
            "or set both to 0."
        ) from error
    mixed = mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
        num_classes=len(task.classes),
        **({"multi_label": True} if multi_label else {}),
    )
    return Mixing(mixed, recipe.label_smoothing, len(task.classes), multi_label)
