"""The learning rates of the audio demo, chosen on validation sounds with seeds that the demo does not use.

    python benchmarks/audio/choose_demo.py [--methods lora,conformer] [--out runs/audio/choose-demo]

Prints and writes the table; start it again to go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_suite.audio import demo, micro

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose_demo

if __name__ == "__main__":
    shared = {"plugin": "audio", "backbone": {"name": micro.NAME}, "resample": True, "data": dict(demo.DATA)}
    choose_demo(__doc__, demo, shared, "runs/audio/choose-demo")
