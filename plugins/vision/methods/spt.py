"""SPT (He et al., ICCV 2023): train what the task is sensitive to, at a budget. SPT-LoRA and SPT-Adapter.

    S_n = sum over batches of (dL/dw_n)^2          for every scalar of the frozen backbone

One pass over a few batches ranks all scalars; those above a threshold are sensitive. A matrix with many of them gets a
LoRA (``y + B A x``) or an adapter (``h + U gelu(D h)`` on its output h; beside the attention's output projection), a
bias or norm vector with many is trained whole, all others are trained one by one:

    matrix       n >= cost / alpha   ->  cost parameters, else n          cost: r (in + out); adapters 2 r out + r + out
    vector       n >= len / beta     ->  len parameters, else n

Calibration (``events(model).calibrate(batches, loss)``, in train mode) measures, allocates and builds the adapter anew;
the plan then is part of the configuration, and chosen positions are in the file. The threshold is where the budget is
spent: a matrix whose module no longer fits is trained entry by entry.

The official code (``official=True``) tries 79 thresholds and keeps the total nearest to the budget, up to a quarter
off; single entries of norms are counted by it but never trained. Its modules start at truncated normals
(``init="official"``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy, Point, Weight
from peft_suite.config import Config, MethodConfig
from peft_suite.edits import functional_of
from peft_suite.errors import AdapterError, ConfigError, UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.methods.lora import LoRAConfig
from peft_suite.methods.lora_parts import Rows
from peft_suite.vision.methods.allocation import Allocation, Site, allocate, allocate_official
from peft_suite.vision.methods.spt_parts import BesideAdapter, BranchLoRA, OutputAdapter, Probe

ROLES = ("q", "k", "v", "o", "fc1", "fc2")
_UNITS = {"k": 1e3, "K": 1e3, "m": 1e6, "M": 1e6}


@dataclass(frozen=True)
class SPTPlan(Config):
    """What calibration decided. Names are those of parameters, with the role in brackets for rows of a fused one.

    Attributes:
        matrices: matrices with a LoRA or an adapter.
        vectors: biases and norm vectors trained whole.
        entries: (parameter, how many of its entries train one by one), whole rows of fused biases included.
        sensitive: entries above the threshold.
        total: trained values without head, as counted against the budget.
        dead: entries that the official code counts and does not train.
    """

    matrices: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    entries: tuple[tuple[str, int], ...] = ()
    sensitive: int = 0
    total: int = 0
    dead: int = 0


@dataclass(frozen=True)
class SPTConfig(MethodConfig):
    """SPT.

    Attributes:
        budget: trained values without head: a number, or text such as "0.4M" or "80k". The paper sweeps 0.2M to 1M
            and keeps the best on validation data.
        rank: r of LoRA or adapter.
        alpha: a matrix with ``n >= cost / alpha`` sensitive entries gets a module.
        beta: a vector with ``n >= len / beta`` sensitive entries is trained whole.
        structured_vector: vectors may be trained whole, and adapters have biases.
        structured_only: leave single entries out.
        batches: of the calibration stream, at most; the official code shows 16 of 32 images.
        init: "zero_up": A (D) Kaiming-uniform(a=sqrt 5), B (U) zero, an identity at the start, as the paper says;
            "official": truncated normal 0.02 for both, what the official code effectively ran.
        official: the official sweep instead of an exactly spent budget; see the module's text.
        sweep_step: of the official sweep, in entries.
        sweep_count: of the official sweep.
        dropout: on the modules' input, all but the attention's output projection. The official scripts have 0.1.
        drop_path: of the modules' branch, per sample. The official scripts have 0.1.
        class_token: train the class token as well, where there is one; it counts.
        targets: roles of the anatomy; those that a block lacks are left out.
        plan: what calibration decided; not for users to set.
    """

    budget: int | float | str = "0.4M"
    rank: int = 8
    alpha: float = 10.0
    beta: float = 5.0
    structured_vector: bool = True
    structured_only: bool = False
    batches: int = 16
    init: Literal["zero_up", "official"] = "zero_up"
    official: bool = False
    sweep_step: int = 20_000
    sweep_count: int = 79
    dropout: float = 0.0
    drop_path: float = 0.0
    class_token: bool = True
    targets: tuple[str, ...] = ROLES
    plan: SPTPlan | None = None

    def validate(self) -> None:
        self.require("budget", self.values >= 1, 'give a number of values such as 400000, or text such as "0.4M"')
        for name in ("rank", "batches", "sweep_step", "sweep_count"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        self.require("alpha", self.alpha >= 1, "must be at least 1")
        self.require("beta", self.beta >= 1, "must be at least 1")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("drop_path", 0 <= self.drop_path < 1, "must be at least 0 and below 1")
        self.require("targets", bool(self.targets), "name at least one matrix, for example v")

    @property
    def values(self) -> int:
        """The budget as a number; 0 for what cannot be read."""
        if not isinstance(self.budget, str):
            return round(self.budget)
        text = self.budget.strip()
        try:
            return round(float(text.rstrip("kKmM")) * _UNITS.get(text[-1:], 1.0))
        except ValueError:
            return 0

    def __str__(self) -> str:
        return super().__str__() if self.plan is None else str(self.replace(plan=None))


@dataclass(frozen=True)
class SPTLoRAConfig(SPTConfig):
    """SPT-LoRA; see :class:`SPTConfig`."""

    method: ClassVar[str] = "spt-lora"


@dataclass(frozen=True)
class SPTAdapterConfig(SPTConfig):
    """SPT-Adapter; see :class:`SPTConfig`."""

    method: ClassVar[str] = "spt-adapter"


C = TypeVar("C", bound=SPTConfig)


class _SPT(Method[C], Generic[C]):
    kind: ClassVar[Literal["lora", "adapter"]]

    def __init__(self, config: C) -> None:
        super().__init__(config)
        self.positions: Mapping[str, Tensor] | None = None  # between allocation and building
        self.certain = 0  # values trained whatever calibration finds
        self.found: list[Site] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            mergeable=self.kind == "lora",
            identity_at_init=self.config.init == "zero_up",
            trains_base_entries=True,
            needs_calibration=self.config.plan is None,
        )

    @property
    def decision(self) -> str:
        plan = self.config.plan
        if plan is None:
            return ""
        single = sum(count for _, count in plan.entries)
        return (
            f"{plan.total:,} values of {self.config.budget}: {len(plan.matrices)} matrices of rank {self.config.rank}, "
            f"{len(plan.vectors)} vectors, {single:,} single entries"
        )

    @property
    def pending(self) -> int:
        """The budget less the class token, before calibration."""
        return max(self.config.values - self.certain, 0) if self.config.plan is None else 0

    # ---- candidates --------------------------------------------------------------------------------------------------

    def sites(self, anatomy: Anatomy, edit: Editor) -> list[Site]:
        """Matrices and vectors in the order of the model's parameters, slices of fused ones apart.

        Raises:
            UnsupportedError: no block has any of the targets as a Linear layer.
        """
        slices: dict[str, list[tuple[str, Rows | None]]] = {}
        for block in anatomy.need_blocks(self.name):
            for role in self.config.targets:
                if role not in ROLES:
                    anatomy.need_weight(block, role, self.name)
                if role in block.weights and block.weights[role].path not in anatomy.read_directly:
                    weight = block.weights[role]
                    slices.setdefault(weight.path, []).append((role, weight.rows))
        stem = {point.path for point in anatomy.stem}
        left_out = {*anatomy.fresh, *anatomy.idle}
        found: list[Site] = []
        for path, module in edit.model.named_modules():
            if path in slices and isinstance(module, nn.Linear):
                for role, rows in sorted(slices[path], key=lambda s: s[1] or (0, 0)):
                    found += self._of_matrix(path, module, role, rows)
            elif path in anatomy.norms and path not in stem and functional_of(module, anatomy.functionals) is not None:
                found += [
                    Site(f"{path}.{n}", path, n, 0, cast(Tensor, module._parameters[n]).numel(), norm=True)
                    for n in ("weight", "bias")
                    if module._parameters.get(n) is not None and f"{path}.{n}" not in left_out
                ]
        if not any(site.role for site in found):
            raise UnsupportedError(
                f"{self.name} works on Linear layers among {', '.join(self.config.targets)}; {anatomy.family} has none."
            )
        return found

    def _of_matrix(self, path: str, module: nn.Linear, role: str, rows: Rows | None) -> list[Site]:
        start, stop = rows or (0, module.out_features)
        out, fan_in, r = stop - start, module.in_features, self.config.rank
        mark = f"[{role}]" if rows else ""
        if self.kind == "lora":
            cost = r * (fan_in + out)
        else:
            cost = r * ((fan_in if role == "o" else out) + out)
            cost += r + out if self.config.structured_vector or self.config.official else 0
        sites = [Site(f"{path}.weight{mark}", path, "weight", start * fan_in, stop * fan_in, role, rows, cost)]
        if module.bias is not None:
            sites.append(Site(f"{path}.bias{mark}", path, "bias", start, stop, "", rows))
        return sites

    # ---- building ----------------------------------------------------------------------------------------------------

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Before calibration probes, afterwards what the plan says.

        Raises:
            UnsupportedError: no Linear layers, or other ones than the plan names.
            ConfigError: a plan without the positions that a file would bring.
        """
        sites = self.found = self.sites(anatomy, edit)
        if self.config.class_token and anatomy.class_token:
            edit.own((anatomy.class_token,))
            path, _, name = anatomy.class_token.rpartition(".")
            self.certain = cast(Tensor, getattr(edit.module(path), name)).numel()
        if self.config.plan is None:
            for path in dict.fromkeys(site.path for site in sites):
                edit.reweigh(Weight(path), Probe(), "probe")
        else:
            self._carry_out(self.config.plan, sites, edit)

    def _carry_out(self, plan: SPTPlan, sites: Sequence[Site], edit: Editor) -> None:
        known = {site.name for site in sites}
        if unknown := sorted({*plan.matrices, *plan.vectors} - known):
            raise UnsupportedError(f"{self.name}'s plan names {unknown[0]!r}, which this model does not have.")
        entries = dict(plan.entries)
        if self.positions is None and entries and edit.device.type != "meta":
            raise ConfigError(
                f"{self.name} cannot start from a plan alone: the positions of its entries are in the adapter's file. "
                "load() it, or leave plan out and calibrate."
            )
        for path in dict.fromkeys(site.path for site in sites):
            index = [
                self._index(f"{path}.{n}", entries[f"{path}.{n}"]) if f"{path}.{n}" in entries else None
                for n in ("weight", "bias")
            ]
            if any(i is not None for i in index):
                edit.select(Weight(path), "sparse", index[0], index[1])
            chosen = [site for site in sites if site.path == path and site.name in plan.matrices]
            if chosen:
                self._attach(edit, path, chosen)
        vectors = {site.name: site for site in sites if site.name in plan.vectors}
        edit.own(n for n, site in vectors.items() if site.rows is None and n not in entries)

    def _index(self, name: str, count: int) -> Tensor:
        with torch.device("cpu"):
            return torch.arange(count) if self.positions is None else self.positions[name]

    def _attach(self, edit: Editor, path: str, chosen: Sequence[Site]) -> None:
        module, config = cast(nn.Linear, edit.module(path)), self.config
        slices = [site.rows for site in chosen]
        point = Point(path, module.out_features)
        dropout = 0.0 if any(site.role == "o" for site in chosen) else config.dropout
        if self.kind == "lora":
            init: Literal["lora", "official"] = "lora" if config.init == "zero_up" else "official"
            lora = LoRAConfig(rank=config.rank, dropout=dropout, init=init)
            shape = (module.out_features, module.in_features)
            edit.beside(point, BranchLoRA(shape, slices, lora, config.drop_path), "lora")
        elif chosen[0].role == "o":
            part = BesideAdapter(module.out_features, slices, module.in_features, config, dropout)
            edit.beside(point, part, "adapter")
        else:
            edit.after(point, OutputAdapter(module.out_features, slices, None, config, dropout), "adapter")

    # ---- calibration -------------------------------------------------------------------------------------------------

    def calibrate(self, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Method[Any]:
        """Measure, allocate, and return the method with its plan."""
        scores = self.measure(adapter, batches, loss)
        return self.planned(self.found, self.allocation(self.found, scores))

    def measure(self, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Accumulated squared gradients by parameter name. The batches are streamed; the head's are not needed.

        Raises:
            AdapterError: no batch, or the adapter was not active.
        """
        probes = {edit.path: edit.part for edit in adapter.edits if isinstance(edit.part, Probe)}
        sums: dict[str, Tensor] = {}
        for probe in probes.values():
            probe.open(True)
        try:
            for batch in itertools.islice(batches, self.config.batches):
                value = loss(batch)
                leaves = {f"{path}.{n}": leaf for path, probe in probes.items() for n, leaf in probe.leaves.items()}
                if not leaves:
                    raise AdapterError(f"{self.name}'s adapter took no part in the loss; activate it to calibrate.")
                found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                for (name, leaf), grad in zip(leaves.items(), found, strict=True):
                    if name not in sums:
                        sums[name] = torch.zeros(leaf.shape, dtype=torch.float32, device=leaf.device)
                    if grad is not None:
                        sums[name].addcmul_(grad.float(), grad.float())
        finally:
            for probe in probes.values():
                probe.open(False)
        if not sums:
            raise AdapterError(f"{self.name} was calibrated without a batch; give it at least one.")
        return sums

    def allocation(self, sites: Sequence[Site], scores: Mapping[str, Tensor]) -> Allocation:
        """What fits the budget.

        Raises:
            ConfigError: the budget does not exceed the class token, or exceeds everything there is.
        """
        config = self.config
        rule = (config.alpha, config.beta, config.structured_vector, config.structured_only)
        values = {site.name: scores[f"{site.path}.{site.tensor}"].view(-1)[site.start : site.stop] for site in sites}
        if config.official:
            steps = [math.ceil(config.sweep_step * 1e-6 * i * 1e6) for i in range(1, config.sweep_count + 1)]
            return allocate_official(sites, values, rule, config.values, steps, self.certain)
        made = allocate(sites, values, rule, config.values - self.certain)
        if made is None:
            raise ConfigError(
                f"{self.name}: a budget of {config.values:,} values cannot be spent: it does not exceed the "
                f"{self.certain:,} of the class token, or exceeds what all modules of rank {config.rank} cost. "
                "Change budget or rank."
            )
        return made

    def planned(self, sites: Sequence[Site], made: Allocation) -> Method[Any]:
        """The method with the plan that an allocation is."""
        config = self.config
        by_name = {site.name: site for site in sites}
        alive = {n: i for n, i in made.entries.items() if not (config.official and by_name[n].norm)}
        single = {} if config.structured_only else alive
        pieces: dict[str, list[Tensor]] = {}
        for name in sorted(single, key=lambda n: by_name[n].start):
            site = by_name[name]
            pieces.setdefault(f"{site.path}.{site.tensor}", []).append(single[name].long().cpu() + site.start)
        for name in made.vectors:
            site = by_name[name]
            # whole rows of a fused bias, and biases beside single weights (one part a layer keeps the layer lean)
            if site.rows is not None or (not site.norm and f"{site.path}.weight" in pieces):
                key = f"{site.path}.{site.tensor}"
                pieces.setdefault(key, []).append(torch.arange(site.start, site.stop, device="cpu"))
        positions = {n: torch.cat(p).sort().values for n, p in pieces.items()}
        dead = sum(i.numel() for n, i in made.entries.items() if n not in alive)
        plan = SPTPlan(
            tuple(made.matrices),
            tuple(made.vectors),
            tuple((n, i.numel()) for n, i in positions.items()),
            made.sensitive,
            made.total + (0 if config.official else self.certain),
            dead,
        )
        method = type(self)(config.replace(plan=plan))
        method.positions = positions
        return method


class SPTLoRA(_SPT[SPTLoRAConfig]):
    """LoRA on sensitive matrices, single entries elsewhere. Folds into the weights."""

    config_class = SPTLoRAConfig
    examples = (
        "spt-lora(budget=700, rank=2)",
        "spt-lora(budget=700, rank=2, official=True, sweep_step=20, init=official, dropout=0.1, drop_path=0.1)",
    )
    kind = "lora"


class SPTAdapter(_SPT[SPTAdapterConfig]):
    """Adapters after sensitive matrices, single entries elsewhere."""

    config_class = SPTAdapterConfig
    examples = ("spt-adapter(budget=700, rank=2)",)
    kind = "adapter"
