"""A tiny convolutional net with batch norm and without blocks, described for this process only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_suite import Anatomy, AnatomyEntry, Plugin, Point


class ConvNet(nn.Module):
    """Two convolutions (one grouped) with batch norm, a gain that is read directly, a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, 3, H, W]`` -> ``[B, classes]``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)) * self.gain)


def describe(model: ConvNet) -> Anatomy:
    """Stem, norms and head; no blocks."""
    stem = tuple(Point(n, 8, "first") for n in ("conv1", "bn1", "conv2", "bn2"))
    return Anatomy(
        "bn-testbed", 8, (), stem=stem, norms=("bn1", "bn2"), fresh=("head.weight", "head.bias"), patch_values=27
    )


def example() -> tuple[nn.Module, Tensor]:
    """A random net and a batch."""
    return ConvNet(), torch.randn(4, 3, 8, 8)


plugin = Plugin(
    name="bn-testbed",
    anatomies=(AnatomyEntry("bn-testbed", ("bn_testbed.ConvNet",), "bn_testbed:describe", ("bn_testbed:example",)),),
)
