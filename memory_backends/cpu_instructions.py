"""Vector instructions that numba has no name for, as LLVM writes them, for the loops of `cpu_kernels`.

They need AVX-512 with VNNI (`NEEDED`): LLVM ends the process where it is asked for an instruction that the processor
lacks, so nothing here may be compiled before `cpu_search` has looked. Addresses are int64 throughout.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
"""Features of the processor, by LLVM's names."""
LANES = 16
"""32-bit numbers in a vector."""
VECTORS = 4
GROUP = 6
"""Queries that are multiplied at once: 6 times 4 vectors of accumulators, 4 of keys and 1 of a query fill 29 of the 32
registers."""
TILE = LANES * VECTORS

_intrinsic: Any = intrinsic
"""Without its type, which knows nothing of the argument that numba itself adds."""

_I1, _I8, _I16, _I32, _I64, _F32 = (
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
)
_INTS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(_F32, LANES)
_MASK = ir.VectorType(_I1, LANES)


def _add(b: Any, address: Any, *offsets: Any) -> Any:
    for offset in offsets:
        address = b.add(address, ir.Constant(_I64, offset) if isinstance(offset, int) else offset)
    return address


def _load(b: Any, address: Any, kind: Any, align: int) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def _store(b: Any, value: Any, address: Any, align: int) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def _splat(b: Any, value: Any, count: int = LANES) -> Any:
    kind = ir.VectorType(value.type, count)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _shuffle(b: Any, one: Any, other: Any, places: list[int]) -> Any:
    return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _call(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    module = b.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return b.call(function, arguments)


def _compress(b: Any, vector: Any, mask: Any) -> Any:
    suffix = "v16f32" if vector.type == _FLOATS else "v16i32"
    kind = vector.type
    name = f"llvm.x86.avx512.mask.compress.{suffix}"
    return _call(b, name, kind, [vector, ir.Constant(kind, ir.Undefined), mask])


def _gather(b: Any, base: Any, places: Any, mask: Any) -> Any:
    """Float32 numbers at 32-bit indices from an address."""
    pointer = b.inttoptr(base, _I8.as_pointer())
    arguments = [ir.Constant(_FLOATS, [0.0] * LANES), pointer, places, mask, ir.Constant(_I32, 4)]
    kind = ir.FunctionType(_FLOATS, [_FLOATS, pointer.type, _INTS, _MASK, _I32])
    name = "llvm.x86.avx512.mask.gather.dps.512"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, arguments)


def _count_bits(b: Any, mask: Any) -> Any:
    return b.zext(_call(b, "llvm.ctpop.i16", _I16, [b.bitcast(mask, _I16)]), _I64)


def _integers(*values: int) -> Any:
    return ir.Constant(_INTS, list(values))


