"""Triangle meshes, and points drawn from their area."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.errors import MissingExtraError
from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError

__all__ = ["read_mesh", "sample_area"]


def read_mesh(path: Path) -> tuple[Array, Array]:
    """Vertices ``[V, 3]`` and triangles ``[F, 3]`` of an .obj, .off, .stl or .ply file."""
    if path.suffix.lower() == ".ply":
        from peft_suite.pointcloud.ply import read_ply_mesh

        return read_ply_mesh(path)
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtraError(
            f"{path.suffix} files need trimesh. Run: pip install 'peft-suite[pointcloud]'"
        ) from error
    mesh: Any = trimesh.load(path, process=False, force="mesh", skip_materials=True)
    faces = getattr(mesh, "faces", None)
    if faces is None or not len(faces):
        raise UnreadableError(f"a mesh without faces ({len(getattr(mesh, 'vertices', ()))} vertices)")
    return np.asarray(mesh.vertices, np.float64), np.asarray(faces, np.int64)


def sample_area(vertices: Array, faces: Array, count: int, seed: int) -> Cloud:
    """``count`` points with normals, uniform over the surface.

    A triangle (a, b, c) is drawn with a chance in proportion to its area, a point of it as
    a + √u (1 − v) (b − a) + √u v (c − a) for uniform u and v.
    """
    if not len(faces):
        raise UnreadableError(f"a mesh without faces ({len(vertices)} vertices)")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise UnreadableError(f"a face names vertex {int(faces.max())}, and there are {len(vertices)}")
    if not np.isfinite(vertices).all():
        raise UnreadableError("vertices have a coordinate that is NaN or infinite")
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    cross = np.cross(b - a, c - a)
    double = np.linalg.norm(cross, axis=1)
    total = np.cumsum(double)
    if not total[-1] > 0:
        raise UnreadableError(f"a mesh of {len(faces)} faces without any area")
    rng = np.random.default_rng(seed)
    pick = np.searchsorted(total, rng.random(count) * total[-1], side="right").clip(max=len(faces) - 1)
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    points = a[pick] + u * (1 - v) * (b - a)[pick] + u * v * (c - a)[pick]
    normals = cross[pick] / double[pick, None]
    return Cloud(points, normals.astype(np.float32))
