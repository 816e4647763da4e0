"""A bundle: a network, its weights and what it wants to be fed, as a folder that any runtime can read.

bundle.json     what is in it, canonical JSON, with the SHA-256 of every other file
weights.bin     the trainable parameters, float32 little-endian, in the order of the layout
frozen.bin      the bytes of all other tensors, one behind the other, sorted by name
model.onnx      the network for ONNX Runtime, with the parameters as inputs and the loss inside; may be absent
prefix.onnx     what comes before a parameter is met, where that is a part of its own; then not in model.onnx

Nothing in it is code, and nothing is believed: sizes are compared before anything is allocated, files are
those of the folder itself (no links), and a file whose hash differs is refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from baffle.digests import sha256
from baffle.errors import ConfigError, DataError
from baffle.perturbations import Layout
from baffle.runtimes.graph import Graph
from baffle.runtimes.sources import Source, StoredWeights, chunks

if TYPE_CHECKING:
    from io import BufferedReader

FORMAT = "baffle bundle v1"
HEAD, WEIGHTS, FROZEN, MODEL, PREFIX = "bundle.json", "weights.bin", "frozen.bin", "model.onnx", "prefix.onnx"

_MOST_HEAD = 1 << 22  # bytes of bundle.json
_MOST_PARAMETERS = 1 << 36
_BLOCK = 1 << 18  # bytes hashed at a time
_TYPES = (
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
)


def frozen_digest(
    tensors: Mapping[str, NDArray[Any]], types: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """SHA-256 (32 bytes) of what is not trained: frozen parameters and buffers, by name, type, shape, bytes.

    Types have torch's names. ``types`` names those of tensors that NumPy has no type for (bfloat16), which
    come as integers of the same width.
    """
    h = sha256(b"baffle frozen v1")
    for name in sorted(tensors):
        values = tensors[name]
        kind = types.get(name, f"torch.{values.dtype.name}")
        h.update(f"{name} {kind} {tuple(values.shape)}\n".encode())
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        h.update(little.reshape(-1).view(np.uint8).data)
    return h.digest()


@dataclass(frozen=True, eq=False)
class Bundle:
    """A network with its weights, from a folder (`read`) or in memory (``export``, until `write`).

    ``frozen`` are the tensors that are not trained, by name; ``input_shape`` is that of one sample, of which
    the network sees ``inputs * scale[c] + shift[c]``. ``graph`` is None where an operator is not on its list:
    ``missing`` then says which, and ONNX Runtime alone can run it, from ``onnx``.
    """

    name: str
    layout: Layout = field(repr=False)
    frozen: Mapping[str, NDArray[Any]] = field(repr=False)
    frozen_digest: bytes = field(repr=False)
    input_shape: tuple[int, ...]
    classes: tuple[str, ...] = field(repr=False)
    scale: NDArray[np.float32] = field(repr=False)
    shift: NDArray[np.float32] = field(repr=False)
    graph: Graph | None = field(repr=False)
    missing: str = ""
    folder: Path | None = None
    initial: NDArray[np.float32] | None = field(default=None, repr=False)  # in memory: where training starts
    models: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # in memory: ONNX files by name

    @property
    def onnx(self) -> Path | None:
        """The ONNX file of a bundle in a folder; None where there is none."""
        if self.folder is None or not os.path.lexists(self.folder / MODEL):
            return None
        return self.folder / MODEL

    def onnx_bytes(self, name: str = MODEL) -> bytes | None:
        """The bytes of ``model.onnx`` or ``prefix.onnx``; None where there is none."""
        if self.folder is None or not os.path.lexists(self.folder / name):
            return self.models.get(name)
        with _opened(self.folder / name) as file:
            return file.read()

    def weights(self) -> NDArray[np.float32]:
        """A fresh copy of the weights, flat (n,). Memory: 4n bytes."""
        if self.initial is not None:
            return self.initial.copy()
        with self.stored() as source:
            return source[0 : self.layout.n]  # a fresh array

    def stored(self) -> StoredWeights:
        """The weights where they lie on disk: not read yet. Raises ConfigError where there is no folder."""
        if self.folder is None:
            raise ConfigError(f"the bundle {self.name} is in memory only: write it to a folder first")
        return StoredWeights(self.folder / WEIGHTS, self.layout.n)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of bundle.json, which has the hashes of all that is in the folder."""
        if self.folder is None:
            raise ConfigError(f"the bundle {self.name} is in memory only: write it to a folder first")
        with _opened(self.folder / HEAD) as file:
            return sha256(file.read()).digest()

    def __post_init__(self) -> None:
        channels = self.input_shape[:1]
        for what, values in (("scale", self.scale), ("shift", self.shift)):
            if values.dtype != np.float32 or values.shape != channels or not np.isfinite(values).all():
                raise ConfigError(f"bundle {self.name}: {what} must be {channels} finite float32 numbers")
        if clash := sorted(set(self.layout.names) & self.frozen.keys()):
            raise ConfigError(f"bundle {self.name}: {clash[0]!r} is both trained and frozen")
        if self.graph is not None:
            try:
                self._check_graph(self.graph)
            except DataError as error:
                raise ConfigError(f"bundle {self.name}: {error}") from error

    def _check_graph(self, graph: Graph) -> None:
        if graph.input_shape != self.input_shape:
            raise ConfigError(
                f"bundle {self.name}: its graph takes {graph.input_shape}, it {self.input_shape}"
            )
        for name in graph.tensors():
            if name in self.frozen and self.frozen[name].dtype != np.float32:
                raise ConfigError(f"bundle {self.name}: {name} is {self.frozen[name].dtype}, not float32")
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        shapes.update({name: values.shape for name, values in self.frozen.items()})
        outputs = graph.shapes(shapes)[-1]
        if graph.loss == "cross-entropy" and outputs != (len(self.classes),):
            raise ConfigError(f"bundle {self.name}: outputs {outputs} of {len(self.classes)} classes")

    # -- on disk ------------------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, check: bool = True) -> Bundle:
        """A bundle from its folder. Memory: its frozen tensors; the weights stay on disk.

        ``check`` compares the hash of every file, 64 Ki parameters at a time; without it, only sizes and what
        is said of shapes. Raises DataError, in one line that names the file, for what is missing, damaged,
        or not as this class writes it.
        """
        path = Path(folder)
        head = path / HEAD
        with _opened(head) as file:
            if os.fstat(file.fileno()).st_size > _MOST_HEAD:
                raise DataError(f"{head}: more than {_MOST_HEAD} bytes; no bundle has so many")
            raw = file.read()
        told = _Told(head, _parsed(head, raw))
        try:
            bundle, files = _decoded(told, path)
            for name in (MODEL, PREFIX):
                if name not in files and os.path.lexists(path / name):
                    raise DataError(f"{path / name}: {HEAD} does not name it")
            for name, (size, digest) in files.items():
                _compare(path / name, size, digest if check else None)
            # After the comparison: what is allocated is no more than the file is long.
            frozen = _frozen(path / FROZEN, told)
            bundle = replace(bundle, frozen=MappingProxyType(frozen))
            if check and frozen_digest(frozen) != bundle.frozen_digest:
                raise DataError(f"{path / FROZEN}: not the tensors that {HEAD} has the digest of")
            return bundle
        except ConfigError as error:  # a shape, a setting of a layer
            raise DataError(f"{head}: {_why(error)}") from error

    @classmethod
    def of_files(cls, files: Mapping[str, bytes | bytearray | memoryview]) -> Bundle:
        """A bundle in memory, of its files: ``bundle.json``, ``frozen.bin``, perhaps ``weights.bin``.

        For whoever has compared their hashes. Frozen tensors and weights are views of their files. Raises
        DataError for what is no bundle, as ``read`` does.
        """
        head = Path(HEAD)
        try:
            told = _Told(head, _parsed(head, bytes(files[HEAD])))
            bundle, sizes = _decoded(told, None)
            for name in files.keys() - {HEAD}:
                if name not in sizes or len(files[name]) != sizes[name][0]:
                    raise DataError(f"{name}: not the file that {HEAD} names")
            frozen, at = {}, 0
            for name, shape, dtype, size in _spaces(told.keys(_KEYS)["frozen"]):
                frozen[name] = np.frombuffer(files[FROZEN], dtype, math.prod(shape), at).reshape(shape)
                at += size
            initial = np.frombuffer(files[WEIGHTS], "<f4") if WEIGHTS in files else None
            return replace(bundle, frozen=MappingProxyType(frozen), initial=initial)
        except KeyError as error:
            raise DataError(f"{error.args[0]}: a bundle has this file") from error
        except ConfigError as error:
            raise DataError(f"{head}: {_why(error)}") from error

    def write(self, folder: str | os.PathLike[str], weights: Source | None = None) -> Bundle:
        """Writes a folder, whole or not at all, and reads it again. ``weights`` (n,): default its own.

        Raises ConfigError where something is there already, and for weights of another length or not
        finite; DataError where the disk refuses.
        """
        import shutil  # with all its archive formats: not for whoever only reads

        path = Path(folder)
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there already: choose another folder")
        source: Source = self._source() if weights is None else weights
        if source.shape != (self.layout.n,):
            raise ConfigError(f"weights have the shape {source.shape}, the bundle has n = {self.layout.n}")
        part = path.parent / f".{path.name}.{os.urandom(4).hex()}.part"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
            try:
                self._fill(part, source)
                os.rename(part, path)
                _sync(path.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {_why(error)}") from error
        return Bundle.read(path, check=False)

    def _source(self) -> Source:
        return self.stored() if self.initial is None else self.initial

    def _fill(self, part: Path, source: Source) -> None:
        files = {WEIGHTS: _written(part / WEIGHTS, _blocks(source))}
        order = sorted(self.frozen)
        little = (
            np.ascontiguousarray(self.frozen[name]).astype(
                self.frozen[name].dtype.newbyteorder("<"), copy=False
            )
            for name in order
        )
        files[FROZEN] = _written(part / FROZEN, (values.reshape(-1).view(np.uint8).data for values in little))
        for name in (MODEL, PREFIX):
            if (model := self.onnx_bytes(name)) is not None:
                files[name] = _written(part / name, iter((model,)))
        head = {
            "classes": list(self.classes),
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
            "format": FORMAT,
            "frozen": [
                {"name": name, "shape": list(self.frozen[name].shape), "type": self.frozen[name].dtype.name}
                for name in order
            ],
            "frozen_digest": self.frozen_digest.hex(),
            "graph": None if self.graph is None else self.graph.as_dict(),
            "input_shape": list(self.input_shape),
            "layout": [
                {"name": name, "shape": list(shape)}
                for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
            ],
            "missing": self.missing,
            "name": self.name,
            "scale": self.scale.tolist(),
            "shift": self.shift.tolist(),
        }
        _written(part / HEAD, iter((_canonical(head),)))
        _sync(part)


def _canonical(head: Any) -> bytes:
    text = json.dumps(head, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _blocks(source: Source) -> Iterator[memoryview]:
    for chunk in chunks(source):
        if not np.isfinite(chunk).all():
            raise ConfigError("the weights hold a NaN or an infinity: no training starts there")
        yield np.ascontiguousarray(chunk, dtype="<f4").data.cast("B")


def _written(path: Path, blocks: Iterator[Any]) -> tuple[int, str]:
    """Size and SHA-256 (hex) of a new file, on disk when it returns."""
    h, size = sha256(), 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            h.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return size, h.hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading what may be hostile ----------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A plain file for reading: no link, which may lead elsewhere, and no pipe, which may never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError(f"{path}: no plain file")
            yield file
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(f"{path}: cannot be read: {_why(error)}") from error


def _parsed(path: Path, raw: bytes) -> Any:
    try:
        found = json.loads(raw)
        if _canonical(found) == raw:
            return found
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no bundle: {_why(error)}") from error
    raise DataError(f"{path}: not in canonical form: it was changed, or written by something else")


class _Told:
    """What bundle.json says, value by value, each of the type that it must have."""

    def __init__(self, path: Path, value: Any, place: str = "") -> None:
        self.path, self.value, self.place = path, value, place

    def refuse(self, wanted: str) -> DataError:
        where = self.place or "the whole"
        return DataError(f"{self.path}: {where} must be {wanted}, not {repr(self.value)[:60]}")

    def keys(self, keys: set[str], optional: frozenset[str] = frozenset()) -> dict[str, _Told]:
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        if lacking := sorted(keys - self.value.keys()):
            raise DataError(f"{self.path}: {self.place or 'the bundle'} lacks {lacking[0]!r}")
        if unknown := sorted(self.value.keys() - keys - optional):
            raise DataError(
                f"{self.path}: {self.place or 'the bundle'} has an unknown key {unknown[0][:40]!r}"
            )
        return {key: self._inside(key, value) for key, value in self.value.items()}

    def items(self, most: int) -> list[_Told]:
        if not isinstance(self.value, list) or len(self.value) > most:
            raise self.refuse(f"a list of at most {most}")
        return [self._inside(str(i), value) for i, value in enumerate(self.value)]

    def _inside(self, key: str, value: Any) -> _Told:
        return _Told(self.path, value, f"{self.place}.{key}" if self.place else key)

    def text(self, most: int = 1000) -> str:
        if not isinstance(self.value, str) or len(self.value) > most or not _printable(self.value):
            raise self.refuse(f"a line of at most {most} characters")
        return self.value

    def whole(self, least: int, most: int) -> int:
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.refuse(f"a whole number in [{least}, {most}]")
        return self.value

    def real(self) -> float:
        """A float32 number: another one would be read as its neighbour."""
        if (
            type(self.value) is not float
            or not abs(self.value) < 3e38
            or float(np.float32(self.value)) != self.value
        ):
            raise self.refuse("a float32 number")
        return self.value

    def digest(self) -> str:
        if (
            not isinstance(self.value, str)
            or len(self.value) != 64
            or set(self.value) - set("0123456789abcdef")
        ):
            raise self.refuse("64 hexadecimal digits")
        return self.value

    def shape(self, least: int = 0) -> tuple[int, ...]:
        shape = tuple(size.whole(1, _MOST_PARAMETERS) for size in self.items(8))
        if len(shape) < least or math.prod(shape) > _MOST_PARAMETERS:
            raise self.refuse(f"a shape of at most {_MOST_PARAMETERS} values")
        return shape


def _why(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


def _printable(text: str) -> bool:
    return all(ord(char) >= 32 and not 0xD800 <= ord(char) < 0xE000 for char in text)


_KEYS = {"classes", "files", "format", "frozen", "frozen_digest", "graph", "input_shape"}
_KEYS |= {"layout", "missing", "name", "scale", "shift"}


def _decoded(told: _Told, folder: Path | None) -> tuple[Bundle, dict[str, tuple[int, str]]]:
    """The bundle without its frozen tensors, and size and hash of each file."""
    if isinstance(told.value, dict) and told.value.get("format") != FORMAT:
        raise DataError(f"{told.path}: its format is {repr(told.value.get('format'))[:40]}, not {FORMAT!r}")
    head = told.keys(_KEYS)
    files = {
        name: (
            (inside := entry.keys({"bytes", "sha256"}))["bytes"].whole(0, 1 << 40),
            inside["sha256"].digest(),
        )
        for name, entry in head["files"].keys({WEIGHTS, FROZEN}, frozenset({MODEL, PREFIX})).items()
    }
    tensors = [entry.keys({"name", "shape"}) for entry in head["layout"].items(1 << 16)]
    layout = Layout(
        tuple(entry["name"].text() for entry in tensors), tuple(entry["shape"].shape() for entry in tensors)
    )
    if not 1 <= layout.n <= _MOST_PARAMETERS:
        raise head["layout"].refuse(f"1 to {_MOST_PARAMETERS} parameters in all")
    if files[WEIGHTS][0] != 4 * layout.n:
        raise DataError(
            f"{told.path}: {layout.n} parameters do not make {files[WEIGHTS][0]} bytes of weights"
        )
    spaces = _spaces(head["frozen"])
    if files[FROZEN][0] != sum(size for *_, size in spaces):
        raise DataError(f"{told.path}: the frozen tensors do not make {files[FROZEN][0]} bytes")
    graph = None if head["graph"].value is None else _graph(told.path, head["graph"].value)
    missing = head["missing"].text(4000)
    if (graph is None) != bool(missing):
        raise DataError(f"{told.path}: either there is a graph, or 'missing' says why there is none")
    if graph is None and MODEL not in files:
        raise DataError(f"{told.path}: neither a graph nor an ONNX file: nothing can run it ({missing[:80]})")
    # Stand-ins of the right shapes, without memory, for what is checked before files are opened.
    stand_ins = {name: np.broadcast_to(np.zeros((), kind), shape) for name, shape, kind, _ in spaces}
    bundle = Bundle(
        name=head["name"].text(),
        layout=layout,
        frozen=stand_ins,
        frozen_digest=bytes.fromhex(head["frozen_digest"].digest()),
        input_shape=head["input_shape"].shape(least=1),
        classes=tuple(label.text() for label in head["classes"].items(1 << 20)),
        scale=_floats(head["scale"]),
        shift=_floats(head["shift"]),
        graph=graph,
        missing=missing,
        folder=folder,
    )
    return bundle, files


def _graph(path: Path, value: Any) -> Graph:
    try:
        return Graph.from_dict(value)
    except (DataError, RecursionError) as error:
        raise DataError(f"{path}: {_why(error)}") from error


def _floats(told: _Told) -> NDArray[np.float32]:
    return np.array([number.real() for number in told.items(1 << 16)], np.float32)


def _spaces(told: _Told) -> list[tuple[str, tuple[int, ...], np.dtype[Any], int]]:
    """Of each frozen tensor: name, shape, type and bytes."""
    found = []
    for entry in told.items(1 << 16):
        inside = entry.keys({"name", "shape", "type"})
        name, shape, kind = inside["name"].text(), inside["shape"].shape(), inside["type"].text()
        if kind not in _TYPES:
            raise inside["type"].refuse(f"one of {', '.join(_TYPES)}")
        dtype = np.dtype(kind).newbyteorder("<")
        found.append((name, shape, dtype, math.prod(shape) * dtype.itemsize))
    names = [name for name, *_ in found]
    if names != sorted(set(names)):
        raise told.refuse("tensors of different names, sorted")
    return found


def _compare(path: Path, size: int, digest: str | None) -> None:
    with _opened(path) as file:
        held = os.fstat(file.fileno()).st_size
        if held != size:
            raise DataError(f"{path}: {held} bytes long, {HEAD} says {size}: copy the bundle again")
        if digest is not None:
            h = sha256()
            while block := file.read(_BLOCK):
                h.update(block)
            if h.hexdigest() != digest:
                raise DataError(f"{path}: not the bytes that {HEAD} has the hash of: copy the bundle again")


def _frozen(path: Path, told: _Told) -> dict[str, NDArray[Any]]:
    """Read-only arrays, each of its own: an offset in the file need not suit a type."""
    frozen = {}
    with _opened(path) as file:
        for name, shape, dtype, size in _spaces(told.keys(_KEYS)["frozen"]):
            values = np.empty(math.prod(shape), dtype)
            if file.readinto(values.view(np.uint8).data) != size:
                raise DataError(f"{path}: ends early: copy the bundle again")
            if dtype == np.bool_ and values.view(np.uint8).max(initial=0) > 1:
                raise DataError(f"{path}: {name} holds a truth value that is neither 0 nor 1")
            values.flags.writeable = False
            frozen[name] = values.reshape(shape)
    return frozen
