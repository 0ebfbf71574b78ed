"""LT-SFT, lottery-ticket sparse fine-tuning (Ansell et al., ACL 2022): train all, then only what moved most.

    1.  W1 = all weights trained for ``steps`` steps from W0
    2.  M  = the k entries of largest |W1 - W0|, over all tensors together
    3.  back to W0; train the entries of M alone

Phase 1 is the method's calibration: ``peft-suite diffusion train`` runs both phases in one run. It holds a trained
copy, a gradient and two moments of every weight: the memory of full fine-tuning, by construction. That is what this
method is a baseline for. Left out of the published procedure: rounds of selection, L1 terms.

Two adapters of one base add up: their changes are sparse differences, summed where they meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy, Weight
from peft_suite.config import Config, MethodConfig
from peft_suite.diffusion.methods.sparse_values import amount, attach, selectable, smallest
from peft_suite.edits import Part, Trained
from peft_suite.errors import (
    AdapterError,
    ConfigError,
    FileFormatError,
    KernelArgumentError,
    TrainingError,
    UnsupportedError,
)
from peft_suite.kernels.api.selection import select_topk
from peft_suite.kernels.api.sparse import check_index, sparse_delta
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class LTSFTPlan(Config):
    """What phase 1 decided: (parameter, how many of its entries train)."""

    entries: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class LTSFTConfig(MethodConfig):
    """LT-SFT.

    Attributes:
        share: of all entries, those that moved most; the paper's code has 0.01.
        budget: number of entries instead of a share: 5000000, "5M" or "250k". Met exactly.
        steps: of phase 1. The paper gives both phases the same schedule: as many as the run has.
        lr: of phase 1, AdamW without weight decay, falling linearly to zero. Phase 2 follows the recipe.
        masking: "sparse": phase 2 holds gradients and moments of the chosen entries alone; "dense": of every weight,
            with the gradient masked, as published. Both train alike; dense parameters count as trained, all of them.
        form: of files: "exact", 8 bytes an entry, or "compact", 4 bytes with values rounded to 11 bits (sparse only).
        plan: what phase 1 decided; not for users to set.
    """

    method: ClassVar[str] = "lt-sft"
    share: float = 0.01
    budget: int | float | str | None = None
    steps: int = 100
    lr: float = 1e-4
    masking: Literal["sparse", "dense"] = "sparse"
    form: Literal["exact", "compact"] = "exact"
    plan: LTSFTPlan | None = None

    def validate(self) -> None:
        self.require("share", 0 < self.share <= 1, "must be above 0 and at most 1")
        if self.budget is not None:
            amount(self, "budget")
        self.require("steps", self.steps >= 1, "must be at least 1")
        self.require("lr", 0 < self.lr < math.inf, "must be above 0")
        self.require("form", self.form == "exact" or self.masking == "sparse", "dense masking has the exact form alone")

    def __str__(self) -> str:
        return super().__str__() if self.plan is None else str(self.replace(plan=None))


class Copies(Trained):
    """Trained copies of a module's whole weight and bias, for phase 1."""


