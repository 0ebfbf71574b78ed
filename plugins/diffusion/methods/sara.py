"""SaRA (Hu et al., ICLR 2025): train the weights that are nearly zero, and nothing else.

    M = |W| < theta                       over all tensors together, strictly
    p = W[M]                              trained; all other weights keep their bits
    L + lambda * ||W o M||_*              of one matrix drawn at each step

Weights near zero can be set to zero with hardly any loss: they are free capacity. ``theta`` is given, or follows from a
share or a number of entries. The nuclear norm keeps the learned change of low rank; its gradient ``(U V^T)[M]`` joins
the step, not the logged loss. Part of the way, ``progressive`` looks again: entries that have left the neighbourhood of
zero settle at their learned value, the others train on.

Only the gradient of chosen entries outlives a layer's backward, so gradients and moments are as many as they are.

``official=True`` is the published optimizer instead: it starts from ``|p|`` (not the frozen model; the gradient of the
first step is taken there and applied to p), at ``progressive`` it starts from ``|p|`` again, restarts the optimizer's
state and makes no update, and its nuclear norm has no effect. Its dense variant is the default here.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils.hooks import RemovableHandle

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.diffusion.methods.sparse_values import (
    Entries,
    SparseValues,
    amount,
    attach,
    entries_of,
    selectable,
    smallest,
)
from peft_suite.errors import ConfigError, UnsupportedError
from peft_suite.kernels.api.selection import kth_value, select_below
from peft_suite.method import Capabilities, Editor, Method

FEWEST = 101  # chosen entries of a matrix whose nuclear norm counts; the official code leaves smaller ones out


@dataclass(frozen=True)
class SaRAConfig(MethodConfig):
    """SaRA. Give one of ``threshold``, ``quantile`` and ``budget``.

    Attributes:
        threshold: theta; entries with ``|W| < theta`` train. On Stable Diffusion 1.5, 2e-4, 8e-4 and 2e-3 are about 5,
            20 and 50 million.
        quantile: share of all entries, smallest first.
        budget: number of entries, smallest first: 5000000, "5M" or "250k". Met exactly.
        rank_weight: lambda of the nuclear norm; 0 switches it off. The paper's, its script has 5e-4.
        rank_min: matrices with ``min(shape) > rank_min`` take part; convolutions never do.
        progressive: when to look again: a share of the run, half of it in the paper (a loop of your own then calls
            ``events(model).begin(steps)``), or a step; None: never.
        reset_state: forget the optimizer's state of all entries then, as the published optimizer does.
        skip_step: make no update in that step, as it does.
        weight_decay: of the learned values p themselves, decoupled as in AdamW; the paper's default. It acts through
            ``events(model)`` and only where the optimizer's own decay is 0; an optimizer's own decay pulls p towards W.
        form: of files: "exact", 8 bytes an entry, or "compact", 4 bytes with values rounded to 11 bits.
        official: the published optimizer; see the module's text.
        seed: of the draws of matrices, which depend on it and the step alone.
    """

    method: ClassVar[str] = "sara"
    threshold: float | None = None
    quantile: float | None = None
    budget: int | float | str | None = None
    rank_weight: float = 5e-3
    rank_min: int = 64
    progressive: int | float | None = 0.5
    reset_state: bool = False
    skip_step: bool = False
    weight_decay: float = 0.01
    form: Literal["exact", "compact"] = "exact"
    official: bool = False
    seed: int = 0

    def validate(self) -> None:
        given = [n for n in ("threshold", "quantile", "budget") if getattr(self, n) is not None]
        self.require(given[-1] if given else "threshold", len(given) < 2, f"give one of {' and '.join(given)}")
        self.require("threshold", self.threshold is None or 0 < self.threshold < math.inf, "must be above 0")
        self.require("quantile", self.quantile is None or 0 < self.quantile <= 1, "must be above 0 and at most 1")
        if self.budget is not None:
            amount(self, "budget")
        self.require("rank_weight", self.rank_weight >= 0, "must not be negative")
        self.require("rank_min", self.rank_min >= 0, "must not be negative")
        self.require("weight_decay", self.weight_decay >= 0, "must not be negative")
        at = self.progressive
        right = at is None or (not isinstance(at, bool) and (at >= 1 if isinstance(at, int) else 0 < at < 1))
        self.require("progressive", right, "give a step from 1, a share between 0 and 1 such as 0.5, or None")


class SaRA(Method[SaRAConfig]):
    """One part a layer with chosen entries. Folds into the weights.

    Attributes:
        left_out: names of parameters whose entries cannot be chosen; known after building.
    """

    config_class = SaRAConfig
    examples = ("sara(quantile=0.5, rank_weight=0.05, rank_min=4, progressive=2)",)

    def __init__(self, config: SaRAConfig) -> None:
        super().__init__(config)
        self.left_out: tuple[str, ...] = ()
        self.found = ""  # what was chosen, for people
        self.total: int | None = None  # steps of the run
        self.without_weights = False
        self.sizes = 0  # entries there are
        self.parked: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # (values, settled, what they keep)
        self.hook: RemovableHandle | None = None  # at the optimizer's next step
        self.looked = False  # again, in this step

    @staticmethod
    def learning_rate(threshold: float) -> float:
        """``1e-3 exp(-350 theta)``, the paper's rate; fitted on Stable Diffusion 1.5 and far too small for tiny models.

        2e-4: 9.3e-4; 8e-4: 7.6e-4; 2e-3: 5.0e-4; 5e-3: 1.7e-4.
        """
        return 1e-3 * math.exp(-350.0 * threshold)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=not self.config.official, trains_base_entries=True)

    @property
    def decision(self) -> str:
        return self.found

    @property
    def pending(self) -> int:
        """The entries that will be chosen, where a plan is made without weights; a threshold then tells nothing."""
        return self._count() or 0 if self.without_weights else 0

    def _count(self) -> int | None:
        config = self.config
        if config.budget is not None:
            return amount(config, "budget")
        return None if config.quantile is None else round(config.quantile * self.sizes)

    # ---- building ----------------------------------------------------------------------------------------------------

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Choose the entries, one part for every layer that has some.

        Raises:
            ConfigError: none of threshold, quantile and budget is given.
            UnsupportedError: no layer can be reached, a budget above all there is, a threshold below everything, NaN,
                weights that are not loaded.
        """
        config = self.config
        if config.threshold is None and config.quantile is None and config.budget is None:
            raise ConfigError(
                "sara needs to know what to train: give threshold (sara(threshold=8e-4)), quantile, a share of all "
                'weights (sara(quantile=0.05)), or budget, a number of them (sara(budget="5M")).'
            )
        tensors, left = selectable(anatomy, edit)
        self.left_out, self.sizes = tuple(left), sum(t.numel() for t in tensors.values())
        if not tensors:
            raise UnsupportedError(f"sara finds no weights on {anatomy.family} whose entries it could choose.")
        self.without_weights = not edit.stored and any(t.is_meta or is_fake(t) for t in tensors.values())
        if edit.stored:
            chosen: dict[str, Tensor] = {}  # the file has them
        elif self.without_weights:
            if edit.device.type != "meta":
                raise UnsupportedError("sara cannot rank weights that are not loaded. Load them first, then adapt.")
            if (self._count() or 0) > self.sizes:
                smallest(tensors, self._count() or 0, self.name)  # says so
            if config.threshold is not None:
                warnings.warn(
                    "How many weights lie below the threshold is unknown before they are loaded; they are not counted.",
                    stacklevel=2,
                )
            chosen = {}
        else:
            with torch.device("cpu"):
                chosen = self.choose(tensors)
        settling = config.progressive is not None
        for part in attach(edit, tensors, chosen, "sara", form=config.form, settling=settling):
            if config.official:
                part.keep(compact=part.compact, mirrored=True)
        self.found = "" if edit.stored else self._told(chosen, left)

    def choose(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> chosen positions of every tensor."""
        config = self.config
        count = self._count()
        if count is not None:
            return smallest(tensors, max(count, 1), self.name)
        assert config.threshold is not None
        for name, tensor in tensors.items():
            if bool(tensor.isnan().any()):
                raise UnsupportedError(f"sara cannot rank the weights of this model: {name} holds NaN.")
        chosen = select_below(tensors, config.threshold)
        if not any(index.numel() for index in chosen.values()):
            known = []
            for share in (0.01, 0.05, 0.1):
                k = max(1, round(share * self.sizes))
                known.append(f"{100 * share:g} % lie up to {kth_value(tensors, k, largest=False).value:.3g}")
            raise UnsupportedError(
                f"sara: no weight of this model is below the threshold {config.threshold:g}. Of its {self.sizes:,} "
                f"entries {', '.join(known)}. Choose a larger threshold, or a share: sara(quantile=0.05)."
            )
        return chosen

    def _told(self, chosen: Mapping[str, Tensor], left: list[str]) -> str:
        count = sum(index.numel() for index in chosen.values())
        rest = f"; not to be reached: {', '.join(left[:4])}{f' and {len(left) - 4} more' if left[4:] else ''}"
        tensors = sum(bool(index.numel()) for index in chosen.values())
        return f"{count:,} of {self.sizes:,} entries in {tensors} tensors{rest if left else ''}"

    def threshold(self, adapter: Adapter) -> float:
        """theta: what was given, or the smallest float32 above the magnitude of every entry that was chosen."""
        if self.config.threshold is not None:
            return self.config.threshold
        tops = [e.part.base(e.tensor).abs().max() for e in entries_of(adapter) if e.values.numel()]
        top = torch.stack([t.float().cpu() for t in tops]).max()
        return float(torch.nextafter(top, torch.tensor(math.inf)))

    # ---- training ----------------------------------------------------------------------------------------------------

    def begin(self, adapter: Adapter, steps: int) -> None:
        """Note the length of the run, for a share of it."""
        self.total = steps

    def look_again(self) -> int | None:
        """The step (from 0) that begins with a second look.

        Raises:
            ConfigError: a share of a run whose length nobody has told.
        """
        at = self.config.progressive
        if at is None or isinstance(at, int):
            return at
        if self.total is None:
            raise ConfigError(
                f"SaRAConfig.progressive = {at} is a share of the run, and its length is not known. Call "
                "peft_suite.events(model).begin(steps) before the first step, or give a step, such as progressive=2500."
            )
        return max(1, round(at * self.total))

    @torch.no_grad()
    def before_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Look again where it is time, and prepare the step: settled entries have no gradient, decay and rank term wait
        until the optimizer steps, after clipping and only if it does (a loss scaler may skip it)."""
        config, entries = self.config, list(entries_of(adapter))
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._disarm()
        self.looked = step == self.look_again()
        if self.looked:
            self.reselect(adapter)
            if config.reset_state or config.official:
                for e in entries:
                    optimizer.state.pop(e.values, None)
        self.parked = []
        for e in entries:
            settled = e.part.settled(e.tensor)
            if settled is not None and bool(settled.any()):
                self.parked.append((e.values, settled, e.values[settled].clone()))
                if e.values.grad is not None:
                    e.values.grad.masked_fill_(settled, 0.0)
        rank = config.rank_weight and not config.official
        drawn = self.draw(step, [e for e in entries if self.eligible(e)]) if rank else None
        if self.looked and (config.skip_step or config.official):
            for e in entries:
                e.values.grad = None
        else:
            self._arm(optimizer, entries, drawn)

    def _arm(self, optimizer: torch.optim.Optimizer, entries: list[Entries], drawn: Entries | None) -> None:
        """Decay and rank term at the optimizer's next step, once."""

        def act(*_: Any) -> None:
            with torch.no_grad():
                self._decay(optimizer, entries)
                if drawn is not None:
                    self._add_rank(drawn)

        self.hook = optimizer.register_step_pre_hook(act)

    def _disarm(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = None

    def _decay(self, optimizer: torch.optim.Optimizer, entries: list[Entries]) -> None:
        """``p <- p (1 - lr wd)``, that is ``v <- v - lr wd (W + v)``."""
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        for e in entries:
            group = groups.get(id(e.values))
            if group is not None and not group.get("weight_decay") and self.config.weight_decay:
                e.values.sub_(e.part.learned(e.tensor), alpha=float(group["lr"]) * self.config.weight_decay)

    @torch.no_grad()
    def after_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Settled entries keep their value, whatever momentum or decay made of it."""
        self._disarm()
        for values, settled, kept in self.parked:
            values[settled] = kept
        self.parked = []
        if self.config.official:
            for part in dict.fromkeys(e.part for e in entries_of(adapter)):
                part._buffers["mirrored"].fill_(int(self.looked))  # type: ignore[union-attr]

    @torch.no_grad()
    def reselect(self, adapter: Adapter) -> int:
        """Settle the entries that are no longer below theta; returns how many train on."""
        theta, left = self.threshold(adapter), 0
        for e in entries_of(adapter):
            settled = e.part.settled(e.tensor)
            gone = ~(e.part.learned(e.tensor).abs() < theta)
            settled = gone if settled is None else settled | gone
            e.part.settle(e.tensor, settled)
            left += int((~settled).sum())
        return left

    # ---- rank --------------------------------------------------------------------------------------------------------

    def eligible(self, entries: Entries) -> bool:
        """Whether the nuclear norm of this tensor takes part: a matrix that is large enough."""
        shape = tuple(entries.part.owner[0]._parameters[entries.tensor].shape)  # type: ignore[union-attr]
        return len(shape) == 2 and min(shape) > self.config.rank_min

    def draw(self, step: int, matrices: list[Entries]) -> Entries | None:
        """One matrix at random, all alike; the same for the same seed and step."""
        return random.Random(f"{self.config.seed}/{step}").choice(matrices) if matrices else None

    def _add_rank(self, entries: Entries) -> None:
        gradient = self.rank_gradient(entries.part, entries.tensor)
        if gradient is not None:
            own = entries.values.grad
            term = self.config.rank_weight * gradient.to(entries.values.dtype)
            entries.values.grad = term if own is None else own + term

    def rank_gradient(self, part: SparseValues, name: str = "weight") -> Tensor | None:
        """``(U V^T)[M]`` (E,) of the nuclear norm of ``W o M``, M the entries that still train; None for too few.

        Directions of singular value zero, where any subgradient would do, are left out.
        """
        weight = part.owner[0]._parameters[name]
        assert weight is not None
        settled, index = part.settled(name), part.positions(name).long()
        live = torch.ones_like(index, dtype=torch.bool) if settled is None else ~settled
        if int(live.sum()) < FEWEST:
            return None
        matrix = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        matrix.view(-1)[index[live]] = part.learned(name)[live].float()
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        kept = s > s[0] * max(weight.shape) * torch.finfo(s.dtype).eps
        gradient: Tensor = ((u * kept) @ vt).view(-1)[index] * live
        return gradient
