"""Where the images are, and what is said about them: captions, class folders, or nothing. Nothing is decoded here.

Layouts (``format``; "auto" looks at ``root``):

- ``metadata``: images beside ``metadata.jsonl``, one JSON object per line with ``file_name`` and a caption column
  (text, or a list of texts of which each draw takes one), or ``metadata.csv`` with the same columns; also one such
  folder per split, ``ROOT/train``, ``ROOT/val``, ``ROOT/test``.
- ``classes``: ``ROOT/CLASS/IMAGE`` or ``ROOT/SPLIT/CLASS/IMAGE``, also inside one ``.tar`` file.
- ``images``: a bare folder of images, or ``ROOT/SPLIT/IMAGE``.
- ``digits-shifted``: built in.

A text model learns the caption; without captions it takes ``instance_prompt`` for every image (DreamBooth), with ``{}``
in it replaced by the class's name.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peft_suite.diffusion import shifted
from peft_suite.diffusion.images import EXTENSIONS
from peft_suite.errors import DataError, UnknownNameError, closest
from peft_suite.train.folders import VAL_NAMES, check_known, class_folders, some

if TYPE_CHECKING:
    from peft_suite.diffusion.data import DiffusionDataConfig

__all__ = ["FORMATS", "Listing", "Sample", "read_layout"]

FORMATS = ("auto", "metadata", "classes", "images", shifted.NAME)
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: its name for people, class, captions, and where it is.

    ``offset`` and ``size`` are its place in the tar file ``path``; ``row`` the number of a built-in image.
    """

    name: str
    path: str
    label: int = 0
    captions: tuple[str, ...] = ()
    row: int = -1
    offset: int = -1
    size: int = 0

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            DataError: it cannot be read.
        """
        try:
            if self.offset < 0:
                return Path(self.path).read_bytes()
            with Path(self.path).open("rb") as archive:
                archive.seek(self.offset)
                return archive.read(self.size)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from None


@dataclass
class Listing:
    """Every sample of every split. ``classes`` is () where the layout has none."""

    layout: str
    splits: dict[str, list[Sample]]
    classes: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


def read_layout(config: DiffusionDataConfig) -> Listing:
    """What is at ``config.root``.

    Raises:
        DataError: nothing there, missing files or captions.
        UnknownNameError: ``format`` names no layout.
    """
    if config.format not in FORMATS:
        raise UnknownNameError("data format", config.format, FORMATS)
    if shifted.NAME in (config.format, config.root):
        return _digits(config)
    root = Path(config.root).expanduser()
    if not config.root or not root.exists():
        near = [p.name for p in root.parent.iterdir()] if config.root and root.parent.is_dir() else []
        raise DataError(f"data.root = {config.root!r} does not exist. {closest(root.name, [*near, shifted.NAME])}")
    layout = _layout(root) if config.format == "auto" else config.format
    if layout == "metadata":
        listing = Listing(layout, {s: _metadata(folder, config) for s, folder in _split_folders(root).items()})
    elif layout == "classes":
        listing = _tar(root, config) if root.is_file() else _classes(root, config)
    else:
        listing = Listing(layout, {s: _bare(folder, root) for s, folder in _split_folders(root).items()})
    if config.only:
        listing = _only(listing, config.only)
    if not listing.splits.get("train"):
        raise DataError(f"{config.root!r} ({layout}) has no training image. Images end in {', '.join(EXTENSIONS)}.")
    return listing


def _only(listing: Listing, names: tuple[str, ...]) -> Listing:
    """The listing with some of its classes, counted from 0."""
    if not listing.classes:
        raise DataError(f"data.only = {', '.join(names)}: this layout ({listing.layout}) has no classes.")
    check_known("data.only", names, listing.classes)
    places = {listing.classes.index(name): i for i, name in enumerate(names)}
    splits = {
        split: [replace(s, label=places[s.label]) for s in part if s.label in places]
        for split, part in listing.splits.items()
    }
    return Listing(listing.layout, splits, names, listing.notes)


def _layout(root: Path) -> str:
    if root.is_file():
        if tarfile.is_tarfile(root):
            return "classes"
        raise DataError(f"data.root = {str(root)!r} is a file, but no tar file. Give a folder of images.")
    if any((root / split / name).is_file() for split in (".", "train") for name in METADATA):
        return "metadata"
    train = root / "train" if (root / "train").is_dir() else root
    folders = [p for p in train.iterdir() if p.is_dir() and not p.name.startswith(".")]
    images = any(p.suffix.lower() in EXTENSIONS for p in train.iterdir() if p.is_file())
    return "classes" if folders and not images else "images"


def _split_folders(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        return {"train": root}
    wanted = {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}
    found = {split: next((root / n for n in names if (root / n).is_dir()), None) for split, names in wanted.items()}
    return {split: folder for split, folder in found.items() if folder is not None}


def _digits(config: DiffusionDataConfig) -> Listing:
    _, labels = shifted.target()
    splits = {
        split: [Sample(f"{split}/{shifted.CLASSES[labels[i]]}/{i:04d}", "", int(labels[i]), row=i) for i in rows]
        for split, rows in shifted.rows(config.shots, config.split_seed).items()
    }
    return Listing(shifted.NAME, splits, shifted.CLASSES)


def _bare(folder: Path, root: Path) -> list[Sample]:
    """Images of a folder itself; what else is in it is an error, as it is easily an image of an unknown kind."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if odd := [p for p in files if p.suffix.lower() not in EXTENSIONS]:
        raise DataError(
            f"{str(odd[0])!r} is no image ({', '.join(EXTENSIONS)}); {len(odd)} of {len(files)} files in {folder} are "
            "none. Take them out, or write a metadata.jsonl that lists the images."
        )
    return [Sample(p.relative_to(root).as_posix(), str(p)) for p in files]


