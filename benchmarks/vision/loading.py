"""Data loading: images per second on one core, our data source against a plain torchvision loader.

    python benchmarks/vision/loading.py [--images 240] [--rounds 7] [--data FOLDER] [--out benchmarks/vision/results]

Both read the same JPEG files from disk and give batches of 64 normalised 224x224 tensors: torchvision by ImageFolder,
its transforms and a DataLoader, ours by the vision plugin's data source and the training loop's loader. No cache, no
worker processes, one thread; first outputs are compared, then rounds alternate. A ratio above 1 means ours is faster.
The case "in memory" is what a run sees from its second epoch on where a split's pixels fit into 256 MiB.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from peft_suite.train.loader import batches, epoch_plan
from peft_suite.vision.data import ImageDataConfig, source

SIZE, BATCH = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = {"input_size": [3, SIZE, SIZE], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.875}
BICUBIC = transforms.InterpolationMode.BICUBIC
END = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


def write_images(root: Path, count: int) -> None:
    """Smooth textures of 500x375 in two classes, as JPEG of about 60 KB: the size of a usual photograph."""
    rng = np.random.default_rng(0)
    for i in range(count):
        low = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        grain = rng.integers(-12, 13, (375, 500, 3))
        pixels = np.asarray(low.resize((500, 375), Image.Resampling.BICUBIC)) + grain
        file = root / "train" / f"class{i % 2}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def theirs(root: Path, transform: Any, shuffle: bool) -> Callable[[], Any]:
    """One epoch of the plain loader."""
    data = ImageFolder(str(root / "train"), transforms.Compose(transform))
    return lambda: DataLoader(data, BATCH, shuffle=shuffle)


def ours(root: Path, shuffle: bool, **fields: Any) -> Callable[[], Any]:
    """One epoch of the training loop's loader over the plugin's data."""
    config = ImageDataConfig(root=str(root), val_fraction=0.0, **fields)
    data = source.load(config, PREPROCESSING).train
    plan = epoch_plan(len(data), BATCH, 1, seed=0, epoch=0)  # type: ignore[arg-type]
    if not shuffle:
        order = range(len(data))  # type: ignore[arg-type]
        plan = [[plan[0][0]._replace(indices=list(order[i : i + BATCH]))] for i in range(0, len(order), BATCH)]
    return lambda: (step[0] for step in batches(data, plan))  # type: ignore[arg-type]


def seconds(epoch: Callable[[], Any]) -> float:
    """Time to draw every batch of an epoch."""
    start = time.perf_counter()
    for _ in epoch():
        pass
    return time.perf_counter() - start


def compare(
    name: str, a: Callable[[], Any], b: Callable[[], Any], count: int, rounds: int, same: bool
) -> dict[str, Any]:
    """Median images per second of both, and the median of the rounds' ratios."""
    if same:
        x, y = next(iter(a()))[0], next(iter(b()))[0]
        assert torch.allclose(x, y, atol=1e-5), f"{name}: outputs differ by {(x - y).abs().max()}"
    seconds(a), seconds(b)
    pairs = [(seconds(a), seconds(b)) if i % 2 else (seconds(b), seconds(a))[::-1] for i in range(rounds)]
    ratios = sorted(t / o for o, t in pairs)
    return {
        "case": name,
        "ours_per_s": round(count / statistics.median(o for o, _ in pairs), 1),
        "torchvision_per_s": round(count / statistics.median(t for _, t in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(ratios[0], 3),
        "ratio_high": round(ratios[-1], 3),
    }


def main() -> None:
    """Write the images, run every case, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/*.jpg instead of generated images")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.data or Path(temporary)
        if args.data is None:
            write_images(root, args.images)
        count = sum(1 for _ in (root / "train").rglob("*.jpg"))
        short, crop = transforms.Resize(256, BICUBIC), transforms.CenterCrop(SIZE)
        random = transforms.RandomResizedCrop(SIZE, interpolation=BICUBIC)
        flip, squash = transforms.RandomHorizontalFlip(), transforms.Resize((SIZE, SIZE), BICUBIC)
        disk: dict[str, Any] = {"verify": "none"}  # and so without the cache
        cases: list[tuple[str, list[Any], dict[str, Any], bool]] = [
            ("resize 224x224 (VTAB)", [squash], {**disk, "preprocess": "spt"}, False),
            ("resize 256, centre crop (evaluation)", [short, crop], disk, False),
            ("random resized crop, flip (training)", [random, flip], {**disk, "augment": "resized-crop"}, True),
            ("resize 224x224, in memory", [squash], {"preprocess": "spt"}, False),
        ]
        rows = [
            compare(
                name,
                ours(root, shuffle, **fields),
                theirs(root, [*steps, *END], shuffle),
                count,
                args.rounds,
                same=not shuffle,
            )
            for name, steps, fields, shuffle in cases
        ]
    facts = {"images": count, "rounds": args.rounds, "machine": platform.processor() or platform.machine()}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": Image.__version__}
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"what": "images per second on one core", **facts, "versions": versions, "rows": rows}
    (args.out / "loading.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['case']:40s} ours {row['ours_per_s']:7.1f}/s  torchvision {row['torchvision_per_s']:7.1f}/s  "
            f"ratio {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        )


if __name__ == "__main__":
    main()
