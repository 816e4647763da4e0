"""``baffle client`` as processes on a Python without torch: bits, keys, limits, kills, memory, errors."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from baffle import data, training
from baffle.bundle import Bundle
from baffle.cli import main
from baffle.client import Client
from baffle.config import TrainConfig
from baffle.device import Sockets
from baffle.drop import Drop
from baffle.errors import ConfigError
from baffle.estimator import SteinEstimator
from baffle.export.torch import from_torch
from baffle.federation import run
from baffle.job import build
from baffle.models import build as network
from baffle.runs import RunFolder
from baffle.runtimes.numpy import NumpyRuntime
from baffle.server import Server
from baffle.simulation import simulate
from tests.test_architecture import WITHOUT

JOB = {"clients": 3, "rounds": 3, "directions": 12, "batch_size": 8, "threads": 1, "model": "mlp"}
NAMES = ["client-000", "client-001", "client-002"]
# The command as `baffle` runs it, on a Python that has NumPy: it ends with its largest size in memory.
PROGRAM = """
from baffle.cli import main

if code := main(["client", *sys.argv[1:]]):
    raise SystemExit(code)
assert not {"torch", "numba", "scipy", "PIL"} & sys.modules.keys()
with open("/proc/self/status") as status:
    (line,) = [line for line in status if line.startswith("VmHWM")]
print(line.split()[1])
"""
CLIENT = [sys.executable, "-W", "error", "-c", WITHOUT.replace('"PIL"', '"PIL", "numba"') + PROGRAM]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bundle of an MLP for digits, and each client's share of these, in the forms that data have."""
    folder = tmp_path_factory.mktemp("client")
    train, _ = data.load("digits")
    classes = len(train.classes)
    made = from_torch(
        network("mlp", 1, classes, 0),
        input_shape=train.shape,
        classes=train.classes,
        scale=train.scale,
        shift=train.shift,
        onnx=False,
    )
    made.write(folder / "bundle")
    for name, part in zip(NAMES, data.iid(len(train), 3, 0), strict=True):
        own = train.subset(part)
        if name == NAMES[0]:
            np.savez(folder / name, x=own.inputs, y=own.targets)
            continue
        (folder / name).mkdir()
        for what, array in (("images-idx3", own.inputs[:, 0]), ("labels-idx1", own.targets)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / name / f"mine-{what}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    return folder


def own_of(place, bundle):
    """The samples of client-000."""
    path = place / f"{NAMES[0]}.npz"
    return data.load_local(path, bundle.input_shape, bundle.classes, bundle.scale, bundle.shift)


def config(place, **settings):
    return TrainConfig.resolve({**JOB, "bundle": str(place / "bundle"), **settings})


def words_of(place, name, where, *more):
    path = place / f"{name}.npz"
    own = path if path.exists() else place / name
    return ["--name", name, "--bundle", str(place / "bundle"), "--data", str(own), *map(str, where), *more]


@contextlib.contextmanager
def running(*commands):
    """Their processes once they say that they are there, by name; ended in any case."""
    started = {}
    try:
        for words in commands:
            started[words[1]] = subprocess.Popen(
                [*CLIENT, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        for name, process in started.items():
            line = process.stdout.readline()
            assert line.startswith(f"{name} "), process.stderr.read()
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait(20)
            process.stdout.close()
            process.stderr.close()


def ended(process):
    """What it says when it is told to end: its largest size in kB, behind a line for people."""
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    line, size = out.splitlines()
    assert line.endswith(" has ended")
    return int(size)


@pytest.fixture
def short():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="baffle-") as folder:
        yield Path(folder)


def weights_of(run):
    return (run.path / "weights.safetensors").read_bytes()


# -- the same as in one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["drop", "listen"])
def test_without_torch_the_bits_are_those_of_the_simulation(place, short, tmp_path, way):
    if way == "drop":
        where = dict.fromkeys(NAMES, ("--drop", short))
        driver = Drop(short, least=3)
    else:
        where = {name: ("--listen", short / f"{name}.sock") for name in NAMES}
        driver = Sockets(short, least=3)
    settings = config(place)
    with running(*(words_of(place, name, where[name]) for name in NAMES)) as started:
        apart = training.train(settings, tmp_path / "apart", print, driver=driver)
        here = training.train(settings, tmp_path / "here", print)
        assert weights_of(apart) == weights_of(here)
        for row, twin in zip(apart.metrics(), here.metrics(), strict=True):
            assert (row["bytes_down"], row["bytes_up"]) == (twin["bytes_down"], twin["bytes_up"])
            assert row["dropped"] == 0
        for process in started.values():
            assert ended(process) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full"},
        {"mode": "stream"},
        {"mode": "kernel", "micro_batch": 3},
        {"storage": "int8"},
        {"storage": "float16", "micro_batch": 5},
    ],
    ids=str,
)
def test_each_way_to_measure_is_the_runtime_of_that_name(place, tmp_path, options):
    bundle = Bundle.read(place / "bundle")

    def server():
        return Server(NumpyRuntime(bundle), SteinEstimator(6, 1e-4), batch_size=16, seed=4)

    own, here = own_of(place, bundle), server()
    list(simulate(here, [Client("client-000", NumpyRuntime(bundle, **options), own, seed=0)], rounds=2))
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    state = ("--state", str(tmp_path / "state"))
    with running(words_of(place, "client-000", ("--drop", tmp_path), *words, *state)):
        apart = server()
        list(run(apart, Drop(tmp_path), rounds=2, deadline=30))
    assert np.array_equal(apart.weights, here.weights)
    filed = options.get("mode") in ("stream", "kernel") or "storage" in options
    assert (tmp_path / "state" / "weights.bin").exists() == filed


