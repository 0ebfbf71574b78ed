"""Exact selection over a whole model: the k-th value, masks, top entries and quantiles, with bounded memory.

No list is concatenated and nothing is sorted. On CPU a sample of the elements brackets the answer, one pass counts what
lies beyond the bracket and collects what lies in it, and the answer is found among the collected. Where the sample
misleads (many equal elements), and on GPUs, it is a radix selection on the ordered integer image of the floats: digit
histograms of 11, 11 and 10 bits (float64: 11 · 5 + 9). Both are exact and give the same answer whatever the chunks.

Ties at the threshold are kept in (tensor order, flat index) order. −0 equals +0. NaN raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_suite.kernels import checks
from peft_suite.kernels.ops import sparse as ops

__all__ = ["SelectionThreshold", "kth_value", "quantile", "select_below", "select_mask", "select_topk"]

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements looked at together
SAMPLE = 1 << 18  # elements that bracket the answer
COLLECT = 1 << 22  # most elements collected in the bracket

Progress = Callable[[int, int], None]
Score = Callable[[str, Tensor], Tensor]
Tensors = Sequence[Tensor] | Mapping[str, Tensor]


class SelectionThreshold(NamedTuple):
    """The k-th value of many tensors.

    Attributes:
        value: the value itself, exact.
        beyond: elements strictly beyond it (greater for ``largest``, smaller otherwise).
        ties: elements equal to it; the first k − beyond of them belong to the k selected.
    """

    value: float
    beyond: int
    ties: int


class _Elements:
    """The elements of a list of tensors, or of scores made from them, in chunks of float32 or float64."""

    def __init__(
        self,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        absolute: bool,
        score: Score | None = None,
        progress: Progress | None = None,
    ) -> None:
        for name, tensor in zip(names, tensors):
            if not isinstance(tensor, Tensor) or tensor.dtype not in checks.FLOATS or tensor.is_meta:
                found = checks.shape_of(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise checks.fail("tensors", f"{name!r} is {found}", "floating tensors with values")
        self.names, self.tensors, self.absolute, self.score, self.progress = names, tensors, absolute, score, progress
        self.sizes = [t.numel() for t in tensors]
        self.total = sum(self.sizes)
        wide = any(t.dtype == torch.float64 for t in tensors)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))

    def flat(self, at: int) -> Tensor:
        """One tensor or its score, flat, in its own dtype."""
        tensor = self.tensors[at].detach()
        if self.score is not None:
            with torch.no_grad():
                result = self.score(self.names[at], tensor)
            if not isinstance(result, Tensor) or result.shape != tensor.shape or not result.is_floating_point():
                found = checks.shape_of(result) if isinstance(result, Tensor) else type(result).__name__
                raise checks.fail("score", f"gave {found} for {self.names[at]!r}", f"floats {tuple(tensor.shape)}")
            tensor = result.detach()
        return tensor.reshape(-1)

    def of(self, at: int) -> Iterator[tuple[int, Tensor]]:
        """(flat position, chunk) of one tensor; |x| is not taken here."""
        flat = self.flat(at)
        size = CHUNK["cpu" if flat.device.type == "cpu" else "cuda"]
        for start in range(0, flat.numel(), size):
            yield start, flat[start : start + size].to(self.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for at in range(len(self.tensors)):
            for _, chunk in self.of(at):
                yield chunk
                done += chunk.numel()
                if self.progress is not None:
                    self.progress(done, self.total)

    def sample(self, count: int) -> Tensor:
        """About ``count`` elements: runs of neighbours at places spread evenly over all elements."""
        run = min(64, self.total)
        step = torch.arange(max(count // run, 1), dtype=torch.float64)
        places = (torch.frac((step + 0.5) * 0.6180339887498949) * (self.total - run)).long().sort().values
        ends = torch.tensor(self.sizes).cumsum(0)
        cuts = torch.searchsorted(places, ends).tolist()
        parts = []
        for at, (first, last) in enumerate(zip([0, *cuts], cuts)):
            if first == last:
                continue
            flat, size = self.flat(at), self.sizes[at]
            starts = (places[first:last] - (int(ends[at]) - size)).clamp(max=max(size - run, 0))
            picked = (starts[:, None] + torch.arange(min(run, size))).view(-1)
            parts.append(flat[picked.to(flat.device)].to(self.dtype))
        x = torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)
        return x.abs() if self.absolute else x


def _refuse_nan(elements: _Elements) -> None:
    for at, name in enumerate(elements.names):
        for start, chunk in elements.of(at):
            bad = torch.nonzero(torch.isnan(chunk))
            if bad.numel():
                where = start + int(bad[0])
                raise checks.fail(
                    "tensors", f"{name!r} holds NaN at flat position {where}", "numbers, which can be ordered"
                )


# the element of ascending rank r --------------------------------------------------------------------------------------


def _ranked(elements: _Elements, rank: int) -> tuple[float, int, int]:
    """(value, elements below it, elements equal to it) of ascending rank ``rank``, 0 ≤ rank < total."""
    if elements.device.type == "cpu":
        found = _bracketed(elements, rank)
        if found is not None:
            return found
    return _radix(elements, rank)


def _bracketed(elements: _Elements, rank: int) -> tuple[float, int, int] | None:
    """Selection among what lies in a bracket that a sample gives; None where the bracket misses or is too full."""
    total = elements.total
    if total <= COLLECT:
        low, high = -math.inf, math.inf
    else:
        sample = elements.sample(SAMPLE)
        if bool(torch.isnan(sample).any()):
            _refuse_nan(elements)
        n = sample.numel()
        share = rank / max(total - 1, 1)
        margin = 12 * math.sqrt(max(share * (1 - share), 16 / n) / n)  # neighbours are alike: wide
        ordered = sample.sort().values
        first, last = math.floor((share - margin) * n), math.ceil((share + margin) * n)
        low = float(ordered[first]) if first > 0 else -math.inf
        high = float(ordered[last]) if last < n - 1 else math.inf
    kind: type[np.floating] = np.float64 if elements.dtype == torch.float64 else np.float32  # type: ignore[type-arg]
    lower, upper = kind(low), kind(high)
    below = kept = 0
    inside: list[np.ndarray] = []  # type: ignore[type-arg]
    for chunk in elements:
        if elements.absolute:
            chunk = chunk.abs()
        x = chunk.numpy()
        if np.isnan(np.max(x)):
            _refuse_nan(elements)
        not_low = x >= lower
        below += x.size - int(np.count_nonzero(not_low))
        not_low &= x <= upper
        some = x[not_low]
        kept += some.size
        if kept > COLLECT:
            return None
        inside.append(some)
    if not below <= rank < below + kept:
        return None
    collected = torch.from_numpy(np.concatenate(inside))
    value = torch.kthvalue(collected, rank - below + 1).values
    less = int(torch.count_nonzero(collected < value))
    ties = int(torch.count_nonzero(collected == value))
    return float(value) + 0.0, below + less, ties


def _radix(elements: _Elements, rank: int) -> tuple[float, int, int]:
    """Radix selection: one histogram pass a digit over everything."""
    width, digits = (64, (11, 11, 11, 11, 11, 9)) if elements.dtype == torch.float64 else (32, (11, 11, 10))
    shift, prefix, below, ties = width, None, 0, 0
    for step, bits in enumerate(digits):
        shift -= bits
        counts = torch.zeros(1 << bits, dtype=torch.int64)
        for chunk in elements:
            if step == 0 and bool(torch.isnan(chunk).any()):
                _refuse_nan(elements)
            counts += ops.HISTOGRAM(chunk.device, chunk, elements.absolute, shift, bits, prefix).cpu()
        upto = counts.cumsum(0)
        at = int(torch.searchsorted(upto, rank - below, right=True))
        below += int(upto[at]) - int(counts[at])
        ties = int(counts[at])
        prefix = at - (1 << (bits - 1)) if prefix is None else (prefix << bits) | at
    assert prefix is not None
    return _value(prefix, elements), below, ties


def _value(image: int, elements: _Elements) -> float:
    """The float whose ordered integer image this is."""
    wide = elements.dtype == torch.float64
    if image < 0:
        image ^= torch.iinfo(torch.int64 if wide else torch.int32).max
    bits = torch.tensor(image, dtype=torch.int64 if wide else torch.int32)
    return float(bits.view(elements.dtype))


def _threshold(elements: _Elements, k: int, largest: bool) -> SelectionThreshold:
    if k == 0:
        return SelectionThreshold(math.inf if largest else -math.inf, 0, 0)
    value, below, ties = _ranked(elements, elements.total - k if largest else k - 1)
    return SelectionThreshold(value, elements.total - below - ties if largest else below, ties)


# public functions -----------------------------------------------------------------------------------------------------


def kth_value(
    tensors: Tensors,
    k: int,
    *,
    largest: bool = True,
    absolute: bool = True,
    progress: Progress | None = None,
) -> SelectionThreshold:
    """The k-th largest (or smallest) of |x| (or x) over all elements of all tensors, exactly.

    Args:
        tensors: a sequence or a mapping of floating tensors of any shapes; compared in float32, or in float64 if any
            of them is float64.
        k: 0 ≤ k ≤ number of elements; k = 0 gives ±inf with nothing beyond.
        largest: count from the largest downwards.
        absolute: compare magnitudes.
        progress: called with (elements done, elements in all) of each pass.

    Memory: one chunk, a histogram or at most 2²² collected elements.

    Raises:
        KernelArgumentError: NaN, a k out of range, tensors that are not floating.
    """
    names, flat = _listed(tensors)
    elements = _Elements(names, flat, absolute, None, progress)
    return _threshold(elements, _rank("k", k, elements.total), largest)


def select_mask(
    tensors: Tensors,
    k: int,
    *,
    largest: bool = True,
    absolute: bool = True,
    progress: Progress | None = None,
) -> list[Tensor] | dict[str, Tensor]:
    """Boolean masks, shaped like the tensors, of the k largest (smallest) elements; exactly k are True.

    A mapping gives a mapping. See :func:`kth_value`.
    """
    names, flat = _listed(tensors)
    elements = _Elements(names, flat, absolute, None, progress)
    threshold = _threshold(elements, _rank("k", k, elements.total), largest)
    masks: list[Tensor] = []
    for tensor, index in zip(flat, _kept(elements, threshold, k, largest)):
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        mask[index] = True
        masks.append(mask.view(tensor.shape))
    return dict(zip(names, masks)) if isinstance(tensors, Mapping) else masks


def select_topk(
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    k: int | Mapping[str, int] | None = None,
    *,
    fraction: float | None = None,
    per_tensor: bool = False,
    score: Score | str | None = None,
    largest: bool = True,
    index_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The best entries of a model: name -> sorted flat positions, empty tensors included.

    Args:
        named_tensors: a mapping, or pairs such as ``model.named_parameters()``.
        k: how many in all, or a mapping name -> how many of that tensor (names left out: none).
        fraction: instead of ``k``: round(fraction · elements), of all together or of each tensor (``per_tensor``).
        per_tensor: ``k`` or ``fraction`` applies to each tensor by itself.
        score: ``"magnitude"`` (default) |w|; ``"value"`` w; or a function (name, tensor) -> floats of the same shape,
            called once a tensor and pass, which must give the same each time. Scores are compared in float32,
            in float64 if one of the tensors is float64.
        largest: the largest scores; False: the smallest.
        index_dtype: int32 or int64; None: int32 where it suffices.
        progress: see :func:`kth_value`.

    Returns:
        One index a tensor in the order given, on the tensor's device.
    """
    names, flat = _listed(dict(named_tensors))
    if (k is None) == (fraction is None):
        raise checks.fail("k", f"is {k} with fraction {fraction}", "either k or fraction")
    if fraction is not None and not 0 <= fraction <= 1:
        raise checks.fail("fraction", f"is {fraction}", "a number from 0 to 1")
    if isinstance(score, str) or score is None:
        absolute = checks.choice("score", score or "magnitude", ("magnitude", "value")) == "magnitude"
        function = None
    else:
        absolute, function = False, score
    if index_dtype is not None:
        checks.index_dtype(index_dtype)
    if not per_tensor and not isinstance(k, Mapping):
        elements = _Elements(names, flat, absolute, function, progress)
        count = _rank("k", round(fraction * elements.total) if fraction is not None else k, elements.total)
        threshold = _threshold(elements, count, largest)
        return dict(zip(names, _typed(_kept(elements, threshold, count, largest), flat, index_dtype)))
    unknown = sorted(set(k) - set(names)) if isinstance(k, Mapping) else []
    if unknown:
        raise checks.fail("k", f"names {unknown[0]!r}", "names of the tensors given")
    indices = []
    for name, tensor in zip(names, flat):
        elements = _Elements([name], [tensor], absolute, function, progress)
        asked = k.get(name, 0) if isinstance(k, Mapping) else k
        count = _rank("k", round(fraction * elements.total) if fraction is not None else asked, elements.total)
        indices += _kept(elements, _threshold(elements, count, largest), count, largest)
    return dict(zip(names, _typed(indices, flat, index_dtype)))


