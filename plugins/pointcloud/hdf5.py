"""HDF5 files with many clouds: points ``[n, N, 3 or more]`` and labels ``[n]`` or ``[n, 1]``.

ROOT is one file (train; validation and test are held out of it), or a folder whose files are named by split:
``train*.h5``, ``val*.h5``, ``test*.h5``, several of a split in the order of their names. Class names come from
``data.classes`` or ROOT/shape_names.txt, else they are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_suite.errors import DataError, MissingExtraError, closest
from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError, scaled_colors, table
from peft_suite.pointcloud.listing import HDF5, VAL_NAMES, Listing, Sample, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["ArrayReader", "list_arrays", "read_array", "read_hdf5", "shapes"]

DATA_KEYS = ("data", "points", "xyz")
LABEL_KEYS = ("label", "labels", "class")
EXTRA_KEYS: Mapping[str, tuple[str, ...]] = {
    "normals": ("normal", "normals"),
    "colors": ("color", "colors", "rgb"),
    "labels": ("pid", "seg", "part"),
}


class ArrayReader:
    """Clouds of HDF5 files, which are opened when the first one is asked for and then stay in memory."""

    def __init__(self, data_key: str, columns: Sequence[str] = ()) -> None:
        self.data_key, self.columns = data_key, tuple(columns)
        self._files: dict[str, dict[str, Array]] = {}

    def __call__(self, sample: Sample) -> Cloud:
        if sample.path not in self._files:
            have = shapes(sample.path)
            keys = {name: next((k for k in usual if k in have), "") for name, usual in EXTRA_KEYS.items()}
            wanted = {"points": self.data_key, **{name: key for name, key in keys.items() if key}}
            self._files[sample.path] = {name: read_array(sample.path, key) for name, key in wanted.items()}
        arrays = {name: values[sample.row] for name, values in self._files[sample.path].items()}
        cloud = table(arrays.pop("points"), self.columns)
        for name, values in arrays.items():
            if len(values) != len(cloud.points):
                raise UnreadableError(f"{len(cloud.points)} points and {len(values)} {name}")
            setattr(cloud, name, scaled_colors(values) if name == "colors" else values)
        cloud.labels = cloud.labels.astype(np.int64).ravel() if cloud.labels is not None else None
        return cloud


def read_hdf5(config: PointDataConfig) -> Listing:
    """Splits of a file or a folder of files.

    Raises:
        DataError: no such files, keys that they do not have (the found ones are listed), labels of another length.
    """
    root = Path(config.root)
    files = _files(root, config)
    places = {split: [str(p) for p in part] for split, part in files.items()}
    base = root if root.is_dir() else root.parent
    names = config.classes or _names(base / "shape_names.txt")
    splits = list_arrays(places, base, config.data_key, config.label_key)
    most = max(sample.label for part in splits.values() for sample in part)
    if names and most >= len(names):
        raise DataError(f"{config.root!r}: label {most} is out of range, there are {len(names)} class names.")
    keys = {key_of(shapes(p), config.data_key, DATA_KEYS, "data_key", p) for part in places.values() for p in part}
    if len(keys) > 1:
        raise DataError(f"{config.root!r}: the files keep points under {some(sorted(keys))}. Set data.data_key.")
    reader = ArrayReader(keys.pop(), config.column_names)
    return Listing(
        names or tuple(str(i) for i in range(most + 1)), splits, "hdf5", readers=dict.fromkeys(splits, reader)
    )


def list_arrays(
    places: Mapping[str, Sequence[str]], base: Path, data_key: str = "", label_key: str = ""
) -> dict[str, list[Sample]]:
    """Samples of the files of every split; labels are read, points are not."""
    splits: dict[str, list[Sample]] = {}
    for split, files in places.items():
        splits[split] = []
        for file in files:
            have = shapes(file)
            data = key_of(have, data_key, DATA_KEYS, "data_key", file)
            label = key_of(have, label_key, LABEL_KEYS, "label_key", file)
            labels = read_array(file, label)
            if len(have[data]) != 3 or have[data][2] < 3:
                raise DataError(f"{file!r}: {data!r} has the shape {list(have[data])} instead of [n, N, 3 or more].")
            if labels.size != len(labels) or len(labels) != have[data][0]:
                raise DataError(
                    f"{file!r}: {data!r} has {have[data][0]} clouds and {label!r} the shape {list(labels.shape)}; "
                    "one label per cloud is needed."
                )
            labels = labels.reshape(-1)
            if labels.dtype.kind not in "iu" or (len(labels) and int(labels.min()) < 0):
                raise DataError(f"{file!r}: {label!r} holds {labels.dtype}; labels are whole numbers from 0.")
            name = Path(file).relative_to(base).as_posix()
            splits[split] += [Sample(f"{name}[{i}]", int(v), file, i) for i, v in enumerate(labels)]
        if not splits[split]:
            raise DataError(f"The {split} files {some(list(files), 3)} hold no cloud.")
    return splits


def shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of a file, those in groups as "group/name"."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, item: Any) -> None:
        if hasattr(item, "shape"):
            found[name] = tuple(item.shape)

    with _open(file) as opened:
        opened.visititems(note)
    return found


def read_array(file: str, key: str) -> Array:
    """One array, whole.

    Raises:
        DataError: the file has no such array, or is damaged.
    """
    with _open(file) as opened:
        if key not in opened:
            raise DataError(f"{file!r} has no array {key!r}. {closest(key, shapes(file))}")
        try:
            return np.asarray(opened[key])
        except OSError as error:
            raise DataError(f"{file!r}: {key!r} cannot be read ({error}); the file is damaged.") from error


def key_of(have: Mapping[str, Any], given: str, usual: Sequence[str], field: str, file: str) -> str:
    """The name of an array: the given one, or the first usual one.

    Raises:
        DataError: lists the arrays that there are.
    """
    for key in (given,) if given else usual:
        if key in have:
            return key
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in have.items()) or "none"
    raise DataError(
        f"{file!r} has no array {(given or ' or '.join(usual))!r}. Arrays there: {listed}. Set data.{field}."
    )


def _open(file: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("HDF5 files need h5py. Run: pip install 'peft-suite[pointcloud]'") from error
    try:
        return h5py.File(file, "r")
    except FileNotFoundError as error:
        raise DataError(f"{file!r} does not exist.") from error
    except OSError as error:
        raise DataError(f"{file!r} cannot be read as HDF5 ({error}); it is truncated or another format.") from error


def _files(root: Path, config: PointDataConfig) -> dict[str, list[Path]]:
    if root.is_file():
        return {"train": [root]}
    have = sorted(p for p in root.iterdir() if p.suffix.lower() in HDF5) if root.is_dir() else []
    files = {}
    for split, given, usual in (
        ("train", config.train, ("train",)),
        ("val", config.val, VAL_NAMES),
        ("test", config.test, ("test",)),
    ):
        found = [p for p in have if p.name.lower().startswith((given,) if given else usual) or p.name == given]
        if given and not found:
            raise DataError(f"{str(root)!r} has no file {given!r}. {closest(given, [p.name for p in have])}")
        if found:
            files[split] = found
    if "train" not in files:
        raise DataError(
            f"{str(root)!r} has no HDF5 file named train*: {some([p.name for p in have]) or 'no HDF5 file at all'}. "
            "Rename it, or set data.train."
        )
    return files


def _names(file: Path) -> tuple[str, ...]:
    return tuple(file.read_text("utf-8-sig").split()) if file.is_file() else ()
