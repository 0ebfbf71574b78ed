"""CIFAR-10 and CIFAR-100 in the binary version: fixed records of labels and 3,072 pixel bytes, nothing to unpickle.

CIFAR-10: ``data_batch_1.bin`` .. ``data_batch_5.bin``, ``test_batch.bin``, records of 1 + 3072 bytes. CIFAR-100:
``train.bin``, ``test.bin``, records of coarse label, fine label and 3072 bytes (red, green, blue planes of 32x32);
the fine label is the class. The Python version of the archives holds pickles, which are never opened.

Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from peft_suite.vision.data import ImageDataConfig
    from peft_suite.vision.lists import Listing, Sample

__all__ = ["PICKLED", "is_cifar_binary", "is_cifar_pickle", "read_cifar"]

_TEN = ("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin")
_PIXELS = 3 * 32 * 32
PICKLED = (
    "It holds the Python version, whose pickles are never opened: take the binary version (cifar-10-binary.tar.gz, "
    "cifar-100-binary.tar.gz), or image files in a folder per class."
)


def is_cifar_binary(folder: Path) -> bool:
    """Does the folder hold the binary version?"""
    return (folder / _TEN[0]).is_file() or ((folder / "train.bin").is_file() and (folder / "test.bin").is_file())


def is_cifar_pickle(folder: Path) -> bool:
    """Does the folder hold the Python version, which is made of pickles?"""
    ten = (folder / "data_batch_1").is_file() and (folder / "batches.meta").is_file()
    return ten or all((folder / name).is_file() for name in ("train", "test", "meta"))


def read_cifar(config: ImageDataConfig) -> Listing:
    """Train and test; without a validation split, one is held out of train as for any data.

    Raises:
        DataError: a file is missing or has another length than its records need.
    """
    from peft_suite.vision.lists import Listing, Sample

    folder = Path(config.root)
    if not is_cifar_binary(folder):
        advice = PICKLED if is_cifar_pickle(folder) else "Unpack the binary version there."
        raise DataError(f"{config.root!r} holds neither data_batch_1.bin nor train.bin and test.bin. {advice}")
    hundred = (folder / "train.bin").is_file()
    files = (
        {"train": ("train.bin",), "test": ("test.bin",)} if hundred else {"train": _TEN, "test": ("test_batch.bin",)}
    )
    classes = config.classes or _names(folder, hundred)
    splits: dict[str, list[Sample]] = {}
    openers: dict[str, Callable[[Sample], Image.Image]] = {}
    for split, names in files.items():
        data = b"".join(_records(folder / name, 2 if hundred else 1) for name in names)
        size = _PIXELS + (2 if hundred else 1)
        labels = data[size - _PIXELS - 1 :: size]
        if wrong := [v for v in labels if v >= len(classes)]:
            raise DataError(f"{config.root!r}, {split}: label {wrong[0]} is out of range 0 to {len(classes) - 1}.")
        splits[split] = [Sample(f"{split}-{i:05d}", (label,), row=i) for i, label in enumerate(labels)]
        openers[split] = _opener(data, size)
    return Listing(classes, splits, layout="cifar-binary", openers=openers)


def _records(file: Path, labels: int) -> bytes:
    if not file.is_file():
        raise DataError(
            f"{str(file)!r} does not exist. The binary version of CIFAR has all its .bin files in one folder."
        )
    data = file.read_bytes()
    if not data or len(data) % (_PIXELS + labels):
        raise DataError(f"{str(file)!r} has {len(data):,} bytes, no multiple of {_PIXELS + labels}: it is damaged.")
    return data


def _names(folder: Path, hundred: bool) -> tuple[str, ...]:
    file = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    names = file.read_text("utf-8").split() if file.is_file() else []
    count = 100 if hundred else 10
    return tuple(names) if len(names) == count else tuple(str(i) for i in range(count))


def _opener(data: bytes, size: int) -> Callable[[Sample], Image.Image]:
    import numpy as np
    from PIL import Image

    records = np.frombuffer(data, np.uint8).reshape(-1, size)[:, -_PIXELS:]

    def open_row(sample: Sample) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(records[sample.row].reshape(3, 32, 32).transpose(1, 2, 0)))

    return open_row
