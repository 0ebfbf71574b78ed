"""Clouds whose points carry part labels: ShapeNetPart, HDF5 files with ``pid``, and folders of one's own.

Own data is ROOT/{train,val,test}/CATEGORY/cloud, or without category folders, or without split folders. The label of a
point is the last column of its file (or the one that ``data.columns`` calls label), a ``label`` property of .ply and
.pcd files, or a line of a file beside it: ``NAME.seg`` or ``NAME.labels`` (one whole number a line), ``NAME.label``
(SemanticKITTI: uint32, of which the lower half counts). Numbers below 0 mean "ignore this point".

Labels are those of a category: label 1 of chairs and label 1 of lamps are different parts. ROOT/parts.txt may name
them, one category a line: ``chair back seat leg arm`` (label = position). Without it the labels that occur in train
are the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_suite.errors import DataError, closest
from peft_suite.pointcloud.folders import clouds_below, split_folders
from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError, parse
from peft_suite.pointcloud.listing import Listing, Sample, check_known, detect_format, expected, read_layout, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.parts import PartDataConfig

__all__ = ["IGNORE", "LabelledReader", "Parts", "read_parts"]

IGNORE = -1
SIDECARS = (".seg", ".labels", ".label")


@dataclass(frozen=True)
class Parts:
    """Which parts belong to which category.

    ``names`` are all parts in index order, ``categories`` those of the clouds, ``ranges[c]`` the indices of category
    c's parts, ``codes[c]`` what the files call them.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    ranges: tuple[tuple[int, ...], ...]
    codes: tuple[tuple[int, ...], ...]

    def encode(self, labels: Array, category: int) -> Array:
        """Labels ``[N]`` of a file as part indices, negative ones as :data:`IGNORE`."""
        codes = np.asarray(self.codes[category], np.int64)
        place = np.searchsorted(codes, labels).clip(max=len(codes) - 1)
        known = codes[place] == labels
        if bad := np.unique(labels[~known & (labels >= 0)]).tolist():
            raise UnreadableError(
                f"part {bad[0]} does not belong to {self.categories[category]!r}, whose parts are "
                f"{some(codes.tolist(), 12)}"
            )
        return np.where(known, np.asarray(self.ranges[category], np.int64)[place], IGNORE)


class LabelledReader:
    """Reads a cloud together with the labels of its points."""

    def __init__(self, columns: str, mesh_points: int, inner: object = None) -> None:
        self.columns, self.mesh_points, self.inner = columns, mesh_points, inner

    def __call__(self, sample: Sample) -> Cloud:
        if callable(self.inner):
            cloud: Cloud = self.inner(sample)
        else:
            path = Path(sample.path)
            beside = next((f for s in SIDECARS if (f := path.with_suffix(s)).is_file()), None)
            cloud = parse(
                path, columns=self.columns, mesh_points=self.mesh_points, labelled=not self.columns and beside is None
            )
            if beside is not None:
                cloud.labels = _sidecar(beside)
                if len(cloud.labels) != len(cloud.points):
                    raise UnreadableError(f"{len(cloud.points)} points, {len(cloud.labels)} labels in {beside.name}")
        if cloud.labels is None:
            raise UnreadableError("its points have no labels")
        if (cloud.labels < 0).all():
            raise UnreadableError("none of its points has a label")
        return cloud


