"""Other libraries' kNN and farthest point sampling on the CPU, behind one call form, for side-by-side timing.

`knn_peers()` and `fps_peers()` return {name: factory}. A factory takes the inputs and a thread count, converts the
inputs (not timed) and returns a function to time; tree builds are inside that function. It raises `MissingError` with
the reason where the library cannot be used. Call `pin(threads)` first thing in the process, before heavy imports: some
libraries size their thread pools once, from the processors that the process may use.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["MissingError", "fps_peers", "knn_peers", "pin"]

Run = Callable[[], Any]
KnnFactory = Callable[[torch.Tensor, torch.Tensor, int, int], Run]
FpsFactory = Callable[[torch.Tensor, int, int], Run]


class MissingError(Exception):
    """The peer cannot run here; the text says why."""


def pin(threads: int) -> None:
    """Keep the process on `threads` processors and tell every library so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch.set_num_threads(threads)


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise MissingError(f"{name}: {type(error).__name__}: {error}") from error


def _cdist(mode: str) -> KnnFactory:
    def factory(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
        pairs = query.shape[0] * query.shape[1] * points.shape[1]
        if pairs > 1 << 28:
            raise MissingError(f"needs a distance matrix of {pairs * 4 / 2**30:.1f} GiB")

        def run() -> Any:
            torch.set_num_threads(threads)
            return torch.cdist(query, points, compute_mode=mode).topk(k, dim=-1, largest=False)

        return run

    return factory


def _chunked(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
    """Differences for as many queries at once as give 256k pairs, then topk."""
    step = max((1 << 18) // points.shape[1], 1)

    def run() -> Any:
        torch.set_num_threads(threads)
        parts = []
        for queries, cloud in zip(query, points, strict=True):
            for part in queries.split(step):
                d = part[:, None] - cloud
                d = d[..., 0].square() + d[..., 1].square() + d[..., 2].square()
                parts.append(d.topk(k, dim=-1, largest=False))
        return parts

    return run


def _scipy(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
    tree = _load("scipy.spatial").cKDTree
    clouds, sites = points.numpy(), query.numpy()
    return lambda: [tree(c).query(q, k=k, workers=threads) for c, q in zip(clouds, sites, strict=True)]


def _scipy_loose(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
    tree = _load("scipy.spatial").cKDTree
    clouds, sites = points.numpy(), query.numpy()

    def run() -> Any:
        return [
            tree(c, balanced_tree=False, compact_nodes=False).query(q, k=k, workers=threads)
            for c, q in zip(clouds, sites, strict=True)
        ]

    return run


def _sklearn(algorithm: str) -> KnnFactory:
    def factory(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
        neighbors = _load("sklearn.neighbors").NearestNeighbors
        clouds, sites = points.numpy(), query.numpy()
        # a tree search with jobs starts Python threads for every call; one job is the faster way for one thread
        jobs = threads if threads > 1 else None

        def run() -> Any:
            return [
                neighbors(n_neighbors=k, algorithm=algorithm, n_jobs=jobs).fit(c).kneighbors(q)
                for c, q in zip(clouds, sites, strict=True)
            ]

        return run

    return factory


def _open3d(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
    open3d = _load("open3d")
    clouds = [open3d.core.Tensor(c.numpy()) for c in points]
    sites = [open3d.core.Tensor(q.numpy()) for q in query]

    def run() -> Any:
        results = []
        for cloud, site in zip(clouds, sites, strict=True):
            search = open3d.core.nns.NearestNeighborSearch(cloud)
            search.knn_index()
            results.append(search.knn_search(site, k))
        return results

    return run


def _faiss(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
    faiss = _load("faiss")
    clouds, sites = points.numpy(), query.numpy()

    def run() -> Any:
        faiss.omp_set_num_threads(threads)
        return [faiss.knn(q, c, k) for c, q in zip(clouds, sites, strict=True)]

    return run


def _torch_cluster_knn(query: torch.Tensor, points: torch.Tensor, k: int, threads: int) -> Run:
    """Its CPU form is a tree search on one thread (num_workers acts on CUDA only)."""
    cluster = _load("torch_cluster")
    x, y = points.flatten(0, 1), query.flatten(0, 1)
    batch_x = torch.arange(len(points)).repeat_interleave(points.shape[1])
    batch_y = torch.arange(len(points)).repeat_interleave(query.shape[1])

    def run() -> Any:
        torch.set_num_threads(threads)
        return cluster.knn(x, y, k, batch_x, batch_y)

    return run


def knn_peers() -> dict[str, KnnFactory]:
    """{name: factory(query (B, Q, 3), points (B, N, 3), k, threads)}."""
    return {
        "torch.cdist (difference) + topk": _cdist("donot_use_mm_for_euclid_dist"),
        "torch.cdist (matmul) + topk": _cdist("use_mm_for_euclid_dist"),
        "torch chunked + topk": _chunked,
        "scipy cKDTree": _scipy,
        "scipy cKDTree, loose build": _scipy_loose,
        "scikit-learn kd-tree": _sklearn("kd_tree"),
        "scikit-learn brute": _sklearn("brute"),
        "Open3D": _open3d,
        "faiss-cpu": _faiss,
        "torch_cluster": _torch_cluster_knn,
    }


def _loop(points: torch.Tensor, m: int, threads: int) -> Run:
    """The usual few lines: one pass over (B, N, 3) and one arg-max a pick."""

    def run() -> Any:
        torch.set_num_threads(threads)
        batch, size, _ = points.shape
        rows = torch.arange(batch)
        picks = torch.zeros(batch, m, dtype=torch.int64)
        dists = torch.full((batch, size), torch.inf)
        pick = picks[:, 0]
        for step in range(1, m):
            new = ((points - points[rows, pick][:, None]) ** 2).sum(-1)
            dists = torch.minimum(dists, new)
            pick = dists.argmax(-1)
            picks[:, step] = pick
        return picks

    return run


def _fpsample(name: str, **options: Any) -> FpsFactory:
    def factory(points: torch.Tensor, m: int, threads: int) -> Run:
        function = getattr(_load("fpsample"), name)
        clouds = points.numpy()
        return lambda: [function(c, m, start_idx=0, **options) for c in clouds]

    return factory


def _torch_cluster_fps(points: torch.Tensor, m: int, threads: int) -> Run:
    cluster = _load("torch_cluster")
    x = points.flatten(0, 1)
    batch = torch.arange(len(points)).repeat_interleave(points.shape[1])
    ratio = m / points.shape[1]

    def run() -> Any:
        torch.set_num_threads(threads)
        return cluster.fps(x, batch, ratio=ratio, random_start=False)

    return run


def _open3d_fps(points: torch.Tensor, m: int, threads: int) -> Run:
    open3d = _load("open3d")
    if points.shape[1] > 2000:
        raise MissingError("several seconds a cloud")
    clouds = [open3d.t.geometry.PointCloud(open3d.core.Tensor(c.numpy())) for c in points]
    return lambda: [c.farthest_point_down_sample(m) for c in clouds]


def fps_peers() -> dict[str, FpsFactory]:
    """{name: factory(points (B, N, 3), m, threads)}; fpsample's bucket forms do not honour the start."""
    return {
        "torch loop": _loop,
        "fpsample vanilla": _fpsample("fps_sampling"),
        "fpsample bucket kd-tree": _fpsample("bucket_fps_kdtree_sampling"),
        "fpsample bucket kd-line h=3": _fpsample("bucket_fps_kdline_sampling", h=3),
        "fpsample bucket kd-line h=5": _fpsample("bucket_fps_kdline_sampling", h=5),
        "fpsample bucket kd-line h=7": _fpsample("bucket_fps_kdline_sampling", h=7),
        "torch_cluster": _torch_cluster_fps,
        "Open3D": _open3d_fps,
    }
