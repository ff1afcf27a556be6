"""Counts float32 magnitudes into tables, as fast as the processor stores numbers.

A table's increment is a load, an addition and a store, and processors store one number a cycle: so
what need not be stored is not. Zeros, up to half of what a ReLU gives, are dropped where AVX-512
can compress a vector; how many they were is known at the end. The rest stands as uint16 in a buffer
that stays in the first cache, from which four indices are read at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from trtune.calibrate.histogram import BINS, SHIFT
from trtune.configs.system.compiled import compiled

emit: Any = cgutils  # it has no types

TABLES = 4
"""Tables used in turn: equal values one after the other would wait for the increment before."""

SPREAD = 48
"""Unused counts behind each table: equal bins of two tables must not differ by whole pages.

Processors compare only the lower bits of addresses when they order loads behind stores.
"""

CHUNK = 2048
"""Values sifted at a time: their uint16 leave most of the first cache to the tables."""

STEP = 32
"""Values that are sifted in one step."""


def features() -> frozenset[str]:
    """What Numba may use of this processor, by LLVM's names; nothing where Numba is told otherwise.

    Numba's settings can have it compile for another processor, or without AVX.
    """
    settings: Any = numba.config
    told = (settings.CPU_NAME, settings.CPU_FEATURES)
    if told != (None, None) or not settings.ENABLE_AVX:
        return frozenset()
    try:
        found = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this platform's
        return frozenset()
    return frozenset(name for name, there in found.items() if there)


FEATURES = features()
CAN_SIFT = {"avx512f", "avx512bw"} <= FEATURES
CAN_SIFT_HALVES = CAN_SIFT and "avx512vbmi2" in FEATURES


def _vector(bits: int, lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), lanes)


def _splat(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _compressed(builder: Any, vector: Any, target: Any, at: Any) -> Any:
    """Store the lanes of `vector` that are not zero, as 16 bits each, from `target[at]` on; how
    many they are. What stands behind them is written over.
    """
    kind, lanes = vector.type, vector.type.count
    bits = kind.element.width
    kept = builder.icmp_unsigned("!=", vector, _splat(kind, 0))
    compress = emit.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind, kind, _vector(1, lanes)]),
        f"llvm.x86.avx512.mask.compress.v{lanes}i{bits}",
    )
    packed = builder.call(compress, [vector, _splat(kind, 0), kept])
    halves = _vector(16, lanes)
    packed = packed if bits == 16 else builder.trunc(packed, halves)
    place = builder.bitcast(builder.gep(target, [at]), halves.as_pointer())
    builder.store(packed, place, align=2)
    word = ir.IntType(lanes)
    count = builder.module.declare_intrinsic("llvm.ctpop", [word])
    return builder.zext(builder.call(count, [builder.bitcast(kept, word)]), at.type)


def _sift(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Emit the loop of `sift`, for processors that `CAN_SIFT`."""
    source, start, count, target = arguments
    read = context.make_array(signature.args[0])(context, builder, source).data
    written = context.make_array(signature.args[3])(context, builder, target).data
    long, words = ir.IntType(64), _vector(32, STEP // 2)
    tops = [emit.alloca_once_value(builder, _splat(words, 0)) for _ in range(2)]
    kept = emit.alloca_once_value(builder, long(0))
    with emit.for_range(builder, builder.udiv(count, long(STEP))) as loop:
        at = builder.add(start, builder.mul(loop.index, long(STEP)))
        first = builder.bitcast(builder.gep(read, [at]), words.as_pointer())
        pair = [builder.load(builder.gep(first, [long(i)]), align=4) for i in range(2)]
        for part, top in zip(pair, tops, strict=True):
            unsigned = builder.shl(part, _splat(words, 1))
            builder.store(_maximum(builder, unsigned, builder.load(top)), top)
        for bins in _bins_of(builder, pair):
            before = builder.load(kept)
            builder.store(builder.add(before, _compressed(builder, bins, written, before)), kept)
    largest = _maximum(builder, *(builder.load(top) for top in tops))
    reduce = emit.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.IntType(32), [words]),
        f"llvm.vector.reduce.umax.v{words.count}i32",
    )
    top = builder.zext(builder.call(reduce, [largest]), long)
    return builder.or_(builder.load(kept), builder.shl(top, long(32)))


def _bins_of(builder: Any, pair: list[Any]) -> list[Any]:
    """The bins of two vectors of float32, in any order: of one of uint16, or two of uint32."""
    words = pair[0].type
    low = [builder.lshr(part, _splat(words, SHIFT)) for part in pair]
    if not CAN_SIFT_HALVES:
        return [builder.and_(part, _splat(words, BINS - 1)) for part in low]
    high = builder.and_(pair[1], _splat(words, 0xFFFF0000))
    both = builder.and_(builder.or_(low[0], high), _splat(words, (BINS - 1) * 0x10001))
    return [builder.bitcast(both, _vector(16, STEP))]