@_intrinsic
def scan_tile(typing, panel, asked, quads, starts, scale, shifts, first, counts, lows, slots, stride):  # type: ignore[no-untyped-def]
    signature = types.void(
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        types.float32,
        types.int64,
        types.int32,
        types.int64,
        types.int64,
        types.int64,
        types.int64,
    )

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        panel, asked, quads, starts, scale, shifts, first, counts, lows, slots, stride = arguments
        before = b.block
        body, after = b.append_basic_block("quads"), b.append_basic_block("scanned")
        initial = [_splat(b, _load(b, _add(b, starts, 4 * q), _I32, 4)) for q in range(GROUP)]
        b.branch(body)
        b.position_at_end(body)
        at_panel, at_asked, left = b.phi(_I64), b.phi(_I64), b.phi(_I64)
        sums = [[b.phi(_INTS) for _ in range(VECTORS)] for _ in range(GROUP)]
        at_panel.add_incoming(panel, before)
        at_asked.add_incoming(asked, before)
        left.add_incoming(quads, before)
        keys = [_load(b, _add(b, at_panel, 64 * v), _INTS, 64) for v in range(VECTORS)]
        following: list[list[Any]] = []
        for q in range(GROUP):
            query = _splat(b, _load(b, _add(b, at_asked, 4 * q), _I32, 4))
            following.append([])
            for v in range(VECTORS):
                sums[q][v].add_incoming(initial[q], before)
                product = _call(b, "llvm.x86.avx512.vpdpbusd.512", _INTS, [sums[q][v], keys[v], query])
                sums[q][v].add_incoming(product, body)
                following[q].append(product)
        next_left = b.sub(left, ir.Constant(_I64, 1))
        at_panel.add_incoming(_add(b, at_panel, TILE * 4), body)
        at_asked.add_incoming(_add(b, at_asked, GROUP * 4), body)
        left.add_incoming(next_left, body)
        b.cbranch(b.icmp_signed(">", next_left, ir.Constant(_I64, 0)), body, after)
        b.position_at_end(after)
        zero = ir.Constant(_INTS, [0] * LANES)
        for q in range(GROUP):
            found = following[q]
            together = b.and_(b.and_(found[0], found[1]), b.and_(found[2], found[3]))
            mask = b.icmp_signed(">=", together, zero)
            some = b.icmp_unsigned("!=", b.bitcast(mask, _I16), ir.Constant(_I16, 0))
            push, done = b.append_basic_block("push"), b.append_basic_block("pushed")
            b.cbranch(some, push, done)
            b.position_at_end(push)
            address = _add(b, counts, 8 * q)
            count = _load(b, address, _I64, 8)
            shift = _splat(b, _load(b, _add(b, shifts, 4 * q), _F32, 4))
            scales = _splat(b, scale)
            row = b.mul(stride, ir.Constant(_I64, q))
            for v in range(VECTORS):
                mask = b.icmp_signed(">=", found[v], zero)
                values = b.fadd(b.fmul(b.sitofp(found[v], _FLOATS), scales), shift)
                names = b.add(_splat(b, first), _integers(*range(v * LANES, (v + 1) * LANES)))
                into = b.add(row, b.shl(count, ir.Constant(_I64, 2)))
                _store(b, _compress(b, values, mask), b.add(lows, into), 4)
                _store(b, _compress(b, names, mask), b.add(slots, into), 4)
                count = b.add(count, _count_bits(b, mask))
            _store(b, count, address, 8)
            b.branch(done)
            b.position_at_end(done)
        return context.get_dummy_value()

    return signature, emit


