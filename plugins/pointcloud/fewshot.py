"""Few-shot episodes: the published ones of ModelNet40, and episodes drawn from any labelled clouds.

Published: ``ROOT/5way_10shot/3.pkl`` (or ``5way10shot``) holds ``{"train": [...], "test": [...]}`` of items
``(points [8192, 6], label 0..way-1, class id)``. ``data.way``, ``data.shots`` and ``data.fold`` choose one; a fold of
-1 follows ``data.split_seed``, so that ten seeds with ``resample`` run over the ten folds.

Drawn: with ``data.way`` above 0 every other layout becomes an episode: classes are shuffled and ``way`` of them taken;
of each, ``shots`` random training clouds train and ``queries`` random test clouds test (other training clouds, where
there is no test split). Without ``data.fold`` the draw follows ``data.split_seed``.

An episode has no validation split; take the last epoch (``recipe.select=last``).

Source: Sharma and Kaul, NeurIPS 2020, as used since Yu et al. (Point-BERT), CVPR 2022.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_suite.errors import DataError
from peft_suite.pointcloud.formats import Cloud, UnreadableError, table
from peft_suite.pointcloud.listing import Listing, Sample, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["draw_episode", "read_few_shot"]


def read_few_shot(config: PointDataConfig) -> Listing:
    """One published episode.

    Raises:
        DataError: no such episode (those that exist are listed), or a file that is no episode.
    """
    from peft_suite.pointcloud.pickles import load_numbers

    file = _episode_file(config)
    value = load_numbers(file)
    if not isinstance(value, dict) or not {"train", "test"} <= value.keys():
        raise DataError(f"{str(file)!r} is no episode: expected a dictionary with 'train' and 'test'.")
    items: dict[str, list[Any]] = {split: list(value[split]) for split in ("train", "test")}
    names: dict[int, int] = {}
    splits: dict[str, list[Sample]] = {}
    for split, part in items.items():
        splits[split] = []
        for row, item in enumerate(part):
            if not isinstance(item, list | tuple) or len(item) != 3:
                raise DataError(f"{str(file)!r}: {split} item {row} is not (points, label, class id).")
            label, original = (int(np.asarray(v).reshape(-1)[0]) for v in item[1:])
            if not 0 <= label < config.way:
                raise DataError(f"{str(file)!r}: {split} item {row} has label {label} of {config.way} ways.")
            if names.setdefault(label, original) != original:
                raise DataError(f"{str(file)!r}: label {label} is class {names[label]} and class {original}.")
            splits[split].append(Sample(f"{file.name}/{split}[{row}]", label, str(file), row))
    readers = {split: _Items(part) for split, part in items.items()}
    classes = config.classes or tuple(f"class {names.get(i, '?')}" for i in range(config.way))
    notes = {"way": config.way, "shots": config.shots, "fold": _fold(config), "file": file.name}
    return Listing(classes, splits, layout="few-shot", readers=dict(readers), fixed=True, notes=notes)


def draw_episode(listing: Listing, config: PointDataConfig) -> Listing:
    """An episode of ``way`` classes from all clouds of a listing.

    Raises:
        DataError: fewer classes than ways, or fewer clouds than an episode needs.
    """
    if not config.shots:
        raise DataError(f"data.way = {config.way}: an episode needs data.shots, the training clouds of each class.")
    rng = random.Random(f"episode/{_fold(config)}")
    labels = list(range(len(listing.classes)))
    if len(labels) < config.way:
        raise DataError(f"data.way = {config.way}, and {config.root!r} has {len(labels)} classes.")
    rng.shuffle(labels)
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    held = "test" if listing.splits.get("test") else "train"
    for new, label in enumerate(labels[: config.way]):
        pool = {
            split: sorted((s for s in listing.splits[split] if s.label == label), key=lambda s: (s.row, s.name))
            for split in {"train", held}
        }
        for part in pool.values():
            rng.shuffle(part)
        train = pool["train"][: config.shots]
        rest = pool["test"] if held == "test" else pool["train"][config.shots :]
        if len(train) < config.shots or not rest:
            raise DataError(
                f"Class {listing.classes[label]!r} has {len(pool['train'])} training clouds; {config.shots} shots and "
                f"test clouds cannot be drawn from them. Lower data.shots."
            )
        splits["train"] += [Sample(s.name, new, s.path, s.row) for s in train]
        splits["test"] += [Sample(s.name, new, s.path, s.row) for s in rest[: config.queries]]
    readers = {
        split: listing.readers[source]
        for split, source in (("train", "train"), ("test", held))
        if source in listing.readers
    }
    names = tuple(listing.classes[label] for label in labels[: config.way])
    notes = {**listing.notes, "way": config.way, "shots": config.shots, "queries": config.queries}
    return Listing(names, splits, listing.layout, readers, listing.normalize, True, {**notes, "fold": _fold(config)})


class _Items:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __call__(self, sample: Sample) -> Cloud:
        points = self.items[sample.row][0]
        if not isinstance(points, np.ndarray):
            raise UnreadableError("its points are no array")
        return table(points)


def _fold(config: PointDataConfig) -> int:
    return config.fold if config.fold >= 0 else config.split_seed


def _episode_file(config: PointDataConfig) -> Path:
    root = Path(config.root)
    have = {
        (int(m[1]), int(m[2]), int(p.stem)): p
        for folder in [root, root / "ModelNetFewshot"]
        if folder.is_dir()
        for sub in sorted(folder.iterdir())
        if (m := re.fullmatch(r"(\d+)way_?(\d+)shot", sub.name)) and sub.is_dir()
        for p in sorted(sub.glob("*.pkl"))
        if p.stem.isdecimal()
    }
    wanted = (config.way, config.shots, _fold(config))
    if wanted not in have:
        listed = some([f"{w}-way {s}-shot fold {f}" for w, s, f in sorted(have)]) or "none"
        raise DataError(
            f"{config.root!r} has no episode of {wanted[0]} ways, {wanted[1]} shots, fold {wanted[2]}. "
            f"Episodes there: {listed}. Set data.way, data.shots and data.fold."
        )
    return have[wanted]
