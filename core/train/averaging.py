"""Exponential moving average of what an adapter trains (Polyak and Juditsky, 1992), with diffusers' warm-up.

After step number n = 1, 2, ... the average a of a trained value p becomes ``a + (1 - d) (p - a)``. With s = n - 1:
d = 0 for s = 0, else ``min(decay, (1 + s) / (10 + s))``, so that the average forgets the start of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average", "decay_at"]


def decay_at(step: int, decay: float) -> float:
    """d after optimizer step ``step``, counted from 1."""
    s = step - 1
    return 0.0 if s <= 0 else min(decay, (1 + s) / (10 + s))


class Average:
    """The average of every trained parameter of the adapters ``names``; buffers are taken as they are.

    Parameters are looked up by name at every step: one that a method has built anew, with another number of values,
    starts its average again.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], decay: float) -> None:
        self.model, self.names, self.decay, self.steps = model, names, decay, 0
        self.values: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # values in training, while the average is in their place
        self._follow(0.0)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``("adapter/key", parameter)`` of all that trains."""
        adapters: Any = self.model.adapters
        for name in self.names:
            for key, parameter in adapters[name].named_parameters():
                if parameter.requires_grad:
                    yield f"{name}/{key}", parameter

    def update(self) -> None:
        """After an optimizer step."""
        self.steps += 1
        self._follow(decay_at(self.steps, self.decay))

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        before, self.values = self.values, {}
        for key, parameter in self.parameters():
            value = before.get(key)
            if value is None or value.shape != parameter.shape:
                value = parameter.detach().clone()
            else:
                value.lerp_(parameter, 1 - decay)
            self.values[key] = value

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the parameters have their averaged values."""
        if self._own:
            yield
            return
        self._own = {key: parameter.detach().clone() for key, parameter in self.parameters()}
        self._write(self.values)
        try:
            yield
        finally:
            self.put_back()

    def put_back(self) -> None:
        """End :meth:`in_place` before its time."""
        own, self._own = self._own, {}
        self._write(own)

    def adopt(self) -> None:
        """Make the averaged values the parameters' own."""
        self._write(self.values)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for key, parameter in self.parameters() if values else ():
            parameter.copy_(values[key])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "values": dict(self.values)}

    def load(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state` gave."""
        self.steps = state["steps"]
        self.values = {key: state["values"][key].to(p.device, copy=True) for key, p in self.parameters()}
