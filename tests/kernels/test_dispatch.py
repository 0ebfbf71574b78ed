"""The choice of a back end: forced, automatic, reported; lazy imports."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys

import pytest
import torch

from peft_suite import kernels
from peft_suite.errors import KernelArgumentError, KernelBackendError, PeftSuiteError, UnknownNameError
from peft_suite.kernels import dispatch


def test_report_names_every_operation_and_reason() -> None:
    report = kernels.backends("cpu")
    assert {"knn", "farthest_point_sampling", "ball_query", "gather_rows"} <= {row[0] for row in report.rows}
    states = {(op, backend): state for op, backend, state in report.rows}
    assert states["knn", "torch"] == "ready"
    assert states["knn", "reference"] == "ready, only when asked for by name"
    assert (
        "GPU" in states["knn", "triton"] or "cuda" in states["knn", "triton"] or "installed" in states["knn", "triton"]
    )
    assert all(len(line) > 10 for line in str(report).splitlines())


def test_every_form_resolves() -> None:
    """A misspelt target would otherwise hide behind the fall-back."""
    kernels.backends()
    for op in dispatch._OPS.values():
        for form in op.forms:
            if importlib.util.find_spec(form.backend.replace("reference", "torch")) is None:
                continue
            module, _, name = form.target.partition(":")
            assert callable(getattr(importlib.import_module(module), name)), form.target


def test_forced_back_end_that_cannot_run_says_why_and_what_can() -> None:
    x = torch.zeros(1, 4, 3)
    if not torch.cuda.is_available():
        with kernels.use_backend("triton"), pytest.raises(KernelBackendError, match=r"'triton' was asked for .*torch"):
            kernels.knn(x, x, 2)
    with (
        kernels.use_backend("pointnet2_ops"),
        pytest.raises(KernelBackendError, match=r"not installed|runs on cuda"),
    ):
        kernels.ball_query(x, x, 1.0, 2)
    assert kernels.current_backend() == "auto"
    with pytest.raises(UnknownNameError, match="Did you mean 'triton'"):
        kernels.set_backend("tritn")
    assert issubclass(KernelBackendError, PeftSuiteError) and issubclass(KernelArgumentError, ValueError)


def test_operations_without_a_form_of_that_name_use_torch() -> None:
    if dispatch.unavailable("numba"):
        pytest.skip("numba is not installed")
    with kernels.use_backend("numba"):
        assert kernels.gather_points(torch.zeros(1, 4, 3), torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, 3)


def test_falling_back_is_said_once_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._note.cache_clear()
    x = torch.zeros(1, 4, 3)
    with caplog.at_level(logging.DEBUG, logger="peft_suite.kernels"):
        kernels.knn(x, x, 2)
        kernels.knn(x, x, 2)
    said = [r.getMessage() for r in caplog.records if "triton left out" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("knn: triton left out: ")


def test_environment_variable() -> None:
    code = "import peft_suite.kernels as k; print(k.current_backend())"
    run = [sys.executable, "-c", code]
    assert (
        subprocess.run(run, env={**os.environ, "PEFT_SUITE_KERNELS": "torch"}, capture_output=True, text=True).stdout
        == "torch\n"
    )
    wrong = subprocess.run(run, env={**os.environ, "PEFT_SUITE_KERNELS": "cuda"}, capture_output=True, text=True)
    assert wrong.returncode != 0 and "Unknown kernel back end 'cuda'" in wrong.stderr


def test_importing_kernels_imports_no_compiler() -> None:
    code = (
        "import sys, torch, peft_suite.kernels, peft_suite.kernels.compat\n"
        "before = {'triton'} & set(sys.modules)\n"
        "heavy = ({'numba', 'scipy', 'triton', 'peft_suite.adapter'} - before) & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_debug_mode_scans_values() -> None:
    x = torch.full((1, 4, 3), torch.nan)
    kernels.knn(x, x, 2)
    kernels.set_debug(True)
    try:
        with pytest.raises(KernelArgumentError, match="finite values"):
            kernels.knn(x, x, 2)
    finally:
        kernels.set_debug(False)
