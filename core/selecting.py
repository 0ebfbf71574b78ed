"""Chosen entries: single weights of frozen tensors train, through the sparse kernels; all others stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_suite.edits import Part
from peft_suite.errors import FileFormatError, KernelArgumentError, UnsupportedError
from peft_suite.kernels import recompute
from peft_suite.kernels.api.sparse import check_index, sddmm, sparse_delta, sparse_delta_conv, sparse_delta_linear

__all__ = ["Select"]

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Select(Part):
    """``y = f(x, W + ΔW)`` where ΔW is zero but at chosen flat positions of W; likewise for the bias.

    For each parameter ``weight`` or ``bias`` the part holds ``<name>_values`` (E,), float32, starting at 0, and the
    buffer ``<name>_index`` (E,), sorted, int32 where the tensor has fewer than 2³¹ elements: 8 bytes an entry in the
    file. Entries that were not chosen keep their bits: no gradient, no moment, no weight decay reaches them. Linear and
    convolution layers build W + ΔW for the length of one product and again in backward; nothing dense is kept. Linear
    layers whose chosen entries lie in at most half of the columns keep those columns of the input only (not compiled);
    an input that comes back from what the operation before keeps is not kept (:mod:`peft_suite.kernels.recompute`).
    """

    foldable = True
    scalable = True

    def __init__(self, module: nn.Module, positions: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        super().__init__()
        self.layer = _layer(module)
        self.sizes: dict[str, int] = {}
        self.columns: tuple[Tensor, int, Tensor | None, Tensor | None] | None = None  # see _narrowed
        for name, index in positions.items():
            base = cast(Tensor, getattr(module, name))
            self.sizes[name] = base.numel()
            where = device or base.device
            index = _narrow(check_index(index, base.numel()), base.numel())
            self.register_buffer(f"{name}_index", index.to(where, copy=True))
            self.register_parameter(f"{name}_values", nn.Parameter(torch.zeros(index.shape, device=where)))
        self._count()

    def _count(self) -> None:
        self.replaces = sum(p.numel() for p in self.parameters())

    def positions(self, name: str = "weight") -> Tensor:
        """The chosen flat positions (E,)."""
        return cast(Tensor, self._buffers[f"{name}_index"])

    def choose(self, index: Tensor, name: str = "weight") -> Tensor:
        """Choose other positions. Values of positions that stay are kept, new ones start at 0.

        As many positions as before keep the parameter object, so that a running optimizer goes on (reset its moments
        where the returned mask is False); another number makes a new one: do that before the optimizer is built.

        Returns:
            (E,) bool: which of the new positions were chosen before.

        Raises:
            KernelArgumentError: a position twice, out of order or out of range; nothing is changed.
        """
        before, values = self.positions(name), cast(nn.Parameter, self._parameters[f"{name}_values"])
        index = _narrow(check_index(index, self.sizes[name]), self.sizes[name]).to(before.device)
        place = torch.searchsorted(before, index).clamp(max=max(len(before) - 1, 0))
        kept = before[place] == index if len(before) else torch.zeros_like(index, dtype=torch.bool)
        with torch.no_grad():
            moved = torch.where(kept, values[place], 0) if len(before) else values.new_zeros(index.shape)
            if moved.shape == values.shape:
                values.copy_(moved)
            else:
                self.register_parameter(f"{name}_values", nn.Parameter(moved, values.requires_grad))
        self._buffers[f"{name}_index"] = index.clone()
        self._count()
        return kept

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the number of entries that a file has; how many and which were chosen is part of what was learned.

        Of two tensors the one that the file does not mention had no entry chosen.
        """
        for name, size in tuple(self.sizes.items()):
            index, values = tensors.get(f"{name}_index"), tensors.get(f"{name}_values")
            if index is None and values is None and tensors:
                del self.sizes[name], self._buffers[f"{name}_index"], self._parameters[f"{name}_values"]
            if index is None or values is None or index.shape != values.shape:
                continue
            try:
                check_index(index, size)
            except KernelArgumentError as error:
                raise FileFormatError(
                    f"Chosen entries in the file do not fit a tensor of {size} values: {error}"
                ) from error
            self._buffers[f"{name}_index"] = torch.empty_like(index, device=self.positions(name).device)
            old = cast(nn.Parameter, self._parameters[f"{name}_values"])
            empty = torch.empty(values.shape, dtype=old.dtype, device=old.device)
            self.register_parameter(f"{name}_values", nn.Parameter(empty, old.requires_grad))
        self._count()

    def forward(
        self, weight: Tensor | None, bias: Tensor | None, x: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None] | Tensor:
        """(weight, bias) with the changes added; with ``x`` the layer's output, nothing dense kept for backward."""
        bias = self._changed("bias", bias)
        if x is None:
            return self._changed("weight", weight), bias
        assert self.layer is not None and weight is not None
        values, index = self.change("weight", weight), self.positions()
        if bias is not None and not torch.is_autocast_enabled(x.device.type):
            bias = bias.to(x.dtype)
        if self.layer is sparse_delta_linear and torch.is_grad_enabled() and values.requires_grad:
            columns, narrow = self._narrowed(index, weight.shape[1])
            if columns is not None and narrow is not None and recompute.keep(x)[0].make is None:
                y = self.layer(x, weight, values.detach(), index, bias)
                return cast(Tensor, _ValueGradient.apply(y, values, x.detach().index_select(-1, columns), narrow))  # type: ignore[no-untyped-call]
        return self.layer(x, weight, values, index, bias)

    def _narrowed(self, index: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
        """(columns with chosen entries, positions in the matrix of these columns), or Nones where it does not pay."""
        if torch.compiler.is_compiling() or index.is_meta:
            return None, None
        known = self.columns
        if known is not None and known[0] is index and known[1] == index._version:
            return known[2:]
        columns, place = torch.unique(index % width, return_inverse=True)
        pays = 0 < 2 * columns.numel() <= width
        narrow = (index.long() // width * columns.numel() + place).to(index.dtype) if pays else None
        self.columns = (index, index._version, columns if pays else None, narrow)
        return self.columns[2:]

    def change(self, name: str, base: Tensor) -> Tensor:
        """What is added to ``base`` at the chosen positions (E,)."""
        values = cast(Tensor, self._parameters[f"{name}_values"])
        return values if self.strength == 1.0 else values * self.strength

    def _changed(self, name: str, base: Tensor | None) -> Tensor | None:
        if base is None or name not in self.sizes or self.strength == 0.0:
            return base
        return sparse_delta(base, self.change(name, base), self.positions(name))

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Whether the layer's output can be computed without a dense changed weight: W frozen, the kernel known."""
        known = self.layer is not None and "weight" in self.sizes and self.strength != 0.0
        return known and weight is not None and not weight.requires_grad

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the changes."""
        return cast("tuple[Tensor, Tensor | None]", self(weight, bias))


class _ValueGradient(torch.autograd.Function):
    """Passes a layer's output on and gives the values their gradient: chosen entries of ``grad^T x``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, values: Tensor, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]  # as y, and no view of it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, x, index = inputs
        ctx.kind = values.dtype
        ctx.save_for_backward(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, index = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise UnsupportedError("Chosen entries have first derivatives only (create_graph=True was asked for).")
        found = sddmm(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype), index)
        return grad, found.to(ctx.kind), None, None


def _narrow(index: Tensor, numel: int) -> Tensor:
    return index.to(torch.int32 if numel < 2**31 else torch.int64)


def _layer(module: nn.Module) -> Layer | None:
    if type(module).forward is nn.Linear.forward:
        return sparse_delta_linear
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode == "zeros":
        return functools.partial(
            sparse_delta_conv,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
        )
    return None
