"""Clients behind folders: the bits of the simulation; files that are torn, twice, stale, or another's."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle import drop, durable
from baffle.client import Client
from baffle.downlink import Holding
from baffle.drop import Drop, serve_drop
from baffle.endpoint import Endpoint
from baffle.errors import ConfigError, DataError, MessageError
from baffle.estimator import SteinEstimator
from baffle.exchange import Envelope, FilePackage, Reply
from baffle.federation import run
from baffle.optimizers import Portable
from baffle.plan import ModelMessage
from baffle.server import Server
from baffle.simulation import simulate
from tests.contracts.slope import Points, Slope
from tests.test_restarts import Disk

K = 6
SIZES = {"anna": 11, "bo": 5, "cleo": 24}


class Counted(Slope):
    """Counts measurements, and may wait in one."""

    def __init__(self):
        self.measured, self.before = 0, lambda: None

    def losses(self, *arguments):
        self.before()
        self.measured += 1
        return super().losses(*arguments)


def client(name, runtime=None):
    seed = sorted(SIZES).index(name)
    return Client(name, runtime or Slope(), Points(SIZES[name], seed), seed=1)


def server(**options):
    return Server(Slope(), SteinEstimator(K, 1e-3), **{"seed": 2, "batch_size": 4, **options})


@contextlib.contextmanager
def serving(folder, *endpoints):
    """Endpoints in threads of their own, answering; what they complain of."""
    said, done, ready = [], threading.Event(), []
    threads = []
    for endpoint in endpoints:
        there = threading.Event()
        ready.append(there)
        arguments = {"ready": there.set, "complain": said.append, "stop": done.is_set}
        threads.append(threading.Thread(target=serve_drop, args=(endpoint, folder), kwargs=arguments))
    try:
        for thread, there in zip(threads, ready, strict=True):
            thread.start()
            assert there.wait(10)
        yield said
    finally:
        done.set()
        for thread in threads:
            thread.join(20)


def until(what, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


def envelope_for(s=None, name="anna"):
    """An envelope of the round that a server is in, and the name of its file."""
    s = s or server()
    made = Envelope("answer", s.plan().encode(), b"", s.model().encode())
    return made.encode(), f"{s.plan().round}-answer-{made.ticket(name).hex()}"


def wanted(data, name="anna"):
    return Endpoint(client(name)).handle(data)


def replies(folder, name="anna"):
    return {path.stem: path.read_bytes() for path in (folder / name / "out").glob("*.reply")}


# -- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("downlink", ["model", "float16", "update", "scalars"])
def test_the_bits_and_bytes_of_the_simulation(tmp_path, downlink):
    def made():
        return server(optimizer=lambda p: Portable(p, "adam", lr=0.01), downlink=downlink)

    here = made()
    records = list(simulate(here, [client(name) for name in SIZES], rounds=4))
    apart = made()
    with serving(tmp_path, *(Endpoint(client(name)) for name in SIZES)) as said:
        found = list(run(apart, Drop(tmp_path, least=3), rounds=4, deadline=20))
    assert np.array_equal(apart.weights, here.weights)
    assert [(r.bytes_down, r.bytes_up, r.dropped) for r in found] == [
        (r.bytes_down, r.bytes_up, 0) for r in records
    ]
    assert said == []
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {".lock"}  # nothing lies about


def test_a_second_envelope_with_the_same_ticket_is_answered_anew(tmp_path):
    """Snapshots of one length: the name of the file is the same, and the weights in it are not."""
    s = server(optimizer=lambda p: Portable(p, "sgd", lr=0.01), downlink="scalars")
    endpoint = Endpoint(client("anna"))
    with serving(tmp_path, endpoint):
        assert [r.dropped for r in run(s, Drop(tmp_path), rounds=2, deadline=20)] == [0, 0]
        endpoint._holding = Holding.first(np.zeros(20, np.float32))  # as if another job's
        found = list(run(s, Drop(tmp_path), rounds=4, deadline=20))
    assert [r.dropped for r in found] == [0, 0]


@pytest.mark.parametrize("form", ["model", "float16"])
def test_a_model_that_goes_to_a_file_gives_the_same_bits(tmp_path, form):
    from baffle.endpoint import Stored
    from baffle.runtimes.sources import StoredWeights

    class Reading(Slope):
        def losses(self, weights, *rest):
            assert isinstance(weights, StoredWeights)
            return super().losses(weights[0 : len(weights)], *rest)

        def loss(self, weights, batch):
            whole = weights[0 : len(weights)]
            return super().loss(whole, batch)

    here = server(downlink=form)
    list(simulate(here, [client("anna")], rounds=3))
    apart = server(downlink=form)
    (tmp_path / "state").mkdir()
    stored = Stored(tmp_path / "state" / "weights.bin")
    with serving(tmp_path / "d", Endpoint(client("anna", Reading()), receiver=stored)):
        list(run(apart, Drop(tmp_path / "d"), rounds=3, deadline=20))
    assert np.array_equal(apart.weights, here.weights)


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda w: ModelMessage(w + 1).encode(), "digest"),
        (lambda w: ModelMessage(w[:-1]).encode(), "digest"),
        (lambda w: ModelMessage(w).encode()[:-4], "digest"),
        (lambda w: ModelMessage(w).encode() + b"\0", "digest"),
        (lambda w: ModelMessage(w).encode()[:6] + struct.pack("<Q", 2**61) + w.tobytes(), "digest"),
        (lambda w: ModelMessage(w).encode()[:-4] + b"\0\0\xc0\x7f", "malformed"),
        (lambda w: b"BFFL\x01\x63" + w.tobytes(), "malformed"),
        (lambda w: b"", "digest"),
    ],
)
def test_what_a_file_of_weights_is_not_made_of(tmp_path, spoil, status):
    from baffle.endpoint import Stored

    s, found = server(), []
    model = spoil(s.model().weights)
    data = Envelope("answer", s.plan().encode(), b"", model).encode()
    if status == "digest" and not model:  # what the client was built with is the plan's
        status = "answer"
    for receiver in (None, Stored(tmp_path / "weights.bin")):
        found.append(Reply.decode(Endpoint(client("anna"), receiver=receiver).handle(data)).status)
    assert found[1] == status
    assert found[0] in (status, "malformed")
    assert not list(tmp_path.glob(".*"))


# -- files of envelopes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_bytes", [0, 1 << 17])
def test_an_envelope_is_read_where_it_lies(tmp_path, request_bytes):
    whole = Envelope("answer", b"PLAN", bytes(request_bytes), os.urandom(5000))
    path = tmp_path / "e"
    path.write_bytes(whole.encode())
    file = os.open(path, os.O_RDONLY)
    try:
        found = Envelope.read(file)
        assert isinstance(found.package, FilePackage)
        assert (found.stage, found.plan, found.request) == (whole.stage, whole.plan, whole.request)
        assert found.ticket("anna") == whole.ticket("anna")
        assert found.package[:] == whole.package
        assert found.package[7:4000] == whole.package[7:4000]
        loaded = found.package.load()
        assert loaded == whole.package
        assert loaded.readonly
        assert np.frombuffer(loaded, "<f4", 100, 14).flags.aligned
        assert found.encode() == whole.encode()
    finally:
        os.close(file)


SOUND = Envelope("answer", b"PLAN", b"ask", b"weights").encode()


@given(
    st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=80).map(lambda data: b"BFFL\x01\x0b" + data),
        st.tuples(st.integers(0, len(SOUND)), st.binary(max_size=9)).map(lambda at: SOUND[: at[0]] + at[1]),
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)).map(
            lambda at: SOUND[: at[0]] + bytes([at[1]]) + SOUND[at[0] + 1 :]
        ),
    )
)
def test_a_file_is_an_envelope_where_its_bytes_are(data):
    file = os.memfd_create("envelope")
    try:
        os.write(file, data)
        try:
            wanted = Envelope.decode(data)
        except MessageError:
            with pytest.raises(MessageError):
                Envelope.read(file)
        else:
            assert Envelope.read(file).encode() == wanted.encode() == data
            assert Envelope.read(file).ticket("anna") == wanted.ticket("anna")
    finally:
        os.close(file)


def test_a_model_in_memory_is_not_copied_again(tmp_path):
    weights = np.linspace(0, 1, 1 << 16, dtype=np.float32)
    path = tmp_path / "e"
    path.write_bytes(Envelope("answer", b"", b"", ModelMessage(weights).encode()).encode())
    file = os.open(path, os.O_RDONLY)
    loaded = Envelope.read(file).package.load()
    os.close(file)
    found = ModelMessage.decode(loaded).weights
    assert np.shares_memory(found, np.frombuffer(loaded, np.uint8))
    assert not found.flags.writeable
    assert np.array_equal(found, weights)
    writable = np.concatenate((np.zeros(2, np.uint8), np.frombuffer(loaded, np.uint8)))
    copied = ModelMessage.decode(writable.data[2:]).weights  # somebody may write to that
    assert not np.shares_memory(copied, writable)
    apart = np.concatenate((np.zeros(1, np.uint8), writable))
    moved = ModelMessage.decode(apart.data[3:].toreadonly()).weights  # they lie badly there
    assert moved.flags.aligned
    assert np.array_equal(moved, weights)


# -- a client's side ---------------------------------------------------------------------------------------


def test_half_an_envelope_is_waited_for(tmp_path):
    data, stem = envelope_for()
    with serving(tmp_path, Endpoint(client("anna"))) as said:
        path = tmp_path / "anna" / "in" / f"{stem}.envelope"
        path.write_bytes(data[: len(data) // 2])
        time.sleep(0.3)
        assert replies(tmp_path) == {}
        with path.open("ab") as file:
            file.write(data[len(data) // 2 :])
        assert until(lambda: replies(tmp_path)) == {stem: wanted(data)}
    assert said == []


def test_what_stays_torn_is_malformed_until_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(drop, "_SECONDS_TO_SETTLE", 0.1)
    data, stem = envelope_for()
    with serving(tmp_path, Endpoint(client("anna"))):
        path = tmp_path / "anna" / "in" / f"{stem}.envelope"
        path.write_bytes(data[:-1])
        found = Reply.decode(until(lambda: replies(tmp_path))[stem])
        assert found.status == "malformed"
        path.write_bytes(data)
        until(lambda: replies(tmp_path)[stem] == wanted(data))


def test_an_envelope_of_another_client_is_not_measured_for(tmp_path, monkeypatch):
    monkeypatch.setattr(drop, "_SECONDS_TO_SETTLE", 0.1)
    data, stem = envelope_for(name="bo")
    runtime = Counted()
    with serving(tmp_path, Endpoint(client("anna", runtime))):
        (tmp_path / "anna" / "in" / f"{stem}.envelope").write_bytes(data)
        assert Reply.decode(until(lambda: replies(tmp_path))[stem]).status == "malformed"
    assert runtime.measured == 0


def test_an_envelope_that_comes_twice_is_measured_once(tmp_path):
    data, stem = envelope_for()
    runtime = Counted()
    with serving(tmp_path, Endpoint(client("anna", runtime))):
        path = tmp_path / "anna" / "in" / f"{stem}.envelope"
        path.write_bytes(data)
        until(lambda: replies(tmp_path))
        once = runtime.measured
        path.write_bytes(data)  # carried here again, the reply still there
        time.sleep(0.3)
        path.unlink()
        (tmp_path / "anna" / "out" / f"{stem}.reply").unlink()
        path.write_bytes(data)  # and again, when it has been taken away
        assert until(lambda: replies(tmp_path)) == {stem: wanted(data)}
    assert runtime.measured == once


def test_the_newest_round_comes_first_and_older_ones_do_no_harm(tmp_path):
    s, order, runtime = server(), [], Counted()
    laid = [envelope_for(s)]
    for _ in range(11):
        s.skip()
        laid.append(envelope_for(s))
    home = tmp_path / "anna"
    (home / "in").mkdir(parents=True)
    for data, stem in (laid[2], laid[11], laid[9]):
        (home / "in" / f"{stem}.envelope").write_bytes(data)
    (home / "in" / "notes.txt").write_text("carried along")
    (home / "in" / "3-answer-short.envelope").write_text("no name of ours")
    runtime.before = lambda: order.append(sorted(int(stem.split("-")[0]) for stem in replies(tmp_path)))
    with serving(tmp_path, Endpoint(client("anna", runtime))):
        found = until(lambda: len(replies(tmp_path)) == 3 and replies(tmp_path))
    assert order == [[], [11], [9, 11]]
    assert found == {stem: wanted(data) for data, stem in (laid[2], laid[11], laid[9])}


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_passed_over(tmp_path, kind):
    data, stem = envelope_for()
    home = tmp_path / "anna" / "in"
    home.mkdir(parents=True)
    (tmp_path / "secret").write_bytes(data)
    path = home / f"{stem}.envelope"
    make = {"link": lambda p: p.symlink_to(tmp_path / "secret"), "pipe": os.mkfifo, "folder": os.mkdir}[kind]
    make(path)
    other, other_stem = envelope_for((s := server(), s.skip())[0])
    with serving(tmp_path, Endpoint(client("anna"))) as said:
        (home / f"{other_stem}.envelope").write_bytes(other)
        until(lambda: other_stem in replies(tmp_path))
        until(lambda: said)
        assert set(replies(tmp_path)) == {other_stem}
    assert "passed over" in said[0]


def test_a_second_process_for_one_name_is_refused_and_other_names_are_not(tmp_path):
    with serving(tmp_path, Endpoint(client("anna")), Endpoint(client("bo"))):
        with pytest.raises(DataError, match="another client anna answers in"):
            serve_drop(Endpoint(client("anna")), tmp_path)
        for name in ("anna", "bo"):
            data, stem = envelope_for(name=name)
            (tmp_path / name / "in" / f"{stem}.envelope").write_bytes(data)
            assert until(lambda name=name: replies(tmp_path, name)) == {stem: wanted(data, name)}
    serve_drop(Endpoint(client("anna")), tmp_path, stop=lambda: True)  # let go, it can


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\0b", "x" * 201])
def test_names_that_no_folder_can_have(tmp_path, name):
    made = client("anna")
    made.name = name
    with pytest.raises(ConfigError, match="a folder has this name"):
        serve_drop(Endpoint(made), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot use .*Not a directory"):
        serve_drop(Endpoint(client("anna")), tmp_path / "file")


@pytest.fixture
def disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    made = Disk(mount)
    yield made
    made.end()


def test_a_full_disk_loses_no_answer(disk):
    data, stem = envelope_for()
    runtime = Counted()
    with serving(disk.path, Endpoint(client("anna", runtime))) as said:
        runtime.before = disk.fill  # it was there when the envelope came
        (disk.path / "anna" / "in" / f"{stem}.envelope").write_bytes(data)
        until(lambda: said)
        once = runtime.measured
        time.sleep(0.3)
        assert replies(disk.path) == {}
        disk.empty()
        assert until(lambda: replies(disk.path)) == {stem: wanted(data)}
    assert runtime.measured == once
    assert len(said) == 1
    assert "No space left on device; it is tried again" in said[0]
    assert not list((disk.path / "anna" / "out").glob(".*.part"))


def test_a_full_disk_keeps_the_answer_that_was_made_and_makes_no_other(disk):
    """Older envelopes lie there too: whoever seals its answers could not make the first one again."""
    s = server()
    older = envelope_for(s)
    s.skip()
    newer = envelope_for(s)
    for way in ("in", "out"):
        (disk.path / "anna" / way).mkdir(parents=True)
    for data, stem in (older, newer):
        (disk.path / "anna" / "in" / f"{stem}.envelope").write_bytes(data)
    runtime = Counted()
    runtime.before = disk.fill
    with serving(disk.path, Endpoint(client("anna", runtime))) as said:
        until(lambda: said)
        time.sleep(0.3)
        assert runtime.measured == 1
        runtime.before = lambda: None
        disk.empty()
        until(lambda: len(replies(disk.path)) == 2)
    assert runtime.measured == 2


def test_a_folder_that_is_carried_away_meanwhile(tmp_path):
    """It is gone when the measurement ends, and comes back: the answer is still there, made once."""
    data, stem = envelope_for()
    runtime, home = Counted(), tmp_path / "anna"
    away = []

    def carry():
        if not away:
            away.append(home.rename(tmp_path / "away"))

    with serving(tmp_path, Endpoint(client("anna", runtime))) as said:
        runtime.before = carry
        (home / "in" / f"{stem}.envelope").write_bytes(data)
        until(lambda: said)
        once = runtime.measured
        away[0].rename(home)
        assert until(lambda: replies(tmp_path)) == {stem: wanted(data)}
    assert runtime.measured == once


WRITER = """
    import os, signal, sys
    from pathlib import Path
    from baffle import durable

    def parts():
        yield b"half"
        os.kill(os.getpid(), signal.SIGKILL)

    durable.write(Path(sys.argv[1]), parts())
