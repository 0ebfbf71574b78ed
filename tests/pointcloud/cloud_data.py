"""Tiny clouds and data sets in the layouts of the real ones."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Array = np.ndarray[Any, Any]

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
_TWELVE = "013 032 467 475 045 051 237 276 026 064 157 173"  # two triangles a side
SIDES = np.array([[int(c) for c in face] for face in _TWELVE.split()])


def cloud(label: int = 0, number: int = 0, count: int = 64) -> Array:
    """Points of an ellipsoid whose shape tells the label, [count, 3] float32."""
    rng = np.random.default_rng([label, number])
    p = rng.standard_normal((count, 3))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    return (p * (1 + np.eye(3)[label % 3] * (1 + label)) + 3).astype(np.float32)


def normals(count: int = 64, seed: int = 0) -> Array:
    n = np.random.default_rng(seed).standard_normal((count, 3))
    return (n / np.linalg.norm(n, axis=1, keepdims=True)).astype(np.float32)


def with_normals(label: int = 0, number: int = 0, count: int = 64) -> Array:
    return np.concatenate([cloud(label, number, count), normals(count)], 1)


def folder(root: Path, classes: dict[str, int], suffix: str = ".npy", count: int = 64) -> Path:
    for label, (name, size) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(size):
            points = cloud(label, i, count)
            file = root / name / f"{i:03d}{suffix}"
            np.save(file, points) if suffix == ".npy" else np.savetxt(file, points)
    return root


def ply(
    path: Path, points: Array, faces: Array | None = None, order: str = "binary_little_endian", **more: Any
) -> Path:
    """A PLY file; further columns by name."""
    names = {"f": "float", "u": "uchar", "i": "int"}
    columns: dict[str, Array] = {"x": points[:, 0], "y": points[:, 1], "z": points[:, 2]}
    columns |= {n: np.asarray(v) for n, v in more.items()}
    columns = {n: v.astype("f4") if v.dtype.kind == "f" else v for n, v in columns.items()}
    head = [f"ply\nformat {order} 1.0\ncomment made by a test\nelement vertex {len(points)}"]
    head += [f"property {names[v.dtype.kind]} {n}" for n, v in columns.items()]
    if faces is not None:
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    text = "\n".join([*head, "end_header"]) + "\n"
    if order == "ascii":
        rows = [" ".join(str(v[i]) for v in columns.values()) for i in range(len(points))]
        rows += [" ".join(map(str, [len(f), *f])) for f in (faces if faces is not None else ())]
        path.write_text(text + "\n".join(rows) + "\n")
        return path
    end = "<" if "little" in order else ">"
    kind = {"f": "f4", "u": "u1", "i": "i4"}
    table = np.zeros(len(points), [(n, end + kind[v.dtype.kind]) for n, v in columns.items()])
    for name, values in columns.items():
        table[name] = values
    body = table.tobytes()
    for face in faces if faces is not None else ():
        body += bytes([len(face)]) + np.asarray(face, end + "i4").tobytes()
    path.write_bytes(text.encode() + body)
    return path


def obj(path: Path, vertices: Array = CUBE, faces: Array = SIDES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"v {x} {y} {z}" for x, y, z in vertices] + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
    path.write_text("\n".join(lines) + "\n")
    return path


def hdf5(
    path: Path, labels: Sequence[int], count: int = 64, keys: tuple[str, str] = ("data", "label"), **more: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[keys[0]] = np.stack([cloud(v, i, count) for i, v in enumerate(labels)])
        file[keys[1]] = np.array(labels, np.int64)
        for key, value in more.items():
            file[key] = value
    return path


def modelnet_txt(root: Path, names: Sequence[str], train: int = 3, test: int = 2, number: int = 40) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"modelnet{number}_shape_names.txt").write_text("\n".join(names) + "\n")
    for split, size, first in (("train", train, 1), ("test", test, train + 1)):
        ids = [f"{name}_{i:04d}" for name in names for i in range(first, first + size)]
        (root / f"modelnet{number}_{split}.txt").write_text("\n".join(ids) + "\n")
        for key in ids:
            name = key.rpartition("_")[0]
            (root / name).mkdir(exist_ok=True)
            np.savetxt(root / name / f"{key}.txt", with_normals(names.index(name), int(key[-4:])), "%.6f", ",")
    return root


def modelnet_dat(root: Path, labels: int, each: int = 3, number: int = 40, protocol: int = 4) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        points = [with_normals(v, i) for v in range(labels) for i in range(each)]
        told = [np.array([v], np.int32) for v in range(labels) for _ in range(each)]
        with (root / f"modelnet{number}_{split}_8192pts_fps.dat").open("wb") as file:
            pickle.dump([points, told], file, protocol=protocol)
    return root


def episode(root: Path, way: int, shot: int, fold: int, spelling: str = "{}way_{}shot") -> Path:
    place = root / spelling.format(way, shot)
    place.mkdir(parents=True, exist_ok=True)
    items = {
        split: [(with_normals(v, i), v, 10 + v) for v in range(way) for i in range(size)]
        for split, size in (("train", shot), ("test", 20))
    }
    with (place / f"{fold}.pkl").open("wb") as file:
        pickle.dump(items, file)
    return place


def shapenetpart(root: Path, categories: dict[str, tuple[str, int, int]], each: int = 3) -> Path:
    """Category -> (folder, first part, number of parts)."""
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}\t{place}" for name, (place, _, _) in categories.items()]
    (root / "synsetoffset2category.txt").write_text("\n".join(lines) + "\n")
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c, (place, first, parts) in enumerate(categories.values()):
        (root / place).mkdir()
        for split in lists:
            for i in range(each):
                key = f"{split}{i}"
                points = with_normals(c, i)
                label = first + (np.arange(len(points)) % parts)
                np.savetxt(root / place / f"{key}.txt", np.concatenate([points, label[:, None]], 1), "%.6f")
                lists[split].append(f"shape_data/{place}/{key}")
    (root / "train_test_split").mkdir()
    for split, rows in lists.items():
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(rows))
    return root
