"""VPT (Jia et al., ECCV 2022): learned prompt tokens in a frozen transformer.

Shallow: P prompts enter once, at the embedding output, and flow through all blocks. Deep: every block gets its own P
prompts; what the previous block made of its prompts is dropped. Prompts carry no position embedding.

    z = [class ; drop(proj(P)) ; patches]

Blocks see tokens as a set, so where the prompts stand changes nothing but rounding; at the end of the sequence they
come off without a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class VPTConfig(MethodConfig):
    """VPT.

    Attributes:
        num_tokens: P, per block when deep.
        deep: own prompts for every block instead of once at the input.
        first_block, num_blocks: deep prompts only for this range of blocks (None: to the last).
        project: prompts of this width, mapped by one shared Linear to the model's; None uses the model's width.
        dropout: on the prompts (the paper's deep runs use 0.1).
        position: "end", "after_prefix" (behind class and register tokens, the paper's order) or "start".
        init: "uniform": U(-v, v) with v = sqrt(6 / (patch inputs + prompt width)), the paper's; "normal": N(0, 0.02);
            "zero".
    """

    method: ClassVar[str] = "vpt"
    num_tokens: int = 10
    deep: bool = False
    first_block: int = 0
    num_blocks: int | None = None
    project: int | None = None
    dropout: float = 0.0
    position: Literal["end", "after_prefix", "start"] = "end"
    init: Literal["uniform", "normal", "zero"] = "uniform"

    def validate(self) -> None:
        self.require("num_tokens", self.num_tokens >= 1, "must be at least 1")
        self.require("project", self.project is None or self.project >= 1, "must be at least 1 or None")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("first_block", self.first_block >= 0, "must not be negative")
        self.require("num_blocks", self.num_blocks is None or self.num_blocks >= 1, "must be at least 1 or None")


class Prompt(Part):
    """Inserts P tokens at place ``at`` of the sequence (None: the end): ``[B, N, d] -> [B, N + P, d]``."""

    decay = False

    def __init__(self, dim: int, bound: float, config: VPTConfig, at: int | None, shared: Prompt | None) -> None:
        super().__init__()
        self.at = at
        self.proj: nn.Linear | None = None
        if config.project is not None and shared is None:
            self.proj = nn.Linear(config.project, dim)
            nn.init.kaiming_normal_(self.proj.weight, a=0, mode="fan_out")
        self.shared = (self if shared is None else shared,)  # a tuple: the owner of proj, outside the module tree
        self.prompt = nn.Parameter(torch.zeros(config.num_tokens, config.project or dim))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        if config.init == "uniform":
            nn.init.uniform_(self.prompt, -bound, bound)
        elif config.init == "normal":
            nn.init.normal_(self.prompt, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, d]``."""
        proj = self.shared[0].proj
        prompt = self.prompt if proj is None else proj(self.prompt)
        prompt = prompt.expand(x.shape[0], -1, -1)
        if self.dropout is not None:
            prompt = self.dropout(prompt)
        if self.at is None:
            return torch.cat((x, prompt), dim=1)
        return torch.cat((x[:, : self.at], prompt, x[:, self.at :]), dim=1)

    def extra_repr(self) -> str:
        return f"tokens={self.prompt.shape[0]}, at={'end' if self.at is None else self.at}"


class Strip(Part):
    """Takes the P tokens off again: ``[B, N + P, d] -> [B, N, d]``."""

    def __init__(self, count: int, at: int | None) -> None:
        super().__init__()
        self.count, self.at = count, at

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N + P, d]``."""
        if self.at is None:
            return x[:, : -self.count]
        return torch.cat((x[:, : self.at], x[:, self.at + self.count :]), dim=1) if self.at else x[:, self.count :]


class VPT(Method[VPTConfig]):
    """Insert prompts at the embedding output (shallow) or around every block (deep), and take them off again.

    ``P*d`` parameters shallow, ``L*P*d`` deep. The backbone's dropout and drop path stay off, as in the paper's code.
    Deep prompts leave intermediate features as they are for others; shallow ones are part of them.
    """

    config_class = VPTConfig
    examples = ("vpt(num_tokens=3)", "vpt(num_tokens=3, deep=True)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, changes_sequence=True, backbone_eval=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the prompts.

        Raises:
            UnsupportedError: the backbone cannot carry extra tokens, or has fewer blocks than asked for.
        """
        config = self.config
        blocks = anatomy.need_blocks("vpt")
        if anatomy.no_prompts or anatomy.embed is None or anatomy.norm is None:
            raise UnsupportedError(
                f"vpt cannot add tokens to {anatomy.family}: {anatomy.no_prompts or 'it names no token sequence'}."
            )
        width = config.project or anatomy.dim
        bound = math.sqrt(6.0 / (anatomy.patch_values + width))
        at = {"end": None, "after_prefix": anatomy.prefix_tokens, "start": 0}[config.position]
        if not config.deep:
            edit.after(anatomy.embed, Prompt(anatomy.dim, bound, config, at, None), "vpt")
            edit.before(anatomy.norm, Strip(config.num_tokens, at), "vpt_strip")
            return
        stop = len(blocks) if config.num_blocks is None else config.first_block + config.num_blocks
        if stop > len(blocks) or config.first_block >= stop:
            raise UnsupportedError(
                f"vpt: blocks {config.first_block} to {stop - 1} were asked for; {anatomy.family} has {len(blocks)}."
            )
        first: Prompt | None = None
        for i, block in enumerate(blocks[config.first_block : stop]):
            entry = anatomy.embed if i == 0 and config.first_block == 0 else None
            part = Prompt(anatomy.dim, bound, config, at, first)
            first = first or part
            if entry is not None:
                edit.after(entry, part, "vpt")
            else:
                edit.before(block.point, part, "vpt")
            edit.after(block.point, Strip(config.num_tokens, at), "vpt_strip")
