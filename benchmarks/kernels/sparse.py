"""Sparse changes against a frozen layer, a saved dense copy and a dense weight gradient; selection against sorting.

    python benchmarks/kernels/sparse.py --quick
    python benchmarks/kernels/sparse.py --threads 2 --out benchmarks/kernels/results

A step is forward and backward including the input's gradient. ``ratio`` is its time over that of the frozen layer, the
runs interleaved. ``saved_mib`` is what autograd keeps for backward beyond weights, values and index;
``transient_mib`` the most that the allocator held above that at once, outputs and gradients included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from peft_suite.kernels.recompute import watching

sys.path.insert(0, str(Path(__file__).parent))
import table

from peft_suite.kernels import dispatch
from peft_suite.kernels.api.selection import kth_value, select_topk
from peft_suite.kernels.api.sparse import sparse_delta_conv2d, sparse_delta_linear
from peft_suite.kernels.cpu import torch_sparse

MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """A layer and its input. ``kernel`` 0: linear over ``size`` tokens; else a convolution over a size × size map."""

    name: str
    inputs: int
    outputs: int
    size: int
    kernel: int = 0

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(x, weight)."""
        if self.kernel:
            x = torch.randn(1, self.inputs, self.size, self.size)
            return x, torch.randn(self.outputs, self.inputs, self.kernel, self.kernel) * 0.02
        return torch.randn(self.size, self.inputs), torch.randn(self.outputs, self.inputs) * 0.02

    def layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """The dense layer."""
        return F.conv2d(x, weight, padding=self.kernel // 2) if self.kernel else F.linear(x, weight)

    def ours(self, x: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
        """The layer with a sparse change."""
        if self.kernel:
            return sparse_delta_conv2d(x, weight, values, index, padding=self.kernel // 2)
        return sparse_delta_linear(x, weight, values, index)


SHAPES = (
    Shape("vit-768x768-t788", 768, 768, 788),
    Shape("vit-768x3072-t788", 768, 3072, 788),
    Shape("vit-3072x768-t788", 3072, 768, 788),
    Shape("vit-768x3072-t1576", 768, 3072, 1576),
    Shape("sd-linear-1280x5120-t256", 1280, 5120, 256),
    Shape("sd-conv3-320-64px", 320, 320, 64, 3),
    Shape("sd-conv3-640-32px", 640, 640, 32, 3),
    Shape("sd-conv3-1280-16px", 1280, 1280, 16, 3),
    Shape("sd-conv1-320-64px", 320, 320, 64, 1),
)
QUICK = ("vit-768x768-t788", "vit-768x3072-t788", "sd-conv3-320-64px", "sd-conv3-1280-16px")


def variants(shape: Shape, density: float) -> dict[str, Callable[[], tuple[Tensor, Sequence[Tensor]]]]:
    """Name -> forward returning (output, what wants a gradient)."""
    torch.manual_seed(0)
    x, weight = shape.tensors()
    x.requires_grad_()
    index = torch.randperm(weight.numel())[: round(density * weight.numel())].sort().values
    values = torch.zeros(index.numel(), requires_grad=True)
    narrow = index.int()
    trained = weight.clone().requires_grad_()

    def copied() -> tuple[Tensor, Sequence[Tensor]]:
        return shape.layer(x, weight.view(-1).index_add(0, index, values).view(weight.shape)), (x, values)

    def dense_gradient() -> tuple[Tensor, Sequence[Tensor]]:
        with dispatch.use_backend("torch"):
            return shape.ours(x, weight, values, narrow), (x, values)

    return {
        "frozen layer": lambda: (shape.layer(x, weight), (x,)),
        "sparse delta": lambda: (shape.ours(x, weight, values, narrow), (x, values)),
        "sparse delta, dense value gradient": dense_gradient,
        "dense copy saved": copied,
        "whole weight trained": lambda: (shape.layer(x, trained), (x, trained)),
    }


def step(name: str, forward: Callable[[], tuple[Tensor, Sequence[Tensor]]], grad: Tensor) -> list[Tensor]:
    """Forward and backward."""
    before = torch_sparse.SAMPLE_DENSITY
    torch_sparse.SAMPLE_DENSITY = 0.0 if "dense value" in name else before
    try:
        output, wanted = forward()
        return list(torch.autograd.grad(output, wanted, grad))
    finally:
        torch_sparse.SAMPLE_DENSITY = before


def saved_bytes(forward: Callable[[], tuple[Tensor, Sequence[Tensor]]], given: set[int]) -> int:
    """Bytes of storages that autograd keeps, without those in ``given``."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()

    with watching(note):
        output = forward()
    del output
    return sum(kept.values())


def transient_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that the CPU allocator held at once beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    results: Any = seen.profiler
    events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events):
        now += size
        most = max(most, now)
    return most


def measure(shape: Shape, density: float, repeats: int) -> list[dict[str, Any]]:
    """Interleaved times of all variants, after a check that their gradients agree."""
    forms = variants(shape, density)
    output, _ = forms["frozen layer"]()
    grad = torch.randn_like(output)
    steps = {name: step(name, form, grad) for name, form in forms.items()}
    for name, result in steps.items():
        if len(result) > 1 and name != "whole weight trained":
            for one, two in zip(result, steps["dense copy saved"]):
                gap = (one - two).norm() / two.norm().clamp(min=1e-30)
                assert gap < 1e-5, (shape.name, name, float(gap))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            step(name, form, grad)
            times[name].append(time.perf_counter() - start)
    base = times["frozen layer"]
    rows = []
    for name, form in forms.items():
        _, wanted = form()
        given = {t.untyped_storage().data_ptr() for t in wanted[1:]}
        given |= resident(forms)
        rows.append(
            {
                "op": "conv2d" if shape.kernel else "linear",
                "shape": shape.name,
                "density": density,
                "variant": name,
                "median_ms": round(1e3 * statistics.median(times[name]), 2),
                "ratio": round(statistics.median(t / b for t, b in zip(times[name], base)), 3),
                "saved_mib": round(saved_bytes(form, given) / MIB, 2),
                "transient_mib": round(transient_bytes(lambda n=name, f=form: step(n, f, grad)) / MIB, 2),
            }
        )
    return rows


def resident(forms: dict[str, Callable[[], tuple[Tensor, Sequence[Tensor]]]]) -> set[int]:
    """Storages of the frozen weight, values and index: they are there whether a step runs or not."""
    found: set[int] = set()

    with watching(lambda t: found.add(t.untyped_storage().data_ptr())):
        _, wanted = forms["frozen layer"]()
        forms["sparse delta"]()
    return found - {wanted[0].untyped_storage().data_ptr()}


def selection(numel: int, repeats: int) -> list[dict[str, Any]]:
    """One hundredth of a model by magnitude: ours, and three ways over the concatenated list."""
    torch.manual_seed(0)
    size = numel // 12
    tensors = [torch.randn(size) * (0.01 + 0.002 * i) for i in range(12)]
    k = 12 * size // 100
    named = {str(i): t for i, t in enumerate(tensors)}

    def joined() -> Tensor:
        return torch.cat([t.view(-1) for t in tensors]).abs()

    forms: dict[str, Callable[[], Any]] = {
        "kth_value": lambda: kth_value(tensors, k).value,
        "numpy partition": lambda: float(np.partition(joined().numpy(), 12 * size - k)[12 * size - k]),
        "torch kthvalue": lambda: float(joined().kthvalue(12 * size - k + 1).values),
        "select_topk": lambda: select_topk(named, k),
        "torch topk": lambda: float(joined().topk(k).values[-1]),
    }
    exact = forms["kth_value"]()
    assert exact == forms["numpy partition"]() == forms["torch topk"]()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return [
        {
            "op": "selection",
            "shape": f"{12 * size} elements",
            "density": 0.01,
            "variant": name,
            "median_ms": round(1e3 * statistics.median(times[name]), 2),
            "ratio": round(statistics.median(t / b for t, b in zip(times[name], times["kth_value"])), 3),
            "saved_mib": 0.0,
            "transient_mib": round(transient_bytes(form) / MIB, 2),
        }
        for name, form in forms.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers, few repeats, a small list")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--shapes", nargs="*", default=None, help="names, of: " + ", ".join(s.name for s in SHAPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.shapes if options.shapes is not None else (QUICK if options.quick else [s.name for s in SHAPES])
    repeats = options.repeats or (7 if options.quick else 15)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for density in (0.001, 0.005) if shape.name in wanted else ():
            rows += measure(shape, density, repeats)
    rows += selection(8_000_000 if options.quick else 86_000_000, 3)
    table.show(f"Sparse kernels, {options.threads} thread(s)", rows)
    table.write(options.out / "sparse", rows)


if __name__ == "__main__":
    main()