def select_below(
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    threshold: float,
    *,
    index_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Name -> sorted flat positions where |w| < threshold, strictly, compared in each tensor's own dtype."""
    names, flat = _listed(dict(named_tensors))
    indices = []
    for name, tensor in zip(names, flat):
        elements = _Elements([name], [tensor], True)
        found = [
            torch.nonzero(chunk.abs() < threshold).squeeze(1) + start
            for start, chunk in ((s, c.to(tensor.dtype)) for s, c in elements.of(0))
        ]
        indices.append(torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=tensor.device))
    return dict(zip(names, _typed(indices, flat, index_dtype)))


def quantile(
    tensors: Tensors | Tensor,
    q: float,
    *,
    interpolation: str = "linear",
    absolute: bool = False,
    progress: Progress | None = None,
) -> float:
    """The q-quantile of all elements at any size, from the order statistics around q · (n − 1).

    ``interpolation``: ``"linear"``, ``"lower"``, ``"higher"``, ``"midpoint"`` or ``"nearest"``, as torch and numpy
    define them; the position is computed in float64.
    """
    checks.choice("interpolation", interpolation, ("linear", "lower", "higher", "midpoint", "nearest"))
    if isinstance(q, bool) or not isinstance(q, int | float) or not 0 <= q <= 1:
        raise checks.fail("q", f"is {q!r}", "a number from 0 to 1")
    names, flat = _listed([tensors] if isinstance(tensors, Tensor) else tensors)
    elements = _Elements(names, flat, absolute, None, progress)
    if elements.total == 0:
        raise checks.fail("tensors", "hold no elements", "at least one")
    position = q * (elements.total - 1)
    if interpolation == "nearest":
        position = float(round(position))
    lower = math.ceil(position) if interpolation == "higher" else math.floor(position)
    upper = math.floor(position) if interpolation == "lower" else math.ceil(position)
    first, below, ties = _ranked(elements, lower)
    second = first if upper < below + ties else _ranked(elements, upper)[0]
    share = 0.5 * (upper - lower) if interpolation == "midpoint" else position - lower
    return first if first == second or share == 0 else first + share * (second - first)


