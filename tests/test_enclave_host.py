"""Workers in real sandboxes: federations of them, what is refused, what the host's process can see."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from enclave_world import need_sandbox, nothing_left
from test_enclave_tpm import missing, simulator

import baffle
from baffle import device, federation
from baffle.commands import enclave
from baffle.enclave.evidence import AttestationError
from baffle.enclave.host import EnclaveDriver, EnclaveHost, Setup, provision, provisioning
from baffle.enclave.manifest import Manifest
from baffle.enclave.sandbox import Limits
from baffle.enclave.sealing import sealed_at
from baffle.enclave.software import SoftwareRoot, SoftwareVerifier
from baffle.enclave.tpm import TpmRoot, TpmVerifier
from baffle.enclave.worker import Rows, seal_settings
from baffle.endpoint import Endpoint
from baffle.errors import ConfigError, SecurityError
from baffle.exchange import Envelope, Reply
from baffle.export.torch import from_torch
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.torch import TorchRuntime
from baffle.secagg.primitives import Identity
from baffle.secure import Protection

NAMES = "abc"
SERVER = Identity.generate()


@pytest.fixture(autouse=True, scope="module")
def _real():
    need_sandbox()
    yield
    nothing_left()


def module(seed=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 10)
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    made = from_torch(
        module(),
        input_shape=(1, 8, 8),
        name="small",
        classes=10,
        scale=np.full(1, 1 / 16, np.float32),
        shift=np.zeros(1, np.float32),
        onnx=False,
    )
    return made.write(tmp_path_factory.mktemp("bundles") / "bundle")


def samples(name):
    rng = np.random.default_rng(ord(name[0]))
    return rng.integers(0, 17, (20 + ord(name[0]) % 7, 1, 8, 8), dtype=np.uint8), rng.integers(
        0, 10, 20 + ord(name[0]) % 7
    )


def root_in(folder):
    folder.mkdir(parents=True)
    return SoftwareRoot.create(folder)


class Hosts(dict):
    """Name → EnclaveHost; a driver for them. ``lie`` may put other bytes in a reply's place."""

    def __init__(self):
        super().__init__()
        self.lie, self.passed = lambda name, stage, reply: reply, []

    def names(self):
        return sorted(self)

    def ask(self, stage, requests, deadline):
        for name in requests:
            reply = self.lie(name, stage, self[name].handle(requests[name]))
            self.passed.append((name, stage))
            yield name, reply


class Run:
    """Hosts with one root, all of which end with ``stack``."""

    def __init__(self, bundle, folder, stack):
        self.bundle, self.stack, self.made = bundle, stack, Hosts()
        self.root = root_in(folder / "root")
        self.verifier = SoftwareVerifier(self.root.public)

    def host(self, name="a", setup=None, **options):
        options.setdefault("root", self.root)
        host = EnclaveHost(name, setup or Setup(self.bundle.folder), options.pop("root"), **options)
        self.stack.callback(host.close)
        self.made[name] = host
        return host

    def give(self, host, **options):
        name = host.name
        given = provisioning(name, self.bundle.folder, *samples(name), SERVER.public, **options)
        return provision(host.handle, given, self.verifier, [host.measurement])

    def driver(self):
        measurements = [each.measurement for each in self.made.values()]
        return EnclaveDriver(self.made, self.verifier, measurements, SERVER)


@pytest.fixture
def run(tmp_path, bundle):
    with contextlib.ExitStack() as stack:
        yield Run(bundle, tmp_path, stack)


@pytest.fixture(scope="module")
def _three(tmp_path_factory, bundle):
    with contextlib.ExitStack() as stack:
        run = Run(bundle, tmp_path_factory.mktemp("three"), stack)
        for name in NAMES:
            assert run.give(run.host(name)).assurance == "software"
        yield run


@pytest.fixture
def three(_three):
    """Three workers that have their data, for answers that the server may read."""
    _three.made.lie, _three.made.passed = lambda name, stage, reply: reply, []
    yield _three
    assert {host.last for host in _three.made.values()} == {None}  # none of them was started again


def open_client(bundle, name, **options):
    return baffle.Client(name, NumpyRuntime(bundle), Rows(*samples(name)), seed=bytes(32), **options)


