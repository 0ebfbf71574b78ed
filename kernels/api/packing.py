"""Storage of sparse values and of low-bit codes: exact, small, plain tensors that any file format holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_suite.kernels import checks
from peft_suite.kernels.api.sparse import check_index

__all__ = ["dequant", "pack_bits", "pack_sparse", "unpack_bits", "unpack_sparse"]

_ESCAPE = 0xFFFF


def pack_sparse(
    values: Tensor, index: Tensor, numel: int, compact: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Chosen entries of a tensor as tensors for a file.

    Plain: ``values`` as they are and ``index`` in int32 (int64 from 2³¹ elements): 8 bytes a float32 entry.
    Compact: ``values`` in 16 bits and ``gaps``, 16-bit distances (stored as int16, read as unsigned): the number of
    unchosen elements since the entry before. 65535 says: that many more, the gap goes on. 4 bytes an entry; the index
    comes back exactly, the values rounded to ``dtype``.

    Args:
        values: (E,).
        index: (E,) sorted flat positions.
        numel: elements of the whole tensor.
        compact: choose the compact form.
        dtype: bfloat16 or float16, of the compact values.
    """
    values = checks.tensor("values", values, "(E,)")
    index = check_index(index, numel)
    if values.shape[0] != index.shape[0]:
        raise checks.fail("values", f"has {values.shape[0]} entries", f"one for each of the {index.shape[0]} positions")
    size = torch.tensor(numel, dtype=torch.int64)
    values = values.detach().contiguous()
    if not compact:
        wide = torch.int32 if numel <= 2**31 else torch.int64
        return {"values": values, "index": index.to(wide), "numel": size}
    checks.choice("dtype", dtype, (torch.bfloat16, torch.float16))
    narrow = values.to(dtype)
    if bool((torch.isfinite(values) & ~torch.isfinite(narrow)).any()):
        raise checks.fail("dtype", f"is {dtype}, too narrow for {float(values.abs().max())}", "torch.bfloat16")
    long = index.to(torch.int64)
    gaps = torch.diff(long, prepend=long.new_tensor([-1])) - 1
    escapes = gaps // _ESCAPE
    stream = gaps.new_full((long.numel() + int(escapes.sum()),), _ESCAPE)
    stream[torch.cumsum(escapes + 1, 0) - 1] = gaps % _ESCAPE
    signed = torch.where(stream > 0x7FFF, stream - 0x10000, stream)
    return {"values": narrow, "gaps": signed.to(torch.int16), "numel": size}


def unpack_sparse(packed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """(values, index, numel) of :func:`pack_sparse`; values in the stored dtype.

    Raises:
        KernelArgumentError: tensors that :func:`pack_sparse` does not make.
    """
    kind = "gaps" if "gaps" in packed else "index"
    missing = {"values", kind, "numel"} - set(packed)
    if missing:
        raise checks.fail("packed", f"has no {sorted(missing)[0]!r}", "'values', 'numel' and 'index' or 'gaps'")
    values, numel = packed["values"], int(packed["numel"])
    if kind == "index":
        index = packed["index"]
    else:
        if packed["gaps"].dtype != torch.int16:
            raise checks.fail("packed", f"'gaps' is {checks.shape_of(packed['gaps'])}", "int16")
        stream = packed["gaps"].to(torch.int64) & 0xFFFF
        entries = stream != _ESCAPE
        index = torch.cumsum(stream, 0)[entries]
        index = index + torch.arange(index.numel(), device=index.device)
        index = index.to(torch.int32 if numel <= 2**31 else torch.int64)
    if index.shape != values.shape:
        raise checks.fail("packed", f"has {values.numel()} values for {index.numel()} positions", "as many")
    return values, check_index(index, numel), numel


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 codes below 2^bits -> (⌈n · bits / 8⌉,) uint8; element 0 in the lowest bits, zero padded.

    ``bits`` is 1, 2, 4 or 8. Store n beside the result.
    """
    checks.choice("bits", bits, (1, 2, 4, 8))
    codes = checks.tensor("codes", codes, "(n,)", (torch.uint8,))
    if codes.numel() and checks.looks_at_values(codes) and int(codes.max()) >> bits:
        raise checks.fail("codes", f"holds {int(codes.max())}", f"codes below {1 << bits}")
    if bits == 8:
        return codes.clone()
    each = 8 // bits
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    packed = torch.zeros(rows.shape[0], dtype=torch.uint8, device=codes.device)
    for slot in range(each):
        packed |= rows[:, slot] << (slot * bits)
    return packed


def unpack_bits(packed: Tensor, n: int, bits: int) -> Tensor:
    """The first ``n`` codes of :func:`pack_bits`, uint8."""
    checks.choice("bits", bits, (1, 2, 4, 8))
    packed = checks.tensor("packed", packed, "(m,)", (torch.uint8,))
    n = checks.count("n", n)
    if packed.numel() != -(-n * bits // 8):
        raise checks.fail("packed", f"has {packed.numel()} bytes", f"{-(-n * bits // 8)} for {n} codes of {bits} bits")
    if bits == 8:
        return packed.clone()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:n]


def dequant(packed: Tensor, n: int, bits: int, codebook: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """(n,) mean + std · codebook[code] in the codebook's dtype; codebook (2^bits,)."""
    codebook = checks.tensor("codebook", codebook, "(2**bits,)")
    checks.choice("bits", bits, (1, 2, 4, 8))
    if codebook.shape[0] != 1 << bits:
        raise checks.fail("codebook", f"has {codebook.shape[0]} entries", f"{1 << bits} for {bits} bits")
    out: Tensor = mean + std * codebook[unpack_bits(packed, n, bits).long()]
    return out.to(codebook.dtype)
