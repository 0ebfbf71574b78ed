"""A table of accuracies of all methods for each number of training samples, out of the grids of a benchmark."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.storage import write_json, write_text

__all__ = ["gap", "spread", "tables"]

Rows = Mapping[str, list[dict[str, Any]]]


def tables(out: Path, grids: Mapping[str, str], methods: Mapping[str, str], chosen: Mapping[str, float]) -> None:
    """Write ``results.json`` and ``results.md``, print the second.

    Args:
        grids: folder of a grid below ``out`` -> title.
        methods: name -> shorthand.
        chosen: name -> learning rate.
    """
    lines, record = [], {}
    for folder, title in grids.items():
        found = finished(out / folder)
        order = sorted(found, key=lambda name: -statistics.mean(r["score"] for r in found[name]))
        lines += [
            f"## {title}",
            "",
            "| method | rate | parameters without head | accuracy | minus linear | minus LoRA | file, KiB | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        head = found["linear"][0]["trainable"] if "linear" in found else 0
        for name in order:
            runs = found[name]
            accuracy = [100 * r["score"] for r in runs]
            lines.append(
                f"| `{methods[name]}` | {chosen[name]:g} | {runs[0]['trainable'] - head:,} | {spread(accuracy)} "
                f"| {gap(found, name, 'linear')} | {gap(found, name, 'lora')} "
                f"| {runs[0]['adapter_bytes'] / 1024:.0f} | {statistics.mean(r['seconds'] for r in runs):.0f} |"
            )
        lines.append("")
        record[folder] = {
            name: {
                "method": methods[name],
                "lr": chosen[name],
                "trainable": found[name][0]["trainable"],
                "accuracy": [r["score"] for r in found[name]],
                "adapter_bytes": found[name][0]["adapter_bytes"],
            }
            for name in order
        }
    write_json(out / "results.json", record)
    write_text(out / "results.md", "\n".join(lines))
    print("\n".join(lines))


def finished(grid: Path) -> Rows:
    """Method -> rows of its finished runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((grid / "bench.json").read_text()):
        if row["score"] is not None:
            found.setdefault(row["method"], []).append(row)
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def gap(found: Rows, name: str, other: str) -> str:
    """Differences to another method, paired by seed: mean (lowest to highest)."""
    theirs = {r["seed"]: r["score"] for r in found.get(other, [])}
    gaps = [100 * (r["score"] - theirs[r["seed"]]) for r in found[name] if r["seed"] in theirs]
    return f"{statistics.mean(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f})" if gaps else ""
