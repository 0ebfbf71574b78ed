"""The trainable parts of LoRA and DoRA, by the form in which they are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Part

if TYPE_CHECKING:
    from peft_suite.methods.lora import LoRAConfig

Rows = tuple[int, int]


class LowRank(Part):
    """Shared by all forms: factors of one module's slices, stored stacked.

    ``lora_A: [S*r, in]`` (``[r, in]`` when shared) and ``lora_B: [sum of slice heights, r]`` for S slices. For a
    convolution ``in`` is ``in_channels / groups * k_h * k_w``.
    """

    foldable = True

    def __init__(self, shape: tuple[int, int], slices: Sequence[Rows | None], config: LoRAConfig) -> None:
        super().__init__()
        out, fan_in = shape
        self.out, self.rank, self.own_scale = out, config.rank, config.scale
        self.slices: tuple[Rows, ...] = tuple(sorted((0, out) if s is None else s for s in slices))
        self.shared = config.shared_a or len(self.slices) == 1
        copies = 1 if self.shared else len(self.slices)
        self.lora_A = nn.Parameter(torch.empty(copies * self.rank, fan_in))
        self.lora_B = nn.Parameter(torch.empty(sum(stop - start for start, stop in self.slices), self.rank))
        self.reset(config.init)

    def reset(self, init: str) -> None:
        """Initialise as ``LoRAConfig.init`` says."""
        if init == "official":
            nn.init.trunc_normal_(self.lora_A, std=0.02)
            nn.init.trunc_normal_(self.lora_B, std=0.02)
            return
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        """s of the formula, times the strength that the adapter is used at."""
        return self.own_scale * self.strength

    @property
    def scalable(self) -> bool:  # type: ignore[override]
        """DoRA rescales directions: what it adds is no multiple of anything."""
        return getattr(self, "magnitude", None) is None

    @property
    def whole(self) -> bool:
        """B as it is stored is B for the whole output: no gaps, and one A."""
        ends = [0, *(stop for _, stop in self.slices)]
        return self.shared and ends[-1] == self.out and all(s[0] == e for s, e in zip(self.slices, ends, strict=False))

    def up(self) -> Tensor:
        """B for the whole output, ``[out, rows of A]``: slices in their rows and columns, zero elsewhere."""
        return self.lora_B if self.whole else spread(self.lora_B, self.slices, self.shared, self.out)

    def delta(self) -> Tensor:
        """``s * B A`` for the whole matrix, ``[out, in]``."""
        return self.scale * (self.up() @ self.lora_A)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s B A``, touching the adapted rows only."""
        weight = weight.clone()
        flat = weight.view(weight.shape[0], -1)
        row = 0
        for i, (start, stop) in enumerate(self.slices):
            first = 0 if self.shared else i * self.rank
            flat[start:stop].addmm_(
                self.lora_B[row : row + stop - start], self.lora_A[first : first + self.rank], alpha=self.scale
            )
            row += stop - start
        return weight, bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, rows={list(self.slices)} of {self.out}"


class LinearLoRA(LowRank):
    """``y + s * (drop(x) A^T) B^T`` beside a Linear layer, for updates of the whole weight."""

    def __init__(self, shape: tuple[int, int], slices: Sequence[Rows | None], config: LoRAConfig) -> None:
        super().__init__(shape, slices, config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [..., out]``, ``x: [..., in]``."""
        return linear_update(self, y, x if self.dropout is None else self.dropout(x))


class SlicedLoRA(LinearLoRA):
    """The same for slices with their own A each, or with rows between them that stay as they are."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [..., out]``, ``x: [..., in]``."""
        return sliced_update(self, y, x if self.dropout is None else self.dropout(x))


def linear_update(part: LowRank, y: Tensor, x: Tensor) -> Tensor:
    """``y + s * (x A^T) B^T`` for a part that is ``whole``."""
    h = F.linear(_flat(x), part.lora_A)  # [T, r]
    return torch.addmm(_flat(y), h, part.lora_B.t(), alpha=part.scale).view(y.shape)


def sliced_update(part: LowRank, y: Tensor, x: Tensor) -> Tensor:
    """``y + s * (x A^T) B^T`` for any slices."""
    flat = _SlicedUpdate.apply(  # type: ignore[no-untyped-call]
        _flat(y), _flat(x), part.lora_A, part.lora_B, part.slices, part.shared, part.scale
    )[0]
    return cast(Tensor, flat).view(y.shape)


def _flat(x: Tensor) -> Tensor:
    """``[..., d]`` as ``[T, d]``."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


class _SlicedUpdate(torch.autograd.Function):
    """``y + s * h B^T`` with ``h = x A^T`` and B zero outside the slices; B is spread out again instead of being saved.

    Shapes: ``y: [T, out]``, ``x: [T, in]``, ``A: [S*r or r, in]``, ``B: [sum of heights, r]``, ``h: [T, rows of A]``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        y: Tensor, x: Tensor, a: Tensor, b: Tensor, slices: tuple[Rows, ...], shared: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        h = x @ a.t()
        return torch.addmm(y, h, spread(b, slices, shared, y.shape[-1]).t().to(h.dtype), alpha=scale), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, a, b, ctx.slices, ctx.shared, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, b, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 7
        x, a, b, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second backward needs h as a function of x and A
            h = x @ a.t()
        r, row = b.shape[1], 0
        grads_h: list[Tensor] = []
        grads_b: list[Tensor] = []
        for i, (start, stop) in enumerate(ctx.slices):
            g = grad[:, start:stop]
            h_i = h if ctx.shared else h[:, i * r : (i + 1) * r]
            grads_h.append(g @ b[row : row + stop - start].to(g.dtype))
            grads_b.append(g.t() @ h_i.to(g.dtype))
            row += stop - start
        grad_h = sum(grads_h[1:], grads_h[0]) if ctx.shared else torch.cat(grads_h, dim=1)
        grad_b = torch.cat(grads_b)
        if ctx.scale != 1.0:
            grad_h, grad_b = grad_h * ctx.scale, grad_b * ctx.scale
        grad_a = (grad_h.t() @ x.to(grad_h.dtype)).to(a.dtype)
        grad_x = (grad_h @ a.to(grad_h.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_a, grad_b.to(b.dtype), None, None, None


def spread(b: Tensor, slices: Sequence[Rows], shared: bool, out: int) -> Tensor:
    """Stacked slices of B, ``[sum of heights, r]``, in their places of ``[out, rows of A]``, zero elsewhere."""
    rank, row, blocks = b.shape[1], 0, []
    width = rank if shared else rank * len(slices)
    for i, (block, (start, stop)) in enumerate(zip(torch.split(b, [t - s for s, t in slices]), slices, strict=True)):
        left = 0 if shared else i * rank
        last = out - stop if i == len(slices) - 1 else 0
        blocks.append(F.pad(block, (left, width - rank - left, start - row, last)))
        row = stop
    return torch.cat(blocks)


class ConvLoRA(LowRank):
    """``y + s * B(A(x))`` beside a Conv2d without groups: A has the layer's kernel, stride and padding, B is 1x1."""

    def __init__(self, module: nn.Conv2d, slices: Sequence[Rows | None], config: LoRAConfig) -> None:
        super().__init__((module.out_channels, math.prod(module.weight.shape[1:])), slices, config)
        self.convolve = convolution(module)
        self.kernel = tuple(module.weight.shape[1:])
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [B, out, H', W']``, ``x: [B, in, H, W]``."""
        return conv_update(self, y, x if self.dropout is None else self.dropout(x), self.convolve, self.kernel)


Layer = Callable[[Tensor, Tensor], Tensor]


def convolution(module: nn.Conv2d) -> Layer:
    """``f(x, weight)`` with the strides, padding and dilation of a Conv2d without groups, and no bias."""
    return partial(F.conv2d, bias=None, stride=module.stride, padding=module.padding, dilation=module.dilation)


def conv_update(part: LowRank, y: Tensor, x: Tensor, convolve: Layer, kernel: Sequence[int]) -> Tensor:
    """``y + s * B(A(x))``."""
    h = convolve(x, part.lora_A.view(-1, *kernel))  # [B, rows of A, H', W']
    return torch.add(y, F.conv2d(h, part.up()[:, :, None, None]), alpha=part.scale)


class WeightLoRA(LowRank):
    """The update in weight space, ``W + s B A``; with DoRA ``m * (W + s B A) / ||W + s B A||_row``."""

    def __init__(
        self, module: nn.Linear | nn.Conv2d, slices: Sequence[Rows | None], config: LoRAConfig, device: torch.device
    ) -> None:
        weight = module.weight
        super().__init__((weight.shape[0], math.prod(weight.shape[1:])), slices, config)
        if config.dora:
            self.magnitude = nn.Parameter(self.adapted(weight.detach().float().flatten(1).norm(dim=1).to(device)))
        else:
            self.register_parameter("magnitude", None)

    def forward(self, weight: Any, bias: Any, x: Tensor | None = None) -> Any:
        """``weight: [out, ...]``; the same shape comes back, in the weight's dtype."""
        new = weight.to(self.compute) + self.delta().view(weight.shape)
        if self.magnitude is not None:
            stretch = self.stretch(self.adapted(new.detach().flatten(1).norm(dim=1)))
            new = new * stretch.view(-1, *[1] * (weight.ndim - 1))
        return new.to(weight.dtype), bias

    def adapted(self, rows: Tensor) -> Tensor:
        """Those of ``rows: [out]`` that the slices name, ``[sum of heights]``."""
        return torch.cat([rows[start:stop] for start, stop in self.slices])

    def stretch(self, length: Tensor) -> Tensor:
        """``m / ||W + s B A||_row`` in the adapted rows, one elsewhere, ``[out]``; a row of zeros stays zero.

        ``length: [sum of heights]``.
        """
        own = cast(Tensor, self.magnitude) / length.clamp(min=torch.finfo(length.dtype).tiny)
        if self.whole:
            return own
        pieces, last = [], 0
        for (start, stop), piece in zip(self.slices, torch.split(own, [b - a for a, b in self.slices]), strict=True):
            pieces += [own.new_ones(start - last), piece]
            last = stop
        return torch.cat([*pieces, own.new_ones(self.out - last)])

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight that forward makes."""
        new: tuple[Tensor, Tensor | None] = WeightLoRA.forward(self, weight, bias)
        return new


class DoRA(WeightLoRA):
    """DoRA without a gradient for the whole matrix, where the part is the last that changes the layer's weight.

        y = c * (x W^T + s * (x A^T) B^T) + b        c = m / ||W + s B A||_row

    The norm is constant in the gradient, so the new weight is made for its lengths alone and dropped again; backward
    keeps x, ``x A^T`` and the sum in brackets. Linear layers and convolutions without groups, padded with zeros.
    """

    def __init__(
        self, module: nn.Linear | nn.Conv2d, slices: Sequence[Rows | None], config: LoRAConfig, device: torch.device
    ) -> None:
        super().__init__(module, slices, config, device)
        self.layer: Layer = F.linear
        self.update: Callable[[LowRank, Tensor, Tensor], Tensor] = linear_update if self.whole else sliced_update
        self.after: tuple[int, ...] = ()  # axes behind that of the outputs
        if isinstance(module, nn.Conv2d):
            self.layer, self.after = convolution(module), (1, 1)
            self.update = partial(conv_update, convolve=self.layer, kernel=tuple(module.weight.shape[1:]))

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Always: the layer's output costs less than its weight."""
        return weight is not None and x is not None

    def forward(self, weight: Any, bias: Any, x: Tensor | None = None) -> Any:
        """Weight and bias; with ``x: [..., in]`` or ``[B, in, H, W]`` the layer's output in its dtype."""
        if x is None:
            return super().forward(weight, bias)
        own = (weight.dtype, self.compute)
        if own == (x.dtype, x.dtype) or torch.is_autocast_enabled(x.device.type):
            y = self.layer(x, weight)
            return self._stretched(self.update(self, y, x), weight, bias).to(y.dtype)
        y = self.layer(x.to(weight.dtype), weight)
        z = self.update(self, y.to(self.compute), x.to(self.compute))
        return self._stretched(z, weight, bias).to(x.dtype)

    def _stretched(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stretch = self.stretch(self.length(weight)).view(-1, *self.after)
        if bias is None:
            return z * stretch
        return torch.addcmul(bias.to(self.compute).view(-1, *self.after), z, stretch)

    @torch.no_grad()
    def length(self, weight: Tensor) -> Tensor:
        """``||W + s B A||`` of the adapted rows, ``[sum of heights]``, in the part's dtype under autocast too."""
        kind, r, row, found = weight.device.type, self.rank, 0, []
        mixed = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if mixed else nullcontext():
            flat = weight.flatten(1).to(self.compute)
            for i, (start, stop) in enumerate(self.slices):
                a = self.lora_A if self.shared else self.lora_A[i * r : (i + 1) * r]
                b = self.lora_B[row : row + stop - start]
                found.append(torch.addmm(flat[start:stop], b, a, alpha=self.scale).norm(dim=1))
                row += stop - start
        return torch.cat(found)
