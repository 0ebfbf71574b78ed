"""Training: contracts that plugins fulfil, the run configuration, and the loop (imported on first use)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_suite.train.config import BackboneConfig, Recipe, RunConfig
from peft_suite.train.contracts import BackboneInfo, Backbones, DataConfig, DataSource, DataSplits

if TYPE_CHECKING:
    from peft_suite.train.evaluation import evaluate, outputs, predict
    from peft_suite.train.grid import bench
    from peft_suite.train.loop import fit
    from peft_suite.train.opening import Opened, open_adapter
    from peft_suite.train.record import RunResult
    from peft_suite.train.running import run
    from peft_suite.train.task import Classification, Task

__all__ = [
    "BackboneConfig",
    "BackboneInfo",
    "Backbones",
    "Classification",
    "DataConfig",
    "DataSource",
    "DataSplits",
    "Opened",
    "Recipe",
    "RunConfig",
    "RunResult",
    "Task",
    "bench",
    "evaluate",
    "fit",
    "open_adapter",
    "outputs",
    "predict",
    "run",
]

_LAZY = {
    "Classification": "task",
    "Opened": "opening",
    "RunResult": "record",
    "Task": "task",
    "bench": "grid",
    "evaluate": "evaluation",
    "fit": "loop",
    "open_adapter": "opening",
    "outputs": "evaluation",
    "predict": "evaluation",
    "run": "running",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
