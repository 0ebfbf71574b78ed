"""The pages over many runs: several seeds of one configuration, or a grid of methods and data."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.errors import FileFormatError
from peft_suite.report import plots
from peft_suite.report.page import pictures
from peft_suite.report.records import Run, find_runs, group_runs, primary_name, section
from peft_suite.report.rendering import data_uri, facts, render
from peft_suite.storage import write_bytes
from peft_suite.tables import lower_is_better

__all__ = ["group_page", "rows_as_csv"]

_COLUMNS = (
    "task",
    "method",
    "metric",
    "mean",
    "std",
    "seeds",
    "trainable",
    "share",
    "adapter_bytes",
    "seconds",
    "peak_mib",
)


def group_page(root: Path, kind: str) -> Path:
    """Write the page over many runs: ``summary`` (several seeds) or ``comparison`` (a grid)."""
    runs, broken = find_runs(root)
    if not runs and not broken:
        raise FileFormatError(f"There is no run.json below {root}. Give a folder that train or bench wrote.")
    groups = group_runs(runs)
    names = [n for r in runs if r.finished for n in r.scores()[1]]
    metric = next((r.metric for r in runs if r.metric), "") or primary_name(dict.fromkeys(names))
    rows = [g.row(metric) for g in groups]
    sign = 1 if lower_is_better(metric) else -1
    rows.sort(key=lambda r: (r["task"], math.inf if r["mean"] is None else sign * r["mean"]))
    failures = [(str(p.relative_to(root)), reason) for p, reason in broken]
    for run in runs:
        if not run.finished:
            label = f"{run.task}, {run.method}, seed {run.seed} ({run.path.relative_to(root)})"
            failures.append((label, run.error or f"status: {run.data.get('status') or 'unknown'}"))
    picture = plots.tradeoffs(rows, metric) if len(groups) > 1 and any(r["mean"] is not None for r in rows) else None
    known = [r["mean"] for r in rows if r["mean"] is not None]
    seeds = sorted({r.seed for r in runs})
    html = render(
        "group.html",
        title="Comparison of methods"
        if kind == "comparison"
        else f"{groups[0].method if groups else 'Runs'} over seeds",
        metric=metric,
        rows=rows,
        best=_best(rows),
        top=max(known, default=0.0),
        tasks=list(dict.fromkeys(r["task"] for r in rows)),
        seeds=seeds,
        finished=sum(r.finished for r in runs),
        total=len(runs) + len(broken),
        picture=data_uri(picture),
        drawn=[(f"{r.task}, {r.method}, seed {r.seed}", pictures(r)) for r in _first(runs) if r.data.get("pictures")],
        runs=[_run_row(r, root, metric) for r in runs],
        failures=failures,
        versions=facts({**section(runs[0].data, "versions"), **section(runs[0].data, "platform")} if runs else {}),
    )
    stem = root / kind
    record = {"format": 1, "metric": metric, "rows": rows, "failures": [{"run": a, "reason": b} for a, b in failures]}
    write_bytes(stem.with_suffix(".json"), json.dumps(record, indent=2).encode())
    if kind == "comparison":
        write_bytes(stem.with_suffix(".csv"), rows_as_csv(rows))
        if picture:
            write_bytes(stem.with_suffix(".png"), picture)
    return write_bytes(stem.with_suffix(".html"), html.encode())


def _first(runs: Sequence[Run]) -> list[Run]:
    """One run of each method on each task: that of the lowest seed."""
    ordered = sorted(runs, key=lambda r: r.seed, reverse=True)
    return list(reversed({(r.task, r.method): r for r in ordered}.values()))


def _best(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        sign = -1 if lower_is_better(str(row.get("metric") or "")) else 1
        if row["mean"] is None:
            continue
        if row["task"] not in best or sign * row["mean"] > sign * best[row["task"]]["mean"]:
            best[row["task"]] = row
    return {(r["task"], r["method"]) for r in best.values()} if len(rows) > 1 else set()


def _run_row(run: Run, root: Path, metric: str) -> dict[str, Any]:
    page = run.path / "report.html"
    return {
        "task": run.task,
        "method": run.method,
        "seed": run.seed,
        "status": str(run.data.get("status") or "unknown"),
        "value": run.scores()[1].get(metric),
        "seconds": run.measured()["seconds"],
        "path": str(run.path.relative_to(root)),
        "link": page.relative_to(root).as_posix() if page.exists() and page.parent != root else "",
    }


def rows_as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of a comparison as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(_COLUMNS)
    for row in rows:
        cells = [" ".join(map(str, row[c])) if c == "seeds" else row[c] for c in _COLUMNS]
        writer.writerow(["" if c is None else c for c in cells])
    return stream.getvalue().encode()
