"""The suites of point-cloud PEFT and the recipes of its papers, one YAML file per method and suite in ``recipes/``.

All papers of the field inherit one protocol (Yu et al., Point-BERT, CVPR 2022): AdamW at 5e-4 with weight decay 0.05,
batches of 32, gradients clipped at norm 10, a cosine over 300 epochs (150 for few shots) after 10 of warm-up; and they
report the best epoch on the test split. Here a recipe trains on all training clouds and reports the last epoch; what
repeats a paper's choice on test data is a recipe of its own, whose name ends in ``-paper``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_suite.errors import DataError, UnknownNameError
from peft_suite.pointcloud.scanobjectnn import VARIANTS
from peft_suite.train.suites import Book, Suite

__all__ = ["FEW_SHOT", "MODELNET40", "SCANOBJECTNN", "SHAPENETPART", "book"]

EPISODES = {f"{way}way-{shots}shot": (way, shots) for way in (5, 10) for shots in (10, 20)}
FOLDS = 10


def _fields(format: str, **more: Any) -> Mapping[str, Any]:
    return {"data": {"format": format, **more}}


def _finder(suite: str, tasks: Sequence[str]) -> Callable[[str], str]:
    """Names of tasks however their words are joined: ``OBJ_BG`` is ``obj-bg``, ``5way10shot`` is ``5way-10shot``."""
    plain = {_letters(task): task for task in tasks}

    def find(name: str) -> str:
        if _letters(name) not in plain:
            raise UnknownNameError(f"task of {suite}", name, tasks)
        return plain[_letters(name)]

    return find


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _missing(read: Callable[[str, str], Any]) -> Callable[[str, str, Mapping[str, Any]], str]:
    """What ``read(root, task)`` has to complain about."""

    def missing(root: str, task: str, data: Mapping[str, Any]) -> str:
        try:
            read(root, task)
        except DataError as error:
            return str(error)
        return ""

    return missing


def _scanobjectnn(root: str, task: str) -> None:
    from peft_suite.pointcloud.data import PointDataConfig
    from peft_suite.pointcloud.scanobjectnn import read_scanobjectnn

    with warnings.catch_warnings():  # unusual sizes are said when the run reads them
        warnings.simplefilter("ignore")
        read_scanobjectnn(PointDataConfig(root=root, format="scanobjectnn", variant=task))


def _modelnet(root: str, task: str) -> None:
    from peft_suite.pointcloud.data import PointDataConfig
    from peft_suite.pointcloud.listing import layout_classes

    layout_classes(PointDataConfig(root=root, format="modelnet", variant="40"))


def _episodes(root: str, task: str) -> None:
    from peft_suite.pointcloud.fewshot import check_episodes

    check_episodes(root, *EPISODES[task], FOLDS)


def _parts(root: str, task: str) -> None:
    from peft_suite.pointcloud.listing import layout_classes
    from peft_suite.pointcloud.parts import PartDataConfig

    layout_classes(PartDataConfig(root=root, format="shapenetpart"))


SCANOBJECTNN = Suite(
    "scanobjectnn",
    "ScanObjectNN, scanned objects of 15 classes in three variants",
    {"ScanObjectNN": tuple(VARIANTS)},
    fields=lambda task: _fields("scanobjectnn", variant=task),
    missing=_missing(_scanobjectnn),
    find=_finder("scanobjectnn", tuple(VARIANTS)),
)
MODELNET40 = Suite(
    "modelnet40",
    "ModelNet40, 12,311 CAD models of 40 classes, 1024 points",
    {"ModelNet40": ("modelnet40",)},
    fields=lambda task: _fields("modelnet", variant="40"),
    missing=_missing(_modelnet),
    find=_finder("modelnet40", ("modelnet40",)),
)
FEW_SHOT = Suite(
    "few-shot",
    "Few-shot episodes of ModelNet40, ten folds each; seed k takes fold k",
    {"ModelNet few-shot": tuple(EPISODES)},
    fields=lambda task: _fields("few-shot", way=EPISODES[task][0], shots=EPISODES[task][1]),
    missing=_missing(_episodes),
    find=_finder("few-shot", tuple(EPISODES)),
)
SHAPENETPART = Suite(
    "shapenetpart",
    "ShapeNetPart, a part for every point of 16,881 objects of 16 categories",
    {"ShapeNetPart": ("shapenetpart",)},
    fields=lambda task: {"task": "segmentation", **_fields("shapenetpart")},
    missing=_missing(_parts),
    find=_finder("shapenetpart", ("shapenetpart",)),
)

book = Book("peft_suite.pointcloud", (SCANOBJECTNN, MODELNET40, FEW_SHOT, SHAPENETPART))
