"""Pre-train a small class-conditional pixel UNet on five classes of CIFAR-10, and a judge on all ten.

    python benchmarks/diffusion/pretrain_cifar.py --root cifar10 --out runs/cifar-diffusion

ROOT holds ``train/CLASS`` and ``test/CLASS``. Images are halved to 16x16 (means of 2x2 pixels), half of them mirrored
in training. The UNet (688,051 parameters) sees the first five classes by name only; it has rows for all ten and one for
no class, which 10 % of the training images are given. DDPM, 1000 steps, squaredcos_cap_v2, noise prediction; AdamW
without decay, running mean of the weights.

Writes ``OUT/images16.safetensors``, ``OUT/judge.safetensors``, ``OUT/pipeline`` (what diffusers
reads) and ``OUT/pretrain.json``. The run goes on from where it was when it is started again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_suite.diffusion.judge import accuracy, fit, load_judge, save_judge
from peft_suite.diffusion.pretrain_micro import Denoise
from peft_suite.storage import atomic, write_json
from peft_suite.train import pretraining

SIZE, KNOWN, NULL = 16, 5, 10
UNET: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "num_class_embeds": NULL + 1,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
}
BATCH, DROPPED, EMA = 64, 0.1, 0.999


def main() -> None:
    """Halve the images, train the judge and the UNet, measure, write."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder train/CLASS, test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar-diffusion"))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--judge-epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = halved(args.root, args.out / "images16.safetensors")
    judged = judge_of(data, args)
    torch.manual_seed(args.seed)
    unet: Any = UNet2DModel(**UNET)
    scheduler = DDPMScheduler(**SCHEDULER)
    known = data["train_labels"] < KNOWN
    batch = batches(data["train"][known], data["train_labels"][known], scheduler.alphas_cumprod, args.seed)
    partial, model = args.out / "pretrain.partial.pt", Denoise(unet)
    state = pretraining.read_partial(partial, args.seed)
    steps, begun = state["steps"] if state else args.steps, time.perf_counter()
    options: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.999), "ema": EMA}
    pretraining.pretrain(
        model, batch, partial, seed=args.seed, steps=steps, lr=args.lr, state=state, every=100, **options
    )
    unet.eval()
    held = data["test_labels"] < KNOWN
    loss = held_out_loss(model, data["test"][held], data["test_labels"][held], scheduler.alphas_cumprod)
    DDPMPipeline(unet, scheduler).save_pretrained(args.out / "pipeline")
    record = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "images": int(known.sum()),
        "classes": KNOWN,
        "steps": steps,
        "batch": BATCH,
        "lr": args.lr,
        "seconds_of_this_start": round(time.perf_counter() - begun),
        "test_loss": round(loss, 5),
        "judge": judged,
        "torch": torch.__version__,
        "seed": args.seed,
    }
    write_json(args.out / "pretrain.json", record)
    print(f"test loss {loss:.4f}, judge {judged['test_accuracy']:.3f}")


def halved(root: Path, cache: Path) -> dict[str, Tensor]:
    """``train`` and ``test``, uint8 ``[N, 16, 16, 3]``, with ``_labels``: classes by name."""
    if not cache.exists():
        found: dict[str, Tensor] = {}
        for split in ("train", "test"):
            classes = sorted(p.name for p in (root / split).iterdir() if p.is_dir())
            files = [(f, i) for i, name in enumerate(classes) for f in sorted((root / split / name).iterdir())]
            images = [np.asarray(Image.open(f).convert("RGB").reduce(2)) for f, _ in track(files, split)]
            found[split] = torch.from_numpy(np.stack(images))
            found[f"{split}_labels"] = torch.tensor([i for _, i in files])
        with atomic(cache) as file:
            save_file(found, file)
    return load_file(cache)


def judge_of(data: dict[str, Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Train or read the classifier of all ten classes; how good it is."""
    path = args.out / "judge.safetensors"
    if not path.exists():
        judge = fit(
            data["train"],
            data["train_labels"],
            classes=10,
            width=32,
            epochs=args.judge_epochs,
            mirror=True,
            seed=args.seed,
            each=lambda epoch, loss: print(f"judge, epoch {epoch + 1}: loss {loss:.4f}", flush=True),
        )
        save_judge(judge, path, {"data": "CIFAR-10 at 16x16, training images"})
    judge = load_judge(path)
    right = accuracy(judge, data["test"], data["test_labels"])
    print(f"judge: test accuracy {right:.4f}", flush=True)
    return {"test_accuracy": round(right, 4), "parameters": sum(p.numel() for p in judge.parameters())}


def batches(images: Tensor, labels: Tensor, signal: Tensor, seed: int) -> Any:
    """``step -> (noisy, timestep, class, noise)``, drawn from (seed, step) alone."""

    def batch(step: int) -> pretraining.Batch:
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        x = images[rows].permute(0, 3, 1, 2).float().div(127.5).sub(1)
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=draw) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
        nobody = torch.rand(BATCH, generator=draw) < DROPPED
        wanted = torch.where(nobody, NULL, labels[rows])
        return noised(x, wanted, signal, draw)

    return batch


def noised(x: Tensor, labels: Tensor, signal: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sqrt(a_t) x + sqrt(1 - a_t) noise`` at random t, and what it was made of."""
    when = torch.randint(len(signal), (len(x),), generator=draw)
    noise = torch.randn(x.shape, generator=draw)
    kept = signal[when].view(-1, 1, 1, 1)
    return kept.sqrt() * x + (1 - kept).sqrt() * noise, when, labels, noise


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor, labels: Tensor, signal: Tensor, seed: int = 0) -> float:
    """The loss on images that nothing was trained on, one fixed draw each."""
    draw, lost = torch.Generator().manual_seed(seed), 0.0
    for part, wanted in zip(images.split(500), labels.split(500), strict=True):
        x = part.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        lost += float(model(*noised(x, wanted, signal, draw))) * len(part)
    return lost / len(images)


if __name__ == "__main__":
    main()
