"""Point-cloud data: from a layout on disk to checked, subsampled, normalised splits.

Everything is checked before training starts: the layout, the labels, and every cloud that will be used (read once, in
threads). A split whose normalised clouds fit into ``cache_mib`` stays in memory; of clouds that are only evaluated, the
farthest points are found once and the others forgotten. What a training epoch draws and changes depends on
(split_seed, epoch, index) alone: a resumed run sees the same points, whatever the number of workers.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from peft_suite.errors import DataError
from peft_suite.pointcloud.clouds import CloudDataset, Reading, verify
from peft_suite.pointcloud.folders import clouds_below
from peft_suite.pointcloud.formats import EXTENSIONS, parse_columns
from peft_suite.pointcloud.listing import Listing, Sample, layout_classes, read_layout
from peft_suite.pointcloud.transforms import CHANNELS, Preprocess, parse_augment, thumbnail_png
from peft_suite.pointcloud.views import ViewsConfig
from peft_suite.train import splitting
from peft_suite.train.contracts import DataConfig, DataSplits

__all__ = ["CloudDataset", "PointDataConfig", "PointSource", "source"]


@dataclass(frozen=True)
class PointDataConfig(DataConfig):
    """Which clouds, which labels, and how they reach the backbone.

    Attributes:
        format: "auto", "folder", "modelnet", "scanobjectnn", "few-shot", "shapenetpart", "hdf5", "mesh-views" or
            "solids-shifted" (built in, ``root`` may name it instead; nothing is read from disk).
        variant: of ModelNet ("40", "10", "40-txt", ...) or ScanObjectNN ("obj-bg", "obj-only", "pb-t50-rs").
        splits: "trainval" trains on ShapeNetPart's train and val, as published results do.
        train, val, test: folder or file names; "" looks for the usual ones. Without a validation split, one is held out
            of train by ``val_fraction``; without a test split, one by ``test_fraction``.
        eval_shots: keep this many clouds per class of val and of test (0 keeps all), for quick looks.
        classes: class names in index order; () takes them from the layout.
        allow_empty: accept classes without a training cloud.
        num_points: points that the network sees; 0 is the backbone's own number (1024).
        resample: "fps": evaluation takes the farthest points from point 0, training a random subset of farthest points
            from a random one; "random": both draw at random.
        point_all: farthest points that training draws its subset from; 0: 1200 for 1024, 2400 for 2048.
        fps_start: "random", or "first": training clouds are sampled from point 0, once instead of in every epoch.
        fps_rule: "pointnet2" samples as the official CUDA kernel does, which never takes points near the origin.
        min_points: clouds with fewer are errors; 0: as many as the backbone groups.
        normalize: "auto" is what the data set's official loader does: "none" for ScanObjectNN, else "unit-sphere" (mean
            to 0, radius 1); "unit-cube": the bounding box into -1 to 1.
        up: the axis that points up in the files; clouds are turned so that y does.
        channels: numbers beside xyz that the backbone was built for: "normals", "colors", "intensity".
        columns: what the columns of tables are, such as "x y z _ r g b label".
        data_key, label_key: arrays of HDF5 files; "" looks for the usual names.
        mesh_points: points drawn from the area of a mesh; ``mesh_seed`` seeds the draw.
        augment: "none", changes such as "scale-translate", "rotate+jitter(sigma=0.02)", or a repository's name
            ("point-mae", "recon", "point-peft", ...), which stands for what it does on this data set; see
            :mod:`peft_suite.pointcloud.transforms`.
        way, queries, fold: few-shot episodes of ``way`` classes with ``shots`` training and ``queries`` test clouds of
            each; see :mod:`peft_suite.pointcloud.fewshot`.
        views: how mesh-views makes clouds.
        cache_mib: a split whose normalised clouds take at most this much stays in memory. ModelNet40's 9,843 training
            clouds take 1,130 MiB, or with fps_start="first" 136.
        verify: "full" reads every used cloud before training; "none" leaves errors to the run.
    """

    variant: str = ""
    splits: Literal["", "trainval"] = ""
    train: str = ""
    val: str = ""
    test: str = ""
    test_fraction: float = 0.0
    eval_shots: int = 0
    classes: tuple[str, ...] = ()
    allow_empty: bool = False
    num_points: int = 0
    resample: Literal["fps", "random"] = "fps"
    point_all: int = 0
    fps_start: Literal["random", "first"] = "random"
    fps_rule: Literal["standard", "pointnet2"] = "standard"
    min_points: int = 0
    normalize: Literal["auto", "unit-sphere", "unit-cube", "none"] = "auto"
    up: Literal["y", "z", "x"] = "y"
    channels: tuple[str, ...] = ()
    columns: str = ""
    data_key: str = ""
    label_key: str = ""
    mesh_points: int = 8192
    mesh_seed: int = 0
    way: int = 0
    queries: int = 20
    fold: int = -1
    views: ViewsConfig = field(default_factory=ViewsConfig)
    cache_mib: int = 1024
    verify: Literal["full", "none"] = "full"

    def validate(self) -> None:
        super().validate()
        self.require("test_fraction", 0 <= self.test_fraction < 1, "must be at least 0 and below 1")
        self.require("test_fraction", self.test_fraction + self.val_fraction < 1, "leaves nothing to train on")
        for name in ("eval_shots", "num_points", "point_all", "min_points", "way", "cache_mib"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("mesh_points", "queries"):
            self.require(name, getattr(self, name) > 0, "must be at least 1")
        self.require("fold", self.fold >= -1, "must be -1 (follow split_seed) or a number of a fold")
        self.require("point_all", not 0 < self.point_all < self.num_points, "must not be below num_points")
        self.require("channels", set(self.channels) <= CHANNELS.keys(), f"choose from {', '.join(CHANNELS)}")
        self.require("channels", len(set(self.channels)) == len(self.channels), "names a channel twice")
        self.require("classes", len(set(self.classes)) == len(self.classes), "names a class twice")
        parse_augment(self.augment)
        if self.columns:
            parse_columns(self.columns)

    @property
    def column_names(self) -> tuple[str, ...]:
        return parse_columns(self.columns) if self.columns else ()


class PointSource:
    """The point-cloud plugin's data source; see :class:`peft_suite.train.DataSource`."""

    config: type[DataConfig] = PointDataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """Class names; a cloud has one."""
        config = own(config)
        if config.way and config.format != "few-shot":
            return arrange(config).classes, False
        return layout_classes(config), False

    def load(self, config: DataConfig, preprocessing: Mapping[str, Any]) -> DataSplits:
        """Checked splits; ``info["preprocessing"]`` is what :meth:`inputs` needs later.

        Raises:
            DataError: nothing to train on, classes without clouds, unusable clouds, labels out of range.
        """
        config = own(config)
        listing = arrange(config)
        goal = goal_of(config, listing, preprocessing)
        augment = parse_augment(config.augment, listing.layout)
        sets: dict[str, CloudDataset] = {}
        skipped: list[dict[str, str]] = []
        in_memory = []
        for split in list(listing.splits):
            train = split == "train"
            reading = reading_of(config, goal, listing, split)
            good, cache, bad = checked(listing.splits[split], reading, split, listing, config, reading.points)
            skipped += bad
            listing.splits[split] = good
            in_memory += [split] if cache is not None else []
            sets[split] = CloudDataset(
                good,
                reading,
                cache=cache,
                train=train,
                augment=augment if train else None,
                seed=config.split_seed,
            )
        if skipped:
            check_after_skipping(listing, config)
        counts = {}
        for split, part in listing.splits.items():
            tally = Counter(sample.label for sample in part)
            counts[split] = {name: tally[i] for i, name in enumerate(listing.classes)}
        return DataSplits(
            train=sets["train"],
            val=sets.get("val") if "val" in listing.splits else None,
            test=sets.get("test") if "test" in listing.splits else None,
            classes=listing.classes,
            fingerprint=fingerprint(listing, config.root),
            info={
                **facts(config, listing, goal, skipped),
                "counts": counts,
                "in_memory": sorted(s for s in in_memory if s in listing.splits),
            },
            thumbnail=lambda dataset, index: thumbnail_png(dataset.points(index)),
            sample_name=lambda dataset, index: str(dataset.samples[index].name),
        )

    def inputs(self, paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Tensor]]:
        """Clouds of files and folders (recursively, sorted); other files in folders are counted in ``ignored``.

        Raises:
            DataError: a path that does not exist, a file that is no cloud, or nothing to do.
        """
        files: list[str] = []
        ignored = 0
        for path in map(Path, paths):
            if path.is_dir():
                found = [str(p) for p in clouds_below(path)]
                ignored += sum(1 for p in path.rglob("*") if p.is_file()) - len(found)
                files += found
            elif path.is_file():
                files.append(str(path))
            else:
                raise DataError(f"{str(path)!r} does not exist.")
        if not files:
            where = ", ".join(map(repr, paths)) or "an empty list of paths"
            raise DataError(
                f"No cloud in {where} ({ignored} other files). Clouds end in {', '.join(EXTENSIONS)}. "
                "Give files or folders."
            )
        goal = Preprocess.from_dict(preprocessing)
        reading = Reading(
            goal,
            columns=str(preprocessing.get("columns", "")),
            mesh_points=int(preprocessing.get("mesh_points", 8192)),
            rule=preprocessing.get("fps_rule", "standard"),
            ordered=True,
        )
        samples, cache, _ = verify([Sample(name, 0, name) for name in files], reading.points, "input")
        dataset = CloudDataset(samples, reading, cache=cache, targets=False)
        dataset.ignored = ignored
        return files, dataset


