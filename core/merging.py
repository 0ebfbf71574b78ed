"""Merging: fold what an adapter computes into the frozen weights, in the order in which it acts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter, Adapters, adapters_of
from peft_suite.edits import BatchStatistics, Edit, copies_first
from peft_suite.errors import MergeError

__all__ = ["folds", "merge"]


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


def _foldable(model: nn.Module, adapters: Adapters) -> tuple[list[Edit], list[Edit]]:
    """Split the active edits into (cannot fold, can fold), in folding order: weight, after, before.

    Within a kind the order is that of activation, for ``before`` its reverse: an input edit folds into the weight that
    everything else has made. What acts on a weight or an output after an edit that stays cannot fold either.
    """
    stuck: list[Edit] = []
    folded: list[Edit] = []
    blocked: set[str] = set()
    ordered = copies_first(e for n in adapters.active for e in adapters[n].edits)
    inputs = [e for e in reversed(ordered) if e.kind == "before"]
    others = sorted((e for e in ordered if e.kind != "before"), key=lambda e: _ORDER[e.kind])  # stable
    for edit in [*others, *inputs]:
        if edit.path in blocked or not folds(model, edit):
            stuck.append(edit)
            if edit.kind not in ("branch", "inside"):
                blocked.add(edit.path)
        else:
            folded.append(edit)
    return stuck, folded


_ORDER = {"branch": 0, "inside": 0, "reweigh": 1, "select": 1, "shadow": 1, "after": 2, "beside": 2}


def folds(model: nn.Module, edit: Edit) -> bool:
    """Whether an edit can be folded into the weights of its module."""
    if edit.kind in ("branch", "inside") or not edit.part.foldable:
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
            for name, old, new in zip(
                ("weight", "bias"), (weight, bias), edit.part.fold(module, weight, bias), strict=True
            ):
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
    target: Tensor | None = module._parameters.get(name)
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
        again.switch(tuple(rest.name for rest in rests))
