"""What the loop needs before its first step: devices, and checks of the recipe against the data."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.utils.data import Dataset

from peft_suite.errors import ConfigError, DataError
from peft_suite.train.config import Recipe
from peft_suite.train.contracts import DataSplits
from peft_suite.train.evaluation import pick_device

__all__ = [
    "Restartable",
    "check_recipe",
    "make_accelerator",
    "restored_forward",
    "set_epoch",
    "train_split",
]


class Restartable:
    """An iterable that begins again with every loop over it."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def train_split(data: DataSplits) -> Dataset[Any]:
    if data.train is None or not len(data.train):  # type: ignore[arg-type]
        raise DataError(
            "There is no training data. Check data.root, or use `eval` for a data set without a train split."
        )
    return data.train


def check_recipe(recipe: Recipe, data: DataSplits) -> None:
    if recipe.select == "val" and data.val is None:
        why = str(data.info.get("no_validation", ""))
        advice = (
            "Take the last epoch: recipe.select=last."
            if why
            else "Set data.val_fraction=0.2, which holds out a share of every class that has two samples or more, or "
            "recipe.select=last."
        )
        raise ConfigError(f"Recipe.select = 'val', but there is no validation data. {why}{' ' * bool(why)}{advice}")
    if recipe.select == "test" and data.test is None:
        raise ConfigError("Recipe.select = 'test', but there is no test data. Use select='val' or select='last'.")
    if recipe.patience and recipe.select == "last":
        raise ConfigError("Recipe.patience needs a metric to watch. Use select='val', or patience=0.")
    if recipe.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "Recipe.tracker = 'tensorboard' needs tensorboard, which is not installed. Run: pip install tensorboard"
        )


def make_accelerator(recipe: Recipe, device: str, out: Path) -> Accelerator:
    """An Accelerator for this run; its process-wide state is renewed where an earlier run in this process differs."""
    chosen = pick_device(device)
    if recipe.precision == "fp16" and chosen.type == "cpu":
        raise ConfigError("Recipe.precision = 'fp16' needs a GPU. Use precision='bf16' or 'no' on the CPU.")
    state = AcceleratorState._shared_state
    if state and (state.get("_mixed_precision") != recipe.precision or state["device"].type != chosen.type):
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
    explicit = {"ACCELERATE_TORCH_DEVICE": str(chosen)} if chosen.index is not None else {}
    with _environment(explicit):
        return Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision=recipe.precision,
            log_with="tensorboard" if recipe.tracker == "tensorboard" else None,
            project_dir=out,
        )


def set_epoch(dataset: Any, epoch: int) -> None:
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


@contextlib.contextmanager
def restored_forward(model: nn.Module) -> Iterator[None]:
    """Accelerate replaces ``model.forward`` on the instance under mixed precision; put it back."""
    before: dict[str, Any] = {
        key: model.__dict__[key] for key in ("forward", "_original_forward") if key in model.__dict__
    }
    try:
        yield
    finally:
        for key in ("forward", "_original_forward"):
            model.__dict__.pop(key, None)
        model.__dict__.update(before)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before: dict[str, Any] = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
