"""Which back end runs a kernel: what is installed, what was asked for, and what pays at this size.

An operation lists its forms in order of preference. Under the automatic choice the first one that is available, can run
the call and does not pass on it is taken. A back end that was asked for by name, through the environment variable
``PEFT_SUITE_KERNELS``, :func:`set_backend` or :func:`use_backend`, runs or raises with the reason; operations that have
no form of that name use torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_suite.errors import KernelBackendError, UnknownNameError
from peft_suite.kernels.triton.common import interpreted  # imports no Triton

__all__ = [
    "BACKENDS",
    "BackendReport",
    "Form",
    "Op",
    "backends",
    "current_backend",
    "debug_enabled",
    "set_backend",
    "set_debug",
    "use_backend",
    "warmup",
]

BACKENDS = ("auto", "triton", "numba", "scipy", "pointnet2_ops", "torch", "reference")
log = logging.getLogger("peft_suite.kernels")


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why a back end cannot run on this machine at all; None when it can."""
    if backend in ("torch", "reference"):
        return None
    if importlib.util.find_spec(backend) is None:
        hints = {"numba": "pip install 'peft-suite[cpu]'", "scipy": "pip install 'peft-suite[cpu]'"}
        hints["triton"] = "pip install 'peft-suite[triton]' (Linux)"
        hint = hints.get(backend, "it has to be built from source against CUDA")
        return f"{backend} is not installed; {hint}"
    if backend == "triton" and not interpreted():
        try:
            from torch.utils._triton import has_triton

            active = bool(has_triton())
        except Exception as error:  # a broken driver or Triton raises many kinds
            return f"Triton does not start: {error}"
        if not active:
            return "Triton finds no active GPU driver (set TRITON_INTERPRET=1 before Python starts to interpret)"
    return None


@dataclass(frozen=True)
class Form:
    """One implementation of an operation.

    Attributes:
        backend: one of ``BACKENDS``.
        target: ``module:function``. The module may define ``<function>_cannot(*args)``, which returns why the call is
            impossible for it, and ``<function>_pass(*args)``, which returns why another back end is faster.
        devices: device types on which it runs.
        automatic: whether the automatic choice considers it.
    """

    backend: str
    target: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    automatic: bool = True

    @functools.cached_property
    def functions(self) -> tuple[Callable[..., Any], Callable[..., str | None], Callable[..., str | None]]:
        """(function, cannot, pass), imported at first use."""
        name, _, attribute = self.target.partition(":")
        module = importlib.import_module(name)
        return (
            getattr(module, attribute),
            getattr(module, f"{attribute}_cannot", _never),
            getattr(module, f"{attribute}_pass", _never),
        )

    def refuses(self, device: str, args: tuple[Any, ...], forced: bool) -> str | None:
        """Why this form does not take the call; None when it does."""
        reason = unavailable(self.backend)
        if reason is not None:
            return reason
        if device not in self.devices and not (self.backend == "triton" and interpreted() and forced):
            return f"it runs on {' and '.join(self.devices)} tensors, not on {device}"
        if not forced and not self.automatic:
            return "it runs only when asked for by name"
        try:
            _, cannot, passes = self.functions
        except Exception as error:  # numba and triton raise many kinds when their own dependencies are off
            return f"{self.target.partition(':')[0]} does not import: {type(error).__name__}: {error}"
        return cannot(*args) or (None if forced else passes(*args))


