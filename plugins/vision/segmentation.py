"""Semantic segmentation: the task (loss per pixel, mIoU) that the training loop optimises and reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_suite.errors import ConfigError, DataError
from peft_suite.train.task import CONFUSION_LIMIT, Outcome

__all__ = ["IGNORE", "Segmentation", "pixel_counts"]

IGNORE = 255
SIDE = 64  # predicted maps are kept this large for pictures


@dataclass(frozen=True)
class Segmentation:
    """Cross-entropy per pixel; pixels of :data:`IGNORE` count nowhere. Every pixel weighs the same, over all images.

    Metrics: ``loss``, ``miou`` (mean intersection over union of the classes that occur in targets or predictions, from
    the pixels of the whole split), ``pixel_accuracy``, ``mean_accuracy`` (over classes). Outputs are ``[N, C, H, W]``,
    targets ``[N, H, W]``; :meth:`reduce` turns a batch into confusion counts and small maps: a split of any size
    fits into memory. Targets are measured at the size at which the data set gives them.
    """

    classes: tuple[str, ...]

    @property
    def primary(self) -> str:
        return "miou"

    def loss(
        self, output: Tensor, target: Tensor, *, smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> Tensor:
        """Sum over each image's pixels, ``[N]``; :meth:`mass` counts them."""
        if target.ndim != 3:
            raise ConfigError(f"Segmentation targets must be [N, H, W] class indices, got {list(target.shape)}.")
        each = F.cross_entropy(
            output.float(), target, class_weights, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
        )
        return each.sum((1, 2))

    def mass(self, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Pixels of each image that count, weighted by their class, ``[N]``."""
        known = target != IGNORE
        if class_weights is None:
            return known.float().sum((1, 2))
        return (class_weights[target.where(known, 0)] * known).sum((1, 2))

    def class_weights(self, targets: Tensor) -> Tensor:
        """Inverse pixel frequency with mean 1, ``[C]``, from :func:`pixel_counts` of all training masks."""
        inverse = 1 / targets[:, : len(self.classes)].sum(0).clamp(min=1).float()
        return inverse / inverse.mean()

    def check(self, targets: Tensor, split: str) -> None:
        """Raise DataError for pixels outside the classes; ``targets`` are :func:`pixel_counts`."""
        count = len(self.classes)
        if targets.ndim != 2 or targets.shape[1] != count + 2:
            raise DataError(f"{split}: expected pixel counts [N, {count + 2}], got {list(targets.shape)}.")
        if bad := targets[:, -1].nonzero().flatten().tolist():
            raise DataError(
                f"{split}: the masks of {len(bad)} images, first number {bad[0]}, have values that are neither a class "
                f"(0 to {count - 1}) nor {IGNORE} (ignored). Correct the masks, the class list or data.offset."
            )
        if len(targets) and not int(targets[:, :count].sum()):
            raise DataError(f"{split}: every pixel is ignored. Correct the masks, or data.offset.")

    def reduce(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Per image: confusion ``C*C``, loss, predicted map ``SIDE*SIDE``; and :func:`pixel_counts` of the target."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        count = len(self.classes)
        said = output.argmax(1)
        matrices = [
            multiclass_confusion_matrix(p, t, count, ignore_index=IGNORE, validate_args=False)
            for p, t in zip(said, target, strict=True)
        ]
        small = F.interpolate(said[:, None].float(), (SIDE, SIDE), mode="nearest").flatten(1)
        confusion = torch.stack(matrices).flatten(1).float()  # exact below 2**24 pixels
        kept = torch.cat((confusion, self.loss(output, target)[:, None], small), dim=1)
        return kept, pixel_counts(target, count)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        matrix = self._matrix(output)
        pixels = matrix.sum()
        accuracy = matrix.diag() / matrix.sum(1)
        values = {
            "loss": output[:, len(self.classes) ** 2].double().sum() / pixels,
            "miou": self._iou(matrix).nanmean(),
            "pixel_accuracy": matrix.diag().sum() / pixels,
            "mean_accuracy": accuracy.nanmean(),
        }
        return {name: _number(value) for name, value in values.items()}

    def per_class(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        """Intersection over union per class; None for classes without a pixel."""
        return {n: _number(v) for n, v in zip(self.classes, self._iou(self._matrix(output)), strict=True)}

    def confusion(self, output: Tensor, target: Tensor) -> list[list[int]] | None:
        if len(self.classes) > CONFUSION_LIMIT:
            return None
        matrix: list[list[int]] = self._matrix(output).long().tolist()
        return matrix

    def outcome(self, output: Tensor, target: Tensor) -> Outcome:
        """Images in two halves by pixel accuracy: "correct" are those above the median, the others are its failures.

        ``probability`` is the accuracy of the better half and the error of the worse, so that the clearest come first.
        """
        count = len(self.classes)
        matrices = output[:, : count * count].double().reshape(-1, count, count)
        right = matrices.diagonal(dim1=1, dim2=2).sum(1) / matrices.sum((1, 2)).clamp(min=1)
        good = right >= right.median()
        return Outcome(
            [self._names(row) for row in (matrices.sum(2) > 0)],
            [self._names(row) for row in (matrices.sum(1) > 0)],
            torch.where(good, right, 1 - right).tolist(),
            good.tolist(),
            output[:, count * count + 1 :].to(torch.uint8).reshape(-1, SIDE, SIDE),
        )

    def _names(self, present: Tensor) -> list[str]:
        return [name for name, here in zip(self.classes, present.tolist(), strict=True) if here]

    def _matrix(self, output: Tensor) -> Tensor:
        count = len(self.classes)
        return output[:, : count * count].double().sum(0).view(count, count)

    @staticmethod
    def _iou(matrix: Tensor) -> Tensor:
        hit = matrix.diag()
        return hit / (matrix.sum(0) + matrix.sum(1) - hit)  # 0 / 0 is nan: the class occurs nowhere


def pixel_counts(target: Tensor, classes: int) -> Tensor:
    """Pixels of each class, ignored ones, and ones of neither kind: ``[N, H, W] -> [N, C + 2]``."""
    slot = torch.where(target == IGNORE, classes, torch.where((target < 0) | (target >= classes), classes + 1, target))
    return F.one_hot(slot.flatten(1), classes + 2).sum(1)


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None
