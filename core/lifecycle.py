"""The verbs: plan, adapt, summary, verify, activate, trainable, disabled, merge, remove.

======================  ==========================  =====================  ==========================
verb                    becomes active              ``requires_grad``      frozen weights
======================  ==========================  =====================  ==========================
``adapt``               the new adapter alone       the new adapter alone  frozen
``load``                the new adapter alone       unchanged, or          frozen
                                                    ``trainable=True``
``activate(*names)``    exactly these, in order     unchanged              unchanged
``trainable(*names)``   unchanged                   exactly these          unchanged
``disabled()``          none, then as before        unchanged              unchanged
``remove(*names)``      the rest                    base flags restored    bit for bit as before
                                                    with the last one
``merge()``             none left                   base flags restored    changed in place
======================  ==========================  =====================  ==========================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from peft_suite.adapter import Adapter, Adapters, adapters_of, check_name, pick
from peft_suite.anatomy import Anatomy, anatomy_of
from peft_suite.edits import BatchStatistics, Edit, Part
from peft_suite.errors import AdapterError, AdapterNameError, MergeError, UnsupportedError, VerificationError
from peft_suite.method import Editor, Method, MethodSpec, make_method
from peft_suite.tables import Plan, PlanRow, Summary, SummaryRow
from torch import Tensor, nn

__all__ = ["activate", "adapt", "disabled", "events", "merge", "plan", "remove", "summary", "trainable", "verify"]


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
        PlanRow(e.path, e.kind, _shape(e.part), sum(p.numel() for p in e.part.parameters()), _folds(model, e))
        for e in adapter.edits
    )
    base = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("adapters."))
    replaced = sum(e.part.replaces for e in adapter.edits)
    return Plan(built.name, str(built.config), rows, base - replaced, _bytes(adapter), built.capabilities.mergeable)


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
        batchnorm: "frozen" keeps batch-norm statistics as they are, also in train mode; "train" lets the adapter train
            its own copies and saves them.

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
) -> Adapter:
    """All checks of ``adapt`` and the adapter itself, not attached yet. ``device`` None means the model's own."""
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
            raise AdapterError(
                f"{type(model).__name__} already has an attribute 'adapters' ({type(model.adapters).__name__}); "
                "peft-suite cannot use that name."
            )
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
    return _build(name, model, method, anatomy, where, batchnorm)


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
    adapters.switch(model, (adapter.name,))


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
    adapters.switch(model, tuple(names))
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
    adapters.switch(model, ())
    try:
        yield model
    finally:
        adapters.switch(model, before)


def remove(model: nn.Module, *names: str) -> nn.Module:
    """Take these adapters (none named: all) off; without any left, the model is the original one bit for bit.

    Raises:
        AdapterNameError: unknown name; nothing is changed.
    """
    adapters = adapters_of(model)
    adapters.detach(model, pick(adapters, names))
    return model


def merge(model: nn.Module, *, partial: bool = False) -> nn.Module:
    """Fold the active adapters into the weights, in place, and take them off. The model then is a plain model.

    Args:
        partial: fold what folds and keep the rest attached.

    Returns:
        The same model.

    Raises:
        MergeError: something does not fold (all of it is named), a folded weight would not be finite, or inactive
            adapters would be left on changed weights. Nothing is changed.
    """
    if "adapters" not in model._modules:
        warnings.warn("merge(): this model carries no adapter; nothing to do.", stacklevel=2)
        return model
    adapters = adapters_of(model)
    if idle := [n for n in adapters if n not in adapters.active]:
        raise MergeError(
            f"The inactive adapters {idle} would be left on changed weights. remove() them or activate() them first."
        )
    stuck, folded = _foldable(model, adapters)
    if stuck and not partial:
        shown = ", ".join(f"{e.key} ({e.kind})" for e in stuck[:6]) + (
            f" and {len(stuck) - 6} more" if len(stuck) > 6 else ""
        )
        raise MergeError(
            f"{len(stuck)} of {len(stuck) + len(folded)} edits cannot be folded into weights: {shown}. "
            "Keep the adapter attached, or merge(model, partial=True) to fold the rest."
        )
    modules = dict(model.named_modules())
    with torch.no_grad():
        values = _fold(modules, folded)
        for (path, name), value in values.items():
            if not _finite(value):
                raise MergeError(
                    f"Merging would make {path}.{name} not finite. The model is unchanged; check the adapter."
                )
        for (path, name), value in values.items():
            _write(modules[path], name, value)
    _drop(model, adapters, folded)
    return model


