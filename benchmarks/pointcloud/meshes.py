"""Every method on a folder of meshes: each is a class, learnt from one side and tested from the other.

    python benchmarks/pointcloud/meshes.py --meshes MESHES [--methods lora,idpt] [--shots 5,20] [--seeds 3] [--out OUT]

The embedded backbone is adapted to clouds of 1024 points seen from one half of the view sphere; test clouds are seen
from the other half, with four times the noise, a part cut off and a turn of up to 15 degrees. Rates are chosen first,
on held-out training views of other seeds (20 views of each mesh, half the steps). Then every method trains with 5 and
with 20 views of each mesh, the last epoch counts, and every seed draws its own training views. Start it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_suite.train.config import RunConfig
from peft_suite.train.grid import Job, run_jobs
from peft_suite.train.suites import merged

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose
from shots import tables

TRIALS = (100,)  # seeds of the choice of rates
METHODS: Mapping[str, str] = {  # sizes that suit five blocks of 72
    "linear": "linear",
    "full": "full",
    "bitfit": "bitfit",
    "norm": "norm",
    "ssf": "ssf",
    "ia3": "ia3",
    "lora": "lora(rank=8)",
    "adapter": "adapter(bottleneck=8)",
    "pfeiffer": "pfeiffer(bottleneck=8)",
    "houlsby": "houlsby(bottleneck=8)",
    "parallel-adapter": "parallel-adapter(bottleneck=8)",
    "adaptformer": "adaptformer(bottleneck=8)",
    "vpt": "vpt(num_tokens=10, deep=True)",
    "vpt-shallow": "vpt(num_tokens=10)",
    "mam": "mam",
    "snell": "snell",
    "spt-lora": "spt-lora(budget=0.01M, rank=4)",
    "bi-lora": "bi-lora",
    "idpt": "idpt(generator=dgcnn_light, neighbors=8)",
    "point-peft": "point-peft(num_prompts=6, prompted_blocks=2)",
    "pointgst": "pointgst(rank=16, local=8)",
    "dapt": "dapt(rank=16)",
}
RATES = (1e-3, 3e-3, 1e-2)
OTHER = {
    "full": (3e-4, 1e-3, 3e-3),
    **dict.fromkeys(("linear", "bitfit", "norm", "ssf", "ia3", "vpt", "vpt-shallow"), (3e-3, 1e-2, 3e-2)),
}
EPOCHS = {5: 40, 20: 20}  # 200 and 400 steps


def fields(root: str, name: str, rate: float, shots: int, **recipe: Any) -> dict[str, Any]:
    """Fields of one run, without the seed."""
    return {
        "plugin": "pointcloud",
        "backbone": {"name": "micro-points"},
        "method": METHODS[name],
        "resample": True,
        "device": "cpu",
        "data": {
            "root": root,
            "format": "mesh-views",
            "num_points": 1024,
            "fps_start": "first",
            "shots": shots,
            "augment": "scale-translate+jitter",
            "val_fraction": 0.4,  # of 40 training views; of these, few-shot runs train with 5 or 20
        },
        "recipe": {
            "lr": rate,
            "batch_size": 17,
            "epochs": EPOCHS.get(shots, 20),
            "warmup_epochs": 2.0,
            "eval_every": 100,
            "checkpoint_every": 0,
            "select": "last",
            **recipe,
        },
    }


def main() -> None:
    """Choose rates, run what is missing, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", required=True, help="folder of .obj and .ply files")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas; all by default")
    parser.add_argument("--shots", default="5,20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/meshes"))
    args = parser.parse_args()
    names = [n.strip() for n in args.methods.split(",") if n.strip()]

    def trial(name: str, rate: float) -> dict[str, Any]:
        return fields(args.meshes, name, rate, 20, epochs=10, warmup_epochs=1.0)

    chosen = choose(trial, {n: OTHER.get(n, RATES) for n in names}, TRIALS, args.out / "choose")
    shots = [int(s) for s in args.shots.split(",")]
    for count in shots:
        run_jobs(
            [
                Job(
                    f"{count} views a mesh",
                    name,
                    seed,
                    RunConfig.from_dict(merged(fields(args.meshes, name, chosen[name], count), {"seed": seed})),
                )
                for name in names
                if name in chosen
                for seed in range(args.seeds)
            ],
            args.out / f"{count}-shot",
        )
    grids = {f"{count}-shot": f"{count} views of each mesh" for count in shots}
    tables(args.out, grids, METHODS, chosen)


if __name__ == "__main__":
    main()
