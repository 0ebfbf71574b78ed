"""The plots, as PNG bytes. Black on white with the colour-blind safe palette of Okabe and Ito; no global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from peft_suite.report.records import number, numbers, primary_name, section
from peft_suite.tables import lower_is_better

__all__ = ["confusion", "curves", "tradeoffs"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A", "#B8A800")
MARKERS = "osD^vPpX<>hd"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#8a9099",
    "axes.labelcolor": "#3c434d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#59616b",
    "ytick.color": "#59616b",
    "text.color": "#1c2128",
    "text.parse_math": False,  # class names are free text
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_BLUES = LinearSegmentedColormap.from_list(
    "peft_suite", ["#ffffff", "#d6e6f4", "#8fc1de", "#3787c0", "#0b559f", "#08306b"]
).with_extremes(bad="#eceff2")


def curves(history: Sequence[Mapping[str, Any]], best_epoch: int | None = None, metric: str = "") -> bytes:
    """Loss, validation metrics (``metric`` first) and learning rate; the best epoch is marked.

    Epochs are stored from 0 and drawn from 1.
    """
    rows = [(float(h["epoch"]) + 1, h) for h in history if number(h.get("epoch")) is not None]
    validations = [(e, numbers(section(h, "val"))) for e, h in rows]
    validations = [(e, v) for e, v in validations if v]
    names = list(dict.fromkeys(n for _, v in validations for n in v if "loss" not in n.lower()))
    if names:
        first = metric if metric in names else primary_name(names)
        names = [first, *[n for n in names if n != first]][:4]
    with _figure(10.5, 3.1) as figure:
        axes = figure.subplots(1, 3)
        _line(axes[0], [(e, number(h.get("train_loss"))) for e, h in rows], "train", 0)
        losses = [(e, v.get("loss", v.get("val_loss"))) for e, v in validations]
        _line(axes[0], losses, "validation", 1)
        axes[0].set_title("Loss")
        for index, name in enumerate(names):
            _line(axes[1], [(e, v.get(name)) for e, v in validations], name, index)
        axes[1].set_title("Validation " + (names[0] if len(names) == 1 else "metrics"))
        shares = [n for n in names if not lower_is_better(n)]
        values = [v[n] for _, v in validations for n in names if n in v] if shares == names else []
        if values and min(values) >= 0 and max(values) <= 1:
            axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        _line(axes[2], [(e, number(h.get("lr"))) for e, h in rows], "learning rate", 0)
        axes[2].set_title("Learning rate")
        axes[2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        for index, axis in enumerate(axes):
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
            if not axis.lines:
                axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color="#8a9099")
                axis.set_yticks([])
            elif best_epoch is not None and index < 2:
                axis.axvline(
                    best_epoch + 1, color="#59616b", linewidth=1, linestyle=(0, (3, 3)), label="best epoch", zorder=1
                )
            if len(axis.lines) > 1:
                axis.legend(fontsize=8.5, handlelength=1.6)
        return _png(figure)


def confusion(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> bytes:
    """Rows are true classes, shares of each row as shades; counts are written into the cells up to 16 classes."""
    counts = np.asarray(matrix, dtype=float)
    size = len(counts)
    names = [str(classes[i]) if i < len(classes) else str(i) for i in range(size)]
    names = [n if len(n) <= 22 else n[:21] + "…" for n in names]
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, sums, out=np.full_like(counts, np.nan), where=sums > 0)
    inches = min(9.5, max(4.2, 2.2 + 0.34 * size))
    step = max(1, math.ceil(size / 42))
    longest = max(map(len, names), default=0)
    font = 9.0 if size <= 16 else (8.0 if size <= 24 else 6.5)
    with _figure(inches + 0.9, inches, dpi=150 if size > 40 else 120) as figure:
        axis = figure.subplots()
        image = axis.imshow(shares, cmap=_BLUES, norm=PowerNorm(0.6, 0, 1), interpolation="nearest")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        ticks = list(range(0, size, step))
        axis.set_xticks(ticks, [names[i] for i in ticks], rotation=90 if size * longest > 40 else 0, fontsize=font)
        axis.set_yticks(ticks, [names[i] for i in ticks], fontsize=font)
        axis.tick_params(length=0 if size <= 24 else 2)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        if size <= 24:
            axis.set_xticks(np.arange(-0.5, size), minor=True)
            axis.set_yticks(np.arange(-0.5, size), minor=True)
            axis.grid(which="minor", color="#ffffff", linewidth=1.2)
            axis.tick_params(which="minor", length=0)
        if size <= 16:
            for i, j in np.argwhere(counts > 0):
                colour = "#ffffff" if shares[i, j] > 0.35 else "#1c2128"
                axis.text(j, i, f"{counts[i, j]:g}", ha="center", va="center", fontsize=8, color=colour)
        bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, ticks=[0, 0.1, 0.25, 0.5, 0.75, 1])
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bar.ax.tick_params(length=0, labelsize=8)
        bar.set_label("share of the true class", fontsize=8.5)
        return _png(figure)


def tradeoffs(rows: Sequence[Mapping[str, Any]], metric: str) -> bytes:
    """The metric (mean and spread) against trainable parameters, time and memory; one row of panels per task."""
    rows = [r for r in rows if r["mean"] is not None]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    costs = [
        (key, title)
        for key, title in (
            ("trainable", "trainable parameters"),
            ("seconds", "seconds"),
            ("peak_mib", "peak memory (MiB)"),
        )
        if any(r[key] is not None for r in rows)
    ]
    percent = bool(rows) and all(0 <= r["mean"] <= 1 for r in rows) and not lower_is_better(metric)
    columns = max(1, min(4, len(methods)))
    longest = max((len(m) for m in methods), default=0)
    columns = columns if longest <= 24 else (2 if longest <= 48 else 1)
    legend = 0.24 * math.ceil(len(methods) / columns) + 0.15
    with _figure(10.5, 3.2 * max(1, len(tasks)) + legend) as figure:
        grid = figure.subplots(max(1, len(tasks)), max(1, len(costs)), squeeze=False, sharey="row")
        for i, task in enumerate(tasks):
            for j, (key, title) in enumerate(costs):
                axis = grid[i][j]
                for row in rows:
                    if row["task"] != task or row[key] is None:
                        continue
                    index = methods.index(row["method"])
                    axis.errorbar(
                        row[key],
                        row["mean"],
                        yerr=row["std"],
                        fmt=MARKERS[index % len(MARKERS)],
                        color=COLOURS[index % len(COLOURS)],
                        label=row["method"],
                        markersize=8,
                        markeredgecolor="white",
                        markeredgewidth=0.8,
                        elinewidth=1.3,
                        capsize=3,
                    )
                known = [r[key] for r in rows if r["task"] == task and r[key]]
                if known and max(known) > 5 * min(known):
                    axis.set_xscale("log")
                elif known and max(known) - min(known) < 0.02 * max(known):
                    axis.set_xlim(0.9 * min(known), 1.1 * max(known))
                axis.xaxis.set_major_formatter(FuncFormatter(_short))
                if axis.get_xscale() == "log":
                    axis.xaxis.set_minor_formatter(NullFormatter())
                    if max(known) < 100 * min(known):
                        axis.xaxis.set_minor_locator(NullLocator())
                        axis.set_xticks(_decades(min(known), max(known)))
                else:
                    axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
                axis.margins(x=0.1, y=0.12)
                axis.set_xlabel(title)
                if percent:
                    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
            grid[i][0].set_ylabel(metric)
            if len(tasks) > 1:
                grid[i][0].set_title(task)
        handles: dict[str, Any] = {}
        for axis in grid.flat:
            handles.update({label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)})
        if handles:
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)
        return _png(figure)


@contextmanager
def _figure(width: float, height: float, dpi: int = 120) -> Iterator[Figure]:
    with rc_context(cast(Any, _STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # scripts that the bundled font lacks
        figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _line(axis: Axes, points: Sequence[tuple[float, float | None]], label: str, index: int) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if known:
        marker = MARKERS[index % len(MARKERS)] if len(known) <= 40 else ""
        colour = COLOURS[index % len(COLOURS)]
        style = ("-", "--", "-.", ":")[index % 4]
        axis.plot(*zip(*known, strict=True), style, label=label, color=colour, marker=marker, markersize=3.5)


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [t for t in ticks if low / 1.3 <= t <= high * 1.3]


def _short(value: float, _: Any = None) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
