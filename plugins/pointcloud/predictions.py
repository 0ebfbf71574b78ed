"""What a part segmentation says about files: every point of a cloud with its part, as PLY."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_suite import kernels
from peft_suite.errors import DataError
from peft_suite.pointcloud.clouds import CloudDataset
from peft_suite.pointcloud.formats import Array, UnreadableError
from peft_suite.storage import atomic

__all__ = ["InputNames", "part_inputs", "write_parts", "write_ply"]


class InputNames(list[str]):
    """File names, with the data set that reads them and the parts that each may have."""

    dataset: CloudDataset
    parts: Mapping[str, Sequence[int]]
    categories: list[str]


class _WithCategory(Dataset[Any]):
    def __init__(self, clouds: CloudDataset, categories: Sequence[int]) -> None:
        self.clouds, self.categories = clouds, categories
        self.ignored = clouds.ignored

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> Any:
        return {"points": self.clouds[index], "category": self.categories[index]}


def part_inputs(paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Any]]:
    """(:class:`InputNames`, data set of points, with their category where all are known)."""
    from peft_suite.pointcloud.data import source

    files, clouds = source.inputs(paths, preprocessing)
    assert isinstance(clouds, CloudDataset)
    names = InputNames(files)
    names.dataset, names.parts = clouds, preprocessing.get("parts", {})
    known = list(names.parts)
    folders = [Path(name).resolve().parent.name for name in files]
    names.categories = [known[0] if len(known) == 1 else folder for folder in folders]
    if not known or not set(names.categories) <= set(known):
        names.categories = [""] * len(files)
        return names, clouds
    return names, _WithCategory(clouds, [known.index(c) for c in names.categories])


def write_parts(
    names: Sequence[str], outputs: Iterator[Tensor], folder: Path, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """One PLY file per cloud, in the folders of the clouds; a point that the network did not see has the part of the
    nearest one that it saw.

    Raises:
        DataError: the names do not come from :func:`part_inputs`, or a file changed since.
    """
    if not isinstance(names, InputNames):
        raise DataError("Part predictions are written for the names that PartSource.inputs returned; pass these on.")
    paths = [Path(name).resolve() for name in names]
    top = Path(os.path.commonpath([path.parent for path in paths]))
    stems = Counter(path.with_suffix("") for path in paths)
    scores = (one for batch in outputs for one in batch)
    rows = []
    for index, (name, path, category, score) in enumerate(zip(names, paths, names.categories, scores, strict=True)):
        own = list(names.parts[category]) if category else list(range(len(classes)))
        said = torch.tensor(own)[score[:, own].argmax(1)]
        data = names.dataset
        try:
            cloud = data.reading.cloud(data.samples[index])
        except UnreadableError as error:
            raise DataError(f"{name!r} became unreadable: {error}.") from error
        whole = torch.from_numpy(np.ascontiguousarray(data.reading.goal(cloud)[:, :3]))
        near = kernels.knn(whole[None], data[index][None, :, :3].contiguous(), 1, return_dists=False).idx[0, :, 0]
        labels = said[near].numpy()
        inside = path.relative_to(top)
        alone = stems[path.with_suffix("")] == 1  # a.xyz beside a.ply keeps its whole name
        target = folder / (inside.with_suffix(".ply") if alone else inside.with_name(inside.name + ".ply"))
        with atomic(target) as file:
            write_ply(Path(file), cloud.points, labels)
        shares = np.bincount(labels, minlength=len(classes)) / len(labels)
        told = {classes[i]: round(float(shares[i]), 4) for i in np.argsort(-shares, kind="stable") if shares[i] > 0}
        rows.append({"file": name, "written": str(target), "category": category, "parts": told})
    return rows


def write_ply(path: Path, points: Array, labels: Array) -> None:
    """Points ``[N, 3]`` with ``label`` and its colour, binary; coordinates keep their precision."""
    from matplotlib import colormaps

    wide = points.dtype == np.float64
    fields = [(n, "<f8" if wide else "<f4") for n in "xyz"]
    fields += [*((n, "u1") for n in ("red", "green", "blue")), ("label", "<i4")]
    table = np.zeros(len(points), fields)
    for axis, name in enumerate("xyz"):
        table[name] = points[:, axis]
    colors = (np.asarray(colormaps["tab20"](labels % 20))[:, :3] * 255).astype(np.uint8)
    for i, name in enumerate(("red", "green", "blue")):
        table[name] = colors[:, i]
    table["label"] = labels
    spelled = {"<f8": "double", "<f4": "float", "u1": "uchar", "<i4": "int"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [*(f"property {spelled[kind]} {name}" for name, kind in fields), "end_header"]
    path.write_bytes("\n".join(lines).encode() + b"\n" + table.tobytes())
