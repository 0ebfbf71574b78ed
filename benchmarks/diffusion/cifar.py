"""Teach the CIFAR UNet a sixth class with 50 and 500 images by every method at two budgets.

    python benchmarks/diffusion/pretrain_cifar.py --root cifar10 --out runs/cifar-diffusion
    python benchmarks/diffusion/cifar.py --root runs/cifar-diffusion choose
    python benchmarks/diffusion/cifar.py --root runs/cifar-diffusion run --seeds 1
    python benchmarks/diffusion/cifar.py --root runs/cifar-diffusion table

``choose`` tries the same number of rates for every method (200 steps, validation loss on 200 images, a seed that the
runs do not use) with 500 images; 50 take the same rate. ``run`` trains 400 steps of 32 images with the chosen rate,
draws 500 images of the new class and 100 of each old one (25 steps, no guidance), and measures them in the features of
the judge, which was trained on real images of all ten classes. Everything goes on where it was when it is started
again.
``table`` prints Markdown and writes ``cifar.json`` and the grids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_suite.diffusion import sampling
from peft_suite.diffusion.backbones import backbones
from peft_suite.diffusion.judge import Judge, accuracy, load_judge
from peft_suite.diffusion.metrics import frechet, memorisation
from peft_suite.diffusion.pretrain_micro import Denoise
from peft_suite.storage import atomic, write_json
from peft_suite.train.config import RunConfig
from peft_suite.train.grid import Job, job_folder, run_jobs
from peft_suite.train.opening import open_adapter
from peft_suite.train.record import read_run
from peft_suite.train.suites import merged

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from choose import choose, scores
from pretrain_cifar import KNOWN, held_out_loss

NEW, LABEL = "horse", 7  # its place among the ten names
AMOUNTS = (50, 500)
TRIED = 500  # images with which rates are chosen
VALIDATION = 200
STEPS, BATCH = 400, 32
DRAWN, OLD_DRAWN, SAMPLING = 500, 100, 25
_WHERE = "targets=['conv1', 'conv2', 'q', 'k', 'v', 'o']"
METHODS: dict[str, str] = {  # name in the table -> method; the numbers behind names are parameters in thousands
    "full": "full",
    "norm": "norm",
    "bitfit": "bitfit",
    "difffit": "difffit",
    "ssf": "ssf",
    "lora-8": "lora(rank=4, targets=['q', 'k', 'v', 'o'])",
    "dora-8": "lora(rank=4, dora=True, targets=['q', 'k', 'v', 'o'])",
    "adapter-8": "adapter(bottleneck=8)",
    "sara-8": "sara(budget=8000, rank_weight=0, progressive=None)",
    "lt-sft-8": "lt-sft(budget=8000, steps=200, lr=0.0003)",
    "lora-64": f"lora(rank=5, {_WHERE})",
    "dora-64": f"lora(rank=5, dora=True, {_WHERE})",
    "adapter-64": "adapter(bottleneck=64)",
    "sara-64": "sara(budget=64000, rank_weight=0, progressive=None)",
    "lt-sft-64": "lt-sft(budget=64000, steps=200, lr=0.0003)",
}
RATES = (1e-3, 3e-3, 1e-2)
OTHER = {"full": (1e-4, 3e-4, 1e-3), **dict.fromkeys(("norm", "bitfit", "difffit", "ssf"), (3e-3, 1e-2, 3e-2))}
CHOOSING = 100  # seed of the trials


def main() -> None:
    """One of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "run", "table"))
    parser.add_argument("--root", type=Path, required=True, help="what pretrain_cifar.py wrote")
    parser.add_argument("--out", type=Path, help="ROOT/adapt by default")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas; all by default")
    parser.add_argument("--amounts", default=",".join(map(str, AMOUNTS)))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    args.out = args.out or args.root / "adapt"
    names = [n.strip() for n in args.methods.split(",") if n.strip()]
    amounts = [int(a) for a in args.amounts.split(",")]
    data = load_file(args.root / "images16.safetensors")
    lay_out(data, args.out, TRIED, CHOOSING)
    for amount in amounts:
        for seed in range(args.seeds):
            lay_out(data, args.out, amount, seed)
    if args.part == "choose":
        rates = {n: OTHER.get(n, RATES) for n in names}
        choose(lambda n, lr: fields(args, n, TRIED, CHOOSING, lr, STEPS // 2), rates, (CHOOSING,), args.out / "choose")
    elif args.part == "run":
        adapt_all(args, data, names, amounts)
    else:
        report(args, data, names, amounts)


def lay_out(data: dict[str, Tensor], out: Path, amount: int, seed: int) -> Path:
    """``train``, ``val``, ``test`` with the new class as PNG files: a seed draws its own training images."""
    root = out / "data" / f"{NEW}-{amount}-{seed}"
    if (root / "done").exists():
        return root
    rows = (data["train_labels"] == LABEL).nonzero().flatten()
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    parts = {"val": data["train"][order[:VALIDATION]], "train": data["train"][order[VALIDATION:][:amount]]}
    parts["test"] = data["test"][data["test_labels"] == LABEL]
    for split, images in parts.items():
        folder = root / split / NEW
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image.numpy()).save(folder / f"{i:04d}.png")
    (root / "done").touch()
    return root


def fields(args: argparse.Namespace, name: str, amount: int, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """A run's configuration, without its seed."""
    root = args.out / "data" / f"{NEW}-{amount}-{seed}"
    recipe = {"batch_size": BATCH, "max_steps": steps, "lr": rate, "weight_decay": 0.0, "clip_norm": 1.0}
    recipe |= {"warmup_epochs": 1.0, "eval_every": 10_000, "checkpoint_every": 0, "select": "last"}
    recipe |= {"calibration_batches": 200} if name.startswith("lt-sft") else {}
    images = {"root": str(root), "format": "classes", "labels": [LABEL], "random_flip": True, "pictures": 0}
    shared = {"plugin": "diffusion", "device": "cpu", "backbone": {"name": str(args.root / "pipeline")}}
    return merged(
        shared, {"method": METHODS[name], "data": {**images, "repeats": max(1, 500 // amount)}}, {"recipe": recipe}
    )


def adapt_all(args: argparse.Namespace, data: dict[str, Tensor], names: list[str], amounts: list[int]) -> None:
    """Train and measure what is missing, one run after the other."""
    jury = Jury(args.root, data)
    facts_of = measured(args.out / "base", lambda: jury.see(pretrained(args.root), None))
    print(f"not adapted: {facts_of}", flush=True)
    for amount in amounts:
        for seed in range(args.seeds):
            for name in names:
                job = job_of(args, name, amount, seed)
                if job is None:
                    print(f"{name}, {amount} images: no rate yet; start `choose` first", flush=True)
                    continue
                run_jobs([job], args.out / "runs", progress=False)
                folder = args.out / "runs" / job_folder(job)
                record = read_run(folder)
                if not record or record["status"] != "finished":
                    print(f"{folder}: {(record or {}).get('error')}", flush=True)
                    continue
                root = lay_out(data, args.out, amount, seed)
                seen = measured(
                    folder, lambda f=folder, r=root: jury.see(open_adapter(f / "adapter").model, trained(r))
                )
                print(f"{amount} images, {name}, seed {seed}: {short(seen)}", flush=True)


def job_of(args: argparse.Namespace, name: str, amount: int, seed: int) -> Job | None:
    """The run of a method with its chosen rate; None where none was chosen."""
    found = scores(args.out / "choose", name, (CHOOSING,))
    if not found:
        return None
    rate = min(found, key=lambda r: found[r])
    config = RunConfig.from_dict({**fields(args, name, amount, seed, rate, STEPS), "seed": seed})
    return Job(f"{NEW}-{amount}", name, seed, config)


def trained(root: Path) -> Tensor:
    """The training images and their mirror images, uint8 ``[2N, 16, 16, 3]``."""
    import numpy as np

    images = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in sorted((root / "train" / NEW).iterdir())]))
    return torch.cat((images, images.flip(2)))


def pretrained(root: Path) -> nn.Module:
    """The UNet as it was."""
    return backbones.build(str(root / "pipeline"), 0, pretrained=True, checkpoint="", options={})


def measured(folder: Path, see: Any) -> dict[str, float]:
    """What ``see`` says, kept in ``folder/seen.json``; its images beside it."""
    import json

    file = folder / "seen.json"
    if not file.exists():
        values, images = see()
        with atomic(folder / "new.png") as temporary:
            sampling.grid(images, columns=len(images)).save(temporary, format="PNG")
        write_json(file, values)
    found: dict[str, float] = json.loads(file.read_text("utf-8"))
    return found


class Jury:
    """What every run is measured against: the judge, the test images, the scheduler."""

    def __init__(self, root: Path, data: dict[str, Tensor]) -> None:
        from diffusers import DDPMScheduler

        self.judge: Judge = load_judge(root / "judge.safetensors")
        labels = data["test_labels"]
        self.new, old = data["test"][labels == LABEL], labels < KNOWN
        self.old, self.old_labels = data["test"][old], labels[old]
        self.new_features, self.old_features = self.features(self.new), self.features(self.old)
        self.signal = DDPMScheduler.from_pretrained(root / "pipeline" / "scheduler").alphas_cumprod
        model = pretrained(root)
        self.facts = backbones.preprocessing(str(root / "pipeline"), model)

    def features(self, images: Tensor) -> Tensor:
        """``[N, 128]``."""
        return torch.cat([self.judge.features(part) for part in images.split(500)])

    def see(self, model: nn.Module, known: Tensor | None) -> tuple[dict[str, float], Tensor]:
        """Quality, memory and what is left of the old classes; 12 images of the new one."""
        model.eval()
        new = self.draw(model, [LABEL], DRAWN, 0)
        old = self.draw(model, list(range(KNOWN)), KNOWN * OLD_DRAWN, 1)
        asked = torch.arange(len(old)) % KNOWN
        found = {
            "distance": frechet(self.new_features, self.features(new)),
            "accuracy": accuracy(self.judge, new, torch.full((len(new),), LABEL)),
            "old_distance": frechet(self.old_features, self.features(old)),
            "old_accuracy": accuracy(self.judge, old, asked),
            "loss": held_out_loss(Denoise(model), self.new, torch.full((len(self.new),), LABEL), self.signal),
            "old_loss": held_out_loss(Denoise(model), self.old, self.old_labels, self.signal),
        }
        if known is not None:
            pixels = [
                images.flatten(1).float().div(255) for images in (new, known, torch.cat((self.new, self.new.flip(2))))
            ]
            memory = memorisation(*pixels)
            found |= {"nearest_ratio": memory["ratio"], "nearer_to_training": memory["nearer"]}
        return found, new[:12]

    def draw(self, model: nn.Module, classes: list[int], count: int, seed: int) -> Tensor:
        """uint8 ``[N, 16, 16, 3]``."""
        return sampling.sample(model, self.facts, count, classes=classes, steps=SAMPLING, seed=seed, batch_size=100)


def short(values: dict[str, float]) -> str:
    """For the log."""
    return ", ".join(f"{k} {v:.3f}" for k, v in values.items())


COLUMNS = {
    "distance": ("distance", "{:.2f}"),
    "accuracy": ("judged a horse, %", "{:.1%}"),
    "loss": ("test loss", "{:.4f}"),
    "nearest_ratio": ("nearest: training / held out", "{:.3f}"),
    "nearer_to_training": ("nearer to training, %", "{:.1%}"),
    "old_distance": ("old classes: distance", "{:.2f}"),
    "old_accuracy": ("old classes: judged right, %", "{:.1%}"),
    "old_loss": ("old classes: loss", "{:.4f}"),
}


def report(args: argparse.Namespace, data: dict[str, Tensor], names: list[str], amounts: list[int]) -> None:
    """Markdown on the terminal, ``cifar.json``, and one grid per amount: base, methods, real images."""
    record: dict[str, Any] = {"base": measured(args.out / "base", lambda: ({}, torch.empty(0))), "amounts": {}}
    heads = ["method", "rate", "parameters", *(head for head, _ in COLUMNS.values()), "file, KiB"]
    for amount in amounts:
        print(f"\n## {amount} images\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        print(f"| not adapted | | | {' | '.join(cell([record['base']], key) for key in COLUMNS)} | |")
        rows, lines = [], [args.out / "base" / "new.png"]
        for name in names:
            jobs = [job for seed in range(args.seeds) if (job := job_of(args, name, amount, seed))]
            folders = [f for job in jobs if ((f := args.out / "runs" / job_folder(job)) / "seen.json").exists()]
            if not folders:
                continue
            seen, run = [measured(f, None) for f in folders], read_run(folders[0])
            assert run is not None
            rate, count = jobs[0].config.recipe.lr, run["parameters"]["trainable"]
            size = run["adapter"]["bytes"] / 1024
            rows.append({"method": name, "rate": rate, "parameters": count, "kib": size, "seen": seen})
            lines.append(folders[0] / "new.png")
            values = " | ".join(cell(seen, key) for key in COLUMNS)
            print(f"| `{name}` | {rate:g} | {count:,} | {values} | {size:.0f} |")
        record["amounts"][str(amount)] = rows
        real = sampling.grid(data["test"][data["test_labels"] == LABEL][:12], columns=12)
        pictures = [*(Image.open(line) for line in lines), real]
        sheet = Image.new("RGB", (real.width, sum(p.height for p in pictures)), "white")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
        with atomic(args.out / f"cifar-{amount}.png") as temporary:
            sheet.save(temporary, format="PNG", optimize=True)
        print(f"\nLines of cifar-{amount}.png: not adapted, {', '.join(r['method'] for r in rows)}, real images")
    write_json(args.out / "cifar.json", record)


def cell(seen: list[dict[str, float]], key: str) -> str:
    """Mean, and deviation of several seeds."""
    values = [s[key] for s in seen if key in s]
    if not values:
        return ""
    text = COLUMNS[key][1].format(mean(values)).removesuffix("%")
    return text + (f" ± {COLUMNS[key][1].format(stdev(values)).removesuffix('%')}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
