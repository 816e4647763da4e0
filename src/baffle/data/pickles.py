"""A reader for the pickles of CIFAR's Python version that cannot run what is inside them.

A pickle is a program. Three fences, any one of which stops the known attacks:

1. The program is scanned before it runs: only opcodes that build plain values, few calls, no
   memo slot beyond the file's length (a 6-byte pickle can ask CPython for 64 GiB of memo).
2. Names resolve through an allow-list: what NumPy writes for an array, and nothing else.
3. Those names resolve to inert stand-ins, never to NumPy's own functions, whose C code trusts
   the state that it is handed. Arrays are rebuilt here, from checked shape, type and bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.data.files import FLAT_FILE_LIMIT, read_bytes, why
from baffle.errors import DataError

# fmt: off
_OPCODES = frozenset({
    # frame, memo and stack
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE",
    "GET", "BINGET", "LONG_BINGET",
    # plain values
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT",
    "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    # an array
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
})
# fmt: on
_MOST_CALLS = 64  # each may copy a string: an array takes two or three calls, a file one array
_KINDS = "buif"  # booleans, integers and floats: nothing that holds a pointer


def load_pickle(path: Path, limit: int = FLAT_FILE_LIMIT) -> dict[str, Any]:
    """The dictionary of plain values and NumPy arrays in a pickle, its keys as text.

    Reads what Python 2 wrote: its strings come back as bytes. Nothing in the file is executed.
    Raises DataError where the file is damaged, larger than ``limit`` bytes, asks for anything but
    plain values and numeric arrays, or is no dictionary.
    """
    content = read_bytes(path, limit)
    try:
        _scan(content)
        table = _Reader(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(table, dict):
            raise DataError(f"holds a {type(table).__name__}, not a dictionary")
        return {_text(key): _finished(value) for key, value in table.items()}
    except DataError as error:
        raise DataError(f"{path}: refused: {error}; fetch the data set from its source") from error
    except Exception as error:  # a crafted program can fail in any way; none of them is ours
        raise DataError(
            f"{path}: no readable pickle: {why(error)}; fetch the data set from its source"
        ) from error


def _scan(content: bytes) -> None:
    import pickletools  # a book about opcodes: not in the memory of those who read no pickle

    calls = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise DataError(f"the pickle uses {opcode.name}, which no plain data needs")
        if opcode.name.endswith("PUT") and int(argument or 0) > len(content):
            raise DataError(f"the pickle asks for {argument} memo slots")
        calls += opcode.name in ("REDUCE", "BUILD")
        if calls > _MOST_CALLS:
            raise DataError(f"the pickle makes more than {_MOST_CALLS} calls")


class _Inert:
    """A stand-in for a name in a pickle. Has no attributes that a pickle could overwrite."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise DataError("the pickle changes a function")


class _NdarrayType(_Inert):
    __slots__ = ()


class _Reconstruct(_Inert):
    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> _Array:
        return _Array()


class _DtypeType(_Inert):
    __slots__ = ()

    def __call__(self, code: object, align: object = False, copy: object = False) -> _Dtype:
        return _Dtype(_text(code))


class _Encode(_Inert):
    __slots__ = ()

    def __call__(self, text: str, encoding: object = "utf-8") -> bytes:
        if _text(encoding) not in ("latin1", "latin-1"):
            raise DataError(f"the pickle calls the codec {encoding!r}"[:80])
        return text.encode("latin-1")


class _Dtype:
    """A numeric element type: its code as in 'u1', and the byte order from its state."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        if len(code) != 2 or code[0] not in _KINDS or code[1] not in "1248":
            raise DataError(f"the pickle holds elements of type {code[:20]!r}, not numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        # (version, order, subdtype, names, fields, itemsize, alignment, flags): numbers have none
        if order not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise DataError("the pickle holds structured elements, not numbers")
        self.order = order

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """An array between its creation (empty) and its state (shape, type and bytes)."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: NDArray[np.generic] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise DataError("the pickle holds an array of objects")
        kind = dtype.resolve()
        whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not whole or math.prod(shape) * kind.itemsize != len(content):
            raise DataError(f"the pickle's array has {len(content)} bytes, not what its shape needs")
        flat = np.frombuffer(content, kind)
        self.values = flat.reshape(shape, order="F" if fortran else "C")


_ALLOWED: dict[tuple[str, str], _Inert] = {
    ("numpy", "ndarray"): _NdarrayType(),
    ("numpy", "dtype"): _DtypeType(),
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("_codecs", "encode"): _Encode(),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Inert:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(f"the pickle calls for {module}.{name}"[:120]) from None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, str):
        return value
    raise DataError(f"the pickle holds a {type(value).__name__} where text belongs")


def _finished(value: object) -> object:
    if isinstance(value, _Array):
        if value.values is None:
            raise DataError("the pickle holds an array without contents")
        return value.values
    return value