def _loop(b: Any, count: Any, step: int, initial: list[Any], body: Any) -> list[Any]:
    """Runs body(at, *carried) -> carried for at = 0, step, .. while it is below `count`, at least once."""
    before = b.block
    block, after = b.append_basic_block("loop"), b.append_basic_block("looped")
    b.branch(block)
    b.position_at_end(block)
    at = b.phi(_I64)
    carried = [b.phi(value.type) for value in initial]
    following = body(at, *carried)
    next_at = _add(b, at, step)
    for phi, first, later in zip([at, *carried], [ir.Constant(_I64, 0), *initial], [next_at, *following], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.cbranch(b.icmp_signed("<", next_at, count), block, after)
    b.position_at_end(after)
    return following


def _larger(b: Any, one: Any, other: Any) -> Any:
    return b.select(b.fcmp_ordered(">", one, other), one, other)


def _total(b: Any, vector: Any) -> Any:
    """The sum of a vector's numbers, by halves."""
    half = LANES
    while half > 1:
        half //= 2
        vector = b.fadd(
            _shuffle(b, vector, vector, list(range(half))), _shuffle(b, vector, vector, list(range(half, 2 * half)))
        )
    return b.extract_element(vector, ir.Constant(_I32, 0))


@_intrinsic
def stage_key(typing, source, width, centre, inverses, target, maxima):  # type: ignore[no-untyped-def]
    """Writes (key - centre) * inverses, W float32, to `target`; returns the sum of squares.

    `maxima` are LANES running maxima of the magnitudes.
    """
    signature = types.float32(*[types.int64] * 6)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, width, centre, inverses, target, maxima = arguments
        positive = _integers(*[0x7FFFFFFF] * LANES)

        def body(at: Any, squares: Any, largest: Any) -> list[Any]:
            offset = b.shl(at, ir.Constant(_I64, 2))
            numbers = b.fsub(_load(b, b.add(source, offset), _FLOATS, 4), _load(b, b.add(centre, offset), _FLOATS, 4))
            numbers = b.fmul(numbers, _load(b, b.add(inverses, offset), _FLOATS, 4))
            _store(b, numbers, b.add(target, offset), 64)
            magnitudes = b.bitcast(b.and_(b.bitcast(numbers, _INTS), positive), _FLOATS)
            return [b.fadd(squares, b.fmul(numbers, numbers)), _larger(b, magnitudes, largest)]

        none = ir.Constant(_FLOATS, [0.0] * LANES)
        squares, largest = _loop(b, width, LANES, [none, _load(b, maxima, _FLOATS, 64)], body)
        _store(b, largest, maxima, 64)
        return _total(b, squares)

    return signature, emit


@_intrinsic
def extremes(typing, numbers, count, least, most):  # type: ignore[no-untyped-def]
    """Writes the least and the highest of count >= 1 numbers to the addresses `least` and `most`, LANES of each."""
    signature = types.void(*[types.int64] * 4)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        numbers, count, least, most = arguments
        iota, last = _integers(*range(LANES)), _splat(b, b.trunc(b.sub(count, ir.Constant(_I64, 1)), _I32))

        def body(at: Any, low: Any, high: Any) -> list[Any]:
            values = _load(b, b.add(numbers, b.shl(at, ir.Constant(_I64, 2))), _FLOATS, 4)
            inside = b.icmp_signed("<=", b.add(_splat(b, b.trunc(at, _I32)), iota), last)
            lower, higher = b.select(inside, values, low), b.select(inside, values, high)
            return [b.select(b.fcmp_ordered("<", lower, low), lower, low), _larger(b, higher, high)]

        first = _splat(b, _load(b, numbers, _F32, 4))
        for value, address in zip(_loop(b, count, LANES, [first, first], body), (least, most), strict=True):
            _store(b, value, address, 64)
        return context.get_dummy_value()

    return signature, emit


@_intrinsic
def pack_block(typing, rows, stride, inverse, panel, errors):  # type: ignore[no-untyped-def]
    """16 keys times 16 numbers into 4 quads."""
    signature = types.void(types.int64, types.int64, types.float32, types.int64, types.int64)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        rows, stride, inverse, panel, errors = arguments
        inverses = _splat(b, inverse)
        offset = ir.Constant(_INTS, [128] * LANES)
        quads = []
        for key in range(LANES):
            numbers = b.fmul(_load(b, _add(b, rows, b.mul(stride, ir.Constant(_I64, key))), _FLOATS, 64), inverses)
            rounded = _call(b, "llvm.rint.v16f32", _FLOATS, [numbers])
            error = b.fsub(numbers, rounded)
            at = _add(b, errors, key * 64)
            _store(b, b.fadd(_load(b, at, _FLOATS, 64), b.fmul(error, error)), at, 64)
            codes = b.trunc(b.add(b.fptosi(rounded, _INTS), offset), ir.VectorType(_I8, LANES))
            quads.append(b.bitcast(codes, ir.VectorType(_I32, 4)))
        # Key 4 j + i goes into 128-bit lane j of vector i; then four numbers are transposed within each lane.
        vectors = []
        for i in range(4):
            low = _shuffle(b, quads[i], quads[4 + i], list(range(8)))
            high = _shuffle(b, quads[8 + i], quads[12 + i], list(range(8)))
            vectors.append(_shuffle(b, low, high, list(range(16))))
        lanes = range(0, 16, 4)
        low_pair = [p for j in lanes for p in (j, j + 16, j + 1, j + 17)]
        high_pair = [p for j in lanes for p in (j + 2, j + 18, j + 3, j + 19)]
        a, c = _shuffle(b, vectors[0], vectors[1], low_pair), _shuffle(b, vectors[2], vectors[3], low_pair)
        d, e = _shuffle(b, vectors[0], vectors[1], high_pair), _shuffle(b, vectors[2], vectors[3], high_pair)
        low_half = [p for j in lanes for p in (j, j + 1, j + 16, j + 17)]
        high_half = [p for j in lanes for p in (j + 2, j + 3, j + 18, j + 19)]
        for quad, (one, other, places) in enumerate(
            ((a, c, low_half), (a, c, high_half), (d, e, low_half), (d, e, high_half))
        ):
            _store(b, _shuffle(b, one, other, places), _add(b, panel, quad * TILE * 4), 64)
        return context.get_dummy_value()

    return signature, emit


@_intrinsic
def count_reaching(typing, numbers, count, least):  # type: ignore[no-untyped-def]
    signature = types.int64(types.int64, types.int64, types.float32)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        numbers, count, least = arguments
        limit, iota = _splat(b, least), _integers(*range(LANES))
        short = _splat(b, b.trunc(count, _I32))

        def body(at: Any, total: Any) -> list[Any]:
            values = _load(b, b.add(numbers, b.shl(at, ir.Constant(_I64, 2))), _FLOATS, 4)
            inside = b.icmp_signed("<", b.add(_splat(b, b.trunc(at, _I32)), iota), short)
            mask = b.and_(b.fcmp_ordered(">=", values, limit), inside)
            return [b.add(total, _count_bits(b, mask))]

        return _loop(b, count, LANES, [ir.Constant(_I64, 0)], body)[0]

    return signature, emit


@_intrinsic
def keep_reaching(typing, numbers, names, count, least, norm, error, tile_errors, tile_norms):  # type: ignore[no-untyped-def]
    """Moves the entries of a list whose lower bound plus 2 eps is at least `least` to its front; returns how many."""
    signature = types.int64(
        types.int64, types.int64, types.int64, types.float32, types.float32, types.float32, types.int64, types.int64
    )

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        numbers, names, count, least, norm, error, tile_errors, tile_norms = arguments
        limit, iota = _splat(b, least), _integers(*range(LANES))
        twice = ir.Constant(_F32, 2.0)
        norms, errors = _splat(b, b.fmul(norm, twice)), _splat(b, b.fmul(error, twice))
        short = _splat(b, b.trunc(count, _I32))

        def body(at: Any, total: Any) -> list[Any]:
            offset = b.shl(at, ir.Constant(_I64, 2))
            values = _load(b, b.add(numbers, offset), _FLOATS, 4)
            labels = _load(b, b.add(names, offset), _INTS, 4)
            inside = b.icmp_signed("<", b.add(_splat(b, b.trunc(at, _I32)), iota), short)
            tiles = b.lshr(labels, _integers(*[TILE.bit_length() - 1] * LANES))
            spread = b.fmul(norms, _gather(b, tile_errors, tiles, inside))
            spread = b.fadd(spread, b.fmul(errors, _gather(b, tile_norms, tiles, inside)))
            mask = b.and_(b.fcmp_ordered(">=", b.fadd(values, spread), limit), inside)
            into = b.shl(total, ir.Constant(_I64, 2))
            _store(b, _compress(b, values, mask), b.add(numbers, into), 4)
            _store(b, _compress(b, labels, mask), b.add(names, into), 4)
            return [b.add(total, _count_bits(b, mask))]

        return _loop(b, count, LANES, [ir.Constant(_I64, 0)], body)[0]

    return signature, emit


@_intrinsic
def prefetch(typing, address):  # type: ignore[no-untyped-def]
    """Asks for one line of the cache, to be read, into the second level."""

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        pointer = b.inttoptr(arguments[0], _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        name = "llvm.prefetch.p0"
        function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
        b.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@_intrinsic
def ordered(typing, score):  # type: ignore[no-untyped-def]
    """An int64 that orders like a float32 number."""

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        bits = b.bitcast(arguments[0], _I32)
        mask = b.and_(b.ashr(bits, ir.Constant(_I32, 31)), ir.Constant(_I32, 0x7FFFFFFF))
        return b.sext(b.xor(bits, mask), _I64)

    return types.int64(types.float32), emit
