"""Adapters on a model: the container ``model.adapters``, one :class:`Adapter` per name, and the resident objects."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy
from peft_suite.edits import (
    After,
    BatchStatistics,
    Before,
    Beside,
    Edit,
    EvalPin,
    Part,
    Reweigh,
    Shadow,
    copies_first,
    functional_of,
)
from peft_suite.errors import AdapterError, AdapterNameError, UnknownNameError, closest
from peft_suite.method import Method

__all__ = ["Adapter", "Adapters", "adapters_of"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class _Branch(nn.Module):
    """A nameless level of the tree that gives adapter tensors the key of the module they act on."""


class Adapter(nn.Module):
    """One named adapter: the method that built it and its parts. Its state dict is its file.

    Attributes:
        method: the method with its configuration; events go through it.
        edits: what is attached where.
    """

    def __init__(self, name: str, method: Method[Any], edits: Iterable[Edit]) -> None:
        super().__init__()
        self.name, self.method = name, method
        self.edits: tuple[Edit, ...] = tuple(edits)
        for edit in self.edits:
            node: nn.Module = self
            *path, last = edit.key.split(".")
            for segment in path:
                node = node._modules.setdefault(segment, _Branch())  # type: ignore[assignment]
            node._modules[last] = edit.part

    def extra_repr(self) -> str:
        return str(self.method.config)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """(key, part) in the order in which the method recorded them."""
        for edit in self.edits:
            yield edit.key, edit.part

    def stored(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Tensor]:
        """The tensors of this adapter's file; ``whole`` gathers sharded ones."""
        return {
            f"{key}.{name}": tensor
            for key, part in self.parts()
            for name, tensor in part.stored({n: whole(t) for n, t in part.state_dict().items()}).items()
        }

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Let every part take over the learned sizes of its tensors; see :meth:`peft_suite.edits.Part.adopt`."""
        for key, part in self.parts():
            part.adopt(_below(key, tensors))

    def no_decay(self) -> set[str]:
        """Names of parameters (relative to the adapter) that weight decay should leave alone: vectors and prompts."""
        return {
            f"{key}.{name}"
            for key, part in self.parts()
            for name, parameter in part.named_parameters()
            if not part.decay or parameter.ndim < 2
        }

    def calibrate(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Method[Any] | None:
        """See :meth:`peft_suite.Method.calibrate`."""
        return self.method.calibrate(self, batches, loss)

    def begin(self, steps: int) -> None:
        """See :meth:`peft_suite.Method.begin`."""
        self.method.begin(self, steps)

    def penalty(self) -> Tensor | None:
        """See :meth:`peft_suite.Method.penalty`."""
        return self.method.penalty(self)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """See :meth:`peft_suite.Method.before_step`."""
        self.method.before_step(self, step, optimizer)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """See :meth:`peft_suite.Method.after_step`."""
        self.method.after_step(self, step, optimizer)

    def finish(self) -> None:
        """See :meth:`peft_suite.Method.finish`."""
        self.method.finish(self)


class Adapters(nn.Module):
    """``model.adapters``: adapters by name, in the order of their creation, and everything that is resident."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.anatomy = anatomy
        self.active: tuple[str, ...] = ()
        self.frozen: dict[str, bool] = {n: p.requires_grad for n, p in model.named_parameters()}
        self._resident: dict[tuple[str, str], Before | After | Beside | Reweigh | Shadow] = {}
        self._pins: list[EvalPin] = []

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._modules:
            raise UnknownNameError("adapter", name, self._modules)
        return self._modules[name]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """(name, adapter) pairs."""
        for name in self._modules:
            yield name, self[name]

    def attach(self, model: nn.Module, adapter: Adapter) -> None:
        """Register an adapter and install what is not resident yet; nothing is active until :meth:`switch`."""
        modules = dict(model.named_modules())
        self._modules[adapter.name] = adapter
        for edit in adapter.edits:
            self._install(modules[edit.path], edit)
        for path, module in modules.items():
            frozen = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
            if frozen and not path.startswith("adapters."):
                self._install(module, Edit("reweigh", path, "", Part()))
        if adapter.method.capabilities.backbone_eval and not self._pins:
            self._pins = [
                EvalPin(m) for path, m in model.named_children() if path != "adapters" and not self.is_head(path, m)
            ]
        _forget_compiled()

    def is_head(self, path: str, module: nn.Module) -> bool:
        """Whether all parameters of a child of the model are fresh: its dropout and batch norm train with them."""
        names = [f"{path}.{n}" for n, _ in module.named_parameters()]
        return bool(names) and set(names) <= set(self.anatomy.fresh)

    def replace(self, model: nn.Module, adapter: Adapter) -> None:
        """Put a newly built adapter in the place of the one of its name; what was active stays so."""
        active = self.active
        self.switch(tuple(n for n in active if n != adapter.name))
        self.attach(model, adapter)
        self.switch(active)

    def _install(self, module: nn.Module, edit: Edit) -> None:
        key = (edit.path, _SIDE[edit.kind])
        if key in self._resident:
            return
        if edit.kind == "before":
            self._resident[key] = Before(module, edit.argument)
        elif edit.kind in ("after", "beside"):
            self._resident[key] = After(module, edit.argument, edit.output)
        elif edit.kind in ("branch", "inside"):
            self._resident[key] = Beside(module, self.anatomy.block_forwards[type(module).forward])
        elif edit.kind == "shadow":
            self._resident[key] = Shadow(module)
        else:
            function = functional_of(module, self.anatomy.functionals)
            if function is None:
                raise AdapterError(f"The forward of {type(module).__name__} at {edit.path} is not known.")
            self._resident[key] = Reweigh(module, function)

    def switch(self, names: tuple[str, ...]) -> None:
        """Make exactly ``names`` active, in this order. Only tuples are replaced."""
        table: dict[tuple[str, str], list[Edit]] = {key: [] for key in self._resident}
        for name in names:
            for edit in self[name].edits:
                table[edit.path, _SIDE[edit.kind]].append(edit)
        table = {key: copies_first(edits) for key, edits in table.items()}
        for key, edits in table.items():
            resident = self._resident[key]
            parts = tuple(e.part for e in edits)
            if isinstance(resident, After):
                resident.active = tuple((e.kind == "beside", e.part) for e in edits)
            elif isinstance(resident, Beside):
                resident.active = tuple((e.branch, e.normed, e.part) for e in edits)
            elif isinstance(resident, Shadow):
                resident.show(parts)
            elif isinstance(resident, Reweigh):
                resident.statistics = next((p for p in reversed(parts) if isinstance(p, BatchStatistics)), None)
                resident.active = tuple(p for p in parts if not isinstance(p, BatchStatistics))
            else:
                resident.active = parts
        self.active = names
        for pin in self._pins:
            pin.switch(any(self[n].method.capabilities.backbone_eval for n in names))

    def detach(self, model: nn.Module, names: Iterable[str]) -> None:
        """Take adapters away; with the last one the model is as it was before the first."""
        gone = set(names)
        self.switch(tuple(n for n in self.active if n not in gone))
        for name in gone:
            del self._modules[name]
        needed = {(e.path, _SIDE[e.kind]) for _, a in self.items() for e in a.edits}
        for key in [k for k in self._resident if k not in needed and (not self._modules or k[1] != "reweigh")]:
            self._uninstall(self._resident.pop(key))
        if not any(a.method.capabilities.backbone_eval for _, a in self.items()):
            for pin in self._pins:
                pin.module.__dict__.pop("train", None)
            self._pins = []
        if not self._modules:
            self._restore(model)
        _forget_compiled()

    @staticmethod
    def _uninstall(resident: Before | After | Beside | Reweigh | Shadow) -> None:
        if isinstance(resident, Before | After):
            resident.handle.remove()
        elif isinstance(resident, Beside):
            resident.block.__dict__.pop("forward", None)
        elif isinstance(resident, Reweigh):
            resident.module.__dict__.pop("forward", None)

    def _restore(self, model: nn.Module) -> None:
        del model._modules["adapters"]
        for name, parameter in model.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(self.frozen[name])


