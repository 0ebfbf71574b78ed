"""LoRA (Hu et al., ICLR 2022) on any matrix or slice of a fused one, with DoRA and rsLoRA as options.

    y = x W^T + b + s * (drop(x) A^T) B^T          A: [r, in]   B: [out, r]   s = alpha / r  (rsLoRA: alpha / sqrt r)

DoRA (Liu et al., ICML 2024) splits direction and length, ``W' = m * (W + s B A) / ||W + s B A||_row`` with the norm
held constant in the gradient, and trains m as well. rsLoRA: Kalajdzievski, 2023.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Point, Weight
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError, closest
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.trained_norm import keep_output

Rows = tuple[int, int]


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Which matrices get an update of which rank.

    Attributes:
        rank: r; ``r * (in + out)`` parameters per matrix.
        targets: roles of the anatomy (q, k, v, o, fc1, fc2), or module paths with wildcards such as
            ``blocks.*.mlp.fc1`` or ``patch_embed.proj`` for any Linear or Conv2d.
        alpha: numerator of the scale; None means r, a scale of 1 as in the vision literature.
        rslora: scale ``alpha / sqrt(r)`` instead of ``alpha / r``.
        dora: weight-decomposed update. Its dropout is not supported.
        shared_a: one A for all slices of a fused matrix (NOAH) instead of one each.
        dropout: on the input of A.
        init: "lora": A Kaiming-uniform(a=sqrt 5), B zero, an identity at the start; "gaussian": A normal of standard
            deviation 1/r, B zero, what diffusers' scripts take; "official": truncated normal 0.02 for both, what NOAH,
            SPT and V-PETL effectively ran.
        ranks: (module path, rank) of modules that differ, as files of others have them.
        alphas: (module path, alpha) of modules that differ; it takes precedence over ``alpha``.
    """

    method: ClassVar[str] = "lora"
    rank: int = 8
    targets: tuple[str, ...] = ("q", "v")
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    shared_a: bool = False
    dropout: float = 0.0
    init: Literal["lora", "gaussian", "official"] = "lora"
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def validate(self) -> None:
        self.require("rank", self.rank >= 1, "must be at least 1")
        self.require("ranks", all(rank >= 1 for _, rank in self.ranks), "every rank must be at least 1")
        self.require("targets", bool(self.targets), "name at least one matrix, for example q")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("dropout", not (self.dora and self.dropout), "cannot be combined with dora")

    @property
    def scale(self) -> float:
        """s of the formula."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha) / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, path: str) -> LoRAConfig:
        """The configuration of one module: ``ranks`` and ``alphas`` applied."""
        rank, alpha = dict(self.ranks).get(path, self.rank), dict(self.alphas).get(path, self.alpha)
        return self if (rank, alpha) == (self.rank, self.alpha) else self.replace(rank=rank, alpha=alpha)


class LowRank(Part):
    """Shared by all forms: factors of one module's slices, stored stacked.

    ``lora_A: [S*r, in]`` (``[r, in]`` when shared) and ``lora_B: [sum of slice heights, r]`` for S slices. For a
    convolution ``in`` is ``in_channels / groups * k_h * k_w``.
    """

    foldable = True

    def __init__(self, shape: tuple[int, int], slices: Sequence[Rows | None], config: LoRAConfig) -> None:
        super().__init__()
        out, fan_in = shape
        self.out, self.rank, self.own_scale = out, config.rank, config.scale
        self.slices: tuple[Rows, ...] = tuple(sorted((0, out) if s is None else s for s in slices))
        self.shared = config.shared_a or len(self.slices) == 1
        copies = 1 if self.shared else len(self.slices)
        self.lora_A = nn.Parameter(torch.empty(copies * self.rank, fan_in))
        self.lora_B = nn.Parameter(torch.empty(sum(stop - start for start, stop in self.slices), self.rank))
        self.reset(config.init)

    def reset(self, init: str) -> None:
        """Initialise as ``LoRAConfig.init`` says."""
        if init == "official":
            nn.init.trunc_normal_(self.lora_A, std=0.02)
            nn.init.trunc_normal_(self.lora_B, std=0.02)
            return
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        """s of the formula, times the strength that the adapter is used at."""
        return self.own_scale * self.strength

    @property
    def scalable(self) -> bool:  # type: ignore[override]
        """DoRA rescales directions: what it adds is no multiple of anything."""
        return getattr(self, "magnitude", None) is None

    @property
    def whole(self) -> bool:
        """B as it is stored is B for the whole output: no gaps, and one A."""
        ends = [0, *(stop for _, stop in self.slices)]
        return self.shared and ends[-1] == self.out and all(s[0] == e for s, e in zip(self.slices, ends, strict=False))

    def up(self) -> Tensor:
        """B for the whole output, ``[out, rows of A]``: slices in their rows and columns, zero elsewhere."""
        return self.lora_B if self.whole else spread(self.lora_B, self.slices, self.shared, self.out)

    def delta(self) -> Tensor:
        """``s * B A`` for the whole matrix, ``[out, in]``."""
        return self.scale * (self.up() @ self.lora_A)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s B A``, touching the adapted rows only."""
        weight = weight.clone()
        flat = weight.view(weight.shape[0], -1)
        row = 0
        for i, (start, stop) in enumerate(self.slices):
            first = 0 if self.shared else i * self.rank
            flat[start:stop].addmm_(
                self.lora_B[row : row + stop - start], self.lora_A[first : first + self.rank], alpha=self.scale
            )
            row += stop - start
        return weight, bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, rows={list(self.slices)} of {self.out}"


