"""Batches of small symmetric matrices and graph Fourier bases: ours against torch and numpy, side by side in one run.

    python benchmarks/kernels/spectral.py [--quick] [--threads 1] [--rounds 15] [--out benchmarks/kernels/results]

Matrices are PointGST's Laplacians of random points. Each variant is checked before it is timed; each round times every
variant once, in turn. With a GPU, its rows follow: our choice, the Jacobi kernel, torch's solver and the round trip
through the CPU. A ratio is ours / it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import table

from peft_suite.kernels import dispatch
from peft_suite.kernels.api.spectral import eigh_small, graph_fourier_basis, graph_laplacian

Run = Callable[[], Any]


def clouds(batch: int, group: int, device: str = "cpu") -> Tensor:
    """Points on the unit sphere."""
    x = torch.randn(batch, group, 3, generator=torch.Generator().manual_seed(group))
    return torch.nn.functional.normalize(x, dim=-1).to(device)


def error(a: Tensor, w: Any, v: Any) -> float:
    """Largest ‖Av − vw‖ and ‖vᵀv − I‖ of a matrix in the batch."""
    a, w, v = (torch.as_tensor(t).detach().cpu().double() for t in (a, w, v))
    residual = torch.linalg.matrix_norm(a @ v - v * w[:, None]).max()
    return float(max(residual, torch.linalg.matrix_norm(v.mT @ v - torch.eye(a.shape[-1])).max()))


def compete(runs: dict[str, Run], rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Milliseconds of each round; every variant once a round, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            if turn > 1:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def rows(op: str, shape: str, dtype: str, times: dict[str, list[float]], notes: dict[str, str]) -> list[dict[str, Any]]:
    """One row a variant; the first is ours."""
    first = statistics.median(next(iter(times.values())))
    made = []
    for name, found in times.items():
        low, middle, high = np.quantile(found, [0.2, 0.5, 0.8])
        made.append(
            {
                "op": op,
                "shape": shape,
                "dtype": dtype,
                "variant": name,
                "median_ms": round(float(middle), 4),
                "p20_ms": round(float(low), 4),
                "p80_ms": round(float(high), 4),
                "ratio": round(first / float(middle), 3),
                "note": notes.get(name, ""),
            }
        )
    return made


def forced(backend: str, run: Run) -> Run:
    """``run`` under a back end asked for by name."""

    def inside() -> Any:
        with dispatch.use_backend(backend):
            return run()

    return inside


def solvers(batch: int, n: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Eigen-decomposition of one batch on one device."""
    a = graph_laplacian(clouds(batch, n, device))
    runs: dict[str, Run] = {"ours": lambda: eigh_small(a)}
    if device == "cpu":
        array = a.numpy()
        runs["torch batched"] = lambda: torch.linalg.eigh(a)
        runs["torch loop"] = lambda: [torch.linalg.eigh(m) for m in a]
        runs["numpy"] = lambda: np.linalg.eigh(array)
    else:
        runs["torch batched"] = lambda: torch.linalg.eigh(a)
        runs["CPU round trip"] = lambda: [t.to(device) for t in torch.linalg.eigh(a.cpu())]
        if dispatch.unavailable("triton") is None:
            runs["Jacobi kernel"] = forced("triton", lambda: eigh_small(a))
    notes = {}
    for name, run in runs.items():
        answer = run()
        if name != "torch loop":
            notes[name] = f"error {error(a, *answer):.1e}"
    return rows("eigh_small", f"{batch}x{n}x{n}", f"float32 {device}", compete(runs, rounds, device != "cpu"), notes)


def bases(batch: int, group: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Points to basis, beside the same with torch.cdist."""
    points = clouds(batch, group, device)
    eye = torch.eye(group, device=device)

    def official() -> Any:
        d = torch.cdist(points, points)
        weights = 1 / (d / d[d > 0].min() + eye)
        root = (weights.sum(2) + 1e-6).rsqrt()
        return torch.linalg.eigh(eye - root[:, :, None] * weights * root[:, None])

    runs: dict[str, Run] = {
        "ours": lambda: graph_fourier_basis(points),
        "ours, Laplacian alone": lambda: graph_laplacian(points),
        "cdist + eigh": official,
    }
    notes = {"cdist + eigh": "δ of rounding noise" if group > 25 else ""}
    found = compete(runs, rounds, device != "cpu")
    return rows("graph_fourier_basis", f"{batch}x{group}x3", f"float32 {device}", found, notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    found: list[dict[str, Any]] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for n in (16, 64) if options.quick else (16, 32, 64, 128):
            found += solvers(32, n, device, rounds)
        if device == "cuda" and not options.quick:
            found += solvers(128, 32, device, rounds)
        for group in (32,) if options.quick else (32, 64, 128):
            found += bases(32, group, device, rounds)
    table.show("Spectral kernels", found)
    table.write(options.out / "spectral", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
