"""Make the weights of the embedded micro ViT: ``python -m peft_suite.vision.pretrain_micro``.

Supervised training on the first half of scikit-learn's digits, upright, grey and bright on dark, with small rotations,
shifts and scales. The other half, which the demo adapts to in a shifted form, is used only to print an accuracy.
Deterministic for one seed, one machine and one thread; about one minute.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from peft_suite.storage import write_bytes
from peft_suite.vision import digits, micro


def train(seed: int, epochs: int, batch: int = 64, lr: float = 2e-3) -> nn.Module:
    """A micro ViT trained from scratch on the source half."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = micro.build(10, pretrained=False)
    images, labels = digits.source_half()
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // batch * batch].split(batch):  # type: ignore[no-untyped-call]
            inputs = normalise(digits.render_source(images[chosen], generator))
            loss = F.cross_entropy(model(inputs), labels[chosen], label_smoothing=0.1)
            if not math.isfinite(loss.item()):
                raise SystemExit(f"The loss is {loss.item()} in epoch {epoch}; nothing was written.")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1:4d}/{epochs}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def normalise(images: Tensor) -> Tensor:
    """0..1 to the range that the backbone's preprocessing gives."""
    return (images - 0.5) / 0.5


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers on ``[N, 3, 32, 32]`` images in 0..1."""
    hits = model(normalise(images)).argmax(1) == labels
    return float(hits.double().mean())


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m peft_suite.vision.pretrain_micro", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets" / micro.ASSET)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one summation order on every machine with the same instruction set
    start = time.perf_counter()
    model = train(options.seed, options.epochs)
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in tensors.items()})

    images, labels = digits.source_half()
    shifted, target_labels = digits.target_half()
    seen = accuracy(model, digits.render_source(images, None), labels)
    unseen = accuracy(model, digits.render_source(digits.upright_target(), None), target_labels)
    moved = accuracy(model, torch.from_numpy(shifted).permute(0, 3, 1, 2).float() / 255, target_labels)
    metadata = {
        "format": "pt",
        "model": f"timm VisionTransformer {micro.ARCHITECTURE}",
        "made_by": f"python -m peft_suite.vision.pretrain_micro --seed {options.seed} --epochs {options.epochs}",
        "data": "first half of scikit-learn's digits (898 images), upright, grey, augmented",
        "data_licence": "UCI Optical Digits, CC BY 4.0, via scikit-learn (BSD-3-Clause)",
        "weights_licence": "Apache-2.0",
        "seed": str(options.seed),
        "accuracy_source_half": f"{seen:.4f}",
        "accuracy_other_half_upright": f"{unseen:.4f}",
        "accuracy_other_half_shifted": f"{moved:.4f}",
        "torch": torch.__version__,
    }
    write_bytes(options.out, save(tensors, metadata))
    print(f"source half {seen:.1%}, other half upright {unseen:.1%}, other half shifted {moved:.1%}")
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