"""


def test_who_is_killed_while_writing_leaves_nothing_that_is_read(tmp_path):
    home = tmp_path / "anna" / "out"
    home.mkdir(parents=True)
    data, stem = envelope_for()
    path = home / f"{stem}.reply"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(WRITER), str(path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    (left,) = home.iterdir()
    assert left.name.endswith(".part")
    with serving(tmp_path, Endpoint(client("anna"))):
        assert not left.exists()
        (tmp_path / "anna" / "in" / f"{stem}.envelope").write_bytes(data)
        assert until(lambda: replies(tmp_path)) == {stem: wanted(data)}


def test_what_is_written_again_is_the_old_or_the_new(tmp_path):
    path = tmp_path / "file"
    durable.write(path, [b"old"])

    def torn():
        yield b"new"
        raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        durable.write(path, torn())
    assert path.read_bytes() == b"old"
    durable.write(path, [b"n", b"ew"])
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# -- the server's side -------------------------------------------------------------------------------------


def ask(folder, data, deadline=5.0, name="anna"):
    return dict(Drop(folder).ask("answer", {name: data}, deadline))[name]


@pytest.fixture
def home(tmp_path):
    for way in ("in", "out"):
        (tmp_path / "anna" / way).mkdir(parents=True)
    return tmp_path / "anna"


def is_whole(path):
    """Whether it is no left-over of a test, which are short. The server may take it away meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size > 150
    return False


