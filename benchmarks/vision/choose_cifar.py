"""One learning rate per method for the recipes of the suite cifar10, chosen on validation images.

    python benchmarks/vision/choose_cifar.py --root runs/cifar10/adapt --checkpoint runs/cifar10/vit.safetensors

Every method runs with three rates, and with one more where the best is the lowest or the highest, on 100 images per
class (200 steps, half of the recipe's; seed 100) and is measured on 100 more of the training folder per class; the
tests of the recipes' own runs use other images and other seeds. Prints and writes the table; start it again to go on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_suite.storage import write_json
from peft_suite.train.config import RunConfig
from peft_suite.train.grid import Job, run_jobs
from peft_suite.train.record import read_run
from peft_suite.train.suites import merged
from peft_suite.vision.recipes import CIFAR10, book

SEED = 100
VALIDATION = {"val_fraction": 0.02, "eval_shots": 100}
STEPS = {"epochs": 10, "warmup_epochs": 1, "eval_every": 10}
RATES = (1e-3, 3e-3, 1e-2)
OTHER = {
    "full": (1e-4, 3e-4, 1e-3),
    **dict.fromkeys(("linear", "bitfit", "norm", "ssf", "ia3", "vpt", "vpt-shallow"), (3e-3, 1e-2, 3e-2)),
}


def main() -> None:
    """Run what is missing, then choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder train/CLASS, test/CLASS")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10/choose"))
    parser.add_argument("--methods", default="", help="separated by commas; all by default")
    args = parser.parse_args()
    names = sorted(n.removesuffix("-cifar10") for n, r in book.recipes.items() if r.suite == CIFAR10.name)
    chosen = [n.strip() for n in args.methods.split(",") if n.strip()] or names

    def jobs(name: str, rates: Sequence[float]) -> list[Job]:
        recipe = book.recipe(f"{name}-cifar10")
        fields = merged(recipe.run_fields(CIFAR10, "100-images"), {"data": {"root": args.root, **VALIDATION}})
        fields["backbone"]["checkpoint"] = args.checkpoint
        shared = {"plugin": "vision", "device": "cpu", "seed": SEED}
        runs = [(rate, merged(fields, shared, {"recipe": {"lr": rate, **STEPS}})) for rate in rates]
        return [Job(name, f"lr-{rate:g}", SEED, RunConfig.from_dict(values)) for rate, values in runs]

    run_jobs([job for name in chosen for job in jobs(name, OTHER.get(name, RATES))], args.out)
    further = []
    for name in chosen:
        found = accuracies(args.out, name)
        best = max(found, key=lambda rate: found[rate])
        if best == min(found):
            further += jobs(name, [float(f"{best / 10**0.5:.0e}")])
        elif best == max(found):
            further += jobs(name, [float(f"{best * 10**0.5:.0e}")])
    run_jobs(further, args.out)
    show(args.out, names)


def accuracies(out: Path, name: str) -> dict[float, float]:
    """Rate -> validation accuracy of a method's finished runs."""
    found = {}
    for folder in (out / name).glob("lr-*"):
        run = read_run(folder / f"seed-{SEED}")
        if run and run["status"] == "finished":
            found[float(folder.name.removeprefix("lr-"))] = run["final"]["val"]["accuracy"]
    return dict(sorted(found.items()))


def show(out: Path, names: list[str]) -> None:
    """The validation accuracies of all finished runs and the best rate of each method."""
    table = Table("method", "rate: accuracy", "chosen")
    record: dict[str, Any] = {}
    for name in names:
        if found := accuracies(out, name):
            best = max(found, key=lambda rate: found[rate])
            record[name] = {"chosen": best, "validation_accuracy": {f"{r:g}": a for r, a in found.items()}}
            table.add_row(name, "  ".join(f"{rate:g}: {100 * a:.1f}" for rate, a in found.items()), f"{best:g}")
    write_json(out / "chosen.json", record)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
