"""The verbs that attach, switch and detach: plan, adapt, summary, activate, trainable, disabled, remove.

======================  ==========================  =====================  ==========================
verb                    becomes active              ``requires_grad``      frozen weights
======================  ==========================  =====================  ==========================
``adapt``               the new adapter alone       the new adapter alone  frozen
``load``                the new adapter alone       unchanged, or          frozen
                                                    ``trainable=True``
``activate(*names)``    exactly these, in order     unchanged              unchanged
``trainable(*names)``   unchanged                   exactly these          unchanged
``disabled()``          none, then as before        unchanged              unchanged
``scale(name, value)``  unchanged                   unchanged              unchanged
``remove(*names)``      the rest                    base flags restored    bit for bit as before
                                                    with the last one
``merge()``             none left                   base flags restored    changed in place
======================  ==========================  =====================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter, Adapters, adapters_of, check_name, pick
from peft_suite.anatomy import Anatomy, anatomy_of
from peft_suite.edits import BatchStatistics, Part
from peft_suite.errors import AdapterError, AdapterNameError, UnsupportedError
from peft_suite.merging import folds
from peft_suite.method import Editor, Method, MethodSpec, make_method
from peft_suite.tables import Plan, PlanRow, Summary, SummaryRow

__all__ = ["activate", "adapt", "disabled", "events", "plan", "remove", "summary", "trainable"]


def plan(model: nn.Module, method: MethodSpec, *, anatomy: Anatomy | None = None) -> Plan:
    """What ``adapt`` would do: every point, its parameters, whether it folds. Changes nothing, allocates nothing.

    Raises:
        UnknownNameError, ConfigError: the method cannot be read.
        BackboneError: no anatomy describes the model.
        UnsupportedError: the backbone cannot carry the method; one sentence says why.
    """
    built = make_method(method)
    adapter = _build("plan", model, built, anatomy or described(model), torch.device("meta"), "frozen")
    rows = tuple(
        PlanRow(e.path, e.kind, _shape(e.part), sum(p.numel() for p in e.part.parameters()), folds(model, e))
        for e in adapter.edits
        if not e.part.neutral
    )
    base = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("adapters."))
    replaced = sum(e.part.replaces for e in adapter.edits)
    mergeable = built.capabilities.mergeable and all(row.mergeable for row in rows)
    pending = built.pending
    size = _bytes(adapter) + 4 * pending
    return Plan(built.name, str(built.config), rows, base - replaced, size, mergeable, pending)


def adapt(
    model: nn.Module,
    method: MethodSpec,
    *,
    name: str = "default",
    anatomy: Anatomy | None = None,
    batchnorm: Literal["frozen", "train"] = "frozen",
) -> nn.Module:
    """Attach a fresh adapter to ``model``, in place, make it the active one and freeze everything else.

    The model keeps its class, its forward and the keys of its frozen weights; the adapter is ``model.adapters[name]``.
    Attach before wrapping (DDP, FSDP, torch.compile).

    Args:
        model: a backbone that an anatomy describes.
        method: ``"ssf"``, ``"vpt(num_tokens=50, deep=True)"``, a mapping with ``name``, or a configuration object.
        name: name of the adapter; several may live on one backbone.
        anatomy: description of the model, where no plugin has one.
        batchnorm: "frozen" keeps the backbone's batch-norm statistics as they are, also in train mode; "train" lets the
            adapter train its own copies and saves them. Statistics of a fresh head always move, and are saved.

    Returns:
        The same model.

    Raises:
        UnknownNameError, ConfigError, BackboneError, UnsupportedError, AdapterNameError, AdapterError: checked before
            anything is changed.
    """
    built = make_method(method)
    adapter = prepare(model, built, name, anatomy, None, batchnorm)
    install(model, adapter, anatomy)
    trainable(model, name)
    return model


def prepare(
    model: nn.Module,
    method: Method[Any],
    name: str,
    anatomy: Anatomy | None,
    device: torch.device | None,
    batchnorm: Literal["frozen", "train"] = "frozen",
    *,
    stored: bool = False,
) -> Adapter:
    """All checks of ``adapt`` and the adapter itself, not attached yet.

    Args:
        device: None means the model's own.
        stored: the adapter will be given tensors of a file; see :class:`peft_suite.method.Editor`.
    """
    if batchnorm not in ("frozen", "train"):
        raise UnsupportedError(f"batchnorm={batchnorm!r}: choose 'frozen' or 'train'.")
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise UnsupportedError(
            f"A bare {type(model).__name__} runs every sub-module it holds, adapters included. Wrap it in a module of "
            "your own with a forward, and adapt that."
        )
    existing = model._modules.get("adapters")
    if isinstance(existing, Adapters):
        check_name(name, existing)
        anatomy = anatomy or existing.anatomy
    else:
        if hasattr(model, "adapters"):
            adapters_of(model)  # somebody else's attribute: says so
        anatomy = anatomy or described(model)
        check_name(name, ())
    _refuse_sharded(model)
    if anatomy.reentrant:
        raise UnsupportedError(
            "The model uses reentrant gradient checkpointing, under which adapters silently lose gradients. "
            "Switch to use_reentrant=False first."
        )
    first = next(model.parameters(), None)
    where = device or (first.device if first is not None else torch.device("cpu"))
    return _build(name, model, method, anatomy, where, batchnorm, stored)


def install(model: nn.Module, adapter: Adapter, anatomy: Anatomy | None = None) -> None:
    """Attach a prepared adapter and make it the active one; freeze the base with the first."""
    if "adapters" not in model._modules:
        adapters = Adapters(model, anatomy or described(model))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model._modules["adapters"] = adapters
    adapters = adapters_of(model)
    adapters.attach(model, adapter)
    adapters.train(model.training)
    adapters.switch((adapter.name,))


def rebuild(model: nn.Module, name: str, method: Method[Any], tensors: Mapping[str, Tensor] | None = None) -> Adapter:
    """Build an adapter again with what its method has learned; tensors that still have a place keep their values.

    Args:
        tensors: the state dict of an adapter that was built so before, to start from instead.
    """
    adapters = adapters_of(model)
    old, active = adapters[name], adapters.active
    adapters.switch(())  # the editor reads the frozen model
    first = next((p for n, p in model.named_parameters() if not n.startswith("adapters.")), None)
    moving = any(isinstance(part, BatchStatistics) and not part.fresh for _, part in old.parts())
    device = first.device if first is not None else torch.device("cpu")
    try:
        where = device if tensors is None else torch.device("meta")
        statistics = "train" if moving else "frozen"
        new = _build(name, model, method, adapters.anatomy, where, statistics, tensors is not None)
    finally:
        adapters.switch(active)
    if tensors is None:
        own = new.state_dict()
        kept = {n: t for n, t in old.state_dict().items() if n in own and own[n].shape == t.shape}
        new.load_state_dict(kept, strict=False)
    else:
        new.adopt(tensors)
        new.load_state_dict({n: t.to(device, copy=True) for n, t in tensors.items()}, assign=True)
    before = [p.requires_grad for p in old.parameters()]
    new.requires_grad_(any(before) or not before)  # without a head there is nothing to train before calibration
    new.train(old.training)
    adapters.replace(model, new)
    return new


def summary(model: nn.Module) -> Summary:
    """Parameters trained, in total, and in the file, per adapter and part.

    ``total`` counts the backbone plus what adapters add; copies that stand in for base parameters count once.
    """
    base = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("adapters."))
    if "adapters" not in model._modules:
        moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Summary((), moving, base, 0)
    adapters = adapters_of(model)
    rows = []
    for name, adapter in adapters.items():
        for key, part in adapter.parts():
            if part.neutral:
                continue
            count = sum(p.numel() for p in part.parameters())
            moving = sum(p.numel() for p in part.parameters() if p.requires_grad)
            rows.append(SummaryRow(name, adapter.method.name, key, count, moving, name in adapters.active))
    parts = [p for _, a in adapters.items() for _, p in a.parts()]
    replaced = max((sum(p.replaces for _, p in a.parts()) for _, a in adapters.items()), default=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(p.numel() for part in parts for p in part.parameters())
    size = sum(_bytes(a) for _, a in adapters.items())
    return Summary(tuple(rows), trained, base + added - replaced, size)


def activate(model: nn.Module, *names: str) -> nn.Module:
    """Make exactly these adapters active, in this order (none: the frozen model). Never touches ``requires_grad``.

    Raises:
        AdapterNameError: unknown or repeated name; nothing is changed.
    """
    adapters = adapters_of(model)
    if names:
        pick(adapters, names)
    if len(set(names)) != len(names):
        raise AdapterNameError(f"activate() got a name twice: {names}.")
    longer = [n for n in names if adapters[n].method.capabilities.changes_sequence]
    if len(longer) > 1:
        raise AdapterError(f"Adapters {longer} all add tokens to the sequence; activate one of them at a time.")
    adapters.switch(tuple(names))
    return model


def trainable(model: nn.Module, *names: str) -> nn.Module:
    """Let exactly these adapters train (none: freeze all). Call before wrapping the model for several devices."""
    adapters = adapters_of(model)
    chosen = pick(adapters, names) if names else ()
    for name, adapter in adapters.items():
        for parameter in adapter.parameters():
            parameter.requires_grad_(name in chosen)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what the frozen model computes, bit for bit; afterwards as before."""
    adapters = adapters_of(model)
    before = adapters.active
    adapters.switch(())
    try:
        yield model
    finally:
        adapters.switch(before)


