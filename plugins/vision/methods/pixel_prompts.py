"""Parts of VPT that act on pixels: a learned border around the image, learned channels below it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Part

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pixels(Part):
    """Learned pixels, in [0, 1] at the start, normalised like an image (ImageNet's statistics, as in VPT's code)."""

    decay = False

    def __init__(self, **shapes: tuple[int, int, int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape)))

    def normalised(self, name: str, size: Sequence[int]) -> Tensor:
        """``[1, C, H, W]`` of ``size``, scaled where learned at another; C other than 3 takes mean statistics."""
        pixels = self._parameters[name]
        assert pixels is not None
        three = len(pixels) == 3
        mean = MEAN if three else (sum(MEAN) / 3,) * len(pixels)
        std = STD if three else (sum(STD) / 3,) * len(pixels)
        found = ((pixels - _column(mean, pixels)) / _column(std, pixels))[None]
        same = tuple(found.shape[2:]) == tuple(size)
        return found if same else F.interpolate(found, tuple(size), mode="bilinear", align_corners=False)


class Border(Pixels):
    """P pixels on every side, ``[B, 3, H, W] -> [B, 3, H + 2P, W + 2P]``.

    ``inside``, for backbones with a fixed input: the image is first scaled down by 2P, so that its size stays.
    """

    def __init__(self, width: int, size: tuple[int, int], inside: bool) -> None:
        h, w = (n - 2 * width if inside else n for n in size)
        super().__init__(rows=(3, 2 * width, w + 2 * width), columns=(3, h, 2 * width))
        self.width, self.size, self.inside = width, (h, w), inside

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, 3, H, W]``."""
        p = self.width
        if self.inside:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        h, w = x.shape[2:]
        rows = self.normalised("rows", (2 * p, w + 2 * p)).expand(x.shape[0], -1, -1, -1)
        columns = self.normalised("columns", (h, 2 * p)).expand(x.shape[0], -1, -1, -1)
        x = torch.cat((columns[..., :p], x, columns[..., p:]), dim=3)
        return torch.cat((rows[:, :, :p], x, rows[:, :, p:]), dim=2)


class Below(Pixels):
    """P more input channels of the first convolution: ``y + conv(prompt, W)`` with W of their own, learned."""

    def __init__(self, count: int, size: tuple[int, int], conv: nn.Conv2d) -> None:
        super().__init__(channels=(count, *size))
        self.weight = nn.Parameter(torch.empty(conv.out_channels, count, *conv.kernel_size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [B, d, h, w]``, what the convolution makes of the image ``x: [B, 3, H, W]``."""
        prompt = self.normalised("channels", x.shape[2:])
        return y + F.conv2d(prompt, self.weight, None, self.stride, self.padding, self.dilation)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
