"""What ``peft-suite doctor`` looks at. Each check is a row: group, name, status (ok, note, broken), detail, fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from peft_suite.errors import PeftSuiteError
from peft_suite.plugins import plugins, resolve

__all__ = ["KNOWN_GOOD", "examine"]

KNOWN_GOOD = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}
_NEEDED = ("torch", "numpy", "safetensors", "accelerate", "torchmetrics", "matplotlib")
_OPTIONAL = ("torchvision", "torchaudio", "triton", "timm", "transformers", "diffusers", "onnx")


def examine() -> list[dict[str, str]]:
    """Every check, in the order in which one would mend things."""
    rows = [_python(), *map(_library, (*_NEEDED, *_OPTIONAL)), _pairing()]
    return [*rows, *_devices(), _kernels(), *_plugins(), *_places()]


def _row(group: str, name: str, status: str, detail: str = "", fix: str = "") -> dict[str, str]:
    return {"group": group, "name": name, "status": status, "detail": " ".join(detail.split()), "fix": fix}


def _python() -> dict[str, str]:
    fine = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return _row("python", "python", "ok" if fine else "broken", detail, "" if fine else "Use Python 3.11 or newer")


def _library(name: str) -> dict[str, str]:
    needed = name in _NEEDED
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        status = "broken" if needed else "note"
        return _row("library", name, status, "not installed", f"pip install {name}" if needed else "")
    good = KNOWN_GOOD.get(name)
    if good and version.partition("+")[0] != good:
        return _row("library", name, "note", f"{version}; {good} is the tested version", f"pip install {name}=={good}")
    return _row("library", name, "ok", version + (" (tested version)" if good else ""))


def _pairing() -> dict[str, str]:
    """torch and its companions are compiled for each other: a wrong pair fails when imported."""
    for name in ("torch", "torchvision"):
        try:
            importlib.metadata.version(name)
            importlib.import_module(name)
        except importlib.metadata.PackageNotFoundError:
            return _row("library", "torch + torchvision", "note", f"{name} is not installed")
        except Exception as error:
            pair = " ".join(f"{n}=={KNOWN_GOOD[n]}" for n in ("torch", "torchvision"))
            return _row("library", "torch + torchvision", "broken", f"import {name}: {error}", f"pip install {pair}")
    return _row("library", "torch + torchvision", "ok", "import together")


def _devices() -> list[dict[str, str]]:
    try:
        torch: Any = importlib.import_module("torch")
    except Exception:
        return []
    rows = [_row("device", "cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            rows.append(_row("device", f"cuda:{index}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    elif torch.version.cuda and shutil.which("nvidia-smi"):
        rows.append(_row("device", "cuda", "note", "a driver is there, but torch sees no GPU", "Check nvidia-smi"))
    else:
        rows.append(_row("device", "cuda", "note", "no GPU found: training runs on the CPU"))
    if torch.backends.mps.is_available():
        rows.append(_row("device", "mps", "ok", "Apple GPU"))
    return rows


def _kernels() -> dict[str, str]:
    try:
        kernels = importlib.import_module("peft_suite.kernels")
    except ImportError:
        return _row("kernels", "peft_suite.kernels", "note", "not part of this installation")
    except Exception as error:
        return _row("kernels", "peft_suite.kernels", "broken", str(error), "Reinstall peft-suite")
    names = sorted(n for n in getattr(kernels, "__all__", ()) if not n.startswith("_"))
    return _row("kernels", "peft_suite.kernels", "ok", ", ".join(names) or "importable")


def _plugins() -> list[dict[str, str]]:
    try:
        found = plugins()
    except PeftSuiteError as error:
        return [_row("plugin", "plugins", "broken", str(error))]
    rows = []
    for item in found:
        source = f"{item.distribution} {item.version}".strip()
        if item.plugin is None:
            fix = f"Reinstall {item.distribution}, or hide it with PEFT_SUITE_DISABLE={item.name}"
            rows.append(_row("plugin", item.name, "broken", f"{source}: {item.error}", fix))
        elif lost := item.plugin.missing():
            rows.append(
                _row("plugin", item.name, "note", f"{', '.join(lost)} not installed", item.plugin.install_line())
            )
        else:
            rows.append(_row("plugin", item.name, "ok", f"{source}, {len(item.plugin.methods)} methods"))
            if item.plugin.doctor:
                try:
                    rows.extend(resolve(item.plugin.doctor)())
                except Exception as error:
                    rows.append(_row("plugin", f"{item.name}: doctor", "broken", str(error)))
    return rows


def _places() -> list[dict[str, str]]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    low = free < 1
    disk = _row("disk", "free space here", "note" if low else "ok", f"{free:.1f} GiB", "Free some space" if low else "")
    home = os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    told = f"published weights are kept in {home}" + (
        "; HF_HUB_OFFLINE is set: only kept ones can be used" if offline else ""
    )
    hint = "Without a network: --checkpoint FILE, or --no-pretrained" if offline else ""
    return [disk, _row("hub", "weights", "note" if offline else "ok", told, hint)]
