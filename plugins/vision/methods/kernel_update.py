"""The update of SNELL and its gradient, written out: recomputed in backward, nothing dense kept in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Form", "KernelLinear", "KernelWeight", "split", "update"]

Rows = tuple[int, int]
WHOLE = 1 << 15  # elements up to which a selection looks at all of them at once
SAMPLE = 1 << 14  # elements that bracket a threshold


class Form(NamedTuple):
    """How the kernel becomes the update: coefficients c_h; K * |K| instead of K * (|K| - t); sparse at all; a tail."""

    coefficients: tuple[float, ...]
    official: bool
    sparse: bool
    tail: bool


# the threshold -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("peft_suite::share_threshold", mutates_args=())
def share_threshold(a: Tensor, share: Tensor) -> Tensor:
    """The ``share``-quantile of all values, linear between order statistics: torch.quantile of any size, no sort."""
    flat, last = a.reshape(-1), a.numel() - 1
    # torch.quantile computes the rank in the values' dtype, which is exact below 2**24 values
    rank = share.to("cpu", torch.float64 if last >= 1 << 24 else a.dtype) * last
    low = int(rank.floor())
    high = min(int(rank.ceil()), last)
    if flat.device.type == "cpu":
        first, second = _order_statistics(flat.contiguous().numpy(), low, high)
        pair = torch.tensor([first, second], dtype=a.dtype)
    else:
        pair = torch.stack([torch.kthvalue(flat, k + 1).values for k in (low, high)])
    return torch.lerp(pair[0], pair[1], float(rank - low))


@share_threshold.register_fake
def _(a: Tensor, share: Tensor) -> Tensor:
    return a.new_empty(())


def _order_statistics(x: np.ndarray, low: int, high: int) -> tuple[float, float]:  # type: ignore[type-arg]
    """Values of ascending rank ``low`` and ``high = low or low + 1``: a sample brackets them, one pass collects."""
    n, below, inside = x.size, 0, x
    if n > WHOLE:
        sample = np.sort(x[:: max(n // SAMPLE, 1)])
        m = sample.size
        margin = 0.02 + 4 / m
        left, right = int((low / n - margin) * m), int((high / n + margin) * m) + 1
        keep: np.ndarray | None = None  # type: ignore[type-arg]
        if left > 0:
            keep = x >= sample[left]
            below = n - int(np.count_nonzero(keep))
        if right < m:
            under = x <= sample[right]
            keep = under if keep is None else np.logical_and(keep, under, out=keep)
        inside = x if keep is None else x[keep]
        if not (below <= low and high < below + inside.size):  # the sample misled, or NaN
            below, inside = 0, x
    found = np.partition(inside, (low - below, high - below))
    return float(found[low - below]), float(found[high - below])


# kernel, update, gradient --------------------------------------------------------------------------------------------


def _distances(outer: Tensor, inner: Tensor) -> Tensor:
    """``||outer_o - inner_i||`` by one small product, as torch.cdist does for this size: ``[out, in]``."""
    left = torch.cat((-2 * outer, outer.square().sum(-1, keepdim=True), torch.ones_like(outer[:, :1])), dim=-1)
    right = torch.cat((inner, torch.ones_like(inner[:, :1]), inner.square().sum(-1, keepdim=True)), dim=-1)
    return (left @ right.t()).clamp_min_(0).sqrt_()


def _kernel(form: Form, inner: Tensor, outer: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(K, distances of every h), each ``[out, in]``."""
    distances = [_distances(o, i) for o, i in zip(outer, inner, strict=True)]
    kernel = distances[0] * form.coefficients[0]
    for c, d in zip(form.coefficients[1:], distances[1:], strict=True):
        kernel.add_(d, alpha=c)
    return kernel, distances


