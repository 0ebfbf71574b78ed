"""Mixtures of adapters (Cappellazzo et al., Interspeech 2024): N small experts beside attention, MLP, or both.

Dense: every token passes every expert, a router weighs them.

    w = softmax(W_r z + b_r)  [L, N]        M(z) = sum_n w_n (U_n h_n + b_n),   h_n = GELU(D_n z + c_n)

Since the up-projections are linear, mixing comes before them: M(z) = [w_1 h_1 .. w_N h_N] [U_1 .. U_N]^T + w b, one
product of width N r instead of N products of width d.

Soft: every expert sees p slots, weighted means of all tokens, so that its cost does not grow with their number.

    S = z Phi  [L, N p]       D = softmax of S over tokens       C = softmax of S over slots
    M(z) = C A(D^T z),        A_n applied to the slots of expert n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.trained_norm import own_norm


@dataclass(frozen=True)
class MoAConfig(MethodConfig):
    """What both mixtures share.

    Attributes:
        bottleneck: r, inner width of an expert; the paper's reduction rate 128 on width 768.
        experts: N; between 2 and 15 in the paper.
        position: "attn" (the published default), "mlp" or "both" (Houlsby).
        expert: "bottleneck", two projections and a GELU; "convpass", with a convolution of three taps over an expert's
            slots (dense: over the tokens) between two QuickGELUs.
        convolution: False leaves convpass's convolution out, whose result the published code throws away.
        dropout: in front of the up-projection of convpass experts.
        norms: train the norm of each adapted sub-layer too.
        double_add: add the mixture beside attention once more at the end of the block, as the published code does.
        init: "identity": up-projections zero; "official": as the published runs started, truncated normal 0.02 there
            too.
    """

    bottleneck: int = 6
    experts: int = 7
    position: Literal["attn", "mlp", "both"] = "attn"
    expert: Literal["bottleneck", "convpass"] = "bottleneck"
    convolution: bool = True
    dropout: float = 0.1
    norms: bool = True
    double_add: bool = False
    init: Literal["identity", "official"] = "identity"

    def validate(self) -> None:
        for name in ("bottleneck", "experts"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("double_add", not self.double_add or self.position == "attn", "goes with position=attn")


@dataclass(frozen=True)
class SoftMoAConfig(MoAConfig):
    """Soft-MoA.

    Attributes:
        slots: p, slots per expert.
        normalize: "soft-moe": S from unit tokens and unit columns of Phi times a learned scale, as Soft-MoE says;
            "official": as published, Phi over the experts, and slots made of unit tokens; "none": as it is.
    """

    method: ClassVar[str] = "soft-moa"
    slots: int = 1
    normalize: Literal["none", "soft-moe", "official"] = "none"

    def validate(self) -> None:
        super().validate()
        self.require("slots", self.slots >= 1, "must be at least 1")


@dataclass(frozen=True)
class DenseMoAConfig(MoAConfig):
    """Dense-MoA."""

    method: ClassVar[str] = "dense-moa"


class Experts(nn.Module):
    """N experts side by side: ``down: [N*r, d]``, ``up: [d, N*r]``, ``up_bias: [N*d]``."""

    def __init__(self, dim: int, config: MoAConfig) -> None:
        super().__init__()
        n, r = config.experts, config.bottleneck
        self.count, self.width = n, r
        self.down = nn.Linear(dim, n * r)
        self.up = nn.Linear(n * r, dim, bias=False)
        self.up_bias = nn.Parameter(torch.zeros(n * dim))
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        if config.init == "official":
            nn.init.trunc_normal_(self.up.weight, std=0.02)
        else:
            nn.init.zeros_(self.up.weight)
        self.convpass = config.expert == "convpass"
        self.dropout = nn.Dropout(config.dropout) if self.convpass and config.dropout else None
        self.conv: nn.Conv1d | None = None
        if self.convpass and config.convolution:
            self.conv = nn.Conv1d(n * r, n * r, 3, padding=1, groups=n)
            for own in self.conv.weight.view(n, r, r, 3):
                nn.init.xavier_uniform_(own)
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)

    def inner(self, h: Tensor) -> Tensor:
        """What happens between the projections: ``[B, M, N*r]`` for M tokens, or M slots of every expert."""
        if not self.convpass:
            return F.gelu(h)
        h = _quick_gelu(h)
        if self.conv is not None:
            h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = _quick_gelu(h)
        return h if self.dropout is None else self.dropout(h)

    def mix(self, z: Tensor, weights: Tensor) -> Tensor:
        """``sum_n w_n A_n(z)`` for ``z: [B, L, d]`` and ``weights: [B, L, N]``."""
        h = self.inner(self.down(z)).reshape(*weights.shape, self.width)  # [B, L, N, r]
        h = (weights.unsqueeze(-1) * h).flatten(2)
        out: Tensor = self.up(h) + weights @ self.up_bias.view(self.count, -1)
        return out

    def each(self, slots: Tensor) -> Tensor:
        """``A_n(slots_n)``, ``[B, N, p, d] -> [B, N, p, d]``."""
        n, r = self.count, self.width
        h = torch.einsum("bnpd,nrd->bpnr", slots, self.down.weight.view(n, r, -1)).flatten(2) + self.down.bias
        h = self.inner(h).reshape(*h.shape[:2], n, r)  # [B, p, N, r]
        y = torch.einsum("bpnr,dnr->bnpd", h, self.up.weight.view(-1, n, r))
        return y + self.up_bias.view(n, 1, -1)


class Mixture(Part):
    """Beside a sub-layer: ``y + M(z)`` for its output and its input."""

    def __init__(self, layout: str = "last") -> None:
        super().__init__()
        self.first = layout == "first"

    def mixture(self, z: Tensor) -> Tensor:
        """``M(z)``: ``[B, L, d] -> [B, L, d]``."""
        raise NotImplementedError

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """``y, z: [B, ..., d]``, or ``[B, d, ...]``; a map's tokens are read row by row."""
        z = z.movedim(1, -1) if self.first else z
        m = self.mixture(z.flatten(1, -2)).view(z.shape)
        return y + (m.movedim(-1, 1) if self.first else m)


