"""Image data: from a layout on disk to checked, subsampled, transformed splits.

Everything is checked before training starts: the layout, the labels, and every file that will be used (decoded once, in
threads). A split whose decoded images fit into 256 MiB stays decoded in memory, so small images cost nothing per epoch.
Augmentation depends on (split_seed, epoch, index) alone: a resumed run sees the same pixels, whatever the number of
workers. The training loop says which epoch it is with ``dataset.set_epoch(epoch)``.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from peft_suite.errors import DataError, UnknownNameError
from peft_suite.train import splitting
from peft_suite.train.contracts import DataConfig, DataSplits
from peft_suite.vision import digits
from peft_suite.vision.images import ImageDataset, verify
from peft_suite.vision.lists import EXTENSIONS, Listing, Sample, detect_format, read_layout
from peft_suite.vision.transforms import VARIANTS, Preprocess, StandardAugment, thumbnail_png

__all__ = ["ImageDataConfig", "ImageDataset", "ImageSource", "source"]


@dataclass(frozen=True)
class ImageDataConfig(DataConfig):
    """Which images, which labels, and how they reach the backbone.

    Attributes:
        format: "auto", "folder", "list", "huggingface", "vtab", "fgvc", "few-shot", "cifar-binary" or "digits-shifted".
        task: data set of a protocol (vtab, fgvc, few-shot), such as "cifar"; "" takes it from the folder's name.
        splits: of a protocol: "tune" (the default; train, validate, test), "final" (train and validation data together,
            test), "official" (what FGVC's data sets say themselves).
        augment: "none"; "light" (small shift, flip); "crop" (random place of the crop, flip); "resized-crop" (random
            resized crop, flip); "standard" (timm's training transform: with colours).
        train, val, test: folder, list or split names; "" looks for the usual ones. Without a validation split, one is
            held out of train by ``val_fraction``; without a test split, one by ``test_fraction``.
        eval_shots: keep this many images per class of val and of test (0 keeps all), for quick looks.
        classes: class names in index order; () takes them from train.
        num_classes: for lists whose labels are numbers: labels are 0 to num_classes - 1.
        allow_empty: accept classes without a training image.
        file_column, label_column, split_column: "" looks for the usual names.
        image_root: folder that paths in lists are relative to; "" is the folder of the list.
        multi_label: several labels per image, separated by ``label_separator`` (";" when empty). JSON lists of labels
            and a separator switch it on by themselves.
        subset: configuration name of a Hugging Face data set.
        preprocess: how a published repository prepares images: "vpt", "noah", "ssf", ... (``VARIANTS``); "" is the
            backbone's own. The fields below override it.
        resize: "" keeps the rule ("crop" by default); "squash" gives up the aspect ratio; "squash-crop" cuts after it.
        interpolation: "" keeps it; "bilinear", "bicubic", "tf-bilinear", ...
        mean, std: three numbers instead of the backbone's normalisation.
        hflip: probability of a mirror image when augmenting.
        auto_augment: timm's policy string for "standard".
        erase: probability that noise covers a part of an augmented image.
        verify: "full" decodes every used file before training; "none" leaves errors to the run.
    """

    task: str = ""
    splits: Literal["", "tune", "final", "official"] = ""
    augment: Literal["none", "light", "crop", "resized-crop", "standard"] = "none"
    train: str = ""
    val: str = ""
    test: str = ""
    test_fraction: float = 0.0
    eval_shots: int = 0
    classes: tuple[str, ...] = ()
    num_classes: int = 0
    allow_empty: bool = False
    file_column: str = ""
    label_column: str = ""
    split_column: str = ""
    image_root: str = ""
    multi_label: bool = False
    label_separator: str = ""
    subset: str = ""
    preprocess: str = ""
    resize: Literal["", "crop", "squash", "squash-crop"] = ""
    interpolation: Literal["", "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "tf-bilinear"] = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    hflip: float = 0.5
    auto_augment: str = ""
    erase: float = 0.0
    verify: Literal["full", "none"] = "full"

    def validate(self) -> None:
        super().validate()
        self.require("test_fraction", 0 <= self.test_fraction < 1, "must be at least 0 and below 1")
        self.require("test_fraction", self.test_fraction + self.val_fraction < 1, "leaves nothing to train on")
        for name in ("eval_shots", "num_classes"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("hflip", "erase"):
            self.require(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        for name in ("mean", "std"):
            self.require(name, len(getattr(self, name)) in (0, 3), "must be three numbers or empty")
        self.require("std", all(v > 0 for v in self.std), "must be above 0")
        if self.preprocess and self.preprocess not in VARIANTS:
            raise UnknownNameError("preprocessing", self.preprocess, VARIANTS, "Set data.preprocess.")
        self.require("classes", len(set(self.classes)) == len(self.classes), "names a class twice")

    @property
    def is_multi(self) -> bool:
        return self.multi_label or bool(self.label_separator)


class ImageSource:
    """The vision plugin's data source; see :class:`peft_suite.train.DataSource`."""

    config: type[DataConfig] = ImageDataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """Class names and whether an image may have several; nothing is decoded."""
        config = _own(config)
        if detect_format(config) == digits.NAME:
            return digits.CLASSES, False
        listing = read_layout(config)
        return listing.classes, listing.multi_label

    def load(self, config: DataConfig, preprocessing: Mapping[str, Any]) -> DataSplits:
        """Checked splits; ``info["preprocessing"]`` is what :meth:`inputs` needs later.

        Raises:
            DataError: nothing to train on, classes without images, unreadable files, labels out of range.
        """
        config = _own(config)
        goal = Preprocess.from_dict(preprocessing).variant(config.preprocess)
        goal = goal.override(config.mean, config.std, config.resize, config.interpolation)
        layout = detect_format(config)
        if layout == digits.NAME:
            listing, images = digits.listing(config.shots or digits.DEFAULT_SHOTS, config.split_seed, config.eval_shots)
            pixels = {split: [images[s.row] for s in part] for split, part in listing.splits.items()}
            return _assemble(config, goal, listing, pixels, [], hflip=0.0, root="")
        listing = read_layout(config)
        if not listing.fixed:
            _hold_out(listing, config)
        shots = 0 if listing.layout == "few-shot" else config.shots  # there the lists are the draw
        _shuffle_for_shots(listing, shots, config)
        caches: dict[str, list[Any] | None] = {}
        skipped: list[dict[str, str]] = []
        for split, part in listing.splits.items():
            most = shots if split == "train" else config.eval_shots
            if not config.skip_bad:
                part = _first_per_class(part, most)
            good, cache, bad = verify(
                part, listing.openers.get(split), split, check=config.verify == "full", skip=config.skip_bad
            )
            if config.skip_bad:
                keep = set(_first_per_class(good, most))
                cache = [c for s, c in zip(good, cache, strict=True) if s in keep] if cache is not None else None
                good = [s for s in good if s in keep]
            order = sorted(range(len(good)), key=lambda i: (good[i].row, good[i].name))
            listing.splits[split] = [good[i] for i in order]
            caches[split] = [cache[i] for i in order] if cache is not None else None
            skipped += [{"split": split, "name": name, "reason": reason} for name, reason in bad]
        if skipped:
            _check_after_skipping(listing, config)
        return _assemble(config, goal, listing, caches, skipped, hflip=config.hflip, root=config.root)

    def inputs(self, paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Tensor]]:
        """Images of files and folders (recursively, sorted); other files in folders are counted in ``dataset.ignored``.

        Raises:
            DataError: a path that does not exist, a file that is no image, or nothing to do.
        """
        files: list[str] = []
        ignored = 0
        for path in map(Path, paths):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file())
                images = [str(p) for p in inside if p.suffix.lower() in EXTENSIONS]
                files, ignored = files + images, ignored + len(inside) - len(images)
            elif path.is_file():
                files.append(str(path))
            else:
                raise DataError(f"{str(path)!r} does not exist.")
        if not files:
            where = ", ".join(map(repr, paths)) or "an empty list of paths"
            raise DataError(
                f"No image in {where} ({ignored} other files). Images end in {', '.join(EXTENSIONS)}. "
                "Give files or folders."
            )
        samples = [Sample(name, (), name) for name in files]
        samples, cache, _ = verify(samples, None, "input")
        dataset = ImageDataset(samples, Preprocess.from_dict(preprocessing), None, cache=cache)
        dataset.ignored = ignored
        return files, dataset


