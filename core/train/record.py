"""What a run leaves behind: ``run.json``, ``examples.json`` and the object that :func:`fit` returns."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_suite.errors import ConfigError, FileFormatError
from peft_suite.kernels.recompute import watching
from peft_suite.storage import write_json
from peft_suite.train.contracts import DataSplits
from peft_suite.train.task import Outcome

__all__ = [
    "PeakMemory",
    "RunResult",
    "changed_fields",
    "choose_examples",
    "platform_facts",
    "read_run",
    "run_identity",
    "versions",
    "write_thumbnails",
]

EXAMPLES = 12  # of each kind, right and wrong


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        out: the run directory, with ``run.json``, ``adapter/`` and ``checkpoint/``.
        record: the content of ``run.json``.
        report: the HTML page, once written.
    """

    out: Path
    record: dict[str, Any] = field(repr=False)
    report: Path | None = None

    @property
    def adapter(self) -> Path:
        """The adapter directory."""
        return self.out / "adapter"

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per epoch."""
        history: list[dict[str, Any]] = self.record["history"]
        return history

    @property
    def metrics(self) -> dict[str, float | None]:
        """Final metrics of the test split, else of the validation split."""
        final = self.record["final"]
        chosen: dict[str, float | None] = final["test"] or final["val"] or {}
        return chosen

    @property
    def score(self) -> float | None:
        """The primary metric of :attr:`metrics`."""
        return self.metrics.get(self.record["metric"])


def read_run(out: Path) -> dict[str, Any] | None:
    """The content of ``out/run.json``; None when there is none.

    Raises:
        FileFormatError: the file is not a run record.
    """
    path = out / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read ({error}). Remove it to start again.") from error
    if not isinstance(record, dict) or "status" not in record:
        raise FileFormatError(f"{path} is no run record. Choose another output directory.")
    return record


def versions() -> dict[str, str]:
    """Versions of Python and of every library that can change a result, where installed."""
    found = {"python": platform.python_version()}
    for name in (
        "peft-suite",
        "torch",
        "torchvision",
        "torchaudio",
        "timm",
        "transformers",
        "diffusers",
        "accelerate",
        "numpy",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name.replace("-", "_")] = importlib.metadata.version(name)
    return found


def platform_facts(device: torch.device, world: int, precision: str) -> dict[str, Any]:
    """Where the run took place."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "world_size": world,
        "precision": precision,
    }


def choose_examples(outcome: Outcome, data: DataSplits, split: str, limit: int = EXAMPLES) -> list[dict[str, Any]]:
    """Confident wrong samples, then confident right ones, at most ``limit`` of each, classes in turn."""
    dataset = getattr(data, split)
    confident = sorted(range(len(outcome.correct)), key=lambda i: (-outcome.probability[i], i))
    turns: Counter[tuple[str, bool]] = Counter()
    rounds: dict[int, int] = {}
    for i in confident:
        group = (str(outcome.prediction[i]), bool(outcome.correct[i]))
        rounds[i] = turns[group]
        turns[group] += 1
    order = sorted(confident, key=rounds.__getitem__)  # stable: the most confident of every class come first
    wrong = [i for i in order if not outcome.correct[i]][:limit]
    right = [i for i in order if outcome.correct[i]][:limit]
    return [
        {
            "name": data.sample_name(dataset, i) if data.sample_name else f"{split}[{i}]",
            "target": outcome.target[i],
            "prediction": outcome.prediction[i],
            "probability": round(outcome.probability[i], 6),
            "correct": outcome.correct[i],
            "split": split,
            "index": i,
        }
        for i in wrong + right
    ]


def write_thumbnails(
    out: Path, data: DataSplits, examples: list[dict[str, Any]], maps: torch.Tensor | None = None
) -> None:
    """``out/examples.json``: ``{"png": [base64 or null, ...]}`` in the order of ``run.json``'s examples.

    Data with sounds adds ``"audio"``, a list of the same form.
    """
    pictures: list[str | None] = []
    sounds: list[str] = []
    for example in examples:
        dataset, index = getattr(data, example["split"]), example["index"]
        if data.picture and maps is not None:
            raw: bytes | None = data.picture(dataset, index, maps[index])
        else:
            raw = data.thumbnail(dataset, index) if data.thumbnail else None
        pictures.append(base64.b64encode(raw).decode("ascii") if raw else None)
        if data.sound:
            sounds.append(base64.b64encode(data.sound(dataset, index)).decode("ascii"))
    write_json(out / "examples.json", {"png": pictures, **({"audio": sounds} if data.sound else {})}, indent=None)


class PeakMemory:
    """Peak memory of training: what the CUDA allocator saw; elsewhere what the first step keeps.

    Off CUDA the resident set says little, because allocators keep what earlier runs freed. So tensors are counted:
    parameters, buffers, gradients, optimizer state, and what the first forward saves for its backward.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._saved: dict[int, int] = {}  # address of a storage -> bytes
        self._counted = device.type == "cuda"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Around a forward: the first time, count the storages that it saves, each once."""
        if self._counted:
            yield
            return
        self._counted = True

        def note(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            self._saved[storage.data_ptr()] = storage.nbytes()

        with watching(note):
            yield

    def mib(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> float:
        """MiB, one decimal."""
        if self._device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self._device) / 2**20, 1)
        weights = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        kept = {**self._saved, **{w.data_ptr(): w.nbytes() for w in weights}}
        moving = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        states = optimizer.state.values() if optimizer else ()
        moments = sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t))
        return round((sum(kept.values()) + moving + moments) / 2**20, 1)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or f"{os.cpu_count()} cores"


def run_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that must be equal for two starts to be one run, as dotted keys."""
    kept = {key: value for key, value in config.items() if key not in ("out", "seeds", "device")}
    flat = _flat(kept)
    flat.pop("data.workers", None)
    return flat


def changed_fields(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError naming what differs between a stored run and this start.

    A field that the version which stored the run did not know counts as its default.
    """
    from peft_suite.train.config import RunConfig

    defaults = run_identity(RunConfig.from_dict({"plugin": ""}).to_dict())
    before = {**{key: value for key, value in defaults.items() if key in now}, **before}
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        listing = "; ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in changed[:5])
        raise ConfigError(
            f"{out} was started with another configuration: {listing}. Resume with the same values, or choose another "
            "output directory."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    return {
        k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
