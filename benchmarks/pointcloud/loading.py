"""Data loading: clouds per second on one core, our data source against plain loops over the same data.

    python benchmarks/pointcloud/loading.py [--clouds 96] [--rounds 5] [--out benchmarks/pointcloud/results]

Generated clouds of 8192 points become batches of 32 clouds of 1024 points. The plain loop does what the official
training loop does: read, centre and scale, farthest points of the whole batch to 1200 in torch operations (one step per
sample), a random subset of 1024, scale-translate; evaluation takes the farthest 1024. Ours is the plugin's data set
behind the training loop's loader. One thread, no worker processes. A ratio above 1 means ours is faster. "In memory" is
what a run sees from its second epoch on: clouds are read and normalised once, and those that are only evaluated are
sampled once. The plain loop runs on fewer clouds, its time per cloud does not depend on their number. Two more rows
read text and meshes; they have no counterpart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_suite.pointcloud.data import PointDataConfig, source
from peft_suite.pointcloud.formats import read_cloud
from peft_suite.train.loader import batches, epoch_plan

BATCH, POINTS, STORED = 32, 1024, 8192


def write_clouds(root: Path, count: int) -> None:
    """Ellipsoids of two classes with normals, as .npy."""
    rng = np.random.default_rng(0)
    for i in range(count):
        p = rng.standard_normal((STORED, 3))
        p /= np.linalg.norm(p, axis=1, keepdims=True)
        file = root / f"class{i % 2}" / f"{i:05d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.concatenate([p * rng.uniform(0.4, 1, 3), p], 1).astype(np.float32))


def plain_fps(points: Tensor, count: int) -> Tensor:
    """Farthest points [B, count, 3] of [B, N, 3], one torch step per sample."""
    batch = torch.arange(len(points))
    distance = torch.full(points.shape[:2], 1e10)
    picks = torch.zeros(len(points), count, dtype=torch.long)
    for j in range(1, count):
        last = points[batch, picks[:, j - 1]].unsqueeze(1)
        distance = torch.minimum(distance, ((points - last) ** 2).sum(-1))
        picks[:, j] = distance.argmax(1)
    return points[batch[:, None], picks]


def plain(root: Path, count: int, train: bool) -> Callable[[], None]:
    """What the official loop does with ``count`` clouds."""
    files = sorted(root.rglob("*.npy"))[:count]

    def epoch() -> None:
        for start in range(0, len(files), BATCH):
            clouds = []
            for file in files[start : start + BATCH]:
                p = np.load(file)[:, :3]
                p = p - p.mean(0)
                p = p / np.sqrt((p**2).sum(1)).max()
                clouds.append(torch.from_numpy(p[np.random.permutation(len(p))] if train else p))
            points = plain_fps(torch.stack(clouds), 1200 if train else POINTS)
            if train:
                points = points[:, torch.randperm(1200)[:POINTS]]
                points = points * torch.empty(len(points), 1, 3).uniform_(2 / 3, 3 / 2)
                points = points + torch.empty(len(points), 1, 3).uniform_(-0.2, 0.2)

    return epoch


def ours(root: Path, train: bool, **fields: Any) -> Callable[[], None]:
    """One epoch of the training loop's loader over the plugin's data."""
    fields = {"augment": "scale-translate", "val_fraction": 0.0 if train else 0.9, **fields}
    splits = source.load(PointDataConfig(root=str(root), **fields), {"num_points": POINTS})
    data: Any = splits.train if train else splits.val
    plan = epoch_plan(len(data), BATCH, 1, seed=0, epoch=0)

    def epoch() -> None:
        for _ in batches(data, plan):
            pass

    epoch.size = len(data)  # type: ignore[attr-defined]
    return epoch


def seconds(run: Callable[[], None]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    name: str, mine: Callable[[], None], other: Callable[[], None] | None, few: int, rounds: int
) -> dict[str, Any]:
    """Median clouds per second of both, and the median of the rounds' ratios."""
    size = mine.size  # type: ignore[attr-defined]
    mine()
    own, peer = [], []
    for _ in range(rounds):
        own.append(seconds(mine) / size)
        if other is not None:
            peer.append(seconds(other) / few)
    row: dict[str, Any] = {"case": name, "ours_per_s": round(1 / statistics.median(own), 1)}
    if peer:
        ratios = sorted(p / o for o, p in zip(own, peer, strict=True))
        row |= {
            "plain_per_s": round(1 / statistics.median(peer), 1),
            "ratio": round(statistics.median(ratios), 1),
            "ratio_low": round(ratios[0], 1),
            "ratio_high": round(ratios[-1], 1),
        }
    return row


def files(paths: list[Path], **options: Any) -> Callable[[], None]:
    """Reading each of these files once."""

    def epoch() -> None:
        for path in paths:
            read_cloud(path, **options)

    epoch.size = len(paths)  # type: ignore[attr-defined]
    return epoch


def main() -> None:
    """Write the clouds, run every case, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clouds", type=int, default=96)
    parser.add_argument("--few", type=int, default=BATCH, help="clouds of the plain loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--meshes", type=Path, help="folder of meshes to read too")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "clouds"
        write_clouds(root, args.clouds)
        text = []
        for i in range(8):
            text.append(Path(temporary) / f"{i}.txt")
            rng = np.random.default_rng(i)
            np.savetxt(text[-1], rng.standard_normal((10_000, 6)), "%.6f", ",")
        disk = {"verify": "none"}  # and so without the cache
        train, test = plain(root, args.few, True), plain(root, args.few, False)
        cases: list[tuple[str, Callable[[], None], Callable[[], None] | None]] = [
            ("training, from disk", ours(root, True, **disk), train),
            ("training, in memory", ours(root, True), train),
            ("training, in memory, one FPS for all epochs", ours(root, True, fps_start="first"), train),
            ("evaluation, from disk", ours(root, False, **disk), test),
            ("evaluation, in memory", ours(root, False), test),
            ("ModelNet text files (10,000 x 6)", files(text), None),
        ]
        if args.meshes:
            found = sorted(p for p in args.meshes.iterdir() if p.suffix in (".obj", ".ply", ".off", ".stl"))
            cases.append((f"{len(found)} meshes to 8192 points", files(found), None))
        rows = [compare(name, mine, other, args.few, args.rounds) for name, mine, other in cases]
    facts = {"clouds": args.clouds, "plain_clouds": args.few, "rounds": args.rounds}
    facts["machine"] = platform.processor() or platform.machine()
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    result = {"what": "clouds per second on one core", **facts, "versions": versions, "rows": rows}
    (args.out / "loading.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        line = f"{row['case']:46s} ours {row['ours_per_s']:9.1f}/s"
        if "ratio" in row:
            line += f"  plain {row['plain_per_s']:6.1f}/s  ratio {row['ratio']:.1f} ({row['ratio_low']:.1f} to "
            line += f"{row['ratio_high']:.1f})"
        print(line)


if __name__ == "__main__":
    main()
