"""LoRA (Hu et al., ICLR 2022) on any matrix or slice of a fused one, with DoRA and rsLoRA as options.

    y = x W^T + b + s * (drop(x) A^T) B^T          A: [r, in]   B: [out, r]   s = alpha / r  (rsLoRA: alpha / sqrt r)

DoRA (Liu et al., ICML 2024) splits direction and length, ``W' = m * (W + s B A) / ||W + s B A||_row`` with the norm
held constant in the gradient, and trains m as well. rsLoRA: Kalajdzievski, 2023.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from peft_suite.anatomy import Anatomy, Point, Weight
from peft_suite.config import MethodConfig
from peft_suite.errors import UnsupportedError, closest
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.lora_parts import ConvLoRA, DoRA, LinearLoRA, LowRank, Rows, SlicedLoRA, WeightLoRA
from peft_suite.methods.trained_norm import keep_output


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
        if not self.config.dropout:  # x itself is kept for the gradient of A
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
            plain = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and not grouped
            form = DoRA if config.dora and plain else WeightLoRA
            edit.reweigh(Weight(path), form(module, slices, config, edit.device), "lora")
        elif isinstance(module, nn.Conv2d):
            edit.beside(Point(path, module.out_channels, "first"), ConvLoRA(module, slices, config), "lora")
        else:
            shape = (module.out_features, module.in_features)
            part: LowRank = LinearLoRA(shape, slices, config)
            if not part.whole:
                part = SlicedLoRA(shape, slices, config)
            edit.beside(Point(path, module.out_features), part, "lora")
