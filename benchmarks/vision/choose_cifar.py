"""One learning rate per method for the recipes of the suite cifar10, chosen on validation images.

    python benchmarks/vision/choose_cifar.py --root runs/cifar10/adapt --checkpoint runs/cifar10/vit.safetensors

Every method runs with three rates, and with one more where the best is the lowest or the highest, on 100 images per
class (200 steps, half of the recipe's; seed 100) and is measured on 100 more of the training folder per class; the
tests of the recipes' own runs use other images and other seeds. Prints and writes the table; start it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peft_suite.train.suites import merged
from peft_suite.vision.recipes import CIFAR10, book

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose

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

    def fields(name: str, rate: float) -> dict[str, Any]:
        recipe = book.recipe(f"{name}-cifar10")
        values = merged(recipe.run_fields(CIFAR10, "100-images"), {"data": {"root": args.root, **VALIDATION}})
        values["backbone"]["checkpoint"] = args.checkpoint
        return merged(values, {"plugin": "vision", "device": "cpu"}, {"recipe": {"lr": rate, **STEPS}})

    choose(fields, {name: OTHER.get(name, RATES) for name in chosen}, (SEED,), args.out)


if __name__ == "__main__":
    main()
