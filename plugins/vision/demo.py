"""The demo: the embedded micro ViT, pre-trained on one half of the digits, meets the other half upside down."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_suite.errors import TrainingError
from peft_suite.vision.digits import DEMO_DATA, DEMO_METHODS, DEMO_RECIPES, NAME

__all__ = ["run"]


def run(out: str | Path = "runs/demo", seeds: int = 3, progress: bool = True) -> dict[str, Any]:
    """Adapt by every demo method with ``seeds`` seeds, print the table, write the comparison page.

    Returns:
        ``{"rows": one row per method, "report": path, "best_adapter": path, "runs": one row per run}``.
    """
    from peft_suite.report import write_report
    from peft_suite.train import RunConfig, bench

    out = Path(out)
    base = RunConfig.from_dict(
        {"plugin": "vision", "backbone": {"name": "micro-vit"}, "data": dict(DEMO_DATA), "resample": True}
    )
    recipes = {DEMO_METHODS[name]: recipe for name, recipe in DEMO_RECIPES.items()}
    runs = bench(
        base, list(DEMO_METHODS.values()), [{"name": NAME}], range(seeds), out, recipes=recipes, progress=progress
    )
    rows = [_row(name, [r for r in runs if r["method"] == spec], runs) for name, spec in DEMO_METHODS.items()]
    small = [r for r in rows if r["method"] not in ("linear", "full") and r["accuracy"] is not None]
    if not small:
        raise TrainingError(f"No run of the demo finished: {'; '.join(r['error'] for r in runs if r['error'])[:500]}")
    best = max(small, key=lambda r: r["accuracy"])
    folder = Path(next(r["out"] for r in runs if r["method"] == DEMO_METHODS[best["method"]]))
    page = write_report(folder)
    result = {
        "rows": rows,
        "report": str(out / "comparison.html"),
        "best_adapter": str(folder / "adapter"),
        "runs": runs,
    }
    if progress:
        _show(rows, seeds, result, page)
    return result


def _row(name: str, runs: list[dict[str, Any]], everything: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [r["score"] for r in runs if r["score"] is not None]
    times = [r["seconds"] for r in runs if r["seconds"] is not None]
    done = next((r for r in runs if r["trainable"]), None)
    full = next((r["trainable"] for r in everything if r["method"] == DEMO_METHODS["full"] and r["trainable"]), None)
    return {
        "method": name,
        "trainable": done["trainable"] if done else None,
        "share": done["trainable"] / full if done and full else None,
        "accuracy": statistics.mean(scores) if scores else None,
        "spread": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "seconds": statistics.mean(times) if times else None,
        "adapter_bytes": done["adapter_bytes"] if done else None,
        "errors": [r["error"] for r in runs if r["error"]],
    }


def _show(rows: list[dict[str, Any]], seeds: int, result: dict[str, Any], page: Path) -> None:
    console = Console()
    table = Table(
        title=f"Upright digits, then dark ones upside down: {DEMO_DATA['shots']} a class, "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        title_justify="left",
    )
    for column in ("method", "trained", "% of full", "test accuracy", "seconds", "adapter"):
        table.add_column(column, justify="left" if column == "method" else "right")
    best = max((r["accuracy"] or 0.0) for r in rows if r["method"] != "full")
    for r in rows:
        if r["accuracy"] is None:
            table.add_row(r["method"], "", "", "failed", "", "")
            continue
        accuracy = f"{100 * r['accuracy']:.1f} ± {100 * r['spread']:.1f} %"
        table.add_row(
            r["method"],
            f"{r['trainable']:,}",
            f"{100 * r['share']:.1f}" if r["share"] else "",
            f"[bold]{accuracy}[/]" if r["accuracy"] == best else accuracy,
            f"{r['seconds']:.1f}",
            f"{r['adapter_bytes'] / 1024:.1f} KiB",
        )
    console.print(table)
    for r in rows:
        for error in r["errors"]:
            console.print(f"{r['method']}: {error}", style="red")
    console.print(f"comparison  {result['report']}", soft_wrap=True, highlight=False)
    console.print(f"best run    {page}", soft_wrap=True, highlight=False)
    console.print(f"its adapter {result['best_adapter']}", soft_wrap=True, highlight=False)
    console.print(f"next        peft-suite info {result['best_adapter']}", soft_wrap=True, highlight=False)
