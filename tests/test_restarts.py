"""A server that is killed at any point of a round, and disks that are full: real processes, real disks.

``baffle train --devices`` runs in a process of its own, is held at a point and killed there by its pid, and
``--resume`` goes on, again and again. What comes of it is compared with a run in this process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import baffle
from baffle import federation
from baffle.config import TrainConfig
from baffle.job import build
from baffle.secagg.primitives import hash_of
from baffle.secure import Protection, SecureSum
from baffle.simulation import InProcess
from tests.fleet import Fleet, LinearRegression, a_round, assert_sum_of, client

# A process that has imported what takes long, and forks a server for each command that it reads.
SERVERS = """
import json, os, resource, sys, time, traceback
from pathlib import Path
import baffle.cli, baffle.device, baffle.training
import torch._dynamo  # which optimizers import, and which takes the longest of all
from baffle.checkpoint import ScalarLog
from baffle.plan import RoundPlan
from baffle.exchange import Envelope
from baffle.runs import RunFolder
from baffle.server import Server

baffle.training.plots.curves = lambda *_: None  # nobody looks at them here

def arm(moment, round_):
    now = [0]  # the round that is on

    def hold():
        if now[0] == round_:
            print("held", flush=True)
            for word in sys.stdin.readline().split():
                if word == "limit":  # from here on no file can grow beyond a page
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    def before(owner, name, when=lambda *_: True):
        true = getattr(owner, name)
        def held(*args, **options):
            if when(*args):
                hold()
            return true(*args, **options)
        setattr(owner, name, held)

    ask = baffle.device.Sockets.ask
    def asked(self, stage, requests, deadline):
        now[0] = RoundPlan.decode(Envelope.decode(requests[min(requests)]).plan).round
        if moment == "asking" and stage == "answer":
            hold()
        yield from ask(self, stage, requests, deadline)
    baffle.device.Sockets.ask = asked
    checkpoint = lambda path, *_: Path(path).name == "checkpoint.safetensors"
    if moment == "answered":
        before(Server, "apply")
    if moment == "summed":
        before(RunFolder, "append_metrics")
    if moment == "noted":
        before(ScalarLog, "append")
    if moment == "logged":
        before(baffle.training, "save_checkpoint", checkpoint)
    if moment == "writing":
        before(Path, "replace", lambda part, to: checkpoint(to))
    if moment == "saved":
        before(baffle.training._Totals, "add")

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        said = os.open(order["says"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(said, 2)
        code = 99
        try:
            arm(order["moment"], order["round"])
            code = baffle.cli.main(order["command"])
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    print("server", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Servers:
    """Runs ``baffle train`` in processes, one after the other."""

    def __init__(self, folder):
        self.says = folder / "stderr"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVERS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "BAFFLE_KERNELS": "0"},
        )
        self.pid = None
        self._watch = threading.Timer(300, self.process.kill)
        self._watch.start()

    def start(self, *command, moment="", round=-1):
        order = {"command": list(command), "moment": moment, "round": round, "says": str(self.says)}
        self._say(json.dumps(order))
        word, pid = self._hear()
        assert word == "server"
        self.pid = int(pid)

    def _say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self):
        while True:
            line = self.process.stdout.readline().split()
            assert line, "no server says anything"
            if line[0] in ("server", "held", "ended"):
                return line if len(line) == 2 else (line[0], None)

    def held(self):
        word, code = self._hear()
        assert word == "held", (code, self.text())

    def go(self, words=""):
        self._say(words)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def ended(self):
        """Its exit code."""
        word, code = self._hear()
        assert word == "ended"
        return int(code)

    def text(self):
        return self.says.read_text()

    def end(self):
        if self.process.poll() is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._watch.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    started = Servers(tmp_path_factory.mktemp("servers"))
    yield started
    started.end()


SETTINGS = {
    "data": "digits",
    "model": "mlp",
    "clients": 6,
    "directions": 8,
    "batch_size": 4,
    "rounds": 8,
    "checkpoint_every": 2,
    "evaluate_every": 100,
    "deadline": 60.0,
}
NAMES = [f"client-{i:03d}" for i in range(6)]


