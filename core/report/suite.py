"""The page of a suite: every method on every task of a protocol, its means, and the published results beside ours."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.errors import FileFormatError
from peft_suite.report import plots
from peft_suite.report.group import rows_as_csv
from peft_suite.report.records import Group, Run, primary_name, read_run, section
from peft_suite.report.rendering import data_uri, facts, render
from peft_suite.storage import write_bytes
from peft_suite.tables import lower_is_better

__all__ = ["MEAN_OF_GROUPS", "MEAN_OF_TASKS", "SUITE", "suite_page"]

SUITE = "suite.json"
MEAN_OF_GROUPS, MEAN_OF_TASKS = "mean of groups", "mean of tasks"
_COSTS = ("trainable", "total", "adapter_bytes", "seconds", "peak_mib")


def suite_page(root: Path) -> Path:
    """Write ``comparison.html``, ``.json``, ``.csv`` and ``.png`` over the runs that ``suite.json`` plans.

    A mean is over the tasks that have a finished run; where some have none, the page says of how many it is. The spread
    is that of the mean over seeds, or with ``"spread": "tasks"`` that of the tasks, as for folds.
    """
    facts_of = _read(root)
    groups: dict[str, list[str]] = {str(k): [str(t) for t in v] for k, v in facts_of["groups"].items()}
    methods: list[dict[str, Any]] = facts_of["methods"]
    asked = facts_of.get("tasks") or _flat(groups)
    runs, failures = _runs(root, facts_of["runs"])
    names = [n for _, r in runs if r.finished for n in r.scores()[1]]
    metric = next((r.metric for _, r in runs if r.metric), "") or primary_name(dict.fromkeys(names))

    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for method in methods:
        for task in _flat(groups):
            mine = [r for plan, r in runs if (plan["task"], plan["method"]) == (task, method["label"])]
            if mine:
                cells[task, method["label"]] = Group(task, method["label"], mine).row(metric)
    over_tasks = facts_of.get("spread") == "tasks"  # folds of one task
    means = [_mean_row(m, groups, cells, over_tasks) for m in methods]
    picture = _picture(means, groups, metric)
    record = {
        "format": 1,
        "metric": metric,
        "rows": list(cells.values()),
        "failures": [{"run": a, "reason": b} for a, b in failures],
        "suite": facts_of["suite"],
        "means": means,
    }
    html = render(
        "suite.html",
        title=f"{facts_of['title']}: comparison of methods",
        metric=metric,
        groups={g: shown for g, tasks in groups.items() if (shown := [t for t in tasks if t in asked])},
        count=len(_flat(groups)),
        methods=methods,
        means=means,
        over_tasks=over_tasks,
        cells=cells,
        best={t: _best([cells[t, m["label"]] for m in methods if (t, m["label"]) in cells]) for t in _flat(groups)},
        columns=[*groups, MEAN_OF_GROUPS, MEAN_OF_TASKS] if len(groups) > 1 else [MEAN_OF_TASKS],
        finished=sum(r.finished for _, r in runs),
        total=len(facts_of["runs"]),
        left_out=facts_of.get("left_out") or {},
        failures=failures,
        picture=data_uri(picture),
        runs=[_run_row(plan, run, metric) for plan, run in runs],
        versions=facts({**section(runs[0][1].data, "versions"), **section(runs[0][1].data, "platform")})
        if runs
        else [],
    )
    write_bytes(root / "comparison.json", json.dumps(record, indent=2).encode())
    write_bytes(root / "comparison.csv", rows_as_csv(list(cells.values())))
    if picture:
        write_bytes(root / "comparison.png", picture)
    return write_bytes(root / "comparison.html", html.encode())


def _read(root: Path) -> dict[str, Any]:
    path = root / SUITE
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}.") from error
    lost = [
        k for k in ("suite", "title", "groups", "methods", "runs") if not isinstance(values, dict) or k not in values
    ]
    if lost:
        raise FileFormatError(f"{path} is no suite's plan: it has no {', '.join(lost)}.")
    return dict(values)


def _runs(
    root: Path, planned: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[Mapping[str, Any], Run]], list[tuple[str, str]]]:
    """The runs that exist, and (label, reason) of everything that is not finished."""
    runs: list[tuple[Mapping[str, Any], Run]] = []
    failures = []
    for plan in planned:
        label = f"{plan['task']}, {plan['method']}, seed {plan['seed']}"
        folder = root / str(plan["folder"])
        if not (folder / "run.json").exists():
            failures.append((label, "not started"))
            continue
        try:
            run = read_run(folder)
        except FileFormatError as error:
            failures.append((label, str(error)))
            continue
        runs.append((plan, run))
        if not run.finished:
            failures.append((label, run.error or f"status: {run.data.get('status') or 'unknown'}"))
    return runs, failures


def _flat(groups: Mapping[str, Iterable[str]]) -> list[str]:
    return [task for tasks in groups.values() for task in tasks]


def _mean_row(
    method: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    cells: Mapping[tuple[str, str], Mapping[str, Any]],
    over_tasks: bool = False,
) -> dict[str, Any]:
    """Means of one method: by group, of the groups' means and of all tasks, with costs averaged over tasks."""
    own = {task: cells[task, method["label"]] for task in _flat(groups) if (task, method["label"]) in cells}
    scored = {task: dict(zip(row["seeds"], row["values"], strict=False)) for task, row in own.items() if row["values"]}
    result: dict[str, Any] = {}
    for name, tasks in [*groups.items(), (MEAN_OF_TASKS, _flat(groups))]:
        done = [t for t in tasks if t in scored]
        seeds = sorted(set.intersection(*(set(scored[t]) for t in done))) if done else []
        per_seed = [statistics.fmean(scored[t][seed] for t in done) for seed in seeds]
        result[name] = _summary(_mean(own[t]["mean"] for t in done), per_seed, len(done), len(tasks))
        if over_tasks:
            result[name]["std"] = statistics.stdev(own[t]["mean"] for t in done) if len(done) > 1 else None
    known = [result[g] for g in groups if result[g]["mean"] is not None]
    every = [g["per_seed"] for g in known]
    per_seed = [statistics.fmean(v) for v in zip(*every, strict=True)] if len({len(v) for v in every}) == 1 else []
    result[MEAN_OF_GROUPS] = _summary(_mean(g["mean"] for g in known), per_seed, len(known), len(groups))
    if len(known) < len(groups) or any(g["done"] < g["of"] for g in known):
        result[MEAN_OF_GROUPS]["partial"] = True
    published = {k: v for k, v in (method.get("published") or {}).items() if k != "source"}
    costs = {key: _mean(row[key] for row in own.values()) for key in _COSTS}
    costs["trainable"] = None if costs["trainable"] is None else round(costs["trainable"])  # heads differ between tasks
    return {"label": method["label"], "means": result, "published": published, **costs}


