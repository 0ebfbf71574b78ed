"""What every Triton file shares: launch guard, sizes, and how a kernel is described for the compile check."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["CompileCase", "ceil_div", "interpreted", "launch_guard", "next_power_of_2", "signature"]


@dataclass(frozen=True)
class CompileCase:
    """One kernel configuration that must compile for sm_80 and sm_90 without a GPU.

    Attributes:
        kernel: the ``triton.jit`` function.
        signature: argument name -> type in Triton's notation (``*fp32``, ``i64``, ``constexpr``).
        constexprs: argument name -> value of the compile-time arguments.
        options: launch options beside ``num_warps`` (``enable_fp_fusion`` is always among them).
        max_spill_bytes: what the specification accepts; 0 unless a reason is written beside the case.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    max_spill_bytes: int = 0


def launch_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's own GPU current: a launch would otherwise go to device 0."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter (decided before the first import of Triton)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def signature(kernel: Any, constexprs: Mapping[str, Any], **types: str) -> dict[str, str]:
    """The signature of a compile case: the named types, ``i32`` for the other run-time arguments."""
    return {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