class LinearLoRA(LowRank):
    """``y + s * (drop(x) A^T) B^T`` beside a Linear layer, for updates of the whole weight."""

    def __init__(self, shape: tuple[int, int], slices: Sequence[Rows | None], config: LoRAConfig) -> None:
        super().__init__(shape, slices, config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [..., out]``, ``x: [..., in]``."""
        x = x if self.dropout is None else self.dropout(x)
        h = F.linear(x.flatten(0, -2), self.lora_A)  # [T, rows of A]
        return torch.addmm(y.flatten(0, -2), h, self.lora_B.t(), alpha=self.scale).view(y.shape)


class SlicedLoRA(LinearLoRA):
    """The same for slices with their own A each, or with rows between them that stay as they are."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [..., out]``, ``x: [..., in]``."""
        x = x if self.dropout is None else self.dropout(x)
        flat = _SlicedUpdate.apply(  # type: ignore[no-untyped-call]
            y.flatten(0, -2), x.flatten(0, -2), self.lora_A, self.lora_B, self.slices, self.shared, self.scale
        )[0]
        return cast(Tensor, flat).view(y.shape)


class _SlicedUpdate(torch.autograd.Function):
    """``y + s * h B^T`` with ``h = x A^T`` and B zero outside the slices; B is spread out again instead of being saved.

    Shapes: ``y: [T, out]``, ``x: [T, in]``, ``A: [S*r or r, in]``, ``B: [sum of heights, r]``, ``h: [T, rows of A]``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        y: Tensor, x: Tensor, a: Tensor, b: Tensor, slices: tuple[Rows, ...], shared: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        h = x @ a.t()
        return torch.addmm(y, h, spread(b, slices, shared, y.shape[-1]).t().to(h.dtype), alpha=scale), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, a, b, ctx.slices, ctx.shared, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, b, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 7
        x, a, b, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second backward needs h as a function of x and A
            h = x @ a.t()
        r, row = b.shape[1], 0
        grads_h: list[Tensor] = []
        grads_b: list[Tensor] = []
        for i, (start, stop) in enumerate(ctx.slices):
            g = grad[:, start:stop]
            h_i = h if ctx.shared else h[:, i * r : (i + 1) * r]
            grads_h.append(g @ b[row : row + stop - start].to(g.dtype))
            grads_b.append(g.t() @ h_i.to(g.dtype))
            row += stop - start
        grad_h = sum(grads_h[1:], grads_h[0]) if ctx.shared else torch.cat(grads_h, dim=1)
        grad_b = torch.cat(grads_b)
        if ctx.scale != 1.0:
            grad_h, grad_b = grad_h * ctx.scale, grad_b * ctx.scale
        grad_a = (grad_h.t() @ x.to(grad_h.dtype)).to(a.dtype)
        grad_x = (grad_h @ a.to(grad_h.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_a, grad_b.to(b.dtype), None, None, None


def spread(b: Tensor, slices: Sequence[Rows], shared: bool, out: int) -> Tensor:
    """Stacked slices of B, ``[sum of heights, r]``, in their places of ``[out, rows of A]``, zero elsewhere."""
    rank, row, blocks = b.shape[1], 0, []
    width = rank if shared else rank * len(slices)
    for i, (block, (start, stop)) in enumerate(zip(torch.split(b, [t - s for s, t in slices]), slices, strict=True)):
        left = 0 if shared else i * rank
        last = out - stop if i == len(slices) - 1 else 0
        blocks.append(F.pad(block, (left, width - rank - left, start - row, last)))
        row = stop
    return torch.cat(blocks)


class ConvLoRA(LowRank):
    """``y + s * B(A(x))`` beside a Conv2d without groups: A has the layer's kernel, stride and padding, B is 1x1."""

    def __init__(self, module: nn.Conv2d, slices: Sequence[Rows | None], config: LoRAConfig) -> None:
        super().__init__((module.out_channels, math.prod(module.weight.shape[1:])), slices, config)
        self.kernel = tuple(module.weight.shape[1:])
        self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [B, out, H', W']``, ``x: [B, in, H, W]``."""
        x = x if self.dropout is None else self.dropout(x)
        down = self.lora_A.view(-1, *self.kernel)
        h = F.conv2d(x, down, None, self.stride, self.padding, self.dilation)
        return torch.add(y, F.conv2d(h, self.up()[:, :, None, None]), alpha=self.scale)


class WeightLoRA(LowRank):
    """The update in weight space: grouped convolutions, and DoRA's rescaled directions."""

    def __init__(
        self, module: nn.Linear | nn.Conv2d, slices: Sequence[Rows | None], config: LoRAConfig, device: torch.device
    ) -> None:
        weight = module.weight
        super().__init__((weight.shape[0], math.prod(weight.shape[1:])), slices, config)
        if config.dora:
            length = weight.detach().float().flatten(1).norm(dim=1).to(device)
            self.magnitude = nn.Parameter(torch.cat([length[a:b] for a, b in self.slices]))
        else:
            self.register_parameter("magnitude", None)

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``weight: [out, ...]``; the same shape comes back, in the weight's dtype."""
        new = weight.to(self.compute) + self.delta().view(weight.shape)
        if self.magnitude is not None:
            length = new.detach().flatten(1).norm(dim=1)
            target = self._spread(length)
            new = new * (target / length).view(-1, *[1] * (weight.ndim - 1))
        return new.to(weight.dtype), bias

    def _spread(self, length: Tensor) -> Tensor:
        """Trained magnitudes in the adapted rows, the current length (a factor of one) elsewhere: ``[out]``."""
        if self.whole:
            return cast(Tensor, self.magnitude)
        pieces, at, row = [], 0, 0
        for start, stop in self.slices:
            pieces += [length[at:start], cast(Tensor, self.magnitude)[row : row + stop - start]]
            at, row = stop, row + stop - start
        return torch.cat([*pieces, length[at:]])

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight that forward uses."""
        return self.forward(weight, bias)


class LoRA(Method[LoRAConfig]):
    """Build low-rank parts for every target, one per module."""

    config_class = LoRAConfig
    examples = ("lora(rank=2)", "lora(rank=2, dora=True)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=self.config.init != "official")

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Group the targets by module and attach.

        Raises:
            UnsupportedError: a target does not exist, or is neither Linear nor Conv2d.
        """
        groups: dict[str, list[Rows | None]] = {}
        for weight in self._targets(anatomy, edit):
            rows = groups.setdefault(weight.path, [])
            if weight.rows not in rows:
                rows.append(weight.rows)
        named = (*(path for path, _ in self.config.ranks), *(path for path, _ in self.config.alphas))
        if unknown := [path for path in named if path not in groups]:
            raise UnsupportedError(
                f"lora gives {unknown[0]!r} a rank or alpha of its own and does not target it. "
                + closest(unknown[0], groups)
            )
        for path, slices in groups.items():
            self._attach(edit, path, [None] if None in slices else slices)
        if not (self.config.dora or self.config.dropout):  # x itself is kept for the gradient of A
            for block in anatomy.blocks:
                for branch, roles in (("attn", ("q", "k", "v")), ("mlp", ("fc1",))):
                    read = [w.path for role, w in block.weights.items() if role in roles and w.path in groups]
                    if any(isinstance(edit.module(path), nn.Linear) for path in read):
                        keep_output(edit, block, branch)

    def _targets(self, anatomy: Anatomy, edit: Editor) -> list[Weight]:
        found: list[Weight] = []
        roles = {role for block in anatomy.blocks for role in block.weights}
        names = [n for n, m in edit.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        names = [n for n in names if not n.startswith("adapters.")]
        for target in self.config.targets:
            if target not in roles and (target in names or "." in target or "*" in target):
                matched = fnmatch.filter(names, target)
                matched = [n for n in matched if f"{n}.weight" not in anatomy.idle] or matched
                if not matched:
                    raise UnsupportedError(
                        f"lora target {target!r} matches no Linear or Conv2d of this {anatomy.family} model. "
                        + closest(target, names)
                    )
                found += [Weight(name) for name in matched]
            else:
                found += [block.weights[target] for block in anatomy.with_weight(target, "lora")]
        return found

    def _attach(self, edit: Editor, path: str, slices: list[Rows | None]) -> None:
        module, config = edit.module(path), self.config.at(path)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise UnsupportedError(f"lora updates Linear and Conv2d layers; {path} is a {type(module).__name__}.")
        grouped = isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros")
        if config.dora or grouped:
            if config.dropout:
                raise UnsupportedError(f"lora's dropout cannot act on {path}: its update is computed in weight space.")
            edit.reweigh(Weight(path), WeightLoRA(module, slices, config, edit.device), "lora")
        elif isinstance(module, nn.Conv2d):
            edit.beside(Point(path, module.out_channels, "first"), ConvLoRA(module, slices, config), "lora")
        else:
            shape = (module.out_features, module.in_features)
            part: LowRank = LinearLoRA(shape, slices, config)
            if not part.whole:
                part = SlicedLoRA(shape, slices, config)
            edit.beside(Point(path, module.out_features), part, "lora")
