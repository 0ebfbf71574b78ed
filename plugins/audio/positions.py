"""Position embeddings for clips of another length and other mel bins (Gong et al., AST, Interspeech 2021).

A table ``[1, P + F*T, D]`` has P rows of special tokens, then one per patch, time running fastest. Along each axis in
turn, time first: where fewer patches are needed, the middle of the table is taken, from ``old // 2 - new // 2`` on;
where more, it is stretched bilinearly. The studies of parameter-efficient methods dropped the table unawares and ran on
zeros that stayed frozen (Cappellazzo et al., MLSP 2024); ``pos_embed="zeros"`` repeats that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_suite.errors import BackboneMismatchError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adapt_positions", "patch_grid"]


def patch_grid(
    mel_bins: int, frames: int, patch: tuple[int, int] = (16, 16), stride: tuple[int, int] = (10, 10)
) -> tuple[int, int]:
    """(F, T): patches along frequency and time, ``(size - patch) // stride + 1`` each; 0 where none fits."""
    rows, columns = (max((size - p) // s + 1, 0) for size, p, s in zip((mel_bins, frames), patch, stride, strict=True))
    return rows, columns


def adapt_positions(table: Tensor, source: tuple[int, int], target: tuple[int, int], prefix: int = 2) -> Tensor:
    """``[1, P + F0*T0, D] -> [1, P + F*T, D]`` for grids ``source`` = (F0, T0) and ``target`` = (F, T).

    Raises:
        BackboneMismatchError: the table has no such grid, or the target no patch.
    """
    import torch
    from torch.nn import functional as F

    (rows, columns), (new_rows, new_columns) = source, target
    if table.shape[1] != prefix + rows * columns:
        raise BackboneMismatchError(
            f"A position table of {table.shape[1]} rows has no {rows} x {columns} grid of patches behind {prefix} "
            "special tokens."
        )
    if min(target) < 1:
        raise BackboneMismatchError(
            f"A clip with a {new_rows} x {new_columns} grid of patches is shorter than a patch."
        )
    grid = table[:, prefix:].reshape(rows, columns, -1).permute(2, 0, 1).unsqueeze(0)  # [1, D, F0, T0]
    if new_columns <= columns:
        start = columns // 2 - new_columns // 2
        grid = grid[..., start : start + new_columns]
    else:
        grid = F.interpolate(grid.float(), (rows, new_columns), mode="bilinear", align_corners=False)
    if new_rows <= rows:
        start = rows // 2 - new_rows // 2
        grid = grid[:, :, start : start + new_rows]
    else:
        grid = F.interpolate(grid.float(), (new_rows, new_columns), mode="bilinear", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(table.dtype)  # [1, F*T, D]
    return torch.cat((table[:, :prefix], patches), dim=1)
