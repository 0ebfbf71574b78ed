"""Every method on spoken digits (FSDD): few recordings and all, and speakers that nobody trained on.

    python benchmarks/audio/fsdd.py --root FSDD [--methods lora,conformer] [--shots 5,20,0] [--seeds 3] [--out OUT]

The embedded backbone is adapted to digits of six speakers at 8 kHz; recordings 0 to 4 of each digit and speaker test,
as the data set says. Rates are chosen first, on a tenth of the training recordings, held out by another seed, after
training on 20 others of each digit and speaker for fewer epochs. Then every method trains with 5, with 20 and with all
(0) recordings of each digit and speaker; the last epoch counts, and every seed draws its own recordings. ``--apart``
methods also train with one seed on 20 of each digit of five speakers and are tested on the sixth, for each of the six.
Start it again to go on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.audio.data import AudioDataConfig
from peft_suite.audio.splits import folds_of
from peft_suite.storage import write_json, write_text
from peft_suite.train.config import RunConfig
from peft_suite.train.grid import Job, run_jobs
from peft_suite.train.suites import merged

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose
from shots import finished, spread, tables

TRIALS = (100,)  # seeds of the choice of rates
METHODS: Mapping[str, str] = {  # sizes that suit five blocks of 96
    "linear": "linear",
    "full": "full",
    "bitfit": "ast-bitfit",
    "norm": "norm",
    "ssf": "ssf",
    "lora": "ast-lora",
    "lora-qkvo": "ast-lora(targets=[q, k, v, o])",
    "pfeiffer": "ast-pfeiffer(bottleneck=8)",
    "pfeiffer-attn": "ast-pfeiffer(bottleneck=8, position=attn)",
    "pfeiffer-sequential": "ast-pfeiffer(bottleneck=8, insertion=sequential)",
    "pfeiffer-before": "ast-pfeiffer(bottleneck=8, insertion=before, residual=False)",
    "pfeiffer-attn-sequential": "ast-pfeiffer(bottleneck=8, position=attn, insertion=sequential)",
    "pfeiffer-attn-before": "ast-pfeiffer(bottleneck=8, position=attn, insertion=before, residual=False)",
    "houlsby": "ast-houlsby(bottleneck=8)",
    "conformer": "conformer(bottleneck=8, kernel=7)",
    "conformer-houlsby": "conformer(bottleneck=8, kernel=7, position=both)",
    "convpass": "convpass",
    "soft-moa": "soft-moa(experts=4, bottleneck=4)",
    "dense-moa": "dense-moa(experts=4, bottleneck=4)",
    "prompts": "audio-prompts(num_tokens=8)",
    "prompts-shallow": "audio-prompts(num_tokens=24, deep=False)",
    "prefix": "prefix(num_tokens=16)",
}
RATES = (1e-3, 3e-3, 1e-2)
OTHER = {
    "full": (3e-4, 1e-3, 3e-3),
    **dict.fromkeys(("linear", "bitfit", "norm", "ssf", "prompts", "prompts-shallow", "prefix"), (3e-3, 1e-2, 3e-2)),
}
EPOCHS = {5: 16, 20: 5, 0: 3}  # 150 to 250 steps
APART = "linear,lora,conformer"


def fields(root: str, name: str, rate: float, shots: int, **recipe: Any) -> dict[str, Any]:
    """Fields of one run, without the seed."""
    return {
        "plugin": "audio",
        "backbone": {"name": "micro-ast"},
        "method": METHODS[name],
        "resample": True,
        "device": "cpu",
        "data": {
            "root": root,
            "format": "fsdd",
            "shots": shots,
            "augment": "roll(most=8)+spec-augment(freq=8, time=12)",
            "val_fraction": 0.0,
        },
        "recipe": {
            "lr": rate,
            "batch_size": 32,
            "epochs": EPOCHS.get(shots, 5),
            "warmup_epochs": 0.5,
            "eval_every": 100,
            "checkpoint_every": 0,
            "select": "last",
            **recipe,
        },
    }


def main() -> None:
    """Choose rates, run what is missing, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas; all by default")
    parser.add_argument("--apart", default=APART, help="methods to test on speakers apart")
    parser.add_argument("--shots", default="5,20,0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/fsdd"))
    args = parser.parse_args()
    names, apart = split(args.methods), split(args.apart)

    def trial(name: str, rate: float) -> dict[str, Any]:
        values = fields(args.root, name, rate, 20, epochs=3)
        return merged(values, {"data": {"val_fraction": 0.1}})

    def job(task: str, name: str, seed: int, shots: int, data: Mapping[str, Any]) -> Job:
        values = merged(fields(args.root, name, chosen[name], shots), {"data": data, "seed": seed})
        return Job(task, name, seed, RunConfig.from_dict(values))

    wanted = list(dict.fromkeys([*names, *apart]))
    chosen = choose(trial, {n: OTHER.get(n, RATES) for n in wanted}, TRIALS, args.out / "choose")
    grids = {}
    for count in [int(s) for s in split(args.shots)]:
        folder, title = (f"{count}-shot", f"{count} recordings of each digit and speaker") if count else ("all", "all")
        jobs = [job(title, n, seed, count, {}) for n in names if n in chosen for seed in range(args.seeds)]
        run_jobs(jobs, args.out / folder)
        grids[folder] = title
    tables(args.out, grids, METHODS, chosen)
    if apart:
        speakers = folds_of(AudioDataConfig(root=args.root, format="fsdd"), "speaker")  # (name, fields of the data)
        run_jobs([job(who, n, 0, 20, data) for who, data in speakers for n in apart if n in chosen], args.out / "apart")
        speaker_table(args.out, [who for who, _ in speakers])


def split(text: str) -> list[str]:
    """``"a, b"`` as two words."""
    return [word.strip() for word in text.split(",") if word.strip()]


def speaker_table(out: Path, speakers: Sequence[str]) -> None:
    """Write ``apart.json`` and ``apart.md``, print the second."""
    found = finished(out / "apart")
    lines = [f"| method | {' | '.join(speakers)} | mean |", "|---" * (len(speakers) + 2) + "|"]
    record = {}
    for name, rows in found.items():
        score = {row["task"]: row["score"] for row in rows}
        cells = [f"{100 * score[who]:.1f}" if who in score else "" for who in speakers]
        lines.append(f"| `{METHODS[name]}` | {' | '.join(cells)} | {spread([100 * v for v in score.values()])} |")
        record[name] = {"method": METHODS[name], "accuracy": score, "mean": statistics.mean(score.values())}
    write_json(out / "apart.json", record)
    write_text(out / "apart.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
