"""One cloud from one file: points with optional normals, colours, intensity and a label of every point.

Meshes (.obj, .off, .stl, and .ply with faces) become points by sampling their area. Coordinates keep the precision of
the file, so that those of a survey (six digits before the point) survive until they are centred.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.errors import ConfigError, DataError, MissingExtraError, closest

__all__ = ["EXTENSIONS", "MESHES", "Array", "Cloud", "UnreadableError", "fault", "parse_columns", "read_cloud", "table"]

Array = np.ndarray[Any, Any]

EXTENSIONS = (
    *(".ply", ".obj", ".off", ".stl", ".pcd", ".npy", ".npz"),
    *(".txt", ".csv", ".xyz", ".pts", ".bin", ".las", ".laz"),
)
MESHES = (".obj", ".off", ".stl", ".ply")
COLUMNS = ("x", "y", "z", "nx", "ny", "nz", "r", "g", "b", "intensity", "label", "_")
_ALIASES = {
    **{"normal_x": "nx", "normal_y": "ny", "normal_z": "nz"},
    **{"red": "r", "green": "g", "blue": "b", "diffuse_red": "r", "diffuse_green": "g", "diffuse_blue": "b"},
    **{"i": "intensity", "scalar_intensity": "intensity", "reflectance": "intensity"},
    **dict.fromkeys(("labels", "class", "part", "seg", "scalar_label", "classification", "semantic"), "label"),
}
_KEYS = {  # of .npz files
    "points": ("points", "xyz", "pos", "data", "pc", "arr_0"),
    "normals": ("normals", "normal"),
    "colors": ("colors", "colours", "rgb", "color"),
    "intensity": ("intensity",),
    "labels": ("labels", "label", "seg", "part", "pid"),
}


class UnreadableError(Exception):
    """Why a file is no cloud, without its name."""


@dataclass
class Cloud:
    """Points ``[N, 3]``; normals ``[N, 3]``, colours ``[N, 3]`` in 0..1, intensity ``[N]``, labels ``[N]`` or None."""

    points: Array
    normals: Array | None = None
    colors: Array | None = None
    intensity: Array | None = None
    labels: Array | None = None

    def take(self, rows: Array) -> Cloud:
        """The cloud of these rows."""
        parts = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return replace(self, **parts)


def read_cloud(
    path: str | Path, *, columns: str = "", mesh_points: int = 8192, seed: int = 0, labelled: bool = False
) -> Cloud:
    """The cloud of a file.

    Args:
        path: its extension says the format; see :data:`EXTENSIONS`.
        columns: what the columns of .txt, .csv, .xyz, .pts, .npy and .bin files are, such as "x y z _ r g b label"
            ("_" skips one). Without it a header line says so, or else their number does: 3 xyz; 4 xyz, intensity; 6 xyz
            and normals where these have length 1, colours otherwise; 7 xyz, normals, label (.pts: xyz, intensity,
            colours); 9 xyz, colours, normals.
        mesh_points: points drawn from the area of a mesh.
        seed: of that draw.
        labelled: the last column of a table is a label.

    Raises:
        DataError: names the file and says what is wrong with it.
        MissingExtraError: the format needs a package that is not installed.
    """
    try:
        return parse(Path(path), columns=columns, mesh_points=mesh_points, seed=seed, labelled=labelled)
    except UnreadableError as error:
        raise DataError(f"{str(path)!r}: {error}.") from error


def parse(path: Path, *, columns: str = "", mesh_points: int = 8192, seed: int = 0, labelled: bool = False) -> Cloud:
    """As :func:`read_cloud`, with :class:`UnreadableError` for what is wrong."""
    kind = path.suffix.lower()
    if kind not in EXTENSIONS:
        raise UnreadableError(f"unknown extension {path.suffix!r}. {closest(kind, EXTENSIONS)[:-1]}")
    names = parse_columns(columns) if columns else ()
    try:
        if os.path.getsize(path) == 0:
            raise UnreadableError("the file is empty")
        if kind == ".ply":
            from peft_suite.pointcloud.ply import read_ply

            cloud = read_ply(path, mesh_points, seed)
        elif kind in MESHES:
            from peft_suite.pointcloud.meshes import read_mesh, sample_area

            cloud = sample_area(*read_mesh(path), mesh_points, seed)
        elif kind == ".pcd":
            from peft_suite.pointcloud.pcd import read_pcd

            cloud = read_pcd(path)
        elif kind in (".las", ".laz"):
            cloud = _las(path, labelled)
        elif kind == ".npz":
            cloud = _npz(path)
        elif kind == ".npy":
            cloud = table(np.load(path, allow_pickle=False), names, labelled)
        elif kind == ".bin":
            cloud = _bin(path, names or ("x", "y", "z", "intensity"))
        else:
            cloud = _text(path, names, labelled)
    except (UnreadableError, MissingExtraError):
        raise
    except FileNotFoundError as error:
        raise UnreadableError("the file does not exist") from error
    except Exception as error:  # of third-party readers too
        raise UnreadableError(f"not readable as {kind[1:].upper()} ({_short(error)})") from error
    return cloud


def fault(points: Array, minimum: int = 1) -> str:
    """What makes points ``[N, 3]`` unusable, "" for nothing: a shape, too few, NaN, all of them equal."""
    if points.ndim != 2 or points.shape[1] != 3:
        return f"points have the shape {list(points.shape)} instead of [N, 3]"
    if len(points) < max(1, minimum):
        return f"{len(points)} points, and at least {max(1, minimum)} are needed (data.min_points)"
    low, high = points.min(0), points.max(0)  # NaN wins in both
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        bad = int((~np.isfinite(points).all(1)).sum())
        return f"{bad} of {len(points)} points have a coordinate that is NaN or infinite"
    return f"all {len(points)} points are equal" if len(points) > 1 and (low == high).all() else ""


def parse_columns(text: str) -> tuple[str, ...]:
    """Column names from "x y z _ label" (blanks or commas).

    Raises:
        ConfigError: an unknown or repeated name, or no x, y, z.
    """
    names = tuple(_ALIASES.get(n.lower(), n.lower()) for n in text.replace(",", " ").split())
    if unknown := [n for n in names if n not in COLUMNS]:
        raise ConfigError(f"data.columns = {text!r}: unknown column {unknown[0]!r}. {closest(unknown[0], COLUMNS)}")
    used = [n for n in names if n != "_"]
    if len(set(used)) != len(used) or not {"x", "y", "z"} <= set(used):
        raise ConfigError(f"data.columns = {text!r}: name x, y and z, and no column twice ('_' skips one).")
    return names


def table(values: Array, names: Sequence[str] = (), labelled: bool = False, kind: str = "") -> Cloud:
    """Rows ``[N, columns]`` as a cloud."""
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UnreadableError(f"an array {list(values.shape)} of {values.dtype} instead of numbers [N, 3 or more]")
    names = names or _guess(values, labelled, kind)
    if len(names) != values.shape[1]:
        raise UnreadableError(f"{values.shape[1]} columns, and data.columns names {len(names)}")
    return from_columns({name: values[:, i] for i, name in enumerate(names) if name != "_"})


def from_columns(columns: dict[str, Array]) -> Cloud:
    """A cloud from single columns ``[N]``, whose names may be aliases."""
    found = {_ALIASES.get(name.lower(), name.lower()): value for name, value in columns.items()}
    if lost := [n for n in "xyz" if n not in found]:
        raise UnreadableError(f"no column {lost[0]!r}; it has {', '.join(columns)}")

    def three(a: str, b: str, c: str) -> Array | None:
        return np.stack([found[a], found[b], found[c]], 1) if {a, b, c} <= found.keys() else None

    points, normals, colors = three("x", "y", "z"), three("nx", "ny", "nz"), three("r", "g", "b")
    assert points is not None
    return Cloud(_real(points), _real(normals), scaled_colors(colors), _real(found.get("intensity")), _whole(found))


def scaled_colors(colors: Array | None) -> Array | None:
    """Colours in 0..1: integers by their range (16-bit ones that stay below 256 count as 8), floats above 1 by 255."""
    if colors is None or not colors.size:
        return None
    most = float(colors.max())
    top = (255 if most < 256 else 65535) if colors.dtype.kind in "ui" or most > 1 else 1
    return (colors / top).astype(np.float32)


def _real(values: Array | None) -> Any:
    if values is None:
        return None
    return np.ascontiguousarray(values, np.float32 if values.dtype.itemsize <= 4 else np.float64)


def _whole(found: dict[str, Array]) -> Array | None:
    values = found.get("label")
    if values is None:
        return None
    labels = values.astype(np.int64)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (labels == values).all()):
        raise UnreadableError("the label column holds values that are no whole numbers")
    return labels


def _guess(values: Array, labelled: bool, kind: str) -> tuple[str, ...]:
    count = values.shape[1] - labelled
    xyz, normals, colors = ("x", "y", "z"), ("nx", "ny", "nz"), ("r", "g", "b")
    if count == 6:
        length = np.linalg.norm(values[:1000, 3:6].astype(np.float64), axis=1)
        names: tuple[str, ...] = xyz + (normals if (abs(length - 1) < 0.02).mean() > 0.9 else colors)
    elif count == 7 and kind != ".pts":
        names = (*xyz, *normals, "label" if not labelled else "_")
    elif count in (3, 4, 7, 9):
        names = (*xyz, *{3: (), 4: ("intensity",), 7: ("intensity", *colors), 9: (*colors, *normals)}[count])
    else:
        raise UnreadableError(
            f"{values.shape[1]} columns of unknown meaning; set data.columns, such as 'x y z _ label'"
        )
    return (*names, "label") if labelled else names


def _text(path: Path, names: tuple[str, ...], labelled: bool) -> Cloud:
    """Lines of numbers separated by blanks, commas or semicolons; a header or the number of points may come first."""
    text = path.read_text("utf-8-sig").replace(",", " ").replace(";", " ")
    start = 0
    while True:  # comments, a header, the number of points
        end = text.find("\n", start)
        words = text[start : end if end >= 0 else None].split()
        if words and not words[0].startswith(("#", "//")) and len(words) > 1 and _number(words[0]):
            break
        header = [w.lower() for w in words if w not in ("#", "//")]
        if not names and {"x", "y", "z"} <= set(header):
            names = tuple(n if (n := _ALIASES.get(h, h)) in COLUMNS else "_" for h in header)
        if end < 0:
            raise UnreadableError("no line of numbers")
        start = end + 1
    width = len(words)
    body = text[start:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            values = np.fromstring(body, np.float64, sep=" ")
        except ValueError:  # older numpy stops at what is no number and warns
            values = np.empty(0)
    rows = body.count("\n") + (not body.endswith("\n"))
    if values.size != rows * width:  # blank lines, comments, or something is wrong
        kept = [line for line in body.split("\n") if line.strip() and not line.lstrip().startswith(("#", "//"))]
        for number, line in enumerate(kept, 1):
            count = len(line.split())
            if count != width or not all(map(_number, line.split())):
                where = "the last line" if number == len(kept) else f"data line {number}"
                what = f"{count} of {width} values" if count != width else "no numbers"
                raise UnreadableError(f"{where} has {what}: {line.strip()[:60]!r}")
        values = np.array(" ".join(kept).split(), np.float64)
    return table(values.reshape(-1, width), names, labelled, path.suffix.lower())


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _bin(path: Path, names: Sequence[str]) -> Cloud:
    row = 4 * len(names)
    if (size := os.path.getsize(path)) % row:
        raise UnreadableError(f"truncated: {size} bytes are no multiple of {row} ({len(names)} float32 values a point)")
    return table(np.fromfile(path, "<f4").reshape(-1, len(names)), names)


def _npz(path: Path) -> Cloud:
    with np.load(path, allow_pickle=False) as file:
        found = {field: next((k for k in keys if k in file), "") for field, keys in _KEYS.items()}
        if not found["points"]:
            raise UnreadableError(f"no array named {' or '.join(_KEYS['points'][:3])}; it has {', '.join(file.files)}")
        parts = {field: file[key] for field, key in found.items() if key}
    points = parts.pop("points")
    cloud = table(points)
    for field, values in parts.items():
        if len(values) != len(points):
            raise UnreadableError(f"{len(points)} points and {len(values)} {field}")
    if "labels" in parts:
        cloud.labels = _whole({"label": parts["labels"].reshape(len(points))})
    cloud.normals = _real(parts.get("normals", cloud.normals))
    cloud.colors = scaled_colors(parts["colors"]) if "colors" in parts else cloud.colors
    cloud.intensity = _real(parts.get("intensity", cloud.intensity))
    return cloud


def _las(path: Path, labelled: bool) -> Cloud:
    try:
        import laspy
    except ImportError as error:
        raise MissingExtraError(".las and .laz files need laspy. Run: pip install 'laspy[lazrs]'") from error
    las = laspy.read(path)
    if len(las.points) != las.header.point_count:
        raise UnreadableError(f"truncated: {len(las.points)} of {las.header.point_count} points")
    there = set(las.point_format.dimension_names)
    columns: dict[str, Callable[[], Any]] = {
        "x": lambda: np.asarray(las.x),
        "y": lambda: np.asarray(las.y),
        "z": lambda: np.asarray(las.z),
    }
    for name in ("red", "green", "blue", "intensity", "classification"):
        if name in there and (name != "classification" or labelled):
            columns[name] = lambda name=name: np.asarray(las[name])  # type: ignore[misc]
    return from_columns({name: read() for name, read in columns.items()})


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:160] or type(error).__name__).rstrip(".")
