"""The learning rates of the point-cloud demo, chosen on validation clouds with seeds that the demo does not use.

    python benchmarks/pointcloud/choose_demo.py [--methods lora,idpt] [--out runs/choose-demo]

Prints and writes the table; start it again to go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_suite.pointcloud import demo, micro

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose_demo

if __name__ == "__main__":
    shared = {"plugin": "pointcloud", "backbone": {"name": micro.NAME}, "resample": True, "data": dict(demo.DATA)}
    choose_demo(__doc__, demo, shared, "runs/choose-demo")
