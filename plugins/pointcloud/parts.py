"""Part segmentation: a part for every point. The task (loss, instance and category mIoU) and its data source.

Samples are ``({"points": [N, 3 + channels], "category": int}, parts [N])``: the category is given, as in all published
results. Models answer with ``[B, N, P]`` (logits, or log-probabilities) for all P parts of all categories.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.clouds import CloudDataset
from peft_suite.pointcloud.data import (
    PointDataConfig,
    check_after_skipping,
    checked,
    facts,
    fingerprint,
    goal_of,
    hold_out,
    reading_of,
)
from peft_suite.pointcloud.listing import Sample
from peft_suite.pointcloud.part_pictures import part_picture
from peft_suite.pointcloud.partlabels import IGNORE, Parts, read_parts
from peft_suite.pointcloud.transforms import parse_augment, thumbnail_png
from peft_suite.train.contracts import DataConfig, DataSplits
from peft_suite.train.task import Outcome

__all__ = ["PartDataConfig", "PartDataset", "PartSegmentation", "PartSource", "part_counts", "source"]


@dataclass(frozen=True)
class PartSegmentation:
    """Cross-entropy per point; points of :data:`IGNORE` count nowhere.

    A prediction is the best part *of the cloud's category*. The IoU of a part that neither a cloud nor its prediction
    has is 1. ``instance_miou`` is the mean over clouds of the mean over their category's parts, ``category_miou`` the
    mean over categories of their clouds' means, ``point_accuracy`` counts points. A cloud's category is that of its
    labels.
    """

    parts: Parts

    @property
    def classes(self) -> tuple[str, ...]:
        return self.parts.names

    @property
    def primary(self) -> str:
        return "instance_miou"

    def loss(
        self, output: Tensor, target: Tensor, *, smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> Tensor:
        """Sum over each cloud's points, ``[B]``; :meth:`mass` counts them. ``output [B, N, P]``, ``target [B, N]``."""
        if target.ndim != 2 or output.ndim != 3 or output.shape[:2] != target.shape:
            raise ConfigError(
                f"Part segmentation needs outputs [B, N, P] and targets [B, N], got {list(output.shape)} and "
                f"{list(target.shape)}."
            )
        each = F.cross_entropy(
            output.float().transpose(1, 2),
            target,
            class_weights,
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=smoothing,
        )
        return each.sum(1)

    def mass(self, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Points of each cloud that count, weighted by their part, ``[B]``."""
        known = target != IGNORE
        if class_weights is None:
            return known.float().sum(1)
        return (class_weights[target.where(known, 0)] * known).sum(1)

    def class_weights(self, targets: Tensor) -> Tensor:
        """Inverse frequency of parts with mean 1, ``[P]``, from :func:`part_counts` of all training clouds."""
        inverse = 1 / targets[:, : len(self.classes)].sum(0).clamp(min=1).float()
        return inverse / inverse.mean()

    def check(self, targets: Tensor, split: str) -> None:
        """Raise DataError for points outside the parts; ``targets`` are :func:`part_counts`."""
        count = len(self.classes)
        if targets.ndim != 2 or targets.shape[1] != count + 2:
            raise DataError(f"{split}: expected part counts [N, {count + 2}], got {list(targets.shape)}.")
        if bad := targets[:, -1].nonzero().flatten().tolist():
            raise DataError(
                f"{split}: the labels of {len(bad)} clouds, first number {bad[0]}, are neither a part (0 to "
                f"{count - 1}) nor {IGNORE} (ignored). Correct the labels."
            )

    def reduce(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Per cloud: loss, right points, counted points, category, IoU of every part (NaN: of another category), and
        the predicted part of every point."""
        counts = part_counts(target, len(self.classes))
        category = self.categories(counts)
        known = target != IGNORE
        iou = torch.full((len(output), len(self.classes)), math.nan)
        right, drawn = torch.zeros(len(output)), torch.zeros(target.shape)
        for i, c in enumerate(category.tolist()):
            own = torch.tensor(self.parts.ranges[c], device=output.device)
            every = own[output[i][:, own].argmax(1)]
            drawn[i] = every.cpu()
            said, true = every[known[i]], target[i][known[i]]
            right[i] = float((said == true).sum())
            for part in self.parts.ranges[c]:
                a, b = said == part, true == part
                union = int((a | b).sum())
                iou[i, part] = float((a & b).sum()) / union if union else 1.0
        loss = self.loss(output, target).cpu()
        kept = torch.stack([loss, right, known.sum(1).float().cpu(), category.float().cpu()], 1)
        return torch.cat([kept, iou, drawn], 1), counts

    def categories(self, counts: Tensor) -> Tensor:
        """The category of each row of :func:`part_counts`: the one with most of its points."""
        sums = [counts[:, list(r)].sum(1) for r in self.parts.ranges]
        return torch.stack(sums, 1).argmax(1)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        iou, category = self._iou(output).nanmean(1), output[:, 3].long()
        each = torch.stack([iou[category == c].mean() for c in sorted(set(category.tolist()))])
        values = {
            "loss": output[:, 0].double().sum() / output[:, 2].sum(),
            "instance_miou": iou.mean(),
            "category_miou": each.mean(),
            "point_accuracy": output[:, 1].double().sum() / output[:, 2].sum(),
        }
        return {name: _number(value) for name, value in values.items()}

    def per_class(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        """Mean IoU of every part over the clouds of its category; None where there are none."""
        return {n: _number(v) for n, v in zip(self.classes, self._iou(output).nanmean(0), strict=True)}

    def per_category(self, output: Tensor) -> dict[str, float | None]:
        """Mean over each category's clouds of their mIoU."""
        iou, category = self._iou(output).nanmean(1), output[:, 3].long()
        return {name: _number(iou[category == c].mean()) for c, name in enumerate(self.parts.categories)}

    def confusion(self, output: Tensor, target: Tensor) -> list[list[int]] | None:
        return None

    def outcome(self, output: Tensor, target: Tensor) -> Outcome:
        """Clouds in two halves by mIoU: "correct" are those from the median up. Names are categories."""
        score = self._iou(output).nanmean(1)
        good = score >= score.median()
        names = [self.parts.categories[int(c)] for c in output[:, 3].tolist()]
        drawn = output[:, 4 + len(self.classes) :].long()
        return Outcome(list(names), list(names), torch.where(good, score, 1 - score).tolist(), good.tolist(), drawn)

    def _iou(self, output: Tensor) -> Tensor:
        """``[B, P]`` of what :meth:`reduce` kept."""
        return output[:, 4 : 4 + len(self.classes)].double()


def part_counts(target: Tensor, parts: int) -> Tensor:
    """Points of each part, ignored ones, and ones of neither kind: ``[B, N] -> [B, P + 2]``."""
    slot = torch.where(target == IGNORE, parts, torch.where((target < 0) | (target >= parts), parts + 1, target))
    return torch.zeros(len(target), parts + 2, dtype=torch.int64, device=target.device).scatter_add_(
        1, slot, torch.ones_like(slot)
    )


@dataclass(frozen=True)
class PartDataConfig(PointDataConfig):
    """As :class:`PointDataConfig`; ``classes`` are categories, ``shots`` clouds of each.

    Published results train on 2048 random points ("random" resampling, here without repetition) with
    ``augment="part-segmentation"`` and evaluate on random points too; here evaluation always takes the same ones.
    """

    resample: Literal["fps", "random"] = "random"


class PartDataset(CloudDataset):
    """Samples ``({"points", "category"}, parts [N])``; a cached cloud is the pair (points, parts)."""

    parts: Parts

    def read(self, sample: Sample) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """All points ``[N, 3 + channels]`` and their parts ``[N]``; raises UnreadableError."""
        cloud = self.reading.cloud(sample)
        assert cloud.labels is not None
        x, labels = self.reading.sampled(self.reading.goal(cloud), self.parts.encode(cloud.labels, sample.label))
        return x, labels.astype(np.int16)

    def both(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What :meth:`read` gives, from memory if it is there."""
        if self.cache is not None:
            pair: Any = self.cache[index]
            return pair[0], pair[1]
        return self.read(self.samples[index])

    def points(self, index: int) -> np.ndarray[Any, Any]:
        return self.both(index)[0]

    def target(self, index: int) -> Tensor:
        """Points per part, ignored, invalid: what checks and class weights need."""
        labels = torch.from_numpy(self.both(index)[1].astype(np.int64))
        return part_counts(labels[None], len(self.parts.names))[0]

    def __getitem__(self, index: int) -> Any:
        x, labels = self.both(index)
        rng = np.random.default_rng(self.sample_seed(index)) if self.train else None
        rows = self.rows(x, rng)
        picked, told = x[rows], labels[rows]
        if rng is not None and self.augment.steps:  # labels travel as a last column: some changes replace points
            both = self.augment(np.concatenate([picked, told[:, None]], 1, dtype=np.float32), rng, self.normals)
            picked, told = both[:, :-1], both[:, -1]
        points = torch.from_numpy(np.ascontiguousarray(picked, np.float32))
        return {"points": points, "category": self.samples[index].label}, torch.from_numpy(told.astype(np.int64))


class PartSource:
    """The data source of part segmentation; see :class:`peft_suite.train.DataSource`."""

    config: type[DataConfig] = PartDataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """The names of all parts; a point has one."""
        return read_parts(_own(config))[1].names, False

    def load(self, config: DataConfig, preprocessing: Mapping[str, Any]) -> DataSplits:
        """Checked splits; ``info["categories"]`` is what the backbone's one-hot category counts.

        Raises:
            DataError: clouds without labels, labels of another length, unusable clouds.
        """
        config = _own(config)
        listing, parts = read_parts(config)
        if not listing.fixed:
            hold_out(listing, config)
        goal = goal_of(config, listing, preprocessing)
        augment = parse_augment(config.augment, listing.layout)
        sets: dict[str, PartDataset] = {}
        skipped: list[dict[str, str]] = []
        for split in list(listing.splits):
            train = split == "train"
            reading = reading_of(config, goal, listing, split)
            data = PartDataset([], reading, train=train, augment=augment if train else None, seed=config.split_seed)
            data.parts = parts
            good, cache, bad = checked(listing.splits[split], reading, split, listing, config, data.read)
            data.samples, data.cache = good, cache
            listing.splits[split], sets[split] = good, data
            skipped += bad
        if skipped:
            check_after_skipping(listing, config)
        info = facts(config, listing, goal, skipped)
        known = {c: list(r) for c, r in zip(parts.categories, parts.ranges, strict=True)}
        info |= {"categories": list(known), "parts": known}
        info["preprocessing"] |= {"parts": known}
        return DataSplits(
            train=sets["train"],
            val=sets.get("val") if "val" in listing.splits else None,
            test=sets.get("test") if "test" in listing.splits else None,
            classes=parts.names,
            fingerprint=fingerprint(listing, config.root),
            info=info,
            thumbnail=lambda data, index: thumbnail_png(data.both(index)[0], labels=data.both(index)[1]),
            sample_name=lambda data, index: str(data.samples[index].name),
            task=PartSegmentation(parts),
            picture=part_picture,
        )

    def inputs(self, paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Tensor]]:
        """Clouds of files and folders. A cloud's category is the only one there is, or the name of its folder; where a
        folder is no category, no cloud gets one."""
        from peft_suite.pointcloud.predictions import part_inputs

        return part_inputs(paths, preprocessing)

    def write(
        self, names: Sequence[str], outputs: Iterator[Tensor], folder: Path, classes: Sequence[str]
    ) -> list[dict[str, Any]]:
        """One PLY file per cloud: all its points with part and colour; ``names`` are those of :meth:`inputs`.

        Returns:
            Per cloud: ``file``, ``written``, ``category`` ("" for none) and ``parts``, the share of the points of each.
        """
        from peft_suite.pointcloud.predictions import write_parts

        return write_parts(names, outputs, folder, classes)


source = PartSource()


def _own(config: DataConfig) -> PartDataConfig:
    return config if isinstance(config, PartDataConfig) else PartDataConfig.from_dict(config.to_dict())


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None