source = ImageSource()


def _own(config: DataConfig) -> ImageDataConfig:
    return config if isinstance(config, ImageDataConfig) else ImageDataConfig.from_dict(config.to_dict())


def _assemble(
    config: ImageDataConfig,
    goal: Preprocess,
    listing: Listing,
    caches: Mapping[str, Any],
    skipped: list[dict[str, str]],
    *,
    hflip: float,
    root: str,
) -> DataSplits:
    targets = len(listing.classes) if listing.multi_label else 0
    sets: dict[str, ImageDataset] = {}
    for split, part in listing.splits.items():
        augment = config.augment if split == "train" else "none"
        standard = StandardAugment(goal, hflip, config.auto_augment, config.erase) if augment == "standard" else None
        sets[split] = ImageDataset(
            part,
            goal,
            targets,
            opener=listing.openers.get(split),
            cache=caches.get(split),
            augment=augment,
            standard=standard,
            hflip=hflip,
            erase=config.erase,
            seed=config.split_seed,
        )
    counts = {}
    for split, part in listing.splits.items():
        tally = Counter(label for sample in part for label in sample.labels)
        counts[split] = {name: tally[i] for i, name in enumerate(listing.classes)}
    info = {
        "layout": listing.layout,
        "sizes": {split: len(part) for split, part in listing.splits.items()},
        "counts": counts,
        "skipped": len(skipped),
        "skipped_files": skipped[:100],
        "preprocessing": goal.to_dict(),
        "augment": config.augment,
        **({"task": listing.task, "splits": config.splits or "tune"} if listing.task else {}),
        "in_memory": sorted(split for split in sets if caches.get(split) is not None),
    }
    return DataSplits(
        train=sets["train"],
        val=sets.get("val"),
        test=sets.get("test"),
        classes=listing.classes,
        fingerprint=_fingerprint(listing, root, caches),
        multi_label=listing.multi_label,
        info=info,
        thumbnail=lambda dataset, index: thumbnail_png(dataset.image(index)),
        sample_name=lambda dataset, index: str(dataset.samples[index].name),
    )


