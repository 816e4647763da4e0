"""What a device has in memory: its client loads NumPy and its runtime, and none of what it can do without."""

import hashlib
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from baffle import digests

# Each costs a device memory (OpenSSL 3.5 MB, numpy.random 6.7, cryptography 6.8, zipfile 1.7, tempfile and
# importlib.resources about 1), or drags along what does.
HEAVY = {
    *(
        "torch",
        "numba",
        "llvmlite",
        "onnx",
        "onnxruntime",
        "cryptography",
        "safetensors",
        "tqdm",
        "PIL",
        "scipy",
    ),
    *("matplotlib", "dp_accounting", "prometheus_client", "flwr", "nvflare"),
    *("numpy.random", "numpy.ma", "numpy.polynomial", "numpy.fft", "numpy.testing", "numpy.f2py"),
    *("hashlib", "_hashlib", "hmac", "secrets", "ssl", "_ssl"),
    *("tempfile", "shutil", "zipfile", "bz2", "lzma", "importlib.resources", "importlib.metadata"),
    *("asyncio", "concurrent.futures", "multiprocessing", "subprocess", "socket", "http", "urllib.request"),
    *("email", "xml", "sqlite3", "unittest", "pydoc", "argparse", "statistics"),
}
DEVICE = """
import baffle.bundle, baffle.data.local, baffle.runtimes.numpy
from baffle import Client, Endpoint, Gaussian, Privacy
"""


def loaded(code):
    """Names of the modules in memory after ``code`` in a fresh process."""
    listing = "\nimport sys\nprint(*sys.modules)"
    environment = {**os.environ, "BAFFLE_KERNELS": "0"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code + listing],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.split())


def test_the_package_itself_loads_nothing():
    found = loaded("import baffle")
    assert {name for name in found if name.startswith("baffle.")} == set()
    assert "numpy" not in found


@pytest.mark.parametrize("name", ["BaffleError", "Stream", "Gaussian"])
def test_a_name_loads_what_lies_below_it_alone(name):
    found = loaded(f"import baffle\nbaffle.{name}")
    assert "baffle.client" not in found
    assert ("numpy" in found) == (name != "BaffleError")


def test_a_device_imports_nothing_that_is_heavy():
    found = loaded(DEVICE)
    assert {"baffle.client", "baffle.endpoint", "numpy"} <= found
    assert found & HEAVY == set()


def test_nor_does_its_program():
    found = loaded(DEVICE + "import baffle.cli, baffle.commands.client, baffle.drop, baffle.limits")
    assert found & HEAVY == {"argparse"}


ROUND = """
import numpy as np
from baffle import Batch, Client, Endpoint, Layout, ModelMessage, RoundPlan, RoundResult, SteinEstimator
from baffle.bundle import Bundle, frozen_digest
from baffle.plan import weights_digest
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.numpy import NumpyRuntime

class Images:
    def __len__(self):
        return 6

    def batch(self, indices):
        images = np.arange(6 * 16, dtype=np.uint8).reshape(6, 1, 4, 4)
        return Batch(images[indices], indices % 3)

flat = Node("flatten", "flat", (0,), (), ())
last = Node("linear", "last", (1,), (("weight", "last.weight"), ("bias", "last.bias")), ())
layout, one = Layout(("last.weight", "last.bias"), ((3, 16), (3,))), np.full(1, 1 / 255, np.float32)
bundle = Bundle(
    name="small", layout=layout, frozen={}, frozen_digest=frozen_digest({}), input_shape=(1, 4, 4),
    classes=("a", "b", "c"), scale=one, shift=one, graph=Graph((1, 4, 4), (flat, last), "cross-entropy"),
)
runtime, weights = NumpyRuntime(bundle), np.linspace(-1, 1, 51, dtype=np.float32)
digest = weights_digest(weights, layout, runtime.frozen_digest)
plan = RoundPlan(0, bytes(32), SteinEstimator(4), digest, 4)
client = Endpoint(Client("device", runtime, Images())).client
answer = RoundResult.decode(client.answer(plan.encode(), ModelMessage(weights).encode()))
assert answer.values.shape == (4,) and np.abs(answer.values).max() > 0
"""


def test_a_device_needs_nothing_heavy_for_a_round():
    """What functions import when they are called counts too."""
    assert loaded(ROUND) & HEAVY == set()


def test_the_list_of_what_is_heavy_finds_it():
    """The counterpart: an import of each that every Python has shows."""
    assert loaded("import hashlib, tempfile, zipfile, numpy.random") & HEAVY >= {
        *("_hashlib", "tempfile", "shutil", "zipfile", "numpy.random", "secrets")
    }


# SHA-256 without OpenSSL

HASHES = """
import json, sys
from baffle.digests import sha256
def all_of():
    h = sha256()
    for part in (b"ab", bytearray(b"c"), memoryview(b"")):
        h.update(part)
    return [h.hexdigest(), sha256(b"abc").hexdigest(), sha256(bytes(range(256)) * 4097).hexdigest()]
first = all_of()
assert "hashlib" not in sys.modules
import hashlib
print(json.dumps([first, all_of()]))
"""


def test_both_ways_to_a_hash_give_the_published_one():
    done = subprocess.run(
        [sys.executable, "-c", HASHES], capture_output=True, text=True, timeout=60, check=True
    )
    before, after = json.loads(done.stdout)
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert before == after == [abc, abc, hashlib.sha256(bytes(range(256)) * 4097).hexdigest()]


def test_what_is_hashed_may_be_an_array():
    row = np.arange(5, dtype="<f4")
    assert digests.sha256(row.data).digest() == hashlib.sha256(row.tobytes()).digest()


# What is freed

FREED = """
import sys
from baffle.allocator import return_large_blocks
if sys.argv[1] == "fixed":
    return_large_blocks()
first = bytearray(24 << 20)
del first  # glibc now takes blocks of up to this size from the heap
large, above = bytearray(20 << 20), [bytearray(3000) for _ in range(20)]
del large
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")))
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_blocks_are_given_back():
    """20 MB below small blocks: on the heap, as glibc goes about it, given back where the size is fixed."""
    resident = {}
    for way in ("as it is", "fixed"):
        done = subprocess.run(
            [sys.executable, "-c", FREED, way], capture_output=True, text=True, timeout=60, check=True
        )
        resident[way] = 1024 * int(done.stdout)
    assert resident["as it is"] - resident["fixed"] > 15e6
