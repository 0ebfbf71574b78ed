"""VTAB-1k: nineteen tasks of 1,000 training images each, as list files and JPEGs in the layout of NOAH and SSF.

``ROOT/<task>/{train800,val200,train800val200,test}.txt`` hold lines ``<path relative to ROOT/task> <label>``. Tune on
train800 and val200 (``splits="tune"``); report on train800val200 and test (``splits="final"``, without validation
data). The lists decide everything: nothing is held out, and a class may be without a training image.

Source: Zhai et al. 2019 (arXiv 1910.04867); list files by Zhang et al. (NOAH, 2022).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_suite.errors import DataError, UnknownNameError, closest

if TYPE_CHECKING:
    from peft_suite.vision.data import ImageDataConfig
    from peft_suite.vision.lists import Listing, Sample

__all__ = ["GROUPS", "LISTS", "TASKS", "VTABTask", "check_layout", "find_task", "read_vtab", "task_folder"]

LISTS = ("train800", "val200", "train800val200", "test")
_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}


@dataclass(frozen=True)
class VTABTask:
    """One task: its folder, group, number of classes, the usual size of the test list, and other names in use."""

    name: str
    group: str
    classes: int
    test: int
    aliases: tuple[str, ...] = ()


_TASKS = (
    VTABTask("cifar", "Natural", 100, 10_000, ("cifar100", "cifar-100")),
    VTABTask("caltech101", "Natural", 102, 6_084, ("caltech",)),
    VTABTask("dtd", "Natural", 47, 1_880),
    VTABTask("oxford_flowers102", "Natural", 102, 6_149, ("flowers", "flowers102", "oxford_flowers")),
    VTABTask("oxford_iiit_pet", "Natural", 37, 3_669, ("oxford_pet", "oxford_pets", "pet", "pets")),
    VTABTask("svhn", "Natural", 10, 26_032),
    VTABTask("sun397", "Natural", 397, 21_750, ("sun",)),
    VTABTask("patch_camelyon", "Specialized", 2, 32_768, ("camelyon",)),
    VTABTask("eurosat", "Specialized", 10, 5_400),
    VTABTask("resisc45", "Specialized", 45, 6_300, ("resisc",)),
    VTABTask("diabetic_retinopathy", "Specialized", 5, 42_670, ("retinopathy", "retino")),
    VTABTask("clevr_count", "Structured", 8, 15_000),
    VTABTask("clevr_dist", "Structured", 6, 15_000),
    VTABTask("dmlab", "Structured", 6, 22_735),
    VTABTask("kitti", "Structured", 4, 711),
    VTABTask("dsprites_loc", "Structured", 16, 73_728, ("dspr_loc",)),
    VTABTask("dsprites_ori", "Structured", 16, 73_728, ("dspr_ori",)),
    VTABTask("smallnorb_azi", "Structured", 18, 12_150, ("snorb_azi",)),
    VTABTask("smallnorb_ele", "Structured", 9, 12_150, ("snorb_ele",)),
)
TASKS: Mapping[str, VTABTask] = {task.name: task for task in _TASKS}
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(t.name for t in _TASKS if t.group == group) for group in ("Natural", "Specialized", "Structured")
}


def find_task(name: str) -> VTABTask:
    """The task of that name or alias.

    Raises:
        UnknownNameError: with the closest names.
    """
    for task in _TASKS:
        if name in (task.name, *task.aliases):
            return task
    raise UnknownNameError("VTAB task", name, TASKS, "Set data.task, or give the folder of one task as data.root.")


def task_folder(root: str, task: str) -> Path:
    """Where the lists of a task lie: ``root`` itself, or its folder in ``root`` under any of its names.

    Raises:
        DataError: there is no such folder.
    """
    path = Path(root)
    if not task or (path / "train800.txt").is_file() or (path / "train800val200.txt").is_file():
        return path
    known = find_task(task)
    for name in (known.name, *known.aliases):
        if (path / name).is_dir():
            return path / name
    have = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    if not have:
        raise DataError(f"data.root = {root!r} holds no folder. VTAB-1k is ROOT/<task>/{{{','.join(LISTS)}}}.txt.")
    raise DataError(f"{root!r} has no folder for the VTAB task {known.name!r}. {closest(known.name, have)}")


def check_layout(root: str, task: str) -> str:
    """What is missing of a task, in one sentence; "" when lists and the first image of each are there."""
    try:
        folder = task_folder(root, task)
        for name in LISTS:
            file = folder / f"{name}.txt"
            if not file.is_file():
                raise DataError(f"{str(file)!r} does not exist. {_expected(folder)}")
            with file.open(encoding="utf-8-sig") as lines:
                first = next((line.split() for line in lines if line.strip()), None)
            if first is None or len(first) != 2:
                raise DataError(f"{str(file)!r} does not begin with '<path> <label>'.")
            if not (folder / first[0]).is_file():
                raise DataError(f"{str(folder / first[0])!r}, the first image of {name}.txt, does not exist.")
    except (DataError, OSError) as error:
        return str(error)
    return ""


def read_vtab(config: ImageDataConfig) -> Listing:
    """The splits of one task.

    Raises:
        DataError: a list or an image is missing, a line is malformed, or a label is out of range.
    """
    from peft_suite.vision.lists import Listing

    folder = task_folder(config.root, config.task)
    task = find_task(config.task or folder.resolve().name)
    if config.splits == "official":
        raise DataError("data.splits = 'official' does not exist for VTAB. Use 'tune' or 'final'.")
    lists = {"train": "train800val200", "test": "test"}
    if config.splits != "final":
        lists = {"train": "train800", "val": "val200", "test": "test"}
    splits = {split: _read_list(folder, name, task, config.skip_bad) for split, name in lists.items()}
    for split, name in lists.items():
        expected = _SIZES.get(name, task.test)
        if len(splits[split]) != expected:
            warnings.warn(
                f"VTAB {task.name}: {name}.txt lists {len(splits[split]):,} images, usually it is {expected:,}. "
                "Results may not compare with published ones.",
                stacklevel=2,
            )
    classes = config.classes or tuple(str(i) for i in range(task.classes))
    return Listing(classes, splits, layout="vtab", fixed=True, task=task.name)


def _read_list(folder: Path, name: str, task: VTABTask, skip_bad: bool) -> list[Sample]:
    from peft_suite.vision.lists import Sample, some

    file = folder / f"{name}.txt"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{str(file)!r} does not exist. {_expected(folder)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{str(file)!r} is no text file: {error}.") from error
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdecimal():
            raise DataError(f"{str(file)!r}, line {number}: expected '<path> <label>', found {line.strip()!r}.")
        label = int(words[1])
        if label >= task.classes:
            raise DataError(
                f"{str(file)!r}, line {number}: label {label} is out of range, {task.name} has the classes 0 to "
                f"{task.classes - 1}. Is this folder another task? Set data.task."
            )
        samples.append(Sample(words[0], (label,), str(folder / words[0])))
    if not samples:
        raise DataError(f"{str(file)!r} lists no image.")
    lost = [s.path for s in samples if not os.path.isfile(s.path)]
    if lost and not skip_bad:
        raise DataError(
            f"{len(lost)} of {len(samples)} images of {name}.txt do not exist: {some(lost, 3)}. Paths are relative to "
            f"{str(folder)!r}."
        )
    return samples


def _expected(folder: Path) -> str:
    inside = sorted(os.listdir(folder))[:8] if folder.is_dir() else []
    there = f" There is: {', '.join(inside)}." if inside else " The folder does not exist or is empty."
    lists = ", ".join(f"{name}.txt" for name in LISTS)
    return f"A VTAB task has {lists} and images/.{there}"
