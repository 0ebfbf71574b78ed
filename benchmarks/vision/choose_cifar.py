"""One learning rate per method for the recipes of the suite cifar10, chosen on validation images.

    python benchmarks/vision/choose_cifar.py --root runs/cifar10/adapt --checkpoint runs/cifar10/vit.safetensors

Every method runs with three rates on 100 images per class (200 steps, half of the recipe's; seed 100) and is measured on
100 more of the training folder per class; the tests of the recipes' own runs use other images and other seeds. Prints and
writes the table; start it again to go on.
"""

from __future__ import annotations

import argparse
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
    jobs = []
    for name in chosen:
        recipe = book.recipe(f"{name}-cifar10")
        fields = merged(recipe.run_fields(CIFAR10, "100-images"), {"data": {"root": args.root, **VALIDATION}})
        fields["backbone"]["checkpoint"] = args.checkpoint
        for rate in OTHER.get(name, RATES):
            values = merged(
                fields, {"recipe": {"lr": rate, **STEPS}, "plugin": "vision", "device": "cpu", "seed": SEED}
            )
            jobs.append(Job(name, f"lr-{rate:g}", SEED, RunConfig.from_dict(values)))
    run_jobs(jobs, args.out)
    show(args.out, names)


def show(out: Path, names: list[str]) -> None:
    """The validation accuracies of all finished runs and the best rate of each method."""
    table = Table("method", *("rate: accuracy",) * 3, "chosen")
    record: dict[str, Any] = {}
    for name in names:
        found = {}
        for rate in OTHER.get(name, RATES):
            run = read_run(out / name / f"lr-{rate:g}" / f"seed-{SEED}")
            if run and run["status"] == "finished":
                found[rate] = run["final"]["val"]["accuracy"]
        if found:
            best = max(found, key=lambda rate: found[rate])
            record[name] = {"chosen": best, "validation_accuracy": {f"{r:g}": a for r, a in found.items()}}
            cells = [f"{rate:g}: {100 * accuracy:.1f}" for rate, accuracy in found.items()]
            table.add_row(name, *cells, *[""] * (3 - len(cells)), f"{best:g}")
    write_json(out / "chosen.json", record)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
