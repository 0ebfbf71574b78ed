"""Point-PEFT (Tang et al., AAAI 2024): prompts from a memory of the training clouds, and adapters over neighbourhoods.

Memory: f, the pooled feature of the frozen model, of every training cloud, kept by ``calibrate``. A cloud recalls the K
rows that are most similar to its own f:

    cache = [f ; Σ softmax(similarity)_k m_k ; m_1 .. m_K]                    [B, T = 2 + K, D]

Block (positions added as ever; P only in the first blocks, taken off behind each):

    P = drop(E) + cache + A_c(cache)               z = [class ; P ; X]
    z = z + attention(LN1 z)                        without drop path
    u = drop path(MLP(LN2 z));  z = z + u + 0.7 A_f(u)
    n = X of neighbourhoods around half of the centres;  n = n + drop path(narrow attention(LN3 n))
    v = gelu(BN(max n)) + 0.3 X of their middles
    X = X + 0.3 · weights v;  z = z + A_1(z)

Weights go with the inverse squared distance to all neighbourhoods, so propagation is one matrix product. Neighbourhoods
and weights of the first blocks come from sampling the cloud again with T learned points in front; those of the others
from the centres. Biases of attention output, MLP and norms, and the final norm, train too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy, Point, Weight
from peft_suite.config import MethodConfig
from peft_suite.errors import AdapterError, ConfigError, UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.pointcloud.methods.frozen import FrozenView
from peft_suite.pointcloud.methods.point_peft_parts import (
    Aggregate,
    Apart,
    Bank,
    Enough,
    Idle,
    Locate,
    Mixing,
    OfMlp,
    Prompts,
    Undropped,
)
from peft_suite.pointcloud.models.geometry import Grouping


@dataclass(frozen=True)
class PointPEFTConfig(MethodConfig):
    """Point-PEFT.

    Attributes:
        num_prompts: T; K = T - 2 rows are recalled.
        prompted_blocks: the first blocks get prompts.
        bottleneck: width of A_f and A_1.
        prompt_bottleneck: width of A_c.
        attention: width of the narrow attention; it has as many heads as divide both it and the backbone's number.
        dropout: inside the bottlenecks.
        mlp_scale: of A_f.
        propagate: what patches take from neighbourhoods.
        center: what neighbourhoods take from their middle.
        biases: train biases and the final norm.
        bank_size: rows of the memory at most; of more clouds a random subset is kept.
        official: the published code: neighbourhoods of the prompted blocks address wrong rows, also of other clouds of
            the batch; similarities to rows as they are instead of cosines; 62,268 parameters of Point-MAE (prompts and
            A_c of unprompted blocks, a gate per block) that are counted and never used.
        memory: rows that calibration found; not for users to set.
    """

    method: ClassVar[str] = "point-peft"
    num_prompts: int = 10
    prompted_blocks: int = 6
    bottleneck: int = 16
    prompt_bottleneck: int = 8
    attention: int = 18
    dropout: float = 0.1
    mlp_scale: float = 0.7
    propagate: float = 0.3
    center: float = 0.3
    biases: bool = True
    bank_size: int = 16384
    official: bool = False
    memory: int | None = None

    def validate(self) -> None:
        self.require("num_prompts", self.num_prompts >= 3, "must be at least 3: the feature, a mean, a recalled row")
        for name in ("prompted_blocks", "bottleneck", "prompt_bottleneck", "attention"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("bank_size", self.bank_size >= self.recalled, f"must be at least {self.recalled}")

    @property
    def recalled(self) -> int:
        """K."""
        return self.num_prompts - 2


class PointPEFT(Method[PointPEFTConfig]):
    """The memory is filled by ``events(model).calibrate(batches, loss)`` from one pass over the training clouds, and
    travels in the adapter's file. Until then a cloud recalls its own feature."""

    config_class = PointPEFTConfig
    examples = ("point-peft(num_prompts=4)", "point-peft(num_prompts=3, prompted_blocks=1, biases=False, dropout=0.0)")

    def __init__(self, config: PointPEFTConfig) -> None:
        super().__init__(config)
        self.rows: Tensor | None = None  # between calibration and building

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            identity_at_init=False,
            changes_sequence=True,
            needs_geometry=True,
            needs_calibration=self.config.memory is None,
            calibrates_on_all=True,
        )

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the parts.

        Raises:
            UnsupportedError: no point-cloud backbone, or too few or too small groups to form neighbourhoods.
            ConfigError: a memory that only a file could bring.
        """
        config, prefix, blocks = self.config, anatomy.prefix_tokens, anatomy.need_blocks("point-peft")
        path = self._geometry(anatomy, edit)
        grouping: Any = edit.module(path)
        edit.inside(Point(path, 3), "geometry", Locate(config.num_prompts, grouping, config.official), "point_peft")
        edit.inside(Point(edit.having("entry")[0], anatomy.dim), "entry", self._bank(anatomy, edit), "point_memory")
        heads: int = getattr(edit.module(anatomy.need_point(blocks[0], "attn", "point-peft").path), "num_heads", 1)
        mixing = Mixing(anatomy.dim, config.attention, math.gcd(config.attention, heads))
        for i, block in enumerate(blocks):
            dim, prompted = block.point.width, i < config.prompted_blocks
            rate: float = getattr(edit.module(block.points["drop1"].path), "drop_prob", 0.0)
            if prompted:
                part = Prompts(dim, config.num_prompts, prefix, config.prompt_bottleneck, config.dropout)
                edit.inside(block.point, "tokens", part, "point_prompt")
            if rate:
                edit.beside(block.points["drop1"], Undropped(), "undropped")
            of_mlp = OfMlp(dim, config.bottleneck, config.dropout, config.mlp_scale)
            edit.after(block.points["drop2"], of_mlp, "of_mlp")
            prompts = config.num_prompts if prompted else 0
            edit.inside(block.point, "end", Aggregate(i, dim, prefix, prompts, mixing, rate, config), "geometry")
            if config.official:
                idle = Idle(dim, config.num_prompts - prompts, config.prompt_bottleneck, config.dropout)
                edit.after(block.points["drop2"], idle, "idle")
        if config.biases:
            self._own_biases(anatomy, edit)

    def _geometry(self, anatomy: Anatomy, edit: Editor) -> str:
        paths = edit.having("geometry")
        if not paths or not edit.having("entry") or anatomy.norm is None:
            raise UnsupportedError(f"point-peft works on the patches of point clouds, and {anatomy.family} has none.")
        if f"{anatomy.norm.path}.weight" in anatomy.fresh:
            raise UnsupportedError(
                "point-peft remembers what a frozen tokenizer makes of the training clouds, and "
                f"{anatomy.family}'s tokenizer and norm are trained."
            )
        grouping = edit.module(paths[0])
        assert isinstance(grouping, Grouping)
        if min(grouping.groups, grouping.size) < 2:
            raise UnsupportedError(
                f"point-peft halves groups and their size, and {anatomy.family} has {grouping.groups} of "
                f"{grouping.size} points; at least 2 of each are needed."
            )
        return paths[0]

    def _bank(self, anatomy: Anatomy, edit: Editor) -> Bank:
        config, blocks, norm = self.config, anatomy.blocks, anatomy.norm
        assert norm is not None
        # blocks whose prefix has matrices of its own need it, and their patches do not see it
        skip = 0 if "contrast_q" in blocks[0].weights else anatomy.prefix_tokens
        bank = Bank(
            config.memory or 0,
            anatomy.dim,
            config.recalled,
            [FrozenView(edit.module(block.point.path)) for block in blocks],
            FrozenView(edit.module(norm.path)),
            skip,
            anatomy.prefix_tokens,
            config.official,
        )
        if config.memory is not None and edit.device.type != "meta":
            if self.rows is None:
                raise ConfigError(
                    f"point-peft cannot start from memory={config.memory}: its rows are in the adapter's file. load() "
                    "it, or leave memory out and calibrate."
                )
            bank.fill(self.rows)
        return bank

    @staticmethod
    def _own_biases(anatomy: Anatomy, edit: Editor) -> None:
        for block in anatomy.blocks:
            paths = [block.points[n].path for n in ("norm1", "norm2")]
            paths += [block.weights[n].path for n in ("o", "fc1", "fc2") if n in block.weights]
            for path in paths:
                if getattr(edit.module(path), "bias", None) is not None:
                    edit.reweigh(Weight(path), Apart(edit.module(path), ("bias",), edit.device), "trained")
        assert anatomy.norm is not None
        norm = edit.module(anatomy.norm.path)
        names = tuple(name for name, _ in norm.named_parameters(recurse=False))
        edit.reweigh(Weight(anatomy.norm.path), Apart(norm, names, edit.device), "trained")

    def calibrate(self, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Method[Any]:
        """One pass of the frozen model over the clouds of ``batches``; what follows it in ``loss`` does not run.

        Raises:
            AdapterError: fewer clouds than are recalled, or the adapter was not active.
        """
        bank = next(e.part for e in adapter.edits if isinstance(e.part, Bank))
        kept = Reservoir(self.config.bank_size)
        bank.watch = kept.add
        try:
            for batch in batches:
                before = kept.seen
                try:
                    with torch.no_grad():
                        loss(batch)
                except Enough:
                    pass
                if kept.seen == before:
                    raise AdapterError("point-peft's adapter took no part in the forward; activate it to calibrate.")
        finally:
            bank.watch = None
        if kept.seen < self.config.recalled:
            raise AdapterError(
                f"point-peft recalls {self.config.recalled} clouds and was calibrated with {kept.seen}; show it more, "
                "or lower num_prompts."
            )
        method = type(self)(self.config.replace(memory=len(kept.rows)))
        method.rows = torch.stack(kept.rows)
        return method


class Reservoir:
    """The rows of a stream, or of more than ``size`` a random subset in which each is equally likely."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.rows: list[Tensor] = []
        self.random = torch.Generator().manual_seed(0)

    def add(self, batch: Tensor) -> None:
        """``batch: [B, D]``."""
        for row in batch.float().cpu():
            self.seen += 1
            if len(self.rows) < self.size:
                self.rows.append(row.clone())
            elif (at := int(torch.randint(self.seen, (), generator=self.random))) < self.size:
                self.rows[at] = row.clone()