class By(threading.Thread):
    """Does something to the folder once the envelope is there."""

    def __init__(self, home, do):
        super().__init__()
        self.home, self.do = home, do
        self.start()

    def run(self):
        (path,) = until(lambda: [p for p in (self.home / "in").glob("*.envelope") if is_whole(p)])
        self.do(self.home / "out" / f"{path.stem}.reply")


def test_who_does_not_reply_is_late_and_asked_no_more(home):
    outcome = ask(home.parent, envelope_for()[0], 0.2)
    assert (outcome.reason, str(outcome)) == ("late", "no reply within 0.2 s")
    assert not list((home / "in").iterdir())


def test_half_a_reply_is_waited_for(home):
    data, _ = envelope_for()
    reply = wanted(data)

    def write(path):
        path.write_bytes(reply[:30])
        time.sleep(0.3)
        path.write_bytes(reply)

    by = By(home, write)
    assert ask(home.parent, data) == reply
    by.join()


@pytest.mark.parametrize("junk", [b"", b"junk", Reply(bytes(16), "answer", b"another's").encode()])
def test_junk_is_handed_on_once_it_stays(home, monkeypatch, junk):
    monkeypatch.setattr(drop, "_SECONDS_TO_SETTLE", 0.1)
    by = By(home, lambda path: path.write_bytes(junk))
    assert ask(home.parent, envelope_for()[0]) == junk
    by.join()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_reply_that_is_no_file_is_malformed(home, kind):
    make = {"link": lambda p: p.symlink_to("/etc/hostname"), "pipe": os.mkfifo, "folder": os.mkdir}[kind]
    by = By(home, make)
    assert ask(home.parent, envelope_for()[0]).reason == "malformed"
    by.join()


