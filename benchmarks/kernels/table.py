"""Rows of a benchmark: how they are made from timed variants, printed, written as CSV, drawn."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def device_name() -> str:
    """The GPU's name, or what the processor calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> str:
    """Versions of everything that was compared."""
    names = (
        "torch",
        "triton",
        "numpy",
        "numba",
        "scipy",
        "scikit-learn",
        "open3d",
        "faiss-cpu",
        "fpsample",
        "torch_cluster",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def rows(op: str, shape: str, threads: int, variants: Sequence[Any]) -> list[dict[str, Any]]:
    """One row for each timed variant; the ratio is ours / theirs, below 1 where ours takes less."""
    first = statistics.median(variants[0].times)
    made = []
    for variant in variants:
        times = sorted(variant.times)
        at = [times[min(len(times) - 1, round(q * (len(times) - 1)))] for q in (0.2, 0.8)]
        middle = statistics.median(times)
        made.append(
            {
                "op": op,
                "shape": shape,
                "device": variant.device,
                "threads": threads,
                "variant": variant.name,
                "median_ms": round(1e3 * middle, 4),
                "p20_ms": round(1e3 * at[0], 4),
                "p80_ms": round(1e3 * at[1], 4),
                "ratio": round(first / middle, 3),
                "note": variant.note,
            }
        )
    return made


def show(title: str, found: Sequence[dict[str, Any]]) -> None:
    """A table on the terminal; a line between blocks that differ in what stands before the variant."""
    console = Console(width=140)
    columns = [c for c in found[0] if c not in ("p20_ms", "p80_ms")]
    drawn = Table(*columns, title=f"{title}: {device_name()}")
    before = None
    for row in found:
        block = [row[c] for c in columns[: columns.index("variant")]]
        if before is not None and block != before:
            drawn.add_section()
        before = block
        drawn.add_row(*(escape(str(row[c])) for c in columns))
    console.print(drawn)
    console.print(f"{datetime.date.today()} · {versions()}", highlight=False)


def write(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """``path``.csv with the machine, the date and the versions in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": device_name(), "date": str(datetime.date.today()), "versions": versions()}
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in found)


def plot(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Bars on a logarithmic axis, one panel for each operation and shape, ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = min(row["threads"] for row in found)
    panels = list(dict.fromkeys((r["op"], r["shape"]) for r in found if r["threads"] == threads))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (op, shape) in zip(axes.flat, panels):
        rows = [r for r in found if (r["op"], r["shape"], r["threads"]) == (op, shape, threads)]
        rows.sort(key=lambda r: -r["median_ms"])
        names = [r["variant"] + (" *" if r["note"] else "") for r in rows]
        colours = ["#d1495b" if r["variant"] == "peft-suite" else "#9fb4c7" for r in rows]
        bars = axis.barh(names, [r["median_ms"] for r in rows], color=colours)
        axis.bar_label(bars, [f"{r['median_ms']:.3g}" for r in rows], padding=2, fontsize=7)
        axis.set_xscale("log")
        axis.set_title(f"{op}, {shape}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        axis.set_xlabel("ms", fontsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(
        f"{device_name()}, {threads} thread{'s' if threads > 1 else ''}, {datetime.date.today()}"
        "   (* another answer: see the table)",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
