"""MAM adapter (He et al., ICLR 2022): a short prefix in attention and a scaled parallel adapter at the MLP.

    K = [P_k ; K]    V = [P_v ; V]                       P_k, P_v: [l, d] per block, seen by every query
    h = MLP(x) + s * (relu(x D^T + b_D) U^T + b_U)       D: [k, d]   U: [d, k]

The best mix that the unified view of adapters, prefixes and LoRA found. Prefixes enter after the key norm, where a
backbone has one, and carry no position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter, adapters_of
from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Edit, Part
from peft_suite.errors import AdapterError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.bottleneck import BottleneckConfig, BottleneckPart, ParallelPart


@dataclass(frozen=True)
class MAMConfig(MethodConfig):
    """Sizes of the two halves.

    Attributes:
        prefix: l, learned keys and values per block; 0 leaves the attention alone.
        hidden: width of the reparametrisation ``P = Linear(tanh(Linear(E)))``, E and the first Linear shared by all
            blocks. The paper trains with 800 (15.4 M parameters on ViT-B, of which only P has to be kept: see
            :func:`compact`); the default 0 trains P itself, so that what is trained is what the file holds.
        prefix_dropout: on P.
        bottleneck: k, inner width of the adapter; 0 leaves the MLP alone.
        scale: s; the paper uses 2 or 4.
        learned_scale: train s.
        source: "sublayer", what the MLP reads (the paper's; after the norm), or "residual", the un-normalised stream.
        layernorm: LayerNorm on the adapter's input ("in") or scaled output ("out").
        init: of the adapter, see ``adapter``.
        dropout: between activation and up-projection.
    """

    method: ClassVar[str] = "mam"
    prefix: int = 16
    hidden: int = 0
    prefix_dropout: float = 0.0
    bottleneck: int = 16
    scale: float = 2.0
    learned_scale: bool = False
    source: Literal["sublayer", "residual"] = "sublayer"
    layernorm: Literal["none", "in", "out"] = "none"
    init: Literal["lora", "bert", "official"] = "lora"
    dropout: float = 0.0

    def validate(self) -> None:
        for name in ("prefix", "hidden", "bottleneck"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        self.require("prefix", self.prefix + self.bottleneck > 0, "and bottleneck = 0 leave nothing to train")
        for name in ("dropout", "prefix_dropout"):
            self.require(name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")


class Prefix(Part):
    """Learned keys and values in front of a block's own."""

    decay = False

    def __init__(self, width: int, dim: int, config: MAMConfig, shared: Prefix | None) -> None:
        super().__init__()
        self.shared = (self if shared is None else shared,)  # a tuple: the owner, outside the module tree
        self.dropout = nn.Dropout(config.prefix_dropout) if config.prefix_dropout else None
        self.embedding: nn.Parameter | None = None
        self.inner: nn.Linear | None = None
        self.outer: nn.Linear | None = None
        self.prefix: nn.Parameter | None = None
        if not config.hidden:
            self.prefix = nn.Parameter(torch.empty(2, config.prefix, width).normal_(std=0.02))
            return
        if shared is None:
            self.embedding = nn.Parameter(torch.randn(config.prefix, dim))
            self.inner = nn.Linear(dim, config.hidden)
        self.outer = nn.Linear(config.hidden, 2 * width)

    def pair(self) -> Tensor:
        """(P_k, P_v), ``[2, l, width]``."""
        if self.prefix is not None:
            return self.prefix
        owner = self.shared[0]
        assert self.outer is not None and owner.inner is not None
        flat: Tensor = self.outer(torch.tanh(owner.inner(owner.embedding)))
        return torch.stack(flat.chunk(2, dim=1))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``k, v: [B, heads, N, head width]``."""
        pair = self.pair()
        if self.dropout is not None:
            pair = self.dropout(pair)
        pair = pair.reshape(2, -1, k.shape[1], k.shape[3]).transpose(1, 2)  # [2, heads, l, head width]
        keys, values = (p.expand(k.shape[0], -1, -1, -1).to(k.dtype) for p in pair)
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)


class MAM(Method[MAMConfig]):
    """Prefix and parallel adapter in every block: ``2Lld + L(2dk + k + d)`` parameters, 599,232 on ViT-B/16.

    With ``hidden`` h the prefixes cost ``ld + dh + h + 2Ld(h + 1)`` while training. Not mergeable.
    """

    config_class = MAMConfig
    examples = ("mam(prefix=3, bottleneck=6)", "mam(prefix=2, hidden=5, bottleneck=0)", "mam(prefix=0, bottleneck=6)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=self.config.init == "lora" and self.config.prefix == 0)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place both halves.

        Raises:
            UnsupportedError: the backbone's attention takes no further keys and values, or a block has no MLP.
        """
        config = self.config
        first: Prefix | None = None
        for block in anatomy.need_blocks("mam"):
            if config.prefix:
                rows = anatomy.need_weight(block, "k", "mam").rows
                point = anatomy.need_point(block, "attn", "mam")
                width = point.width if rows is None else rows[1] - rows[0]
                part = Prefix(width, block.point.width, config, first)
                first = first or part
                edit.inside(point, "prefix", part, "mam_prefix")
            if config.bottleneck:
                values = {n: getattr(config, n) for n in ("bottleneck", "scale", "learned_scale", "layernorm", "init")}
                shape = BottleneckConfig(insertion="parallel", dropout=config.dropout, **values)
                if config.source == "residual":
                    edit.branch(block, "mlp", BottleneckPart(block.point.width, shape, residual=False), "mam_adapter")
                else:
                    point = anatomy.need_point(block, "mlp", "mam")
                    edit.beside(point, ParallelPart(point.width, shape, False, point.layout), "mam_adapter")


def compact(model: nn.Module, name: str = "default") -> nn.Module:
    """Replace reparametrised prefixes by the prefixes themselves: same outputs, a file of ``2Lld`` values for them.

    Call it when training is over.

    Raises:
        AdapterError: the adapter is no MAM adapter with ``hidden``.
    """
    adapters = adapters_of(model)
    old = adapters[name]
    if not isinstance(old.method, MAM) or not old.method.config.hidden:
        raise AdapterError(f"The adapter {name!r} has no reparametrised prefixes: it is {old.method.config}.")
    config = old.method.config.replace(hidden=0)
    edits: list[Edit] = []
    for edit in old.edits:
        part: Any = edit.part
        if isinstance(part, Prefix):
            pair = part.pair().detach()
            with torch.device(pair.device):
                part = Prefix(pair.shape[2], pair.shape[2], config.replace(prefix=pair.shape[1]), None)
            part.prefix.data.copy_(pair)
            part.requires_grad_(next(edit.part.parameters()).requires_grad)
        edits.append(Edit(edit.kind, edit.path, edit.key, part, edit.argument, edit.output, edit.branch, edit.normed))
    new = Adapter(name, MAM(config), edits)
    active = adapters.active
    adapters._modules[name] = new.train(old.training)
    adapters.switch(active)
    return model
