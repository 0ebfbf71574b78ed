"""How the scripts behind embedded backbones train: a fixed number of steps on batches that depend on the step alone.

``model(*batch)`` is the loss. What is interrupted goes on from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.errors import FileFormatError
from peft_suite.storage import atomic
from peft_suite.train.display import Display
from peft_suite.train.stopping import StopRequest

__all__ = ["Batch", "half", "pretrain", "probe_lines", "read_partial", "ridge_accuracy", "steps_in", "train_step"]

Batch = tuple[Tensor, ...]
TIMED = 9  # steps that tell how many fit into the minutes


def pretrain(
    model: nn.Module,
    batch: Callable[[int], Batch],
    partial: Path,
    *,
    seed: int,
    steps: int,
    lr: float,
    state: Mapping[str, Any] | None,
    every: int = 50,
    shown: float = 1.0,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    ema: float = 0.0,
) -> None:
    """Train from ``state``, or from the beginning.

    Args:
        batch: the batch of a step.
        partial: checkpoint, written every ``every`` steps.
        lr: highest learning rate; see :func:`pace`.
        shown: factor of the losses on the display.
        ema: the model ends with a running mean of its parameters, whose decay after step s is
            ``min(ema, (1 + s) / (10 + s))``; 0 means the parameters of the last step.

    Raises:
        SystemExit: a signal stopped it, or the loss is not finite; the checkpoint is kept.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=betas)
    mean = {name: p.detach().clone() for name, p in model.named_parameters()} if ema else {}
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        mean = {name: state["mean"][name] for name in mean}
        first = state["step"]
    stop, done = StopRequest(), first
    losses: list[float] = []
    seen, clock = 0, time.perf_counter()
    display = Display(enabled=True, epochs=-(-steps // every), steps=every, epoch=first // every, metric="")
    model.train()
    try:
        with stop:
            while done < steps and not stop.wanted:
                given = batch(done)
                losses.append(train_step(model, optimizer, given, lr * pace(done, steps)))
                display.step(done % every + 1, shown * losses[-1])
                done, seen = done + 1, seen + len(given[0])
                follow(mean, model, min(ema, (1 + done) / (10 + done)))
                if done % every == 0 or done == steps or stop.wanted:
                    keep(partial, model, optimizer, done, steps, seed, mean)
                    speed = seen / (time.perf_counter() - clock)
                    entry = {"epoch": (done - 1) // every, "train_loss": shown * sum(losses) / len(losses)}
                    display.epoch({**entry, "val": None, "test": None, "samples_per_s": speed})
                    losses, seen, clock = [], 0, time.perf_counter()
    finally:
        display.close()
    if done < steps:
        raise SystemExit(f"Stopped after step {done} of {steps}. Go on with --resume.")
    model.load_state_dict(mean, strict=False)


def steps_in(minutes: float, model: nn.Module, batch: Batch, renew: Callable[[], Any]) -> int:
    """How many steps fit, from the time of a few on a copy; ``renew`` makes as many samples as a step needs."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        train_step(model, optimizer, batch, 0.0)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    renew()
    return max(1, round(60 * minutes / (statistics.median(times) + time.perf_counter() - start)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> float:
    """One step; the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(*batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise SystemExit(f"The loss is {value}; the last checkpoint is kept.")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return value


def pace(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over 50 steps times a cosine to 0."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def follow(mean: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """``mean = decay mean + (1 - decay) p`` for every parameter of ``mean``."""
    if mean:
        live = dict(model.named_parameters())
        torch._foreach_lerp_(list(mean.values()), [live[name].detach() for name in mean], 1 - decay)


def keep(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    steps: int,
    seed: int,
    mean: Mapping[str, Tensor],
) -> None:
    """Write what :func:`read_partial` reads."""
    state = {
        "model": model.state_dict(),
        "mean": dict(mean),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "steps": steps,
        "seed": seed,
    }
    with atomic(path) as temporary:
        torch.save(state, temporary)


def read_partial(path: Path, seed: int) -> Mapping[str, Any] | None:
    """What an interrupted run left, or None.

    Raises:
        FileFormatError: it was begun with another seed.
    """
    if not path.exists():
        return None
    state: Mapping[str, Any] = torch.load(path, weights_only=True)
    if state["seed"] != seed:
        raise FileFormatError(f"{path} was begun with --seed {state['seed']}. Go on with that one, or remove the file.")
    return state


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float16 where they are no counters, as the weights are shipped."""
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}


def ridge_accuracy(features: Tensor, labels: Tensor, known: Tensor, classes: int, penalty: float = 10.0) -> float:
    """Accuracy of a ridge classifier on features ``[N, D]``: samples where ``known`` ``[N]`` train, the others test."""
    x = features.double()
    x = (x - x[known].mean(0)) / x[known].std(0).clamp_min(1e-6)
    x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    goal = nn.functional.one_hot(labels[known], classes).to(x.dtype)
    weigh = penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x[known].T @ x[known] + weigh, x[known].T @ goal)
    return float(((x[~known] @ weight).argmax(1) == labels[~known]).double().mean())


def probe_lines(after: Mapping[str, float], before: Mapping[str, float]) -> str:
    """What was learnt, for people."""
    return "\n".join(
        f"probe {name.replace('_', ' '):16s} {value:6.1%}   random weights {before[name]:6.1%}"
        for name, value in after.items()
    )
