"""Segmentation of composed scenes: decoder alone, adapters, and full fine-tuning on one small pre-trained ViT.

    python benchmarks/vision/segmentation.py --cifar cifar10.tar [--methods linear,'lora(rank=8)',hst,full] [--seeds 1]

Pre-trains a ViT of 0.8 M parameters for 32x32 images on CIFAR-10 classes (pictures that no training or validation scene
shows), scales its position embedding to 64x64, composes scenes from other pictures with known masks, and trains every
method with one setting (learning rates below, untuned). Everything runs on one thread in some minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from peft_suite.cli.settings import split_methods
from peft_suite.train import RunConfig, run
from peft_suite.vision.segmentation_scenes import write_scenes

SIZE = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
NAME = "vit_tiny_patch16_224"
PER_CLASS = 500  # pictures per class in training scenes, and as many in validation scenes
RATES = {"linear": 1e-2, "lora": 5e-3, "full": 1e-3, "hst": 3e-3, "ssf": 1e-2, "convpass": 3e-3, "vpt": 1e-2}


def main() -> None:
    """Parse, pre-train once, compose once, run every method, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder train/CLASS, test/CLASS, or a tar of it")
    parser.add_argument("--work", type=Path, default=Path("runs/segmentation"), help="scenes, weights, runs")
    parser.add_argument("--methods", default="linear,lora(rank=8),hst,full")
    parser.add_argument("--decoder", default="linear", choices=("linear", "up"))
    parser.add_argument("--pretrain", type=int, default=60000, help="pictures seen while pre-training")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--class-weights", default="none", choices=("none", "balanced"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plugin", default="vision")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cifar, work = unpacked(args.cifar, args.work), args.work
    weights, scenes = work / "vit.safetensors", work / "scenes"
    accuracy = pretrain(cifar, weights, args.pretrain) if not weights.exists() else None
    if not scenes.exists():
        write_scenes(cifar, scenes, {"train": args.scenes, "val": 100, "test": 200}, per_class=PER_CLASS)
    rows = [one(args, method, weights, scenes) for method in split_methods(args.methods)]
    facts = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("cifar", "work")}
    record = {**facts, "settings": settings, "rates": RATES, "pretraining_accuracy": accuracy, "rows": rows}
    (work / f"results-{args.decoder}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['method']:16} mIoU {row['miou']:.4f}  pixel accuracy {row['pixel_accuracy']:.4f}  "
            f"{row['trainable']:>9,} trained  {row['seconds']:.0f} s"
        )


def unpacked(source: Path, work: Path) -> Path:
    """The folder, or the tar's content below ``work``."""
    if source.is_dir():
        return source
    target = work / "cifar10"
    if not target.exists():
        with tarfile.open(source) as archive:
            archive.extractall(target, filter="data")
    return target


def pretrain(cifar: Path, weights: Path, count: int) -> float:
    """Train a classifier on ``count`` pictures and write its weights for 64x64 images; returns its test accuracy."""
    start = time.perf_counter()
    torch.manual_seed(0)
    images, labels = load(cifar / "train", 2 * PER_CLASS, 5000)
    model: Any = timm.create_model(NAME, img_size=32, num_classes=10, **SIZE)
    steps = count // 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    order = torch.cat([torch.randperm(len(images)) for _ in range(count // len(images) + 1)])
    for step in range(steps):
        rows = order[128 * step : 128 * (step + 1)]
        batch = prepared(images[rows])
        if step % 2:
            batch = batch.flip(3)
        loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tests, wanted = load(cifar / "test", 0, 200)
    model.eval()
    with torch.no_grad():
        accuracy = float((model(prepared(tests)).argmax(1) == wanted).float().mean())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (8, 8), num_prefix_tokens=1)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, weights)
    print(f"pre-trained in {time.perf_counter() - start:.0f} s, test accuracy {accuracy:.3f}")
    return accuracy


def load(folder: Path, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures ``start`` to ``stop`` of every class, uint8 ``[N, 32, 32, 3]``, and their classes."""
    images, labels = [], []
    for label, name in enumerate(sorted(p.name for p in folder.iterdir())):
        for file in sorted((folder / name).iterdir())[start:stop]:
            images.append(np.asarray(Image.open(file).convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def prepared(images: torch.Tensor) -> torch.Tensor:
    """Mean and deviation 0.5, as the model's configuration says."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def one(args: argparse.Namespace, method: str, weights: Path, scenes: Path) -> dict[str, Any]:
    """All seeds of one method."""
    name = method.partition("(")[0]
    config = {
        "plugin": args.plugin,
        "task": "segmentation",
        "backbone": {
            "name": NAME,
            "checkpoint": str(weights),
            "options": {**SIZE, "img_size": 64, "decoder": args.decoder},
        },
        "data": {"root": str(scenes), "augment": "light"},
        "method": method,
        "recipe": {
            "epochs": args.epochs,
            "batch_size": 16,
            "lr": RATES[name],
            "weight_decay": 1e-4,
            "class_weights": args.class_weights,
        },
        "device": "cpu",
    }
    results = []
    for seed in range(args.seeds):
        out = args.work / f"{name}-{args.decoder}-{seed}"
        result: Any = run(RunConfig.from_dict({**config, "seed": seed, "out": str(out)}), progress=False)
        results.append(result.record)
    finals = [r["final"]["test"] for r in results]
    return {
        "method": method,
        **{key: statistics.fmean(f[key] for f in finals) for key in ("miou", "pixel_accuracy", "mean_accuracy")},
        "miou_per_seed": [f["miou"] for f in finals],
        "trainable": results[0]["parameters"]["trainable"],
        "seconds": statistics.fmean(r["time"]["total_s"] for r in results),
    }


if __name__ == "__main__":
    main()