@pytest.mark.parametrize("mode", ["layer", "stream"])
def test_a_pruned_model_in_half_precision_is_the_same_job(place, tmp_path, mode):
    settings = config(place, clients=1, sparsity=0.5, downlink="float16", rounds=2, seed=3)
    (tmp_path / "job.toml").write_text(settings.to_toml())
    more = ("--config", str(tmp_path / "job.toml"), "--mode", mode, "--state", str(tmp_path / "state"))
    job = build(settings)
    own = own_of(place, Bundle.read(place / "bundle"))
    list(simulate(job.server, [Client(NAMES[0], job.runtime, own, seed=3)], rounds=2))
    with running(words_of(place, NAMES[0], ("--drop", tmp_path / "d"), *more)):
        assert main(["train", "--drop", str(tmp_path / "d"), "--run", str(tmp_path / "run"), *more[:2]]) == 0
    weights = RunFolder.open(tmp_path / "run").load_weights("final")
    assert np.array_equal(weights, job.server.weights)


def test_secure_sums_with_a_least_cohort(place, tmp_path, capsys):
    secure = {"secure": True, "max_dropout": 0.0, "max_colluding": 0.0}
    for name in NAMES:
        assert main(["identity", str(tmp_path / f"{name}.key"), "--name", name]) == 0
    roster = tmp_path / "roster"
    roster.write_text(capsys.readouterr().out)
    settings = config(place, **secure, roster=str(roster))
    (tmp_path / "job.toml").write_text(settings.to_toml())

    def words(name, cohort):
        keys = [f"--identity={tmp_path / name}.key", f"--ledger={tmp_path / name}.ledger"]
        job = ["--config", str(tmp_path / "job.toml"), f"--least-cohort={cohort}"]
        return words_of(place, name, ("--drop", tmp_path / "d"), *keys, *job)

    with running(*(words(name, 3) for name in NAMES)) as started:
        apart = training.train(settings, tmp_path / "apart", print, driver=Drop(tmp_path / "d", least=3))
        here = training.train(config(place, **secure), tmp_path / "here", print)
        assert weights_of(apart) == weights_of(here)
        for process in started.values():
            ended(process)
    for name in NAMES:
        ledger = tmp_path / f"{name}.ledger"
        assert len(ledger.read_text().splitlines()) == JOB["rounds"]
        ledger.unlink()
    with running(*(words(name, 4) for name in NAMES)):
        driver, once = Drop(tmp_path / "d", least=3), dataclasses.replace(settings, rounds=1)
        lost = training.train(once, tmp_path / "lost", print, driver=driver)
    for row in lost.metrics():
        assert (
            "3 honest clients are sure to hide each other, this client's policy asks for 4" in row["aborted"]
        )


