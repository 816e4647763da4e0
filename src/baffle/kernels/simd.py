"""Sixteen float32 lanes as a value inside numba functions: what a convolution kernel is written with.

``load``, ``store``, ``splat``, ``add``, ``mul``, ``fma``, ``least`` and ``largest`` compile to one vector
instruction each where the processor has 512-bit registers, and to a few narrower ones elsewhere. Arrays are
flat, C-contiguous float32; indices are not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_FLOAT = ir.FloatType()
_LANES = ir.VectorType(_FLOAT, LANES)


class LanesType(types.Type):
    """numba's type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


LANES_TYPE = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, _LANES)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of ``array[index]``."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _is_flat_float32(array: Any) -> bool:
    return isinstance(array, types.Array) and array.dtype == types.float32 and array.layout == "C"


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Lanes ``array[index : index + 16]``."""
    if not _is_flat_float32(array):
        raise TypeError("load() takes a C-contiguous float32 array")

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load(builder.bitcast(address, _LANES.as_pointer()), align=4)

    return LANES_TYPE(array, types.intp), emit


@intrinsic
def store(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """``array[index : index + 16] = lanes``."""
    if not _is_flat_float32(array):
        raise TypeError("store() takes a C-contiguous float32 array")

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        builder.store(arguments[2], builder.bitcast(address, _LANES.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, lanes), emit


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_LANES, ir.Undefined), mask)


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """``value`` in every lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0])

    return LANES_TYPE(types.float32), emit


