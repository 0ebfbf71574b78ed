"""The geometry stage of a point transformer against the same in plain torch operations, side by side in one run.

    python benchmarks/pointcloud/geometry.py --points 1024,2048,8192 --batch 8 --rounds 9
    python benchmarks/pointcloud/geometry.py --quick

Farthest points, groups of 32 nearest neighbours, PointGST's graph bases, and all three in a row, with one group per 16
points; resampling 8192 to 1200 points; and the frozen tokenizer, whose plain form concatenates before its third
convolution. Plain: a loop over picks, ``cdist`` and ``topk`` and indexing, a dense Laplacian and ``torch.linalg.eigh``.
Every answer is checked against ours before it is timed; one that differs is marked. Each round times every variant
once, in turn. "faster" is what a variant's time is as a multiple of ours; the target is a lower bound for it. Other
libraries (fpsample, Open3D, torch_cluster, ...) stand in the table where they are installed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_suite import kernels
from peft_suite.pointcloud.methods.pointgst import Spectrum
from peft_suite.pointcloud.models.geometry import Geometry, Grouping
from peft_suite.pointcloud.models.tokenizer import MiniPointNet

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peers_cpu
import plain
import table
from measure import machine, markdown, synchronise
from points import Variant, compete, exact_fps, exact_knn, neighbours, peers
from steps import GROUP, clouds, numbers

SIZE, LOCAL, WIDTH = 32, 32, 384  # points of a group, centres of a run, width of a token
STORED, RESAMPLED = 8192, 1200
STAGE, RESAMPLING = 3.0, 10.0  # targets
PLAIN = "plain torch"


class Stage:
    """One shape: our modules, the plain functions, and what is measured."""

    def __init__(self, batch: int, points: int, device: str, threads: int, with_peers: bool) -> None:
        torch.manual_seed(0)
        self.x, self.device, self.threads, self.peers = clouds(batch, points).to(device), device, threads, with_peers
        self.shape = f"{batch}x{points}"
        self.groups = points // GROUP
        self.grouping, self.spectrum = Grouping(self.groups, SIZE), Spectrum(LOCAL, False)
        self.geometry: Geometry = self.grouping(self.x)
        self.cpu = device == "cpu"

    def fps(self) -> list[Variant]:
        """Farthest points."""
        ours = functools.partial(self.grouping.sample, self.x)
        found = [variant("peft-suite", ours), variant(PLAIN, lambda: plain.centers(self.x, self.groups))]
        found[1].note = mark(torch.equal(found[1].run(), self.geometry.centers), "other picks")
        return found + self.others(peers_cpu.fps_peers, ("fpsample", "Open3D", "torch_cluster"), self.groups)

    def knn(self) -> list[Variant]:
        """Neighbours of the centres."""
        x, centers = self.x, self.geometry.centers
        found = [
            variant("peft-suite", lambda: kernels.knn(centers, x, SIZE, return_dists=False).idx),
            variant(PLAIN, lambda: torch.cdist(centers, x).topk(SIZE, dim=2, largest=False).indices),
        ]
        found[1].note = mark(self.same_neighbors(found[1].run()), "other neighbours")
        names = ("scipy cKDTree", "scikit-learn kd-tree", "Open3D", "faiss-cpu", "torch_cluster")
        return found + self.others(peers_cpu.knn_peers, names, SIZE)

    def group(self) -> list[Variant]:
        """Neighbours and where they lie from their centre."""
        x, centers = self.x, self.geometry.centers

        def ours() -> Tensor:
            return kernels.group_relative(x, centers, kernels.knn(centers, x, SIZE, return_dists=False).idx)

        found = [variant("peft-suite", ours), variant(PLAIN, lambda: plain.group(x, centers, SIZE))]
        idx, near = found[1].run()
        good = self.same_neighbors(idx) and close(near.norm(dim=-1).sum(2), self.radii())
        found[1].note = mark(good, "other neighbours")
        return found

    def same_neighbors(self, idx: Tensor) -> bool:
        """Whether these are the geometry's, in any order."""
        return torch.equal(idx.sort(2).values, self.geometry.neighbors.sort(2).values)

    def basis(self) -> list[Variant]:
        """Eigenvectors of the clouds' graphs and of their runs'."""
        centers = self.geometry.centers
        found = [
            variant("peft-suite", lambda: self.spectrum.bases(centers)),
            variant(PLAIN, lambda: plain.basis(centers, LOCAL)),
        ]
        whole, parts, order = found[1].run()
        runs = kernels.gather_points(centers, order).view(-1, LOCAL, 3)
        good = diagonal(centers, whole) and diagonal(runs, parts.flatten(0, 1))
        found[1].note = mark(good and torch.equal(order, found[0].run()[2]), "other graph")
        return found

    def stage(self) -> list[Variant]:
        """Everything that a forward of PointGST needs."""
        x = self.x

        def plainly() -> Any:
            middle = plain.centers(x, self.groups)
            return plain.group(x, middle, SIZE), plain.basis(middle, LOCAL)

        found = [variant("peft-suite", lambda: self.spectrum(self.grouping(x))), variant(PLAIN, plainly)]
        found[1].note = mark(close(found[1].run()[0][1].norm(dim=-1).sum(2), self.radii()), "other groups")
        return found

    def tokens(self) -> list[Variant]:
        """Groups to tokens, frozen."""
        ours = MiniPointNet(WIDTH).to(self.device).eval().requires_grad_(False)
        published, groups = plain.PlainTokenizer(ours).eval(), self.geometry.groups
        found = [variant("peft-suite", lambda: ours(groups)), variant(PLAIN, lambda: published(groups))]
        found[1].note = mark(close(found[1].run(), found[0].run()), "other tokens")
        return found

    def radii(self) -> Tensor:
        """Summed distances of every group's points from its centre, ``[B, G]``."""
        lengths: Tensor = self.geometry.groups.norm(dim=-1)
        return lengths.sum(2)

    def others(self, registry: Callable[[], dict[str, Any]], names: Sequence[str], count: int) -> list[Variant]:
        """Other libraries' ways, on the CPU, checked."""
        if not self.cpu or not self.peers:
            return []
        chosen = {name: f for name, f in registry().items() if name.startswith(tuple(names))}
        n, centers = self.x.shape[1], self.geometry.centers
        if registry is peers_cpu.fps_peers:
            found = peers(chosen, self.x, count, self.threads)
            wanted = kernels.farthest_point_sampling(self.x, count)
            for v in found:
                v.note = exact_fps(v.run(), wanted, n)
            return found
        found = peers(chosen, centers, self.x, count, self.threads)
        dists = kernels.knn(centers, self.x, count).dists
        assert dists is not None
        for v in found:
            v.note = exact_knn(neighbours(v.name, v.run(), n), centers, self.x, dists)
        return found


