"""Pre-train a small ViT on five classes of CIFAR-10 and lay out the other five for adaptation.

    python benchmarks/vision/pretrain_cifar.py --cifar cifar10.tar --out runs/cifar10

Writes ``OUT/pretrain`` and ``OUT/adapt`` (folders ``train/CLASS``, ``test/CLASS``: classes 1 to 5 and 6 to 10 by name),
``OUT/vit.safetensors`` (2.7 M parameters: patch 8, width 192, 6 blocks, 3 heads; without the head)
and ``OUT/pretrain.json``. The network never sees an image of the other five classes.

Augmentation: crops of the image with 4 more pixels on each side, mirror images, label smoothing 0.1. AdamW; the rate
warms up for a tenth of the steps and falls to zero over the last quarter; bfloat16 autocast. An epoch takes about 45 s
on two cores. The run goes on from ``OUT/pretrain.pt`` when it is started again.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from peft_suite.storage import atomic, write_json

NAME = "vit_tiny_patch16_224"
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
BATCH = 128


def main() -> None:
    """Lay out, train or go on, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder train/CLASS, test/CLASS, or a tar of it")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lay_out(args.cifar, args.out)
    images, labels = load(args.out / "pretrain/train")
    model, history, seconds = train(args, images, labels)
    accuracy = measure(model, *load(args.out / "pretrain/test"), args.device)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    with atomic(args.out / "vit.safetensors") as file:
        save_file(state, file)
    record = {
        "backbone": NAME,
        "options": SIZE,
        "parameters": sum(v.numel() for v in state.values()),
        "images": len(images),
        "epochs": args.epochs,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "test_accuracy": round(accuracy, 4),
        "loss_per_epoch": history,
    }
    write_json(args.out / "pretrain.json", record)
    print(f"test accuracy on the pre-training classes {accuracy:.3f}, {seconds / 60:.0f} min")


def lay_out(source: Path, out: Path) -> None:
    """``out/pretrain`` and ``out/adapt`` with five classes each."""
    if (out / "adapt/test").is_dir():
        return
    everything = source
    if not source.is_dir():
        everything = out / "all"
        with tarfile.open(source) as archive:
            archive.extractall(everything, filter="data")
    for split in ("train", "test"):
        classes = sorted(p.name for p in (everything / split).iterdir() if p.is_dir())
        for half, names in (("pretrain", classes[:5]), ("adapt", classes[5:])):
            (out / half / split).mkdir(parents=True, exist_ok=True)
            for name in names:
                link = out / half / split / name
                if not link.exists():
                    link.symlink_to((everything / split / name).resolve(), target_is_directory=True)


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, uint8 ``[N, 3, 32, 32]``, and their classes."""
    images, labels = [], []
    for label, name in enumerate(sorted(p.name for p in folder.iterdir())):
        for file in sorted((folder / name).iterdir()):
            images.append(np.asarray(Image.open(file).convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def train(args: argparse.Namespace, images: Tensor, labels: Tensor) -> tuple[Any, list[float], float]:
    """The network, the mean loss of each epoch, and the seconds of all starts together."""
    torch.manual_seed(args.seed)
    model: Any = timm.create_model(NAME, num_classes=int(labels.max()) + 1, **SIZE)
    model.to(args.device).train()
    per_epoch = len(images) // BATCH
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    total = args.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * total), (total - step) / (0.25 * total))
    )
    checkpoint, history, spent = args.out / "pretrain.pt", [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        history, spent = saved["history"], saved["spent"]
    for epoch in range(len(history), args.epochs):
        start = time.perf_counter()
        draw = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order, losses = torch.randperm(len(images), generator=draw), []
        for step in track(range(per_epoch), f"epoch {epoch + 1}/{args.epochs}", transient=True):
            rows = order[step * BATCH : (step + 1) * BATCH]
            batch, wanted = augmented(images[rows], draw).to(args.device), labels[rows].to(args.device)
            with torch.autocast(args.device.partition(":")[0], dtype=torch.bfloat16):
                output = model(batch)
            loss = F.cross_entropy(output.float(), wanted, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        history.append(round(float(torch.stack(losses).mean()), 4))
        spent += time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {history[-1]:.4f}, {spent:.0f} s", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        with atomic(checkpoint) as file:
            torch.save({**state, "history": history, "spent": spent}, file)
    return model, history, spent


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Random crops of the padded images, half of them mirrored, normalised with mean and deviation 0.5."""
    count, _, height, width = images.shape
    padded = F.pad(prepared(images), (4, 4, 4, 4), mode="reflect")
    top, left = (torch.randint(0, 9, (count, 1), generator=draw) for _ in range(2))
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=draw) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    lines = top + torch.arange(height)
    each = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def prepared(images: Tensor) -> Tensor:
    """Mean and deviation 0.5, as the backbone's configuration says."""
    return images.float().div(127.5).sub(1)


@torch.no_grad()
def measure(model: Any, images: Tensor, labels: Tensor, device: str) -> float:
    """Accuracy."""
    model.eval()
    hits = 0
    for part, wanted in zip(images.split(500), labels.split(500), strict=True):
        hits += int((model(prepared(part).to(device)).argmax(1).cpu() == wanted).sum())
    return hits / len(images)


if __name__ == "__main__":
    main()
