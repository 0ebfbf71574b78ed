"""Conformer adapter (Cappellazzo et al., MLSP 2024): the Conformer's convolution module, squeezed to r channels.

    h = GLU(W_1 x + b_1)                             W_1: [2r, d], first half times the sigmoid of the second
    h = SiLU(BatchNorm(DepthwiseConv_k(h)))          along the token sequence, zeros beyond its ends
    C(x) = W_2 h + b_2                               W_2: [d, r]

in the place of a bottleneck: beside the MLP (Pfeiffer's place), or the attention, or both. All tokens form one
sequence, special tokens and all rows of the spectrogram, so that the kernel runs across the ends of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.trained_norm import own_norm


@dataclass(frozen=True)
class ConformerConfig(MethodConfig):
    """Where the convolution sits and what it computes.

    Attributes:
        bottleneck: r, channels of the convolution; the paper's reduction rate 96 on width 768.
        kernel: k, taps of the depthwise convolution; the paper uses 31 for speech and 8 for ESC-50 and UrbanSound8K. An
            even kernel looks one token further ahead than back.
        position: which sub-layer: "mlp" (Pfeiffer), "attn" or "both" (Houlsby).
        insertion: "parallel" reads the sub-layer's input, "sequential" its output.
        residual: whether what the adapter reads is added to what it gives; None: sequential yes, parallel no.
        pre_norm: a LayerNorm in front, as in the Conformer. The published code for AST creates and counts it and drops
            its result away, so that the published results are those without it, the default.
        norms: train the norm of each adapted sub-layer too.
        init: "identity": W_2 and its bias zero; "official": all layers as torch starts them, what the published runs
            had.
    """

    method: ClassVar[str] = "conformer"
    bottleneck: int = 8
    kernel: int = 31
    position: Literal["mlp", "attn", "both"] = "mlp"
    insertion: Literal["parallel", "sequential"] = "parallel"
    residual: bool | None = None
    pre_norm: bool = False
    norms: bool = True
    init: Literal["identity", "official"] = "identity"

    def validate(self) -> None:
        self.require("bottleneck", self.bottleneck >= 1, "must be at least 1")
        self.require("kernel", self.kernel >= 1, "must be at least 1")

    @property
    def around(self) -> bool:
        """Whether the residual goes around the adapter."""
        return self.insertion == "sequential" if self.residual is None else self.residual


class ConformerPart(Part):
    """``C(x)``: ``[B, N, d] -> [B, N, d]``; with ``residual`` the input is added.

    A map ``[B, H, W, d]`` (layout "first": ``[B, d, H, W]``) is read row by row. In train mode the batch's own mean and
    variance normalise and move the running ones, which are part of the adapter and of its file.
    """

    def __init__(self, dim: int, config: ConformerConfig, layout: str = "last") -> None:
        super().__init__()
        r, k = config.bottleneck, config.kernel
        self.residual, self.first = config.around, layout == "first"
        self.padding = ((k - 1) // 2, k - 1 - (k - 1) // 2)
        self.pre_norm = nn.LayerNorm(dim) if config.pre_norm else None
        self.down = nn.Linear(dim, 2 * r)  # 1x1 convolutions, on tokens as they lie in memory
        self.conv = nn.Conv1d(r, r, k, groups=r)
        self.batch_norm = nn.BatchNorm1d(r)
        self.up = nn.Linear(r, dim)
        if config.init == "identity":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def delta(self, x: Tensor) -> Tensor:
        """``C(x)`` for ``x: [B, N, d]``."""
        h = F.glu(self.down(x if self.pre_norm is None else self.pre_norm(x)), dim=-1)  # [B, N, r]
        h = self.conv(F.pad(h.transpose(1, 2), self.padding))  # [B, r, N]
        h = F.silu(self.batch_norm(h))
        # torch multiplies strided tokens in an order that depends on requires_grad: a loaded adapter would differ
        out: Tensor = self.up(h.transpose(1, 2).contiguous())
        return out

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, ..., d]``, or ``[B, d, ...]``."""
        h = x.movedim(1, -1) if self.first else x
        h = self.delta(h.flatten(1, -2).contiguous()).view(h.shape)
        h = h.movedim(-1, 1) if self.first else h
        return x + h if self.residual else h


class ParallelConformer(ConformerPart):
    """Beside a sub-layer: ``y + C(x)``."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """``y, x``: output and input of the sub-layer."""
        return y + super().forward(x)


class Conformer(Method[ConformerConfig]):
    """One convolution module per block and position: ``L(2dr + 2r + rk + r + 2r + rd + d)``, with 2d more each for the
    trained norm and the LayerNorm in front.

    On AST-base 252,288 at k = 31 and 270,720 with ``pre_norm``, the published count. Not mergeable. In train mode the
    output depends on the batch; small batches hurt.
    """

    config_class = ConformerConfig
    examples = (
        "conformer(bottleneck=3, kernel=5)",
        "conformer(bottleneck=3, kernel=4, position=both, insertion=sequential, pre_norm=True)",
    )

    @property
    def capabilities(self) -> Capabilities:
        plain = self.config.around == (self.config.insertion == "sequential")
        return Capabilities(identity_at_init=self.config.init == "identity" and plain, backbone_eval=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the convolutions.

        Raises:
            UnsupportedError: a block has no such sub-layer, or no norm to train.
        """
        config = self.config
        for block in anatomy.need_blocks("conformer"):
            for branch in ("attn", "mlp") if config.position == "both" else (config.position,):
                if config.norms:
                    read = config.insertion == "parallel"
                    own_norm(anatomy, edit, block, branch, "conformer(norms=True)", read=read)
                label = f"conformer_{branch}"
                if config.insertion == "parallel":
                    point = anatomy.need_point(block, branch, "conformer")
                    edit.beside(point, ParallelConformer(point.width, config, point.layout), label)
                else:
                    point = anatomy.need_point(block, {"attn": "attn_out", "mlp": "mlp"}[branch], "conformer")
                    edit.after(point, ConformerPart(point.width, config, point.layout), label)
