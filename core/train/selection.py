"""Which epoch's state a run keeps, and when it has stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peft_suite.tables import lower_is_better
from peft_suite.train.config import Recipe

__all__ = ["Selection"]


class Selection:
    """The best evaluated epoch by ``recipe.select``; of equals the one with the lower loss.

    Attributes:
        best: ``{"epoch", "metrics", "selected_by"}`` of it, or None.
        state: the tensors of it, for the caller to fill in; empty where the last epoch is taken.
    """

    def __init__(self, recipe: Recipe, primary: str) -> None:
        self.recipe, self.primary = recipe, primary
        self.best: dict[str, Any] | None = None
        self.state: dict[str, Tensor] = {}

    def better(self, entry: Mapping[str, Any]) -> bool:
        """Note a line of the history; whether its state is the one to keep."""
        select = self.recipe.select
        if select == "last":
            self.best = {"epoch": entry["epoch"], "metrics": entry["val"] or {}, "selected_by": "last"}
            return False
        if entry[select] is None:
            return False
        if self.best is not None and self._score(entry[select]) <= self._score(self.best["metrics"]):
            return False
        self.best = {"epoch": entry["epoch"], "metrics": entry[select], "selected_by": select}
        return True

    def exhausted(self, history: Sequence[Mapping[str, Any]], epoch: int) -> bool:
        """Has the primary metric not got better in the ``patience`` epochs before ``epoch``?"""
        select = self.recipe.select
        scores = {e["epoch"]: self._score(e[select])[0] for e in history if e.get(select)}
        if not self.recipe.patience or not scores:
            return False
        peak: int = max(scores, key=lambda epoch: scores[epoch])
        return epoch - 1 - peak >= self.recipe.patience

    def _score(self, metrics: Mapping[str, float | None]) -> tuple[float, float]:
        """What is compared, higher is better: the primary metric, then the negative loss."""
        value, loss = metrics.get(self.primary), metrics.get("loss")
        sign = -1 if lower_is_better(self.primary) else 1
        return -math.inf if value is None else sign * value, -math.inf if loss is None else -loss
