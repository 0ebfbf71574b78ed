"""Prompts in the place of the distillation token (Cappellazzo et al., MLSP 2024, after VPT, ECCV 2022).

    z = [class ; P ; patches]                        P: [n, d], n - 1 tokens more than before

Shallow prompts (SPT) enter once and flow through all blocks. Deep ones (DPT) are replaced before every block by others.
They stay up to the end, where the head's input is a mean over a choice of tokens. ``vpt`` is the general form: there
the backbone keeps its tokens, and prompts come off before its own pooling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peft_suite.anatomy import Anatomy, Point
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.vision.methods.prompts import Prompt, Replace

HeadInput = Literal["all", "class_token", "prompts", "patches", "prompts_and_patches"]


@dataclass(frozen=True)
class AudioPromptsConfig(MethodConfig):
    """How many prompts, and what the head reads.

    Attributes:
        num_tokens: n, per block when deep; the study compares 25 deep with 300 shallow ones.
        deep: own prompts for every block (DPT) instead of once at the input (SPT).
        head_input: whose mean the head reads, in the place of the backbone's pooling: "all" tokens, the "class_token",
            "prompts", "patches" or "prompts_and_patches", all but the class token.
        dropout: on the prompts.
    """

    method: ClassVar[str] = "audio-prompts"
    num_tokens: int = 25
    deep: bool = True
    head_input: HeadInput = "all"
    dropout: float = 0.0

    def validate(self) -> None:
        self.require("num_tokens", self.num_tokens >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")


class TakePlace(Prompt):
    """Prompts behind the class token, in the place of the other ``prefix - 1`` special tokens."""

    def __init__(self, prefix: int, **options: Any) -> None:
        super().__init__(**options, at=1)
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, prefix + N, d] -> [B, 1 + P + N, d]``."""
        return torch.cat((x[:, :1], self.tokens(x.shape[0]), x[:, self.prefix :]), dim=1)


class HeadFeature(Part):
    """What the head reads: the mean of a choice of tokens."""

    def __init__(self, count: int, head_input: HeadInput) -> None:
        super().__init__()
        start, stop = {
            "all": (0, None),
            "class_token": (0, 1),
            "prompts": (1, 1 + count),
            "patches": (1 + count, None),
            "prompts_and_patches": (1, None),
        }[head_input]
        self.chosen = slice(start, stop)

    def forward(self, feature: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``feature: [B, d]`` of the backbone, ``tokens: [B, 1 + P + N, d]`` behind the final norm."""
        return tokens[:, self.chosen].mean(1), tokens


class AudioPrompts(Method[AudioPromptsConfig]):
    """``nd`` parameters shallow, ``Lnd`` deep: 230,400 on AST-base for 300 shallow or 25 deep prompts.

    They start uniform in +-sqrt(6 / (3 p^2 + d)) for patches of p x p, 0.0625 on AST-base: the published code keeps the
    three channels of images. Not mergeable. The output does not depend on the distillation token.
    """

    config_class = AudioPromptsConfig
    examples = ("audio-prompts(num_tokens=3)", "audio-prompts(num_tokens=2, deep=False, head_input=prompts)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, changes_sequence=True, backbone_eval=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Put prompts before the first or every block, and choose what the head reads.

        Raises:
            UnsupportedError: the backbone has no distillation token, or its pooling cannot be replaced.
        """
        config, pools = self.config, edit.having("pool")
        blocks = anatomy.need_blocks("audio-prompts")
        fixed = bool(edit.having("geometry"))  # positions of as many tokens enter every block
        if anatomy.embed is None or anatomy.prefix_tokens < 2 or len(pools) != 1 or anatomy.no_prompts or fixed:
            raise UnsupportedError(
                f"audio-prompts puts prompts in the place of a distillation token and chooses what the head reads, "
                f"which {anatomy.family} does not allow. Use vpt."
            )
        bound = math.sqrt(6.0 / (3 * anatomy.patch_values + anatomy.dim))
        options: dict[str, Any] = {"count": config.num_tokens, "dim": anatomy.dim, "bound": bound}
        options["dropout"] = config.dropout
        edit.after(anatomy.embed, TakePlace(anatomy.prefix_tokens, **options), "prompts")
        for block in blocks[1:] if config.deep else ():
            edit.before(block.point, Replace(**options, at=1), "prompts")
        edit.inside(Point(pools[0], anatomy.dim), "pool", HeadFeature(config.num_tokens, config.head_input), "prompts")