def _listed(tensors: Tensors) -> tuple[list[str], list[Tensor]]:
    if isinstance(tensors, Tensor):
        raise checks.fail("tensors", f"is one tensor, {checks.shape_of(tensors)}", "a list or a mapping of tensors")
    if isinstance(tensors, Mapping):
        return list(tensors), list(tensors.values())
    return [str(i) for i in range(len(tensors))], list(tensors)


def _rank(argument: str, k: int | None, total: int) -> int:
    k = checks.count(argument, k)
    if k > total:
        raise checks.fail(argument, f"is {k}", f"at most the {total} elements there are")
    return k


def _kept(elements: _Elements, threshold: SelectionThreshold, k: int, largest: bool) -> list[Tensor]:
    """Sorted int64 positions of each tensor: all beyond the threshold and the first k − beyond ties."""
    free = k - threshold.beyond
    value = threshold.value
    indices = []
    for at, tensor in enumerate(elements.tensors):
        found = []
        for start, chunk in elements.of(at) if k else ():
            x = chunk.abs() if elements.absolute else chunk
            keep = _compare(x, value, largest, equal=free > 0)
            positions = torch.nonzero(keep).squeeze(1)
            if free > 0 and positions.numel():
                tie = x[positions] == value
                ties = int(tie.sum())
                if ties > free:
                    positions = positions[~tie | (tie.cumsum(0) <= free)]
                free -= min(ties, free)
            found.append(positions + start)
        empty = torch.empty(0, dtype=torch.int64, device=tensor.device)
        indices.append(torch.cat(found).to(tensor.device) if found else empty)
    return indices


def _compare(x: Tensor, value: float, largest: bool, equal: bool) -> Tensor:
    if x.device.type == "cpu":
        y = x.numpy()
        bound = y.dtype.type(value)
        if largest:
            return torch.from_numpy(y >= bound if equal else y > bound)
        return torch.from_numpy(y <= bound if equal else y < bound)
    if largest:
        return x >= value if equal else x > value
    return x <= value if equal else x < value


def _typed(indices: list[Tensor], tensors: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    return [i.to(dtype or (torch.int32 if t.numel() <= 2**31 else torch.int64)) for i, t in zip(indices, tensors)]