def config_of(**settings):
    return TrainConfig.resolve(SETTINGS | settings)


@pytest.fixture(scope="module")
def model():
    """What a NumPy device needs in order to hold the model of the job. What it measures is its own affair."""
    job = build(config_of(), devices=True)
    layout = job.server.layout
    shapes = [list(shape) for shape in layout.shapes]
    return {"names": layout.names, "shapes": shapes, "frozen": job.runtime.frozen_digest.hex()}


@pytest.fixture(scope="module")
def open_fleet(model):
    with Fleet(NAMES, model=model) as devices:
        yield devices


@pytest.fixture(scope="module")
def sealed_fleet(model):
    with Fleet(NAMES, model=model, least=3) as devices:
        yield devices


def in_one_process(config, model, lost=()):
    """The weights of a run that nothing befalls, but that nobody answers the rounds that are ``lost``."""
    job = build(config, devices=True)
    driver = InProcess([client(name, model) for name in job.names])
    drops = lambda round_, name: round_ in lost  # noqa: E731
    for record in federation.run(job.server, driver, rounds=job.rounds, drops=drops):
        assert record.dropped == (len(NAMES) if record.round in lost else 0)
    return job.server


def flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def assert_ended_like(server, path):
    saved = load_file(path / "weights.safetensors")
    assert saved["weights"].tobytes() == server.weights.tobytes()
    assert saved["ema"].tobytes() == server.ema_weights.tobytes()
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(SETTINGS["rounds"]))
    assert not list(path.glob(".*"))
    return rows


# -- the server is killed ----------------------------------------------------------------------------------

# Checkpoints are written after the rounds 1, 3, 5, 7.
KILLS = [
    ("asking", 0),
    ("waiting", 1),
    ("answered", 2),
    ("summed", 2),
    ("noted", 3),
    ("logged", 3),
    ("writing", 3),
    ("asking", 4),
    ("saved", 5),
    ("waiting", 6),
    ("logged", 7),
]


def killed(servers, fleet, command, moment, round_):
    if moment == "waiting":
        others = [fleet.folder / f"{name}.ledger" for name in NAMES if name != NAMES[2] and fleet.roster]

        def kill(device):
            while not all(f" {round_} ".encode() in ledger.read_bytes() for ledger in others):
                time.sleep(0.01)  # until they have answered: how far they are is else a race
            os.kill(servers.pid, signal.SIGKILL)

        fleet[NAMES[2]].at("answer", "measuring", kill, round=round_)
        servers.start(*command)
        assert servers.ended() == -signal.SIGKILL
    else:
        servers.start(*command, moment=moment, round=round_)
        servers.held()
        servers.kill()


@pytest.mark.parametrize("downlink", ["model", "scalars"])
def test_a_server_that_is_killed_at_any_point_ends_with_the_same_bits(
    servers, open_fleet, model, tmp_path, downlink
):
    fleet, path = open_fleet.ready(), tmp_path / "run"
    settings = {"downlink": downlink}
    command = ["train", "--devices", str(fleet.folder), "--run", str(path), *flags(SETTINGS | settings)]
    for moment, round_ in KILLS:
        killed(servers, fleet, command, moment, round_)
        command = ["train", "--devices", str(fleet.folder), "--resume", str(path)]
        if (moment, round_) == ("waiting", 6):  # and with it the machine, say
            for each in fleet.values():
                each.kill()
            fleet.ready()
    servers.start(*command)
    assert servers.ended() == 0, servers.text()
    rows = assert_ended_like(in_one_process(config_of(**settings), model), path)
    assert all(row["dropped"] == 0 for row in rows)
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    begun = [event["round"] for event in events if event["event"] in ("run", "resume")]
    assert begun == [0, 0, 0, 2, 2, 2, 2, 2, 4, 6, 6, 6]
    if downlink == "scalars":  # the steps of rounds before the checkpoint are sent from the scalar log
        assert rows[4]["bytes_down"] < 4 * LinearRegression(**model).layout.n < rows[0]["bytes_down"]