def remove(model: nn.Module, *names: str) -> nn.Module:
    """Take these adapters (none named: all) off; without any left, the model is the original one bit for bit.

    Raises:
        AdapterNameError: unknown name; nothing is changed.
    """
    adapters = adapters_of(model)
    adapters.detach(model, pick(adapters, names))
    return model


def events(model: nn.Module) -> Events:
    """The events of all active adapters as one object: ``e = events(model)``, then one line each in any loop."""
    adapters = adapters_of(model)
    return Events(model, adapters.active)


class Events:
    """What :func:`events` returns: each call goes to every adapter."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters, as they are now."""
        return [adapters_of(self.model)[name] for name in self.names]

    def calibrate(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Run before training and before the optimizer is built, for methods that declare ``needs_calibration``."""
        for adapter in self.adapters:
            if adapter.method.capabilities.needs_calibration:
                learned = adapter.calibrate(batches, loss)
                if learned is not None:
                    rebuild(self.model, adapter.name, learned)

    def begin(self, steps: int) -> None:
        """Before the first step, with the number of optimizer steps of the run, for methods that count in shares."""
        for adapter in self.adapters:
            adapter.begin(steps)

    def penalty(self) -> Tensor | None:
        """Sum of the adapters' loss terms; None when there is none."""
        terms = [t for t in (a.penalty() for a in self.adapters) if t is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After backward, before ``optimizer.step()``."""
        for adapter in self.adapters:
            adapter.before_step(step, optimizer)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After ``optimizer.step()``."""
        for adapter in self.adapters:
            adapter.after_step(step, optimizer)

    def finish(self) -> None:
        """When training ends."""
        for adapter in self.adapters:
            adapter.finish()


def described(model: nn.Module) -> Anatomy:
    """The anatomy in use on an adapted model, or what a plugin says of a plain one."""
    existing = model._modules.get("adapters")
    return existing.anatomy if isinstance(existing, Adapters) else anatomy_of(model)


def _build(
    name: str,
    model: nn.Module,
    method: Method[Any],
    anatomy: Anatomy,
    device: torch.device,
    batchnorm: str,
    stored: bool = False,
) -> Adapter:
    editor = Editor(model, anatomy, device, stored=stored)
    with torch.device(device):
        method.build(anatomy, editor)
        editor.own(anatomy.fresh)
        editor.own_statistics(fresh_only=batchnorm != "train")
        edits = editor.finish()
    if not edits:
        raise UnsupportedError(f"{method.name} finds nothing to train on {anatomy.family}.")
    return Adapter(name, method, edits)


def _refuse_sharded(model: nn.Module) -> None:
    if not torch.distributed.is_available():
        return
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise AdapterError(
                f"The parameter {name} is already sharded (DTensor). Gradients of an adapter attached now would "
                "silently stay unsynchronised: adapt() first, then fully_shard()."
            )


def _shape(part: Part) -> str:
    shapes = [f"{n} {list(p.shape)}" for n, p in part.named_parameters()]
    return ", ".join(shapes)


def _bytes(adapter: Adapter) -> int:
    return sum(t.numel() * t.element_size() for t in adapter.stored().values())
