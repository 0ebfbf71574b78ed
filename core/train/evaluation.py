"""Evaluation and prediction, alike on one process and on several."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from peft_suite.errors import ConfigError, DataError
from peft_suite.train.loader import indexed_loader
from peft_suite.train.task import Task

__all__ = ["autocast", "collect", "evaluate", "forward", "outputs", "pick_device", "predict", "predictor"]


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    task: Task,
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    workers: int = 0,
    precision: str = "no",
) -> dict[str, Any]:
    """Metrics of ``model`` on samples ``(input, target)``.

    Returns:
        ``{"metrics": {...}, "per_class": {...}, "confusion": [[...]] or None, "samples": N, "outcome": Outcome}``.
    """
    target_device = pick_device(device)
    output, target = collect(
        model.to(target_device),
        dataset,
        batch_size=batch_size,
        device=target_device,
        workers=workers,
        precision=precision,
        reduce=getattr(task, "reduce", None),
        call=predictor(task),
        sorts=getattr(dataset, "group", None),
    )
    assert target is not None
    task.check(target, "evaluation")
    return {
        "metrics": task.metrics(output, target),
        "per_class": task.per_class(output, target),
        "confusion": task.confusion(output, target),
        "samples": len(output),
        "outcome": task.outcome(output, target),
    }


def predict(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    workers: int = 0,
    precision: str = "no",
) -> Tensor:
    """Logits ``[N, C]`` in the order of ``dataset``, float32 on the CPU.

    Samples are inputs, or ``(input, target)`` pairs whose target is not looked at.
    """
    found = outputs(model, dataset, batch_size=batch_size, device=device, workers=workers, precision=precision)
    return torch.cat(list(found))


def outputs(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    workers: int = 0,
    precision: str = "no",
) -> Iterator[Tensor]:
    """What :func:`predict` returns, batch by batch, for outputs that do not fit into memory together."""
    target_device = pick_device(device)
    model.to(target_device)
    size = len(dataset)  # type: ignore[arg-type]
    if not size:
        raise DataError("There is nothing to predict: the data set is empty.")
    indices = [list(range(at, min(at + batch_size, size))) for at in range(0, size, batch_size)]
    with _inference(model):
        for batch in indexed_loader(dataset, indices, workers=workers, pin=target_device.type == "cuda"):
            inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch
            with autocast(target_device, precision):
                output = forward(model, to_device(inputs, target_device))
            yield output.float().cpu()


def collect(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    precision: str = "no",
    rank: int = 0,
    world: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
    stop: Callable[[], None] = lambda: None,
    reduce: Callable[[Tensor, Any], tuple[Tensor, Tensor]] | None = None,
    call: Callable[[nn.Module, Any], Tensor] | None = None,
    sorts: Callable[[int], Hashable] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs and targets of the whole data set, in its order, on the CPU.

    Process ``rank`` runs samples ``rank, rank + world, ...``; ``gather`` joins equal-sized parts. ``stop`` is called
    between batches and may raise. ``reduce`` shrinks outputs and targets of every batch to what is kept. ``call`` runs
    the model, :func:`forward` by default. No batch mixes samples of which ``sorts`` says different things.
    """
    call = call or forward
    size = len(dataset)  # type: ignore[arg-type]
    if not size:
        raise DataError("There is nothing to evaluate: the data set is empty.")
    mine = list(range(rank, size, world)) or [0]
    runs = [list(run) for _, run in itertools.groupby(mine, sorts)] if sorts else [mine]
    indices = [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]
    outputs, targets = [], []
    with _inference(model):
        for batch in indexed_loader(dataset, indices, workers=workers, pin=device.type == "cuda"):
            stop()
            inputs, target = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
            with autocast(device, precision):
                output = call(model, to_device(inputs, device))
            if reduce is not None and target is not None:
                output, target = reduce(output.float(), to_device(target, output.device))
                target = target.cpu()
            outputs.append(output.float().cpu())
            if target is not None:
                targets.append(target)
    output = _join(torch.cat(outputs), size, world, device, gather)
    return output, _join(torch.cat(targets), size, world, device, gather) if targets else None


def _join(
    mine: Tensor, size: int, world: int, device: torch.device, gather: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Put the strided parts of all processes together; parts are padded to one length and cut again."""
    if world == 1 or gather is None:
        return mine
    longest = -(-size // world)
    padded = torch.cat([mine, mine[:1].expand(longest - len(mine), *mine.shape[1:])])[:longest]
    parts: Tensor = gather(padded.to(device)).cpu()  # [world * longest, ...], one process after the other
    return parts.reshape(world, longest, *parts.shape[1:]).transpose(0, 1).flatten(0, 1)[:size].contiguous()


def predictor(task: Task) -> Callable[[nn.Module, Any], Tensor]:
    """How a task runs a model on the inputs of a batch: its own ``predict``, else :func:`forward`."""
    return getattr(task, "predict", None) or forward


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """Call ``model`` with one input, several (list) or named ones (mapping)."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)
    logits = getattr(output, "logits", output)  # Hugging Face models return an object
    if not isinstance(logits, Tensor):
        raise ConfigError(f"The model returned {type(output).__name__}, expected a tensor or an object with .logits.")
    return logits


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move tensors, and lists and mappings of them."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    return [to_device(value, device) for value in inputs]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for "bf16" and "fp16", nothing for "no"."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def pick_device(device: str | torch.device) -> torch.device:
    """A device from "auto" (CUDA, MPS, else CPU) or torch's own names."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {device!r}. Valid choices: auto, cpu, cuda, cuda:1, mps.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Device {device!r} is not there: {torch.cuda.device_count()} CUDA devices visible. Try 'auto' or 'cpu'."
        )
    return chosen


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