source = PointSource()


def own(config: DataConfig) -> PointDataConfig:
    """The configuration as this plugin's own class."""
    return config if isinstance(config, PointDataConfig) else PointDataConfig.from_dict(config.to_dict())


def arrange(config: PointDataConfig) -> Listing:
    """The listing with its validation split or episode drawn."""
    listing = read_layout(config)
    if config.way and listing.layout != "few-shot":
        from peft_suite.pointcloud.fewshot import draw_episode

        return draw_episode(listing, config)
    if not listing.fixed:
        hold_out(listing, config)
    return listing


def goal_of(config: PointDataConfig, listing: Listing, preprocessing: Mapping[str, Any]) -> Preprocess:
    """What the backbone expects, with what the configuration changes; "auto" is the layout's normalisation."""
    normalize = listing.normalize if config.normalize == "auto" else config.normalize
    return Preprocess.from_dict(preprocessing).override(
        normalize=normalize,
        up=config.up,
        channels=config.channels,
        num_points=config.num_points,
        min_points=config.min_points,
    )


def reading_of(config: PointDataConfig, goal: Preprocess, listing: Listing, split: str) -> Reading:
    """How the samples of a split become arrays."""
    return Reading(
        goal,
        listing.readers.get(split),
        columns=config.columns,
        mesh_points=config.mesh_points,
        seed=config.mesh_seed,
        resample=config.resample,
        point_all=config.point_all,
        rule=config.fps_rule,
        ordered=split != "train" or config.fps_start == "first",
    )