def _summary(mean: float | None, per_seed: list[float], done: int, of: int) -> dict[str, Any]:
    std = statistics.stdev(per_seed) if len(per_seed) > 1 else None
    return {"mean": mean, "std": std, "per_seed": per_seed, "done": done, "of": of, "partial": done < of}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [r for r in rows if r["mean"] is not None]
    pick = min if known and lower_is_better(str(known[0].get("metric") or "")) else max
    return str(pick(known, key=lambda r: r["mean"])["method"]) if len(known) > 1 else ""


def _picture(means: Sequence[Mapping[str, Any]], groups: Mapping[str, Any], metric: str) -> bytes | None:
    names = [*groups, MEAN_OF_TASKS] if len(groups) > 1 else [MEAN_OF_TASKS]
    rows = [
        {
            "task": name,
            "method": row["label"],
            **{key: row[key] for key in _COSTS},
            **{key: row["means"][name][key] for key in ("mean", "std")},
        }
        for name in names
        for row in means
    ]
    return plots.tradeoffs(rows, metric) if any(r["mean"] is not None for r in rows) else None


def _run_row(plan: Mapping[str, Any], run: Run, metric: str) -> dict[str, Any]:
    value = run.scores()[1].get(metric, math.nan)
    page = run.path / "report.html"
    return {
        **{key: plan[key] for key in ("task", "method", "seed")},
        "status": str(run.data.get("status") or "unknown"),
        "value": value,
        "seconds": run.measured()["seconds"],
        "path": str(plan["folder"]),
        "link": f"{plan['folder']}/report.html" if page.exists() else "",
    }