def _fingerprint(listing: Listing, root: str, caches: Mapping[str, Any]) -> str:
    """sha256 over sorted (split, relative path, labels, size); for data without files, over the pixels too."""
    rows = []
    for split, part in listing.splits.items():
        for i, sample in enumerate(part):
            if sample.path:
                size = str(os.path.getsize(sample.path))
            else:
                cache = caches.get(split)
                size = hashlib.sha256(cache[i].tobytes()).hexdigest() if cache is not None else ""
            rows.append((split, sample.name, ",".join(map(str, sample.labels)), size))
    return splitting.digest_of(rows)


def _keys(samples: Sequence[Sample]) -> list[int]:
    """The class that decides where a sample goes: its only one, or its rarest (-1 for none)."""
    tally = Counter(label for sample in samples for label in sample.labels)
    return [min(sample.labels, key=lambda v: (tally[v], v), default=-1) for sample in samples]


def _groups(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for key, sample in zip(_keys(samples), samples, strict=True):
        groups.setdefault(key, []).append(sample)
    return dict(sorted(groups.items()))


def _hold_out(listing: Listing, config: ImageDataConfig) -> None:
    """Take missing val and test splits out of train, class by class; at least one image of a class stays."""
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if split in listing.splits or not fraction:
            continue
        groups, seed = _groups(listing.splits["train"]), f"{split}/{config.split_seed}"
        held, train = splitting.hold_out(groups, fraction, seed, lambda sample: sample.labels)
        if held:
            listing.splits[split] = held
            listing.splits["train"] = train
            if "train" in listing.openers:
                listing.openers[split] = listing.openers["train"]


def _shuffle_for_shots(listing: Listing, shots: int, config: ImageDataConfig) -> None:
    """Bring each split into a random order by seed, so that taking the first k of a class is a random draw."""
    for split, part in listing.splits.items():
        if shots if split == "train" else config.eval_shots:
            part.sort(key=lambda s: (s.row, s.name))
            random.Random(f"shots/{split}/{config.split_seed}").shuffle(part)


def _first_per_class(samples: Sequence[Sample], shots: int) -> list[Sample]:
    if not shots:
        return list(samples)
    return [sample for group in _groups(samples).values() for sample in group[:shots]]


def _check_after_skipping(listing: Listing, config: ImageDataConfig) -> None:
    left = {label for sample in listing.splits["train"] for label in sample.labels}
    lost = [name for i, name in enumerate(listing.classes) if i not in left]
    if not left or (lost and not config.allow_empty and not listing.fixed):
        raise DataError(f"After leaving out unreadable images, no training image is left of: {', '.join(lost[:6])}.")
    for split in [s for s, part in listing.splits.items() if not part]:
        del listing.splits[split]