def secured(names=NAMES):
    keys = {name: Identity.generate() for name in names}
    roster = baffle.Roster({name: key.public for name, key in keys.items()})
    protection = Protection(0.0, 0.3, 2)
    terms = baffle.Terms(baffle.FixedPoint(), 3, 100)

    def server():
        return baffle.SecureSum(roster, terms, protection)

    def seal(name):
        return baffle.SecureSeal(name, keys[name], roster, protection.policy)

    def settings(name):
        return seal_settings(keys[name], dict(zip(roster.names, roster.keys, strict=True)), protection.policy)

    server.keys = keys
    return server, seal, settings


def server_of(aggregator=None, seed=3):
    options = {} if aggregator is None else {"aggregator": aggregator}
    return baffle.Server(
        TorchRuntime(module(seed)), baffle.SteinEstimator(12), batch_size=8, seed=11, **options
    )


def bits(server):
    return server.model().encode()


def open_bits(bundle, rounds, aggregator=None, seal=lambda name: None):
    """Of the same job with clients that nobody hides."""
    server = server_of(aggregator)
    clients = [open_client(bundle, name, seal=seal(name)) for name in NAMES]
    list(baffle.simulate(server, clients, rounds=rounds))
    return bits(server)


def test_a_federation_of_workers_has_the_bits_of_open_clients(three, bundle):
    server = server_of()
    records = list(federation.run(server, three.driver(), rounds=4, forgiving=False))
    assert [record.dropped for record in records] == [0] * 4
    assert bits(server) == open_bits(bundle, 4) != bits(server_of())
    assert three.made.passed.count(("a", "attest")) == 1  # once for all rounds
    for host in three.made.values():
        assert 15e6 < host.process.peak() < 60e6
        assert host.process.resident() < 90e6


# -- what is refused --------------------------------------------------------------------------------------


def refused(run, driver, text):
    """A round in which clients are sent nothing but a nonce."""
    start = len(run.made.passed)
    (record,) = federation.run(server_of(), driver, rounds=1)
    assert len(record.dropouts) == len(run.made)
    for dropout in record.dropouts:
        assert dropout.reason == "refused"
        assert re.search(text, dropout.text), dropout.text
    assert {stage for _, stage in run.made.passed[start:]} == {"attest"}


def changed_code(bundle, monkeypatch, tmp_path):
    """One line of the worker's own source."""
    place, source = next(
        (inside, path)
        for inside, path in Setup(bundle.folder).files().items()
        if inside.endswith("enclave/worker.py")
    )
    other = tmp_path / "worker.py"
    other.write_text(source.read_text() + "\n# nothing\n")
    files = Setup.files
    monkeypatch.setattr(Setup, "files", lambda self: files(self) | {place: other})
    return Setup(bundle.folder)


def changed_model(bundle, _, tmp_path):
    weights = bundle.weights()
    weights[0] += 1
    return Setup(bundle.write(tmp_path / "other", weights).folder)


CHANGES = {"code": changed_code, "model": changed_model}


def test_config_and_limits_are_measured_too(bundle):
    setups = [Setup(bundle.folder), Setup(bundle.folder, {"mode": "full"})]
    setups += [
        Setup(bundle.folder, limits=Limits(91_000_000)),
        Setup(bundle.folder, limits=Limits(processes=4)),
    ]
    assert len({setup.manifest(setup.files()).measurement for setup in setups}) == 4


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_another_worker_than_the_one_that_is_trusted(run, bundle, monkeypatch, tmp_path, what):
    trusted = Setup(bundle.folder)
    measurement = trusted.manifest(trusted.files()).measurement
    host = run.host("a", CHANGES[what](bundle, monkeypatch, tmp_path))
    assert host.measurement != measurement
    driver = EnclaveDriver(run.made, run.verifier, [measurement], SERVER)
    refused(run, driver, "another measurement than those trusted")
    given = provisioning("a", bundle.folder, *samples("a"), SERVER.public)
    with pytest.raises(AttestationError, match="another measurement"):
        provision(host.handle, given, run.verifier, [measurement])
    if what == "model":  # and a bundle that is not the measured one is refused by the worker itself
        with pytest.raises(SecurityError, match="another bundle than the one"):
            provision(host.handle, given, run.verifier, [host.measurement])


