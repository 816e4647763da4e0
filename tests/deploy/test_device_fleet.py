"""Eight clients of `baffle client` in an environment that has no torch, MNIST, and secure sums.

The server has torch, for its optimizer. What it reaches is compared with the same job in one process, whose
clients measure with the same runtime: the weights must be equal to the bit.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from baffle.cli import main as command
from baffle.config import TrainConfig, read_toml
from baffle.job import client_names, load_data, split

ROOT = Path(__file__).parents[2]
CLIENTS = 8
SECONDS_TO_START = 60


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The command, installed by itself: NumPy, no torch, and cryptography for secure sums."""
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    install = [home / "bin" / "pip", "install", "-q", "--disable-pip-version-check"]
    source = home / "source"  # a build leaves files beside what it builds
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*install, "-c", ROOT / "constraints.txt", f"{source}[secure]"], check=True)
    look = "import importlib.util as u; print([n for n in ('torch', 'numba', 'onnx') if u.find_spec(n)])"
    found = subprocess.run([home / "bin" / "python", "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    return home / "bin" / "baffle"


@pytest.fixture(scope="module", params=[pytest.param("digits", marks=pytest.mark.slice), "mnist"])
def fleet(request, tmp_path_factory, shared_data):
    """Bundle, settings, and each client's samples in a file of its own."""
    home, name = tmp_path_factory.mktemp("fleet"), request.param
    data = f'data = "{name}"\n'
    if name == "mnist":
        data += f"data-folder = {json.dumps(str(shared_data))}\n"
    (home / "made.toml").write_text(f'{data}model = "lenet"\nseed = 7\n')
    made = ["--config", str(home / "made.toml"), "--out", str(home / "lenet"), "--no-onnx"]
    assert command(["export", *made]) == 0
    (home / "job.toml").write_text(
        f"{data}bundle = {json.dumps(str(home / 'lenet'))}\nseed = 7\nclients = {CLIENTS}\n"
        f"directions = 50\nrounds = {60 if name == 'mnist' else 3}\nevaluate-every = 100\n"
    )
    config = TrainConfig.resolve(read_toml(home / "job.toml"))
    train, _ = load_data(config)
    for client, part in zip(client_names(config, train), split(config, train), strict=True):
        np.savez(home / f"{client}.npz", x=train.inputs[part], y=train.targets[part])
    return home


@contextlib.contextmanager
def running(bare, fleet, home, where, *options):
    """The eight, in processes of their own; all are ended."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONUNBUFFERED": "1"}
    processes = []
    try:
        for i in range(CLIENTS):
            name = f"client-{i:03d}"
            arguments = ["--name", name, "--bundle", fleet / "lenet", "--data", fleet / f"{name}.npz"]
            mine = [str(option).replace("NAME", name) for option in options]
            with (home / f"{name}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [bare, "client", *arguments, *where(name), *mine],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                )
        until = time.monotonic() + SECONDS_TO_START
        for i, process in enumerate(processes):
            log = home / f"client-{i:03d}.log"
            while f"client-{i:03d} " not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, f"{log} says nothing"
                time.sleep(0.05)
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def peak(process):
    """Megabytes of resident memory, at most so far."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def weights(run):
    return {name: values.tobytes() for name, values in load_file(run / "weights.safetensors").items()}


def last(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_secure_sums_of_clients_without_torch(bare, fleet, tmp_path):
    job = ["train", "--config", str(fleet / "job.toml"), "--secure"]
    assert command([*job, "--run", str(tmp_path / "here")]) == 0
    lines = []
    for i in range(CLIENTS):
        made = [bare, "identity", tmp_path / f"client-{i:03d}.key", "--name", f"client-{i:03d}"]
        lines.append(subprocess.run(made, capture_output=True, text=True, check=True).stdout)
    (tmp_path / "roster").write_text("".join(lines))
    settings = (fleet / "job.toml").read_text() + "secure = true\n"
    (tmp_path / "clients.toml").write_text(settings)
    sockets = Path(os.path.relpath(tmp_path / "sockets"))
    options = ["--config", tmp_path / "clients.toml", "--roster", tmp_path / "roster"]
    options += ["--identity", tmp_path / "NAME.key", "--ledger", tmp_path / "NAME.ledger"]

    def listen(name):
        return ["--listen", sockets / f"{name}.sock"]

    with running(bare, fleet, tmp_path, listen, *options) as clients:
        remote = [*job, "--roster", str(tmp_path / "roster"), "--devices", str(sockets)]
        assert command([*remote, "--run", str(tmp_path / "there")]) == 0
        peaks = [peak(process) for process in clients]
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    here, there = last(tmp_path / "here"), last(tmp_path / "there")
    assert there["test_accuracy"] == here["test_accuracy"]
    assert there["dropped"] == 0
    print(f"{there['round'] + 1} rounds, accuracy {there['test_accuracy']:.4f}")
    print(f"whole clients: {min(peaks):.1f} to {max(peaks):.1f} MB")
    assert max(peaks) < 90
    if there["round"] >= 50:
        assert max(there["test_accuracy"], there["ema_accuracy"]) > 0.25  # chance: 0.1


def test_a_folder_instead_of_a_network(bare, fleet, tmp_path):
    job = ["train", "--config", str(fleet / "job.toml"), "--rounds", "3"]
    assert command([*job, "--run", str(tmp_path / "here")]) == 0
    with running(
        bare, fleet, tmp_path, lambda name: ["--drop", tmp_path / "drop"], "--config", fleet / "job.toml"
    ):
        assert command([*job, "--drop", str(tmp_path / "drop"), "--run", str(tmp_path / "there")]) == 0
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
