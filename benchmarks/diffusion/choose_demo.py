"""The learning rates of the diffusion demo, chosen on validation images with seeds that the demo does not use.

    python benchmarks/diffusion/choose_demo.py [--methods lora,sara] [--out runs/diffusion/choose-demo]

Every method gets the same number of rates, and one more where the best lies at an end. Prints and writes the table of
validation losses; start it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peft_suite.diffusion import demo
from peft_suite.train.suites import merged

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose

SEEDS = (100, 101)
RATES = (3e-3, 1e-2, 3e-2)
FULL = (1e-3, 3e-3, 1e-2)


def main() -> None:
    """Run what is missing, then choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(demo.METHODS), help="separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion/choose-demo"))
    args = parser.parse_args()
    names = [n.strip() for n in args.methods.split(",") if n.strip()]

    def fields(name: str, rate: float) -> dict[str, Any]:
        shared = demo.base_config({**demo.DATA, "pictures": 0})
        recipe = {**demo.RECIPES[name], "lr": rate}
        return merged(shared, {"method": demo.METHODS[name], "device": "cpu"}, {"recipe": recipe})

    choose(fields, {n: FULL if n == "full" else RATES for n in names}, SEEDS, args.out)


if __name__ == "__main__":
    main()
