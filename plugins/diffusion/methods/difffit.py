"""DiffFit (Xie et al., ICCV 2023): biases, norms, the class embedding, and a scale for what every sub-layer gives.

    x + γ₁ ⊙ attn(norm(x)),  x + γ₂ ⊙ attn(norm(x), text),  x + γ₃ ⊙ ff(norm(x))          γ: [d], ones at the start

γ acts on the output of the sub-layer's last matrix, so it folds into it: ``W' = diag(γ) W, b' = γ b``. Gates of adaLN,
dropout and residual sums behind that matrix commute with it.

The paper describes DiT; placing γ in a UNet, and the further scales of ``processor``, follow the one public port to
Stable Diffusion. That port selects by the parts ``bias``, ``norm``, ``gamma`` of a parameter's name. In DiT the large
adaLN matrices are called ``norm1.linear``; so norms are selected by what they are here, and those stay frozen (their
biases train, as all biases do).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method

__all__ = ["DiffFit", "DiffFitConfig", "Gamma", "loss_weights"]

# role of a sub-layer's last matrix -> name of its scale; SD3 and FLUX have further ones for the text's stream
_SUBLAYERS = {
    "o": "gamma_attn1",
    "xo": "gamma_attn2",
    "fc2": "gamma_ff",
    "o2": "gamma_attn2",
    "add_o": "gamma_attn1",
    "cfc2": "gamma_ff",
    "out": "gamma_out",
}
_PROJECTIONS = {
    **{f"{prefix}{letter}": f"gamma_{letter}" for prefix in ("", "x", "add_") for letter in "qkv"},
    **{f"{letter}2": f"gamma_{letter}" for letter in "qkv"},
    **dict.fromkeys(("o", "xo", "o2", "add_o"), "gamma_fnn"),
}
_CLASSES = ("class_embed", "label_embed", "y_embed")


@dataclass(frozen=True)
class DiffFitConfig(MethodConfig):
    """DiffFit.

    Attributes:
        gamma: the scales of sub-layers (37,440 on Stable Diffusion 1.5).
        processor: scales behind the projections q, k, v and out of every attention as well (99,840), an option of the
            public port.
        norms: scales and shifts of LayerNorm, GroupNorm and RMSNorm layers.
        biases: every bias, those of norms and of adaLN's matrices included.
        labels: tables of class embeddings. diffusers' DiT has one per block, all of them count.
    """

    method: ClassVar[str] = "difffit"
    gamma: bool = True
    processor: bool = False
    norms: bool = True
    biases: bool = True
    labels: bool = True

    def validate(self) -> None:
        some = self.gamma or self.processor or self.norms or self.biases or self.labels
        self.require("gamma", some, "with processor, norms, biases and labels off as well, nothing is left to train")


class Gamma(Part):
    """``γ ⊙ (y + β)`` per channel; β, 0 at the start, is the change of the layer's bias, where that trains.

    ``γ, β: [C]``, or ``[C, 1, 1]`` on feature maps. A copy of the bias would stand before the scales of other adapters,
    and merging one adapter after the other would give something else than both together.
    """

    foldable = True
    decay = False

    def __init__(self, width: int, layout: str, bias: bool) -> None:
        super().__init__()
        shape = (width,) if layout == "last" else (width, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape)) if bias else None
        self.replaces = width if bias else 0

    def forward(self, y: Tensor) -> Tensor:
        """``y: [..., C]`` or ``[B, C, H, W]``."""
        return (y if self.beta is None else y + self.beta) * self.gamma

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``diag(γ) W`` and ``γ (b + β)``."""
        gamma = self.gamma.flatten()
        if bias is not None and self.beta is not None:
            bias = bias + self.beta.flatten()
        return weight * gamma.view(-1, *[1] * (weight.ndim - 1)), None if bias is None else bias * gamma

    def extra_repr(self) -> str:
        return f"width={self.gamma.numel()}"


