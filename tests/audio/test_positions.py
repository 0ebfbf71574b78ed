"""Position tables: what is cropped is the middle, what grows is stretched."""

from __future__ import annotations

import pytest
import torch

from peft_suite.audio.positions import adapt_positions, patch_grid
from peft_suite.errors import BackboneMismatchError


def numbered(rows: int, columns: int, prefix: int = 2) -> torch.Tensor:
    """Every patch holds its row and column; special tokens hold -1."""
    f, t = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    patches = torch.stack((f, t), -1).reshape(1, rows * columns, 2).float()
    return torch.cat((-torch.ones(1, prefix, 2), patches), 1)


@pytest.mark.parametrize(("frames", "columns"), [(1024, 101), (512, 50), (500, 49), (400, 39), (128, 12), (100, 9)])
def test_grids_of_the_study(frames: int, columns: int) -> None:
    assert patch_grid(128, frames) == (12, columns)


def test_strides_and_nothing() -> None:
    assert [patch_grid(128, 1024, stride=(s, s)) for s in (12, 14, 16)] == [(10, 85), (9, 73), (8, 64)]
    assert patch_grid(128, 15) == (12, 0)


@pytest.mark.parametrize(("columns", "first"), [(101, 0), (50, 25), (49, 26), (39, 31), (9, 46), (1, 50)])
def test_middle_columns(columns: int, first: int) -> None:
    made = adapt_positions(numbered(12, 101), (12, 101), (12, columns))[0]
    assert made.shape[0] == 2 + 12 * columns
    assert (made[:2] == -1).all()
    grid = made[2:].reshape(12, columns, 2)
    assert grid[0, :, 1].tolist() == list(range(first, first + columns))
    assert grid[:, 0, 0].tolist() == list(range(12))


def test_middle_rows() -> None:
    grid = adapt_positions(numbered(12, 5), (12, 5), (7, 5))[0, 2:].reshape(7, 5, 2)
    assert grid[:, 0, 0].tolist() == list(range(3, 10))  # from 12 // 2 - 7 // 2 on


def test_stretching_keeps_order_range_and_type() -> None:
    table = numbered(4, 6).double()
    made = adapt_positions(table, (4, 6), (8, 9))
    assert made.dtype == torch.float64
    grid = made[0, 2:].reshape(8, 9, 2)
    assert (grid[:, 1:, 1] - grid[:, :-1, 1] >= 0).all() and (grid[1:, :, 0] - grid[:-1, :, 0] >= 0).all()
    assert float(grid.min()) == 0 and float(grid[..., 1].max()) == 5 and float(grid[..., 0].max()) == 3


def test_one_special_token() -> None:
    made = adapt_positions(numbered(3, 4, prefix=1), (3, 4), (3, 2), prefix=1)
    assert made.shape == (1, 1 + 6, 2) and (made[0, 0] == -1).all()


def test_refusals() -> None:
    with pytest.raises(BackboneMismatchError, match="no 5 x 5 grid"):
        adapt_positions(numbered(3, 4), (5, 5), (3, 4))
    with pytest.raises(BackboneMismatchError, match="shorter than a patch"):
        adapt_positions(numbered(3, 4), (3, 4), (3, 0))
