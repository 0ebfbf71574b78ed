"""Scale-and-shift and the bottleneck adapter: plain expression, ours, torch.compile; time and bytes kept for backward.

    python benchmarks/kernels/fused.py [--quick] [--threads 1] [--rounds 15] [--out benchmarks/kernels/results]

Shapes of ViT-B, forward and backward with every input trained. Gradients are checked before anything is timed; each
round times every variant once, in turn. The note holds the time of the forward pass and the bytes that it keeps. With a
GPU, its rows follow, with the kernels asked for by name. A ratio is ours / it.
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
import torch.nn.functional as F
from torch import Tensor

from peft_suite.kernels.recompute import watching

sys.path.insert(0, str(Path(__file__).parent))
import table

from peft_suite.kernels import dispatch
from peft_suite.kernels.api.fused import bottleneck_adapter, ssf
from peft_suite.kernels.ops import fused as ops

Forward = Callable[..., Tensor]


def plain_ssf(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What one writes."""
    return x * scale + shift


def registered_ssf(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The operation, whatever the size."""
    return ops.ssf(x, scale, shift, x.dim() - 1)  # type: ignore[no-any-return]


def plain_adapter(x: Tensor, wd: Tensor, bd: Tensor, wu: Tensor, bu: Tensor, scale: Tensor | float) -> Tensor:
    """What one writes."""
    return x + scale * F.linear(F.gelu(F.linear(x, wd, bd)), wu, bu)


def our_adapter(x: Tensor, wd: Tensor, bd: Tensor, wu: Tensor, bu: Tensor, scale: Tensor | float) -> Tensor:
    """The public function."""
    return bottleneck_adapter(x, wd, bd, wu, bu, "gelu", scale, x)


def registered_adapter(x: Tensor, wd: Tensor, bd: Tensor, wu: Tensor, bu: Tensor, scale: Tensor | float) -> Tensor:
    """The operation, whatever the size."""
    number, learned = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    rows = x.reshape(-1, x.shape[-1])
    return ops.bottleneck_adapter(rows, wd, bd, wu, bu, "gelu", number, learned, rows)[0].view_as(x)  # type: ignore[no-any-return]


def forced(forward: Forward) -> Forward:
    """``forward`` with the Triton kernels asked for by name."""

    def inside(*inputs: Any) -> Tensor:
        with dispatch.use_backend("triton"):
            return forward(*inputs)

    return inside


def bytes_kept(forward: Forward, inputs: Sequence[Any]) -> int:
    """Storage that autograd saves, the parameters left out, shared storage once."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> None:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()

    with watching(note):
        forward(*inputs)
    for leaf in inputs[1:]:
        if isinstance(leaf, Tensor):
            kept.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def compete(
    op: str, shape: str, variants: dict[str, Forward], inputs: Sequence[Any], rounds: int
) -> list[dict[str, Any]]:
    """Forward and backward of each variant, in turn; the first is ours."""
    leaves = [t for t in inputs if isinstance(t, Tensor)]
    x = leaves[0]
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wanted = None
    forward_times: dict[str, list[float]] = {name: [] for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    kept = {}
    for name, forward in variants.items():
        grads = torch.autograd.grad(forward(*inputs), leaves, g)
        wanted = wanted or grads
        limit = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
        for one, other in zip(grads, wanted):
            if other.numel() > 1:
                assert (one - other).float().norm() <= limit * other.float().norm(), f"{name}: gradients differ"
        kept[name] = bytes_kept(forward, inputs)
    for turn in range(rounds + 2):
        for name, forward in variants.items():
            wait()
            begin = time.perf_counter()
            y = forward(*inputs)
            wait()
            middle = time.perf_counter()
            torch.autograd.grad(y, leaves, g)
            wait()
            if turn > 1:
                forward_times[name].append(1e3 * (middle - begin))
                times[name].append(1e3 * (time.perf_counter() - begin))
    first = statistics.median(times[next(iter(times))])
    made = []
    for name, found in times.items():
        low, half, high = np.quantile(found, [0.2, 0.5, 0.8])
        forward_ms = statistics.median(forward_times[name])
        made.append(
            {
                "op": op,
                "shape": shape,
                "dtype": f"{str(x.dtype).removeprefix('torch.')} {x.device.type}",
                "variant": name,
                "median_ms": round(float(half), 4),
                "p20_ms": round(float(low), 4),
                "p80_ms": round(float(high), 4),
                "ratio": round(first / float(half), 3),
                "note": f"forward {forward_ms:.3f} ms, keeps {kept[name] / 2**20:.2f} MiB",
            }
        )
    return made


def cases(shape: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """Both operations at one shape."""
    make = torch.Generator().manual_seed(0)
    dim, rank = shape[-1], 64

    def leaf(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=make) * by).to(device, dtype).requires_grad_()

    def with_kernels(variants: dict[str, Forward], operation: Forward) -> dict[str, Forward]:
        if device == "cuda" and dispatch.unavailable("triton") is None:
            variants["Triton kernels"] = forced(operation)
        return variants

    name = "x".join(str(n) for n in shape)
    scaled = {
        "ours": ssf,
        "operation": registered_ssf,
        "plain": plain_ssf,
        "torch.compile": torch.compile(plain_ssf),
    }
    found = compete("ssf", name, with_kernels(scaled, registered_ssf), [leaf(*shape), leaf(dim), leaf(dim)], rounds)
    weights = [leaf(rank, dim, by=dim**-0.5), leaf(rank), leaf(dim, rank, by=rank**-0.5), leaf(dim)]
    for op, scale in (("bottleneck", 0.1), ("bottleneck, scale trained", leaf(by=0.1))):
        adapters = {
            "ours": our_adapter,
            "operation": registered_adapter,
            "plain": plain_adapter,
            "torch.compile": torch.compile(plain_adapter),
        }
        inputs = [leaf(*shape), *weights, scale]
        found += compete(op, name, with_kernels(adapters, registered_adapter), inputs, rounds)
    torch.compiler.reset()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    shapes = [(8, 197, 768)] if options.quick else [(1, 197, 768), (8, 197, 768), (32, 197, 768)]
    found: list[dict[str, Any]] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
            for shape in shapes:
                found += cases(shape, dtype, device, rounds)
    table.show("Fused kernels", found)
    table.write(options.out / "fused", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