def test_evidence_that_proves_nothing(three):
    measurement = three.made["a"].measurement
    refused(
        three, EnclaveDriver(three.made, SoftwareVerifier(bytes(32)), [measurement], SERVER), "did not sign"
    )

    kept = []

    def replay(name, stage, reply):
        kept.append((name, stage, reply))
        old = next(each for each in kept if each[:2] == (name, "attest"))
        ticket = Reply.decode(reply).ticket
        return Reply(ticket, "answer", Reply.decode(old[2]).body).encode() if stage == "attest" else reply

    three.made.lie = replay
    first = three.driver()
    assert next(federation.run(server_of(), first, rounds=1)).dropped == 0
    refused(three, three.driver(), "another nonce")  # what another driver was shown

    three.made.lie = lambda name, stage, reply: Reply(
        Reply.decode(reply).ticket, "answer", Reply.decode(reply).body[:-1]
    ).encode()
    refused(three, three.driver(), "cut short")
    three.made.lie = lambda name, stage, reply: b"no reply"
    refused(three, three.driver(), "")


def test_a_host_that_lies(three):
    """It changes a reply, gives an older one, or another worker's: a dropout each time, never an answer."""
    server, driver, kept = server_of(), three.driver(), {}

    def one(name, stage, reply):
        kept.setdefault(name, []).append((stage, reply))
        return reply

    three.made.lie = one
    (record,) = federation.run(server, driver, rounds=1)
    assert record.dropped == 0

    def with_body(reply, body):
        return Reply(Reply.decode(reply).ticket, "answer", body).encode()

    def flipped(name, stage, reply):
        body = bytearray(Reply.decode(reply).body)
        body[-1] ^= name == "a"
        return with_body(reply, bytes(body)) if stage == "sealed" else reply

    def older(name, stage, reply):
        old = next(each for at, each in kept["a"] if at == "sealed")
        return with_body(reply, Reply.decode(old).body) if (name, stage) == ("a", "sealed") else reply

    def crossed(name, stage, reply):
        other = next(each for at, each in kept["b"] if at == "sealed")
        return with_body(reply, Reply.decode(other).body) if (name, stage) == ("a", "sealed") else reply

    for round_, lie in enumerate((flipped, older, crossed), 2):
        three.made.lie = lie
        (record,) = federation.run(server, driver, rounds=round_)
        assert [(dropout.client, dropout.reason) for dropout in record.dropouts] == [("a", "refused")]
    three.made.lie = one
    (record,) = federation.run(server, driver, rounds=5)
    assert record.dropped == 0


def test_what_is_not_sealed_is_refused(three):
    host = three.made["a"]
    hello = Envelope("hello")
    assert Reply.decode(host.handle(hello.encode())) == Reply(hello.ticket("a"), "answer", b"a")
    for envelope in (Envelope("answer", b"plan"), Envelope("advertise")):
        reply = Reply.decode(host.handle(envelope.encode()))
        assert (reply.status, reply.ticket) == ("refused", envelope.ticket("a"))
        assert "takes what is sealed to it alone" in reply.text
    for envelope in (
        Envelope("sealed", request=bytes(40), package=bytes(100)),
        Envelope("sealed"),
        Envelope("provision", request=bytes(32), package=bytes(100)),
        Envelope("provision"),
        Envelope("attest"),
    ):
        assert Reply.decode(host.handle(envelope.encode())).status in ("refused", "failed"), envelope
    assert Reply.decode(host.handle(b"junk")).status == "malformed"
    assert next(federation.run(server_of(), three.driver(), rounds=1)).dropped == 0


# -- what becomes of it -----------------------------------------------------------------------------------