def split(
    slices: Sequence[Rows], inner: Tensor, outer: Tensor, share: Tensor, tail: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """inner [H, in, q], outer [H, rows, q], sparsity [] and tail [3] or None of every slice."""
    rows = torch.split(outer, [stop - start for start, stop in slices], dim=1)
    return [
        (inner[i], rows[i], share[i], None if tail is None else tail[3 * i : 3 * i + 3]) for i in range(len(slices))
    ]


def update(
    form: Form, inner: Tensor, outer: Tensor, share: Tensor, tail: Tensor | None, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(Delta ``[out, in]``, t) of one slice; see :func:`split`."""
    kernel, _ = _kernel(form, inner, outer)
    if tail is not None:
        alpha, gamma, beta = tail
        kernel = kernel.addcmul(torch.softmax(kernel / gamma, dim=0), alpha.expand_as(kernel)).add_(beta)
    if not form.sparse:
        return kernel, kernel.new_zeros(())
    size = kernel.abs()
    t = share_threshold(size, share) if threshold is None else threshold
    if form.official:
        return kernel.mul_(_above(size, t)), t
    return kernel.mul_(size.sub_(t).clamp_min_(0)), t


def _above(size: Tensor, t: Tensor) -> Tensor:
    return size.masked_fill_(size <= t, 0.0)


def _gradients(
    form: Form, inner: Tensor, outer: Tensor, tail: Tensor | None, t: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of inner, outer and tail from that of Delta, ``[out, in]``; t is constant."""
    raw, distances = _kernel(form, inner, outer)
    kernel, soft = raw, raw
    if tail is not None:
        alpha, gamma, beta = tail
        soft = torch.softmax(raw / gamma, dim=0)
        kernel = raw + alpha * soft + beta
    if form.sparse:
        size = kernel.abs()
        slope = size if form.official else 2 * size - t  # |K| as a constant; d/dK of K * (|K| - t)
        grad = grad * slope.masked_fill_(size <= t, 0.0)
    to_tail: Tensor | None = None
    if tail is not None:
        to_soft = grad * alpha
        to_logits = soft * (to_soft - (to_soft * soft).sum(0, keepdim=True))
        to_tail = torch.stack(((grad * soft).sum(), -(to_logits * raw).sum() / gamma.square(), grad.sum()))
        grad = grad + to_logits / gamma
    to_inner, to_outer = [], []
    for c, d, i, o in zip(form.coefficients, distances, inner, outer, strict=True):
        ratio = grad / d.masked_fill_(d == 0, float("inf"))  # no direction at distance 0
        sums = ratio @ torch.cat((i, torch.ones_like(i[:, :1])), dim=-1)
        to_outer.append(c * (o * sums[:, -1:] - sums[:, :-1]))
        sums = ratio.t() @ torch.cat((o, torch.ones_like(o[:, :1])), dim=-1)
        to_inner.append(c * (i * sums[:, -1:] - sums[:, :-1]))
    return torch.stack(to_inner), torch.stack(to_outer), to_tail


Points = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


def _weight(
    form: Form,
    slices: Sequence[Rows],
    out: int,
    base: Tensor | None,
    points: Points,
    kind: torch.dtype,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(W + Delta, or Delta in its rows, ``[out, in]`` in ``kind``; the thresholds)."""
    with torch.autocast(points[0].device.type, enabled=False):
        pieces, found, at = [], [], 0
        fan_in = points[0].shape[2]
        for k, ((start, stop), own) in enumerate(zip(slices, split(slices, *points), strict=True)):
            delta, t = update(form, *own, None if thresholds is None else thresholds[k])
            found.append(t)
            if start > at:
                pieces.append(delta.new_zeros(start - at, fan_in) if base is None else base[at:start])
            pieces.append(delta if base is None else delta.add_(base[start:stop]))
            at = stop
        if at < out:
            pieces.append(points[0].new_zeros(out - at, fan_in) if base is None else base[at:])
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.to(kind), torch.stack(found)


def _pull(
    form: Form, slices: Sequence[Rows], points: Points, thresholds: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of inner, outer, sparsity (none) and tail from that of the weight."""
    with torch.autocast(points[0].device.type, enabled=False):
        each = [
            _gradients(form, inner, outer, tail, thresholds[k], grad[start:stop].to(inner.dtype))
            for k, ((start, stop), (inner, outer, _, tail)) in enumerate(
                zip(slices, split(slices, *points), strict=True)
            )
        ]
        tails = [tail for _, _, tail in each if tail is not None]
        inner, outer = torch.stack([i for i, _, _ in each]), torch.cat([o for _, o, _ in each], dim=1)
        return inner, outer, None, torch.cat(tails) if tails else None


class KernelLinear(torch.autograd.Function):
    """``x (W + Delta)^T + b``, without W and b where they are None. Saves x, W and the points."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        inner: Tensor,
        outer: Tensor,
        share: Tensor,
        tail: Tensor | None,
        form: Form,
        slices: tuple[Rows, ...],
        out: int,
    ) -> tuple[Tensor, Tensor]:
        whole, thresholds = _weight(form, slices, out, weight, (inner, outer, share, tail), x.dtype)
        return F.linear(x, whole, bias), thresholds

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, inner, outer, share, tail, ctx.form, ctx.slices, ctx.out = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[1], inner, outer, share, tail)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 10
        x, weight, thresholds, *rest = ctx.saved_tensors
        points: Points = (rest[0], rest[1], rest[2], rest[3])
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            whole, _ = _weight(ctx.form, ctx.slices, ctx.out, weight, points, grad.dtype, thresholds)
            to_x = (flat @ whole).view(x.shape)
            del whole
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        pulled: tuple[Tensor | None, ...] = (None,) * 4
        if any(ctx.needs_input_grad[3:7]):
            pulled = _pull(ctx.form, ctx.slices, points, thresholds, flat.t() @ x.reshape(-1, x.shape[-1]))
        return (to_x, None, to_bias, *pulled, None, None, None)


class KernelWeight(torch.autograd.Function):
    """``W + Delta``, for layers whose product somebody else computes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        weight: Tensor,
        inner: Tensor,
        outer: Tensor,
        share: Tensor,
        tail: Tensor | None,
        form: Form,
        slices: tuple[Rows, ...],
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(weight.dtype, inner.dtype)
        return _weight(form, slices, weight.shape[0], weight, (inner, outer, share, tail), kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, inner, outer, share, tail, ctx.form, ctx.slices = inputs
        ctx.kind = weight.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], inner, outer, share, tail)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 7
        thresholds, *rest = ctx.saved_tensors
        pulled = _pull(ctx.form, ctx.slices, (rest[0], rest[1], rest[2], rest[3]), thresholds, grad)
        return (grad.to(ctx.kind) if ctx.needs_input_grad[0] else None, *pulled, None, None)
