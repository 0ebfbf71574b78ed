"""The learning rates of the audio demo, chosen on validation sounds with seeds that the demo does not use.

    python benchmarks/audio/choose_demo.py [--methods lora,conformer] [--out runs/audio/choose-demo]

Prints and writes the table; start it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peft_suite.audio import demo, micro
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
    parser.add_argument("--out", type=Path, default=Path("runs/audio/choose-demo"))
    args = parser.parse_args()
    names = [n.strip() for n in args.methods.split(",") if n.strip()]

    def fields(name: str, rate: float) -> dict[str, Any]:
        shared = {"plugin": "audio", "backbone": {"name": micro.NAME}, "resample": True, "device": "cpu"}
        return merged(
            shared,
            {"data": dict(demo.DATA), "method": demo.METHODS[name]},
            {"recipe": {**demo.RECIPES[name], "lr": rate}},
        )

    choose(fields, {n: FULL if n == "full" else RATES for n in names}, SEEDS, args.out)


if __name__ == "__main__":
    main()
