"""Kernels run in Triton's interpreter here, which is decided when Triton is first imported.

So this folder needs a process of its own (``pytest tests/kernels/interpreter``), and in any other one it is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_reason: list[str] = []


def _own_process(config: pytest.Config) -> bool:
    paths = [Path(config.invocation_params.dir, str(arg).split("::")[0]).resolve() for arg in config.args]
    return all(path == HERE or HERE in path.parents for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("triton") is None:
        _reason.append("Triton is not installed")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        pass
    elif not _own_process(config):
        _reason.append("the interpreter needs a process of its own: pytest tests/kernels/interpreter")
    elif "triton" in sys.modules:
        _reason.append("Triton was imported before TRITON_INTERPRET=1 was set")
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collect_file(file_path: Path) -> None:
    if _reason and file_path.parent == HERE:
        pytest.skip(_reason[0])