def test_more_data_than_memory_is_killed_and_said(run, bundle, tmp_path, monkeypatch, capsys):
    host = run.host(setup=Setup(bundle.folder, limits=Limits(45_000_000)))
    much = np.zeros((700_000, 1, 8, 8), np.uint8)
    given = provisioning("a", bundle.folder, much, np.zeros(len(much), np.int64), SERVER.public)
    with pytest.raises(SecurityError, match=r"the worker has ended: memory \(status 137, peak 4[45]\.. MB\)"):
        provision(host.handle, given, run.verifier, [host.measurement])
    assert host.last.reason == "memory"
    driver, server = run.driver(), server_of()
    (record,) = federation.run(server, driver, rounds=1)  # a new one was started, and has nothing
    assert "has not provisioned it" in record.dropouts[0].text

    # What fits, by the owner's command.
    monkeypatch.setattr(device, "relay", lambda path, data, seconds: host.handle(data))
    (tmp_path / "manifest").write_bytes(host.manifest.encode())
    x, y = samples("a")
    np.savez(tmp_path / "data.npz", x=x[:, 0], y=y)
    words = ["--trust", f"software:{run.root.public.hex()}", "--manifest", tmp_path / "manifest"]
    words += ["--name", "a", "--listen", "socket", "--bundle", bundle.folder]
    words += ["--data", tmp_path / "data.npz", "--server", SERVER.public.hex()]
    assert command("provision", *words) == 0
    assert f"a has {len(y)} samples; assurance of what holds them: software" in capsys.readouterr().out
    with pytest.raises(SecurityError, match="it takes no other"):
        command("provision", *words)
    assert next(federation.run(server, driver, rounds=2)).dropped == 0


def kill(host):
    (pid,) = (p for p in host.process.pids if "bwrap" not in Path(f"/proc/{p}/comm").read_text())
    os.kill(pid, 9)


def test_workers_with_a_state_sum_in_secret_and_go_on_when_they_are_killed(run, bundle, tmp_path):
    summed, seal, settings = secured()
    for name in NAMES:
        state = {"state": tmp_path / f"state-{name}", "root": root_in(tmp_path / f"root-{name}")}
        run.host(name, **state)
    trusted = {name: SoftwareVerifier(host._root.public) for name, host in run.made.items()}

    class Each:
        """A verifier for workers with a root each, as counters want it."""

        def check(self, evidence, expected):
            for verifier in trusted.values():
                with contextlib.suppress(AttestationError):
                    return verifier.check(evidence, expected)
            raise AttestationError("nobody's evidence")

    run.verifier = Each()
    for name, host in run.made.items():
        run.give(host, seal=settings(name))
    server, driver = server_of(summed()), run.driver()
    records = list(federation.run(server, driver, rounds=3, forgiving=False))
    assert [record.dropped for record in records] == [0] * 3
    assert bits(server) == open_bits(bundle, 3, summed(), seal)
    counter = run.made["a"]._root.counter()
    keys = run.made["a"].keys
    kill(run.made["a"])
    records = list(federation.run(server, driver, rounds=7))
    assert records[-1].dropped == 0  # after the session's keys were agreed on anew
    assert run.made["a"].keys != keys
    assert run.made["a"].last.reason == "killed"
    assert run.made["a"]._root.counter() > counter

    # What it answered it does not answer again, though it has started anew and the server has too.
    kill(run.made["a"])
    again = server_of(summed())
    (record,) = federation.run(again, run.driver(), rounds=1)
    assert record.total is None
    assert any("asked for again" in dropout.text for dropout in record.dropouts)


def test_a_tpm_vouches_for_a_worker_and_for_its_state(run, tmp_path):
    """The simulator's: its quote, the key that it keeps, its counter."""
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    state = tmp_path / "state"
    with simulator() as tcti:
        root = TpmRoot(tcti, tmp_path)
        run.verifier = TpmVerifier(root.public)
        assert run.give(run.host(root=root, state=state)).kind == "tpm2"
        assert next(federation.run(server_of(), run.driver(), rounds=1)).dropped == 0
        assert sealed_at((state / "state").read_bytes()) == root.counter()


def test_a_state_that_is_put_back_is_refused(run, bundle, tmp_path):
    _, _, settings = secured()
    host = run.host("a", state=tmp_path / "state")
    run.give(host, seal=settings("a"))
    old = (tmp_path / "state" / "state").read_bytes()
    host.close()
    run.host("a", state=tmp_path / "state").close()  # each start seals it anew
    (tmp_path / "state" / "state").write_bytes(old)
    with pytest.raises(AttestationError, match="rolled back"):
        run.host("a", state=tmp_path / "state")


# -- what the host's process sees -------------------------------------------------------------------------

HOST = """
import argparse, sys
from baffle.commands import enclave
from baffle.enclave import host, worker

class Recorded(worker.Pipe):
    '''Everything that passes between host and worker, kept in a file.'''

    def send(self, kind, *parts):
        super().send(kind, *parts)
        for part in parts:
            LOG.write(part)

    def receive(self):
        kind, frame = super().receive()
        LOG.write(frame)
        return kind, frame

LOG, host.Pipe = open(sys.argv.pop(1), "wb", buffering=0), Recorded
parser = argparse.ArgumentParser()
enclave.arguments(parser)
raise SystemExit(enclave.run(parser.parse_args()))
"""


