"""Pictures that a task draws of a model while it trains, for the report."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_suite.errors import PeftSuiteError
from peft_suite.train.state import rng_state, set_rng_state
from peft_suite.train.task import Task

__all__ = ["draw"]

FOLDER = "pictures"


def draw(task: Task, model: nn.Module, out: Path, moment: str) -> list[dict[str, str]]:
    """``task.illustrate`` into ``out/pictures/MOMENT``; nothing for tasks without it. Training's randomness stays.

    A run is never lost because a picture could not be drawn: that is a warning.

    Returns:
        One ``{"moment", "title", "file"}`` per picture, the file relative to ``out``.
    """
    illustrate: Any = getattr(task, "illustrate", None)
    if illustrate is None:
        return []
    folder = out / FOLDER / moment.replace(" ", "-")
    state, training = rng_state(), model.training
    model.eval()
    try:
        with torch.no_grad():
            found = illustrate(model, folder)
    except (PeftSuiteError, RuntimeError, ValueError, TypeError, OSError) as error:
        warnings.warn(f"Pictures ({moment}) could not be drawn: {error}", stacklevel=2)
        found = []
    finally:
        model.train(training)
        set_rng_state(state)
    return [
        {"moment": moment, "title": str(p["title"]), "file": Path(p["file"]).relative_to(out).as_posix()} for p in found
    ]
