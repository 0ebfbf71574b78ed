"""Verification: one forward and backward proves that an adapter is connected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.adapter import adapters_of
from peft_suite.edits import BatchStatistics, Edit
from peft_suite.errors import VerificationError

__all__ = ["verify"]


def verify(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any] | None = None) -> dict[str, int]:
    """One forward and backward: every active edit must fire and every trainable parameter must get a gradient.

    Args:
        batch: what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        call: ``call(model, batch)``, for models that are called in another way.

    Returns:
        Counts ``{"parts": fired, "parameters": with gradient}``.

    Raises:
        VerificationError: names each point that never fired and each parameter without a gradient.
    """
    adapters = adapters_of(model)
    fired: set[str] = set()
    handles = []
    edits = [(f"{name}:{e.key}", e) for name in adapters.active for e in adapters[name].edits]
    called = [(k, e) for k, e in edits if e.kind != "shadow" and not isinstance(e.part, BatchStatistics)]
    for key, edit in called:
        handles.append(edit.part.register_forward_hook(lambda *_, key=key: fired.add(key)))
    kept = {id(p): p.grad for p in model.parameters()}
    watched = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for parameter in model.parameters():
                parameter.grad = None
            loss = _scalar((call or _call)(model, batch))
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
    silent = [key for key, _ in called if key not in fired]
    silent += _stale_shadows(model, edits)
    if silent or lost:
        raise VerificationError(
            (f"These edits never fired: {', '.join(silent[:8])}{_more(silent)}. " if silent else "")
            + (f"These parameters got no gradient: {', '.join(lost[:8])}{_more(lost)}. " if lost else "")
            + "The model reads the weight or calls the module in a way that the anatomy does not describe, an inactive "
            "adapter is trainable, or checkpointing is reentrant."
        )
    return {"parts": len(fired), "parameters": found}


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


def _more(items: Sequence[str]) -> str:
    return f" and {len(items) - 8} more" if len(items) > 8 else ""
