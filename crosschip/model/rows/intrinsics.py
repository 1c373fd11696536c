"""What numba has no word for: memory at an address, a counter that threads share, products that stay in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "MOST_TILE_ROWS",
    "call",
    "dots_1",
    "dots_2",
    "dots_4",
    "float_of_bits",
    "less_product",
    "memory_at",
    "take_next",
    "tile_1",
    "tile_2",
    "tile_3",
    "tile_4",
    "tile_5",
    "tile_6",
]

LANES = 16
"""Numbers that are computed side by side."""

MOST_TILE_ROWS = 6
"""Of 16 lanes: what the registers of a CPU with vectors of 8 numbers hold."""


def _memory_at(context: Any, address: Any) -> Any:
    """A pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


memory_at: Any = intrinsic(_memory_at)


def _take_next(context: Any, counter_at: Any) -> Any:
    """The next number of a counter that threads share."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), generate


take_next: Any = intrinsic(_take_next)


def _call(context: Any, function_at: Any) -> Any:
    """Call a function without arguments."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


call: Any = intrinsic(_call)


def _bits_as_float(context: Any, bits: Any) -> Any:
    """An int32 read as the float32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


float_of_bits: Any = intrinsic(_bits_as_float)


def _less_product(context: Any, x: Any, factor: Any, step: Any) -> Any:
    """x - factor * step in fp32, before whatever else is done to it: other sums may be taken in any order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, factor, step = arguments
        return builder.fsub(x, builder.fmul(factor, step, flags=("contract",)), flags=("contract",))

    return types.float32(types.float32, types.float32, types.float32), generate


less_product: Any = intrinsic(_less_product)

cgutils: Any = numba_cgutils  # without types
_F32, _I64 = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _floats_from(builder: Any, address: Any, index: Any, kind: Any = _F32) -> Any:
    """A pointer to what lies `index` floats after an address."""
    byte = builder.add(address, builder.mul(index, _I64(4)))
    return builder.inttoptr(byte, kind.as_pointer())


def _rows_from(builder: Any, base: Any, which: Any, stride: Any, num_rows: int) -> list[Any]:
    """The addresses of the rows whose numbers stand at `which`."""
    rows = []
    for row in range(num_rows):
        at = builder.inttoptr(builder.add(which, _I64(8 * row)), _I64.as_pointer())
        rows.append(builder.add(base, builder.mul(builder.mul(builder.load(at), stride), _I64(4))))
    return rows


def _tile_of(num_rows: int) -> Any:
    """`out[where[i], :LANES] (+)= sum over d of x[which[i], d] * weight[d, :LANES]` for so many rows; in registers."""

    def tile(
        context: Any, x: Any, which: Any, stride: Any, weight: Any, apart: Any, depth: Any, out: Any, where: Any,
        out_stride: Any, adds: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, which, stride, weight, apart, depth, out, where, out_stride, adds = arguments
            sources = _rows_from(builder, x, which, stride, num_rows)
            targets = [
                builder.inttoptr(row, _VECTOR.as_pointer())
                for row in _rows_from(builder, out, where, out_stride, num_rows)
            ]
            is_more, nothing = builder.icmp_signed("!=", adds, _I64(0)), ir.Constant(_VECTOR, None)
            sums = [
                cgutils.alloca_once_value(builder, builder.select(is_more, builder.load(target, align=4), nothing))
                for target in targets
            ]
            with cgutils.for_range(builder, depth, intp=_I64) as loop:
                panel = builder.load(_floats_from(builder, weight, builder.mul(loop.index, apart), _VECTOR), align=4)
                for source, total in zip(sources, sums, strict=True):
                    one = builder.load(_floats_from(builder, source, loop.index), align=4)
                    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), one, ir.IntType(32)(0))
                    every = builder.shuffle_vector(
                        first, ir.Constant(_VECTOR, ir.Undefined),
                        ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES),
                    )  # fmt: skip
                    product = builder.fmul(every, panel, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    tile.__name__ = tile.__qualname__ = f"tile_{num_rows}"
    return intrinsic(tile)


tile_1, tile_2, tile_3, tile_4, tile_5, tile_6 = (_tile_of(rows) for rows in range(1, MOST_TILE_ROWS + 1))


def _dots_of(num_rows: int) -> Any:
    """`out[i] = sum over d of x[i, d] * y[d]` for so many rows; `depth` is a multiple of `LANES`."""

    def dots(context: Any, x: Any, stride: Any, y: Any, depth: Any, out: Any, out_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, stride, y, depth, out, out_stride = arguments
            sums = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, None)) for _ in range(num_rows)]
            with cgutils.for_range(builder, builder.sdiv(depth, _I64(LANES)), intp=_I64) as loop:
                here = builder.mul(loop.index, _I64(LANES))
                other = builder.load(_floats_from(builder, y, here, _VECTOR), align=4)
                for row, total in enumerate(sums):
                    place = builder.add(builder.mul(stride, _I64(row)), here)
                    own = builder.load(_floats_from(builder, x, place, _VECTOR), align=4)
                    product = builder.fmul(own, other, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_F32, [_F32, _VECTOR]), f"llvm.vector.reduce.fadd.v{LANES}f32"
            )
            for row, total in enumerate(sums):
                found = builder.call(reduce, [_F32(-0.0), builder.load(total)], fastmath=("reassoc",))
                place = builder.mul(out_stride, _I64(row))
                builder.store(found, _floats_from(builder, out, place), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    dots.__name__ = dots.__qualname__ = f"dots_{num_rows}"
    return intrinsic(dots)


dots_1, dots_2, dots_4 = _dots_of(1), _dots_of(2), _dots_of(4)