def _classes(root: Path, config: DiffusionDataConfig) -> Listing:
    names = ("", "", "")
    classes, splits = class_folders(root, names, config.classes, EXTENSIONS, "image", _expected)
    found = {s: [Sample(name, path, label) for name, label, path in part] for s, part in splits.items()}
    return Listing("classes", found, classes)


def _expected() -> str:
    return (
        "Expected ROOT/CLASS/IMAGE, ROOT/train/CLASS/IMAGE, a bare folder of images, or images beside a metadata.jsonl."
    )


def _tar(root: Path, config: DiffusionDataConfig) -> Listing:
    """``SPLIT/CLASS/IMAGE`` or ``CLASS/IMAGE`` in a tar file, read in place."""
    members: dict[str, dict[str, list[Sample]]] = {}
    splits = {"train": "train", "test": "test", **dict.fromkeys(VAL_NAMES, "val")}
    with tarfile.open(root, "r:") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or PurePosixPath(member.name).suffix.lower() not in EXTENSIONS or len(parts) < 2:
                continue
            split = splits.get(parts[-3], "train") if len(parts) > 2 else "train"
            sample = Sample(member.name, str(root), offset=member.offset_data, size=member.size)
            members.setdefault(split, {}).setdefault(parts[-2], []).append(sample)
    if "train" not in members:
        raise DataError(f"{str(root)!r} has no SPLIT/CLASS/IMAGE or CLASS/IMAGE. It must be an uncompressed tar file.")
    classes = config.classes or tuple(sorted(members["train"]))
    found: dict[str, list[Sample]] = {}
    for split, folders in members.items():
        check_known(split, folders, classes)
        found[split] = [
            Sample(s.name, s.path, label, offset=s.offset, size=s.size)
            for label, name in enumerate(classes)
            for s in sorted(folders.get(name, []), key=lambda s: s.name)
        ]
    if lost := [c for c in classes if c not in members["train"]]:
        raise DataError(f"{str(root)!r} has no training image of: {some(lost)}. {closest(lost[0], members['train'])}")
    return Listing("classes", found, classes)


def _metadata(folder: Path, config: DiffusionDataConfig) -> list[Sample]:
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{folder} has no {' or '.join(METADATA)}, unlike the training folder.")
    rows = _rows(file)
    column = config.caption_column
    samples, lost = [], []
    for number, row in enumerate(rows, start=1):
        name = row.get("file_name")
        if not name:
            raise DataError(f"{file}, entry {number}: there is no file_name. {closest('file_name', row)}")
        captions = _captions(row, column, file, number)
        if not (folder / str(name)).is_file():
            lost.append(str(name))
            continue
        samples.append(Sample(str(name), str(folder / str(name)), captions=captions))
    if lost and not config.skip_bad:
        raise DataError(
            f"{file} lists {len(lost)} of {len(rows)} images that do not exist: {some(lost, 3)}. Complete the folder, "
            "or set skip_bad (--skip-bad) to leave them out."
        )
    return samples


def _rows(file: Path) -> list[Mapping[str, Any]]:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    if file.suffix == ".csv":
        return [dict(row) for row in csv.DictReader(text.splitlines())]
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f'{file}, line {number} is no JSON object: write {{"file_name": ..., "text": ...}}.')
        rows.append(row)
    return rows


def _captions(row: Mapping[str, Any], column: str, file: Path, number: int) -> tuple[str, ...]:
    if column not in row:
        columns = [c for c in row if c != "file_name"]
        if not columns:
            return ()
        raise DataError(f"{file}, entry {number}: there is no column {column!r}. {closest(column, columns)}")
    value = row[column]
    texts = value if isinstance(value, list) else [value]
    if odd := [t for t in texts if t is not None and not isinstance(t, str)]:
        raise DataError(f"{file}, entry {number}: a caption is a text or a list of texts, got {odd[0]!r}.")
    return tuple(t.strip() for t in texts if t and t.strip())