def test_what_older_rounds_left_is_taken_away_and_never_taken_for_a_reply(home):
    data, stem = envelope_for()
    old = ("7-answer-" + "0" * 32, stem)
    for way, end in (("in", "envelope"), ("out", "reply")):
        for name in old:
            (home / way / f"{name}.{end}").write_bytes(Reply(bytes(16), "answer", b"stale").encode())
    (home / "in" / ".3-x.envelope.1.part").write_bytes(b"")
    (home / "out" / "mine.txt").write_text("not ours")
    seen = []

    def look(path):
        seen.extend(p.name for p in home.rglob("*.*"))
        path.write_bytes(wanted(data))

    by = By(home, look)
    assert ask(home.parent, data) == wanted(data)
    by.join()
    assert sorted(seen) == [f"{stem}.envelope", "mine.txt"]
    assert [p.name for p in home.rglob("*.*")] == ["mine.txt"]


def test_a_folder_that_is_gone_or_full_costs_its_client_alone(home, disk):
    (home.parent / "bo").symlink_to(disk.path)
    for way in ("in", "out"):
        (disk.path / way).mkdir()
    disk.fill()
    s = server()
    requests = {name: envelope_for(s, name)[0] for name in ("anna", "bo", "cleo")}
    by = By(home, lambda path: path.write_bytes(wanted(requests["anna"])))
    outcomes = list(Drop(home.parent).ask("answer", requests, 5.0))
    by.join()
    assert [name for name, _ in outcomes] == ["anna", "bo", "cleo"]
    assert outcomes[0][1] == wanted(requests["anna"])
    assert [(o.reason, str(o).split(": ")[1]) for _, o in outcomes[1:]] == [
        ("gone", "No space left on device"),
        ("gone", "No such file or directory"),
    ]


