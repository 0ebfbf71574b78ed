"""Chosen entries: single weights of frozen tensors train, through the sparse kernels; all others stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from peft_suite.edits import Part
from peft_suite.errors import FileFormatError, KernelArgumentError
from peft_suite.kernels.api.sparse import check_index, sparse_delta, sparse_delta_conv, sparse_delta_linear

__all__ = ["Select"]

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Select(Part):
    """``y = f(x, W + ΔW)`` where ΔW is zero but at chosen flat positions of W; likewise for the bias.

    For each parameter ``weight`` or ``bias`` the part holds ``<name>_values`` (E,), float32, starting at 0, and the
    buffer ``<name>_index`` (E,), sorted, int32 where the tensor has fewer than 2³¹ elements: 8 bytes an entry in the
    file. Entries that were not chosen keep their bits: no gradient, no moment, no weight decay reaches them. Linear and
    convolution layers build W + ΔW for the length of one product and again in backward; nothing dense is kept.
    """

    foldable = True

    def __init__(self, module: nn.Module, positions: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        super().__init__()
        self.layer = _layer(module)
        self.sizes: dict[str, int] = {}
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
        """Take the number of entries that a file has; how many and which were chosen is part of what was learned."""
        for name, size in self.sizes.items():
            index, values = tensors.get(f"{name}_index"), tensors.get(f"{name}_values")
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
        values, index = self._parameters["weight_values"], self._buffers["weight_index"]
        if bias is not None and not torch.is_autocast_enabled(x.device.type):
            bias = bias.to(x.dtype)
        return self.layer(x, weight, cast(Tensor, values), cast(Tensor, index), bias)

    def _changed(self, name: str, base: Tensor | None) -> Tensor | None:
        values = self._parameters.get(f"{name}_values")
        if base is None or values is None:
            return base
        return sparse_delta(base, values, self.positions(name))

    def direct(self, weight: Tensor | None) -> bool:
        """Whether the layer's output can be computed without a dense changed weight: W frozen, the kernel known."""
        return self.layer is not None and "weight" in self.sizes and weight is not None and not weight.requires_grad

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the changes."""
        return cast("tuple[Tensor, Tensor | None]", self(weight, bias))


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
