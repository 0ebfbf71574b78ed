"""What sparse methods share: which tensors have entries to choose, and the part that holds the chosen ones.

A part stores for every chosen entry its place and ``v``, the change of the frozen weight W there: ``p = W + v`` is the
learned value. W keeps its bits, so that removing, scaling and adding adapters is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy, Weight
from peft_suite.config import Config
from peft_suite.edits import functional_of
from peft_suite.errors import FileFormatError, KernelArgumentError, UnsupportedError
from peft_suite.kernels.api.packing import pack_bits, pack_sparse, unpack_bits, unpack_sparse
from peft_suite.kernels.api.selection import select_topk
from peft_suite.method import Editor
from peft_suite.selecting import Select

__all__ = ["Entries", "SparseValues", "amount", "attach", "entries_of", "selectable", "smallest"]

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmM]?)")
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6}
_HALF_TOP = 2.0**14  # compact values are scaled by a power of two to lie below twice this, inside float16's range


# ---- which tensors -------------------------------------------------------------------------------------------------


def selectable(anatomy: Anatomy, edit: Editor) -> tuple[dict[str, Tensor], list[str]]:
    """(name -> frozen tensor with entries to choose, names of those that cannot be reached), in the model's order.

    Reached are the weights and biases of every layer whose forward is known: linear and convolution layers, norms,
    embeddings. Left out are parameters that a model reads without calling their module, tied ones (a change would reach
    one of their uses), idle ones and those of layers with a forward of their own. The head, which trains whole, is
    neither.
    """
    uses: dict[int, int] = {}
    modules = [(p, m) for p, m in edit.model.named_modules() if p != "adapters" and not p.startswith("adapters.")]
    for _, module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found: dict[str, Tensor] = {}
    left: list[str] = []
    for path, module in modules:
        known = path not in anatomy.read_directly and functional_of(module, anatomy.functionals) is not None
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is None or full in anatomy.fresh:
                continue
            reached = known and name in ("weight", "bias") and full not in anatomy.idle
            if reached and uses[id(parameter)] == 1 and parameter.is_floating_point():
                found[full] = parameter.detach()
            else:
                left.append(full)
    return found, left


def amount(config: Config, field: str) -> int:
    """A number of values from 5000000, "5M" or "250k".

    Raises:
        ConfigError: something else.
    """
    given = getattr(config, field)
    match = _AMOUNT.fullmatch(str(given).strip())
    number = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    share = " (for a share of all entries give quantile instead)" if 0 < number < 1 else ""
    rule = f'give a number of values such as 5000000, "5M" or "250k"{share}'
    config.require(field, not isinstance(given, bool) and number >= 1 and number == round(number), rule)
    return round(number)


def smallest(tensors: Mapping[str, Tensor], count: int, method: str) -> dict[str, Tensor]:
    """Positions of the ``count`` entries of smallest magnitude of all tensors together, ties in order.

    Raises:
        UnsupportedError: there are not so many, or a weight is NaN.
    """
    total = sum(t.numel() for t in tensors.values())
    if count > total:
        raise UnsupportedError(
            f"{method}: a budget of {count:,} values is larger than the model, which has {total:,} entries to choose "
            f"from in {len(tensors)} tensors. Choose a budget of at most {total:,}, or a method that adds parameters."
        )
    try:
        return select_topk(tensors, count, largest=False)
    except KernelArgumentError as error:
        raise UnsupportedError(f"{method} cannot rank the weights of this model: {error}") from error


def attach(
    edit: Editor, names: Mapping[str, Tensor], chosen: Mapping[str, Tensor], label: str, *, form: str, settling: bool
) -> list[SparseValues]:
    """One part for every module with chosen entries; on the meta device for every module, with what is known so far."""
    dry = edit.device.type == "meta"  # a plan or a file: what the file has is seen later
    sites: dict[str, dict[str, Tensor]] = {}
    for full in names:
        path, _, name = full.rpartition(".")
        index = chosen.get(full, torch.empty(0, dtype=torch.int64, device="cpu"))
        if index.numel() or dry:
            sites.setdefault(path, {})[name] = index
    parts = []
    for path, own in sites.items():
        part = edit.select(Weight(path), label, own.get("weight"), own.get("bias"), SparseValues)
        part.keep(compact=form == "compact", settling=settling)
        parts.append(part)
    return parts


# ---- the part ------------------------------------------------------------------------------------------------------


class SparseValues(Select):
    """Chosen entries with what training and files need to know about them.

    Buffers beside those of :class:`Select`, where :meth:`keep` asks for them: ``<name>_settled`` (ceil(E / 8),) uint8,
    one bit an entry that keeps its learned value from now on; ``mirrored`` (), 1 while the layer uses ``|p|``.

    A file holds index and value, 8 bytes an entry; a settled entry has its position stored as ``~position``. The
    compact form has 16-bit gaps and float16 values under one power of two a tensor, 4 bytes an entry: values come back
    within 2^-11 of themselves (or 2^-38 of the largest of their tensor), positions exactly;
    which entries had settled is not kept.
    """

    def __init__(self, module: nn.Module, positions: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        super().__init__(module, positions, device)
        self.owner = (module,)  # a tuple, so that the module does not become a part of the part
        self.compact = False

    def keep(self, *, compact: bool = False, settling: bool = False, mirrored: bool = False) -> None:
        """Say how files hold the values, and which further buffers there are."""
        self.compact = compact
        for name in self.sizes if settling else ():
            index = self.positions(name)
            bits = torch.zeros(-(-index.numel() // 8), dtype=torch.uint8, device=index.device)
            self.register_buffer(f"{name}_settled", bits)
        if mirrored:
            device = next(iter(self.buffers())).device
            self.register_buffer("mirrored", torch.ones((), dtype=torch.uint8, device=device))

    def values(self, name: str) -> nn.Parameter:
        """v (E,), the trained change."""
        return cast(nn.Parameter, self._parameters[f"{name}_values"])

    def base(self, name: str) -> Tensor:
        """W at the chosen positions (E,), in the dtype of the values."""
        weight = cast(Tensor, self.owner[0]._parameters[name]).detach()
        return weight.reshape(-1).index_select(0, self.positions(name).long()).to(self.values(name).dtype)

    def learned(self, name: str) -> Tensor:
        """p = W + v (E,)."""
        return self.base(name) + self.values(name).detach()

    def settled(self, name: str) -> Tensor | None:
        """(E,) bool: entries that train no more; None where none of them can."""
        bits = self._buffers.get(f"{name}_settled")
        return None if bits is None else unpack_bits(bits, self.positions(name).numel(), 1).bool()

    def settle(self, name: str, settled: Tensor) -> None:
        """Let these entries (E,) keep their values."""
        cast(Tensor, self._buffers[f"{name}_settled"]).copy_(pack_bits(settled.to(torch.uint8), 1))

    def change(self, name: str, base: Tensor) -> Tensor:
        """v, or what makes |p| of p while the part is mirrored."""
        values = super().change(name, base)
        mirrored = self._buffers.get("mirrored")
        if mirrored is None or not bool(mirrored):
            return values
        flat = base.detach().reshape(-1).index_select(0, self.positions(name).long()).to(values.dtype)
        settled = self.settled(name)
        whole = (flat + values).abs() - flat
        return whole if settled is None else torch.where(settled, values, whole)

    # ---- files -------------------------------------------------------------------------------------------------------

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Sizes of a file's tensors; see :meth:`Select.adopt`."""
        super().adopt(tensors)
        for buffer in [n for n in self._buffers if n.endswith("_settled")]:
            name = buffer.removesuffix("_settled")
            if name not in self.sizes:
                del self._buffers[buffer]
            elif buffer in tensors:
                old = cast(Tensor, self._buffers[buffer])
                self._buffers[buffer] = torch.empty_like(tensors[buffer], device=old.device)

    def stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """8 bytes an entry, or 4 in the compact form."""
        kept = {n: t for n, t in state.items() if n == "mirrored" and self.replaces}
        for name in self.sizes:
            index, values = state[f"{name}_index"], state[f"{name}_values"]
            bits = state.get(f"{name}_settled")
            if self.compact:
                kept |= {f"{name}_{k}": t for k, t in _compact(values, index, self.sizes[name]).items()}
                continue
            if bits is not None:
                settled = unpack_bits(bits, index.numel(), 1).bool()
                index = torch.where(settled, ~index, index)
            kept |= {f"{name}_index": index, f"{name}_values": values}
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Positions, values and settled bits of either form.

        Raises:
            FileFormatError: a compact form that does not fit together.
        """
        state = dict(tensors)
        for name in ("weight", "bias"):
            if f"{name}_gaps" in state:
                state |= {f"{name}_{k}": t for k, t in self._expanded(name, state).items()}
            index = state.get(f"{name}_index")
            if index is None:
                continue
            settled = index < 0
            state[f"{name}_index"] = torch.where(settled, ~index, index)
            if f"{name}_settled" in self._buffers:
                state[f"{name}_settled"] = pack_bits(settled.to(torch.uint8), 1)
        return state

    def _expanded(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        numel = self.sizes.get(name, 0)
        packed = {k: state.pop(f"{name}_{k}", torch.empty(0)) for k in ("gaps", "halves", "scale")}
        try:
            given = {"gaps": packed["gaps"], "values": packed["halves"], "numel": torch.tensor(numel)}
            values, index, _ = unpack_sparse(given)
            scale = packed["scale"].reshape(())
        except (KernelArgumentError, RuntimeError) as error:
            raise FileFormatError(
                f"Compact entries in the file do not fit a tensor of {numel} values: {error}"
            ) from error
        return {"index": index, "values": values.float() * scale}


def _compact(values: Tensor, index: Tensor, numel: int) -> dict[str, Tensor]:
    """``gaps`` int16, ``halves`` float16 and ``scale`` (), a power of two, with ``values ~ halves * scale``."""
    if values.is_meta:  # a plan: no more gaps than entries as far as anyone knows
        gaps = torch.empty(values.shape, dtype=torch.int16, device="meta")
        return {"gaps": gaps, "halves": torch.empty_like(values, dtype=torch.float16), "scale": values.new_empty(())}
    top = values.abs().amax().double() if values.numel() else values.new_zeros((), dtype=torch.float64)
    _, exponent = torch.frexp(top / _HALF_TOP)  # top / scale lies in [2^13, 2^14)
    scale = torch.where((top > 0) & top.isfinite(), torch.exp2(exponent.double()), 1.0).float()
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    packed = pack_sparse(values.float() / scale, index, numel, compact=True, dtype=torch.float16)
    return {"gaps": packed["gaps"], "halves": packed["values"], "scale": scale}


class Entries(NamedTuple):
    """The chosen entries of one tensor of an adapter."""

    name: str
    part: SparseValues
    tensor: Literal["weight", "bias"]

    @property
    def values(self) -> nn.Parameter:
        """v (E,)."""
        return self.part.values(self.tensor)


def entries_of(adapter: Adapter) -> Iterator[Entries]:
    """The chosen entries of an adapter, tensor by tensor."""
    for edit in adapter.edits:
        if isinstance(edit.part, SparseValues):
            for name in edit.part.sizes:
                full = f"{edit.path}.{name}" if edit.path else name
                yield Entries(full, edit.part, cast('Literal["weight", "bias"]', name))
