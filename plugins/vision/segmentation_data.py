"""Images with index masks: layouts, joint transforms, pictures for the report.

Layouts (``format``; "auto" looks at the folders):

- ``pairs``: ``ROOT/SPLIT/images/NAME.*`` and ``ROOT/SPLIT/masks/NAME.png`` for the splits train, val, test; class
  names in ``ROOT/classes.txt``, one a line, in index order.
- ``voc``: ``ROOT/JPEGImages/NAME.jpg``, ``ROOT/SegmentationClass/NAME.png`` (palette PNG, 255 is ignored) and lists
  ``ROOT/ImageSets/Segmentation/{train,val,test}.txt``. Without ``classes.txt`` the 21 classes of Pascal VOC.
- ``ade20k``: ``ROOT/images/{training,validation}/NAME.jpg``, ``ROOT/annotations/{training,validation}/NAME.png``, whose
  0 is ignored and 1, 2, ... are the classes 0, 1, ...; names in ``ROOT/objectInfo150.txt`` or ``classes.txt``.

Masks are read as the indices that the file stores: palette and grey PNGs, not colours.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from peft_suite.errors import DataError, closest
from peft_suite.storage import atomic
from peft_suite.train.contracts import DataConfig, DataSplits
from peft_suite.train.epochs import EpochDataset
from peft_suite.vision.lists import EXTENSIONS
from peft_suite.vision.segmentation import IGNORE, Segmentation, pixel_counts
from peft_suite.vision.transforms import Preprocess, thumbnail_png, to_rgb

__all__ = ["MaskDataset", "SegmentationDataConfig", "SegmentationSource", "source"]

VOC = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


@dataclass(frozen=True)
class SegmentationDataConfig(DataConfig):
    """Which images and masks, and how they reach the backbone.

    Attributes:
        format: "auto", "pairs", "voc" or "ade20k"; see the module.
        augment: "none"; "light" (mirror image, crop of at least half the side); "standard" (mirror image, scale 0.5 to
            2 and crop, what leaves the image is ignored).
        classes: names in index order instead of the layout's.
        offset: added to mask values; values below 0 then are ignored (-1: 0 means "no class").
        limit: this many training images, drawn by ``split_seed``; 0 takes all.
        hflip: probability of a mirror image when augmenting.
    """

    format: Literal["auto", "pairs", "voc", "ade20k"] = "auto"
    augment: Literal["none", "light", "standard"] = "none"
    classes: tuple[str, ...] = ()
    offset: int = 0
    limit: int = 0
    hflip: float = 0.5

    def validate(self) -> None:
        super().validate()
        self.require("shots", self.shots == 0, "an image holds several classes; use limit for fewer images")
        self.require("limit", self.limit >= 0, "must not be negative")
        self.require("hflip", 0 <= self.hflip <= 1, "must be between 0 and 1")


@dataclass(frozen=True)
class Pair:
    """One image and its mask."""

    name: str
    image: Path
    mask: Path


class MaskDataset(EpochDataset):
    """Samples ``(image [3, H, W], mask [H, W] int64)``, both of the backbone's size, moved together."""

    def __init__(
        self, pairs: Sequence[Pair], goal: Preprocess, classes: int, offset: int, augment: str, hflip: float, seed: int
    ) -> None:
        super().__init__(seed)
        self.pairs, self.goal, self.classes, self.offset = pairs, goal, classes, offset
        self.augment, self.hflip = augment, hflip
        self._cache: dict[int, tuple[Image.Image, Image.Image]] = {}
        self._pixels = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(index)
        if self.augment != "none":
            rng = random.Random(self.sample_seed(index))
            image, mask = _augment(image, mask, self.goal, self.augment, self.hflip, rng)
        return self.goal.tensor(self._fit(image)), self._indices(mask)

    def target(self, index: int) -> Tensor:
        """Pixels per class, ignored, invalid: what checks and class weights need."""
        return pixel_counts(self._indices(self.read(index)[1])[None], self.classes)[0]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Image (RGB) and mask (indices) as they are on disk."""
        if index in self._cache:
            return self._cache[index]
        pair = self.pairs[index]
        try:
            with Image.open(pair.image) as opened:
                opened.load()
                image = to_rgb(opened)
            with Image.open(pair.mask) as opened:
                if opened.mode not in ("P", "L", "I", "I;16", "1"):
                    raise DataError(
                        f"it has the mode {opened.mode}; masks must store class indices (grey or palette PNG)"
                    )
                mask = Image.fromarray(np.asarray(opened).astype(np.int32))
        except (OSError, DataError) as error:
            raise DataError(f"The mask or image of {pair.name!r} cannot be read: {error}.") from error
        if image.size != mask.size:
            raise DataError(f"{pair.name!r}: the image is {image.size} and its mask {mask.size}. Make them equal.")
        self._pixels += image.width * image.height
        if self._pixels < 2**25:  # 256 MiB with masks
            self._cache[index] = (image, mask)
        return image, mask

    def _fit(self, image: Image.Image) -> Image.Image:
        size = (self.goal.width, self.goal.height)
        return image if image.size == size else image.resize(size, self.goal.filter)

    def _indices(self, mask: Image.Image) -> Tensor:
        size = (self.goal.width, self.goal.height)
        mask = mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)
        values = torch.from_numpy(np.array(mask)).long()
        moved = values + self.offset
        return torch.where((values == IGNORE) | ((moved < 0) & (self.offset < 0)), IGNORE, moved)


def _augment(
    image: Image.Image, mask: Image.Image, goal: Preprocess, how: str, hflip: float, rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """The same mirror and crop for both."""
    if rng.random() < hflip:
        image, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, mask))
    share = 1 / rng.uniform(0.5, 2.0) if how == "standard" else rng.uniform(0.5, 1.0)
    w, h = (max(1, round(share * n)) for n in image.size)
    left, top = (rng.randint(min(0, n - c), max(0, n - c)) for n, c in ((image.width, w), (image.height, h)))
    box = (left, top, left + w, top + h)
    if share <= 1:
        return image.crop(box), mask.crop(box)
    middle = tuple(round(255 * m) for m in goal.mean)
    wide, void = Image.new("RGB", (w, h), middle), Image.new("I", (w, h), IGNORE)
    wide.paste(image, (-left, -top))
    void.paste(mask, (-left, -top))
    return wide, void


class SegmentationSource:
    """The data source of the segmentation task; see :class:`peft_suite.train.DataSource`."""

    config: type[DataConfig] = SegmentationDataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """Class names; an image always has several, and yet every pixel has one."""
        config = _own(config)
        root = _root(config)
        return _names(config, root, _layout(config, root)), False

    def load(self, config: DataConfig, preprocessing: Mapping[str, Any]) -> DataSplits:
        """Checked splits.

        Raises:
            DataError: folders or masks are missing, or images and masks do not fit.
        """
        config = _own(config)
        root = _root(config)
        layout = _layout(config, root)
        names = _names(config, root, layout)
        splits = _READERS[layout](root)
        if not splits.get("train"):
            raise DataError(f"{root} ({layout} layout) has no training images with masks.")
        _draw(splits, config)
        goal = Preprocess.from_dict({**preprocessing, "resize": "squash"})
        offset = config.offset or (-1 if layout == "ade20k" else 0)
        sets = {
            split: MaskDataset(
                pairs,
                goal,
                len(names),
                offset,
                config.augment if split == "train" else "none",
                config.hflip,
                config.split_seed,
            )
            for split, pairs in splits.items()
        }
        return DataSplits(
            sets["train"],
            sets.get("val"),
            sets.get("test"),
            names,
            _fingerprint(splits),
            info={
                "layout": layout,
                "sizes": {split: len(pairs) for split, pairs in splits.items()},
                "preprocessing": goal.to_dict(),
                "augment": config.augment,
            },
            thumbnail=lambda data, index: thumbnail_png(data.read(index)[0]),
            picture=_picture,
            sample_name=lambda data, index: data.pairs[index].name,
            task=Segmentation(names),
        )

    def inputs(self, paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Tensor]]:
        """Images of files and folders, resized as in training."""
        from peft_suite.vision.data import source as images

        return images.inputs(paths, {**preprocessing, "resize": "squash"})

    def write(
        self, names: Sequence[str], outputs: Iterator[Tensor], folder: Path, classes: Sequence[str]
    ) -> list[dict[str, Any]]:
        """One palette PNG of class indices per image, as large as the image, in the folders of the images.

        Returns:
            Per image: ``file``, ``written`` and ``classes``, the share of the pixels of each class that occurs.
        """
        paths = [Path(name).resolve() for name in names]
        top = Path(os.path.commonpath([path.parent for path in paths]))
        stems = Counter(path.with_suffix("") for path in paths)
        maps = (scores.argmax(0) for batch in outputs for scores in batch)
        rows = []
        for name, path, said in zip(names, paths, maps, strict=True):
            alone = stems[path.with_suffix("")] == 1  # a.jpg beside a.png keeps its whole name
            inside = path.relative_to(top)
            target = folder / (inside.with_suffix(".png") if alone else inside.with_name(inside.name + ".png"))
            with Image.open(name) as image:
                size = image.size
            mask = Image.fromarray(said.numpy().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
            shares = np.bincount(np.asarray(mask).ravel(), minlength=len(classes)) / (size[0] * size[1])
            mask.putpalette(_coloured(np.arange(256)[None]).tobytes())
            with atomic(target) as file:
                mask.save(file, format="PNG")
            present = sorted(np.flatnonzero(shares), key=lambda i: -shares[i])
            told = {classes[i]: round(float(shares[i]), 4) for i in present}
            rows.append({"file": name, "written": str(target), "classes": told})
        return rows


source = SegmentationSource()


def _own(config: DataConfig) -> SegmentationDataConfig:
    if isinstance(config, SegmentationDataConfig):
        return config
    return SegmentationDataConfig.from_dict(config.to_dict())


def _root(config: SegmentationDataConfig) -> Path:
    root = Path(config.root)
    if not config.root or not root.is_dir():
        raise DataError(f"data.root = {config.root!r} is no folder. Give the folder of a segmentation data set.")
    return root


def _layout(config: SegmentationDataConfig, root: Path) -> str:
    marks = {"voc": root / "SegmentationClass", "ade20k": root / "annotations", "pairs": root / "train" / "masks"}
    if config.format != "auto":
        return config.format
    found = [name for name, mark in marks.items() if mark.is_dir()]
    if not found:
        wanted = ", ".join(f"{mark} ({name})" for name, mark in marks.items())
        raise DataError(f"{root} has none of the segmentation layouts: none of the folders {wanted} exists.")
    return found[0]


def _names(config: SegmentationDataConfig, root: Path, layout: str) -> tuple[str, ...]:
    if config.classes:
        return config.classes
    if (root / "classes.txt").is_file():
        lines = (root / "classes.txt").read_text("utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    info = root / "objectInfo150.txt"
    if layout == "ade20k" and info.is_file():
        return tuple(line.split("\t")[-1].strip() for line in info.read_text("utf-8").splitlines()[1:] if line.strip())
    if layout == "voc":
        return VOC
    raise DataError(
        f"{root} does not name its classes. Write {root / 'classes.txt'}, one name a line, or data.classes."
    )


def _pairs(root: Path) -> dict[str, list[Pair]]:
    folders = {split: root / split for split in ("train", "val", "test") if (root / split).is_dir()}
    return {split: _match(folder / "images", folder / "masks") for split, folder in folders.items()}


def _ade20k(root: Path) -> dict[str, list[Pair]]:
    folders = {"train": "training", "val": "validation"}
    there = {split: name for split, name in folders.items() if (root / "annotations" / name).is_dir()}
    return {split: _match(root / "images" / name, root / "annotations" / name) for split, name in there.items()}


def _voc(root: Path) -> dict[str, list[Pair]]:
    splits = {}
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    for split in ("train", "val", "test"):
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if file.is_file():
            stems = file.read_text("utf-8").split()
            pairs = [Pair(s, images / f"{s}.jpg", masks / f"{s}.png") for s in stems]
            lost = [p.name for p in pairs if not (p.image.is_file() and p.mask.is_file())]
            if lost and split != "test":  # the masks of VOC's test images are not published
                raise DataError(f"{file} names {len(lost)} images without image or mask, first {lost[0]!r}.")
            pairs = [p for p in pairs if p.name not in set(lost)]
            if pairs:
                splits[split] = pairs
    return splits


_READERS = {"pairs": _pairs, "voc": _voc, "ade20k": _ade20k}


def _match(images: Path, masks: Path) -> list[Pair]:
    """Images and masks of one stem, in order; one without the other is an error."""
    if not images.is_dir() or not masks.is_dir():
        raise DataError(f"Segmentation data needs both {images} and {masks}.")
    pictures = {p.stem: p for p in sorted(images.iterdir()) if p.suffix.lower() in EXTENSIONS}
    indices = {p.stem: p for p in sorted(masks.iterdir()) if p.suffix.lower() == ".png"}
    if odd := sorted(pictures.keys() ^ indices.keys()):
        side = "a mask" if odd[0] in pictures else "an image"
        raise DataError(
            f"{len(odd)} files of {images.parent} have no partner, {odd[0]!r} lacks {side}. {closest(odd[0], indices)}"
        )
    return [Pair(stem, path, indices[stem]) for stem, path in pictures.items()]


def _draw(splits: dict[str, list[Pair]], config: SegmentationDataConfig) -> None:
    """Hold a validation split out where there is none, then keep ``limit`` training images."""
    train = list(splits["train"])
    random.Random(f"segmentation/{config.split_seed}").shuffle(train)
    if "val" not in splits and config.val_fraction:
        count = min(len(train) - 1, max(1, round(config.val_fraction * len(train))))
        splits["val"], train = sorted(train[:count], key=lambda p: p.name), train[count:]
    splits["train"] = sorted(train[: config.limit or None], key=lambda p: p.name)
    for split in [s for s, pairs in splits.items() if not pairs]:
        del splits[split]


def _fingerprint(splits: Mapping[str, Sequence[Pair]]) -> str:
    digest = hashlib.sha256()
    for split, pairs in sorted(splits.items()):
        for pair in pairs:
            digest.update(f"{split}\t{pair.name}\t{pair.image.stat().st_size}\t{pair.mask.stat().st_size}\n".encode())
    return digest.hexdigest()


def _picture(data: MaskDataset, index: int, said: Tensor) -> bytes:
    """Image, mask and prediction side by side."""
    image, mask = data.read(index)
    side = 128
    size = (side, max(1, round(side * image.height / image.width)))
    predicted = Image.fromarray(said.numpy().astype(np.int32))
    strip = Image.new("RGB", (3 * size[0] + 8, size[1]), "white")
    colours = [_coloured(data._indices(mask).numpy()), _coloured(np.array(predicted))]
    for i, part in enumerate([image.resize(size), *(c.resize(size, Image.Resampling.NEAREST) for c in colours)]):
        strip.paste(part, (i * (size[0] + 4), 0))
    return thumbnail_png(strip, strip.width)


def _coloured(indices: Any) -> Image.Image:
    """Pascal VOC's colours: the bits of an index spread over red, green and blue; ignored pixels are white."""
    indices = np.asarray(indices, dtype=np.int64)
    colours = np.zeros((*indices.shape, 3), dtype=np.int64)
    for bit in range(3):
        for channel in range(3):
            colours[..., channel] |= ((indices >> (3 * bit + channel)) & 1) << (7 - bit)
    colours[indices == IGNORE] = 255
    return Image.fromarray(colours.astype(np.uint8))
