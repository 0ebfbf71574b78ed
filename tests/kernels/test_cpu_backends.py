"""The numba and scipy back ends against exact oracles in plain torch (same precision, same summation order)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("numba")

from peft_suite.kernels.cpu import numba_ball, numba_common, numba_fps, numba_knn

I64 = torch.int64
INF = float("inf")


def squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(..., D) differences summed in coordinate order."""
    d = a - b
    d = d * d
    total = d[..., 0]
    for axis in range(1, d.shape[-1]):
        total = total + d[..., axis]
    return total


def work(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def knn_oracle(
    query: torch.Tensor,
    points: torch.Tensor,
    k: int,
    lengths_q: torch.Tensor | None = None,
    lengths_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, points = work(query), work(points)
    batch, size, _ = query.shape
    dists = torch.full((batch, size, k), INF, dtype=query.dtype)
    index = torch.full((batch, size, k), -1)
    for b in range(batch):
        q = size if lengths_q is None else int(lengths_q[b])
        n = points.shape[1] if lengths_p is None else int(lengths_p[b])
        d = squares(query[b, :q, None], points[b, None, :n])
        d = torch.where(d == d, d, INF)
        d, i = torch.sort(d, dim=-1, stable=True)
        real = min(k, n)
        dists[b, :q, :real], index[b, :q, :real] = d[:, :real], i[:, :real]
    return dists, index


def reverse_bits(word: int, bits: int) -> int:
    return int(format(word, f"0{bits}b")[::-1], 2) if bits else 0


def fps_oracle(
    points: torch.Tensor, m: int, start: torch.Tensor, lengths: torch.Tensor | None = None, rule: str = "standard"
) -> torch.Tensor:
    points = work(points)
    out = torch.zeros(points.shape[0], m, dtype=I64)
    for b in range(points.shape[0]):
        n = points.shape[1] if lengths is None else int(lengths[b])
        cloud = points[b, :n]
        allowed = torch.isfinite(cloud).all(-1)
        d = torch.full((n,), INF if rule == "standard" else 1e10, dtype=points.dtype)
        key = torch.arange(n)
        if rule == "pointnet2":
            allowed &= squares(cloud, torch.zeros_like(cloud)).double() > 1e-3
            bits = min(max(n.bit_length() - 1, 0), 9)
            stride = 1 << bits
            depth = (n + stride - 1) // stride
            key = torch.tensor([reverse_bits(i % stride, bits) * depth + i // stride for i in range(n)], dtype=I64)
        order = torch.argsort(key)
        pick = int(start[b])
        for step in range(m):
            out[b, step] = pick
            if not allowed.any():
                pick = 0
                continue
            new = squares(cloud, points[b, pick])
            d = torch.where(new < d, new, d)
            value = torch.where(allowed, d, -1.0)[order]
            pick = int(order[(value == value.max()).nonzero()[0, 0]])
    return out


def ball_oracle(
    query: torch.Tensor,
    points: torch.Tensor,
    radius: float,
    k: int,
    lengths_q: torch.Tensor | None = None,
    lengths_p: torch.Tensor | None = None,
    pad: str = "first",
) -> torch.Tensor:
    query, points = work(query), work(points)
    size = query.shape[1]
    n = points.shape[1]
    r = torch.tensor(radius, dtype=points.dtype)
    hit = squares(query[:, :, None], points[:, None]) < r * r
    if lengths_p is not None:
        hit &= torch.arange(n) < lengths_p[:, None, None]
    if lengths_q is not None:
        hit &= (torch.arange(size) < lengths_q[:, None])[..., None]
    place = torch.where(hit, torch.arange(n), n).sort(-1).values[..., :k]
    place = torch.nn.functional.pad(place, (0, k - place.shape[-1]), value=n)
    fill = torch.where(place[..., :1] < n, place[..., :1], 0) if pad == "first" else -1
    return torch.where(place < n, place, fill)


def knn(query: torch.Tensor, points: torch.Tensor, k: int, lq: Any = None, lp: Any = None) -> Any:
    return numba_knn.knn(query, points, k, lq, lp, 2, "exact", True, I64)


def check_knn(query: torch.Tensor, points: torch.Tensor, k: int, lq: Any = None, lp: Any = None) -> None:
    dists, index = knn(query, points, k, lq, lp)
    want_dists, want = knn_oracle(query, points, k, lq, lp)
    assert dists.dtype == want_dists.dtype and dists.is_contiguous() and index.is_contiguous()
    assert torch.equal(dists, want_dists)
    assert torch.equal(index, want)


def check_fps(
    points: torch.Tensor, m: int, start: torch.Tensor | None = None, lengths: Any = None, rule: str = "standard"
) -> None:
    start = torch.zeros(points.shape[0], dtype=I64) if start is None else start
    got = numba_fps.farthest_point_sampling(points, m, start, lengths, rule, I64)
    assert torch.equal(got, fps_oracle(points, m, start, lengths, rule))


def check_ball(
    query: torch.Tensor, points: torch.Tensor, radius: float, k: int, lq: Any = None, lp: Any = None
) -> None:
    for pad in ("first", "pytorch3d"):
        got = numba_ball.ball_query(query, points, radius, k, lq, lp, pad, I64)
        assert torch.equal(got, ball_oracle(query, points, radius, k, lq, lp, pad))


def sphere(batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(batch, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


def clouds() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    line = torch.zeros(1, 700, 3)
    line[..., 0] = torch.randperm(700, generator=g)
    spread = torch.randn(2, 900, 3, generator=g)
    spread[:, ::2] *= 1e-3
    spread[:, ::7] *= 1e4
    zeros = torch.randn(2, 800, 3, generator=g)
    zeros[:, 400:] = 0
    huge = torch.randn(1, 400, 3, generator=g)
    huge[:, ::5] *= 3e38
    return {
        "sphere": sphere(2, 1021),
        "ball": torch.rand(2, 777, 3, generator=g),
        "shifted": sphere(1, 600) + 100,
        "grid": torch.randint(0, 7, (2, 900, 3), generator=g).float(),
        "doubled": torch.randn(2, 150, 3, generator=g).repeat(1, 4, 1),
        "equal": torch.ones(1, 300, 3),
        "line": line,
        "spread": spread,
        "padded": zeros,
        "tiny": torch.randn(1, 500, 3, generator=g) * 1e-22,
        "huge": huge,
    }


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(clouds()))
def test_knn_clouds(name: str, threads: int) -> None:
    points = clouds()[name]
    query = torch.randn(points.shape[0], 61, 3, generator=torch.Generator().manual_seed(2))
    for k in (1, 32, 300, points.shape[1] + 3):
        check_knn(points, points, k)
        check_knn(query, points, k)


def test_knn_sizes() -> None:
    g = torch.Generator().manual_seed(3)
    for n in (1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1025):
        points = torch.randn(2, n, 3, generator=g)
        for k in (1, 2, min(n, 300), min(n, 299) + 1):
            check_knn(points, points, k)
            check_knn(torch.randn(2, 7, 3, generator=g), points, k)


def test_knn_far_queries_and_many() -> None:
    points = sphere(1, 9001)
    check_knn(points[:, ::9], points, 32)
    query = torch.randn(1, 200, 3) * torch.logspace(-4, 8, 200)[None, :, None]
    check_knn(query, points, 40)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_dims(dtype: torch.dtype, dim: int) -> None:
    points = sphere(2, 500, dtype=dtype)[..., :dim]
    check_knn(points[:, :90], points, 9)
    check_fps(points, 40)
    check_ball(points[:, :90], points, 0.25, 9)


def test_lengths() -> None:
    points, query = sphere(4, 300), sphere(4, 50, seed=1)
    lengths = torch.tensor([0, 1, 137, 300])
    counts = torch.tensor([50, 0, 13, 49])
    for k in (3, 200):
        check_knn(query, points, k, counts, lengths)
        check_knn(points, points, k, lengths, lengths)
        check_knn(points, points, k, None, lengths)
        check_ball(query, points, 0.5, k, counts, lengths)
    for rule in ("standard", "pointnet2"):
        check_fps(points, 150, None, lengths, rule)
    none = torch.zeros(4, dtype=I64)
    check_knn(query, points[:, :0], 3, counts, none)


def test_not_finite() -> None:
    points = sphere(2, 400)
    points[0, 3, 1] = float("nan")
    points[0, 100] = float("nan")
    points[1, 7, 2] = INF
    points[1, 0] = -INF
    query = points[:, :120]
    for k in (4, 397, 399, 400, 405):
        check_knn(query, points, k)
        check_knn(points, points, k)
    check_ball(query, points, 0.4, 12)
    for rule in ("standard", "pointnet2"):
        check_fps(points, 60, None, None, rule)
        check_fps(points, 60, torch.tensor([3, 7]), None, rule)
        check_fps(torch.full((1, 20, 3), float("nan")), 4, None, None, rule)


def test_strides_and_gradients() -> None:
    base = sphere(2, 1200)
    turned = base.transpose(1, 2).contiguous().transpose(1, 2)
    every = base[:, ::3]
    wide = base[:1].expand(3, -1, -1)
    for points in (turned, every, wide):
        check_knn(points[:, :70], points, 12)
        check_knn(points, points, 3)
        check_fps(points, 30)
        check_ball(points[:, :70], points, 0.3, 8)
    assert not knn(base.clone().requires_grad_(), base, 2)[0].requires_grad


def test_same_storage_other_points() -> None:
    base = sphere(2, 400)
    check_knn(base[:, :200], base[:, 200:], 7)
    check_knn(base, base, 7, torch.tensor([400, 20]), torch.tensor([300, 400]))


@pytest.mark.parametrize("rule", ["standard", "pointnet2"])
@pytest.mark.parametrize("name", list(clouds()))
def test_fps_clouds(name: str, rule: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = clouds()[name]
    start = torch.tensor([5, 271][: points.shape[0]])
    check_fps(points, 33, start, None, rule)
    for leaf in (16, 64):
        monkeypatch.setattr(numba_fps, "_leaf", lambda size, picks, leaf=leaf: leaf)
        check_fps(points, 130, start, None, rule)


def test_fps_sizes() -> None:
    g = torch.Generator().manual_seed(4)
    for n in (1, 2, 3, 15, 16, 17, 100, 513):
        points = torch.randn(1, n, 3, generator=g)
        for m in (1, n, n + 5):
            check_fps(points, m)
            check_fps(points, m, torch.tensor([n - 1]), None, "pointnet2")
    check_fps(sphere(1, 3001), 300, torch.tensor([3000]))
    check_fps(torch.randint(0, 12, (1, 3001, 3), generator=g).float(), 300)
    check_fps(torch.full((1, 40, 3), 0.01), 5, torch.tensor([7]), None, "pointnet2")


def test_fps_golden() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = next((p for p in golden_places() if p.is_file()), None)
    if path is None:
        pytest.skip("golden pointops-a not here")
    golden = safetensors.load_file(str(path))
    for name in ("random", "grid"):
        points = golden[f"{name}.points"]
        start = torch.zeros(points.shape[0], dtype=I64)
        got = numba_fps.farthest_point_sampling(points, 24, start, None, "pointnet2", I64)
        assert torch.equal(got, golden[f"{name}.fps_idx"])
        centers = golden[f"{name}.centers"]
        dists, index = knn(centers, points, 9)
        assert torch.equal(index, golden[f"{name}.knn_idx"])
        torch.testing.assert_close(dists.sqrt(), golden[f"{name}.knn_dist"])
        ball = numba_ball.ball_query(golden[f"{name}.ball_queries"], points, 0.5, 12, None, None, "first", torch.int32)
        assert torch.equal(ball, golden[f"{name}.ball_idx"])


def golden_places() -> list[Path]:
    root = Path(__file__).resolve().parents[3]
    return [root / "shared" / "goldens" / "pointops-a.safetensors"]


@pytest.mark.parametrize("name", list(clouds()))
def test_ball_clouds(name: str, threads: int) -> None:
    points = clouds()[name]
    query = torch.randn(points.shape[0], 40, 3, generator=torch.Generator().manual_seed(5))
    for radius in (0.0, 0.05, 0.5, 1.0, 1e5, 1e30):
        for k in (1, 8, 64):
            check_ball(points[:, ::5], points, radius, k)
            check_ball(query, points, radius, k)


def test_ball_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.rand(1, 8000, 3, generator=torch.Generator().manual_seed(6))
    points[0, 17] = float("nan")
    built = []
    build = numba_common.build_tree
    monkeypatch.setattr(numba_ball, "build_tree", lambda *args: (built.append(1), build(*args))[1])
    check_ball(points[:, 400:1400], points, 0.03, 16, None, torch.tensor([7777]))
    assert built  # chosen by itself
    points[0, 1000:1600] = points[0, 999]  # more hits than the tree path sorts
    monkeypatch.setattr(numba_ball, "_tree_pays", lambda *args: True)
    for radius in (0.0, 0.03, 0.1, 10.0):
        check_ball(points[:, 700:1100], points, radius, 16)
        check_ball(points[:, 700:720], points[:, :777], radius, 900, None, torch.tensor([0]))


def test_index_types() -> None:
    points = sphere(1, 200)
    assert numba_knn.knn(points, points, 3, None, None, 2, "exact", True, torch.int32)[1].dtype == torch.int32
    start = torch.zeros(1, dtype=I64)
    assert numba_fps.farthest_point_sampling(points, 3, start, None, "standard", torch.int32).dtype == torch.int32
    assert numba_ball.ball_query(points, points, 0.2, 3, None, None, "first", torch.int32).dtype == torch.int32


def test_declines() -> None:
    x = torch.rand(1, 4, 5)
    assert "5" in (numba_knn.knn_cannot(x, x, 1, None, None, 2, "exact", True, I64) or "")
    y = x[..., :3]
    assert "norm 1" in (numba_knn.knn_cannot(y, y, 1, None, None, 1, "exact", True, I64) or "")
    assert numba_fps.farthest_point_sampling_cannot(x, 1, None, None, "standard", I64)
    assert numba_ball.ball_query_cannot(x, x, 0.1, 1, None, None, "first", I64)
    assert numba_knn.knn_cannot(y, y, 1, None, None, 2, "exact", True, I64) is None


def test_passes() -> None:
    rest = (None, None, 2, "exact", True, I64)
    points = torch.empty(1, 1, 3).expand(1, 8192, 3)
    assert numba_knn.knn_pass(points[:, :2], points, 3, *rest)
    assert numba_knn.knn_pass(points[:, :64], points, 3, *rest) is None
    assert numba_knn.knn_pass(points[:, :2], points[:, :1000], 3, *rest) is None
    pytest.importorskip("scipy")
    scipy_knn = importlib.import_module("peft_suite.kernels.cpu.scipy_knn")
    assert scipy_knn.knn_pass(points[:, :4], points, 3, *rest)
    assert scipy_knn.knn_pass(points, points, 1000, *rest)
    assert scipy_knn.knn_pass(points, points, 32, *rest) is None


def test_python_threads_at_once(threads: int) -> None:
    points = [sphere(2, 700, seed=seed) for seed in range(6)]
    wanted = [(knn_oracle(p, p, 16), fps_oracle(p, 20, torch.zeros(2, dtype=I64))) for p in points]
    wrong: list[str] = []

    def run(place: int) -> None:
        try:
            for _ in range(4):
                p, (near, picks) = points[place], wanted[place]
                dists, index = knn(p, p, 16)
                got = numba_fps.farthest_point_sampling(p, 20, torch.zeros(2, dtype=I64), None, "standard", I64)
                if not (torch.equal(dists, near[0]) and torch.equal(index, near[1]) and torch.equal(got, picks)):
                    wrong.append(f"cloud {place}")
        except Exception as error:
            wrong.append(repr(error))

    runners = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


class Sampled(Dataset[torch.Tensor]):
    """Farthest points of small clouds, as a training set computes them in a worker."""

    def __init__(self, inner_threads: int) -> None:
        self.inner_threads = inner_threads

    def __len__(self) -> int:
        return 6

    def __getitem__(self, item: int) -> torch.Tensor:
        torch.set_num_threads(self.inner_threads)
        points = sphere(2, 300, seed=item)
        picks = numba_fps.farthest_point_sampling(points, 12, torch.zeros(2, dtype=I64), None, "standard", I64)
        return torch.cat([picks, knn(points[:, :1], points, 12)[1][:, 0]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("inner", [1, 2])
def test_forked_workers(inner: int, threads: int) -> None:
    knn(sphere(2, 600), sphere(2, 600), 4)  # the parent's threads exist before the fork
    dataset = Sampled(threads)
    want = [dataset[i] for i in range(6)]
    loader = DataLoader(Sampled(inner), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for got, expected in zip(loader, want, strict=True):
        assert torch.equal(got, expected)


def test_repeatable() -> None:
    points = sphere(3, 2000)
    first = knn(points, points, 20)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, knn(points, points, 20), strict=True))


@pytest.mark.parametrize("writable", [True, False])
def test_cache_folder(tmp_path: Path, writable: bool) -> None:
    """A cache folder is used where there is one; without any the code still compiles."""
    target = tmp_path / "cache"
    if not writable:
        target.write_text("a file in the way")
    code = (
        "from peft_suite.kernels.cpu.numba_common import jit\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('piece', r'{}')\n"
        "piece = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(piece)\n"
        "print(piece.one(2))\n"
    )
    piece = tmp_path / "piece.py"
    piece.write_text("from peft_suite.kernels.cpu.numba_common import jit\n@jit\ndef one(x):\n    return x + 1\n")
    if not writable:
        (tmp_path / "__pycache__").write_text("a file in the way")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(target), "XDG_CACHE_HOME": str(target), "HOME": str(target)}
    if not writable:
        environment.pop("NUMBA_CACHE_DIR")
    done = subprocess.run(
        [sys.executable, "-c", code.format(piece)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
    assert not writable or any(target.rglob("*.nbi"))


# ----------------------------------------------------------------------------------------------------------------------
# scipy


@pytest.mark.parametrize("name", list(clouds()))
def test_scipy_knn(name: str) -> None:
    pytest.importorskip("scipy")
    scipy_knn = importlib.import_module("peft_suite.kernels.cpu.scipy_knn")
    points = clouds()[name]
    query = torch.randn(points.shape[0], 61, 3, generator=torch.Generator().manual_seed(2))
    for sites in (points, query):
        for k in (1, 5, 32, points.shape[1] + 3):
            dists, index = scipy_knn.knn(sites, points, k, None, None, 2, "exact", True, I64)
            want_dists, want = knn_oracle(sites, points, k)
            assert torch.equal(dists, want_dists)
            assert torch.equal(index, want)


def test_scipy_knn_lengths_types_not_finite() -> None:
    pytest.importorskip("scipy")
    scipy_knn = importlib.import_module("peft_suite.kernels.cpu.scipy_knn")
    points, query = sphere(4, 300), sphere(4, 50, seed=1)
    points[3, 7] = float("nan")
    points[3, 9, 0] = INF
    query[3, 0] = float("nan")
    lengths = torch.tensor([0, 1, 137, 300])
    counts = torch.tensor([50, 0, 13, 49])
    for k in (3, 299):
        got = scipy_knn.knn(query, points, k, counts, lengths, 2, "exact", True, I64)
        want = knn_oracle(query, points, k, counts, lengths)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for dtype in (torch.float16, torch.float64):
        for dim in (2, 5):
            x = torch.randn(2, 200, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
            got = scipy_knn.knn(x, x, 8, None, None, 2, "exact", True, I64)
            want = knn_oracle(x, x, 8)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