# -- limits ------------------------------------------------------------------------------------------------


def test_limits_are_respected_and_said_in_the_servers_log(place, tmp_path):
    """One can do 5 directions, one may not measure now, and the third has no time at all."""
    limits = {
        NAMES[0]: ("--most-directions", "5"),
        NAMES[1]: ("--when", "exit 1"),
        NAMES[2]: ("--most-seconds", "1e-9"),
    }
    folder = tmp_path / "d"
    commands = [words_of(place, name, ("--drop", folder), *limits[name]) for name in NAMES]
    with running(*commands):
        settings = config(place, least_directions=4)
        done = training.train(settings, tmp_path / "run", print, driver=Drop(folder, least=3))
    rows = done.metrics()
    assert [row["dropouts"] for row in rows] == [
        {"answer": {"limited": 3}},
        {"answer": {"limited": 1}},
        {"answer": {"limited": 1}},
    ]
    assert [row["participants"] for row in rows] == [3, 2, 2]
    said = [json.loads(line) for line in done.events.read_text().splitlines()]
    reasons = {e["client"]: e["text"] for e in said if e["event"] == "dropout" and e["round"] == 0}
    assert reasons[NAMES[0]] == "directions<=5: its owner allows 5 directions, not 12"
    assert reasons[NAMES[1]] == "when: its owner's condition does not hold now"
    assert reasons[NAMES[2]].startswith("seconds<=1: it would take about ")
    assert [e["directions"] for e in said if e["event"] == "directions"] == [5]


