"""IDPT below a part-segmentation head: a generated prompt at every block whose output the head reads.

    before_t = g_t(y_t)                                     y_t: patches that enter block t    [B, 1, D]
    [after_t ; x_t] = block_t([before_t ; y_t])             the prompt's position is shared    [B, 1 + G, D]
    cloud = [before_a ; before_b ; before_c ; after_a ; after_b ; after_c]                     [B, 6D]

``cloud`` replaces maximum and mean of the patches in the head; the patches go on without the prompt. Both kinds of
prompts pass the final norm, as what they replace does. ``before_t`` travels behind block t as one more token, so that
nothing is kept outside of the stream.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.edits import Part
from peft_suite.method import Editor
from peft_suite.pointcloud.models.geometry import Geometry

__all__ = ["place_prompts"]

_KEY = "idpt"  # in the block's own extra: the prompt that entered
_CARRIED = 2  # tokens in front of the patches behind a prompted block


class EnteringPrompt(Part):
    """Generates the prompt and puts it, with its position, in front of the patches. ``owner`` has the position."""

    needs_context = True

    def __init__(self, generator: nn.Module, dim: int, trained: bool, owner: EnteringPrompt | None) -> None:
        super().__init__()
        self.generator = generator
        self.owner = (owner,)  # a tuple: outside the module tree
        if owner is None:
            position = nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02)
            if trained:
                self.position: Tensor = nn.Parameter(position)
            else:
                self.register_buffer("position", position)

    def forward(self, x: Tensor, pos: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """``x, pos: [B, G, D] -> [B, 1 + G, D]``."""
        position = (self.owner[0] or self).position
        half = torch.is_autocast_enabled(x.device.type)
        exact: Any = torch.autocast(x.device.type, enabled=False) if half else nullcontext()
        with exact:  # variances in full precision
            prompt = self.generator(x.to(position.dtype), pos.to(position.dtype))
        geometry.extra[_KEY] = prompt
        both = torch.cat((prompt.to(x.dtype), x), dim=1)
        return both, torch.cat((position.expand(pos.shape[0], -1, -1).to(pos.dtype), pos), dim=1)


class LeavingPrompt(Part):
    """The prompt as it entered in front of the prompt as it leaves: ``[B, 1 + G, D] -> [B, 2 + G, D]``."""

    needs_context = True

    def forward(self, x: Tensor, geometry: Geometry) -> tuple[Tensor]:
        """``x: [B, 1 + G, D]``."""
        return (torch.cat((geometry.extra[_KEY].to(x.dtype), x), dim=1),)


class PatchesAlone(Part):
    """At the next block: the patches without what was put in front of them, ``x: [B, 2 + G, D] -> [B, G, D]``."""

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, 2 + G, D], pos: [B, G, D]``."""
        return x[:, _CARRIED:], pos


class PromptSummary(Part):
    """The prompts in the place of maximum and mean: ``x: [B, 2 + G, 3D] -> [B, G, 3D]``, ``cloud: [B, 6D]``."""

    def forward(self, x: Tensor, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """Rows 0 and 1 of ``x`` are the prompts before and after the three blocks."""
        return x[:, _CARRIED:], x[:, :_CARRIED].flatten(1)


def place_prompts(
    anatomy: Anatomy, edit: Editor, label: str, generators: list[nn.Module], taps: list[int], train_position: bool
) -> None:
    """One generator for each block of ``taps``, which rise; the head reads the prompts."""
    blocks = anatomy.blocks
    first: EnteringPrompt | None = None
    for tap, generator in zip(taps, generators, strict=True):
        if tap - 1 in taps:
            edit.inside(blocks[tap].point, "tokens", PatchesAlone(), f"{label}_off")
        part = EnteringPrompt(generator, anatomy.dim, train_position, first)
        first = first or part
        edit.inside(blocks[tap].point, "tokens", part, label)
        edit.inside(blocks[tap].point, "end", LeavingPrompt(), f"{label}_end")
        if tap + 1 < len(blocks) and tap + 1 not in taps:
            edit.inside(blocks[tap + 1].point, "tokens", PatchesAlone(), f"{label}_off")
    (path,) = edit.having("summary")
    edit.inside(Point(path, 6 * anatomy.dim), "summary", PromptSummary(), label)