class DenseMixture(Mixture):
    """Every token through every expert, weighed by a router."""

    def __init__(self, dim: int, config: DenseMoAConfig, layout: str = "last") -> None:
        super().__init__(layout)
        self.router = nn.Linear(dim, config.experts)
        nn.init.trunc_normal_(self.router.weight, std=0.02)
        nn.init.zeros_(self.router.bias)
        self.experts = Experts(dim, config)

    def mixture(self, z: Tensor) -> Tensor:
        """``M(z)``."""
        return self.experts.mix(z, self.router(z).softmax(dim=-1))


class SoftMixture(Mixture):
    """Experts on slots: weighted means of tokens, handed back by other weights of the same scores."""

    def __init__(self, dim: int, config: SoftMoAConfig, layout: str = "last") -> None:
        super().__init__(layout)
        self.slots, self.normalize = config.slots, config.normalize
        self.phi = nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, config.experts, config.slots)))
        self.scale = nn.Parameter(torch.ones(1)) if config.normalize != "none" else None
        self.experts = Experts(dim, config)

    def scores(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """S, ``[B, L, N*p]``, and the tokens that slots are made of."""
        if self.scale is None:
            return z @ self.phi.flatten(1), z
        units = unit(z, dim=-1)
        phi = unit(self.phi, dim=1 if self.normalize == "official" else 0)
        return units @ (phi * self.scale).flatten(1), units if self.normalize == "official" else z

    def mixture(self, z: Tensor) -> Tensor:
        """``M(z)``."""
        scores, tokens = self.scores(z)
        dispatch, combine = scores.softmax(dim=1), scores.softmax(dim=2)
        slots = dispatch.transpose(1, 2) @ tokens  # [B, N*p, d]
        made = self.experts.each(slots.view(z.shape[0], -1, self.slots, z.shape[-1]))
        return combine @ made.flatten(1, 2)


def unit(x: Tensor, dim: int) -> Tensor:
    """``x`` over its length along ``dim``."""
    length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (length + 1e-6)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class Keep(Part):
    """The published code's way at the attention: adds the mixture and keeps it for the end of the block."""

    needs_context = True

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.inner = mixture

    def forward(self, y: Tensor, z: Tensor, notes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``y, z: [B, L, d]``: the attention's output and input; ``notes`` lives as long as the block's call."""
        notes["mixture"] = self.inner.mixture(z)
        return y + notes["mixture"], z


class Again(Part):
    """Adds the kept mixture once more to what leaves the block."""

    needs_context = True

    def forward(self, x: Tensor, notes: dict[str, Tensor]) -> tuple[Tensor]:
        """``x: [B, L, d]``."""
        return (x + notes["mixture"],)


C = TypeVar("C", bound=MoAConfig)


class MoA(Method[C], Generic[C]):
    """Place one mixture per block and position."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=self.config.init == "identity", backbone_eval=True)

    def make(self, dim: int, layout: str) -> Mixture:
        """A mixture of the configured kind."""
        raise NotImplementedError

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the mixtures.

        Raises:
            UnsupportedError: a block has no such sub-layer, no norm to train, or (``double_add``) no place at its end.
        """
        config, name = self.config, self.name
        label = name.replace("-", "_")
        for block in anatomy.need_blocks(name):
            for branch in ("attn", "mlp") if config.position == "both" else (config.position,):
                if config.norms:
                    own_norm(anatomy, edit, block, branch, f"{name}(norms=True)", read=True)
                point = anatomy.need_point(block, branch, name)
                part = self.make(point.width, point.layout)
                if config.double_add:
                    edit.inside(block.point, "attn_out", Keep(part), f"{label}_{branch}")
                    edit.inside(block.point, "end", Again(), f"{label}_again")
                else:
                    edit.beside(point, part, f"{label}_{branch}")


class SoftMoA(MoA[SoftMoAConfig]):
    """``L(N(2dr + r + d) + dNp)`` per position and 2d for each trained norm: 922,104 on AST-base, 1,844,208 for "both".

    Convpass experts have ``3r^2 + r`` more each: 931,680. With one slot only their middle tap acts. Not mergeable.
    """

    config_class = SoftMoAConfig
    examples = (
        "soft-moa(bottleneck=2, experts=3, slots=2)",
        "soft-moa(bottleneck=2, experts=2, position=both, expert=convpass, slots=3, normalize='soft-moe')",
    )

    def make(self, dim: int, layout: str) -> Mixture:
        """A soft mixture."""
        return SoftMixture(dim, self.config, layout)


class DenseMoA(MoA[DenseMoAConfig]):
    """``L(N(2dr + r + d) + (d + 1)N)`` per position and 2d for each trained norm: 922,188 on AST-base, 1,844,376 for
    "both". Not mergeable.
    """

    config_class = DenseMoAConfig
    examples = (
        "dense-moa(bottleneck=2, experts=3)",
        "dense-moa(bottleneck=2, experts=2, position=both, expert=convpass)",
    )

    def make(self, dim: int, layout: str) -> Mixture:
        """A dense mixture."""
        return DenseMixture(dim, self.config, layout)
