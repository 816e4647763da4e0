"""Bundles: what is written is read, and what was damaged, made up or hostile is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from baffle import models
from baffle.bundle import Bundle, frozen_digest
from baffle.errors import ConfigError, DataError
from baffle.export.torch import from_torch
from baffle.perturbations import Layout
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.torch import TorchRuntime

CLASSES = ("zero", "один", "zwei")


def small(**changes: Any) -> Bundle:
    """A network of one linear layer of 4 × 3, whose bias is frozen, in memory."""
    frozen = {"layer.bias": np.array([0.5, -0.25, 0.125], np.float32), "seen": np.array(7)}
    node = Node("linear", "layer", (0,), (("bias", "layer.bias"), ("weight", "layer.weight")))
    made: dict[str, Any] = {
        "name": "small",
        "layout": Layout(("layer.weight",), ((3, 4),)),
        "frozen": frozen,
        "frozen_digest": frozen_digest(frozen),
        "input_shape": (4,),
        "classes": CLASSES,
        "scale": np.full(4, 1 / 255, np.float32),
        "shift": np.full(4, -0.1, np.float32),
        "graph": Graph((4,), (node,)),
        "initial": np.linspace(-1, 1, 12, dtype=np.float32),
    }
    return Bundle(**{**made, **changes})


def head_of(folder: Path) -> dict[str, Any]:
    head: dict[str, Any] = json.loads((folder / "bundle.json").read_bytes())
    return head


def write_head(folder: Path, head: Any) -> None:
    text = json.dumps(head, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    (folder / "bundle.json").write_bytes(text.encode() + b"\n")


def refused(folder: Path, **options: Any) -> str:
    """The one line that says why."""
    with pytest.raises(DataError) as caught:
        Bundle.read(folder, **options)
    text = str(caught.value)
    assert text.splitlines() == [text]
    assert len(text) < 600
    return text


def read_or_refused(folder: Path) -> Bundle | None:
    """The bundle, or None where a DataError of one line says why not. Nothing else may be raised."""
    lines = []
    try:
        return Bundle.read(folder)
    except DataError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().write(tmp_path / "made")
    return tmp_path / "made"


# --- written and read ------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path):
    before = small()
    after = before.write(tmp_path / "a" / "b")
    for bundle in (
        after,
        Bundle.read(tmp_path / "a" / "b"),
        Bundle.read(str(tmp_path / "a" / "b"), check=False),
    ):
        for name in ("name", "layout", "frozen_digest", "input_shape", "classes", "graph", "missing"):
            assert getattr(bundle, name) == getattr(before, name)
        np.testing.assert_array_equal(bundle.scale, before.scale)
        np.testing.assert_array_equal(bundle.shift, before.shift)
        np.testing.assert_array_equal(bundle.weights(), before.weights())
        assert bundle.frozen.keys() == before.frozen.keys()
        for name, values in before.frozen.items():
            np.testing.assert_array_equal(bundle.frozen[name], values)
            assert bundle.frozen[name].dtype == values.dtype
            assert not bundle.frozen[name].flags.writeable
        with bundle.stored() as source:
            np.testing.assert_array_equal(source[3:9], before.weights()[3:9])


def test_a_bundle_of_its_files_is_the_one_of_its_folder(folder: Path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    read, made = Bundle.read(folder), Bundle.of_files(files)
    assert (made.layout, made.graph, made.classes) == (read.layout, read.graph, read.classes)
    assert made.frozen_digest == read.frozen_digest == frozen_digest(made.frozen)
    np.testing.assert_array_equal(made.weights(), read.weights())
    assert Bundle.of_files({n: data for n, data in files.items() if n != "weights.bin"}).initial is None
    for wrong in (
        {**files, "frozen.bin": files["frozen.bin"] + b"0"},
        {**files, "weights.bin": files["weights.bin"][:-4]},
        {**files, "more.bin": b""},
        {name: data for name, data in files.items() if name != "frozen.bin"},
        {name: data for name, data in files.items() if name != "bundle.json"},
        {**files, "bundle.json": files["bundle.json"][:-1]},
    ):
        with pytest.raises(DataError):
            Bundle.of_files(wrong)


def test_weights_are_a_fresh_copy(folder: Path):
    for bundle in (small(), Bundle.read(folder)):
        bundle.weights()[:] = 0
        assert bundle.weights().any()


def test_another_start_may_be_written(tmp_path: Path, folder: Path):
    other = np.arange(12, dtype=np.float32)
    again = Bundle.read(folder).write(tmp_path / "b", other)
    np.testing.assert_array_equal(again.weights(), other)
    with again.stored() as source:  # a source that lies on a disk
        third = again.write(tmp_path / "c", source)
    assert (tmp_path / "b" / "weights.bin").read_bytes() == (tmp_path / "c" / "weights.bin").read_bytes()
    assert again.digest == third.digest
    assert again.digest != Bundle.read(folder).digest


def test_a_bundle_has_one_byte_form(tmp_path: Path, folder: Path):
    Bundle.read(folder).write(tmp_path / "again")
    for name in sorted(os.listdir(folder)):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert Bundle.read(folder).digest == hashlib.sha256((folder / "bundle.json").read_bytes()).digest()


@pytest.mark.parametrize("there", ["folder", "file", "broken link"])
def test_what_is_there_is_not_written_over(tmp_path: Path, there: str):
    path = tmp_path / "x"
    {
        "folder": path.mkdir,
        "file": path.touch,
        "broken link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }[there]()
    with pytest.raises(ConfigError, match="is there already"):
        small().write(path)
    assert os.listdir(tmp_path) == ["x"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    weights = np.ones(12, np.float32)
    weights[5] = np.nan
    with pytest.raises(ConfigError, match="NaN"):
        small().write(tmp_path / "x", weights)
    with pytest.raises(ConfigError, match="n = 12"):
        small().write(tmp_path / "x", weights[:-1])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        small().write(tmp_path / "file" / "x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_shape": (5,)}, "scale"),
        ({"classes": ("a", "b")}, "of 2 classes"),
        ({"scale": np.ones(4)}, "float32"),
        ({"shift": np.full(4, np.nan, np.float32)}, "finite"),
        ({"layout": Layout(("layer.weight",), ((3, 5),))}, "layer"),
        ({"layout": Layout(("layer.weight", "seen"), ((3, 4), (1,)))}, "both trained and frozen"),
        ({"frozen": {"layer.bias": np.zeros(3)}}, "float64, not float32"),
        ({"frozen": {}}, "there is no tensor 'layer.bias'"),
    ],
)
def test_parts_that_do_not_fit_together(changes: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        small(**changes)


# --- the digest of what is frozen ------------------------------------------------------------------


class Odd(nn.Module):
    """Frozen tensors of many types, shapes and strides, none of them in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.brain = nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16), requires_grad=False)
        odd = [
            torch.tensor(True),
            torch.randn(2, 3, dtype=torch.float16),
            torch.randn(2, 2).to(torch.float8_e4m3fn),
            torch.arange(6).reshape(2, 3).T,
            torch.randn(2, dtype=torch.complex64),
            torch.empty(0),
        ]
        for i, tensor in enumerate(odd):
            self.register_buffer(f"b{i}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("module", [Odd(), models.MobileNetV2(3, 0.35)], ids=["odd", "mobilenet"])
def test_the_digest_is_the_published_one(module: nn.Module):
    """The specification's bytes, hashed by hand from torch's own."""
    h = hashlib.sha256(b"baffle frozen v1")
    tensors = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    tensors |= dict(module.named_buffers())
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        values = tensor.detach().contiguous()
        h.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        h.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert TorchRuntime(module).frozen_digest == h.digest()


# --- damaged, made up, hostile -----------------------------------------------------------------------


def test_nothing_there(tmp_path: Path):
    assert "bundle.json" in refused(tmp_path)
    assert "bundle.json" in refused(tmp_path / "nowhere")
    assert "cannot be read" in refused(tmp_path / "a\0b")


@pytest.mark.parametrize("name", ["weights.bin", "frozen.bin"])
@pytest.mark.parametrize("change", ["cut", "longer", "flip", "gone", "folder", "pipe", "link"])
def test_a_changed_file_is_named(folder: Path, tmp_path: Path, name: str, change: str):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if change == "cut":
        path.write_bytes(data[:-1])
    elif change == "longer":
        path.write_bytes(data + b"\0")
    elif change == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "folder":
        path.mkdir()
    elif change == "pipe":
        os.mkfifo(path)
    elif change == "link":  # to the very bytes that are wanted, but elsewhere
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    assert name in refused(folder)
    if change != "flip":  # what sizes alone can tell
        assert name in refused(folder, check=False)


def test_every_flipped_byte_of_the_head_is_noticed(folder: Path):
    """Or leads to another bundle that is whole in itself: a name, a class, a number of the normalisation."""
    raw = (folder / "bundle.json").read_bytes()
    ways = {
        "shift": lambda b: b.shift.tolist(),
        "scale": lambda b: b.scale.tolist(),
        "name": lambda b: b.name,
        "classes": lambda b: b.classes,
        "graph": lambda b: b.graph,
        "layout": lambda b: b.layout,
    }
    plain = {what: read(Bundle.read(folder)) for what, read in ways.items()}
    for at in range(0, len(raw), 3):
        (folder / "bundle.json").write_bytes(raw[:at] + bytes([raw[at] ^ 2]) + raw[at + 1 :])
        bundle = read_or_refused(folder)
        if bundle is None:
            continue
        assert any(read(bundle) != plain[what] for what, read in ways.items()), raw[at - 20 : at + 20]


def altered(head: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *way, last = path.split("/")
    at: Any = head
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return head


HUGE = 1 << 35
HOSTILE: list[tuple[str, Any, str]] = [
    ("format", "baffle bundle v2", "format"),
    ("name", 5, "name"),
    ("name", "a\nb", "name"),
    ("name", "x" * 2000, "name"),
    ("layout", {}, "layout"),
    ("layout/0/shape", [HUGE, HUGE], "shape"),
    ("layout/0/shape", [HUGE], "weights"),
    ("layout/0/shape", [3, 5], "weights"),
    ("layout/0/shape", [-3, -4], "shape"),
    ("layout/0/shape", [3.0, 4], "shape"),
    ("layout/0/shape", [True, 12], "shape"),
    ("layout/0/shape", [1] * 100, "shape"),
    ("layout/0/name", "layer.bias", "both trained and frozen"),
    ("layout/0/name", "other", "no tensor 'layer.weight'"),
    ("frozen/0/shape", [HUGE], "frozen"),
    ("frozen/0/shape", [1 << 60], "shape"),
    ("frozen/0/type", "object", "type"),
    ("frozen/0/type", "O", "type"),
    ("frozen/0/type", "float64", "frozen"),
    ("frozen/0/type", "int32", "not float32"),
    ("frozen/0/name", "../../etc/passwd", "no tensor 'layer.bias'"),
    ("frozen/0/name", "tail", "sorted"),
    ("frozen_digest", "00" * 32, "frozen.bin"),
    ("frozen_digest", "0g" * 32, "frozen_digest"),
    ("files", {}, "lacks 'frozen.bin'"),
    ("files/weights.bin/bytes", HUGE, "weights"),
    ("files/weights.bin/bytes", "48", "whole number"),
    ("files/weights.bin/sha256", "00" * 32, "weights.bin"),
    ("files/../../x", {"bytes": 0, "sha256": "00" * 32}, "unknown key"),
    ("files/model.onnx", {"bytes": 0, "sha256": "00" * 32}, "model.onnx"),
    ("input_shape", [4, 0], "input_shape"),
    ("input_shape", [5], "scale"),
    ("scale", [1e300] * 4, "scale"),
    ("scale", [1.0] * 3, "scale"),
    ("scale", [None] * 4, "float32"),
    ("scale", [0.1] * 4, "float32"),
    ("scale", [1] * 4, "float32"),
    ("classes", ["a", "b"], "of 2 classes"),
    ("classes", "abc", "classes"),
    ("graph", None, "missing"),
    ("graph", 5, "a graph"),
    ("graph/nodes/0/op", "einsum", "'einsum' is not covered"),
    ("graph/nodes/0/inputs", [7], "inputs"),
    ("graph/nodes/0/tensors", {"weight": 5}, "text"),
    ("graph/nodes", [], "0 nodes"),
    ("graph/input_shape", [HUGE, HUGE], "input"),
    ("missing", "einsum", "missing"),
    ("extra", 1, "unknown key 'extra'"),
]


@pytest.mark.parametrize(
    ("path", "value", "text"), HOSTILE, ids=[f"{p}={str(v)[:20]}" for p, v, _ in HOSTILE]
)
def test_a_head_that_says_something_else(folder: Path, path: str, value: Any, text: str):
    head = head_of(folder)
    if path.startswith("files/.."):
        head["files"]["../../x"] = value
    else:
        head = altered(head, path, value)
    write_head(folder, head)
    tracemalloc.start()
    try:
        assert text in refused(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6  # and not what a shape claims


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null\n",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"format":"baffle bundle v1"}\n',
        b'{"format": "baffle bundle v1"}\n',
        b'{"format":"baffle bundle v1","format":"x"}\n',
        b'{"format":NaN}\n',
        b'{"format":1e999}\n',
        b'{"format":' + b"9" * 5000 + b"}\n",
        b'{"format":"\xff"}\n',
        b'{"format":"\\ud800"}\n',
        b"\0" * 100,
        b" " * (1 << 23),
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_a_head_that_is_none(folder: Path, raw: bytes):
    (folder / "bundle.json").write_bytes(raw)
    assert "bundle.json" in refused(folder)


def test_a_file_that_the_head_does_not_name(folder: Path):
    (folder / "model.onnx").write_bytes(b"anything")
    assert "model.onnx" in refused(folder)


def test_a_truth_value_is_0_or_1(tmp_path: Path):
    frozen = {"layer.bias": np.zeros(3, np.float32), "mask": np.array([True, False])}
    small(frozen=frozen, frozen_digest=frozen_digest(frozen)).write(tmp_path / "x")
    assert Bundle.read(tmp_path / "x").frozen["mask"].tolist() == [True, False]
    data = (tmp_path / "x" / "frozen.bin").read_bytes()[:-2] + b"\x02\x00"
    (tmp_path / "x" / "frozen.bin").write_bytes(data)
    assert "neither 0 nor 1" in refused(tmp_path / "x", check=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.sampled_from(
    sorted({path for path, *_ in HOSTILE if ".." not in path and path != "extra"} | {"shift", "frozen"})
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLACES, JSON)
@example("graph", {"input_shape": [4], "loss": "mse", "nodes": [{}]})
def test_whatever_stands_in_the_head_is_read_or_refused(folder: Path, path: str, value: Any):
    before = (folder / "bundle.json").read_bytes()
    try:
        try:
            write_head(folder, altered(head_of(folder), path, value))
        except (ValueError, UnicodeEncodeError):
            return
        bundle = read_or_refused(folder)
        assert bundle is None or bundle.layout.n == 12
    finally:
        (folder / "bundle.json").write_bytes(before)


def test_frozen_tensors_of_a_real_network_survive(tmp_path: Path):
    module = models.MobileNetV2(3, 0.35)
    made = from_torch(module, input_shape=(3, 16, 16), onnx=False)
    read = made.write(tmp_path / "x")
    assert read.frozen_digest == TorchRuntime(module).frozen_digest == frozen_digest(read.frozen)
    assert Bundle.read(tmp_path / "x").layout == TorchRuntime(module).layout
