"""Vector pieces of the numba kernels, 16 lanes wide, as portable LLVM code that any target splits to its width.

Element-wise sums of squares keep the order `((dx*dx + dy*dy) + dz*dz)`; no flag lets LLVM contract or re-associate.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils as _cgutils
from numba.core import types
from numba.extending import intrinsic as _intrinsic

__all__ = [
    "LANES",
    "box_hits",
    "box_near",
    "equal_bits",
    "greatest",
    "leaf_hits",
    "leaf_shrink",
    "lowest_bit",
    "lowest_key",
    "near_bits",
    "pair_ranks",
    "ranks",
]

intrinsic: Any = _intrinsic
cgutils: Any = _cgutils

LANES = 16
_I64 = ir.IntType(64)
_I32 = ir.IntType(32)


def _element(context: Any, array: Any) -> Any:
    return context.get_data_type(array.dtype)


def _pointer(context: Any, builder: Any, array: Any, value: Any, offset: Any) -> Any:
    """Address of element `offset` (counted over the flat array) of a C-contiguous array."""
    data = context.make_array(array)(context, builder, value).data
    return builder.gep(data, [offset], inbounds=True)


def _load(context: Any, builder: Any, array: Any, value: Any, offset: Any) -> Any:
    element = _element(context, array)
    pointer = builder.bitcast(
        _pointer(context, builder, array, value, offset), ir.VectorType(element, LANES).as_pointer()
    )
    return builder.load(pointer, align=array.dtype.bitwidth // 8)


def _store(context: Any, builder: Any, array: Any, value: Any, offset: Any, vector: Any) -> None:
    pointer = builder.bitcast(_pointer(context, builder, array, value, offset), vector.type.as_pointer())
    builder.store(vector, pointer, align=array.dtype.bitwidth // 8)


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, LANES)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        single, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _squares(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.fadd(builder.fadd(builder.fmul(x, x), builder.fmul(y, y)), builder.fmul(z, z))


def _mask(builder: Any, flags: Any) -> Any:
    return builder.zext(builder.bitcast(flags, ir.IntType(LANES)), _I64)


def _at(builder: Any, offset: Any, step: int) -> Any:
    return builder.add(offset, ir.Constant(_I64, step * LANES))


def _gap(context: Any, builder: Any, box: Any, value: Any, row: Any, low: Any, high: Any) -> Any:
    """Squared distance from the box [low, high] (three scalars each) to the 16 boxes of a row."""
    start = builder.mul(row, ir.Constant(_I64, 6 * LANES))
    zero = ir.Constant(ir.VectorType(_element(context, box), LANES), [0.0] * LANES)
    gaps = []
    for axis in range(3):
        below = _load(context, builder, box, value, _at(builder, start, axis))
        above = _load(context, builder, box, value, _at(builder, start, axis + 3))
        right = builder.fsub(below, _splat(builder, high[axis]))
        left = builder.fsub(_splat(builder, low[axis]), above)
        gaps.append(_larger(builder, _larger(builder, right, left), zero))
    return _squares(builder, *gaps)


@intrinsic
def box_hits(typing, box, row, x0, y0, z0, x1, y1, z1, radius):  # type: ignore[no-untyped-def]
    """Bits of the boxes in box[row] (rows, 6, 16) within the squared radius of the box from (x0..) to (x1..)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gap = _gap(context, builder, box, args[0], args[1], args[2:5], args[5:8])
        return _mask(builder, builder.fcmp_ordered("<=", gap, _splat(builder, args[8])))

    return types.uint64(box, types.int64, *[box.dtype] * 7), generate