def _sift_typed(typing: Any, source: Any, start: Any, count: Any, target: Any) -> Any:
    return types.uint64(source, types.uint64, types.uint64, target), _sift


sift: Any = intrinsic(_sift_typed)
"""The bins above zero of `source[start : start + count]` into `target`; `CAN_SIFT` only.

`source` holds the bits of float32 (uint32), `count` is a multiple of `STEP` (both uint64), and
`target` (uint16) has room for `count + STEP`. Returns how many bins it wrote, and in the upper
half twice the largest magnitude's bits.
"""


@compiled()
def fill_sifted(bits: Any, tables: Any, largest: Any) -> None:
    """`fill` where the processor `CAN_SIFT`."""
    low, one = np.uint64(0xFFFF), np.uint32(1)
    first, second, third, fourth = tables[0], tables[1], tables[2], tables[3]
    buffer = np.empty(CHUNK + STEP, np.uint16)
    fours = buffer.view(np.uint64)
    values = bits.shape[1]
    sifted = values // STEP * STEP
    for row in range(bits.shape[0]):
        line = bits[row]
        top = np.uint32(0)
        zeros = sifted
        for start in range(0, sifted, CHUNK):
            size = min(sifted - start, CHUNK)
            found = sift(line, np.uint64(start), np.uint64(size), buffer)
            top = max(top, np.uint32(found >> np.uint64(32)))
            kept = np.int64(found & np.uint64(0xFFFFFFFF))
            zeros -= kept
            for i in range(kept // 4):
                four = fours[i]
                first[four & low] += one
                second[(four >> np.uint64(16)) & low] += one
                third[(four >> np.uint64(32)) & low] += one
                fourth[four >> np.uint64(48)] += one
            for i in range(kept // 4 * 4, kept):
                first[buffer[i]] += one
        for i in range(sifted, values):
            top = max(top, np.uint32(line[i] << one))
            first[(line[i] >> np.uint32(SHIFT)) & np.uint32(BINS - 1)] += one
        first[0] += np.uint32(zeros)
        largest[row] = top >> one


@compiled()
def fill_anywhere(bits: Any, tables: Any, largest: Any) -> None:
    """`fill` on any processor.

    The largest is found in a loop of its own, which compilers turn into vector instructions;
    shifting the sign out is 2.7 times as fast there as masking it (LLVM then compares unsigned
    words).
    """
    mask, shift, one = np.uint32(BINS - 1), np.uint32(SHIFT), np.uint32(1)
    first, second, third, fourth = tables[0], tables[1], tables[2], tables[3]
    fours = bits.shape[1] // 4 * 4
    for row in range(bits.shape[0]):
        top = np.uint32(0)
        for i in range(bits.shape[1]):
            top = max(top, np.uint32(bits[row, i] << one))
        largest[row] = top >> one
        for i in range(0, fours, 4):
            first[(bits[row, i] >> shift) & mask] += one
            second[(bits[row, i + 1] >> shift) & mask] += one
            third[(bits[row, i + 2] >> shift) & mask] += one
            fourth[(bits[row, i + 3] >> shift) & mask] += one
        for i in range(fours, bits.shape[1]):
            first[(bits[row, i] >> shift) & mask] += one


Fill = Callable[[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]], None]

fill: Fill = fill_sifted if CAN_SIFT else fill_anywhere
"""Count the magnitudes of float32 `bits` (uint32, pictures x values, C-contiguous) into `tables`
(uint32, `TABLES` x at least `BINS`, C-contiguous), each row's largest into `largest` (uint32).

A bin is the upper 15 bits behind the sign. Only the sum of the tables counts. Releases the GIL.
"""


def _pointer_typed(typing: Any, address: Any) -> Any:
    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    words: Any = types.CPointer
    return words(types.uint32)(types.uint64), cast


pointer: Any = intrinsic(_pointer_typed)
"""The uint32 at this address."""


@compiled()
def fill_each(sources: Any, rows: Any, values: Any, tables: Any, largest: Any) -> None:
    """`fill` for several tensors: a call, and a wait for the GIL behind it, for all of them.

    `sources` and `tables` are addresses (uint64) of what `fill` takes, `rows` and `values` the
    shapes (int64); tables are `TABLES` x (`BINS` + `SPREAD`). `largest` has the rows of all.
    """
    done = 0
    for i in range(sources.size):
        bits = carray(pointer(sources[i]), (rows[i], values[i]))
        counts = carray(pointer(tables[i]), (TABLES, BINS + SPREAD))
        fill(bits, counts, largest[done : done + rows[i]])
        done += rows[i]


@compiled()
def add_tables(tables: Any, bins: Any, counts: Any) -> None:
    """Add the first `bins` of all of `tables` to `counts` (int64)."""
    for table in range(tables.shape[0]):
        line = tables[table]
        for i in range(bins):
            counts[i] += np.int64(line[i])
