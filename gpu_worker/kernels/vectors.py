"""What numba cannot say, as LLVM instructions: tiles of sums held in vector registers, prefetches, a shared counter.

LLVM's own vectoriser makes the same arithmetic of a plain loop, but leaves no place for prefetches in it, and then the
core waits for memory two thirds of the time. A tile reads its weights while it asks for others, elsewhere, one cache
line for each that it has used up, in the order of their addresses: only then the memory controller's own prefetcher
joins in. They go to the second cache; the first is for the activations.

Nothing here is special to a processor: vectors are as wide as its registers, LLVM does the rest. numba's cache on disk
does not notice a change of this file in functions of another one: `make clean` after editing it.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line, and elements of weights that a tile takes in one turn
WIDE = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # elements of 4 bytes in a vector
_WORD, _INDEX = ir.IntType(32), ir.IntType(64)
_FAST = ("fast",)  # float: any order of additions, multiply-add in one rounding


def _instructions(function: Callable[..., Any]) -> Any:
    """To call from compiled code, without `typing`. `function` gives the types and what writes the instructions."""
    return intrinsic(prefer_literal=True)(function)


@_instructions
def take(typing: Any, counter: Any) -> tuple[Any, Callable[..., Any]]:
    """counter int64[1] -> its value, and adds 1, for threads that share it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, _INDEX(1), "monotonic")

    return types.int64(counter), code


@_instructions
def dot_tile(
    typing: Any, z: Any, w: Any, y: Any, i: Any, o: Any, k0: Any, k1: Any, ahead: Any, rows: Any, outputs: Any
) -> tuple[Any, Callable[..., Any]]:
    """y[i + r, o + c] += z[i + r, k0:k1].w[o + c, k0:k1] for r < rows, c < outputs, which are constants.

    k1 - k0 is a multiple of LINE. As many elements of w as are used, from element `ahead` on, are prefetched.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = _Tile(context, builder, signature, arguments)
        _, _, _, i, o, k0, k1, at, _, _ = arguments
        z = [tile.place(tile.z, i, r, k0) for r in range(rows.literal_value)]
        w = [tile.place(tile.w, o, c, k0) for c in range(outputs.literal_value)]
        sums = [[tile.zero() for _ in w] for _ in z]
        with cgutils.for_range_slice(builder, _INDEX(0), builder.sub(k1, k0), _INDEX(LINE)) as (j, _):
            tile.prefetch(builder.add(at, builder.mul(j, _INDEX(len(w)))), len(w))
            for step in range(0, LINE, WIDE):
                here = builder.add(j, _INDEX(step))
                weights = [tile.weights(one, here) for one in w]
                for row, own in zip(z, sums, strict=True):
                    activations = tile.load(builder.gep(row, [here]))
                    for weight, total in zip(weights, own, strict=True):
                        tile.multiply_add(total, activations, weight)
        for r, own in enumerate(sums):
            for c, total in enumerate(own):
                tile.add_up(total, tile.place(tile.y, i, r, builder.add(o, _INDEX(c))))
        return context.get_dummy_value()

    return types.void(z, w, y, *[types.int64] * 5, rows, outputs), code


@_instructions
def row_tile(
    typing: Any, z: Any, e: Any, y: Any, i: Any, v0: Any, v1: Any, d: Any, ahead: Any, rows: Any
) -> tuple[Any, Callable[..., Any]]:
    """y[i + r, d:d + LINE] += z[i + r, v0:v1].e[v0:v1, d:d + LINE] for r < rows, a constant. Prefetches as dot_tile."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = _Tile(context, builder, signature, arguments)
        _, _, _, i, v0, v1, d, at, _ = arguments
        steps = range(0, LINE, WIDE)
        z = [tile.place(tile.z, i, r, v0) for r in range(rows.literal_value)]
        y = [[tile.place(tile.y, i, r, builder.add(d, _INDEX(s))) for s in steps] for r in range(len(z))]
        sums = [[tile.variable(tile.load(one)) for one in row] for row in y]
        with cgutils.for_range_slice(builder, _INDEX(0), builder.sub(v1, v0), _INDEX(1)) as (v, _):
            tile.prefetch(builder.add(at, builder.mul(v, _INDEX(LINE))), 1)
            row = tile.place(tile.w, builder.add(v0, v), 0, d)
            weights = [tile.weights(row, _INDEX(step)) for step in steps]
            for one, own in zip(z, sums, strict=True):
                activation = tile.spread(builder.load(builder.gep(one, [v])))
                for weight, total in zip(weights, own, strict=True):
                    tile.multiply_add(total, activation, weight)
        for places, own in zip(y, sums, strict=True):
            for place, total in zip(places, own, strict=True):
                builder.store(builder.load(total), tile.as_vector(place, tile.vector), align=4)
        return context.get_dummy_value()

    return types.void(z, e, y, *[types.int64] * 5, rows), code


