"""Argument checks of the public functions: each names the argument, its shape and what was expected.

Shapes, dtypes and devices are checked where they are free; values only on CPU tensors or in debug mode, inside the
registered operations, so that compiled graphs stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_suite.errors import KernelArgumentError
from peft_suite.kernels import dispatch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def fail(argument: str, found: str, expected: str) -> KernelArgumentError:
    """The error, ready to raise."""
    return KernelArgumentError(f"Argument {argument!r}: {found}; expected {expected}.")


def shape_of(x: Tensor) -> str:
    """``float32 (2, 64, 3) on cpu``, for messages."""
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def tensor(argument: str, x: Any, layout: str, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """``x`` as a tensor of the rank that ``layout`` such as ``"(B, N, D)"`` has, and one of ``dtypes``."""
    if not isinstance(x, Tensor):
        raise fail(argument, f"is a {type(x).__name__}", f"a tensor {layout}")
    rank = layout.count(",") + 1
    if layout.endswith(",)"):
        rank = 1
    if x.dim() != rank:
        raise fail(argument, f"has {x.dim()} dimensions: {shape_of(x)}", f"{rank}, {layout}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(argument, f"has dtype {str(x.dtype).removeprefix('torch.')}: {shape_of(x)}", f"one of {names}")
    return x


def points(argument: str, x: Any, dim: int | None = None) -> Tensor:
    """Coordinates or features (B, N, D), floating; ``dim`` fixes D."""
    found = tensor(argument, x, "(B, N, D)" if dim is None else f"(B, N, {dim})")
    if dim is not None and found.shape[-1] != dim:
        wanted = f"{dim} coordinates, (B, N, {dim})"
        raise fail(argument, f"has last dimension {found.shape[-1]}: {shape_of(found)}", wanted)
    if found.shape[-1] == 0:
        raise fail(argument, f"has no coordinates: {shape_of(found)}", "D ≥ 1")
    return found


def alike(first: str, a: Tensor, second: str, b: Tensor, last: bool = True, dtype: bool = True) -> None:
    """Same device, batch size, and (if asked) dtype and last dimension."""
    if a.device != b.device:
        raise fail(second, f"is on {b.device}", f"{a.device}, where {first!r} is")
    if dtype and a.dtype != b.dtype:
        raise fail(second, f"is {shape_of(b)}", f"the dtype of {first!r}, {a.dtype}; convert one of them")
    if a.shape[0] != b.shape[0]:
        raise fail(second, f"is {shape_of(b)}", f"the batch size of {first!r}, {a.shape[0]}")
    if last and a.shape[-1] != b.shape[-1]:
        raise fail(second, f"is {shape_of(b)}", f"the last dimension of {first!r}, {a.shape[-1]}")


def count(argument: str, n: Any, least: int = 0) -> int:
    """An integer that is at least ``least``."""
    if isinstance(n, bool) or not isinstance(n, int | torch.SymInt):
        raise fail(argument, f"is {n!r}", f"an integer ≥ {least}")
    if isinstance(n, int) and n < least:
        raise fail(argument, f"is {n}", f"an integer ≥ {least}")
    return n  # type: ignore[return-value]


def positive(argument: str, value: Any) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(argument, f"is {type(value).__name__}", "a Python number above 0")
    if not (value > 0 and math.isfinite(value)):
        raise fail(argument, f"is {value}", "a finite number above 0")
    return float(value)


def choice(argument: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of ``choices``."""
    if value not in choices:
        raise fail(argument, f"is {value!r}", "one of " + ", ".join(repr(c) for c in choices))
    return value


def index_dtype(value: Any) -> torch.dtype:
    """int32 or int64."""
    if value not in INTEGERS:
        raise fail("index_dtype", f"is {value}", "torch.int32 or torch.int64")
    return value  # type: ignore[no-any-return]


def lengths(argument: str, value: Any, like: Tensor) -> Tensor | None:
    """(B,) integers, one per cloud of ``like``; given to the operations as int64."""
    if value is None:
        return None
    found = tensor(argument, value, "(B,)", INTEGERS)
    if found.shape[0] != like.shape[0]:
        raise fail(argument, f"is {shape_of(found)}", f"one length per cloud, ({like.shape[0]},)")
    if found.device != like.device:
        raise fail(argument, f"is on {found.device}", f"{like.device}, where the points are")
    return found.to(torch.int64)


def index(argument: str, value: Any, layout: str) -> Tensor:
    """Integer indices of the rank of ``layout``."""
    return tensor(argument, value, layout, INTEGERS)


def looks_at_values(x: Tensor) -> bool:
    """Whether values of ``x`` may be read for a check without surprising anybody: on CPU, or in debug mode."""
    return x.device.type == "cpu" or dispatch.debug_enabled()


def index_values(argument: str, value: Tensor, least: int, below: int) -> None:
    """Every index lies in [least, below)."""
    if value.numel() == 0 or not looks_at_values(value):
        return
    low, high = (int(v) for v in torch.aminmax(value))
    if low < least or high >= below:
        bad = low if low < least else high
        raise fail(argument, f"holds {bad}: {shape_of(value)}", f"indices from {least} to {below - 1}")


def length_values(argument: str, value: Tensor | None, most: int) -> None:
    """Every length lies in [0, most]."""
    if value is None or value.numel() == 0 or not looks_at_values(value):
        return
    low, high = (int(v) for v in torch.aminmax(value))
    if low < 0 or high > most:
        raise fail(argument, f"holds {low if low < 0 else high}", f"lengths from 0 to {most}, the points given")


def finite_values(argument: str, value: Tensor, asked: bool = False) -> None:
    """No NaN and no infinity, where asked or in debug mode; synchronises on a GPU."""
    if (asked or dispatch.debug_enabled()) and not bool(torch.isfinite(value).all()):
        where = torch.nonzero(~torch.isfinite(value))[0].tolist()
        raise fail(
            argument, f"holds {value[tuple(where)].item()} at {tuple(where)}: {shape_of(value)}", "finite values"
        )