# Kinds that share one resident object per module.
_SIDE = {
    "before": "before",
    "after": "after",
    "beside": "after",
    "branch": "branch",
    "inside": "branch",
    "reweigh": "reweigh",
    "select": "reweigh",
    "shadow": "shadow",
}


def _forget_compiled() -> None:
    # Compiled code does not guard on hooks: without a reset it would go on without the new ones.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _below(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}


def check_name(name: str, taken: Iterable[str]) -> None:
    """Raise AdapterNameError when ``name`` is taken or cannot be a module name."""
    if name in set(taken):
        raise AdapterNameError(
            f"This model already has an adapter named {name!r}. Give another name, or remove(model, {name!r}) first."
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(Adapters, name):
        raise AdapterNameError(
            f"{name!r} cannot be an adapter's name. Use letters, digits, '_' and '-', starting with a letter, and no "
            "name of a torch module attribute such as 'train', 'type' or 'forward'."
        )


def adapters_of(model: nn.Module) -> Adapters:
    """``model.adapters``, or AdapterError when the model carries none.

    Raises:
        AdapterError: no adapter was attached, or the attribute belongs to somebody else.
    """
    found = getattr(model, "adapters", None)
    if isinstance(found, Adapters):
        return found
    if found is not None:
        raise AdapterError(
            f"{type(model).__name__} has its own attribute 'adapters' ({type(found).__name__}); peft-suite needs it."
        )
    raise AdapterError(
        f"This {type(model).__name__} carries no adapter. Attach one with adapt(model, method) or load()."
    )


def pick(adapters: Adapters, names: Iterable[str]) -> tuple[str, ...]:
    """``names`` checked against the container; all of them when empty."""
    chosen = tuple(names)
    for name in chosen:
        if name not in adapters:
            raise AdapterNameError(f"No adapter named {name!r} on this model. {closest(str(name), adapters)}")
    return chosen or tuple(adapters)
