"""A small classifier of images that stands beside a generator: class accuracy, and features for distances.

Three convolutions with batch norm; the features are the means of the last one over the image. Trained in seconds on
digits and in minutes on CIFAR-10, so nothing is fetched. Distances in its features compare runs of one protocol with
one another; they are not the FID of papers, whose features come from Inception.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_suite.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Judge", "accuracy", "fit", "load_judge", "save_judge"]


class Judge(nn.Module):
    """uint8 images ``[N, H, W, C]`` -> logits ``[N, classes]``; sides of at least 8 pixels.

    Args:
        channels: of the images.
        classes: how many.
        width: channels of the first convolution; the features have four times as many.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "classes": classes, "width": width}
        wide = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(wide):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if after < wide[-1] else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(wide[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """``[N, H, W, C]`` -> ``[N, 4 width]``."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != self.sizes["channels"]:
            raise DataError(
                f"The judge takes uint8 images [N, H, W, {self.sizes['channels']}], got {images.dtype} "
                f"{list(images.shape)}."
            )
        x = images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
        features: Tensor = self.body(x).mean((2, 3))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.features(images))
        return logits


def fit(
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    width: int = 16,
    epochs: int = 12,
    batch: int = 100,
    lr: float = 3e-3,
    mirror: bool = False,
    seed: int = 0,
    each: Callable[[int, float], None] | None = None,
) -> Judge:
    """Train a judge on real images.

    Args:
        images: uint8 ``[N, H, W, C]``.
        labels: ``[N]``.
        mirror: half of the images are mirrored, and all are moved by up to a pixel in eight.
        each: called with every epoch and its mean loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(images.shape[-1], classes, width)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.01)
    total = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    judge.train()
    for epoch in range(epochs):
        lost = 0.0
        for rows in torch.randperm(len(images), generator=draw).split(batch):  # type: ignore[no-untyped-call]
            given = _moved(images[rows], draw) if mirror else images[rows]
            loss = functional.cross_entropy(judge(given), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            lost += float(loss.detach()) * len(rows)
        if each is not None:
            each(epoch, lost / len(images))
    return judge.eval().requires_grad_(False)


def _moved(images: Tensor, draw: torch.Generator) -> Tensor:
    """``[N, H, W, C]``: crops of the reflected images, half of them mirrored."""
    count, height, width, _ = images.shape
    by = height // 8
    padded = functional.pad(images.permute(0, 3, 1, 2).float(), (by,) * 4, mode="reflect")
    top, left = (torch.randint(0, 2 * by + 1, (count, 1), generator=draw) for _ in range(2))
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1, generator=draw) < 0.5, columns.flip(1), columns)
    lines = top + torch.arange(height)
    each = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, lines[:, :, None], columns[:, None, :]].to(torch.uint8)


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """Share of images that the judge takes for what was asked for."""
    found = torch.cat([judge(part).argmax(1) for part in images.split(500)])  # type: ignore[no-untyped-call]
    return float((found == labels).double().mean())


def save_judge(judge: Judge, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and sizes as one safetensors file."""
    from safetensors.torch import save

    from peft_suite.storage import write_bytes

    sizes = {key: str(value) for key, value in judge.sizes.items()}
    tensors = {key: value.contiguous() for key, value in judge.state_dict().items()}
    write_bytes(path, save(tensors, {"format": "pt", **sizes, **(metadata or {})}))


def load_judge(path: Path) -> Judge:
    """Read what :func:`save_judge` wrote.

    Raises:
        DataError: the file is missing or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            judge = Judge(*(int(metadata[key]) for key in ("channels", "classes", "width")))
            judge.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{str(path)!r} holds no judge: {error}. Write one with save_judge.") from None
    return judge.eval().requires_grad_(False)
