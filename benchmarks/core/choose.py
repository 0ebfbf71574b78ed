"""A learning rate for each method by validation: short runs over a few rates, and one rate further at an end.

A run of a rate lies in ``OUT/METHOD/lr-RATE/seed-K``, so a choice that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_suite.storage import write_json
from peft_suite.tables import lower_is_better
from peft_suite.train.config import RunConfig
from peft_suite.train.grid import Job, run_jobs
from peft_suite.train.record import read_run
from peft_suite.train.suites import merged

__all__ = ["choose", "choose_demo", "scores"]

Fields = Callable[[str, float], Mapping[str, Any]]
DEMO_SEEDS = (100, 101)  # demos do not use them
DEMO_RATES, DEMO_FULL = (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)


def choose_demo(text: str | None, demo: Any, shared: Mapping[str, Any], out: str) -> None:
    """What a script that chooses a demo's learning rates does: read the command line, run what is missing, choose.

    Args:
        text: the script's own, for ``--help``.
        demo: a module with ``METHODS`` and ``RECIPES``.
        shared: fields of :class:`RunConfig` that all runs have, data among them.
        out: folder by default.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(demo.METHODS), help="separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=Path(out))
    args = parser.parse_args()

    def fields(name: str, rate: float) -> dict[str, Any]:
        recipe = {**demo.RECIPES[name], "lr": rate}
        return merged(shared, {"method": demo.METHODS[name], "device": "cpu"}, {"recipe": recipe})

    names = [n.strip() for n in args.methods.split(",") if n.strip()]
    choose(fields, {n: DEMO_FULL if n == "full" else DEMO_RATES for n in names}, DEMO_SEEDS, args.out)


def choose(fields: Fields, rates: Mapping[str, Sequence[float]], seeds: Sequence[int], out: Path) -> dict[str, float]:
    """Run what is missing; write ``chosen.json``, print the table.

    Args:
        fields: ``fields(method, rate)`` are those of :class:`RunConfig`, without the seed.
        rates: method -> rates to try; where the best is the lowest or the highest, half a decade further is tried too.
        seeds: of the trials, other ones than those of the runs that are reported.

    Returns:
        Method -> rate of the best mean validation score.
    """

    def jobs(name: str, tried: Sequence[float]) -> list[Job]:
        return [
            Job(name, f"lr-{rate:g}", seed, RunConfig.from_dict({**fields(name, rate), "seed": seed}))
            for rate in tried
            for seed in seeds
        ]

    run_jobs([job for name, tried in rates.items() for job in jobs(name, tried)], out)
    further = []
    for name in rates:
        found = scores(out, name, seeds)
        best = best_of(out, name, found) if found else 0.0
        if best == min(found, default=None):
            further += jobs(name, [float(f"{best / 10**0.5:.0e}")])
        elif best == max(found, default=None):
            further += jobs(name, [float(f"{best * 10**0.5:.0e}")])
    run_jobs(further, out)
    return show(out, sorted(rates), seeds)


def scores(out: Path, name: str, seeds: Sequence[int]) -> dict[float, float]:
    """Rate -> mean validation score of a method's finished runs, for rates that every seed has finished."""
    found = {}
    for folder in (out / name).glob("lr-*"):
        runs = [read_run(folder / f"seed-{seed}") for seed in seeds]
        if all(run and run["status"] == "finished" for run in runs):
            found[float(folder.name.removeprefix("lr-"))] = mean(r["final"]["val"][r["metric"]] for r in runs if r)
    return dict(sorted(found.items()))


def best_of(out: Path, name: str, found: Mapping[float, float]) -> float:
    """The rate of the highest score, or of the lowest where the metric is a loss."""
    order = min if lower_is_better(metric_of(out, name)) else max
    return order(found, key=lambda rate: found[rate])


def metric_of(out: Path, name: str) -> str:
    """The metric of a method's runs."""
    records = (read_run(folder) for folder in (out / name).glob("lr-*/seed-*"))
    return next((str(r["metric"]) for r in records if r and r["status"] == "finished"), "")


def show(out: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """The validation scores of all finished runs and the best rate of each method."""
    table = Table("method", "rate: validation score", "chosen")
    record: dict[str, Any] = {}
    for name in names:
        if found := scores(out, name, seeds):
            best = best_of(out, name, found)
            record[name] = {"chosen": best, "validation": {f"{r:g}": a for r, a in found.items()}}
            losses = lower_is_better(metric_of(out, name))
            shown = "  ".join(
                f"{rate:g}: {a:.4f}" if losses else f"{rate:g}: {100 * a:.1f}" for rate, a in found.items()
            )
            table.add_row(name, shown, f"{best:g}")
    write_json(out / "chosen.json", record)
    Console(width=140).print(table)
    return {name: entry["chosen"] for name, entry in record.items()}