def test_a_server_of_secure_sums_that_is_killed_loses_the_round_that_was_answered(
    servers, sealed_fleet, model, tmp_path
):
    """What a device has answered it does not answer again. Where nobody had, the round is repeated."""
    fleet, path, roster = sealed_fleet.ready(), tmp_path / "run", tmp_path / "roster"
    keys = zip(fleet.roster.names, fleet.roster.keys, strict=True)
    roster.write_text("".join(f"{name} {key.hex()}\n" for name, key in keys))
    # The settings that the devices insist on are theirs: nobody colludes, one may vanish.
    settings = {"roster": str(roster), "max_samples": 30, "max_colluding": 0.0, "max_dropout": 0.17}
    command = ["train", "--secure", "--devices", str(fleet.folder), "--run", str(path)]
    command += flags(SETTINGS | settings)
    for moment, round_ in [("asking", 1), ("waiting", 2), ("answered", 4), ("logged", 6), ("saved", 7)]:
        killed(servers, fleet, command, moment, round_)
        fleet.ready()
        command = ["train", "--devices", str(fleet.folder), "--resume", str(path)]
    servers.start(*command)
    assert servers.ended() == 0, servers.text()
    # In the clear and with the same rounds lost: a secure sum is that of integers, to the bit.
    rows = assert_ended_like(in_the_ring(config_of(secure=True, **settings), model, {2, 4, 6}), path)
    lost = [row for row in rows if row["dropped"]]
    assert [row["round"] for row in lost] == [2, 4, 6]
    for row in lost:
        assert "nothing was opened" in row["aborted"]
        assert f"round {row['round']} of this job is answered" in row["aborted"]
        assert row["dropouts"] == {"answer": {"refused": 6}}


def in_the_ring(config, model, lost):
    job = build(config, devices=True)
    job.server.aggregator = baffle.IntegerSum(job.server.aggregator.terms)
    driver = InProcess([client(name, model) for name in job.names])
    for _ in federation.run(job.server, driver, rounds=job.rounds, drops=lambda round_, _: round_ in lost):
        pass
    return job.server


# -- a disk is full ----------------------------------------------------------------------------------------


class Disk:
    """A small disk of its own, which is gone with the process that holds it."""

    def __init__(self, mount):
        how = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
        make = f"mount -t tmpfs -o size=1m none {mount} && echo made && read word"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self._holder = subprocess.Popen([*how, "sh", "-c", make], **pipes)
        except FileNotFoundError:
            pytest.skip("no command unshare: no disk to fill")
        if self._holder.stdout.readline() != b"made\n":
            self.end()
            pytest.skip("a disk cannot be mounted here")
        self.path = Path(f"/proc/{self._holder.pid}/root{mount}")
        self._ballast = self.path / "ballast"

    def fill(self):
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self):
        self._ballast.unlink()

    def end(self):
        self._holder.kill()
        self._holder.wait()
        self._holder.stdin.close()
        self._holder.stdout.close()


@pytest.fixture
def disk():
    with tempfile.TemporaryDirectory(prefix="disk-") as mount:
        made = Disk(mount)
        yield made
        made.end()


# The checkpoint, the metrics, the scalar log, the final weights.
@pytest.mark.parametrize(("moment", "at"), [("logged", 3), ("summed", 2), ("noted", 4), ("saved", 7)])
def test_a_full_disk_ends_the_run_in_one_line_and_nothing_is_lost(
    servers, open_fleet, model, disk, moment, at
):
    fleet, path = open_fleet.ready(), disk.path / "run"
    command = ["train", "--devices", str(fleet.folder), "--run", str(path), *flags(SETTINGS)]
    servers.start(*command, moment=moment, round=at)
    servers.held()
    checkpoint = (path / "checkpoint.safetensors").read_bytes()
    disk.fill()
    servers.go()
    assert servers.ended() == 2
    assert_one_line(servers.text(), "No space left on device", path)
    assert not list(path.glob(".*")), "half a file"
    assert (path / "checkpoint.safetensors").read_bytes() == checkpoint
    servers.start("train", "--devices", str(fleet.folder), "--resume", str(path))  # still full
    assert servers.ended() == 2
    assert_one_line(servers.text(), "No space left on device", path)
    disk.empty()
    servers.start("train", "--devices", str(fleet.folder), "--resume", str(path))
    assert servers.ended() == 0, servers.text()
    assert_ended_like(in_one_process(config_of(), model), path)