def memory_of(pid):
    """All that a process can read of its own memory, region by region."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if "r" not in line.split()[1] or line.rstrip().endswith(
                ("[vvar]", "[vsyscall]", "[vvar_vclock]")
            ):
                continue
            with contextlib.suppress(OSError):
                memory.seek(start)
                yield memory.read(end - start)


def open_files_of(pid):
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if entry.is_file():
                yield entry.read_bytes()


def found_in(parts, canaries):
    found, tail = set(), b""
    for part in parts:
        found |= {what for what, canary in canaries.items() if canary in part or canary in tail + part[:64]}
        tail = part[-64:]
    return found


def command(*words):
    parser = argparse.ArgumentParser()
    enclave.arguments(parser)
    return enclave.run(parser.parse_args([str(word) for word in words]))


def test_the_host_sees_ciphertext_alone(bundle, tmp_path, capsys):
    """A host in a process of its own, by the command; its memory, files, pipes and socket are searched."""
    folder = Path(tempfile.mkdtemp(prefix="host-"))  # a socket's path is short
    run = subprocess.run(
        [sys.executable, "-c", HOST, os.devnull, "root", "--root", f"software:{folder}/root"],
        capture_output=True,
        text=True,
        check=True,
    )
    trust = bytes.fromhex(run.stdout.split(":")[1])
    rng = np.random.default_rng(17)
    x, y = rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8), rng.integers(0, 10, 30)
    name = "canary-of-a-name"
    names = ["b", "c", name]
    summed, seal, settings = secured(names)
    log, sock = folder / "pipes", folder / "s"
    arguments = ["run", "--root", f"software:{folder}/root", "--name", name, "--bundle", str(bundle.folder)]
    arguments += ["--listen", str(sock), "--state", str(folder / "state")]
    process = subprocess.Popen(
        [sys.executable, "-c", HOST, str(log), *arguments], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert "measurement" in process.stdout.readline()
        assert "listens at" in process.stdout.readline()
        manifest = folder / "manifest"
        command("measure", "--bundle", bundle.folder, "--manifest", manifest)
        measurement = Manifest.decode(manifest.read_bytes()).measurement
        asked = ["--trust", f"software:{trust.hex()}", "--manifest", manifest]
        asked += ["--name", name, "--listen", sock]
        assert command("verify", *asked) == 0
        assert f"{measurement.hex()} (assurance: software)" in capsys.readouterr().out
        moved = []

        class Wire:
            """Two clients without walls, and the socket of the host."""

            def __init__(self):
                self.open = {
                    each: Endpoint(open_client(bundle, each, seal=seal(each)))
                    for each in names
                    if each != name
                }

            def names(self):
                return names

            def exchange(self, data):
                reply = device.relay(sock, data, 60)
                moved.extend((data, reply))
                return reply

            def ask(self, stage, requests, deadline):
                for each in requests:
                    yield each, self.exchange(requests[each])

        class Both(Wire):
            def ask(self, stage, requests, deadline):
                for each in sorted(requests):
                    if each in self.open:
                        yield each, self.open[each].handle(requests[each])
                    else:
                        replies.extend(driver.ask(stage, {each: requests[each]}, deadline))
                        yield replies[-1]

        carrier, verifier, replies = Wire(), SoftwareVerifier(trust), []
        given = provisioning(name, bundle.folder, x, y, SERVER.public, seal=settings(name))
        provision(carrier.exchange, given, verifier, [measurement])
        server = server_of(summed(), seed=4)  # the bundle's own weights are the host's to see
        driver = EnclaveDriver(carrier, verifier, [measurement], SERVER)
        first = server.model()
        records = list(federation.run(server, Both(), rounds=3, forgiving=False))
        assert [record.dropped for record in records] == [0, 0, 0]
        alone = baffle.Client(name, NumpyRuntime(bundle), Rows(x, y), seed=bytes(32))
        answer = alone.answer(records[0].plan.encode(), first.encode())
        slopes = baffle.RoundResult.decode(answer).values
        masked = max((Reply.decode(reply).body for _, reply in replies), key=len)
        canaries = {
            "an image": x[7].tobytes()[:24],
            "another image": x[29].tobytes()[-24:],
            "labels": y.tobytes()[:64],
            "weights": first.weights[50:56].tobytes(),
            "later weights": server.model().weights[60:66].tobytes(),
            "slopes": slopes[:4].tobytes(),
            "masked slopes": masked[-32:],
            "the server's key": SERVER.to_bytes(),
            "the client's key": summed.keys[name].to_bytes(),
            "the client's key, as it was sent": summed.keys[name].to_bytes().hex().encode(),
        }
        known = {"the name": name.encode(), "the measurement": measurement}
        assert len({*canaries.values()}) == len(canaries)
        # The search finds what is there: here, all of it lies in the open; there, what the host knows.
        assert found_in(memory_of(os.getpid()), canaries) == canaries.keys()
        assert found_in(memory_of(process.pid), canaries | known) == known.keys()
        assert found_in(open_files_of(process.pid), canaries) == set()
        assert found_in(moved, canaries) == set()
        assert log.stat().st_size > sum(map(len, moved)) / 2
        assert found_in([log.read_bytes()], canaries | known) <= known.keys()
        kept = [path.read_bytes() for path in (folder / "state").iterdir() if path.is_file()]
        assert max(map(len, kept)) > x.nbytes
        assert found_in(kept, canaries) == set()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


# -- the command -----------------------------------------------------------------------------------------


def test_what_the_owner_insists_on_goes_into_the_seal(tmp_path):
    """The worker's seal is the one that a device would make of the same config."""
    from baffle.identities import make_identity
    from baffle.membership import device_seal

    keys = {name: make_identity(tmp_path / name) for name in NAMES}
    roster = "".join(f"{name} {key.public.hex()}\n" for name, key in keys.items())
    (tmp_path / "roster").write_text(roster)
    noise = "privacy = 'client'\nclip-norm = 1.0\nnoise-multiplier = 0.7\n"
    (tmp_path / "job.toml").write_text(f"secure = true\nseed = 5\n{noise}")
    parser = argparse.ArgumentParser()
    enclave.arguments(parser)
    words = ["provision", "--identity", "a", "--roster", "roster", "--config", "job.toml"]
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words]
    options = parser.parse_args(words)
    config = enclave._config(options)
    made, expected = enclave._seal(options, config, "a"), device_seal(config, "a", keys["a"])
    assert made["policy"] == dataclasses.asdict(expected.policy)
    assert made["roster"] == {name: key.public.hex() for name, key in keys.items()}
    assert bytes.fromhex(made["identity"]) == keys["a"].to_bytes()
    assert bytes.fromhex(made["job"]) == expected.job
    assert (made["least_noise"], made["levels"]) == (0.7, expected.levels)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "--name", "a", "--bundle", "b"], "needs --listen or --drop"),
        (["run", "--bundle", "b"], "run needs --name"),
        (["measure"], "measure needs --bundle"),
        (["measure", "--bundle", "b", "--limit", "0"], "--limit 0"),
        (["root", "--root", "here"], "software:… or tpm:…"),
        (["root", "--root", "tpm:device"], "a TPM is there already"),
        (["verify", "--trust", "software:00"], "64 hexadecimal digits"),
        (["provision", "--name", "a", "--bundle", "b", "--server", "key"], "64 hexadecimal digits"),
    ],
)
def test_options_that_do_not_go_together(words, text):
    with pytest.raises(ConfigError, match=text):
        command(*words)


# -- the benchmark ----------------------------------------------------------------------------------------


def test_a_slice_of_the_benchmark_and_the_page_it_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    enclave = importlib.import_module("enclave")  # benchmarks/enclave.py
    (row,) = enclave.quickly().values()
    assert 15 < row["group_mb"] <= row["limit_mb"] == 90
    assert 30 < row["resident_mb"] < 90
    text = enclave.PAGE.read_text(encoding="utf-8")
    assert enclave.page(text) == text, "python benchmarks/enclave.py --page"
    for row in json.loads(enclave.RESULT.read_text())["rows"].values():  # issue 6: the whole worker
        assert max(row["group_mb"], row["resident_mb"]) <= row["limit_mb"] == 90
