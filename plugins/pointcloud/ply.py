"""PLY files: clouds and meshes, text and binary, polygons and triangle strips."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError, from_columns

__all__ = ["read_ply", "read_ply_mesh"]

_TYPES = {
    **{"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2"},
    **{"uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}
_ORDER = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LIST = ("vertex_indices", "vertex_index")

_Element = tuple[str, int, list[tuple[str, str, str]]]  # name, rows, (property, type, type of a list's length or "")


def read_ply(path: Path, mesh_points: int, seed: int) -> Cloud:
    """The vertices, or points of the area where there are faces."""
    columns, faces = _read(path)
    if faces is None:
        return from_columns(columns)
    from peft_suite.pointcloud.meshes import sample_area

    return sample_area(from_columns(columns).points, faces, mesh_points, seed)


def read_ply_mesh(path: Path) -> tuple[Array, Array]:
    """Vertices ``[V, 3]`` and triangles ``[F, 3]``."""
    columns, faces = _read(path)
    if faces is None:
        raise UnreadableError(f"a mesh without faces ({len(next(iter(columns.values())))} vertices)")
    return from_columns(columns).points, faces


def _read(path: Path) -> tuple[dict[str, Array], Array | None]:
    columns: dict[str, Array] = {}
    faces: Array | None = None
    with path.open("rb") as file:
        order, elements = _header(file)
        body = file.read()
    words = body.split() if not order else []
    at = 0
    for name, rows, fields in elements:
        lists = [f for f in fields if f[2]]
        if not lists:
            if order:
                kind = np.dtype([(f, order + t) for f, t, _ in fields])
                if len(body) - at < rows * kind.itemsize:
                    raise UnreadableError(f"truncated: {(len(body) - at) // kind.itemsize} of {rows} {name} rows")
                values = np.frombuffer(body, kind, rows, at)
                at += rows * kind.itemsize
                found = {f: values[f] for f, _, _ in fields}
            else:
                width = len(fields)
                if len(words) - at < rows * width:
                    raise UnreadableError(f"truncated: {(len(words) - at) // width} of {rows} {name} rows")
                numbers = np.array(words[at : at + rows * width], np.float64).reshape(rows, width)
                at += rows * width
                found = {f: numbers[:, i].astype(t) for i, (f, t, _) in enumerate(fields)}
            columns = found if name == "vertex" else columns
            continue
        if name not in ("face", "tristrips") or not any(f[0] in _LIST for f in lists):
            break  # what comes after it is not needed
        loops, at = _lists(body if order else words, at, order, rows, fields, name)
        parts = [_strip(loop) if name == "tristrips" else _fan(loop) for loop in loops]
        if parts:
            faces = np.concatenate(parts) if faces is None else np.concatenate([faces, *parts])
    if not columns:
        raise UnreadableError("no vertices")
    return columns, faces


def _header(file: BinaryIO) -> tuple[str, list[_Element]]:
    if file.readline(16).strip() != b"ply":
        raise UnreadableError("no PLY file, it does not begin with 'ply'")
    order, elements = None, list[_Element]()
    while line := file.readline(4096):
        words = line.decode("ascii", "replace").split()
        if not words:
            continue
        if words[0] == "end_header":
            if order is None:
                break
            return order, elements
        try:
            if words[0] == "format":
                order = _ORDER[words[1]]
            elif words[0] == "element":
                elements.append((words[1], int(words[2]), []))
            elif words[0] == "property" and words[1] == "list":
                elements[-1][2].append((words[4], _TYPES[words[3]], _TYPES[words[2]]))
            elif words[0] == "property":
                elements[-1][2].append((words[2], _TYPES[words[1]], ""))
        except (IndexError, KeyError, ValueError) as error:
            raise UnreadableError(f"a PLY header with the line {' '.join(words)!r}") from error
    raise UnreadableError("a PLY header that does not end")


def _lists(
    body: bytes | list[bytes], at: int, order: str, rows: int, fields: list[tuple[str, str, str]], name: str
) -> tuple[list[Array], int]:
    """The index lists of all rows, as arrays [rows alike, length], and where they end."""
    if isinstance(body, bytes) and len(fields) == 1 and rows > 1:  # rows of one length, as nearly always
        _, kind, size = fields[0]
        first = int(np.frombuffer(body, order + size, 1, at)[0]) if len(body) >= at + int(size[1]) else -1
        row = np.dtype([("n", order + size), ("v", order + kind, (max(first, 0),))])
        if first > 0 and len(body) - at >= rows * row.itemsize:
            values = np.frombuffer(body, row, rows, at)
            if (values["n"] == first).all():
                return [values["v"].reshape(rows, first).astype(np.int64)], at + rows * row.itemsize
    loops = []
    for done in range(rows):
        for field, kind, size in fields:
            try:
                if isinstance(body, list):
                    count = int(body[at]) if size else 1
                    at += bool(size)
                    values = np.array(body[at : at + count], np.float64)
                    at += count
                else:
                    count = int(np.frombuffer(body, order + size, 1, at)[0]) if size else 1
                    at += int(size[1]) if size else 0
                    values = np.frombuffer(body, order + kind, count, at)
                    at += count * int(kind[1])
            except (ValueError, IndexError) as error:
                raise UnreadableError(f"truncated: {done} of {rows} {name} rows") from error
            if len(values) != count:
                raise UnreadableError(f"truncated: {done} of {rows} {name} rows")
            if field in _LIST:
                loops.append(values.astype(np.int64)[None])
    return loops, at


def _fan(polygons: Array) -> Array:
    """Polygons ``[P, n]`` cut into triangles ``[P (n − 2), 3]`` around their first vertex."""
    n = polygons.shape[1]
    return np.stack([polygons[:, [0, i, i + 1]] for i in range(1, n - 1)], 1).reshape(-1, 3) if n > 2 else _none()


def _strip(strips: Array) -> Array:
    """Strips ``[1, n]``, cut at −1: each vertex after the second closes a triangle with the two before it."""
    parts = []
    for strip in np.split(strips[0], np.flatnonzero(strips[0] < 0)):
        strip = strip[strip >= 0]
        if len(strip) > 2:
            faces = np.stack([strip[:-2], strip[1:-1], strip[2:]], 1)
            faces[1::2] = faces[1::2, ::-1]  # every second one winds the other way
            parts.append(faces)
    return np.concatenate(parts) if parts else _none()


def _none() -> Array:
    return np.empty((0, 3), np.int64)