def assert_one_line(text, why, path):
    """What the command says. That events are lost too is said by itself, once."""
    lines = [line for line in text.splitlines() if "events are lost" not in line]
    assert len(lines) == 1, text
    assert lines[0].startswith(f"baffle train: cannot write {path}")
    assert why in lines[0]


def test_a_file_that_cannot_grow_ends_the_run_likewise(servers, open_fleet, model, tmp_path):
    """The same where no disk can be mounted: a limit on the size of files, from the middle of a run on."""
    fleet, path = open_fleet.ready(), tmp_path / "run"
    command = ["train", "--devices", str(fleet.folder), "--run", str(path), *flags(SETTINGS)]
    servers.start(*command, moment="logged", round=3)
    servers.held()
    servers.go("limit")
    assert servers.ended() == 2
    assert_one_line(servers.text(), "File too large", path)
    assert not list(path.glob(".*")), "half a file"
    servers.start("train", "--devices", str(fleet.folder), "--resume", str(path))
    assert servers.ended() == 0, servers.text()
    assert_ended_like(in_one_process(config_of(), model), path)


def test_a_disk_that_is_full_from_the_start(servers, open_fleet, disk):
    fleet, path = open_fleet.ready(), disk.path / "run"
    disk.fill()
    command = ["train", "--devices", str(fleet.folder), "--run", str(path), *flags(SETTINGS)]
    servers.start(*command)
    assert servers.ended() == 2
    assert_one_line(servers.text(), "No space left on device", path)
    disk.empty()
    servers.start(*command)  # the same command again
    assert servers.ended() == 0, servers.text()


def test_a_ledger_on_a_full_disk(sealed_fleet, model, disk):
    """No answer leaves that is not written down. There is room for four bytes of its line, and no more."""
    fleet, name = sealed_fleet.ready(), NAMES[2]
    victim, ledger = fleet[name], disk.path / "ledger"
    lines = [
        f"{hash_of(b'job', bytes([i])).hex()} 0 {hash_of(b'asked', bytes([i])).hex()}" for i in range(31)
    ]
    ledger.write_text("".join(f"{line}\n" for line in lines))
    before = ledger.read_bytes()
    assert len(before) == 4096 - 4
    victim.kill()
    victim.start(ledger=str(ledger))
    disk.fill()

    terms = baffle.Terms(baffle.FixedPoint(64, 24, 1024.0), len(NAMES), 30)
    protection = Protection(0.0, 0.17, 3, 100)
    server = baffle.Server(
        LinearRegression(**model),
        baffle.SteinEstimator(8, 1e-4),
        seed=hash_of(b"a full disk"),
        batch_size=4,
        aggregator=SecureSum(fleet.roster, terms, protection, job=hash_of(b"a full disk")),
    )
    others = [each for each in NAMES if each != name]
    for _ in range(2):
        out = a_round(server, fleet)
        assert_sum_of(out, others, terms, model)
        found = out.dropout(name)
        assert (found.stage, found.reason) == ("answer", "failed")
        assert f"cannot write the ledger {ledger}" in found.text
        assert ledger.read_bytes() == before
    disk.empty()
    assert_sum_of(a_round(server, fleet), NAMES, terms, model)
    line = f"{hash_of(b'a full disk').hex()} 2 "
    assert ledger.read_bytes().startswith(before + line.encode())
    victim.kill()
    victim.start(ledger=str(ledger))  # which reads it
    victim.kill()
    victim.start()
