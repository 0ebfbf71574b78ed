"""What every plugin's demo does: adapt an embedded backbone to embedded data by several methods, and compare them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_suite.errors import TrainingError
from peft_suite.train.config import RunConfig
from peft_suite.train.grid import bench

__all__ = ["Showcase"]


@dataclass(frozen=True)
class Showcase:
    """A comparison that works without a download.

    Attributes:
        plugin, backbone: their names.
        task: the name of the folder and of the table's rows in the comparison page.
        title: of the table; the seeds are added.
        data: the data configuration.
        methods: name for people -> shorthand; "linear" and "full" among them are the two baselines.
        recipes: name for people -> recipe fields.
    """

    plugin: str
    backbone: str
    task: str
    title: str
    data: Mapping[str, Any]
    methods: Mapping[str, str]
    recipes: Mapping[str, Mapping[str, Any]]

    def run(self, out: str | Path, seeds: int, progress: bool = True) -> dict[str, Any]:
        """Adapt by every method with ``seeds`` seeds, print the table, write the comparison page.

        Returns:
            ``{"rows": one row per method, "report": path, "best_adapter": path, "runs": one row per run}``.
        """
        from peft_suite.report import write_report

        out = Path(out)
        base = RunConfig.from_dict(
            {"plugin": self.plugin, "backbone": {"name": self.backbone}, "data": dict(self.data), "resample": True}
        )
        recipes = {spec: self.recipes[name] for name, spec in self.methods.items()}
        specs = list(self.methods.values())
        runs = bench(base, specs, [{"name": self.task}], range(seeds), out, recipes=recipes, progress=progress)
        full = next((r["trainable"] for r in runs if r["method"] == self.methods.get("full") and r["trainable"]), None)
        rows = [_row(name, [r for r in runs if r["method"] == spec], full) for name, spec in self.methods.items()]
        small = [r for r in rows if r["method"] not in ("linear", "full") and r["accuracy"] is not None]
        if not small:
            errors = "; ".join(r["error"] for r in runs if r["error"])
            raise TrainingError(f"No run of the demo finished: {errors[:500]}")
        best = max(small, key=lambda r: r["accuracy"])
        folder = Path(
            next(r["out"] for r in runs if r["method"] == self.methods[best["method"]] and r["score"] is not None)
        )
        page = write_report(folder)
        result = {
            "rows": rows,
            "report": str(out / "comparison.html"),
            "best_adapter": str(folder / "adapter"),
            "runs": runs,
        }
        if progress:
            _show(f"{self.title}, {seeds} seed{'s' if seeds > 1 else ''}", rows, result, page)
        return result


def _row(name: str, runs: list[dict[str, Any]], full: int | None) -> dict[str, Any]:
    scores = [r["score"] for r in runs if r["score"] is not None]
    times = [r["seconds"] for r in runs if r["seconds"] is not None]
    done = next((r for r in runs if r["trainable"]), None)
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


def _show(title: str, rows: list[dict[str, Any]], result: dict[str, Any], page: Path) -> None:
    console = Console()
    table = Table(title=title, title_justify="left")
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
