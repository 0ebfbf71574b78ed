"""The learning rates of the diffusion demo, chosen on validation images with seeds that the demo does not use.

    python benchmarks/diffusion/choose_demo.py [--methods lora,sara] [--out runs/diffusion/choose-demo]

Every method gets the same number of rates, and one more where the best lies at an end. Prints and writes the table of
validation losses; start it again to go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_suite.diffusion import demo

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose_demo

if __name__ == "__main__":
    shared = demo.base_config({**demo.DATA, "pictures": 0})
    choose_demo(__doc__, demo, shared, "runs/diffusion/choose-demo")
