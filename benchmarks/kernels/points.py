"""Point kernels against what else can be installed, side by side in one run: kNN, farthest point sampling, ball query.

    python benchmarks/kernels/points.py [--quick] [--threads 1,2] [--rounds 7] [--out benchmarks/kernels/results]

Every variant is checked against the reference before it is timed; a variant that does not give the exact answer is
marked. Each round times every variant once, in turn, so that drift of the machine hits all alike; the table shows the
median and the ratio ours / theirs, and 20/80 percentiles are in the CSV. Every thread count has a process of its own,
pinned to as many processors. With a GPU, device rows follow: plain calls and replays of a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import peers_cpu
import table

from peft_suite import kernels
from peft_suite.errors import KernelBackendError

K = 32
KNN_SHAPES = (("8x1024x1024", 8, 1024, 1024), ("8x512x8192", 8, 512, 8192), ("8x8192x8192", 8, 8192, 8192))
FPS_SHAPES = (("8x1024->128", 8, 1024, 128), ("8x8192->512", 8, 8192, 512), ("1x100000->4096", 1, 100_000, 4096))
BALL_SHAPES = (("8x512x8192 r=0.2", 8, 512, 8192, 0.2), ("8x128x2048 r=0.2", 8, 128, 2048, 0.2))


@dataclass
class Variant:
    """A named way to do the job: ``run()`` returns the answer; ``times`` are seconds."""

    name: str
    run: Callable[[], Any]
    note: str = ""
    times: list[float] = field(default_factory=list)
    limit: int = 10**9  # rounds, for variants that take many seconds
    device: str = "cpu"


def cloud(batch: int, n: int, seed: int = 0) -> Tensor:
    """Random points in the unit ball, as normalised scans are."""
    make = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(batch, n, 3, generator=make), dim=-1)
    return direction * torch.rand(batch, n, 1, generator=make) ** (1 / 3)


def compete(variants: Sequence[Variant], rounds: int) -> None:
    """One untimed call each, then ``rounds`` rounds in which every variant runs once, in turn."""
    for variant in variants:
        begin = time.perf_counter()
        variant.run()
        variant.limit = 1 if time.perf_counter() - begin > 4 else rounds
    for turn in range(rounds):
        for variant in variants[turn % len(variants) :] + variants[: turn % len(variants)]:  # type: ignore[operator]
            if len(variant.times) < variant.limit:
                begin = time.perf_counter()
                variant.run()
                variant.times.append(time.perf_counter() - begin)


def peers(factories: dict[str, Any], *inputs: Any) -> list[Variant]:
    """Those that can be used here; the others say why not."""
    found = []
    for name, factory in factories.items():
        try:
            found.append(Variant(name, factory(*inputs)))
            found[-1].run()
        except peers_cpu.MissingError as reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
    return found


def neighbours(name: str, answer: Any, n: int) -> Any:
    """The indices in a peer's own form of answer."""
    if isinstance(answer, Tensor):
        return answer if "torch_cluster" not in name else answer[1] % n
    if name.startswith("torch.cdist"):
        return answer.indices
    if name.startswith("torch chunked"):
        return torch.cat([part.indices for part in answer])
    if name == "Open3D":
        return np.stack([part[0].numpy() for part in answer])
    return np.stack([part[1] for part in answer])


def exact_knn(answer: Any, query: Tensor, points: Tensor, wanted: Tensor) -> str:
    """How an answer (B, Q, k) of indices compares with the reference's distances."""
    idx = torch.as_tensor(answer).long().reshape(wanted.shape)
    gap = query[:, :, None] - kernels.group_points(points, idx)
    found = gap.square().sum(-1).sort(-1).values
    return "" if torch.allclose(found, wanted, rtol=1e-5, atol=1e-7) else "other neighbours"


def exact_fps(answer: Any, wanted: Tensor, n: int) -> str:
    """Whether picks (B, m) are the reference's, start included."""
    if isinstance(answer, list):
        if hasattr(answer[0], "point"):
            return "points, not indices"
        answer = np.stack(answer).astype(np.int64)
    idx = torch.as_tensor(answer).long().reshape(wanted.shape) % n
    if torch.equal(idx, wanted):
        return ""
    same = float((idx.sort(-1).values == wanted.sort(-1).values).double().mean())
    return "start not honoured" if (idx[:, 0] != 0).any() else f"other picks ({1 - same:.1%} differ)"


