"""How strongly an adapter acts: ``W + strength * dW`` for what changes weights linearly."""

from __future__ import annotations

import math

from torch import nn

from peft_suite.adapter import _forget_compiled, adapters_of, pick
from peft_suite.edits import BatchStatistics, Trained
from peft_suite.errors import ConfigError, UnsupportedError

__all__ = ["scale"]


def scale(model: nn.Module, name: str, value: float) -> nn.Module:
    """Let the adapter ``name`` act with a strength: 1 as trained, 0 not at all (bit for bit), up to 2 and beyond more.

    For sparse changes and LoRA, whose change of a weight is multiplied. Every adapter has a strength of its own;
    ``merge`` folds what acts, files hold what was trained and not the strength. A trained head stays as it is.

    Returns:
        The same model.

    Raises:
        AdapterNameError: no such adapter.
        ConfigError: not a finite number.
        UnsupportedError: a part of the adapter is no multiple of anything; nothing is changed.
    """
    adapters = adapters_of(model)
    pick(adapters, (name,))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"scale(model, {name!r}, {value!r}): the strength is a finite number, 1 for as trained.")
    fresh = set(adapters.anatomy.fresh)
    linear, other = [], []
    for edit in adapters[name].edits:
        part = edit.part
        trained = isinstance(part, Trained) and {f"{edit.path}.{n}".lstrip(".") for n in part._parameters} <= fresh
        if part.scalable:
            linear.append(part)
        elif not (trained or part.neutral or (isinstance(part, BatchStatistics) and part.fresh)):
            other.append(edit.key)
    if other or not linear:
        shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        raise UnsupportedError(
            f"{adapters[name].method.name} cannot be scaled: {shown or 'it has no such part'}. A strength needs parts "
            "that add a change to a weight, as sara and lora have; activate and disabled switch any adapter."
        )
    for part in linear:
        part.strength = float(value)
    _forget_compiled()
    return model
