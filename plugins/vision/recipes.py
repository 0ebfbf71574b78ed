"""The suites of visual PEFT and the recipes of its papers; one YAML file per method and suite lies in ``recipes/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_suite.errors import DataError, UnknownNameError
from peft_suite.train.suites import Book, Suite
from peft_suite.vision import fewshot, fgvc, vtab

__all__ = ["CIFAR10", "CIFAR100", "FEW_SHOT", "FGVC", "VTAB", "book"]


def _fields(format: str, **more: Any) -> Mapping[str, Any]:
    return {"data": {"format": format, **more}}


def _few_shot(task: str) -> tuple[str, int]:
    """``"food101-4"`` as the data set and its number of images per class."""
    name, _, shots = task.rpartition("-")
    return name, int(shots)


def _find_few_shot(name: str) -> str:
    base, _, shots = name.rpartition("-")
    if shots.isdecimal() and int(shots) in fewshot.SHOTS:
        return f"{fewshot.find_few_shot(base).name}-{int(shots)}"
    raise UnknownNameError("few-shot task", name, FEW_SHOT.tasks, "A task is a data set and its images per class.")


def _find_one(name: str) -> str:
    if name in ("cifar100", "cifar-100", "cifar"):
        return "cifar100"
    raise UnknownNameError("task of cifar100", name, ["cifar100"])


_STEPS = {20: 4, 100: 20, 500: 100}  # images per class -> steps of an epoch, five classes and 25 images a step


def _few_images(shots: int) -> Mapping[str, Any]:
    """400 steps, a tenth of them warm-up."""
    epochs = 400 // _STEPS[shots]
    return {"data": {"shots": shots}, "recipe": {"epochs": epochs, "warmup_epochs": epochs / 10, "eval_every": epochs}}


def _find_count(name: str) -> str:
    count = name.removesuffix("-images")
    if count.isdecimal() and int(count) in _STEPS:
        return f"{int(count)}-images"
    raise UnknownNameError("task of cifar10", name, [f"{shots}-images" for shots in _STEPS])


def _missing_cifar(root: str, task: str, data: Mapping[str, Any]) -> str:
    from peft_suite.vision.data import ImageDataConfig
    from peft_suite.vision.lists import detect_format

    try:
        layout = detect_format(ImageDataConfig(root=root))
    except DataError as error:
        return str(error)
    folders = [Path(root) / name for name in ("train", "test")]
    ready = layout != "folder" or all(folder.is_dir() for folder in folders)
    return "" if ready else f"{root!r} has no folders train and test."


VTAB = Suite(
    "vtab",
    "VTAB-1k, 19 tasks of 1,000 images",
    vtab.GROUPS,
    fields=lambda task: _fields("vtab", task=task),
    missing=lambda root, task, data: vtab.check_layout(root, task),
    find=lambda name: vtab.find_task(name).name,
)
FGVC = Suite(
    "fgvc",
    "FGVC, five fine-grained data sets",
    {"FGVC": tuple(fgvc.DATASETS)},
    fields=lambda task: _fields("fgvc", task=task),
    missing=lambda root, task, data: fgvc.check_fgvc(root, task, str(data.get("splits") or "")),
    find=lambda name: fgvc.find_set(name).name,
)
FEW_SHOT = Suite(
    "few-shot",
    "Few-shot FGVC, five data sets with 1 to 16 images per class",
    {
        f"{shots} shot{'s' if shots > 1 else ''}": tuple(f"{name}-{shots}" for name in fewshot.DATASETS)
        for shots in fewshot.SHOTS
    },
    fields=lambda task: _fields("few-shot", task=_few_shot(task)[0], shots=_few_shot(task)[1]),
    missing=lambda root, task, data: fewshot.check_few_shot(root, *_few_shot(task)),
    find=_find_few_shot,
)
CIFAR100 = Suite(
    "cifar100",
    "CIFAR-100, all 50,000 training images",
    {"CIFAR-100": ("cifar100",)},
    fields=lambda task: {"data": {"val_fraction": 0.0}},
    missing=_missing_cifar,
    find=_find_one,
)

CIFAR10 = Suite(
    "cifar10",
    "Five classes of CIFAR-10 for a small ViT that was trained on the other five; 400 steps of 25 images",
    {"images per class": tuple(f"{shots}-images" for shots in _STEPS)},
    fields=lambda task: _few_images(int(task.partition("-")[0])),
    missing=_missing_cifar,
    find=_find_count,
)

book = Book("peft_suite.vision", (VTAB, FGVC, FEW_SHOT, CIFAR100, CIFAR10))
