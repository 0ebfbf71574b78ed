"""What the kernel tests share: hard point clouds, and the places (device, back end) every operation is tested on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import currently_in_test_context, reject
from torch import Tensor

from peft_suite import kernels
from peft_suite.errors import KernelBackendError
from peft_suite.kernels.dispatch import unavailable

KINDS = ("normal", "grid", "duplicated", "identical", "collinear", "shifted", "holes")


def cloud(kind: str, batch: int, n: int, dim: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(B, N, D) of one kind; "grid" has exact ties, "shifted" an offset of 100, "holes" NaN and infinities."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=make, dtype=torch.float64)
    if kind == "grid":
        x = torch.randint(-2, 3, (batch, n, dim), generator=make).double() * 0.5
    elif kind == "duplicated":
        x = x[:, torch.randint(0, max(n // 3, 1), (n,), generator=make)] if n else x
    elif kind == "identical":
        x = x[:, :1].expand(batch, n, dim) if n else x
    elif kind == "collinear":
        x = x[..., :1] * torch.arange(1, dim + 1).double()
    elif kind == "shifted":
        x = x + 100
    elif kind == "holes" and n:
        at = torch.randint(0, n, (3,), generator=make)
        x[:, at[0], 0], x[:, at[1], -1], x[:, at[2]] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


@dataclass(frozen=True)
class Place:
    """A device and a back end asked for by name."""

    device: str
    backend: str

    @contextlib.contextmanager
    def __call__(self) -> Iterator[str]:
        """Inside, operations run in this place; a call that the back end declares impossible skips the test."""
        try:
            with kernels.use_backend(self.backend):
                yield self.device
        except KernelBackendError as reason:
            if currently_in_test_context():
                reject()
            pytest.skip(str(reason))


def _place(device: str, backend: str) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    reason = unavailable(backend)
    if device == "cuda" and not torch.cuda.is_available():
        reason = "needs a CUDA device"
    if reason:
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(Place(device, backend), id=f"{device}-{backend}", marks=marks)


def places(*cpu: str) -> list[object]:
    """The CPU back ends named, and both GPU ones."""
    return [_place("cpu", backend) for backend in cpu] + [_place("cuda", "torch"), _place("cuda", "triton")]
