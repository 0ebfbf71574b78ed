"""DAPT (Zhou et al., CVPR 2024): an adapter with a gate per token, whose output becomes the next block's prompt.

    per block, x: [B, N, D]
    x = x + DP(Attention(S1 LN1 x))
    y = S2 LN2 x
    a = relu(w LN(y) + b) * W_up dropout(GELU(W_down LN(y)))        one gate per token
    x = x + DP(MLP(y) + a)
    p = S3 mean over tokens of GELU(a)                              [B, 1, D]
    x = [class ; p ; earlier prompts ; patches]                     one token longer after every block

Every S is a scale and a shift per channel (TFTS), which also follow q, k, v, the attention's projection, fc1, fc2, the
tokenizer and the final norm. The classifier reads [class ; mean of prompts ; max over patches].

What backward needs is kept as in ``ssf``: behind norms, qkv and fc1 a scale and shift costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Weight
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.pointcloud.methods.features import give_feature, insert, need_cloud_classifier, place_of_prompts
from peft_suite.vision.methods.ssf import NormScaleShift, ScaleShift

_PROMPT = "dapt_prompt"  # in geometry.extra, inside one call of a block


@dataclass(frozen=True)
class DAPTConfig(MethodConfig):
    """DAPT.

    Attributes:
        rank: inner width r of the adapters (published: 64 on ScanObjectNN, 72 on ModelNet40).
        dropout: inside the adapters (PB_T50_RS 0.2, OBJ_BG 0.5, else 0).
        class_token, prompt_token, patch_token: what the classifier reads: the class token, the prompts and the patches,
            pooled, or None for leaving them out (OBJ_ONLY: no patches, ModelNet40: no prompts).
        positions: "once", before the first block, as in all published numbers; "every": before every block, as the
            frozen backbone was trained, prompts then having none.
    """

    method: ClassVar[str] = "dapt"
    rank: int = 64
    dropout: float = 0.0
    class_token: bool = True
    prompt_token: Literal["mean", "max"] | None = "mean"
    patch_token: Literal["max", "mean"] | None = "max"
    positions: Literal["once", "every"] = "once"

    def validate(self) -> None:
        self.require("rank", self.rank >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        some = self.class_token or self.prompt_token or self.patch_token
        self.require("class_token", bool(some), "the classifier needs the class token, prompts or patches")


class PatchScaleShift(ScaleShift):
    """Scale and shift of the patches alone, behind the prefix tokens."""

    def __init__(self, width: int, prefix: int) -> None:
        super().__init__(width, "last", "paper", foldable=False)
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, P + G, D]``."""
        return torch.cat((x[:, : self.prefix], super().forward(x[:, self.prefix :])), dim=1)


class Positions(Part):
    """Positions of a sequence with ``count`` prompts: none at all, or those of the other tokens."""

    def __init__(self, at: int, count: int, every: bool) -> None:
        super().__init__()
        self.at, self.count, self.every = at, count, every

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, N + count, D], pos: [B, N, D]``."""
        if self.every:
            return x, insert(pos, pos.new_zeros(pos.shape[0], self.count, pos.shape[2]), self.at)
        return x, pos.new_zeros(1, 1, 1)


class DynamicAdapter(Part):
    """Adds the gated bottleneck to the MLP's output, and leaves its mean for the prompt.

    ``W_up`` and all biases of the bottleneck and the gate start at zero.
    """

    needs_context = True

    def __init__(self, dim: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 1)
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)
        self.dropout = nn.Dropout(dropout) if dropout else None
        nn.init.zeros_(self.up.weight)
        for layer in (self.gate, self.down, self.up):
            nn.init.zeros_(layer.bias)

    def delta(self, y: Tensor) -> Tensor:
        """``a: [B, N, D]`` of what the MLP reads."""
        n = self.norm(y)
        h = F.gelu(self.down(n))
        if self.dropout is not None:
            h = self.dropout(h)
        out: Tensor = F.relu(self.gate(n)) * self.up(h)
        return out

    def forward(self, out: Tensor, y: Tensor, geometry: Any) -> tuple[Tensor, Tensor]:
        """``out, y: [B, N, D]``: what the MLP gives and what it has read."""
        a = self.delta(y)
        geometry.extra[_PROMPT] = F.gelu(a).mean(1, keepdim=True)
        return out + a, y


class NextPrompt(ScaleShift):
    """Scales and shifts the mean that the adapter has left, and puts it into the sequence, behind the class token."""

    needs_context = True

    def __init__(self, width: int, at: int) -> None:
        super().__init__(width, "last", "paper", foldable=False)
        self.at = at

    def forward(self, x: Tensor, geometry: Any) -> tuple[Tensor]:  # type: ignore[override]
        """``x: [B, N, D] -> [B, N + 1, D]``."""
        return (insert(x, super().forward(geometry.extra[_PROMPT]), self.at),)


class DAPT(Method[DAPTConfig]):
    """Scale and shift everywhere, an adapter beside every MLP, a prompt behind every block.

    On Point-MAE with 15 classes 1,087,771 parameters are trained. Where the classifier reads no prompts, nothing reads
    the last block's, and it is left out: 2D = 768 parameters less than published (1,069,716 on ModelNet40, rank 72).
    On PointGPT the prompts stand in front of all tokens, where causal attention lets them see them.
    """

    config_class = DAPTConfig
    examples = (
        "dapt(rank=3)",
        "dapt(rank=3, class_token=False, prompt_token=max, patch_token=mean, positions=every)",
        "dapt(rank=3, prompt_token=None)",
    )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, changes_sequence=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the parts.

        Raises:
            UnsupportedError: no point transformer with a classifier and a class token.
        """
        config, dim, at = self.config, anatomy.dim, place_of_prompts(anatomy)
        need_cloud_classifier(anatomy, edit, "dapt")
        if anatomy.queries and not config.class_token:
            raise UnsupportedError(
                f"dapt(class_token=False): nothing would read what is trained for {anatomy.family}'s queries. Keep it."
            )
        blocks = anatomy.need_blocks("dapt")
        assert anatomy.embed is not None and anatomy.norm is not None
        edit.after(anatomy.embed, PatchScaleShift(dim, anatomy.prefix_tokens), "dapt_scale")
        kept = {block.weights[role].path for block in blocks for role in ("q", "k", "v", "fc1")}  # for backward anyway
        used = len(blocks) - (config.prompt_token is None)  # prompts that something reads
        for i, block in enumerate(blocks):
            for point in block.affine:
                if point.path in anatomy.norms:
                    edit.reweigh(Weight(point.path), NormScaleShift(point.width, "last", "paper"), "dapt_scale")
                else:
                    part = ScaleShift(point.width, "last", "paper", recover=point.path in kept)
                    edit.after(point, part, "dapt_scale")
            if i:
                edit.inside(block.point, "tokens", Positions(at, i, config.positions == "every"), "dapt_positions")
            edit.inside(block.point, "mlp_out", DynamicAdapter(dim, config.rank, config.dropout), "dapt")
            if i < used:
                edit.inside(block.point, "end", NextPrompt(dim, at), "dapt_prompt")
        edit.reweigh(Weight(anatomy.norm.path), NormScaleShift(dim, "last", "paper"), "dapt_scale")
        prompts, patches = config.prompt_token, config.patch_token
        give_feature(anatomy, edit, "dapt", used, class_token=config.class_token, prompts=prompts, patches=patches)