def _fma_function(builder: Any) -> Any:
    kind = ir.FunctionType(_LANES, [_LANES] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(_fma_function(builder), arguments)

    return LANES_TYPE(LANES_TYPE, LANES_TYPE, LANES_TYPE), emit


def _elementwise(name: str) -> Any:
    @intrinsic
    def instruction(typing: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return LANES_TYPE(LANES_TYPE, LANES_TYPE), emit

    return instruction


add, mul = _elementwise("fadd"), _elementwise("fmul")


def _extreme(name: str, predicate: str) -> Any:
    @intrinsic
    def instruction(typing: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b = arguments
            return builder.select(builder.fcmp_ordered(predicate, a, b), a, b)

        return LANES_TYPE(LANES_TYPE, LANES_TYPE), emit

    return instruction


least, largest = _extreme("least", "<"), _extreme("largest", ">")


@intrinsic(prefer_literal=True)
def multiply_block(
    typing: Any,
    rows: Any,
    columns: Any,
    left: Any,
    left_at: Any,
    left_row: Any,
    right: Any,
    right_at: Any,
    right_row: Any,
    out: Any,
    out_at: Any,
    out_row: Any,
    depth: Any,
) -> Any:
    """``out = left · right`` for one block that fits the registers.

    ``rows`` and ``columns`` (in units of 16 floats) are literal integers; each matrix is a flat array,
    the index where the block starts, and the distance between its rows. ``depth`` is the inner length.
    rows·columns + columns + 1 registers are in use: 24 + 4 + 1 of AVX-512's 32 for 6 × 4.
    """
    r, c = rows.literal_value, columns.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index = signature.args[3]
        intp = context.get_value_type(index)
        _, _, a, a_at, a_row, b, b_at, b_row, o, o_at, o_row, n = arguments
        types_ = signature.args
        a_ptr = _pointer(context, builder, types_[2], a, a_at)
        b_ptr = _pointer(context, builder, types_[5], b, b_at)
        o_ptr = _pointer(context, builder, types_[8], o, o_at)
        a_rows = [builder.gep(a_ptr, [builder.mul(a_row, ir.Constant(intp, i))]) for i in range(r)]
        fma_ = _fma_function(builder)
        entry = builder.block
        body = builder.append_basic_block("multiply")
        after = builder.append_basic_block("multiplied")
        zero = ir.Constant(_LANES, [0.0] * LANES)
        builder.cbranch(builder.icmp_signed(">", n, ir.Constant(intp, 0)), body, after)
        builder.position_at_end(body)
        k = builder.phi(intp)
        k.add_incoming(ir.Constant(intp, 0), entry)
        sums = [[builder.phi(_LANES) for _ in range(c)] for _ in range(r)]
        for row in sums:
            for phi in row:
                phi.add_incoming(zero, entry)
        b_line = builder.gep(b_ptr, [builder.mul(k, b_row)])
        vectors = []
        for j in range(c):
            address = builder.gep(b_line, [ir.Constant(intp, j * LANES)])
            vectors.append(builder.load(builder.bitcast(address, _LANES.as_pointer()), align=4))
        new = []
        for i in range(r):
            value = _splat(builder, builder.load(builder.gep(a_rows[i], [k])))
            new.append([builder.call(fma_, [value, vectors[j], sums[i][j]]) for j in range(c)])
        following = builder.add(k, ir.Constant(intp, 1))
        for i in range(r):
            for j in range(c):
                sums[i][j].add_incoming(new[i][j], body)
        k.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, n), body, after)
        builder.position_at_end(after)
        results = []
        for i in range(r):
            for j in range(c):
                phi = builder.phi(_LANES)
                phi.add_incoming(zero, entry)
                phi.add_incoming(new[i][j], body)
                results.append((i, j, phi))
        for i, j, phi in results:
            at = builder.add(builder.mul(o_row, ir.Constant(intp, i)), ir.Constant(intp, j * LANES))
            address = builder.gep(o_ptr, [at])
            builder.store(phi, builder.bitcast(address, _LANES.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.intp
    return types.none(rows, columns, left, i, i, right, i, i, out, i, i, i), emit


# The constant matrices that ``transform_tile`` can be asked for.
MATRICES: dict[tuple[str, int], list[list[float]]] = {}


@intrinsic(prefer_literal=True)
def transform_tile(
    typing: Any,
    name: Any,
    left: Any,
    right: Any,
    source: Any,
    source_at: Any,
    source_row: Any,
    source_column: Any,
    target: Any,
    target_at: Any,
    target_row: Any,
    target_column: Any,
) -> Any:
    """``target = L · source · Rᵀ`` for tiles of lanes, by two constant matrices.

    L is MATRICES[name, len(left)], R is MATRICES[name, len(right)]: tuples, because their lengths are known
    while code is compiled.
    Lane vector (i, j) of a tile starts at ``at + i·row + j·column``. The whole product is laid out as
    straight code: no multiplication by 0 or ±1, and rows that differ in the sign of their odd part alone
    share their two halves.
    """
    down = MATRICES[name.literal_value, left.count]
    across = MATRICES[name.literal_value, right.count]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        intp = context.get_value_type(kinds[4])
        s, s_at, s_row, s_column, t, t_at, t_row, t_column = arguments[3:]

        def address(array_type: Any, array: Any, at: Any, row: Any, i: int, column: Any, j: int) -> Any:
            index = builder.add(at, builder.mul(row, ir.Constant(intp, i)))
            index = builder.add(index, builder.mul(column, ir.Constant(intp, j)))
            return builder.bitcast(_pointer(context, builder, array_type, array, index), _LANES.as_pointer())

        rows = []
        for i in range(len(down[0])):
            line = [
                builder.load(address(kinds[3], s, s_at, s_row, i, s_column, j), align=4)
                for j in range(len(across[0]))
            ]
            rows.append(_combine(builder, across, line))
        for j in range(len(across)):
            for i, lanes in enumerate(_combine(builder, down, [row[j] for row in rows])):
                builder.store(lanes, address(kinds[7], t, t_at, t_row, i, t_column, j), align=4)
        return context.get_dummy_value()

    i = types.intp
    return types.none(name, left, right, source, i, i, i, target, i, i, i), emit


def _combine(builder: Any, matrix: list[list[float]], lanes: list[Any]) -> list[Any]:
    """The matrix times a vector of lane vectors."""
    out: list[Any] = [None] * len(matrix)
    for i, row in enumerate(matrix):
        if out[i] is not None:
            continue
        for j in range(i + 1, len(matrix)):
            even = [(a + b) / 2 for a, b in zip(row, matrix[j], strict=True)]
            odd = [(a - b) / 2 for a, b in zip(row, matrix[j], strict=True)]
            if any(even) and any(odd) and not any(a and b for a, b in zip(even, odd, strict=True)):
                half, rest = _weighted(builder, even, lanes), _weighted(builder, odd, lanes)
                out[i], out[j] = builder.fadd(half, rest), builder.fsub(half, rest)
                break
        else:
            out[i] = _weighted(builder, row, lanes)
    return out


def _weighted(builder: Any, weights: list[float], lanes: list[Any]) -> Any:
    """Σ weight·lanes; the terms of weight ±1 need no multiplication."""
    total = None
    terms = sorted(((w, x) for w, x in zip(weights, lanes, strict=True) if w), key=lambda term: term[0] != 1)
    for weight, x in terms:
        constant = ir.Constant(_LANES, [weight] * LANES)
        if total is None:
            total = x if weight == 1 else builder.fmul(constant, x)
        elif abs(weight) == 1:
            total = builder.fadd(total, x) if weight > 0 else builder.fsub(total, x)
        else:
            total = builder.call(_fma_function(builder), [constant, x, total])
    return total
