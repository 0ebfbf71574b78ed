"""Reversible edits: how an adapter attaches itself to a frozen model without changing it.

Per module there is at most one resident object of each kind. It lives while any adapter exists; switching adapters only
replaces its ``active`` tuple, so that compiled models (which skip hook guards) see every switch.

==============  ====================================================  =============================
edit            the part computes                                     resident object
==============  ====================================================  =============================
before          ``x = part(x)`` on a module's input stream            forward pre-hook
after           ``y = part(y)`` on a module's output stream           forward hook
beside          ``y = part(y, x)`` from output and input              forward hook
branch          ``h = h + part(x)`` at a residual sum, x either the   forward override of the block
                un-normalised residual or what the sub-layer reads
inside          ``values = part(*values)`` at a named place           forward override of the module
reweigh         ``weight, bias = part(weight, bias)``                 forward override of the module
select          chosen entries of weight and bias train               forward override of the module
own             a trained copy of parameters                          reweigh, or a shadow
==============  ====================================================  =============================

The order at one module is: before, weight, after; each in the order of activation, but trained copies of a weight come
before what changes it. Merging folds in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Functional

__all__ = ["Beside", "Edit", "Part", "copies_first", "functional_of"]

Kind = Literal["before", "after", "beside", "branch", "inside", "reweigh", "select", "shadow"]


class Part(nn.Module):
    """A trainable piece of an adapter. Subclasses define ``forward`` and, where it folds into weights, ``fold``.

    Parts are kept in float32 whatever the backbone's dtype; inputs are cast to the part's dtype and outputs back. A
    part reads its parameters only inside ``forward``, so that sharding and offloading it works.

    Attributes:
        foldable: ``fold`` is exact.
        decay: False keeps all its parameters out of weight decay.
        scalable: what the part adds is multiplied by ``strength``; see :func:`peft_suite.scale`.
        replaces: number of base parameter values that the part stands in for (they are not counted twice).
        neutral: it changes no value, only what is kept for backward; plans, summaries and exchange leave it out.
        needs_context: inside a described forward, ``forward`` takes one more argument: what the block is given beside
            its stream, for example the geometry of a point cloud.
    """

    foldable: bool = False
    decay: bool = True
    scalable: bool = False
    strength: float = 1.0
    replaces: int = 0
    neutral: bool = False
    needs_context: bool = False
    compute: torch.dtype = torch.float32

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New (weight, bias) of ``module`` that make it compute what module and part compute together."""
        raise NotImplementedError(f"{type(self).__name__} does not fold")

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Before loading: take over sizes that are learned, not configured, from the part's tensors in the file."""

    def stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The form of this part's ``state`` dict that a file holds: itself, or less that computes exactly the same."""
        return state

    def restore(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict that :meth:`stored` made ``tensors`` from, or one that computes exactly the same."""
        return tensors

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Whether ``part(weight, bias, x)`` computes the module's output for ``x`` itself."""
        return False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Part:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        return self


@dataclass(frozen=True)
class Edit:
    """One recorded edit: what kind, at which module, with which part under which key of the adapter.

    ``argument`` and ``output`` name the stream (see :class:`peft_suite.Point`); ``branch`` the residual branch, or the
    place inside a described forward; ``normed`` that a branch part reads what the sub-layer reads.
    """

    kind: Kind
    path: str
    key: str
    part: Part
    argument: int | str = 0
    output: int | None = None
    branch: str = ""
    normed: bool = False


def bordered(part: Part, y: Tensor, *more: Tensor, context: Any = None) -> Tensor:
    """``part(y, *more)`` computed in the part's dtype (autocast decides where it is on), returned in y's dtype."""
    dtype = y.dtype
    last = (context,) if part.needs_context else ()
    out: Tensor
    if dtype is part.compute or torch.is_autocast_enabled(y.device.type):
        out = part(y, *more, *last)
    else:
        out = part(y.to(part.compute), *[m.to(part.compute) for m in more], *last)
    return out.to(dtype)


class Before:
    """Resident pre-hook of one module: replaces its input stream by what the active parts make of it."""

    def __init__(self, module: nn.Module, argument: int | str) -> None:
        self.argument = argument
        self.active: tuple[Part, ...] = ()
        self.handle = module.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        at = self.argument
        x = kwargs[at] if isinstance(at, str) else args[at]
        for part in self.active:
            x = bordered(part, x)
        if isinstance(at, str):
            return args, {**kwargs, at: x}
        return (*args[:at], x, *args[at + 1 :]), kwargs


class After:
    """Resident hook of one module: replaces its output stream by what the active parts make of it."""

    def __init__(self, module: nn.Module, argument: int | str, output: int | None) -> None:
        self.argument, self.output = argument, output
        self.active: tuple[tuple[bool, Part], ...] = ()  # (reads the module's input too?, part)
        self.handle = module.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.active:
            return None
        at, to = self.argument, self.output
        y = output if to is None else output[to]
        for beside, part in self.active:
            inputs = (kwargs[at] if isinstance(at, str) else args[at],) if beside else ()
            y = bordered(part, y, *inputs)
        return y if to is None else (*output[:to], y, *output[to + 1 :])


class Beside:
    """Resident forward override of one described module: calls parts in the middle of its forward.

    The anatomy's function is called as ``function(module, beside, *args, **kwargs)``. A block's function writes
    ``h = beside.attn(x, x + branch, read)`` and ``h = beside.mlp(x, x + branch, read)`` where the block adds its
    branches, ``read`` being what the sub-layer reads. Other places have names: ``beside.through("prefix", k, v)``.
    ``context`` is what the block was given beside its stream; parts that need it get it as it is.
    """

    def __init__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        self.block, self.function = block, function
        self.active: tuple[tuple[str, bool, Part], ...] = ()  # (branch or place, reads the norm's output?, part)
        block.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.block, self, *args, **kwargs)

    def attn(self, x: Tensor, h: Tensor, read: Tensor, context: Any = None) -> Tensor:
        """Add the attention branch's parts, computed from ``x`` or ``read``, to the residual sum ``h``."""
        return self._add("attn", x, h, read, context)

    def mlp(self, x: Tensor, h: Tensor, read: Tensor, context: Any = None) -> Tensor:
        """Add the MLP branch's parts, computed from ``x`` or ``read``, to the residual sum ``h``."""
        return self._add("mlp", x, h, read, context)

    def _add(self, branch: str, x: Tensor, h: Tensor, read: Tensor, context: Any) -> Tensor:
        for name, normed, part in self.active:
            if name == branch:
                h = h + bordered(part, read if normed else x, context=context)
        return h

    def has(self, place: str) -> bool:
        """Whether a part acts at ``place``."""
        return any(name == place for name, _, _ in self.active)

    def through(self, place: str, *values: Tensor, context: Any = None) -> tuple[Tensor, ...]:
        """``values`` after the parts at ``place``; parts get and give as many tensors as there are."""
        for name, _, part in self.active:
            if name == place:
                dtype = values[0].dtype
                if dtype is not part.compute and not torch.is_autocast_enabled(values[0].device.type):
                    values = tuple(v.to(part.compute) for v in values)
                values = tuple(v.to(dtype) for v in part(*values, *((context,) if part.needs_context else ())))
        return values

    def extend(self, place: str, value: Any) -> Any:
        """``value``, a structure and no stream, after the parts at ``place``; nothing is cast."""
        for name, _, part in self.active:
            if name == place:
                value = part(value)
        return value


class Reweigh:
    """Resident forward override of one module: its weight and bias pass through the active parts.

    BatchNorm layers keep their frozen statistics in train mode while this object lives, unless an active part brings
    its own (see :class:`BatchStatistics`). A class with ``further_inputs = True`` has its other positional inputs
    handed on: ``f(module, x, weight, bias, *inputs)``.
    """

    def __init__(self, module: nn.Module, function: Functional) -> None:
        self.module, self.function = module, function
        self.active: tuple[Part, ...] = ()
        self.statistics: BatchStatistics | None = None
        module.forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self.module
        weight, bias = module.weight, getattr(module, "bias", None)
        for part in self.active:
            if part is self.active[-1] and part.direct(weight, bias, x):
                return cast(Tensor, part(weight, bias, x))
            weight, bias = part(weight, bias)
        if weight is not None and bias is not None:
            bias = bias.to(weight.dtype)
        if self.statistics is not None:
            return self.statistics.normalise(self.module, x, weight, bias)
        more: tuple[Any, ...] = args if getattr(module, "further_inputs", False) else ()
        function: Callable[..., Tensor] = self.function
        if weight is not None and not x.is_floating_point():  # rows of a table: in the dtype of the frozen one
            return function(self.module, x, weight, bias, *more).to(module.weight.dtype)
        plain = weight is None or weight.dtype == x.dtype
        if plain or torch.is_autocast_enabled(x.device.type):
            return function(self.module, x, weight, bias, *more)
        more = tuple(m.to(weight.dtype) if isinstance(m, Tensor) and m.is_floating_point() else m for m in more)
        return function(self.module, x.to(weight.dtype), weight, bias, *more).to(x.dtype)


class Shadow:
    """Resident stand-in for parameters that a model reads directly (position embeddings, gains, unknown layers).

    While active, the trained tensor lies in the module's ``__dict__`` under the parameter's name and hides the frozen
    one from attribute look-up; the frozen parameter, its key and the module's class stay. Not usable under FSDP2, which
    replaces parameter objects: :func:`peft_suite.verify` detects that.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.active: tuple[Part, ...] = ()

    def show(self, active: tuple[Part, ...]) -> None:
        for part in self.active:
            for name in part._parameters:
                self.module.__dict__.pop(name, None)
        self.active = active
        for part in active:
            self.module.__dict__.update(part._parameters)


class EvalPin:
    """Keeps one module in eval mode through ``model.train()`` while ``active``: backbone dropout and drop path off."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.active = False
        self.modes: list[tuple[nn.Module, bool]] = []  # what each sub-module returns to
        module.train = self.train  # type: ignore[method-assign]

    def train(self, mode: bool = True) -> nn.Module:
        """``module.train`` while this object lives."""
        if self.active:
            self.modes = [(m, mode) for m, _ in self.modes]
        return type(self.module).train(self.module, mode and not self.active)

    def switch(self, on: bool) -> None:
        """Pin, or give every sub-module the mode it had or was told to have."""
        if on and not self.active:
            self.modes = [(m, m.training) for m in self.module.modules()]
            type(self.module).train(self.module, False)
        elif self.active and not on:
            for module, mode in self.modes:
                module.training = mode
        self.active = on


class Trained(Part):
    """A trained copy of a module's parameters (head, norm, bias, token). Starts at the base values; folds exactly.

    Copies are at least float32, except ``direct`` ones that the model reads itself: those keep the model's dtype.
    """

    foldable = True

    def __init__(
        self, module: nn.Module, names: tuple[str, ...], device: torch.device | None, direct: bool = False
    ) -> None:
        super().__init__()
        for name in names:
            base = module._parameters.get(name)  # not what an active shadow shows in its place
            base = getattr(module, name) if base is None else base
            dtype = base.dtype if direct else torch.promote_types(base.dtype, torch.float32)
            with torch.no_grad():
                copy = base.detach().to(device=device or base.device, dtype=dtype, copy=True)
            self.register_parameter(name, nn.Parameter(copy))
        self.replaces = sum(p.numel() for p in self.parameters())

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The trained weight and bias where they exist, the given ones where not."""
        return self._parameters.get("weight", weight), self._parameters.get("bias", bias)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Replace the base values."""
        new_weight, new_bias = self._parameters.get("weight"), self._parameters.get("bias")
        return (weight if new_weight is None else new_weight), (bias if new_bias is None else new_bias)


def copies_first(edits: Iterable[Edit]) -> list[Edit]:
    """In the given order, trained copies before all else: they stand for the base values that other edits change."""
    return sorted(edits, key=lambda edit: not isinstance(edit.part, Trained))


class BatchStatistics(Part):
    """Batch-norm statistics that move with training and belong to the adapter (buffers, saved in its file).

    Attributes:
        fresh: the layer belongs to the head, whose statistics always move: nobody has trained them before.
    """

    foldable = True

    def __init__(
        self, module: nn.modules.batchnorm._BatchNorm, device: torch.device | None, fresh: bool = False
    ) -> None:
        super().__init__()
        self.fresh = fresh
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            base = getattr(module, name)
            dtype = torch.promote_types(base.dtype, torch.float32) if base.is_floating_point() else base.dtype
            self.register_buffer(name, base.detach().to(device=device or base.device, dtype=dtype, copy=True))

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias pass unchanged; the statistics act in :meth:`normalise`."""
        return weight, bias

    def normalise(self, module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Batch norm with these statistics, updated in train mode like torch's own layer.

        One value per channel (a last batch of one sample) has no spread: it is normalised as in eval mode.
        """
        mean, var, count = (
            cast(Tensor, self._buffers[n]) for n in ("running_mean", "running_var", "num_batches_tracked")
        )
        momentum = cast(nn.BatchNorm1d, module).momentum
        moving = module.training and x.numel() > x.shape[1]
        if moving:
            count.add_(1)
            momentum = 1.0 / float(count) if momentum is None else momentum
        wide = torch.promote_types(mean.dtype, x.dtype)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
        y = F.batch_norm(x.to(wide), mean, var, weight, bias, moving, momentum or 0.0, cast(nn.BatchNorm1d, module).eps)
        return y.to(x.dtype)


def _linear(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, cast(Tensor, weight), bias)


def _conv(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return cast(Tensor, cast(Any, module)._conv_forward(x, weight, bias))


def _layer_norm(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = cast(nn.LayerNorm, module)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _group_norm(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = cast(nn.GroupNorm, module)
    return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def _embedding(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    table = cast(nn.Embedding, module)
    sparse, scale = table.sparse, table.scale_grad_by_freq
    return F.embedding(x, cast(Tensor, weight), table.padding_idx, table.max_norm, table.norm_type, scale, sparse)


def _frozen_batch_norm(module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = cast(nn.BatchNorm1d, module)
    if norm.running_mean is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    mean, var = norm.running_mean, cast(Tensor, norm.running_var)
    wide = torch.promote_types(mean.dtype, x.dtype if weight is None else weight.dtype)
    return F.batch_norm(x, mean.to(wide), var.to(wide), weight, bias, False, 0.0, norm.eps)


_FUNCTIONALS: Mapping[Callable[..., Any], Functional] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.Conv3d.forward: _conv,
    nn.LayerNorm.forward: _layer_norm,
    nn.GroupNorm.forward: _group_norm,
    nn.Embedding.forward: _embedding,
    nn.modules.batchnorm._BatchNorm.forward: _frozen_batch_norm,
}


def functional_of(module: nn.Module, extra: Mapping[Callable[..., Any], Functional]) -> Functional | None:
    """``f(module, x, weight, bias)`` that equals the module's forward, or None where the class is not known."""
    forward = type(module).forward
    return extra.get(forward) or _FUNCTIONALS.get(forward)
