"""ShapeNetPart: 16,881 objects of 16 categories, every point labelled with one of 50 parts.

``synsetoffset2category.txt`` (name and folder a line; category = line), ``FOLDER/ID.txt`` with lines of x, y, z, normal
and part (0 to 49), ``train_test_split/shuffled_{train,val,test}_file_list.json``. Published results train on train and
val together (``data.splits=trainval``).

Source: Yi et al., SIGGRAPH Asia 2016.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.errors import DataError
from peft_suite.pointcloud.listing import Listing, Sample, named, some

if TYPE_CHECKING:
    from peft_suite.pointcloud.data import PointDataConfig

__all__ = ["PARTS", "classes", "read_shapenetpart"]

_COUNTS = {  # parts of each category, numbered through
    **{"Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2},
    **{"Lamp": 4, "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3},
}
_STARTS = {name: sum(list(_COUNTS.values())[:i]) for i, name in enumerate(_COUNTS)}
PARTS: Mapping[str, tuple[int, ...]] = {n: tuple(range(_STARTS[n], _STARTS[n] + k)) for n, k in _COUNTS.items()}
_FOLDER = "shapenetcore_partanno_segmentation_benchmark_v0_normal"


def classes(config: PointDataConfig) -> tuple[str, ...]:
    """The categories in the order of synsetoffset2category.txt."""
    return named(config, tuple(_categories(_root(config))), "this folder")


def read_shapenetpart(config: PointDataConfig) -> Listing:
    """Clouds with their category as label; parts are the labels of their points.

    Raises:
        DataError: lists or clouds are missing.
    """
    root = _root(config)
    folders = {offset: i for i, offset in enumerate(_categories(root).values())}
    splits: dict[str, list[Sample]] = {}
    for split in ("train", "val", "test"):
        file = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        try:
            rows = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{str(file)!r} cannot be read: {error}.") from error
        splits[split] = []
        for row in sorted(rows):
            offset, _, key = str(row).removeprefix("shape_data/").partition("/")
            if offset not in folders:
                raise DataError(f"{str(file)!r}: {row!r} is of no category of synsetoffset2category.txt.")
            name = f"{offset}/{key}.txt"
            splits[split].append(Sample(name, folders[offset], str(root / name)))
        lost = [s.name for s in splits[split] if not Path(s.path).is_file()]
        if lost and not config.skip_bad:
            raise DataError(f"{len(lost)} of {len(rows)} clouds of {file.name} do not exist: {some(lost, 3)}.")
    if config.splits == "trainval":
        splits = {"train": splits["train"] + splits["val"], "test": splits["test"]}
    splits = {split: part for split, part in splits.items() if part}
    return Listing(classes(config), splits, layout="shapenetpart", fixed=True)


def _root(config: PointDataConfig) -> Path:
    root = Path(config.root)
    root = root / _FOLDER if (root / _FOLDER).is_dir() else root
    if not (root / "synsetoffset2category.txt").is_file():
        raise DataError(f"{str(root)!r} has no synsetoffset2category.txt. Give the folder {_FOLDER}.")
    return root


def _categories(root: Path) -> dict[str, str]:
    """Category -> folder."""
    lines = (root / "synsetoffset2category.txt").read_text("utf-8-sig").splitlines()
    return {words[0]: words[1] for line in lines if len(words := line.split()) == 2}
