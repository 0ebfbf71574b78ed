"""Few-shot episodes: the published ones of ModelNet40, and episodes drawn from any labelled clouds.

Published: ``ROOT/5way_10shot/3.pkl`` (or ``5way10shot``) holds ``{"train": [...], "test": [...]}`` of items
``(points [8192, 6], label 0..way-1, class id)``. ``data.way``, ``data.shots`` and ``data.fold`` choose one; a fold of
-1 follows ``data.split_seed``, so that ten seeds with ``resample`` run over the ten folds.

Drawn: with ``data.way`` above 0 every other layout becomes an episode: classes are shuffled and ``way`` of them taken;
of each, ``shots`` random training clouds train and ``queries`` random test clouds test (other training clouds, where
there is no test split). Without ``data.fold`` the draw follows ``data.split_seed``.

An episode has no validation split, and ``data.val_fraction`` makes none; take the last epoch (``recipe.select=last``).

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

__all__ = ["check_episodes", "draw_episode", "read_few_shot"]

NO_VALIDATION = {"no_validation": "Few-shot episodes have none, and data.val_fraction does not hold any of theirs out."}


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
    facts = {"way": config.way, "shots": config.shots, "fold": _fold(config), "file": file.name}
    notes = {**facts, **NO_VALIDATION}
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
    drawn = {"way": config.way, "shots": config.shots, "queries": config.queries, "fold": _fold(config)}
    notes = {**listing.notes, **drawn, **NO_VALIDATION}
    return Listing(names, splits, listing.layout, readers, listing.normalize, True, notes)


def check_episodes(root: str, way: int, shots: int, folds: int) -> None:
    """Raise DataError, which names the folds 0 to ``folds - 1`` that are not there."""
    have = _episodes(Path(root))
    if lost := [fold for fold in range(folds) if (way, shots, fold) not in have]:
        raise DataError(
            f"{root!r} lacks {len(lost)} of {folds} folds of {way}-way {shots}-shot: {some(lost, 10)}. Expected "
            f"{way}way_{shots}shot/FOLD.pkl."
        )


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


def _episodes(root: Path) -> dict[tuple[int, int, int], Path]:
    """(way, shots, fold) -> file."""
    return {
        (int(m[1]), int(m[2]), int(p.stem)): p
        for folder in [root, root / "ModelNetFewshot"]
        if folder.is_dir()
        for sub in sorted(folder.iterdir())
        if (m := re.fullmatch(r"(\d+)way_?(\d+)shot", sub.name)) and sub.is_dir()
        for p in sorted(sub.glob("*.pkl"))
        if p.stem.isdecimal()
    }


def _episode_file(config: PointDataConfig) -> Path:
    have = _episodes(Path(config.root))
    wanted = (config.way, config.shots, _fold(config))
    if wanted not in have:
        listed = some([f"{w}-way {s}-shot fold {f}" for w, s, f in sorted(have)]) or "none"
        raise DataError(
            f"{config.root!r} has no episode of {wanted[0]} ways, {wanted[1]} shots, fold {wanted[2]}. "
            f"Episodes there: {listed}. Set data.way, data.shots and data.fold."
        )
    return have[wanted]