def ours(call: Callable[[], Tensor], backends: Sequence[str]) -> list[Variant]:
    """The automatic choice and each back end that runs here."""
    found = [Variant("peft-suite", call)]
    for backend in backends:

        def run(backend: str = backend) -> Tensor:
            with kernels.use_backend(backend):
                return call()

        try:
            run()
        except KernelBackendError:
            continue
        found.append(Variant(f"peft-suite ({backend})", run))
    return found


def knn(rounds: int, threads: int, shapes: Sequence[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    """kNN, k = 32, D = 3, float32; tree building counts."""
    rows = []
    for shape, batch, n_query, n in shapes:
        points = cloud(batch, n)
        query = points if n_query == n else points[:, torch.randperm(n)[:n_query]].contiguous()
        dists, _ = kernels.knn(query, points, K)
        assert dists is not None
        variants = ours(lambda q=query, p=points: kernels.knn(q, p, K).idx, ("scipy", "torch"))  # type: ignore[misc]
        variants += peers(peers_cpu.knn_peers(), query, points, K, threads)
        for variant in variants:
            variant.note = exact_knn(neighbours(variant.name, variant.run(), n), query, points, dists)
        compete(variants, rounds)
        rows += table.rows("knn k=32", shape, threads, variants)
    return rows


def fps(rounds: int, threads: int, shapes: Sequence[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    """Farthest point sampling from index 0."""
    rows = []
    for shape, batch, n, m in shapes:
        points = cloud(batch, n)
        wanted = kernels.farthest_point_sampling(points, m)
        variants = ours(lambda p=points, m=m: kernels.farthest_point_sampling(p, m), ("torch",))  # type: ignore[misc]
        variants += peers(peers_cpu.fps_peers(), points, m, threads)
        for variant in variants:
            variant.note = exact_fps(variant.run(), wanted, n)
        compete(variants, rounds)
        rows += table.rows("fps", shape, threads, variants)
    return rows


def ball(rounds: int, threads: int, shapes: Sequence[tuple[str, int, int, int, float]]) -> list[dict[str, Any]]:
    """Ball query, k = 32, against the usual torch expression."""
    rows = []
    for shape, batch, n_query, n, radius in shapes:
        points = cloud(batch, n)
        query = points[:, :n_query].contiguous()

        def plain(query: Tensor = query, points: Tensor = points, radius: float = radius) -> Tensor:
            n = points.shape[1]
            place = torch.arange(n).expand(*query.shape[:2], n).clone()
            place[torch.cdist(query, points, compute_mode="donot_use_mm_for_euclid_dist") >= radius] = n
            place = place.sort(-1).values[..., :K]
            return torch.where(place < n, place, place[..., :1])

        variants = ours(lambda q=query, p=points, r=radius: kernels.ball_query(q, p, r, K), ("torch",))  # type: ignore[misc]
        variants.append(Variant("torch: cdist, mask, sort", plain))
        wanted = kernels.ball_query(query, points, radius, K)
        for variant in variants:
            variant.note = "" if torch.equal(variant.run(), wanted) else "other hits"  # type: ignore[arg-type]
        compete(variants, rounds)
        rows += table.rows("ball query k=32", shape, threads, variants)
    return rows


def device() -> list[dict[str, Any]]:
    """GPU: ours by back end against torch, plain calls and CUDA-graph replays."""
    rows: list[dict[str, Any]] = []
    shapes = ((32, 64, 1024, 32), (32, 128, 2048, 32), (32, 1024, 1024, 32), (32, 512, 8192, 32), (32, 8192, 8192, 32))
    for batch, n_query, n, k in (*shapes, (1, 4096, 100_000, 32)):
        points = cloud(batch, n).cuda()
        query = points[:, :n_query].contiguous()

        def plain(query: Tensor = query, points: Tensor = points, k: int = k) -> Any:
            step = max(1, (1 << 28) // (points.shape[0] * points.shape[1]))
            return [torch.cdist(q, points).topk(k, largest=False) for q in query.split(step, 1)]

        calls = ours(lambda q=query, p=points, k=k: kernels.knn(q, p, k).idx, ("triton", "torch"))  # type: ignore[misc]
        rows += _timed(f"knn k={k}", f"{batch}x{n_query}x{n}", [*calls, Variant("torch.cdist + topk", plain)])
    for batch, n, m in (
        (32, 1024, 64),
        (32, 2048, 128),
        (32, 1024, 512),
        (32, 8192, 512),
        (132, 8192, 1024),
        (1, 100_000, 4096),
    ):
        points = cloud(batch, n).cuda()
        calls = ours(lambda p=points, m=m: kernels.farthest_point_sampling(p, m), ("triton", "torch", "pointnet2_ops"))  # type: ignore[misc]
        rows += _timed("fps", f"{batch}x{n}->{m}", calls)
    for batch, n_query, n, k in ((32, 512, 8192, 32), (32, 128, 2048, 32)):
        points = cloud(batch, n).cuda()
        query = points[:, :n_query].contiguous()
        calls = ours(lambda q=query, p=points, k=k: kernels.ball_query(q, p, 0.2, k), ("triton", "torch"))  # type: ignore[misc]
        rows += _timed(f"ball query k={k}", f"{batch}x{n_query}x{n}", calls)
    for batch, n, m, channels in ((32, 2048, 128, 384), (32, 8192, 512, 384)):
        unknown, known = cloud(batch, n).cuda(), cloud(batch, m).cuda()
        feats = torch.randn(batch, m, channels, device="cuda", dtype=torch.bfloat16)
        calls = ours(lambda u=unknown, p=known, f=feats: kernels.interpolate(u, p, f), ("triton", "torch"))  # type: ignore[misc]
        rows += _timed("interpolate", f"{batch}x{n}x{m}x{channels}", calls)
    return rows


def _timed(op: str, shape: str, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    from triton.testing import do_bench, do_bench_cudagraph

    made = []
    for variant in variants:
        variant.device = "cuda"
        variant.times = [t / 1e3 for t in do_bench(variant.run, quantiles=[0.2, 0.5, 0.8])]
        made.append(variant)
        try:
            graph = Variant(f"{variant.name}, CUDA graph", variant.run, variant.note)
            graph.times = [do_bench_cudagraph(variant.run) / 1e3]
            graph.device = "cuda"
            made.append(graph)
        except Exception as error:  # what cannot be captured is shown without a graph
            variant.note = variant.note or f"no graph: {type(error).__name__}"
    return table.rows(op, shape, 0, made)


def measure(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """The rows of one thread count, in this process."""
    rounds, last = (3, 2) if options.quick else (options.rounds, 3)
    kernels.warmup()
    rows: list[dict[str, Any]] = []
    if threads == 0:
        return device()
    if "knn" in options.only:
        rows += knn(rounds, threads, KNN_SHAPES[:last])
    if "fps" in options.only:
        rows += fps(rounds, threads, FPS_SHAPES[:last])
    if "ball" in options.only:
        rows += ball(rounds, threads, BALL_SHAPES)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller shapes, three rounds")
    parser.add_argument("--threads", default="1,2", help="thread counts; 0 is the GPU, added where there is one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="knn,fps,ball")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside is not None:
        if options.inside:
            peers_cpu.pin(options.inside)
        print("ROWS " + json.dumps(measure(options, options.inside)))
        return
    given = list(argv if argv is not None else sys.argv[1:])
    counts = [int(t) for t in options.threads.split(",")]
    rows: list[dict[str, Any]] = []
    for threads in [*counts, *([0] if torch.cuda.is_available() and 0 not in counts else [])]:
        done = subprocess.run(
            [sys.executable, __file__, *given, "--inside", str(threads)], stdout=subprocess.PIPE, text=True, check=True
        )
        [line] = [text for text in done.stdout.splitlines() if text.startswith("ROWS ")]
        rows += json.loads(line.removeprefix("ROWS "))
    table.show("Point kernels", rows)
    table.write(options.out / "points", rows)
    table.plot(options.out / "points.png", rows)


if __name__ == "__main__":
    main()