def read_parts(config: PartDataConfig) -> tuple[Listing, Parts]:
    """Clouds (their category is the sample's label) and the parts of every category.

    Raises:
        DataError: no clouds, categories that train does not have, or clouds without labels.
    """
    layout = detect_format(config)
    if layout not in ("folder", "shapenetpart", "hdf5"):
        raise DataError(
            f"{config.root!r} ({layout}) has no labels of points. Part segmentation reads ShapeNetPart, HDF5 files "
            "with pid, and folders of clouds whose last column is a label."
        )
    listing = _folder(config) if layout == "folder" else read_layout(config)
    listing.fixed = layout == "shapenetpart"
    splits = listing.splits
    listing.readers = {s: LabelledReader(config.columns, config.mesh_points, listing.readers.get(s)) for s in splits}
    if layout == "shapenetpart":
        from peft_suite.pointcloud.shapenetpart import PARTS

        if unknown := [c for c in listing.classes if c not in PARTS]:
            raise DataError(f"{unknown[0]!r} is no category of ShapeNetPart. {closest(unknown[0], PARTS)}")
        codes = [PARTS[c] for c in listing.classes]
        spelled = [[f"{c}/{i}" for i in range(len(PARTS[c]))] for c in listing.classes]
        size = 1 + max(v for part in codes for v in part)
        names = [f"unused/{i}" for i in range(size)]  # of categories that this folder does not have
        for part, words in zip(codes, spelled, strict=True):
            for index, word in zip(part, words, strict=True):
                names[index] = word
        return listing, Parts(tuple(names), listing.classes, tuple(codes), tuple(codes))
    file = Path(config.root) / "parts.txt"
    known = _named(file, listing.classes) if file.is_file() else _found(listing)
    ranges, names_, start = [], list[str](), 0
    for category in listing.classes:
        count = len(known[category])
        ranges.append(tuple(range(start, start + count)))
        alone = len(listing.classes) == 1
        names_ += [word if alone else f"{category}/{word}" for word in known[category].values()]
        start += count
    return listing, Parts(
        tuple(names_), listing.classes, tuple(ranges), tuple(tuple(known[c]) for c in listing.classes)
    )


def _folder(config: PartDataConfig) -> Listing:
    root = Path(config.root)
    parts = split_folders(root, config.train, config.val, config.test)
    deep = any(p.is_dir() for p in parts["train"].iterdir())
    categories = tuple(sorted(p.name for p in parts["train"].iterdir() if p.is_dir())) if deep else ("object",)
    categories = config.classes or categories
    splits = {}
    for split, folder in parts.items():
        here = sorted(p.name for p in folder.iterdir() if p.is_dir()) if deep else list(categories)
        check_known(split, here, categories)
        splits[split] = [
            Sample(p.relative_to(root).as_posix(), i, str(p))
            for i, name in enumerate(categories)
            for p in clouds_below(folder / name if deep else folder)
            if p.name != "parts.txt"
        ]
        if not splits[split]:
            raise DataError(f"{str(folder)!r} holds no cloud. {expected()}")
    return Listing(categories, splits, layout="folder")


def _found(listing: Listing) -> dict[str, dict[int, str]]:
    """Category -> label -> name, from the labels that occur in train."""
    found: dict[str, set[int]] = {name: set() for name in listing.classes}
    reader = listing.readers["train"]
    for sample in listing.splits["train"]:
        try:
            labels = reader(sample).labels
        except UnreadableError:  # reported, or skipped, when the clouds are checked
            continue
        assert labels is not None
        found[listing.classes[sample.label]] |= set(np.unique(labels[labels >= 0]).tolist())
    if empty := [name for name, labels in found.items() if not labels]:
        sample = next(s for s in listing.splits["train"] if listing.classes[s.label] == empty[0])
        try:
            reader(sample)
        except UnreadableError as error:
            raise DataError(f"No part of {empty[0]!r} is known: {sample.name!r} ({error}).") from error
    return {name: {v: str(v) for v in sorted(labels)} for name, labels in found.items()}


def _named(file: Path, categories: Sequence[str]) -> Mapping[str, dict[int, str]]:
    lines = [line.split() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    known = {words[0]: dict(enumerate(words[1:])) for words in lines if len(words) > 1}
    if lost := [name for name in categories if name not in known]:
        raise DataError(f"{str(file)!r} has no line '{lost[0]} PART PART ...'. {closest(lost[0], known)}")
    return known


def _sidecar(file: Path) -> Array:
    if file.suffix == ".label":
        if file.stat().st_size % 4:
            raise UnreadableError(f"{file.name} is truncated: its size is no multiple of 4")
        return (np.fromfile(file, "<u4") & 0xFFFF).astype(np.int64)
    try:
        return np.array(file.read_text("utf-8-sig").split(), np.int64)
    except ValueError as error:
        raise UnreadableError(f"{file.name} holds something else than whole numbers") from error
