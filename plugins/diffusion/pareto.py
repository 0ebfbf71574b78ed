"""Trials with several objectives, all minimised: which are best, which to take, and how they look."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["front", "knee", "plot", "table"]

Row = Mapping[str, Any]


def front(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """The rows that no other row beats: at most as large in every objective and smaller in one.

    Rows with equal values stay together. Sorted by the first objective.
    """
    good = [r for r in rows if all(_finite(r["values"].get(name)) for name in objectives)]
    points = [tuple(float(r["values"][name]) for name in objectives) for r in good]
    kept = [
        i
        for i, p in enumerate(points)
        if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)
    ]
    return [good[i] for i in sorted(kept, key=lambda i: (points[i], good[i]["number"]))]


def knee(best: Sequence[Row], objectives: Sequence[str]) -> Row | None:
    """A suggestion: the row of the front nearest to having the least of everything.

    Each objective counts between 0 and 1 over the front; the distance is Euclidean. None for an empty front.
    """
    if not best:
        return None
    low = {n: min(r["values"][n] for r in best) for n in objectives}
    span = {n: max(r["values"][n] for r in best) - low[n] for n in objectives}
    return min(
        best,
        key=lambda r: math.hypot(*((r["values"][n] - low[n]) / span[n] if span[n] else 0.0 for n in objectives)),
    )


def table(rows: Sequence[Row], objectives: Sequence[str], groups: Sequence[str]) -> str:
    """CSV: number, objectives, learning rate, trained values, and a column of 0 and 1 for each group."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", *objectives, "learning_rate", "trained", *groups])
    for r in rows:
        values = [r["values"][n] for n in objectives]
        writer.writerow([r["number"], *values, r["learning_rate"], r.get("trained", ""), *r["mask"]])
    return stream.getvalue()


def plot(rows: Sequence[Row], objectives: Sequence[str], labels: Mapping[str, str] | None = None) -> bytes:
    """PNG: all trials by their first two objectives, the front as steps with the trials' numbers, the knee ringed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from peft_suite.report.plots import COLOURS

    first, second = objectives[:2]
    done = [r for r in rows if all(_finite(r["values"].get(n)) for n in (first, second))]
    best = front(done, objectives)
    chosen = knee(best, objectives)
    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    others = [r for r in done if r not in best]
    axes.plot(*_points(others, first, second), "o", color="#9aa3ad", markersize=5, label="trials", linestyle="none")
    if best:
        x, y = _points(best, first, second)
        axes.step(x, y, where="post", color=COLOURS[0], linewidth=1.4)
        axes.plot(x, y, "o", color=COLOURS[0], markersize=6.5, label="front")
        for r, a, b in zip(best, x, y, strict=True):
            axes.annotate(str(r["number"]), (a, b), xytext=(5, 5), textcoords="offset points", fontsize=8.5)
    if chosen is not None:
        place = [[chosen["values"][first]], [chosen["values"][second]]]
        axes.plot(*place, "o", markersize=13, markerfacecolor="none", markeredgecolor=COLOURS[1], label="suggested")
    named = labels or {}
    axes.set_xlabel(named.get(first, first))
    axes.set_ylabel(named.get(second, second))
    axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _points(rows: Sequence[Row], first: str, second: str) -> tuple[list[float], list[float]]:
    return [r["values"][first] for r in rows], [r["values"][second] for r in rows]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
