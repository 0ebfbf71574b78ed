"""Cross-validation: every fold, or every speaker, tests once; mean and spread over them.

Runs lie in ``OUT/FOLD/METHOD/seed-K``; finished ones are kept, interrupted ones go on. ``crossval.json`` and
``crossval.csv`` hold the table, ``comparison.html`` shows it.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.audio.data import AudioDataConfig
from peft_suite.audio.splits import folds_of
from peft_suite.errors import ConfigError, DataError
from peft_suite.storage import write_json, write_text
from peft_suite.train.config import RunConfig
from peft_suite.train.grid import Job, job_folder, run_jobs
from peft_suite.train.running import is_main

__all__ = ["cross_validate", "jobs_of", "table"]


def jobs_of(
    base: RunConfig, methods: Sequence[str], seeds: Sequence[int], *, over: str = "auto", only: Sequence[str] = ()
) -> list[Job]:
    """One job per fold, method and seed.

    Args:
        over: "fold", "speaker" or "auto".
        only: these folds or speakers, by number or name; empty takes all.

    Raises:
        DataError: the data has no folds, or not these.
        ConfigError: the configuration already chooses a fold or speaker.
    """
    data = AudioDataConfig.from_dict(base.data)
    if data.fold or data.speaker_out:
        raise ConfigError("crossval chooses data.fold and data.speaker_out itself. Leave them out, or use train.")
    folds = folds_of(data, over)
    names = {str(value): name for name, fields in folds for value in fields.values()}
    if unknown := [part for part in only if part not in names]:
        raise DataError(f"{base.data.get('root')!r} has no fold {unknown[0]!r}. There are: {', '.join(names)}.")
    wanted = {names[part] for part in only} or set(names.values())
    return [
        Job(name, method, seed, base.replace(method=method, seed=seed, seeds=1, data={**base.data, **fields}))
        for name, fields in folds
        if name in wanted
        for method in methods
        for seed in seeds
    ]


def cross_validate(
    base: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    over: str = "auto",
    only: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Run what is missing and write the table.

    Returns:
        :func:`table` of all runs.
    """
    if not methods or not seeds:
        raise ConfigError("crossval needs at least one method and one seed.")
    jobs = jobs_of(base, methods, seeds, over=over, only=only)
    root = Path(out)
    folds = list(dict.fromkeys(job.task for job in jobs))
    name = Path(str(base.data.get("root") or "data")).name
    if is_main():
        write_json(
            root / "suite.json",
            {
                "format": 1,
                "suite": "crossval",
                "title": f"{name}, {len(folds)} folds",
                "spread": "tasks",
                "groups": {name: folds},
                "tasks": folds,
                "methods": [{"label": m, "published": {}, "facts": _told(base, m)} for m in methods],
                "runs": [
                    {"task": j.task, "method": j.method, "seed": j.seed, "folder": job_folder(j).as_posix()}
                    for j in jobs
                ],
            },
        )
    result = table(run_jobs(jobs, root, progress=progress), folds)
    if is_main():
        write_json(root / "crossval.json", result)
        write_text(root / "crossval.csv", _csv(result))
    return result


def table(rows: Sequence[Mapping[str, Any]], folds: Sequence[str]) -> dict[str, Any]:
    """Of every method the mean over seeds in each fold, and mean and sample standard deviation over the folds.

    Args:
        rows: as :func:`peft_suite.train.bench` returns them.
        folds: all that were planned; ``missing`` lists those without a finished run.
    """
    metric = next((row["metric"] for row in rows if row["metric"]), "")
    methods = []
    for method in dict.fromkeys(row["method"] for row in rows):
        scores: dict[str, float] = {}
        for fold in folds:
            found = [r["score"] for r in rows if (r["method"], r["task"]) == (method, fold) and r["score"] is not None]
            if found:
                scores[fold] = statistics.fmean(found)
        methods.append(
            {
                "method": method,
                "mean": statistics.fmean(scores.values()) if scores else None,
                "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
                "folds": scores,
                "missing": [fold for fold in folds if fold not in scores],
                "seeds": sorted({r["seed"] for r in rows if r["method"] == method}),
                "trainable": next((r["trainable"] for r in rows if r["method"] == method and r["trainable"]), None),
            }
        )
    errors = {f"{r['task']}, {r['method']}, seed {r['seed']}": r["error"] for r in rows if r["error"]}
    return {"format": 1, "metric": metric, "folds": list(folds), "methods": methods, "errors": errors}


def _told(base: RunConfig, method: str) -> list[tuple[str, str]]:
    from peft_suite.report.rendering import facts

    recipe = base.recipe
    return facts(
        {
            "method": method,
            "backbone": base.backbone.checkpoint or base.backbone.name,
            "epochs": recipe.epochs,
            "learning rate": recipe.lr,
            "batch": recipe.batch_size,
            "epoch chosen by": recipe.select,
            "data": {k: v for k, v in base.data.items() if k != "root"},
        }
    )


def _csv(result: Mapping[str, Any]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "metric", "mean", "std", *result["folds"]])
    for row in result["methods"]:
        cells = [row["mean"], row["std"], *(row["folds"].get(fold) for fold in result["folds"])]
        writer.writerow([row["method"], result["metric"], *("" if c is None else c for c in cells)])
    return stream.getvalue()