def test_days_of_use_outlive_the_process(place, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (state / "days").write_text("2001-01-01\n2001-01-02\n")
    words = words_of(place, NAMES[0], ("--drop", tmp_path / "d"), "--most-days=2", "--state", str(state))
    for allowed in (2, 3):
        words[-3] = f"--most-days={allowed}"
        with running(words):
            settings = config(place, clients=1, rounds=1)
            done = training.train(settings, tmp_path / str(allowed), print, driver=Drop(tmp_path / "d"))
        (row,) = done.metrics()
        assert row["dropped"] == (1 if allowed == 2 else 0)
    assert len((state / "days").read_text().split()) == 3


# -- what a process may go through -------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_measurement(place, tmp_path):
    """Nothing is half there afterwards, and who starts again in its place answers the same envelope."""
    bundle, folder = Bundle.read(place / "bundle"), tmp_path / "d"
    home, words = folder / NAMES[0], words_of(place, NAMES[0], ("--drop", folder))
    left = []

    def server():
        return Server(NumpyRuntime(bundle), SteinEstimator(1500, 1e-4), batch_size=16, seed=4)

    def killed():
        while not list((home / "in").glob("*.envelope")):
            time.sleep(0.01)
        time.sleep(0.3)
        first[NAMES[0]].kill()
        first[NAMES[0]].wait(20)
        left.extend(path.name.split(".")[-1] for way in ("in", "out") for path in (home / way).iterdir())
        again.enter_context(running(words))

    apart = server()
    with running(words) as first, contextlib.ExitStack() as again:
        thread = threading.Thread(target=killed)
        thread.start()
        try:
            (record,) = run(apart, Drop(folder), rounds=1, deadline=60)
        finally:
            thread.join(30)
    assert left == ["envelope", "lock"]
    assert record.dropped == 0
    here = server()
    list(simulate(here, [Client(NAMES[0], NumpyRuntime(bundle), own_of(place, bundle), seed=0)], rounds=1))
    assert np.array_equal(apart.weights, here.weights)


@pytest.mark.parametrize("way", ["drop", "listen"])
def test_a_streamed_model_is_never_in_memory(tmp_path, short, way):
    """16 MB of weights in layers of 2 MB: `layer` holds them all, `stream` a layer or two."""
    import torch

    torch.manual_seed(0)
    wide = [layer for _ in range(8) for layer in (torch.nn.Linear(720, 720), torch.nn.ReLU())]
    first, last = torch.nn.Linear(64, 720), torch.nn.Linear(720, 10)
    module = torch.nn.Sequential(torch.nn.Flatten(), first, *wide, last)
    from_torch(module, input_shape=(1, 8, 8), classes=10, onnx=False).write(tmp_path / "bundle")
    train, _ = data.load("digits")
    np.savez(tmp_path / "client-000.npz", x=train.inputs[:32], y=train.targets[:32])
    bundle = Bundle.read(tmp_path / "bundle")
    assert 4 * bundle.layout.n > 16 * 10**6
    sizes = {}
    for mode in ("layer", "stream"):
        folder = short / mode
        state = ("--mode", mode, "--state", str(tmp_path / mode / "state"))
        where = ("--drop", folder) if way == "drop" else ("--listen", folder / "client-000.sock")
        with running(words_of(tmp_path, "client-000", where, *state)) as started:
            server = Server(NumpyRuntime(bundle), SteinEstimator(2, 1e-3), batch_size=32)
            driver = Drop(folder) if way == "drop" else Sockets(folder)
            assert [r.dropped for r in run(server, driver, rounds=1, deadline=30)] == [0]
            sizes[mode] = ended(started["client-000"])
        assert not [*(tmp_path / mode / "state").glob(".*")]
    assert sizes["stream"] < sizes["layer"] - 12_000


def test_a_mode_is_chosen_for_the_memory_there_is(place, tmp_path, monkeypatch):
    """With a made-up size of the process; what is promised holds: the peak fits beside it."""
    import argparse

    from baffle.commands import client

    monkeypatch.setattr("baffle.limits.resident", lambda: 30_000_000)
    bundle = Bundle.read(place / "bundle")
    parser = argparse.ArgumentParser()
    client.arguments(parser)

    def chosen(memory, *more, where=("--drop", "d"), sparsity=0.0):
        options = parser.parse_args(words_of(place, NAMES[0], where, *more))
        pruned = client._pruning(bundle, sparsity)
        runtime, mode = client._runtime(options, bundle, pruned, 32, memory)
        assert 30_000_000 + pruned(runtime).peak(32) <= memory
        return mode

    state = ("--state", str(tmp_path))
    whole = NumpyRuntime(bundle).peak(32)
    assert chosen(30_000_000 + whole) == "layer"
    assert chosen(30_000_000 + whole, *state) == "layer"

    def least(*modes):
        return min(
            NumpyRuntime(bundle, mode=mode, memory=room).peak(32)
            for mode in modes
            for room in client._ROOMS
            if room > 1 << 18
        )

    assert chosen(30_000_000 + least("stream", "kernel"), *state) in ("stream", "kernel")
    carried = 8 * bundle.layout.n  # over a socket
    socket = ("--listen", "s")
    assert chosen(30_000_000 + least("layer") + carried, where=socket) == "layer"
    with pytest.raises(ConfigError, match="MB at least"):
        chosen(30_000_000 + least("layer") + carried - 1, where=socket)
    # Packed from numbers in memory, or from a file.
    packed = [NumpyRuntime(bundle, storage="int8", memory=room).peak(32) for room in client._ROOMS]
    few, held = ("--storage", "int8", "--mode", "layer"), 4 * bundle.layout.n
    assert chosen(30_000_000 + min(packed) + held, *few) == "layer"
    with pytest.raises(ConfigError, match="MB at least"):
        chosen(30_000_000 + min(packed) + held - 1, *few)
    assert chosen(30_000_000 + min(packed), *few, *state) == "layer"
    # A mask has places, which a whole network has not.
    with pytest.raises(ConfigError, match="MB at least"):
        chosen(30_000_000 + least("layer"), "--mode", "layer", sparsity=0.5)
    with pytest.raises(ConfigError, match=r"takes [0-9.]+ MB at least; with --state DIR"):
        chosen(30_000_001)
    with pytest.raises(ConfigError, match=r"MB at least$"):
        chosen(30_000_001, *state)


# -- what cannot be ----------------------------------------------------------------------------------------


WRONG = [
    (["--bundle", "nowhere"], "nowhere/bundle.json: cannot be read"),
    (["--bundle", "torn"], "torn/weights.bin"),
    (["--data", "nowhere.npz"], "nowhere.npz"),
    (["--data", "few.npz"], "labels run from 0 to 10"),
    (["--name", "a/b"], "a folder has this name"),
    (["--drop", "file"], "cannot use file"),
    (["--config", "nowhere.toml"], "cannot read nowhere.toml"),
    (["--config", "secure.toml"], "secure sums need --ledger FILE"),
    (["--config", "secure.toml", "--ledger", "l"], "public keys: --roster FILE"),
    (["--config", "secure.toml", "--ledger", "l", "--roster", "nowhere"], "cannot read the roster nowhere"),
    (["--config", "secure.toml", "--ledger", "l", "--roster", "roster"], "secure sums need its key"),
    (["--config", "secure.toml", "--ledger", "no/l", "--roster", "roster"], "cannot use the ledger no/l"),
    (["--identity", "nowhere", "--config", "secure.toml", "--ledger", "l"], "cannot read the key nowhere"),
    (["--least-cohort", "5"], "--least-cohort needs secure sums"),
    (["--most-directions", "0"], "a limit of 0 directions"),
    (["--most-seconds", "nan"], "a limit of nan seconds"),
    (["--most-memory", "-3"], "--most-memory -3: a positive number"),
    (["--most-memory", "5"], "MB at least"),
    (["--most-days", "3"], "say where, with --state DIR"),
    (["--most-days", "3", "--state", "days"], "cannot read the days of use in days/days: it is damaged"),
    (["--mode", "stream"], "say where, with --state DIR"),
    (["--state", "file/x"], "cannot use file/x"),
    (["--micro-batch", "0"], "micro_batch = 0"),
    (["--runtime", "onnx", "--mode", "layer"], "--mode is for --runtime numpy"),
    (["--when", " "], "this one is empty"),
]


def test_what_cannot_be_is_one_line_and_code_2(place, tmp_path, monkeypatch, capsys):
    from baffle.errors import BaffleError

    monkeypatch.chdir(tmp_path)
    import argparse
    import shutil

    from baffle.commands import client

    shutil.copytree(place / "bundle", "torn")
    with open("torn/weights.bin", "r+b") as file:
        file.write(b"\xff")
    np.savez("few.npz", x=np.zeros((2, 8, 8), np.uint8), y=np.array([0, 10]))
    Path("file").write_text("")
    Path("days").mkdir()
    Path("days/days").write_text("yesterday")
    Path("secure.toml").write_text("secure = true\nmax-dropout = 0.0\n")
    Path("roster").write_text("".join(f"{name} {str(i) * 64}\n" for i, name in enumerate(NAMES)))
    parser = argparse.ArgumentParser()
    client.arguments(parser)
    for more, words in WRONG:
        given = words_of(place, NAMES[0], ("--drop", "d"), *more)
        with pytest.raises(BaffleError) as refused:
            client.run(parser.parse_args(given))
        assert words in str(refused.value), more
        assert "\n" not in str(refused.value)
        assert not Path("d").exists() or more[0] == "--drop"


def test_as_a_process_it_says_so_and_ends_with_2(place, tmp_path):
    taken = ("--drop", tmp_path / "d")
    with running(words_of(place, NAMES[0], taken)):
        there = f"another client {NAMES[0]} answers in {tmp_path / 'd' / NAMES[0]}"
        for words, line in (
            (words_of(place, NAMES[0], taken), there),
            (words_of(place, NAMES[1], taken, "--most-memory", "5"), r".* takes [0-9.]+ MB at least; .*"),
        ):
            done = subprocess.run([*CLIENT, *words], capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(f"baffle client: .*{line}\n", done.stderr)
    if os.path.ismount("/sys") and not os.access("/sys", os.X_OK):
        return
    done = subprocess.run(
        [*CLIENT, *words_of(place, NAMES[0], ("--drop", "/sys"))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, "a folder that can only be read"
    assert re.fullmatch(r"baffle client: cannot use /sys/client-000: .*\n", done.stderr)