class DiffFit(Method[DiffFitConfig]):
    """481,284 parameters on Stable Diffusion 1.5, 0.056 %; with ``processor`` 581,124, as the public port counts."""

    config_class = DiffFitConfig
    examples = ("difffit", "difffit(processor=True, norms=False, labels=False)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Scales at the blocks' last matrices (and projections), trained copies of biases, norms and class tables.

        Raises:
            UnsupportedError: no block has attention or a feed-forward to scale.
        """
        config = self.config
        moved: set[str] = set()
        if config.gamma or config.processor:
            blocks = [block for block in anatomy.need_blocks("difffit") if set(block.weights) & {"o", "fc2", "out"}]
            if not blocks:
                raise UnsupportedError(
                    f"difffit scales what attention and feed-forward give, and no block of this {anatomy.family} model "
                    "has either. Leave the scales out: difffit(gamma=False)."
                )
            for block in blocks:
                moved |= self._scales(anatomy, edit, block)
        edit.own(dict.fromkeys(name for name in self._copies(edit) if name not in moved))

    def _scales(self, anatomy: Anatomy, edit: Editor, block: Block) -> set[str]:
        """Attach the scales of a block. Returns the biases that train with them."""
        moved: set[str] = set()
        chosen = [_SUBLAYERS] if self.config.gamma else []
        for table in [*chosen, _PROJECTIONS] if self.config.processor else chosen:
            done: set[str] = set()  # roles of a fused matrix are one module
            for role, label in table.items():
                weight = block.weights.get(role)
                if weight is None or weight.path in done or f"{weight.path}.weight" in anatomy.idle:
                    continue
                done.add(weight.path)
                module, name = edit.module(weight.path), f"{weight.path}.bias"
                width, image = len(cast(Tensor, module.weight)), isinstance(module, nn.Conv2d)
                free = name not in moved and name not in anatomy.idle and name not in anatomy.fresh
                bias = self.config.biases and free and module.bias is not None
                point = Point(weight.path, width, "first" if image else "last")
                edit.after(point, Gamma(width, point.layout, bias), label)
                moved |= {name} if bias else set()
        return moved

    def _copies(self, edit: Editor) -> Iterator[str]:
        """Full names of base parameters to train copies of."""
        for path, module in edit.model.named_modules():
            if path.startswith("adapters."):
                continue
            norm = self.config.norms and isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
            norm = norm or (self.config.norms and path in edit.anatomy.norms)
            last = path.rpartition("embedding_table")[0] or path
            table = self.config.labels and isinstance(module, nn.Embedding) and any(c in last for c in _CLASSES)
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                is_bias = self.config.biases and name.endswith("bias")
                if is_bias or (norm and name in ("weight", "bias")) or (table and name == "weight"):
                    yield f"{path}.{name}" if path else name


def loss_weights(alphas_cumprod: Tensor, strength: float = 1e-3) -> Tensor:
    """``1 + λ w_t`` for every timestep, DiffFit's optional weighting of the noise-prediction loss.

    ``w_t = β_t² / (2 σ_t² α_t (1 - ᾱ_t))``, the weights of the variational bound (Ho et al., 2020), with the posterior
    variance ``σ_t² = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)``, which at the first step is taken from the second. Each sample's
    loss gets the weight of its own timestep; the public port weights the mean of the batch.

    Args:
        alphas_cumprod: ᾱ, ``[T]``, falling.
        strength: λ; 0 is the plain loss.
    """
    total = alphas_cumprod.double()
    before = torch.cat([torch.ones_like(total[:1]), total[:-1]])
    alpha = total / before
    beta = 1 - alpha
    variance = beta * (1 - before) / (1 - total)
    variance = torch.cat([variance[1:2], variance[1:]])
    weights = beta.square() / (2 * variance * alpha * (1 - total))
    return (1 + strength * weights).to(alphas_cumprod.dtype)