@intrinsic
def box_near(typing, box, row, x, y, z, far, offset):  # type: ignore[no-untyped-def]
    """Bits of the boxes in box[row] closer to the point than far[offset:offset + 16], strictly."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gap = _gap(context, builder, box, args[0], args[1], args[2:5], args[2:5])
        bound = _load(context, builder, far, args[5], args[6])
        return _mask(builder, builder.fcmp_ordered("<", gap, bound))

    return types.uint64(box, types.int64, *[box.dtype] * 3, far, types.int64), generate


@intrinsic
def leaf_hits(typing, points, index, leaf, x, y, z, radius, dist, place, slot):  # type: ignore[no-untyped-def]
    """Squared distances of points[leaf] (L, 3, 16) to dist[slot], indices to place[slot]; bits of those <= radius."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.mul(args[2], ir.Constant(_I64, 3 * LANES))
        parts = [
            builder.fsub(
                _splat(builder, args[3 + axis]), _load(context, builder, points, args[0], _at(builder, start, axis))
            )
            for axis in range(3)
        ]
        near = _squares(builder, *parts)
        target = builder.mul(args[9], ir.Constant(_I64, LANES))
        _store(context, builder, dist, args[7], target, near)
        lanes = _load(context, builder, index, args[1], builder.mul(args[2], ir.Constant(_I64, LANES)))
        _store(context, builder, place, args[8], target, lanes)
        return _mask(builder, builder.fcmp_ordered("<=", near, _splat(builder, args[6])))

    kind = points.dtype
    return types.uint64(points, index, types.int64, kind, kind, kind, kind, dist, place, types.int64), generate


