"""Loops whose operands stay in vector registers, as LLVM's vectors, for what `compiled.vectorised` does not get there.

A product of small matrices is as fast as what loads its operands: compiled from loops it reaches a third of what a
processor can do, as the sums go through memory, and from here nine tenths, which is what a BLAS reaches with large
matrices. Vectors are as long as this machine's; LLVM makes of them what others have.

Addresses in place of arrays, and nothing is checked: as in C, what is called here has to be right. Numbers of floats,
not of bytes, but for the addresses.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined"
from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # whose types are those of what it is given
WIDTH = 32
"""Floats of a row of what is multiplied here."""
LINE = 64
"""Bytes that a cache holds together."""
WORD = 64
"""Bits of an integer that says of as many entries whether they are."""


def _lanes() -> int:
    """Floats of a vector register of the processor that numba compiles for."""
    features = numba.config.CPU_FEATURES or llvmlite.binding.get_host_cpu_features().flatten()
    if "+avx512f" in features:
        return 16
    return 8 if "+avx" in features else 4


LANES = _lanes()
ROWS = 8 if LANES == 16 else 2
"""Rows of a tile: its sums take half of the registers, of which a machine has 32 or 16."""

_INT, _INDEX, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _MANY = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, WORD)


def _index(value: int):
    return ir.Constant(_INDEX, value)


def _number(value: int):
    return ir.Constant(_INT, value)


def _address(builder, base, floats):
    """That of the entry so many `floats` (a number or an LLVM value) after `base`."""
    offset = _index(4 * floats) if isinstance(floats, int) else builder.mul(floats, _index(4))
    return builder.add(base, offset)


def _load(builder, base, floats):
    loaded = builder.load(builder.inttoptr(_address(builder, base, floats), _VECTOR.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder, vector, base, floats):
    builder.store(vector, builder.inttoptr(_address(builder, base, floats), _VECTOR.as_pointer())).align = 4


def _shuffled(builder, vector, order):
    mask = ir.Constant(ir.VectorType(_INT, LANES), [_number(lane) for lane in order])
    return builder.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), mask)


def _llvm(builder, name, result, arguments):
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


@intrinsic
def tile(_, a, k_step, row_step, b, b_step, out, out_step, count):
    """out[r, :] = the sum over k < `count` of a[k * k_step + r * row_step] * b[k, :], for ROWS rows r.

    Args:
        a, b, out: addresses of floats; rows of `b` and `out` are of WIDTH, and begin a step apart.
    """

    def generate(context, builder, signature, args):
        a, k_step, row_step, b, b_step, out, out_step, count = args
        vectors = range(WIDTH // LANES)
        fused = _llvm(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
        before = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(_INDEX)
        k.add_incoming(_index(0), before)
        sums = [[builder.phi(_VECTOR) for _ in vectors] for _ in range(ROWS)]
        for row in sums:
            for total in row:
                total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
        builder.cbranch(builder.icmp_signed("<", k, count), body, done)
        builder.position_at_end(body)
        row_of_b = _address(builder, b, builder.mul(k, b_step))
        loaded = [_load(builder, row_of_b, LANES * number) for number in vectors]
        column_of_a = _address(builder, a, builder.mul(k, k_step))
        for number, row in enumerate(sums):
            place = _address(builder, column_of_a, builder.mul(row_step, _index(number)))
            entry = builder.load(builder.inttoptr(place, _FLOAT.as_pointer()))
            first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), entry, _number(0))
            everywhere = _shuffled(builder, first, [0] * LANES)
            for total, factor in zip(row, loaded, strict=True):
                total.add_incoming(builder.call(fused, [everywhere, factor, total]), body)
        k.add_incoming(builder.add(k, _index(1)), body)
        builder.branch(head)
        builder.position_at_end(done)
        for number, row in enumerate(sums):
            row_of_out = _address(builder, out, builder.mul(out_step, _index(number)))
            for column, total in enumerate(row):
                _store(builder, total, row_of_out, LANES * column)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


@intrinsic
def fold(_, top, bottom, out):
    """Sums and differences of what mirrors itself in two rows of 2 * WIDTH, at addresses `top` and `bottom`.

    With e = row[j] + row[-1 - j] and o = row[j] - row[-1 - j], those j < WIDTH: of both rows e's sum, o's sum, e's
    difference and o's difference, to `out` and WIDTH * WIDTH floats after it, twice and three times that.
    """

    def generate(context, builder, signature, args):
        top, bottom, out = args
        for number in range(WIDTH // LANES):
            evens, odds = [], []
            for row in (top, bottom):
                near = _load(builder, row, LANES * number)
                far = _load(builder, row, 2 * WIDTH - LANES * (number + 1))
                far = _shuffled(builder, far, range(LANES - 1, -1, -1))
                evens.append(builder.fadd(near, far))
                odds.append(builder.fsub(near, far))
            of_both = builder.fadd(*evens), builder.fadd(*odds), builder.fsub(*evens), builder.fsub(*odds)
            for quarter, vector in enumerate(of_both):
                _store(builder, vector, out, WIDTH * WIDTH * quarter + LANES * number)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


def _word(builder, entries, number, bounds):
    """Of the WORD floats with this `number`, a bit for each, whether its magnitude's bits are at least the bound."""
    place = _address(builder, entries, builder.mul(number, _index(WORD)))
    held = builder.load(builder.inttoptr(place, _MANY.as_pointer()))
    held.align = 4
    magnitudes = builder.and_(held, ir.Constant(_MANY, [_number(0x7FFFFFFF)] * WORD))
    return builder.bitcast(builder.icmp_signed(">=", magnitudes, bounds), _INDEX)


def _bounds(builder, bound):
    undefined = ir.Constant(_MANY, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(bound, _INT), _number(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_MANY, [_number(0)] * WORD))


@intrinsic
def reaching(_, entries, bound, words, count):
    """A bit for each of `count` times WORD floats, whether its magnitude's bits, as an integer, are at least `bound`.

    Args:
        entries, words: addresses of floats and, written, 64-bit integers.
    """

    def generate(context, builder, signature, args):
        entries, bound, words, count = args
        bounds = _bounds(builder, bound)
        with cgutils.for_range(builder, count) as loop:
            there = builder.add(words, builder.mul(loop.index, _index(8)))
            word = _word(builder, entries, loop.index, bounds)
            builder.store(word, builder.inttoptr(there, _INDEX.as_pointer()))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def how_many_reach(_, entries, bound, count):
    """How many bits `reaching` would set."""

    def generate(context, builder, signature, args):
        entries, bound, count = args
        total, bounds = cgutils.alloca_once_value(builder, _index(0)), _bounds(builder, bound)
        with cgutils.for_range(builder, count) as loop:
            word = _word(builder, entries, loop.index, bounds)
            builder.store(builder.add(builder.load(total), builder.ctpop(word)), total)
        return builder.load(total)

    return types.intp(*[types.intp] * 3), generate


@intrinsic
def lowest_bit(_, word):
    """Which bit of a 64-bit integer, not zero, is the lowest that is set."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.intp(types.uint64), generate


@intrinsic
def prefetch(_, address):
    """Have the LINE bytes there come nearer; no harm where there are none."""

    def generate(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        function = _llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, _INT, _INT, _INT])
        builder.call(function, [builder.inttoptr(args[0], byte), _number(0), _number(2), _number(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate
