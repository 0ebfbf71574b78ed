"""The patch grid behind a token sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from peft_suite.errors import UnsupportedError


@dataclass(frozen=True)
class Grid:
    """Where patches stand in ``[B, prefix + H*W, C]``.

    ``size`` is the grid that the backbone was built for; another number of patches is read as a grid of the same aspect
    ratio, which square images keep at any size.
    """

    size: tuple[int, int]
    prefix: int

    def of(self, count: int) -> tuple[int, int]:
        """(rows, columns) of ``count`` patches.

        Raises:
            UnsupportedError: no grid of the backbone's aspect ratio has so many.
        """
        rows, columns = self.size
        if count == rows * columns:
            return self.size
        factor = math.gcd(rows, columns)
        rows, columns = rows // factor, columns // factor
        scale = math.isqrt(count // (rows * columns))
        if scale * scale * rows * columns != count:
            raise UnsupportedError(
                f"{count} patch tokens form no grid of the aspect ratio {rows}:{columns} of this backbone. Resize the "
                "images, or build the backbone for their size; methods that add tokens cannot act at the same time."
            )
        return scale * rows, scale * columns

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens ``[B, prefix, C]`` and the map of patches ``[B, C, H, W]``."""
        rows, columns = self.of(x.shape[1] - self.prefix)
        patches = x[:, self.prefix :].transpose(1, 2).reshape(x.shape[0], -1, rows, columns)
        return x[:, : self.prefix], patches