def test_two_servers_do_not_share_a_folder(home):
    by = By(home, lambda path: path.write_bytes(wanted(data)))
    data, _ = envelope_for()
    first = Drop(home.parent).ask("answer", {"anna": data}, 5.0)
    assert next(first)[0] == "anna"
    with pytest.raises(DataError, match="another server uses"):
        ask(home.parent, data)
    first.close()
    by.join()
    assert ask(home.parent, data, 0.05).reason == "late"


def test_who_can_be_asked(tmp_path):
    assert Drop(tmp_path / "nowhere", patience=0).names() == []
    for path in ("anna/in", "anna/out", "bo/in", ".x/in", ".x/out"):
        (tmp_path / path).mkdir(parents=True)
    assert Drop(tmp_path, patience=0).names() == ["anna"]
    (tmp_path / "bo" / "out").mkdir()
    assert Drop(tmp_path, least=2).names() == ["anna", "bo"]


def test_a_round_over_both_ways_of_the_stage_without_a_plan(tmp_path):
    from baffle.exchange import HELLO

    with serving(tmp_path, Endpoint(client("anna"))):
        reply = dict(Drop(tmp_path).ask(HELLO, {"anna": Envelope(HELLO).encode()}, 5.0))["anna"]
    assert Reply.decode(reply).body == b"anna"
