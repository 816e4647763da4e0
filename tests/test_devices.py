"""Devices as ``baffle device`` starts them: the bits of the simulation, and keys that stay where they are."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from baffle import training
from baffle.cli import main
from baffle.config import TrainConfig
from baffle.device import Sockets, relay
from baffle.errors import DataError, DeliveryError, SecurityError
from baffle.exchange import HELLO, Envelope, Reply
from baffle.identities import make_identity, read_identity, read_roster
from baffle.runs import RunFolder

JOB = {"model": "mlp", "clients": 3, "rounds": 3, "directions": 12, "batch_size": 8, "threads": 1}
BAFFLE = [sys.executable, "-m", "baffle"]


def flags(**settings):
    given = {**JOB, **settings}
    return [
        word
        for name, value in given.items()
        for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]


@contextlib.contextmanager
def devices(folder, names, *more, ended=()):
    """Their processes, once they listen."""
    running = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for name in names:
            words = ["device", "--name", name, "--listen", str(folder / f"{name}.sock")]
            words += [word.replace("NAME", name) for word in more]
            running.append(
                subprocess.Popen(
                    BAFFLE + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
                )
            )
        for name, process in zip(names, running, strict=True):
            line = process.stdout.readline()
            assert line == f"{name} listens at {folder / name}.sock\n", process.stderr.read()
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(20)
            process.stdout.close()
            process.stderr.close()


@pytest.fixture
def sockets():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="baffle-") as folder:
        yield Path(folder)


NAMES = ["client-000", "client-001", "client-002"]


def weights_of(run):
    return (run.path / "weights.safetensors").read_bytes()


def test_devices_give_the_bits_of_the_simulation(sockets, tmp_path):
    with devices(sockets, NAMES, *flags()) as running:
        for settings in ({}, {"dropout": 0.4}, {"downlink": "scalars", "learning_rate": 0.01}):
            config = TrainConfig.resolve({**JOB, **settings})
            stem = "-".join(settings) or "plain"
            apart = training.train(config, tmp_path / stem, print, driver=Sockets(sockets, least=3))
            here = training.train(config, tmp_path / f"{stem}-here", print)
            assert weights_of(apart) == weights_of(here)
            rows = zip(apart.metrics(), here.metrics(), strict=True)
            for row, twin in rows:
                assert row["bytes_down"] == twin["bytes_down"] or settings  # a device may hold an older run's
                assert row["bytes_up"] == twin["bytes_up"] or settings
                assert row["dropped"] == twin["dropped"]
                assert row["loss"] is None  # it stays on the device
        # A device that ends takes its socket with it; one that is killed leaves it behind.
        running[0].terminate()
        assert running[0].wait(20) == 0
        assert running[0].stdout.read() == "client-000 has ended\n"
        assert not (sockets / "client-000.sock").exists()
        running[1].send_signal(signal.SIGKILL)
        running[1].wait(20)
        assert (sockets / "client-001.sock").exists()
        with pytest.raises(DeliveryError) as gone:
            relay(sockets / "client-001.sock", Envelope(HELLO).encode(), 5)
        assert gone.value.reason == "gone"
        reply = Reply.decode(relay(sockets / "client-002.sock", Envelope(HELLO).encode(), 20))
        assert reply.body == b"client-002"
        taken = subprocess.run(
            [
                *BAFFLE,
                "device",
                "--name",
                "client-002",
                "--listen",
                str(sockets / "client-002.sock"),
                *flags(),
            ],
            capture_output=True,
            text=True,
        )
        assert taken.returncode == 2
        assert taken.stderr == f"baffle device: {sockets}/client-002.sock: another device listens there\n"


def test_secure_sums_over_devices(sockets, tmp_path, capsys):
    secure = {"secure": True, "max_dropout": 0.0, "max_colluding": 0.0}
    for name in NAMES:
        assert main(["identity", str(tmp_path / f"{name}.key"), "--name", name]) == 0
    roster = tmp_path / "roster"
    roster.write_text(f"# who there is\n\n{capsys.readouterr().out}")
    with_keys = [
        *flags(**secure, roster=roster),
        *("--identity", str(tmp_path / "NAME.key"), "--ledger", str(tmp_path / "NAME.ledger")),
    ]
    with devices(sockets, NAMES, *with_keys):
        arguments = flags(**secure, roster=roster, run=tmp_path / "apart", devices=sockets)
        assert main(["train", *arguments]) == 0
    assert main(["train", *flags(**secure, run=tmp_path / "here")]) == 0
    apart, here = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("apart", "here"))
    assert apart == here
    for name in NAMES:  # a line for each answer, written before it left
        assert len((tmp_path / f"{name}.ledger").read_text().splitlines()) == JOB["rounds"]


# -- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device", "--name", "x", "--listen", "s"], "there is no client x: the names are client-000 to"),
        (["device", "--name", "client-000", "--listen", "s", "--secure"], "secure sums need --ledger FILE"),
        (
            ["device", "--name", "client-000", "--listen", "s", "--secure", "--ledger", "l"],
            "secure sums over devices need the clients' public keys: --roster FILE",
        ),
        (
            ["device", "--name", "client-000", "--listen", "long" * 40],
            "a socket's path has at most 100 bytes",
        ),
        (["train", "--devices", "nowhere"], "nowhere is no folder: clients are met in one"),
        (["identity", "key", "--name", "two words"], "one word is needed, as it stands in the roster"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = flags() if arguments[0] == "device" else []
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "s").exists()


def test_a_run_of_devices_is_not_gone_on_with_as_a_simulation(tmp_path, capsys):
    run = RunFolder.create(tmp_path / "run", TrainConfig.resolve(JOB), "Sockets").path
    assert main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert error == f"baffle train: the clients of {run} are on devices (Sockets): say where these are\n"


def test_one_process_at_a_run(tmp_path, capsys):
    folder = RunFolder.create(tmp_path / "run", TrainConfig.resolve(JOB))
    with folder.held():
        assert main(["train", "--resume", str(folder.path)]) == 2
    error = capsys.readouterr().err
    assert error == f"baffle train: {folder.path}: another process is at this run: wait for it, or end it\n"
    assert main(["train", "--resume", str(folder.path)]) == 0  # let go, it goes on


def test_keys_are_made_once_and_are_for_their_owner(tmp_path):
    path = tmp_path / "key"
    made = make_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_identity(path).public == made.public
    with pytest.raises(DataError, match="never written over"):
        make_identity(path)
    path.chmod(0o640)
    with pytest.raises(SecurityError, match="can be read by others"):
        read_identity(path)
    path.chmod(0o600)
    for text in ("", "ab", "x" * 64, "\x00\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError):
            read_identity(path)
    with pytest.raises(DataError, match="cannot write"):
        make_identity(tmp_path / "no" / "key")


def test_a_roster_says_who_there_is(tmp_path):
    path, keys = tmp_path / "roster", [f"{number:02x}" * 32 for number in range(3)]
    path.write_text(f"anna {keys[0]}\n\n# a comment\nbo {keys[1]}\n")
    assert read_roster(path).names == ("anna", "bo")
    for text, where in [
        (f"anna {keys[0]}\nanna {keys[1]}\n", "line 2"),
        (f"anna {keys[0]}\nbo {keys[1][:-1]}\n", "line 2"),
        (f"anna {keys[0]} {keys[1]}\n", "line 1"),
        ("anna\n", "line 1"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=where):
            read_roster(path)
    with pytest.raises(DataError, match="cannot read"):
        read_roster(tmp_path / "none")