class _Tile:
    """The operands of a tile, C-contiguous matrices, and the few instructions that both are made of."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self._builder = builder
        self.z, self.w, self.y = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
        )
        self._float = isinstance(signature.args[0].dtype, types.Float)
        self._bytes = isinstance(signature.args[1].dtype, types.Integer)  # weights of int8, else of z's type
        self._element = ir.FloatType() if self._float else _WORD
        self.vector = ir.VectorType(self._element, WIDE)

    def place(self, matrix: Any, first: Any, row: int, column: Any) -> Any:
        """Address of matrix[first + row, column]."""
        b = self._builder
        width = b.extract_value(matrix.shape, 1)
        return b.gep(matrix.data, [b.add(b.mul(b.add(first, _INDEX(row)), width), column)])

    def as_vector(self, place: Any, vector: Any) -> Any:
        """The same address, of a vector."""
        return self._builder.bitcast(place, vector.as_pointer())

    def load(self, place: Any) -> Any:
        """A vector of activations or sums."""
        return self._builder.load(self.as_vector(place, self.vector), align=4)

    def weights(self, place: Any, offset: Any) -> Any:
        """A vector of weights, in the type of the activations."""
        b = self._builder
        place = b.gep(place, [offset])
        if not self._bytes:
            return self.load(place)
        narrow = b.load(self.as_vector(place, ir.VectorType(ir.IntType(8), WIDE)), align=1)
        words = b.sext(narrow, ir.VectorType(_WORD, WIDE))
        return b.sitofp(words, self.vector) if self._float else words

    def zero(self) -> Any:
        """A variable with zeros in it."""
        return self.variable(ir.Constant(self.vector, None))

    def variable(self, value: Any) -> Any:
        """A variable with this vector in it. LLVM keeps it in a register."""
        place = cgutils.alloca_once(self._builder, self.vector)
        self._builder.store(value, place)
        return place

    def spread(self, value: Any) -> Any:
        """A vector that has this value everywhere."""
        b = self._builder
        first = b.insert_element(ir.Constant(self.vector, ir.Undefined), value, _WORD(0))
        return b.shuffle_vector(first, first, ir.Constant(ir.VectorType(_WORD, WIDE), None))

    def multiply_add(self, total: Any, x: Any, y: Any) -> None:
        """total += x.y, modulo 2^32 for integers."""
        b = self._builder
        if self._float:
            b.store(b.fadd(b.load(total), b.fmul(x, y, flags=_FAST), flags=_FAST), total)
        else:
            b.store(b.add(b.load(total), b.mul(x, y)), total)

    def add_up(self, total: Any, place: Any) -> None:
        """Add the elements of a variable to what is at this address."""
        b = self._builder
        if self._float:
            kind, name = ir.FunctionType(self._element, [self._element, self.vector]), f"fadd.v{WIDE}f32"
        else:
            kind, name = ir.FunctionType(self._element, [self.vector]), f"add.v{WIDE}i32"
        add = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.{name}")
        if self._float:
            b.store(b.call(add, [b.load(place), b.load(total)], fastmath=_FAST), place)
        else:
            b.store(b.add(b.load(place), b.call(add, [b.load(total)])), place)

    def prefetch(self, first: Any, lines: int) -> None:
        """Ask for LINE times `lines` weights from element `first` on: reading, into the second cache, data."""
        b = self._builder
        size = 1 if self._bytes else 4
        for offset in range(0, lines * LINE, LINE // size):
            place = b.gep(self.w.data, [b.add(first, _INDEX(offset))])
            address = b.bitcast(place, ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [address.type, _WORD, _WORD, _WORD])
            ask = b.module.declare_intrinsic("llvm.prefetch", (address.type,), kind)
            b.call(ask, [address, _WORD(0), _WORD(2), _WORD(1)])