def checked(
    part: Sequence[Sample], reading: Reading, split: str, listing: Listing, config: PointDataConfig, read: Any
) -> tuple[list[Sample], list[Any] | None, list[dict[str, str]]]:
    """(the samples that are used, what ``read`` made of them or None, the skipped ones with reasons).

    Few shots are drawn by seed before reading, or, when bad clouds may be skipped, after it.
    """
    episode = listing.fixed and listing.layout != "shapenetpart"
    most = (0 if episode else config.shots) if split == "train" else config.eval_shots
    part = list(part)
    if most:
        part.sort(key=lambda s: (s.path, s.row, s.name))
        random.Random(f"shots/{split}/{config.split_seed}").shuffle(part)
    if not config.skip_bad:
        part = _first_per_class(part, most)
    threads = 1 if reading.reader is not None else 0  # readers keep files open between clouds
    good, cache, bad = verify(
        part,
        read,
        split,
        check=config.verify == "full",
        skip=config.skip_bad,
        threads=threads,
        cache_bytes=config.cache_mib * 2**20,
    )
    kept = set(_first_per_class(good, most)) if config.skip_bad else set(good)
    order = sorted((i for i, s in enumerate(good) if s in kept), key=lambda i: (good[i].row, good[i].name))
    skipped = [{"split": split, "name": name, "reason": reason} for name, reason in bad]
    return [good[i] for i in order], [cache[i] for i in order] if cache is not None else None, skipped


def check_after_skipping(listing: Listing, config: PointDataConfig) -> None:
    """Every class must still have a training cloud; splits that lost all of theirs go."""
    left = {sample.label for sample in listing.splits["train"]}
    lost = [name for i, name in enumerate(listing.classes) if i not in left]
    if not left or (lost and not config.allow_empty):
        raise DataError(f"After leaving out unusable clouds, no training cloud is left of: {', '.join(lost[:6])}.")
    for split in [s for s, part in listing.splits.items() if not part]:
        del listing.splits[split]


def facts(
    config: PointDataConfig, listing: Listing, goal: Preprocess, skipped: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """What the report and ``predict`` need to know."""
    reading = {"columns": config.columns, "mesh_points": config.mesh_points, "fps_rule": config.fps_rule}
    steps = parse_augment(config.augment, listing.layout).steps
    return {
        "layout": listing.layout,
        "sizes": {split: len(part) for split, part in listing.splits.items()},
        "skipped": len(skipped),
        "skipped_files": list(skipped[:100]),
        "preprocessing": {**goal.to_dict(), **reading},
        "augment": config.augment,
        "augment_steps": [{"name": name, **ranges} for name, ranges in steps],
        "resample": config.resample,
        **listing.notes,
    }


def fingerprint(listing: Listing, root: str) -> str:
    """sha256 over sorted (split, name, label, size of the file); clouds inside a file have its size."""
    sizes: dict[str, int] = {}
    rows = []
    for split, part in listing.splits.items():
        for sample in part:
            if sample.path not in sizes:
                sizes[sample.path] = os.path.getsize(sample.path) if sample.path else 0
            rows.append((split, sample.name, str(sample.label), str(sizes[sample.path])))
    return splitting.digest_of(rows)


def hold_out(listing: Listing, config: PointDataConfig) -> None:
    """Take missing val and test splits out of train, class by class; at least one cloud of a class stays."""
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if split in listing.splits or not fraction:
            continue
        held, train = splitting.hold_out(_groups(listing.splits["train"]), fraction, f"{split}/{config.split_seed}")
        if held:
            listing.splits[split], listing.splits["train"] = held, train
            if "train" in listing.readers:
                listing.readers[split] = listing.readers["train"]


def _groups(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.label, []).append(sample)
    return dict(sorted(groups.items()))


def _first_per_class(samples: Sequence[Sample], shots: int) -> list[Sample]:
    if not shots:
        return list(samples)
    return [sample for group in _groups(samples).values() for sample in group[:shots]]
