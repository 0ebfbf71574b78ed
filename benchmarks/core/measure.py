"""Exact counts (operations, saved bytes), interleaved timing, and what a method costs beside others of one process."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_suite.kernels.recompute import watching


class CountOps(TorchDispatchMode):
    """Counts dispatched aten operations; views that cost nothing are counted too, as they cost dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One training step without the optimizer."""
    for p in model.parameters():
        p.grad = None
    torch.nn.functional.cross_entropy(model(x), y).backward()


def count(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Operations of a forward and backward, and bytes kept for backward beside parameters (each storage once)."""
    with CountOps() as counter, saving(model) as saved:
        step(model, x, y)
    return {"ops": sum(counter.ops.values()), "by_op": dict(counter.ops), **sizes(saved)}


def kept(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The bytes alone, from one forward without backward."""
    with saving(model) as saved:
        nn.functional.cross_entropy(model(x), y)
    return sizes(saved)


@contextmanager
def saving(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """While it lasts, the first tensor of every storage that autograd keeps, parameters apart, by address."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}  # alive until the end: an address must not be reused

    def note(t: Tensor) -> None:
        address = t.untyped_storage().data_ptr()
        if address not in parameters:
            saved.setdefault(address, t)

    with watching(note):
        yield saved


def sizes(saved: Mapping[int, Tensor]) -> dict[str, Any]:
    """Bytes of all kept storages, and by the shape of the tensor that was kept, most first."""
    shapes: Counter[str] = Counter()
    for t in saved.values():
        shapes["x".join(map(str, t.shape))] += t.untyped_storage().nbytes()
    return {"saved": shapes.total(), "by_shape": dict(shapes.most_common())}


def forward_ops(model: nn.Module, x: Tensor) -> Counter[str]:
    """Operations of an inference forward."""
    with CountOps() as counter, torch.no_grad():
        model(x)
    return counter.ops


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int, warmup: int = 2) -> dict[str, float]:
    """Times ``ours`` and ``theirs`` in turn, in alternating order; median and 95 % interval of the pairs' ratios."""
    times = interleaved({"ours": ours, "theirs": theirs}, pairs, warmup)
    return {
        "ours_s": statistics.median(times["ours"]),
        "theirs_s": statistics.median(times["theirs"]),
        **ratio(times["ours"], times["theirs"]),
    }


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, each once per round, in alternating order: drift hits all alike."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 else reversed(names):
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' ratios and its distribution-free 95 % interval (order statistics of a binomial)."""
    ratios = sorted(x / y for x, y in zip(ours, theirs, strict=True))
    half = int(0.98 * len(ratios) ** 0.5)
    low, high = max(0, len(ratios) // 2 - half), min(len(ratios) - 1, len(ratios) // 2 + half)
    return {"ratio": statistics.median(ratios), "low": ratios[low], "high": ratios[high]}


@contextmanager
def timed_calls(targets: Iterable[tuple[Any, str, str]]) -> Iterator[dict[str, float]]:
    """While it lasts, the seconds spent in the attributes ``(owner, name, label)``, summed by label.

    A timed call inside a timed call counts once. On a GPU every timed call waits for the device before and after.
    """
    spent: dict[str, float] = defaultdict(float)
    inside: list[str] = []

    def timing(call: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return call(*args, **kwargs)
            inside.append(label)
            synchronise()
            start = time.perf_counter()
            try:
                out = call(*args, **kwargs)
                synchronise()
                return out
            finally:
                spent[label] += time.perf_counter() - start
                inside.pop()

        return timed

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    for (owner, name, label), (_, _, call) in zip(targets, before, strict=True):
        setattr(owner, name, timing(call, label))
    try:
        yield spent
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


class Trial:
    """A model in train mode and its optimizer; ``clip``: the norm that gradients are scaled down to."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, clip: float | None = None) -> None:
        self.model, self.x, self.y, self.clip = model.train(), x, y, clip
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def step(self) -> None:
        """One training step."""
        torch.autograd.backward(nn.functional.cross_entropy(self.model(self.x), self.y))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise()

    def peak(self) -> float:
        """MiB allocated on the GPU at most during a step, the model's own included."""
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() / 2**20


def infer(model: nn.Module, x: Tensor) -> None:
    """One forward without gradients."""
    with torch.no_grad():
        model(x)
    synchronise()


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def adapted(model: nn.Module, spec: str, x: Tensor, y: Tensor, batches: int = 2) -> nn.Module:
    """The model with a method, calibrated on so many batches where the method wants it."""
    import peft_suite as ps

    ps.adapt(model, spec)
    shown = [(x + i, y) for i in range(batches)]
    ps.events(model).calibrate(shown, lambda b: nn.functional.cross_entropy(model(b[0]), b[1]))
    return model


def cost(
    label: str,
    model: nn.Module,
    plain: nn.Module,
    others: Mapping[str, Trial],
    rounds: int,
    clip: float | None = None,
    inferences: int | None = None,
) -> dict[str, Any]:
    """A row: training step of ``model`` against those of ``others`` (the first gets the interval), memory, inference.

    Inference is that of the model against ``plain``, both in eval mode, in which they are left, in half as many rounds
    and at least three, or in ``inferences``.
    """
    x, y = next((t.x, t.y) for t in others.values())
    trial = Trial(model, x, y, clip)
    saved = count(model, x, y)["saved"] / 2**20
    times = interleaved({"": trial.step, **{n: t.step for n, t in others.items()}}, rounds, 1)
    found = {name: ratio(times[""], times[name]) for name in others}
    first = next(iter(others))
    row: dict[str, Any] = {
        "method": label,
        "trained": sum(p.numel() for p in trial.trained),
        **{f"x_{name}": found[name]["ratio"] for name in others},
        "low": found[first]["low"],
        "high": found[first]["high"],
        "step_s": statistics.median(times[""]),
        **{f"{name}_s": statistics.median(times[name]) for name in others},
        "saved_mib": saved,
    }
    if x.is_cuda:
        row["peak_mib"] = trial.peak()
    del trial
    model.eval()
    plain.eval()
    pairs = inferences or max(3, rounds // 2)
    row["x_plain"] = paired(lambda: infer(model, x), lambda: infer(plain, x), pairs, 1)["ratio"]
    return row


def show(title: str, cells: Sequence[Mapping[str, str]]) -> None:
    """Rows of text as a table on the terminal, numbers to the right."""
    drawn = Table(title=title, title_justify="left")
    for i, column in enumerate(cells[0]):
        drawn.add_column(column, justify="right" if i else "left")
    for row in cells:
        drawn.add_row(*(escape(cell) for cell in row.values()))
    Console(width=170).print(drawn)


def markdown(cells: Sequence[Mapping[str, str]]) -> str:
    """The same in Markdown."""
    lines = [list(cells[0]), ["---"] + ["---:"] * (len(cells[0]) - 1), *(list(row.values()) for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(device: str = "cpu") -> str:
    """What the GPU or the processor calls itself."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
