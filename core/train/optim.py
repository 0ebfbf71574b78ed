"""Optimizer groups from ``requires_grad``, and the learning-rate schedule."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peft_suite.errors import ConfigError, TrainingError, closest
from peft_suite.train.config import Recipe

__all__ = ["build_optimizer", "describe_groups", "lr_at", "parameter_groups", "set_lr"]


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Two groups, decayed and not, of the parameters that require a gradient, in ``named_parameters`` order.

    With ``decay="matrices"`` a parameter is decayed when it has two or more dimensions and its adapter does not list
    it in ``no_decay()`` (prompts, scales).
    """
    spared = set()
    adapters: Any = getattr(model, "adapters", {})
    for name, adapter in adapters.items():
        spared |= {f"adapters.{name}.{key}" for key in adapter.no_decay()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and name not in spared
            decay = recipe.decay == "all" or (recipe.decay == "matrices" and matrix)
            (decayed if decay else plain).append(parameter)
    if not decayed and not plain:
        raise TrainingError(
            "The model has no trainable parameter. Add an adapter with ps.adapt(model, method), or open one with "
            "ps.trainable(model, name)."
        )
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over :func:`parameter_groups`: adamw, adam, sgd or ``"module:Class"``."""
    groups = parameter_groups(model, recipe)
    name = recipe.optimizer.lower()
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    if name == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    module, colon, attribute = recipe.optimizer.partition(":")
    if not colon:
        raise ConfigError(
            f"Recipe.optimizer = {recipe.optimizer!r} is unknown. {closest(name, ['adamw', 'adam', 'sgd'])} "
            'For any other torch optimizer write "module:Class", for example "torch.optim:NAdam".'
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        advice = f" Install it (pip install {error.name}), or take adamw, adam or sgd." if absent else ""
        raise ConfigError(f"Recipe.optimizer = {recipe.optimizer!r} cannot be imported: {error}.{advice}") from error
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ConfigError(f"Recipe.optimizer = {recipe.optimizer!r} is no torch.optim.Optimizer.")
    try:
        return cls(groups, lr=recipe.lr)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Recipe.optimizer = {recipe.optimizer!r} refused the parameters: {error}") from error


def describe_groups(optimizer: Optimizer) -> str:
    """``"adamw: 12 tensors (3,072 values) with decay 0.0001, 20 tensors (1,200 values) without"``."""
    parts = []
    for group in optimizer.param_groups:
        values = sum(p.numel() for p in group["params"])
        decay = f"with decay {group['weight_decay']:g}" if group["weight_decay"] else "without decay"
        parts.append(f"{len(group['params'])} tensors ({values:,} values) {decay}")
    return f"{type(optimizer).__name__}: {', '.join(parts)}"


def lr_at(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0).

    With T = max_steps or epochs * steps_per_epoch, W = min(round(warmup_epochs * steps_per_epoch), T),
    p = (step - W) / (T - W):

        step < W:   lr * (step + 1) / W
        cosine:     min_lr + (lr - min_lr) * (1 + cos(pi * p)) / 2
        linear:     min_lr + (lr - min_lr) * (1 - p)
        constant:   lr
    """
    total = recipe.max_steps or recipe.epochs * steps_per_epoch
    warm = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    if recipe.schedule == "constant":
        return recipe.lr
    p = (step - warm) / max(total - warm, 1)
    share = (1 + math.cos(math.pi * p)) / 2 if recipe.schedule == "cosine" else 1 - p
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
