"""What is being learnt: the loss, what each sample counts, and the metrics."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_suite.errors import ConfigError, DataError, UnknownNameError

__all__ = ["Classification", "Outcome", "Task", "as_task"]

CONFUSION_LIMIT = 200  # classes; a larger matrix is unreadable and makes run.json heavy


@dataclass(frozen=True)
class Outcome:
    """What the model said about each sample, for examples and predictions. All lists have one entry per sample.

    ``maps`` are predicted class maps ``[N, h, w]`` of dense tasks.
    """

    target: list[str | list[str]]
    prediction: list[str | list[str]]
    probability: list[float]
    correct: list[bool]
    maps: Tensor | None = None


class Task(Protocol):
    """The interface between the loop and a task. ``primary`` names the metric that selects the best epoch; of a loss,
    an error or a distance (:func:`peft_suite.tables.lower_is_better`) the lowest is the best.

    A task whose outputs are too large to keep for a whole split has ``reduce(output, target) -> (output, target)``,
    called on every batch of an evaluation; :meth:`metrics`, :meth:`per_class`, :meth:`confusion`, :meth:`outcome` and
    :meth:`check` then see what it returned. Training targets of :meth:`check` and :meth:`class_weights` come from
    ``dataset.target(index)``.

    A task may also have ``predict(model, inputs) -> output``, which runs the model in place of
    :func:`peft_suite.train.evaluation.forward`, and ``illustrate(model, folder) -> [{"title", "file"}]``, which draws
    PNG files into ``folder`` for the report, before, after and every ``recipe.sample_every`` epochs. Targets may be
    mappings of tensors; such a task has ``reduce``.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def primary(self) -> str: ...

    def loss(
        self, output: Tensor, target: Tensor, *, smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> Tensor:
        """Unreduced loss ``[N]``. The loop optimises ``sum(loss) / sum(mass)`` over the global batch."""
        ...

    def mass(self, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """What each sample counts in the denominator, ``[N]``."""
        ...

    def class_weights(self, targets: Tensor) -> Tensor:
        """Balanced class weights ``[C]`` from all training targets."""
        ...

    def check(self, targets: Tensor, split: str) -> None:
        """Raise DataError when targets do not fit the classes."""
        ...

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        """Scalars over a whole split, JSON-ready; higher is better except ``loss``."""
        ...

    def per_class(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        """One score per class name."""
        ...

    def confusion(self, output: Tensor, target: Tensor) -> list[list[int]] | None:
        """Rows are targets, columns predictions; None where it has no meaning."""
        ...

    def outcome(self, output: Tensor, target: Tensor) -> Outcome:
        """Per-sample predictions."""
        ...


@dataclass(frozen=True)
class Classification:
    """Single-label (cross-entropy) or multi-label (binary cross-entropy with logits) classification.

    Single-label metrics: ``loss``, ``accuracy`` (top-1), ``top5`` when there are more than 5 classes, ``macro_f1``.
    Multi-label metrics: ``loss``, ``map`` (macro mean average precision), ``macro_f1``, ``micro_f1`` at 0.5.
    All are fractions between 0 and 1.
    """

    classes: tuple[str, ...]
    multi_label: bool = False

    @property
    def primary(self) -> str:
        return "map" if self.multi_label else "accuracy"

    def loss(
        self, output: Tensor, target: Tensor, *, smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> Tensor:
        """Unreduced loss.

        Args:
            output: logits ``[N, C]``.
            target: int64 ``[N]``, or soft targets ``[N, C]`` (mixup), or multi-label 0/1 ``[N, C]``.
            smoothing: label smoothing; multi-label targets move towards 1/2.
            class_weights: ``[C]``.

        Returns:
            ``[N]``, float32.
        """
        output = output.float()
        if not self.multi_label:
            return F.cross_entropy(output, target, class_weights, reduction="none", label_smoothing=smoothing)
        soft = target.float() * (1 - smoothing) + 0.5 * smoothing
        loss = F.binary_cross_entropy_with_logits(output, soft, class_weights, reduction="none")
        return loss.mean(dim=1)

    def mass(self, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """``[N]``: the weight of each sample's class, 1 without class weights; multi-label weights have mean 1."""
        if class_weights is None or self.multi_label:
            return torch.ones(len(target), device=target.device)
        return class_weights[target] if target.ndim == 1 else target.float() @ class_weights

    def class_weights(self, targets: Tensor) -> Tensor:
        """Inverse class frequency with mean 1, ``[C]``. Classes without samples count as having one."""
        if self.multi_label:
            counts = targets.float().sum(dim=0)
        else:
            counts = torch.bincount(targets, minlength=len(self.classes)).float()
        inverse = 1 / counts.clamp(min=1)
        return inverse / inverse.mean()

    def check(self, targets: Tensor, split: str) -> None:
        """Raise DataError for labels outside the classes."""
        count = len(self.classes)
        if self.multi_label:
            if targets.ndim != 2 or targets.shape[1] != count:
                raise DataError(
                    f"{split}: multi-label targets must have shape [N, {count}], got {list(targets.shape)}. "
                    "Give one 0 or 1 per class."
                )
        elif targets.ndim != 1 or targets.is_floating_point():
            raise DataError(
                f"{split}: targets must be class indices, got {targets.dtype} {list(targets.shape)}. "
                "For several labels per sample set multi_label=True."
            )
        elif len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < count:
            bad = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
            where = int((targets == bad).nonzero()[0])
            raise DataError(
                f"{split}: sample {where} has label {bad}, but there are {count} classes (valid labels: 0 to "
                f"{count - 1}). Correct the label or the class list."
            )

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        from torchmetrics.functional import classification as tm

        count = len(self.classes)
        loss = self.loss(output, target).double().mean()
        if self.multi_label:
            target = target.long()
            with warnings.catch_warnings():  # a class without positives is left out of the mean, which is what we want
                warnings.simplefilter("ignore")
                values = {
                    "loss": loss,
                    "map": tm.multilabel_average_precision(output, target, count),
                    "macro_f1": tm.multilabel_f1_score(output, target, count, average="macro"),
                    "micro_f1": tm.multilabel_f1_score(output, target, count, average="micro"),
                }
        else:
            values = {"loss": loss, "accuracy": tm.multiclass_accuracy(output, target, count, average="micro")}
            if count > 5:
                values["top5"] = tm.multiclass_accuracy(output, target, count, top_k=5, average="micro")
            values["macro_f1"] = tm.multiclass_f1_score(output, target, count, average="macro")
        return {name: _number(value) for name, value in values.items()}

    def per_class(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        """Accuracy per class (multi-label: average precision); None for classes without samples."""
        from torchmetrics.functional import classification as tm

        count = len(self.classes)
        if self.multi_label:
            present = target.sum(dim=0) > 0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = tm.multilabel_average_precision(output, target.long(), count, average="none")
        else:
            present = torch.bincount(target, minlength=count) > 0
            scores = tm.multiclass_accuracy(output, target, count, average="none")
        return {
            name: _number(score) if here else None
            for name, score, here in zip(self.classes, scores, present.tolist(), strict=True)
        }

    def confusion(self, output: Tensor, target: Tensor) -> list[list[int]] | None:
        if self.multi_label or len(self.classes) > CONFUSION_LIMIT:
            return None
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        matrix: list[list[int]] = multiclass_confusion_matrix(output, target, len(self.classes)).tolist()
        return matrix

    def outcome(self, output: Tensor, target: Tensor) -> Outcome:
        """Per-sample results; multi-label is right only when every label is, its probability is the mean certainty."""
        if not self.multi_label:
            probability, prediction = output.float().softmax(dim=1).max(dim=1)
            return Outcome(
                [self.classes[t] for t in target.tolist()],
                [self.classes[p] for p in prediction.tolist()],
                probability.tolist(),
                (prediction == target).tolist(),
            )
        chance = output.float().sigmoid()
        said = chance > 0.5
        return Outcome(
            [[c for c, on in zip(self.classes, row, strict=True) if on] for row in target.bool().tolist()],
            [[c for c, on in zip(self.classes, row, strict=True) if on] for row in said.tolist()],
            torch.maximum(chance, 1 - chance).mean(dim=1).tolist(),
            (said == target.bool()).all(dim=1).tolist(),
        )


def as_task(task: str | Task, classes: tuple[str, ...], multi_label: bool) -> Task:
    """A task object from its name; objects pass through."""
    if not isinstance(task, str):
        return task
    if task != "classification":
        raise UnknownNameError("task", task, ["classification"])
    if not classes:
        raise ConfigError("Classification needs at least one class name, got none. Check the data configuration.")
    return Classification(tuple(classes), multi_label)


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None  # torchmetrics computes in float32
