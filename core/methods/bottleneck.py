"""Bottleneck adapters: one method for the whole family of He et al. (ICLR 2022, "a unified view").

    Delta(x) = s * (f(LN(x) D^T + b_D) U^T + b_U)          D: [r, d]   U: [d, r]

placed after, beside or in front of the attention, the MLP, or both. Houlsby (ICML 2019), Pfeiffer (EACL 2021),
parallel/scaled adapters and AdaptFormer (NeurIPS 2022) are presets of it, available under their own names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Block
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.trained_norm import own_norm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

_AFTER = {False: {"attn": "attn_out", "mlp": "mlp"}, True: {"attn": "drop1", "mlp": "drop2"}}  # by ``outside``


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """Where a bottleneck sits and what it computes.

    Attributes:
        bottleneck: inner width r; ``L*(2dr + r + d)`` parameters per placement with biases.
        position: which sub-layer: "mlp", "attn" or "both".
        insertion: "sequential" reads the sub-layer's output, ``h + Delta(h)``; "parallel" its input, ``h + Delta(x)``;
            "before" changes that input, ``S(x + Delta(x))``; "hydra" is one sequential and one parallel adapter.
        source: for parallel, which input: "sublayer" is what the sub-layer reads (after its norm), inside drop path;
            "residual" is the un-normalised stream, outside drop path (AdaptFormer).
        outside: for sequential, put the adapter after drop path instead of inside the residual branch (NOAH).
        residual: whether what the adapter reads is added to what it gives; None: as it must be to start as an identity,
            for parallel no, else yes. True for parallel adds the sub-layer's input to the stream; False for sequential
            puts the adapter in the place of the residual branch, and for before the residual around the sub-layer
            instead of the adapter, ``S(Delta(x)) + Delta(x)``.
        norms: train the norm of each adapted sub-layer too (``2d`` more per placement), as Houlsby and the audio
            studies do.
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
    insertion: Literal["sequential", "parallel", "before", "hydra"] = "sequential"
    source: Literal["sublayer", "residual"] = "sublayer"
    outside: bool = False
    residual: bool | None = None
    norms: bool = False
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
            "outside", not self.outside or self.insertion == "sequential", "is an option of sequential adapters"
        )
        self.require(
            "residual", self.residual is None or self.insertion != "hydra", "is fixed for hydra, leave it None"
        )

    @property
    def around(self) -> bool:
        """Whether the residual goes around the adapter, for all insertions but hydra, which has one of each."""
        return self.insertion != "parallel" if self.residual is None else self.residual


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


class AddInput(Part):
    """``y + x``: the residual around a sub-layer."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y, x``: output and input of the sub-layer."""
        return y + x


class Bottleneck(Method[BottleneckConfig]):
    """Build one bottleneck per block and position, for hydra two."""

    config_class = BottleneckConfig
    examples = (
        "adapter(bottleneck=3)",
        "houlsby(bottleneck=3)",
        "pfeiffer(bottleneck=3)",
        "parallel-adapter(bottleneck=3)",
        "adaptformer(bottleneck=3)",
        "adapter(bottleneck=3, insertion=before, position=both, norms=True)",
        "adapter(bottleneck=3, insertion=before, residual=False)",
        "adapter(bottleneck=3, insertion=hydra, activation=gelu)",
    )

    @property
    def capabilities(self) -> Capabilities:
        plain = self.config.residual is None or self.config.residual == (self.config.insertion != "parallel")
        return Capabilities(identity_at_init=self.config.init == "lora" and plain)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the bottlenecks.

        Raises:
            UnsupportedError: no block has such a sub-layer, one has no norm to train, or hides its residual stream.
        """
        config, blocks = self.config, anatomy.need_blocks("adapter")
        branches = ("attn", "mlp") if config.position == "both" else (config.position,)
        able = {branch: [self._fits(block, branch) for block in blocks] for branch in branches}
        for i, block in enumerate(blocks):
            for branch in branches:
                if any(able[branch]) and not able[branch][i]:  # blocks of another kind, without this branch
                    continue
                if config.norms:
                    read = config.source == "sublayer" and config.insertion != "sequential"
                    own_norm(anatomy, edit, block, branch, "adapter(norms=True)", read=read)
                label = f"adapter_{branch}"
                if config.insertion == "before":
                    self._before(anatomy, edit, block, branch, label)
                elif config.insertion == "sequential":
                    self._after(anatomy, edit, block, branch, label, config.around)
                elif config.insertion == "parallel":
                    self._beside(anatomy, edit, block, branch, label, config.around)
                else:
                    self._after(anatomy, edit, block, branch, label, True)
                    self._beside(anatomy, edit, block, branch, f"{label}_parallel", False)

    def _fits(self, block: Block, branch: str) -> bool:
        """Whether a block has the places that the insertion needs."""
        config = self.config
        after, beside = (config.insertion in (kind, "hydra") for kind in ("sequential", "parallel"))
        residual = beside and config.source == "residual"
        roles = {_AFTER[config.outside][branch]} if after else set()
        if config.insertion == "before" or (beside and not residual):
            roles.add(branch)
        return roles <= set(block.points) and (branch in block.branches or not residual)

    def _after(self, anatomy: Anatomy, edit: Editor, block: Block, branch: str, label: str, residual: bool) -> None:
        """``h = Delta(h) [+ h]``."""
        point = anatomy.need_point(block, _AFTER[self.config.outside][branch], "adapter")
        edit.after(point, BottleneckPart(point.width, self.config, residual, point.layout), label)

    def _beside(self, anatomy: Anatomy, edit: Editor, block: Block, branch: str, label: str, residual: bool) -> None:
        """``h = h + Delta(x) [+ x]``."""
        if self.config.source == "residual":
            edit.branch(block, branch, BottleneckPart(block.point.width, self.config, residual), label)
        else:
            point = anatomy.need_point(block, branch, "adapter")
            edit.beside(point, ParallelPart(point.width, self.config, residual, point.layout), label)

    def _before(self, anatomy: Anatomy, edit: Editor, block: Block, branch: str, label: str) -> None:
        """``h = S(x + Delta(x))``, or ``S(t) + t`` with ``t = Delta(x)``."""
        point = anatomy.need_point(block, branch, "adapter")
        edit.before(point, BottleneckPart(point.width, self.config, self.config.around, point.layout), label)
        if not self.config.around:
            edit.beside(point, AddInput(), f"{label}_around")
