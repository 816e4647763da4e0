"""Where weights lie: files and packed arrays are read as what was written, any slice alone."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.client import Client, Download
from baffle.errors import ConfigError, DataError
from baffle.estimator import SteinEstimator
from baffle.perturbations import Layout
from baffle.plan import RoundPlan, weights_digest
from baffle.runtimes import Batch
from baffle.runtimes import sources as module
from baffle.runtimes.sources import PackedWeights, StoredWeights, chunks, packed_bytes
from baffle.stream import seed_from

LAYOUT = Layout(("conv", "bias", "empty", "head"), ((5, 3, 2, 2), (7,), (0, 4), (4, 9)))
RNG = np.random.default_rng(0)
W = (RNG.normal(size=LAYOUT.n) * np.exp(RNG.normal(size=LAYOUT.n) * 3)).astype(np.float32)
SLICES = st.tuples(st.integers(0, LAYOUT.n), st.integers(0, LAYOUT.n)).map(sorted)


def whole(source):
    return np.array(source[0 : len(source)])


# Files


def test_a_file_gives_back_what_was_written(tmp_path):
    parts = [W[:10], W[10:10], W[10:]]
    with StoredWeights.write(tmp_path / "w", iter(parts)) as stored:
        assert stored.shape == (LAYOUT.n,)
        assert len(stored) == LAYOUT.n
        assert whole(stored).tobytes() == W.tobytes()
    assert (tmp_path / "w").read_bytes() == W.astype("<f4").tobytes()
    assert os.listdir(tmp_path) == ["w"]


@given(SLICES)
@settings(max_examples=40, deadline=None)
def test_any_slice_of_a_file_alone(tmp_path_factory, places):
    path = tmp_path_factory.getbasetemp() / "slices"
    path.write_bytes(b"head" + W.tobytes() + b"tail")
    a, b = places
    with StoredWeights(path, LAYOUT.n, offset=4) as stored:
        got = stored[a:b]
        assert got.dtype == np.float32
        assert got.tobytes() == W[a:b].tobytes()


def test_slices_are_those_of_an_array(tmp_path):
    with StoredWeights.write(tmp_path / "w", [W]) as stored:
        packed = PackedWeights.pack(W, LAYOUT, "bfloat16")
        for places in (slice(None), slice(-5, None), slice(40, 10), slice(50, 1000)):
            assert stored[places].tobytes() == W[places].tobytes()
            assert packed[places].shape == W[places].shape
            with pytest.raises(ConfigError, match="without a step"):
                stored[places.start : places.stop : 2]


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        StoredWeights(tmp_path / "none", 1)
    (tmp_path / "short").write_bytes(bytes(9))
    with pytest.raises(DataError, match="9 bytes, 12 are needed for 3 weights"):
        StoredWeights(tmp_path / "short", 3)
    with StoredWeights(tmp_path / "short", 2) as stored:
        os.truncate(tmp_path / "short", 5)
        with pytest.raises(DataError, match="ends before weight 2"):
            stored[0:2]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    def broken():
        yield W
        raise RuntimeError("no more")

    StoredWeights.write(tmp_path / "w", [W[:3]]).close()
    with pytest.raises(RuntimeError, match="no more"):
        StoredWeights.write(tmp_path / "w", broken())
    assert (tmp_path / "w").read_bytes() == W[:3].tobytes()
    assert os.listdir(tmp_path) == ["w"]


def test_a_file_is_not_mapped_and_not_held(tmp_path):
    with StoredWeights.write(tmp_path / "w", [W]) as stored:
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        descriptor = stored._file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# Packed


def by_hand(storage):
    """The values that a storage keeps, one by one."""
    if storage == "float16":
        return W.astype(np.float16).astype(np.float32)
    if storage == "bfloat16":
        return torch.from_numpy(W).bfloat16().float().numpy()
    kept = W.copy()
    for shape, offset in zip(LAYOUT.shapes, LAYOUT.offsets, strict=False):
        if len(shape) < 2:
            continue
        width = int(np.prod(shape[1:]))
        for row in range(shape[0]):
            part = kept[offset + row * width : offset + (row + 1) * width]
            scale = np.float32(max(abs(v) for v in part.tolist())) / np.float32(127)
            for i, v in enumerate(part.tolist()):
                q = round(float(np.float32(v) / scale)) if scale else 0  # Python rounds half to even, too
                part[i] = np.float32(q) * scale
    return kept


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_packed_values_are_the_nearest_that_the_type_has(storage):
    packed = PackedWeights.pack(W, LAYOUT, storage)
    assert whole(packed).tobytes() == by_hand(storage).tobytes()
    assert packed.shape == (LAYOUT.n,)
    held = [
        *packed._parts,
        *(s for p, s in zip(packed._parts, packed._scales, strict=True) if p.dtype == "i1"),
    ]
    assert packed.nbytes == packed_bytes(LAYOUT, storage) == sum(a.nbytes for a in held)
    assert packed.nbytes < 4 * LAYOUT.n


@given(SLICES, st.sampled_from(["float16", "bfloat16", "int8"]))
@settings(max_examples=150, deadline=None)
def test_any_slice_of_packed_weights_alone(places, storage):
    a, b = places
    packed = PACKED.setdefault(storage, PackedWeights.pack(W, LAYOUT, storage))
    assert packed[a:b].tobytes() == whole(packed)[a:b].tobytes()


PACKED: dict[str, PackedWeights] = {}


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_a_source_is_packed_in_slices(storage, tmp_path, monkeypatch):
    want = whole(PackedWeights.pack(W, LAYOUT, storage))
    monkeypatch.setattr(module, "CHUNK", 7)
    with StoredWeights.write(tmp_path / "w", [W]) as stored:
        assert whole(PackedWeights.pack(stored, LAYOUT, storage)).tobytes() == want.tobytes()


def test_ties_go_to_even():
    layout = Layout(("m", "v"), ((1, 4), (2,)))
    w = np.array([127, 0.5, 1.5, -2.5, 1, 1 + 2.0**-8], np.float32)
    assert whole(PackedWeights.pack(w, layout, "int8")).tolist() == [127, 0, 2, -2, 1, 1 + 2.0**-8]
    assert whole(PackedWeights.pack(w, layout, "bfloat16"))[5] == 1
    w[5] = 1 + 3 * 2.0**-8
    assert whole(PackedWeights.pack(w, layout, "bfloat16"))[5] == 1 + 2.0**-6
    assert whole(PackedWeights.pack(w, layout, "float16"))[5] == w[5]


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_zeros_and_the_smallest_numbers_stay_finite(storage):
    layout = Layout(("m",), ((2, 2),))
    w = np.array([0, 0, 1e-45, -1e-45], np.float32)
    assert np.abs(whole(PackedWeights.pack(w, layout, storage))).max() <= 1.5e-45


def test_what_cannot_be_packed_is_refused():
    layout = Layout(("m",), ((2, 2),))
    w = np.ones(4, np.float32)
    with pytest.raises(ConfigError, match="unknown storage 'int4': use float32, float16, bfloat16, int8"):
        PackedWeights.pack(w, layout, "int4")
    with pytest.raises(ConfigError, match=r"shape \(3,\), the layout has n = 4"):
        PackedWeights.pack(w[:3], layout, "int8")
    for bad in (np.nan, np.inf):
        w[2] = bad
        for storage in ("float16", "bfloat16", "int8"):
            with pytest.raises(DataError, match="m holds a NaN or an infinity"):
                PackedWeights.pack(w, layout, storage)
    w[2] = 1e5
    with pytest.raises(DataError, match="above float16's range"):
        PackedWeights.pack(w, layout, "float16")
    w[2] = np.finfo(np.float32).max
    with pytest.raises(DataError, match="above bfloat16's range"):
        PackedWeights.pack(w, layout, "bfloat16")


# What else takes sources


def test_digests_of_sources_are_those_of_arrays(tmp_path):
    layout = Layout.flat(module.CHUNK + 5)
    w = RNG.normal(size=layout.n).astype(np.float32)
    digest = weights_digest(w, layout, bytes(32))
    by_hand = hashlib.sha256(b"baffle weights v1" + bytes(32))
    by_hand.update(struct.pack("<I", 1) + b"w" + struct.pack("<IQ", 1, layout.n) + w.tobytes())
    assert digest == by_hand.digest()
    with StoredWeights.write(tmp_path / "w", chunks(w, 1000)) as stored:
        assert weights_digest(stored, layout, bytes(32)) == digest
    w[-1] += 1
    assert weights_digest(w, layout, bytes(32)) != digest


class Linear:
    """The loss w·x: slopes are z·x. Reads its weights in slices."""

    layout = Layout(("w",), ((8,),))
    frozen_digest = bytes(32)

    def weights(self):
        return np.zeros(8, np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        return float(batch.inputs.mean(axis=0) @ np.array(weights[0:8], np.float64))

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        z = [perturbation.values(stream, k, self.layout, 0, 8) for k in directions]
        return np.array([self.loss(weights[0:8] + scale * row.astype(np.float64), batch) for row in z])


class Rows:
    inputs = np.random.default_rng(1).normal(size=(6, 8))

    def __len__(self):
        return 6

    def batch(self, indices):
        return Batch(self.inputs[indices], indices)


def test_a_client_answers_from_a_file_as_from_an_array(tmp_path):
    w = W[:8]
    runtime = Linear()
    estimator = SteinEstimator(5, 1e-2, "central")
    plan = RoundPlan(0, seed_from(1), estimator, weights_digest(w, runtime.layout, bytes(32)), 0)
    client = Client("a", runtime, Rows())
    want = client.answer_to(Download(plan, w.copy()))
    with StoredWeights.write(tmp_path / "w", [w]) as stored:
        download = Download(plan, stored)
        assert download.fits(runtime)
        assert client.answer_to(download) == want
    with StoredWeights.write(tmp_path / "v", [w + 1]) as other:
        assert not Download(plan, other).fits(runtime)
    with StoredWeights.write(tmp_path / "u", [w[:7]]) as short:
        assert not Download(plan, short).fits(runtime)