class Masked(Part):
    """``W + v`` at chosen entries, with a parameter, a gradient and moments as large as W: dense masking.

    ``<name>`` v in float32, without effect where nothing was chosen; ``<name>_index`` (E,) the chosen positions. A file
    holds positions and changes, 8 bytes an entry.
    """

    foldable = True
    scalable = True
    decay = False

    def __init__(self, module: nn.Module, positions: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self.shapes = {n: cast(Tensor, module._parameters[n]).shape for n in positions}
        for name, index in positions.items():
            shape = self.shapes[name]
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))
            narrow = torch.int32 if shape.numel() < 2**31 else torch.int64
            self.register_buffer(f"{name}_index", index.to(device=device, dtype=narrow))
        self.replaces = sum(p.numel() for p in self.parameters())

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both with the changes added; the gradient of v is the dense one, masked."""
        return self._changed("weight", weight), self._changed("bias", bias)

    def _changed(self, name: str, base: Tensor | None) -> Tensor | None:
        if base is None or name not in self.shapes or self.strength == 0.0:
            return base
        own, index = cast(Tensor, self._parameters[name]), cast(Tensor, self._buffers[f"{name}_index"])
        return sparse_delta(base, own.reshape(-1).index_select(0, index.long()) * self.strength, index)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the changes."""
        return cast("tuple[Tensor, Tensor | None]", self(weight, bias))

    def stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Positions and their changes."""
        kept: dict[str, Tensor] = {}
        for n in self.shapes:
            index = state[f"{n}_index"]
            kept |= {f"{n}_index": index, f"{n}_values": state[n].reshape(-1).index_select(0, index.long())}
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The dense form.

        Raises:
            FileFormatError: positions that the tensor does not have.
        """
        state = dict(tensors)
        for n, shape in self.shapes.items():
            index, values = state.get(f"{n}_index"), state.pop(f"{n}_values", None)
            if index is None or values is None:
                continue
            try:
                check_index(index, shape.numel())
            except KernelArgumentError as error:
                raise FileFormatError(
                    f"Chosen entries in the file do not fit a tensor of {shape.numel()} values: {error}"
                ) from error
            with torch.device("cpu"):
                state[n] = values.new_zeros(shape.numel()).index_copy(0, index.long(), values).view(shape)
        return state

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the number of entries that a file has."""
        for buffer in [f"{n}_index" for n in self.shapes if f"{n}_index" in tensors]:
            old = cast(Tensor, self._buffers[buffer])
            self._buffers[buffer] = torch.empty_like(tensors[buffer], device=old.device)


class LTSFT(Method[LTSFTConfig]):
    """Copies of all weights before calibration, chosen entries after it. Folds into the weights."""

    config_class = LTSFTConfig
    examples = ("lt-sft(share=0.2, steps=3, lr=0.01)",)

    def __init__(self, config: LTSFTConfig) -> None:
        super().__init__(config)
        self.positions: Mapping[str, Tensor] | None = None  # between phase 1 and building
        self.owners: dict[str, nn.Module] = {}  # of what may be chosen; modules, for their weights may move

    @property
    def capabilities(self) -> Capabilities:
        before = self.config.plan is None
        return Capabilities(
            mergeable=True, trains_base_entries=True, needs_calibration=before, calibrates_on_all=before
        )

    @property
    def decision(self) -> str:
        plan = self.config.plan
        if plan is None:
            return ""
        count = sum(n for _, n in plan.entries)
        return f"{count:,} entries in {len(plan.entries)} tensors moved most in {self.config.steps} steps"

    def count(self, entries: int) -> int:
        """How many of all entries are chosen."""
        config = self.config
        return max(1, round(config.share * entries)) if config.budget is None else amount(config, "budget")

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Trained copies of every weight, or, after phase 1, the chosen entries.

        Raises:
            UnsupportedError: nothing can be reached, a budget above all there is, or other parameters than the plan's.
            ConfigError: a plan without the positions that a file would bring.
        """
        frozen, _ = selectable(anatomy, edit)
        if not frozen:
            raise UnsupportedError(f"lt-sft finds no weights on {anatomy.family} whose entries it could choose.")
        plan = self.config.plan
        if plan is None:
            entries = sum(t.numel() for t in frozen.values())
            if self.count(entries) > entries:
                smallest(frozen, self.count(entries), self.name)  # says so
            self.owners = {n: edit.module(n.rpartition(".")[0]) for n in frozen}
            whole: dict[str, tuple[str, ...]] = {}
            for path, _, name in (n.rpartition(".") for n in frozen):
                whole[path] = (*whole.get(path, ()), name)
            for path, names in whole.items():
                edit.reweigh(Weight(path), Copies(edit.module(path), names, edit.device), "phase_1")
            return
        if self.positions is None and edit.device.type != "meta":
            raise ConfigError(
                "lt-sft cannot start from a plan alone: the positions of its entries are in the adapter's file. load() "
                "it, or leave plan out and calibrate."
            )
        if unknown := [n for n, _ in plan.entries if n not in frozen]:
            raise UnsupportedError(f"lt-sft's plan names {unknown[0]!r}, which this model does not have.")
        with torch.device("cpu"):
            chosen = {n: torch.arange(count) for n, count in plan.entries} if self.positions is None else self.positions
        planned = {n: frozen[n] for n, _ in plan.entries}
        if self.config.masking == "sparse":
            attach(edit, planned, chosen, "lt_sft", form=self.config.form, settling=False)
            return
        sites: dict[str, dict[str, Tensor]] = {}
        for full in planned:
            path, _, name = full.rpartition(".")
            sites.setdefault(path, {})[name] = chosen[full]
        for path, index in sites.items():
            edit.reweigh(Weight(path), Masked(edit.module(path), index, edit.device), "lt_sft")

    # ---- phase 1 -----------------------------------------------------------------------------------------------------

    def calibrate(self, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Method[Any]:
        """Run phase 1 over ``batches``, again and again, and return the method with its plan.

        Raises:
            AdapterError: there is no batch, or the adapter took no part.
            TrainingError: the loss is not finite.
        """
        copies = {
            f"{edit.path}.{n}" if edit.path else n: cast(Tensor, p)
            for edit in adapter.edits
            if isinstance(edit.part, Trained)
            for n, p in edit.part._parameters.items()
        }
        head = {n: p.detach().clone() for n, p in copies.items() if n not in self.owners}
        moved = {n: copies[n] for n in self.owners if n in copies}
        optimizer = torch.optim.AdamW(list(copies.values()), lr=self.config.lr, weight_decay=0.0)
        for step, batch in enumerate(self._stream(batches)):
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * (1 - step / self.config.steps)
            value = loss(batch)
            if not math.isfinite(value.item()):
                raise TrainingError(
                    f"lt-sft: the loss of phase 1 is {value.item()} at step {step + 1} of {self.config.steps}. Use a "
                    "lower lr of the method, precision='no', and look for broken samples."
                )
            if not value.requires_grad:
                raise AdapterError("lt-sft's adapter took no part in the loss; activate it to calibrate.")
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        def movement(name: str, copy: Tensor) -> Tensor:
            start = self.owners[name]._parameters[name.rpartition(".")[2]]
            assert start is not None
            return (copy - start.to(copy.dtype)).abs()

        chosen = select_topk(moved, self.count(sum(t.numel() for t in moved.values())), score=movement)
        with torch.no_grad():
            for name, start in head.items():
                copies[name].copy_(start)
        chosen = {n: index for n, index in chosen.items() if index.numel()}
        plan = LTSFTPlan(tuple((n, index.numel()) for n, index in chosen.items()))
        method = type(self)(self.config.replace(plan=plan))
        method.positions = chosen
        return method

    def _stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        done = 0
        while done < self.config.steps:
            before = done
            for batch in batches:
                yield batch
                done += 1
                if done == self.config.steps:
                    return
            if done == before:
                raise AdapterError(
                    f"lt-sft was calibrated with {done} batches and phase 1 needs {self.config.steps}: give as many, "
                    "or batches that can be gone through again, such as a list or a DataLoader."
                )
