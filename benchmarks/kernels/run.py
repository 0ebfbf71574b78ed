"""All kernel benchmarks, one after the other, each in a process of its own.

    python benchmarks/kernels/run.py [--quick]

Peers that are installed stand in the tables; ``pip install 'peft-suite[bench]'`` brings those that a registry has.
Results go to ``benchmarks/kernels/results`` as CSV and plots.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("points", "sparse", "spectral", "fused")

if __name__ == "__main__":
    failed = [
        name
        for name in SCRIPTS
        if subprocess.run(
            [sys.executable, Path(__file__).with_name(f"{name}.py"), *sys.argv[1:]], check=False
        ).returncode
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
