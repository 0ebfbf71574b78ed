"""Bottleneck adapters: one method for the whole family of He et al. (ICLR 2022, "a unified view").

    Delta(x) = s * (f(LN(x) D^T + b_D) U^T + b_U)          D: [r, d]   U: [d, r]

placed after or beside the attention, the MLP, or both. Houlsby (ICML 2019), Pfeiffer (EACL 2021), parallel/scaled
adapters and AdaptFormer (NeurIPS 2022) are presets of it, available under their own names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.method import Capabilities, Editor, Method

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """Where a bottleneck sits and what it computes.

    Attributes:
        bottleneck: inner width r; ``L*(2dr + r + d)`` parameters per placement with biases.
        position: which sub-layer: "mlp", "attn" or "both".
        insertion: "sequential" reads the sub-layer's output, ``h + Delta(h)``; "parallel" its input, ``h + Delta(x)``.
        source: for parallel, which input: "sublayer" is what the sub-layer reads (after its norm), inside drop path;
            "residual" is the un-normalised stream, outside drop path (AdaptFormer).
        outside: for sequential, put the adapter after drop path instead of inside the residual branch (NOAH).
        activation: nonlinearity between the projections.
        scale: fixed factor s, or the start of a trained one (``learned_scale``).
        layernorm: LayerNorm (eps 1e-5) on the input ("in") or on the scaled output ("out").
        init: "lora": D Kaiming-uniform(a=sqrt 5), U and biases 0, an identity at the start; "bert": N(0, 0.02),
            biases 0; "official": truncated normal 0.02, biases 0, what SPT, NOAH and V-PETL effectively ran.
        bias: biases in both projections (PETL-ViT's AdaptFormer has none).
        dropout: between activation and up-projection.
    """

    method: ClassVar[str] = "adapter"
    bottleneck: int = 8
    position: Literal["mlp", "attn", "both"] = "mlp"
    insertion: Literal["sequential", "parallel"] = "sequential"
    source: Literal["sublayer", "residual"] = "sublayer"
    outside: bool = False
    activation: Literal["relu", "gelu", "silu", "tanh", "quick_gelu"] = "relu"
    scale: float = 1.0
    learned_scale: bool = False
    layernorm: Literal["none", "in", "out"] = "none"
    init: Literal["lora", "bert", "official"] = "lora"
    bias: bool = True
    dropout: float = 0.0

    def validate(self) -> None:
        self.require("bottleneck", self.bottleneck >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require(
            "outside", not (self.outside and self.insertion == "parallel"), "is an option of sequential adapters"
        )


class BottleneckPart(Part):
    """``Delta``: ``[..., d] -> [..., d]``, for layout "first" ``[B, d, ...]``; with ``residual`` the input is added."""

    def __init__(self, dim: int, config: BottleneckConfig, residual: bool, layout: str = "last") -> None:
        super().__init__()
        r = config.bottleneck
        self.residual, self.first = residual, layout == "first"
        self.activation = _ACTIVATIONS[config.activation]
        self.down = nn.Linear(dim, r, bias=config.bias)
        self.up = nn.Linear(r, dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.norm_in = nn.LayerNorm(dim) if config.layernorm == "in" else None
        self.norm_out = nn.LayerNorm(dim) if config.layernorm == "out" else None
        self.scale = config.scale
        if config.learned_scale:
            self.learned = nn.Parameter(torch.full((1,), config.scale))
        else:
            self.register_parameter("learned", None)
        self.reset(config.init)

    def reset(self, init: str) -> None:
        """Initialise as ``BottleneckConfig.init`` says."""
        for linear in (self.down, self.up):
            if init == "bert":
                nn.init.normal_(linear.weight, std=0.02)
            elif init == "official":
                nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., d]``, or ``[B, d, ...]``."""
        h: Tensor = x.movedim(1, -1) if self.first else x
        h = h if self.norm_in is None else self.norm_in(h)
        # contiguous: torch multiplies transposed inputs in another order, depending on what trains
        h = self.activation(self.down(h.contiguous()))
        if self.dropout is not None:
            h = self.dropout(h)
        h = self.up(h)
        if self.learned is not None:
            h = h * self.learned
        elif self.scale != 1.0:
            h = h * self.scale
        if self.norm_out is not None:
            h = self.norm_out(h)
        h = h.movedim(-1, 1) if self.first else h
        return x + h if self.residual else h


class ParallelPart(BottleneckPart):
    """The parallel form at a module whose input is the source: ``y + Delta(x)``."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``y, x: [..., d]`` or ``[B, d, ...]``: output and input of the sub-layer."""
        return y + super().forward(x)


class Bottleneck(Method[BottleneckConfig]):
    """Build one bottleneck per block and position."""

    config_class = BottleneckConfig
    examples = (
        "adapter(bottleneck=3)",
        "houlsby(bottleneck=3)",
        "pfeiffer(bottleneck=3)",
        "parallel-adapter(bottleneck=3)",
        "adaptformer(bottleneck=3)",
    )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=self.config.init == "lora")

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the bottlenecks.

        Raises:
            UnsupportedError: a block has no such sub-layer, or hides its residual stream.
        """
        config = self.config
        for block in anatomy.need_blocks("adapter"):
            for branch in ("attn", "mlp") if config.position == "both" else (config.position,):
                label = f"adapter_{branch}"
                if config.insertion == "sequential":
                    role = (
                        {"attn": "drop1", "mlp": "drop2"}[branch]
                        if config.outside
                        else {"attn": "attn_out", "mlp": "mlp"}[branch]
                    )
                    point = anatomy.need_point(block, role, "adapter")
                    edit.after(point, BottleneckPart(point.width, config, True, point.layout), label)
                elif config.source == "sublayer":
                    point = anatomy.need_point(block, branch, "adapter")
                    edit.beside(point, ParallelPart(point.width, config, False, point.layout), label)
                else:
                    part = BottleneckPart(block.point.width, config, residual=False)
                    edit.branch(block, branch, part, label)
