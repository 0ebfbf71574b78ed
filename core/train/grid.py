"""A resumable grid of methods x tasks x seeds: one run directory each, failures kept as rows."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_suite.errors import ConfigError, closest
from peft_suite.storage import write_json
from peft_suite.train.config import RunConfig
from peft_suite.train.record import RunResult, read_run
from peft_suite.train.running import failed_record, is_main, run_once, write_page

__all__ = ["Job", "bench", "job_folder", "run_jobs"]

_TASK_KEYS = ("name", "data", "backbone", "recipe")


@dataclass(frozen=True)
class Job:
    """One cell of a grid. ``task`` and ``method`` are labels; ``config`` says what runs."""

    task: str
    method: str
    seed: int
    config: RunConfig


def bench(
    base: RunConfig,
    methods: Sequence[str],
    tasks: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    out: str | Path,
    *,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run every method on every task with every seed, in ``out/TASK/METHOD/seed-K``, and write a comparison page.

    Finished runs are kept, interrupted ones go on, failed ones start again.

    Args:
        base: what all runs share.
        methods: names or shorthands.
        tasks: ``{"name": ..., "data": {...}, "backbone": {...}, "recipe": {...}}``; the mappings override ``base``.
        recipes: method -> recipe fields of its own, for example a learning rate; they override the task's.

    Returns:
        One row per run: task, method, seed, status, error, metric, score, metrics, trainable, total, adapter_bytes,
        seconds, per_step_ms, out.
    """
    if not methods or not tasks or not seeds:
        raise ConfigError("bench needs at least one method, one task and one seed.")
    own = recipes or {}
    jobs = [
        Job(
            str(task.get("name") or f"task-{number}"),
            method,
            seed,
            _config(base, task, method, seed, own.get(method, {})),
        )
        for number, task in enumerate(tasks)
        for method in methods
        for seed in seeds
    ]
    return run_jobs(jobs, out, progress=progress)


def job_folder(job: Job) -> Path:
    """Where a job's run lies, relative to the grid's folder."""
    return Path(_slug(job.task)) / _slug(job.method) / f"seed-{job.seed}"


def run_jobs(jobs: Sequence[Job], out: str | Path, *, progress: bool = True) -> list[dict[str, Any]]:
    """Run or go on with every job, each in its own folder below ``out``; returns rows as :func:`bench` does."""
    rows = []
    for number, job in enumerate(jobs, start=1):
        row = _one(job.config.replace(out=str(Path(out) / job_folder(job))), job.task)
        rows.append({"task": job.task, "method": job.method, "seed": job.seed, **row})
        if progress and is_main():
            score = "" if row["score"] is None else f"  {row['metric']} {row['score']:.4f}"
            told = row["error"] or f"{score}  {row['seconds']:.1f} s"
            print(
                f"[{number}/{len(jobs)}] {job.task}  {job.method}  seed {job.seed}: {row['status']}"
                f"{told and ' '}{told}",
                file=sys.stderr,
            )
    if is_main():
        write_json(Path(out) / "bench.json", rows)
        write_page("write_comparison", Path(out))
    return rows


def _config(base: RunConfig, task: Mapping[str, Any], method: str, seed: int, recipe: Mapping[str, Any]) -> RunConfig:
    for key in task:
        if key not in _TASK_KEYS:
            raise ConfigError(f"A task of bench has no field {key!r}. {closest(key, _TASK_KEYS)}")
    values = base.to_dict()
    for part in _TASK_KEYS[1:]:
        values[part] = {**values[part], **task.get(part, {})}
    values["recipe"] = {**values["recipe"], **recipe}
    return RunConfig.from_dict({**values, "method": method, "seed": seed, "seeds": 1})


def _one(config: RunConfig, task: str) -> dict[str, Any]:
    """Run one cell of the grid; whatever goes wrong becomes a row."""
    folder = Path(config.out)
    try:
        record = read_run(folder)
        go_on = record is not None and record["status"] != "failed"
        result = run_once(config, resume=go_on, progress=False, task_name=task)
    except Exception as error:
        record = _kept(folder)
        text = f"{type(error).__name__}: {error}"
        told = record is not None and (record["status"] != "failed" or record.get("error") == text)
        if is_main() and not told:
            write_json(folder / "run.json", failed_record(config, error, task))
        return _row("failed", text, None, folder)
    return _row("finished", None, result, folder)


def _kept(folder: Path) -> dict[str, Any] | None:
    try:
        return read_run(folder)
    except Exception:
        return None


def _row(status: str, error: str | None, result: RunResult | None, folder: Path) -> dict[str, Any]:
    record = result.record if result else {}
    return {
        "status": status,
        "error": error,
        "metric": record.get("metric"),
        "score": result.score if result else None,
        "metrics": dict(result.metrics) if result else {},
        "trainable": record.get("parameters", {}).get("trainable"),
        "total": record.get("parameters", {}).get("total"),
        "adapter_bytes": (record.get("adapter") or {}).get("bytes"),
        "seconds": record.get("time", {}).get("total_s"),
        "per_step_ms": record.get("time", {}).get("per_step_ms"),
        "out": str(folder),
    }


def _slug(text: str) -> str:
    """A folder name: letters, digits, dot, dash, equals and underscore."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-") or "unnamed"