def verify(model: nn.Module, batch: Any) -> dict[str, int]:
    """One forward and backward: every active edit must fire and every trainable parameter must get a gradient.

    Args:
        batch: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        Counts ``{"parts": fired, "parameters": with gradient}``.

    Raises:
        VerificationError: names each point that never fired and each parameter without a gradient.
    """
    adapters = adapters_of(model)
    fired: set[str] = set()
    handles = []
    edits = [(f"{name}:{e.key}", e) for name in adapters.active for e in adapters[name].edits]
    for key, edit in edits:
        if edit.kind != "shadow" and not isinstance(edit.part, BatchStatistics):
            handles.append(edit.part.register_forward_hook(lambda *_, key=key: fired.add(key)))
    kept = {id(p): p.grad for p in model.parameters()}
    watched = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for parameter in model.parameters():
                parameter.grad = None
            loss = _scalar(_call(model, batch))
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        lost = [n for n, p in watched.items() if p.grad is None]
        found = len(watched) - len(lost)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = kept[id(parameter)]
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    silent = [k for k, e in edits if e.kind != "shadow" and not isinstance(e.part, BatchStatistics) and k not in fired]
    silent += _stale_shadows(model, edits)
    if silent or lost:
        raise VerificationError(
            (f"These edits never fired: {', '.join(silent[:8])}{_more(silent)}. " if silent else "")
            + (f"These parameters got no gradient: {', '.join(lost[:8])}{_more(lost)}. " if lost else "")
            + "The model reads the weight or calls the module in a way that the anatomy does not describe, an inactive "
            "adapter is trainable, or checkpointing is reentrant."
        )
    return {"parts": len(fired), "parameters": found}


def events(model: nn.Module) -> Events:
    """The events of all active adapters as one object: ``e = events(model)``, then one line each in any loop."""
    adapters = adapters_of(model)
    return Events([adapters[name] for name in adapters.active])


class Events:
    """What :func:`events` returns: each call goes to every adapter."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters

    def calibrate(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Run before training, for adapters whose method declares ``needs_calibration``."""
        for adapter in self.adapters:
            if adapter.method.capabilities.needs_calibration:
                adapter.calibrate(batches, loss)

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
    name: str, model: nn.Module, method: Method[Any], anatomy: Anatomy, device: torch.device, batchnorm: str
) -> Adapter:
    editor = Editor(model, anatomy, device)
    with torch.device(device):
        method.build(anatomy, editor)
        editor.own(anatomy.fresh)
        if batchnorm == "train":
            editor.own_statistics()
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


def _foldable(model: nn.Module, adapters: Adapters) -> tuple[list[Edit], list[Edit]]:
    """Split the active edits into (cannot fold, can fold), in folding order: weight, after; then activation."""
    stuck: list[Edit] = []
    folded: list[Edit] = []
    blocked: set[str] = set()
    ordered = [e for n in adapters.active for e in adapters[n].edits]
    for edit in sorted(ordered, key=lambda e: _ORDER[e.kind]):  # stable: activation order within a kind
        if (edit.path in blocked and edit.kind in ("after", "beside")) or not _folds(model, edit):
            stuck.append(edit)
            if edit.kind in ("after", "beside"):
                blocked.add(edit.path)
        else:
            folded.append(edit)
    return stuck, folded


_ORDER = {"before": 0, "branch": 0, "reweigh": 1, "shadow": 1, "after": 2, "beside": 2}


def _folds(model: nn.Module, edit: Edit) -> bool:
    if edit.kind in ("before", "branch") or not edit.part.foldable:
        return False
    if edit.kind == "shadow" or isinstance(edit.part, BatchStatistics):
        return True
    module = model.get_submodule(edit.path)
    return isinstance(getattr(module, "weight", None), Tensor) or isinstance(module, nn.LayerNorm | nn.GroupNorm)


