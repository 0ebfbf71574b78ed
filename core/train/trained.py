"""The adapters of a model that a run trains: their values, their files, and what calibration has decided."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import peft_suite as ps
from peft_suite.config import MethodConfig
from peft_suite.lifecycle import rebuild

__all__ = ["TrainedAdapters"]


class TrainedAdapters:
    """Adapters with an open parameter.

    Attributes:
        names: theirs.
        started_as: configuration of every adapter of the model before calibration.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        adapters: Any = model.adapters
        self.started_as: dict[str, MethodConfig] = {name: a.method.config for name, a in adapters.items()}
        self.names = [name for name, a in adapters.items() if any(p.requires_grad for p in a.parameters())]

    def methods(self) -> list[Any]:
        """Their methods, in the order of the names."""
        adapters: Any = self.model.adapters
        return [adapters[name].method for name in self.names]

    def state(self) -> dict[str, Tensor]:
        """All tensors, ``"name/key"``."""
        adapters: Any = self.model.adapters
        return {f"{name}/{key}": v for name in self.names for key, v in adapters[name].state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What :meth:`state` gave."""
        adapters: Any = self.model.adapters
        for name in {key.split("/", 1)[0] for key in state}:
            adapters[name].load_state_dict(_of(state, name))

    def plans(self) -> dict[str, dict[str, Any]]:
        """Configurations that calibration has filled in, by adapter."""
        configs = {n: method.config for n, method in zip(self.names, self.methods(), strict=True)}
        return {name: c.to_dict() for name, c in configs.items() if c != self.started_as[name]}

    def take_plans(self, checkpoint: Mapping[str, Any]) -> None:
        """Build adapters as calibration had built them before the interruption."""
        adapters: Any = self.model.adapters
        for name, config in checkpoint.get("plans", {}).items():
            method = adapters[name].method
            own = _of(checkpoint["adapters"], name)
            rebuild(self.model, name, type(method)(type(method.config).from_dict(config)), own)

    def save(self, folder: Path, metadata: dict[str, Any] | None) -> None:
        """Into ``folder``, or one folder below it each where there are several."""
        for name in self.names:
            path = folder if len(self.names) == 1 else folder / name
            ps.save(self.model, path, name=name, metadata=metadata)


def _of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.split("/", 1)[1]: value for key, value in state.items() if key.split("/", 1)[0] == name}