def resampling(batch: int, device: str, threads: int, with_peers: bool) -> list[Variant]:
    """What the published training loops do to every batch of ModelNet40."""
    stage = Stage(batch, STORED, device, threads, with_peers)
    x = stage.x
    found = [
        variant("peft-suite", lambda: kernels.gather_points(x, kernels.farthest_point_sampling(x, RESAMPLED))),
        variant(PLAIN, lambda: plain.centers(x, RESAMPLED)),
    ]
    found[1].note = mark(torch.equal(found[1].run(), found[0].run()), "other picks")
    return found + stage.others(peers_cpu.fps_peers, ("fpsample", "Open3D", "torch_cluster"), RESAMPLED)


def variant(name: str, call: Callable[[], Any]) -> Variant:
    """A variant that waits for the GPU."""

    def run() -> Any:
        with torch.no_grad():
            answer = call()
        synchronise()
        return answer

    return Variant(name, run)


def mark(same: bool, otherwise: str) -> str:
    """The note of a row."""
    return "" if same else otherwise


def close(a: Tensor, b: Tensor) -> bool:
    """Equal within rounding of sums."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def diagonal(points: Tensor, vectors: Tensor) -> bool:
    """Whether these vectors diagonalise our Laplacian of the points: ``Uᵀ L U`` is diagonal, ``[B, G, G]``."""
    found = vectors.mT @ kernels.graph_laplacian(points) @ vectors
    return bool((found - torch.diag_embed(found.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4)


def rows_of(
    op: str, shape: str, device: str, threads: int, target: float | None, variants: list[Variant], rounds: int
) -> list[dict[str, Any]]:
    """Time the variants, one row each; the target stands in the row of the plain one."""
    compete(variants, rounds)
    for v in variants:
        v.device = device
    rows = table.rows(op, shape, threads, variants)
    for row in rows:
        row["faster"] = round(row["median_ms"] / rows[0]["median_ms"], 2)
        row["target"] = target if target and row["variant"] == PLAIN else ""
    print(f"{device} {op} {shape}: {rows[1]['faster']:.1f}", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="clouds (8)")
    parser.add_argument("--points", type=numbers, help="of a cloud, one or more numbers (1024,2048,8192)")
    parser.add_argument("--rounds", type=int, help="9; with --quick 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", help="cpu, cuda or both: cpu,cuda; default: cpu, and cuda where there is one")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="other libraries, if there")
    parser.add_argument("--quick", action="store_true", help="1024 points, three rounds: within a minute")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    peers_cpu.pin(args.threads)
    rounds = args.rounds or (3 if args.quick else 9)
    devices = (args.device or ("cpu,cuda" if torch.cuda.is_available() else "cpu")).split(",")
    rows: list[dict[str, Any]] = []
    for device in devices:
        for points in args.points or ([1024] if args.quick else [1024, 2048, 8192]):
            stage = Stage(args.batch, points, device, args.threads, args.peer)
            for op, build, target in (
                ("farthest points", stage.fps, None),
                ("neighbours", stage.knn, None),
                ("neighbours and groups", stage.group, None),
                ("graph bases", stage.basis, None),
                ("whole stage", stage.stage, STAGE),
                ("frozen tokenizer", stage.tokens, None),
            ):
                shape = f"{stage.shape}, {stage.groups} groups"
                rows += rows_of(op, shape, device, args.threads, target, build(), rounds)
        variants = resampling(args.batch, device, args.threads, args.peer)
        shape = f"{args.batch}x{STORED} to {RESAMPLED}"
        rows += rows_of("resampling", shape, device, args.threads, RESAMPLING, variants, rounds)
    table.show("Geometry", rows)
    path = args.out / f"geometry{'-quick' if args.quick else ''}"
    table.write(path, rows)
    keys = ("op", "shape", "device", "variant", "median_ms", "faster", "target", "note")
    names = " and ".join(machine(device) for device in devices)
    note = f"{names}, {args.threads} thread(s), medians of {rounds} rounds. {table.versions()}."
    cells = [{key: str(row[key]) for key in keys} for row in rows]
    path.with_suffix(".md").write_text(markdown(cells) + f"\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