def _never(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Op:
    """An operation and its forms, the preferred one first; the torch form takes whatever the others leave."""

    name: str
    forms: tuple[Form, ...]

    def __init__(self, name: str, *forms: Form) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "forms", forms)
        _OPS[name] = self

    def choose(self, device: torch.device, *args: Any) -> Form:
        """The form that runs this call.

        Raises:
            KernelBackendError: a back end was asked for by name and cannot run it.
        """
        wanted = current_backend()
        if wanted != "auto":
            for form in self.forms:
                if form.backend == wanted:
                    reason = form.refuses(device.type, args, forced=True)
                    if reason is None:
                        return form
                    others = [
                        f.backend for f in self.forms if f is not form and f.refuses(device.type, args, True) is None
                    ]
                    raise KernelBackendError(
                        f"The back end {wanted!r} was asked for and cannot run {self.name} on {device.type}: {reason}. "
                        f"Able to run this call: {', '.join(others)}; or set PEFT_SUITE_KERNELS=auto."
                    )
        reasons = []
        for form in self.forms:
            if wanted != "auto" and form.backend != "torch":
                continue
            reason = form.refuses(device.type, args, forced=False)
            if reason is None:
                return form
            _note(self.name, form.backend, reason)
            reasons.append(f"{form.backend}: {reason}")
        raise KernelBackendError(f"No back end runs {self.name} on {device.type} tensors: {'; '.join(reasons)}")

    def __call__(self, device: torch.device, *args: Any) -> Any:
        """Run on ``device``, with autocast off: coordinates given as float32 stay float32."""
        function = self.choose(device, *args).functions[0]
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return function(*args)
        return function(*args)


_OPS: dict[str, Op] = {}


@functools.cache
def _note(op: str, backend: str, reason: str) -> None:
    log.debug("%s: %s left out: %s", op, backend, reason)


class _State:
    backend: str = "auto"
    debug: bool = False


def _valid(name: str) -> str:
    if name not in BACKENDS:
        raise UnknownNameError("kernel back end", name, BACKENDS)
    return name


def current_backend() -> str:
    """The back end asked for by name, or ``"auto"``."""
    return _State.backend


def set_backend(name: str) -> None:
    """Ask for a back end by name for the whole process: one of ``BACKENDS``; ``"auto"`` returns to the choice.

    Raises:
        UnknownNameError: no such back end.
    """
    _State.backend = _valid(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """:func:`set_backend` for the length of a ``with`` block. Process-wide: other threads see it too."""
    before = _State.backend
    set_backend(name)
    try:
        yield
    finally:
        _State.backend = before


def debug_enabled() -> bool:
    """Whether indices are range-checked on GPUs and inputs scanned for NaN and infinity (both synchronise)."""
    return _State.debug


def set_debug(on: bool) -> None:
    """Turn the checks of :func:`debug_enabled` on or off; ``PEFT_SUITE_KERNELS_DEBUG=1`` starts with them on."""
    _State.debug = on


@dataclass(frozen=True)
class BackendReport:
    """What :func:`backends` found. ``print`` it, or read ``rows``: (operation, back end, "ready" or the reason)."""

    device: str
    forced: str
    rows: tuple[tuple[str, str, str], ...] = field(repr=False)

    def __str__(self) -> str:
        head = f"kernels on {self.device}, back end asked for: {self.forced}"
        wide = [max((len(r[i]) for r in self.rows), default=0) for i in (0, 1)]
        lines = [f"{op:<{wide[0]}}  {backend:<{wide[1]}}  {state}" for op, backend, state in self.rows]
        return "\n".join([head, *lines])


def backends(device: str | torch.device | None = None) -> BackendReport:
    """What would run on ``device`` (default: the GPU if there is one), in order of preference, and why the rest not.

    Reasons that depend on sizes are left out: they show at debug level of the logger ``peft_suite.kernels``.
    """
    importlib.import_module("peft_suite.kernels.api")
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in sorted(_OPS.values(), key=lambda o: o.name):
        for form in op.forms:
            reason = unavailable(form.backend)
            if reason is None and kind not in form.devices:
                reason = f"runs on {' and '.join(form.devices)} only"
            if reason is None and not form.automatic:
                reason = "ready, only when asked for by name"
            rows.append((op.name, form.backend, reason or "ready"))
    return BackendReport(kind, current_backend(), tuple(rows))


def warmup() -> list[str]:
    """Compile the CPU kernels now, once per machine (numba caches them on disk); returns the modules warmed."""
    importlib.import_module("peft_suite.kernels.api")
    warmed = []
    for target in sorted(
        {f.target.partition(":")[0] for op in _OPS.values() for f in op.forms if f.backend == "numba"}
    ):
        if unavailable("numba") is None:
            importlib.import_module(target).warmup()
            warmed.append(target)
    return warmed


set_backend(os.environ.get("PEFT_SUITE_KERNELS", "auto") or "auto")
set_debug(os.environ.get("PEFT_SUITE_KERNELS_DEBUG", "0") not in ("", "0"))