def _fold(modules: Mapping[str, nn.Module], edits: Sequence[Edit]) -> dict[tuple[str, str], Tensor]:
    """New values by (module path, tensor name); nothing is written."""
    values: dict[tuple[str, str], Tensor] = {}
    for edit in edits:
        module = modules[edit.path]
        if edit.kind == "shadow":
            values |= {(edit.path, n): cast(Tensor, p).detach() for n, p in edit.part._parameters.items()}
        elif isinstance(edit.part, BatchStatistics):
            values |= {(edit.path, n): cast(Tensor, b) for n, b in edit.part._buffers.items()}
        else:
            compute = edit.part.compute
            weight = values.get((edit.path, "weight"), _tensor(module, "weight", compute))
            bias = values.get((edit.path, "bias"), _tensor(module, "bias", compute))
            if weight is None:
                weight = torch.ones(_normalized(module), dtype=compute)
            for name, old, new in zip(("weight", "bias"), (weight, bias), edit.part.fold(module, weight, bias), strict=True):
                if new is not None and new is not old:
                    values[edit.path, name] = new.detach()
    return values


def _tensor(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor | None:
    value = getattr(module, name, None)
    return value.detach().to(torch.promote_types(value.dtype, dtype)) if isinstance(value, Tensor) else None


def _normalized(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.LayerNorm):
        return tuple(module.normalized_shape)
    return (cast(nn.GroupNorm, module).num_channels,)


def _finite(value: Tensor) -> bool:
    # A sum is one pass without a temporary; only when it is not finite every entry is looked at.
    return value.is_meta or bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _write(module: nn.Module, name: str, value: Tensor) -> None:
    target = module._parameters.get(name)
    if target is None:
        target = module._buffers.get(name)
    if target is not None:
        target.data.copy_(value)
    else:
        like = next(module.parameters(recurse=False), value)
        module.register_parameter(name, nn.Parameter(value.to(like.dtype).clone(), requires_grad=like.requires_grad))


def _drop(model: nn.Module, adapters: Adapters, folded: Sequence[Edit]) -> None:
    """Take folded edits off; adapters without an edit left go, the others keep what remains."""
    done = {id(e.part) for e in folded}
    active = adapters.active
    rests = [
        Adapter(name, adapters[name].method, [e for e in adapters[name].edits if id(e.part) not in done])
        for name in active
    ]
    rests = [rest for rest in rests if rest.edits]
    anatomy, frozen = adapters.anatomy, adapters.frozen
    adapters.detach(model, tuple(adapters))
    if rests:
        again = Adapters(model, anatomy)
        again.frozen = frozen | {n: True for n in again.frozen if n not in frozen}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model._modules["adapters"] = again
        for rest in rests:
            again.attach(model, rest)
        again.switch(model, tuple(rest.name for rest in rests))


def _stale_shadows(model: nn.Module, edits: Iterable[tuple[str, Edit]]) -> list[str]:
    return [
        key
        for key, edit in edits
        if edit.kind == "shadow"
        for name, parameter in edit.part._parameters.items()
        if model.get_submodule(edit.path).__dict__.get(name) is not parameter
    ]


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _scalar(output: Any) -> Tensor:
    """A scalar that depends on every floating-point tensor of a model's output."""
    if isinstance(output, Tensor):
        return (
            output.float().square().mean() if output.is_floating_point() else output.new_zeros((), dtype=torch.float32)
        )
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return sum((_scalar(item) for item in items), torch.zeros(()))


def _shape(part: Part) -> str:
    shapes = [f"{n} {list(p.shape)}" for n, p in part.named_parameters()]
    return ", ".join(shapes)


def _bytes(adapter: Adapter) -> int:
    return sum(t.numel() * t.element_size() for t in adapter.state_dict().values())


def _more(items: Sequence[str]) -> str:
    return f" and {len(items) - 8} more" if len(items) > 8 else ""