@intrinsic
def lowest_bit(typing, word):  # type: ignore[no-untyped-def]
    """Number of trailing zeros of a non-zero word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def ranks(typing, dist, rank, rows):  # type: ignore[no-untyped-def]
    """rank[i] = number of values in dist[:16 * rows] that are smaller than dist[i]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = _element(context, dist)
        lanes = ir.VectorType(_I32, LANES)
        width = ir.Constant(_I64, LANES)
        total = cgutils.alloca_once(builder, lanes)
        with cgutils.for_range(builder, args[2]) as outer:
            here = builder.mul(outer.index, width)
            values = _load(context, builder, dist, args[0], here)
            builder.store(ir.Constant(lanes, [0] * LANES), total)
            with cgutils.for_range(builder, builder.mul(args[2], ir.Constant(_I64, LANES // 8))) as inner:
                sum_ = builder.load(total)
                base = builder.mul(inner.index, ir.Constant(_I64, 8))
                for step in range(8):
                    pointer = _pointer(context, builder, dist, args[0], builder.add(base, ir.Constant(_I64, step)))
                    other = _splat(builder, builder.load(builder.bitcast(pointer, element.as_pointer())))
                    compare = builder.fcmp_ordered if isinstance(dist.dtype, types.Float) else builder.icmp_signed
                    less = compare("<", other, values)
                    sum_ = builder.add(sum_, builder.zext(less, lanes))
                builder.store(sum_, total)
            _store(context, builder, rank, args[1], here, builder.load(total))
        return context.get_dummy_value()

    return types.void(dist, rank, types.int64), generate


def _fold(builder: Any, vector: Any, pick: Any) -> Any:
    """Reduce 16 lanes to a scalar by halving."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(ir.VectorType(_I32, width), [start + lane for lane in range(width)]),
            )
            for start in (0, width)
        ]
        vector = pick(builder, halves[0], halves[1])
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _smaller_int(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


@intrinsic
def leaf_shrink(typing, points, leaf, rows, x, y, z, dist):  # type: ignore[no-untyped-def]
    """dist[leaf] = min(dist[leaf], squared distance to (x, y, z)) for points (L, 3, 16 * rows); its largest value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = _element(context, points)
        vector = ir.VectorType(element, LANES)
        size = builder.mul(args[2], ir.Constant(_I64, LANES))
        start = builder.mul(args[1], builder.mul(size, ir.Constant(_I64, 3)))
        target = builder.mul(args[1], size)
        centre = [_splat(builder, args[3 + axis]) for axis in range(3)]
        best = cgutils.alloca_once(builder, vector)
        builder.store(ir.Constant(vector, [-1.0] * LANES), best)
        with cgutils.for_range(builder, args[2]) as loop:
            lane = builder.mul(loop.index, ir.Constant(_I64, LANES))
            offset = builder.add(start, lane)
            parts = []
            for axis in range(3):
                parts.append(builder.fsub(_load(context, builder, points, args[0], offset), centre[axis]))
                offset = builder.add(offset, size)
            new = _squares(builder, *parts)
            place = builder.add(target, lane)
            old = _load(context, builder, dist, args[6], place)
            new = builder.select(builder.fcmp_ordered("<", new, old), new, old)
            _store(context, builder, dist, args[6], place, new)
            builder.store(_larger(builder, new, builder.load(best)), best)
        return _fold(builder, builder.load(best), _larger)

    kind = points.dtype
    return kind(points, types.int64, types.int64, kind, kind, kind, dist), generate


@intrinsic
def greatest(typing, values, offset, rows):  # type: ignore[no-untyped-def]
    """Largest of values[offset:offset + 16 * rows], none of them NaN or below -1."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_element(context, values), LANES)
        best = cgutils.alloca_once(builder, vector)
        builder.store(ir.Constant(vector, [-1.0] * LANES), best)
        with cgutils.for_range(builder, args[2]) as loop:
            offset_ = builder.add(args[1], builder.mul(loop.index, ir.Constant(_I64, LANES)))
            here = _load(context, builder, values, args[0], offset_)
            builder.store(_larger(builder, here, builder.load(best)), best)
        return _fold(builder, builder.load(best), _larger)

    return values.dtype(values, types.int64, types.int64), generate


@intrinsic
def equal_bits(typing, values, offset, value):  # type: ignore[no-untyped-def]
    """Bits of values[offset:offset + 16] that equal the value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        here = _load(context, builder, values, args[0], args[1])
        return _mask(builder, builder.fcmp_ordered("==", here, _splat(builder, args[2])))

    return types.uint64(values, types.int64, values.dtype), generate


@intrinsic
def lowest_key(typing, values, keys, offset, rows, value):  # type: ignore[no-untyped-def]
    """Smallest of the int32 keys whose values[offset:offset + 16 * rows] equal the value; 2^31 - 1 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I32, LANES)
        none = ir.Constant(vector, [0x7FFFFFFF] * LANES)
        wanted = _splat(builder, args[4])
        best = cgutils.alloca_once(builder, vector)
        builder.store(none, best)
        with cgutils.for_range(builder, args[3]) as loop:
            here = builder.add(args[2], builder.mul(loop.index, ir.Constant(_I64, LANES)))
            same = builder.fcmp_ordered("==", _load(context, builder, values, args[0], here), wanted)
            found = builder.select(same, _load(context, builder, keys, args[1], here), none)
            builder.store(_smaller_int(builder, found, builder.load(best)), best)
        return _fold(builder, builder.load(best), _smaller_int)

    return types.int32(values, keys, types.int64, types.int64, values.dtype), generate


@intrinsic
def near_bits(typing, points, row, x, y, z, radius):  # type: ignore[no-untyped-def]
    """Bits of points[row] (R, 3, 16) strictly within the squared radius of (x, y, z)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.mul(args[1], ir.Constant(_I64, 3 * LANES))
        parts = [
            builder.fsub(
                _splat(builder, args[2 + axis]), _load(context, builder, points, args[0], _at(builder, start, axis))
            )
            for axis in range(3)
        ]
        return _mask(builder, builder.fcmp_ordered("<", _squares(builder, *parts), _splat(builder, args[5])))

    return types.uint64(points, types.int64, *[points.dtype] * 4), generate


@intrinsic
def pair_ranks(typing, dist, index, rank, rows):  # type: ignore[no-untyped-def]
    """As ranks, for pairs (dist, int32 index) in lexicographic order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(_I32, LANES)
        width = ir.Constant(_I64, LANES)
        total = cgutils.alloca_once(builder, lanes)
        with cgutils.for_range(builder, args[3]) as outer:
            here = builder.mul(outer.index, width)
            values = _load(context, builder, dist, args[0], here)
            places = _load(context, builder, index, args[1], here)
            builder.store(ir.Constant(lanes, [0] * LANES), total)
            with cgutils.for_range(builder, builder.mul(args[3], width)) as inner:
                value = _splat(builder, builder.load(_pointer(context, builder, dist, args[0], inner.index)))
                place = _splat(builder, builder.load(_pointer(context, builder, index, args[1], inner.index)))
                less = builder.or_(
                    builder.fcmp_ordered("<", value, values),
                    builder.and_(builder.fcmp_ordered("==", value, values), builder.icmp_signed("<", place, places)),
                )
                builder.store(builder.add(builder.load(total), builder.zext(less, lanes)), total)
            _store(context, builder, rank, args[2], here, builder.load(total))
        return context.get_dummy_value()

    return types.void(dist, index, rank, types.int64), generate
