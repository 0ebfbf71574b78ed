"""Round trips of sparse values and low-bit codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_suite.errors import KernelArgumentError
from peft_suite.kernels.api.packing import dequant, pack_bits, pack_sparse, unpack_bits, unpack_sparse


@settings(max_examples=80, deadline=None)
@given(st.sets(st.integers(0, 2**33), max_size=40), st.booleans(), st.booleans())
def test_index_comes_back_exactly(entries: set[int], compact: bool, half: bool) -> None:
    index = torch.tensor(sorted(entries), dtype=torch.int64)
    numel = 2**33 + 1 if not entries or max(entries) > 2**20 else 2**20 + 1
    if numel > 2**31 and compact:
        numel, index = 2**24, torch.unique(index % 2**24)
    values = torch.randn(index.numel())
    dtype = torch.float16 if half else torch.bfloat16
    got, where, size = unpack_sparse(pack_sparse(values, index, numel, compact, dtype))
    assert size == numel and torch.equal(where.long(), index)
    assert torch.equal(got, values.to(dtype) if compact else values)


@pytest.mark.parametrize("gap", [0, 1, 65533, 65534, 65535, 65536, 131069, 131070, 131071, 10**6])
def test_long_gaps(gap: int) -> None:
    index = torch.tensor([gap, 2 * gap + 1, 2 * gap + 2], dtype=torch.int32)
    packed = pack_sparse(torch.ones(3), index, 3 * gap + 10, compact=True)
    assert torch.equal(unpack_sparse(packed)[1], index)
    assert packed["gaps"].numel() == 3 + 2 * (gap // 65535)


def test_sizes() -> None:
    n = 5000
    index = torch.randperm(10**6)[:n].sort().values.int()
    plain, compact = pack_sparse(torch.randn(n), index, 10**6), pack_sparse(torch.randn(n), index, 10**6, compact=True)
    assert sum(t.numel() * t.element_size() for t in plain.values()) == 8 * n + 8
    assert sum(t.numel() * t.element_size() for t in compact.values()) == 4 * n + 8
    assert all(t.is_contiguous() for t in (*plain.values(), *compact.values()))


def test_bad_packed() -> None:
    good = pack_sparse(torch.ones(2), torch.tensor([1, 4]), 6, compact=True)
    for bad, text in (
        ({k: v for k, v in good.items() if k != "numel"}, "numel"),
        ({**good, "values": torch.ones(3)}, "3 values"),
        ({**good, "gaps": good["gaps"].int()}, "int16"),
        ({**good, "numel": torch.tensor(3)}, "holds 4"),
    ):
        with pytest.raises(KernelArgumentError, match=text):
            unpack_sparse(bad)
    with pytest.raises(KernelArgumentError, match="too narrow"):
        pack_sparse(torch.tensor([1e6]), torch.tensor([0]), 1, compact=True, dtype=torch.float16)
    with pytest.raises(KernelArgumentError, match="one for each"):
        pack_sparse(torch.ones(3), torch.tensor([0]), 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 63, 1001])
def test_bits(bits: int, n: int) -> None:
    codes = torch.randint(0, 1 << bits, (n,), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == (n * bits + 7) // 8 and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, n, bits), codes)
    book = torch.randn(1 << bits)
    assert torch.equal(dequant(packed, n, bits, book, 0.5, 2.0), 0.5 + 2.0 * book[codes.long()])


def test_bit_order_is_little_endian() -> None:
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8), 1).tolist() == [1, 1]
    assert pack_bits(torch.tensor([3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b100011]
    assert pack_bits(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


def test_bad_bits() -> None:
    codes = torch.tensor([0, 3], dtype=torch.uint8)
    with pytest.raises(KernelArgumentError, match="holds 3"):
        pack_bits(codes, 1)
    with pytest.raises(KernelArgumentError, match="bits"):
        pack_bits(codes, 3)
    with pytest.raises(KernelArgumentError, match="uint8"):
        pack_bits(codes.int(), 2)
    with pytest.raises(KernelArgumentError, match="bytes"):
        unpack_bits(pack_bits(codes, 2), 9, 2)
    with pytest.raises(KernelArgumentError, match="codebook"):
        dequant(pack_bits(codes, 2), 2, 2, torch.ones(3), 0.0, 1.0)
