"""SNELL (Shen et al., NeurIPS 2024) and SNELLA (2025): updates from a distance kernel of thin matrices, kept sparse.

    K[o, i] = sum_h c_h * ||P_in[h, i] - P_out[h, o]||_2        c_h = 0.1 * (-1)^h
    Delta = K * max(|K| - t, 0)                                 t: the s-quantile of |K|
    y = x (W + Delta)^T + b                                     P_in: [H, in, r/H]   P_out: [H, out, r/H]

SNELLA widens the kernel, ``K + alpha * softmax_out(K / gamma) + beta``, and moves sparsity between matrices while
training: a matrix whose parameters matter more keeps more entries.

The official code differs: surviving entries are ``K * |K|`` with |K| held constant in the gradient, and at s = 0 SNELL
uses K itself, so that it jumps there (``mode="official"``). Neither mode starts at an identity.

Delta is never kept: it is computed in forward, added to the frozen weight for one product, and computed again in
backward. Dropout and drop path on the branch need a second product while they act.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy, Weight
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.vision.methods.kernel_update import Form, KernelLinear, KernelWeight, split, update

Rows = tuple[int, int]
ROLES = ("q", "k", "v", "o", "fc1", "fc2")


@dataclass(frozen=True)
class SNELLConfig(MethodConfig):
    """SNELL.

    Attributes:
        rank: r; ``r * (in + out)`` parameters a matrix. The paper has 8, 16 and 32.
        sparsity: s, the share of Delta that is zero; chosen per task (0 to 0.995 on VTAB-1k).
        heads: H, kernels whose signs alternate.
        targets: roles of the anatomy; those that a block lacks are left out.
        class_token: train the class token as well, where there is one (the official code does).
        mode: "paper": the formula above; "official": ``K * |K|``, and K itself at s = 0.
        dropout: on the branch's input, all but the attention's output projection. The official scripts have 0.1.
        drop_path: of the branch, per sample. The official scripts have 0.1.
    """

    method: ClassVar[str] = "snell"
    rank: int = 8
    sparsity: float = 0.9
    heads: int = 2
    targets: tuple[str, ...] = ROLES
    class_token: bool = True
    mode: Literal["paper", "official"] = "paper"
    dropout: float = 0.0
    drop_path: float = 0.0

    def validate(self) -> None:
        self.require("heads", self.heads >= 1, "must be at least 1")
        self.require(
            "rank", self.rank >= 1 and self.rank % self.heads == 0, f"must be a multiple of heads={self.heads}"
        )
        self.require("sparsity", 0 <= self.sparsity < 1, "must be at least 0 and below 1")
        self.require("targets", bool(self.targets), "name at least one matrix, for example q")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("drop_path", 0 <= self.drop_path < 1, "must be at least 0 and below 1")


@dataclass(frozen=True)
class SNELLAConfig(SNELLConfig):
    """SNELLA; the fields of :class:`SNELLConfig`, of which ``sparsity`` is where training starts, and the allocator's.

    Attributes:
        target: rho, the share of all entries together that is zero at the end; None switches the allocator off.
        interval: optimizer steps between allocations. The official code allocates once an epoch: 32 is one of
            1000 images at batch 32.
        rounds: T, allocations until the target is reached; in the official code the number of epochs.
        warmup: allocations at the start that change nothing.
        settle: allocations at the end that stay at the target.
        every: act in every so many allocations.
        beta1: decay of the importance's running mean.
        beta2: decay of the running mean of its deviation.
    """

    method: ClassVar[str] = "snella"
    sparsity: float = 0.01
    target: float | None = 0.8
    interval: int = 32
    rounds: int = 100
    warmup: int = 0
    settle: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def validate(self) -> None:
        super().validate()
        self.require("target", self.target is None or 0 <= self.target < 1, "must be at least 0 and below 1, or None")
        for name in ("interval", "rounds", "every"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        inside = self.warmup >= 0 and self.settle >= 0 and self.warmup + self.settle < self.rounds
        self.require("warmup", inside, f"warmup and settle must leave some of the {self.rounds} rounds")


class KernelUpdate(Part):
    """Kernel updates of one Linear layer: of the whole weight, or of slices of a fused one.

    ``inner``: [S, H, in, r/H] for S slices, ``outer``: [H, rows of all slices, r/H]; with a tail ``tail``: [3 S], the
    alpha, gamma and beta of every slice, the buffer ``sparsity``: [S], and the allocator's running means, which files
    leave out.
    """

    foldable = True

    def __init__(
        self, module: nn.Linear, slices: Sequence[Rows | None], config: SNELLConfig, dropout: float, tail: bool
    ) -> None:
        super().__init__()
        self.out, self.fan_in = module.out_features, module.in_features
        self.slices: tuple[Rows, ...] = tuple(sorted((0, self.out) if s is None else s for s in slices))
        self.linear = type(module).forward is nn.Linear.forward
        self.dropout, self.drop_path = dropout, config.drop_path
        self.form = Form(
            tuple(0.1 * (-1.0) ** h for h in range(config.heads)),
            config.mode == "official",
            tail or not (config.mode == "official" and config.sparsity == 0),
            tail,
        )
        h, r = config.heads, config.rank // config.heads
        count, rows = len(self.slices), [stop - start for start, stop in self.slices]
        self.inner = nn.Parameter(torch.empty(count, h, self.fan_in, r))
        self.outer = nn.Parameter(torch.empty(h, sum(rows), r))
        with torch.no_grad():
            for i, outer in enumerate(torch.split(self.outer, rows, dim=1)):
                nn.init.kaiming_uniform_(self.inner[i], a=math.sqrt(5))
                bound = 1 / math.sqrt(outer.shape[1] * r)  # the same rule; a view of strided rows has no other fan-in
                nn.init.uniform_(outer, -bound, bound)
        self.share = config.sparsity
        self.tail = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]).repeat(count)) if tail else None
        if tail:
            self.register_buffer("sparsity", torch.full((count,), config.sparsity))
            for name, like in (("inner", self.inner), ("outer", self.outer)):
                self.register_buffer(f"importance_{name}", torch.zeros(like.shape))
                self.register_buffer(f"deviation_{name}", torch.zeros(like.shape))

    def _points(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """inner, outer, sparsity of every slice, the tail or None."""
        if self.tail is not None:
            return self.inner, self.outer, cast(Tensor, self.sparsity), self.tail
        return self.inner, self.outer, torch.full((len(self.slices),), self.share, device=self.inner.device), None

    def deltas(self) -> list[Tensor]:
        """Delta of every slice, ``[rows, in]``."""
        return [update(self.form, *own)[0] for own in split(self.slices, *self._points())]

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Whether the layer's output can be computed without a Delta that lives until backward."""
        return self.linear and weight is not None and not weight.requires_grad

    def forward(
        self, weight: Tensor, bias: Tensor | None, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None] | Tensor:
        """(W + Delta, bias); with ``x: [..., in]`` the layer's output."""
        if x is None:
            changed: Tensor = KernelWeight.apply(weight, *self._points(), self.form, self.slices)[0]  # type: ignore[no-untyped-call]
            return changed, bias
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(kind)
        bias = None if bias is None else bias.to(kind)
        if not self.training or not (self.dropout or self.drop_path):
            return self._product(x, weight, bias)
        branch = F.dropout(x, self.dropout)
        if self.drop_path:  # scaling a sample's input scales its branch, which has no bias
            keep = 1 - self.drop_path
            branch = branch * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)
        return F.linear(x, weight.to(kind), bias) + self._product(branch, None, None)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y: Tensor = KernelLinear.apply(x, weight, bias, *self._points(), self.form, self.slices, self.out)[0]  # type: ignore[no-untyped-call]
        return y

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + Delta``, exactly."""
        weight = weight.clone()
        for (start, stop), delta in zip(self.slices, self.deltas(), strict=True):
            weight[start:stop] += delta
        return weight, bias

    # ---- allocation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the gradients of a step, and the parameters after it, into the running means."""
        for name, p in (("inner", self.inner), ("outer", self.outer)):
            if p.grad is None:
                continue
            mean, deviation = (cast(Tensor, self._buffers[f"{kind}_{name}"]) for kind in ("importance", "deviation"))
            importance = (p * p.grad).abs_().nan_to_num_(0.0)
            mean.mul_(beta1).add_(importance, alpha=1 - beta1)
            deviation.mul_(beta2).add_((importance - mean).abs_(), alpha=1 - beta2)

    def scores(self) -> list[Tensor]:
        """Of every slice: importance times its deviation, averaged over each side's entries."""
        inner, outer = (
            cast(Tensor, self._buffers[f"importance_{n}"]) * cast(Tensor, self._buffers[f"deviation_{n}"])
            for n in ("inner", "outer")
        )
        rows = torch.split(outer, [stop - start for start, stop in self.slices], dim=1)
        return [i.mean() + o.mean() for i, o in zip(inner, rows, strict=True)]

    def stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Everything but the allocator's running means."""
        return {n: t for n, t in state.items() if not n.startswith(("importance_", "deviation_"))}

    def restore(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The running means begin anew."""
        fresh = [n for n in self._buffers if n.startswith(("importance_", "deviation_"))]
        with torch.device("cpu"):
            return {**tensors, **{n: torch.zeros(cast(Tensor, self._buffers[n]).shape) for n in fresh}}

    def extra_repr(self) -> str:
        return f"in={self.fan_in}, rows={list(self.slices)} of {self.out}"


S = TypeVar("S", bound=SNELLConfig)


class _Kernelised(Method[S], Generic[S]):
    tail: ClassVar[bool]

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=False)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """One part per module; slices of a fused projection share it.

        Raises:
            UnsupportedError: a block has none of the matrices, or one is no Linear layer.
        """
        config = self.config
        for block in anatomy.need_blocks(self.name):
            groups: dict[str, list[Rows | None]] = {}
            for role in config.targets:
                if role in ROLES and role not in block.weights and any(r in block.weights for r in config.targets):
                    continue
                weight = anatomy.need_weight(block, role, self.name)
                groups.setdefault(weight.path, []).append(weight.rows)
            for path, slices in groups.items():
                module = edit.module(path)
                if not isinstance(module, nn.Linear):
                    raise UnsupportedError(f"{self.name} updates Linear layers; {path} is a {type(module).__name__}.")
                dropout = 0.0 if "o" in block.weights and block.weights["o"].path == path else config.dropout
                edit.reweigh(Weight(path), KernelUpdate(module, slices, config, dropout, self.tail), self.name)
        if config.class_token and anatomy.class_token:
            edit.own((anatomy.class_token,))


class SNELL(_Kernelised[SNELLConfig]):
    """``18 d r`` parameters per ViT block: 1,327,872 on ViT-B/16 with r = 8, class token included."""

    config_class = SNELLConfig
    examples = ("snell(rank=4, sparsity=0.5)", "snell(rank=4, sparsity=0.5, mode=official, dropout=0.1, drop_path=0.1)")
    tail = False


class SNELLA(_Kernelised[SNELLAConfig]):
    """SNELL's parameters and three per matrix: 1,328,088 on ViT-B/16 with r = 8."""

    config_class = SNELLAConfig
    examples = ("snella(rank=4, sparsity=0.1, interval=2, rounds=4)",)
    tail = True

    def matrices(self, adapter: Adapter) -> list[tuple[KernelUpdate, int]]:
        """(part, slice) of every matrix, in order."""
        parts = [part for _, part in adapter.parts() if isinstance(part, KernelUpdate)]
        return [(part, i) for part in parts for i in range(len(part.slices))]

    def after_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Observe, and allocate at the end of every interval."""
        if self.config.target is None:
            return
        for part in dict.fromkeys(part for part, _ in self.matrices(adapter)):
            part.observe(self.config.beta1, self.config.beta2)
        if (step + 1) % self.config.interval == 0:
            self.allocate(adapter, (step + 1) // self.config.interval)

    def volume(self, entries: int, t: int) -> int | None:
        """Entries of all matrices together that are not zero after allocation ``t``; None: leave them as they are."""
        c = self.config
        if c.target is None or t <= c.warmup:
            return None
        start, end = (1 - c.sparsity) * entries, (1 - c.target) * entries
        if t > c.rounds - c.settle:
            return int(end)
        left = 1 - (t - c.warmup) / (c.rounds - c.settle - c.warmup)
        return int(end + (start - end) * left**3) if t % c.every == 0 else None

    @torch.no_grad()
    def allocate(self, adapter: Adapter, t: int) -> int | None:
        """Hand out the volume of allocation ``t`` in proportion to the scores, at most each matrix's size.

        What capped matrices leave over goes to the others in the same proportion: first it caps those that it fills.
        """
        matrices = self.matrices(adapter)
        sizes = [(p.slices[i][1] - p.slices[i][0]) * p.fan_in for p, i in matrices]
        volume = self.volume(sum(sizes), t)
        scores = torch.stack([score for part in dict.fromkeys(p for p, _ in matrices) for score in part.scores()])
        total = float(scores.sum())
        if volume is None or not (0 < total < math.inf):
            return None
        weights: list[float] = (scores / scores.sum()).tolist()
        given = [min(size, int(volume * w)) for size, w in zip(sizes, weights, strict=True)]
        while open_ := [k for k, size in enumerate(sizes) if given[k] < size]:
            left, share = volume - sum(given), sum(weights[k] for k in open_)
            more = {k: int(left * weights[k] / share) for k in open_} if share > 0 else {}
            full = [k for k, count in more.items() if given[k] + count >= sizes[k]]
            for k in full or more:
                given[k] = sizes[k] if full else given[k] + more[k]
            if not full:
                break
        for (part, i), size, count in zip(matrices, sizes, given, strict=True):
            cast(Tensor, part.sparsity)[i] = min(max(1 - count / size, 0.0), 1.0)
        return volume
