"""Surfaces of real objects, sampled: all back ends agree, with and without float64. Needs a folder of OBJ meshes.

PEFT_SUITE_MESHES=<folder> pytest tests/kernels/test_real_geometry.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from clouds import Place, places

from peft_suite import kernels

FOLDER = Path(os.environ.get("PEFT_SUITE_MESHES", "/nowhere"))
MESHES = sorted(FOLDER.glob("*.obj"))
pytestmark = pytest.mark.skipif(not MESHES, reason="set PEFT_SUITE_MESHES to a folder of OBJ files")


def sampled(path: Path, count: int) -> torch.Tensor:
    """(1, count, 3) points spread evenly over the surface, centred, in the unit ball."""
    corners, faces = [], []
    for line in path.read_text(errors="replace").splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            corners.append([float(v) for v in rest[:3]])
        elif kind == "f":
            ring = [int(v.split("/")[0]) - 1 for v in rest]
            faces += [[ring[0], ring[i], ring[i + 1]] for i in range(1, len(ring) - 1)]
    triangle = torch.tensor(corners)[torch.tensor(faces)]  # (F, 3, 3)
    edges = triangle[:, 1:] - triangle[:, :1]
    area = torch.linalg.cross(edges[:, 0], edges[:, 1]).norm(dim=-1)
    make = torch.Generator().manual_seed(0)
    face = torch.multinomial(area, count, replacement=True, generator=make)
    u, v = torch.rand(2, count, 1, generator=make)
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    points = triangle[face, 0] + u * edges[face, 0] + v * edges[face, 1]
    points = points - points.mean(0)
    return (points / points.norm(dim=-1).max())[None]


@pytest.mark.parametrize("place", places("numba", "scipy"))
@pytest.mark.parametrize("mesh", MESHES, ids=lambda p: p.stem)
def test_back_ends_agree_on_surfaces(place: Place, mesh: Path) -> None:
    points = sampled(mesh, 8192)
    with kernels.use_backend("torch"):
        picks = kernels.farthest_point_sampling(points, 128, rule="pointnet2")
        centres = kernels.gather_points(points, picks)
        near, hits = kernels.knn(centres, points, 32), kernels.ball_query(centres, points, 0.1, 32)
    exact = (centres.double()[:, :, None] - points.double()[:, None]).square().sum(-1).sort(-1).values[..., :32]
    assert near.dists is not None
    torch.testing.assert_close(near.dists.double(), exact, rtol=1e-5, atol=1e-12)
    with place() as device:
        moved, queries = points.to(device), centres.to(device)
        found = kernels.knn(queries, moved, 32)
        assert torch.equal(found.idx.cpu(), near.idx) and torch.equal(found.dists.cpu(), near.dists)  # type: ignore[union-attr]
        if place.backend != "scipy":
            again = kernels.farthest_point_sampling(moved, 128, rule="pointnet2")
            assert torch.equal(again.cpu(), picks)
            assert torch.equal(kernels.ball_query(queries, moved, 0.1, 32).cpu(), hits)  # type: ignore[union-attr, arg-type]
