"""Updates as pairs of factors: exact for LoRA and DoRA, by truncated singular value decomposition for anything else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter, adapters_of
from peft_suite.edits import Edit, copies_first
from peft_suite.errors import UnsupportedError
from peft_suite.files import only_name
from peft_suite.merging import folds
from peft_suite.methods.lora_parts import LowRank, WeightLoRA

__all__ = ["Approximation", "Factors", "changing", "factors_of", "to_lora"]


@dataclass(frozen=True)
class Factors:
    """One module's update ``alpha / r * up @ down``.

    Attributes:
        down: ``[r, in]``, or ``[r, in, k_h, k_w]`` of a convolution.
        up: ``[out, r]``; :attr:`out` has the two further axes of a convolution.
        alpha: numerator of the scale.
        magnitude: DoRA's lengths of the rows, ``[out]`` in any shape, or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        if self.down.ndim == 4:
            object.__setattr__(self, "up", self.up.flatten(1)[:, :, None, None])

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def with_alpha(self, alpha: float) -> Factors:
        """The same update, to rounding, with another alpha."""
        return (
            self if alpha == self.alpha else dataclasses.replace(self, up=self.up * (self.alpha / alpha), alpha=alpha)
        )


@dataclass(frozen=True)
class Approximation:
    """What :func:`to_lora` found.

    Attributes:
        factors: module path -> its update.
        energy: module path -> share of the squared Frobenius norm of its update that the factors keep.
        lost: parameter -> share of the squared norm of all changes; convolutions, biases and norms, which have no place
            in a LoRA on matrices.
        retained: share of the squared norm of all changes that is kept.
    """

    factors: dict[str, Factors]
    energy: dict[str, float]
    lost: dict[str, float]
    retained: float

    def __str__(self) -> str:
        worst = min(self.energy, key=lambda k: self.energy[k])
        gone = f"; {len(self.lost)} tensors without a place hold {sum(self.lost.values()):.1%}" if self.lost else ""
        return (
            f"{len(self.factors)} matrices keep {self.retained:.1%} of the squared norm of all changes, "
            f"{worst} the least ({self.energy[worst]:.1%}){gone}"
        )


def factors_of(model: nn.Module, name: str | None = None) -> dict[str, Factors]:
    """The factors of a LoRA or DoRA adapter by module path, without copies; slices of a fused matrix as one.

    Raises:
        UnsupportedError: an edit that is no low-rank update of a whole matrix.
    """
    adapters = adapters_of(model)
    adapter = adapters[only_name(adapters, name)]
    found: dict[str, Factors] = {}
    for edit in changing(adapter):
        part = edit.part
        magnitude = getattr(part, "magnitude", None)
        if not isinstance(part, LowRank) or (isinstance(magnitude, Tensor) and not part.whole):
            raise UnsupportedError(
                f"{edit.key} of {adapter.method.name} is no low-rank update of a whole matrix: a LoRA file has no "
                "place for it. Approximate it with rank=..., or merge it and save the pipeline."
            )
        weight = cast(Tensor, model.get_submodule(edit.path).weight)
        down = part.lora_A.detach()
        down = down.view(down.shape[0], *weight.shape[1:])
        magnitude = magnitude.detach() if isinstance(part, WeightLoRA) and isinstance(magnitude, Tensor) else None
        found[edit.path] = Factors(down, part.up().detach(), part.scale * down.shape[0], magnitude)
    if not found:
        raise UnsupportedError(f"{adapter.method.name} updates no matrix: there is no LoRA to write.")
    return found


def changing(adapter: Adapter) -> list[Edit]:
    """The edits that change what is computed; others only decide what is kept for backward."""
    return [e for e in adapter.edits if not e.part.neutral]


def to_lora(model: nn.Module, rank: int, name: str | None = None) -> Approximation:
    """Any adapter that folds, as a LoRA: the best ``rank`` singular directions of each changed ``[out, in]`` matrix.

    The sparse updates of SaRA and its like have a high rank, so expect to keep little: look at ``retained``.

    Args:
        model: the adapted model; it is not changed.
        rank: of every matrix, at most.
        name: which adapter; may be omitted when exactly one is active.

    Raises:
        UnsupportedError: rank below 1, an edit that does not fold, or no changed matrix.
    """
    if rank < 1:
        raise UnsupportedError(f"rank={rank}: an approximation needs at least 1.")
    adapters = adapters_of(model)
    adapter = adapters[only_name(adapters, name)]
    if stuck := [e.key for e in changing(adapter) if not folds(model, e)]:
        raise UnsupportedError(f"{stuck[0]} of {adapter.method.name} is no change of weights: no LoRA stands for it.")
    by_path: dict[str, list[Edit]] = {}
    for edit in changing(adapter):
        by_path.setdefault(edit.path, []).append(edit)
    factors: dict[str, Factors] = {}
    kept: dict[str, tuple[float, float]] = {}  # path -> squared norms: kept, all
    lost: dict[str, float] = {}
    with torch.no_grad():
        for path, edits in by_path.items():
            for parameter, change in _changes(model.get_submodule(path), edits).items():
                size = float(change.double().square().sum())
                matrix = parameter == "weight" and isinstance(model.get_submodule(path), nn.Linear)
                if not matrix and size:
                    lost[f"{path}.{parameter}"] = size
                elif size:
                    factors[path], share = _truncated(change, rank)
                    kept[path] = (share * size, size)
    if not factors:
        raise UnsupportedError(
            f"{adapter.method.name} has changed no matrix of a Linear layer: nothing to approximate."
        )
    total = sum(size for _, size in kept.values()) + sum(lost.values())
    return Approximation(
        factors,
        {path: part / size for path, (part, size) in kept.items()},
        {key: size / total for key, size in lost.items()},
        sum(part for part, _ in kept.values()) / total,
    )


def _changes(module: nn.Module, edits: list[Edit]) -> dict[str, Tensor]:
    """Parameter -> what the edits of one module add to it, in float32; folded in the order in which they act."""
    if any(e.kind == "shadow" for e in edits):
        pairs = [(n, p, module._parameters[n]) for e in edits for n, p in e.part._parameters.items() if p is not None]
        return {n: p.detach().float() - base.detach().float() for n, p, base in pairs if base is not None}
    base = {n: getattr(module, n, None) for n in ("weight", "bias")}
    start = {n: None if t is None else t.detach().float() for n, t in base.items()}
    weight, bias = start["weight"], start["bias"]
    order = {"reweigh": 0, "select": 0, "after": 1, "beside": 1, "before": 2}
    for edit in sorted(copies_first(edits), key=lambda e: order[e.kind]):
        weight, bias = edit.part.fold(module, cast(Tensor, weight), bias)
    now = {"weight": weight, "bias": bias}
    return {
        n: t.detach().float() - (torch.zeros_like(t) if (old := start[n]) is None else old)
        for n, t in now.items()
        if t is not None
    }


def _truncated(change: Tensor, rank: int) -> tuple[Factors, float]:
    """The best approximation of a matrix of at most ``rank``, and the share of its squared norm."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    keep = max(1, min(rank, int((s > s[0] * 1e-6).sum())))
    root = s[:keep].sqrt()
    share = float(s[:keep].double().square().sum() / s.double().square().sum())
    return Factors(root[:, None] * v[:keep], u[:, :keep] * root, float(keep)), share
