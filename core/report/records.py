"""Runs as they lie on disk: reading ``run.json``, naming what was run, and means over seeds."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_suite.errors import FileFormatError

__all__ = ["Group", "Run", "find_runs", "group_runs", "method_label", "read_run"]

PREFERRED = ("accuracy", "top1", "acc", "map", "mAP", "mean_average_precision", "f1", "macro_f1")
_SKIPPED = frozenset({"adapter", "checkpoint", "checkpoints", "logs"})


@dataclass(frozen=True)
class Run:
    """One ``run.json`` and where it lies."""

    path: Path
    data: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Did training come to its end?"""
        return self.data.get("status") == "finished"

    @property
    def seed(self) -> int:
        """The seed, 0 where none is recorded."""
        return int(number(self.data.get("seed")) or 0)

    @property
    def method(self) -> str:
        """Method with the fields that were set for this run."""
        config = section(self.data, "config").get("method")
        return method_label(config) or method_label(section(self.data, "method")) or "?"

    @property
    def task(self) -> str:
        """Name of the task: what the data says of itself, else its folder."""
        facts = section(self.data, "data")
        info = section(facts, "info")
        for value in (info.get("task"), info.get("name"), facts.get("task")):
            if isinstance(value, str) and value:
                return value
        root = str(section(section(self.data, "config"), "data").get("root") or "")
        return Path(root).name or root or str(self.data.get("plugin") or "task")

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        value = section(self.data, "config").get("backbone")
        return str(value.get("name") or "") if isinstance(value, Mapping) else str(value or "")

    @property
    def error(self) -> str:
        """Why the run failed, in one line; "" when it did not."""
        value = self.data.get("error")
        if isinstance(value, Mapping):
            value = ": ".join(str(value[k]) for k in ("type", "message") if value.get(k)) or str(dict(value))
        return " ".join(str(value).split()) if value else ""

    def scores(self) -> tuple[str, dict[str, float]]:
        """(split, metrics) that describe the run best: test, else validation, else the best epoch."""
        final = section(self.data, "final")
        for split in ("test", "val"):
            if metrics := numbers(section(final, split)):
                return split, metrics
        return "best epoch", numbers(section(section(self.data, "best"), "metrics"))

    def primary(self) -> tuple[str, float | None]:
        """(name, value) of the one metric to compare runs by."""
        _, metrics = self.scores()
        name = self.metric or primary_name(metrics)
        return name, metrics.get(name)

    @property
    def metric(self) -> str:
        """The metric that the task names as its own; "" where it names none."""
        return str(self.data.get("metric") or "")

    def measured(self) -> dict[str, float | None]:
        """Costs of the run, None where not recorded."""
        parameters, time = section(self.data, "parameters"), section(self.data, "time")
        size = section(self.data, "adapter").get("bytes")
        return {
            "trainable": number(parameters.get("trainable")),
            "total": number(parameters.get("total")),
            "adapter_bytes": number(parameters.get("adapter_bytes") if size is None else size),
            "seconds": number(time.get("train_s") if time.get("total_s") is None else time.get("total_s")),
            "peak_mib": number(section(self.data, "memory").get("peak_mib")),
        }


@dataclass
class Group:
    """Runs of one method on one task, over seeds."""

    task: str
    method: str
    runs: list[Run] = field(default_factory=list)

    def row(self, metric: str) -> dict[str, Any]:
        """Mean and spread (sample standard deviation) of ``metric`` and the mean costs, JSON-ready."""
        done = [r for r in self.runs if r.finished]
        values = [v for r in done if (v := r.scores()[1].get(metric)) is not None]
        costs = [r.measured() for r in done]
        mean = {
            key: _mean(c[key] for c in costs) for key in ("trainable", "total", "adapter_bytes", "seconds", "peak_mib")
        }
        share = mean["trainable"] / mean["total"] if mean["trainable"] is not None and mean["total"] else None
        return {
            "task": self.task,
            "method": self.method,
            "metric": metric,
            "mean": _mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
            "seeds": [r.seed for r in done],
            "share": share,
            "failed": len(self.runs) - len(done),
            **mean,
        }


def read_run(folder: Path) -> Run:
    """The run recorded in ``folder``; a path of a ``run.json`` itself is fine.

    Raises:
        FileFormatError: missing, not JSON, or not a run.
    """
    path = folder if folder.suffix == ".json" else folder / "run.json"
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist. Give the folder that a training run wrote.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict) or not ({"status", "config", "history"} & set(data)):
        raise FileFormatError(f"{path} is JSON, but not the record of a run (no status, config or history in it).")
    return Run(path.parent, data)


def find_runs(root: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    """Every run below ``root`` in path order, and (path, reason) for each record that cannot be read."""
    runs: list[Run] = []
    broken: list[tuple[Path, str]] = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in _SKIPPED and not n.startswith("."))
        if "run.json" in files:
            try:
                runs.append(read_run(Path(folder)))
            except FileFormatError as error:
                broken.append((Path(folder), str(error)))
    return runs, broken


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Runs by (task, method); a task names its backbone where one task was run on several."""
    runs = list(runs)
    backbones: dict[str, set[str]] = {}
    for run in runs:
        backbones.setdefault(run.task, set()).add(run.backbone)
    groups: dict[tuple[str, str], Group] = {}
    for run in runs:
        task = f"{run.task} / {run.backbone}" if len(backbones[run.task]) > 1 else run.task
        groups.setdefault((task, run.method), Group(task, run.method)).runs.append(run)
    return list(groups.values())


def method_label(spec: Any) -> str:
    """``{"name": "vpt", "deep": True}`` as ``vpt(deep=True)``; a shorthand string stays as it is."""
    if isinstance(spec, str):
        return spec.strip()
    if not isinstance(spec, Mapping):
        return ""
    name = str(spec.get("name") or spec.get("method") or "")
    values = {k: v for k, v in spec.items() if k not in ("name", "method", "config", "plan", "preset")}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})" if name and values else name


def primary_name(metrics: Iterable[str]) -> str:
    """The metric to show first."""
    names = list(metrics)
    rest = [n for n in names if "loss" not in n.lower()]
    return next((n for n in PREFERRED if n in names), (rest or names or ["accuracy"])[0])


def section(data: Any, key: str) -> Mapping[str, Any]:
    """``data[key]`` where that is a mapping, else an empty one."""
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {str(k): n for k, v in values.items() if (n := number(v)) is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None
