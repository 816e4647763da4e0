"""FLARE with real processes on this machine: a provisioned server, certified sites, devices behind sockets.

The oracle is the same job in one process. Whatever is killed, the sums are those of who answered.
"""

from __future__ import annotations

import gc
import json
import shutil
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("nvflare")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "flare"))

from federation import Federation, kit, provision
from nvflare.collab.api.context import set_call_context
from nvflare.collab.api.exceptions import CollabCallError, RunAborted

from baffle.checkpoint import load_checkpoint
from baffle.errors import ConfigError, DataError, DeliveryError
from baffle.flare import SETTINGS, FlareDriver, Site, prepare, settings_of, write_job
from baffle.job import build
from baffle.runs import RunFolder
from baffle.simulation import simulate
from baffle.training import train

# FLARE's own: sockets that it leaves to the collector, which is called while this holds.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


BASE = {"data": "digits", "model": "mlp", "clients": 4, "threads": 1, "directions": 20}


def settings(folder: Path, **more: object) -> Path:
    path = folder / "given.toml"
    lines = (f"{name.replace('_', '-')} = {json.dumps(value)}\n" for name, value in (BASE | more).items())
    path.write_text("".join(lines))
    return path


def trained(federation: Federation, run: str, timeout: float = 90) -> RunFolder:
    assert federation.finish(federation.submit(run), timeout) == "FINISHED:COMPLETED"
    return RunFolder.open(federation.runs / run)


def same_weights(run: RunFolder, other: RunFolder) -> None:
    for which in ("final", "ema"):
        assert run.load_weights(which).tobytes() == other.load_weights(which).tobytes()


@pytest.mark.slice
def test_same_bits_as_in_one_process(tmp_path):
    path = settings(tmp_path, clients=2, rounds=8, dropout=0.3)
    with Federation(tmp_path / "flare", path, within=True) as federation:
        only_certified_sites_are_let_in(federation, tmp_path / "other")
        run = trained(federation, "a")
        assert federation.processes("server_train")
    assert not federation.processes()
    simulated = train(settings_of(path), tmp_path / "simulated", lambda _: None)
    same_weights(run, simulated)
    rows = run.metrics()
    assert [row["dropped"] for row in rows] == [row["dropped"] for row in simulated.metrics()]
    assert any("simulated" in row.get("dropouts", {}).get("answer", {}) for row in rows)


def test_secure_sums_have_the_same_bits(tmp_path):
    path = settings(tmp_path, clients=5, rounds=6, secure=True, max_dropout=0.2, dropout=0.1, seed=5)
    with Federation(tmp_path / "flare", path) as federation:
        run = trained(federation, "a")
    simulated = train(settings_of(path), tmp_path / "simulated", lambda _: None)
    same_weights(run, simulated)
    dropped = [row["dropped"] for row in run.metrics()]
    assert dropped == [row["dropped"] for row in simulated.metrics()]
    assert sum(dropped) > 0
    assert not any(row.get("aborted") for row in run.metrics())


def test_a_site_that_dies_is_left_out_and_comes_back(tmp_path):
    """kill -9: a device, a job's process, a site with its job's. All come back; then every sum is checked."""
    path = settings(tmp_path, rounds=100_000, evaluate_every=100_000, checkpoint_every=1)
    with Federation(tmp_path / "flare", path) as federation:
        job = federation.submit("a")
        run = federation.runs / "a"
        federation.wait(lambda: done(run) > 5, 90, "the first rounds")
        impostor(federation, tmp_path / "client-008")
        killed = {}

        def kill(victim: str, *words: str, again=lambda: None) -> None:
            killed[done(run)] = victim
            assert federation.kill(*words) == 1 + (words[0] == "nvflare.private")
            federation.wait(lambda: left_out(run, victim), 60, f"{victim} to be left out")
            again()
            federation.wait(lambda: back(run, victim), 90, f"{victim} to come back")
            assert federation.status(job) == "RUNNING"

        kill("client-001", "baffle device", "client-001", again=lambda: federation.start_device("client-001"))
        kill("client-002", "worker_process", "client-002")
        kill("client-003", "nvflare.private", "client-003")
        assert federation.connected() == set(federation.names)
        log = federation.log("server").read_text()
        assert "authenticated as 'client-000' but claimed endpoint 'client-008'" in log
        federation.session().abort_job(job)
        assert federation.finish(job, 60) == "FINISHED:ABORTED"

    folder = RunFolder.open(run)
    rows, said = folder.metrics(), events(run)
    assert {event["client"] for event in said if event["event"] == "client-gone"} == set(killed.values())
    named = {(e["round"], e["client"]): e["reason"] for e in said if e["event"] == "dropout"}
    assert set(named.values()) == {"gone"}
    assert {client for _, client in named} == set(killed.values())

    def absent(round_: int, name: str) -> bool:
        victim = [v for first, v in sorted(killed.items()) if first <= round_ + 1][-1:]
        row = rows[round_]
        return (round_, name) in named or (row["participants"] < 4 and [name] == victim)

    assert all(row["participants"] >= 3 for row in rows)
    reference, interrupted = build(settings_of(path)), build(settings_of(path))
    load_checkpoint(folder.checkpoint, interrupted.server)
    rounds = interrupted.server.round
    assert rounds >= len(rows) - 1
    for record in simulate(reference.server, reference.clients, rounds=rounds, drops=absent):
        row = rows[record.round]
        assert 4 - record.dropped == row["participants"] - row["dropped"]
    np.testing.assert_array_equal(reference.server.weights, interrupted.server.weights)


def test_a_server_that_dies_goes_on_from_its_checkpoint(tmp_path):
    """Killed in a round, with its job; the same run is submitted again. Before, a job that brings code."""
    path = settings(tmp_path, clients=2, rounds=150, evaluate_every=50, checkpoint_every=7)
    with Federation(tmp_path / "flare", path, within=True) as federation:
        code_is_refused(federation, tmp_path)
        federation.submit("a")
        federation.wait(lambda: done(federation.runs / "a") > 20, 90, "some rounds")
        assert federation.kill("nvflare.private", "localhost") >= 2
        federation.disconnect()
        before = done(federation.runs / "a")
        assert 20 < before < 150
        run = trained(federation, "a")
    resumed = [event["round"] for event in events(run.path) if event["event"] == "resume"]
    assert resumed == [before // 7 * 7] or resumed == [(before + 1) // 7 * 7]
    same_weights(run, train(settings_of(path), tmp_path / "simulated", lambda _: None))


def code_is_refused(federation: Federation, folder: Path) -> None:
    """By the server first, and its sites say the same; what components a job may name is in a list."""
    federation.session()
    federation.wait(lambda: federation.connected() == set(federation.names), 60, "all sites")
    job, witness = write_job(folder / "job", federation.settings, "b"), folder / "witness"
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "stray.py").write_text(
        f"open({str(witness)!r}, 'w').close()\nfrom baffle.flare import Site, Training\n"
    )
    for end in ("server", "client"):
        config = job / "app" / "config" / f"config_fed_{end}.json"
        config.write_text(config.read_text().replace("baffle.flare.Training", "stray.Training"))
        config.write_text(config.read_text().replace('baffle.flare.Site"', 'stray.Site"'))
    shipped = federation.session().submit_job(str(job))
    assert federation.finish(shipped, 60) == "FINISHED:FAILED_TO_RUN"
    assert "server: BYOC not permitted" in federation.session().get_job_meta(shipped)["job_deploy_detail"]
    shutil.rmtree(job / "app" / "custom")  # the same, of a module that would have to be there
    assert federation.finish(federation.session().submit_job(str(job)), 60) != "FINISHED:COMPLETED"
    assert "'stray.Training' at config path" in federation.log("server").read_text()
    for name in federation.names:
        granted = json.loads((federation.kit(name) / "local" / "authorization.json").read_text())
        assert {rights.get("byoc", "none") for rights in granted["permissions"].values()} == {"none"}
    assert not witness.exists()


# -- the driver alone, with sites that are made up --------------------------------------------------


class Made:
    """Stands for Collab's proxy of a site."""

    def __init__(self, reply=lambda envelope: envelope[::-1], mark="1"):
        self.reply, self.mark, self.calls = reply, mark, 0

    def __call__(self, timeout):
        return self

    def exchange(self, envelope, seconds, process):
        self.calls += 1
        assert process == self.mark
        reply = self.reply(envelope)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def here(self):
        return self.mark


def driver(sites, **more):
    found = FlareDriver(sites, least=len(sites), pulse=0.05, silence=0.05, **more)
    assert found.names() == sorted(sites)
    return found


def asked(of: FlareDriver, names) -> list:
    return list(of.ask("answer", {name: name.encode() for name in names}, 5.0))


@pytest.mark.slice
def test_replies_come_in_order_whoever_is_first():
    def slow(envelope):
        time.sleep(0.1)
        return b"slow"

    sites = {"b": Made(), "a": Made(slow), "c": Made()}
    assert asked(driver(sites), sites) == [("a", b"slow"), ("b", b"b"), ("c", b"c")]
    assert [site.calls for site in sites.values()] == [1, 1, 1]


@pytest.mark.slice
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CollabCallError("a", "exchange", TimeoutError("out of time")), "late"),
        (CollabCallError("a", "exchange", "no reply", cause_type="TimeoutError"), "late"),
        (CollabCallError("a", "exchange", "no device", cause_type="ConnectionError"), "gone"),
        (ValueError("of the transport"), "gone"),
        ("text", "malformed"),
    ],
)
def test_what_goes_wrong_is_named(error, reason):
    sites = {"a": Made(lambda _: error), "b": Made()}
    (_, outcome), other = asked(driver(sites), sites)
    assert isinstance(outcome, DeliveryError)
    assert (outcome.reason, other) == (reason, ("b", b"b"))


@pytest.mark.slice
@pytest.mark.parametrize("mark", ["", "2"])
def test_a_request_to_a_process_that_has_ended_is_not_waited_for(mark):
    """Nobody answers any more, or the site's next process does: the request is lost before its deadline."""
    ended = threading.Event()

    def dies(envelope):
        sites["a"].mark = mark
        ended.wait(30)
        return b"too late"

    sites = {"a": Made(dies), "b": Made()}
    found = driver(sites)
    started = time.monotonic()
    (_, outcome), _ = asked(found, sites)
    assert isinstance(outcome, DeliveryError)
    assert outcome.reason == "gone"
    assert time.monotonic() - started < 4
    sites["a"].reply = lambda envelope: b"again"
    if not mark:
        assert found.names() == ["b"]
        sites["a"].mark = "3"
    until = time.monotonic() + 10
    while found.names() != ["a", "b"] and time.monotonic() < until:
        time.sleep(0.01)
    assert asked(found, sites) == [("a", b"again"), ("b", b"b")]
    ended.set()


@pytest.mark.slice
def test_an_aborted_job_ends_what_waits():
    ended, over = threading.Event(), threading.Event()

    def slow(envelope):
        over.set()
        ended.wait(30)
        return b""

    with pytest.raises(RunAborted):
        asked(driver({"a": Made(slow)}, over=over.is_set), ["a"])
    ended.set()


@pytest.mark.slice
def test_only_the_server_asks_a_device(tmp_path):
    site = Site()
    set_call_context(SimpleNamespace(caller="client-001"))
    try:
        with pytest.raises(PermissionError):
            site.exchange(b"", 1.0, site.here())
        set_call_context(SimpleNamespace(caller="server"))
        with pytest.raises(ConnectionError, match="not ready"):
            site.exchange(b"", 1.0, site.here())
        (tmp_path / SETTINGS).write_text('socket = "a.sock"\n')
        site._build("client-000", tmp_path)
        with pytest.raises(ConnectionError, match="another"):
            site.exchange(b"", 1.0, "of another process")
        assert site.here() == ""  # nobody listens
    finally:
        set_call_context(None)


@pytest.mark.slice
def test_a_job_holds_no_code(tmp_path):
    path = settings(tmp_path, rounds=3)
    job = write_job(tmp_path / "job", path, "a")
    files = sorted(str(file.relative_to(job)) for file in job.rglob("*") if file.is_file())
    config = "app/config"
    assert files == [
        f"{config}/config_fed_client.json",
        f"{config}/config_fed_server.json",
        f"{config}/federation.toml",
        "meta.json",
    ]
    assert settings_of(job / config / "federation.toml") == settings_of(path)
    with pytest.raises(ConfigError, match="name of letters"):
        write_job(tmp_path / "other", path, "../a")
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match="cannot write the job"):
        write_job(tmp_path / "job", path, "a")
    with pytest.raises(DataError, match="no start-up kit"):
        prepare(tmp_path, {"socket": "a"})


def only_certified_sites_are_let_in(federation: Federation, folder: Path) -> None:
    """The server's end of mutual TLS, without FLARE's client: what its root did not sign is refused."""
    folder.mkdir()
    provision(folder, ["client-000"], federation.port)

    def let_in(certificates: Path | None) -> bool:
        context = ssl.create_default_context(cafile=federation.kit("client-000") / "startup" / "rootCA.pem")
        if certificates is not None:
            context.load_cert_chain(certificates / "client.crt", certificates / "client.key")
        try:
            raw = socket.create_connection(("localhost", federation.port), 10)
            with raw, context.wrap_socket(raw, server_hostname="localhost") as secured:
                secured.settimeout(3)
                return bool(secured.recv(1))
        except TimeoutError:  # it waits for what we say
            return True
        except ssl.SSLError:
            return False

    federation.session()  # the server is up
    assert let_in(federation.kit("client-000") / "startup")
    assert not let_in(kit(folder, "client-000") / "startup")
    assert not let_in(None)


def impostor(federation: Federation, kit: Path) -> None:
    """A site that has another one's certificate, and calls itself something else."""
    for part in ("startup", "local"):
        shutil.copytree(federation.kit("client-000") / part, kit / part)
    script = kit / "startup" / "sub_start.sh"
    script.write_text(script.read_text().replace("uid=client-000", f"uid={kit.name}"))
    federation.start(kit.name, kit)


def done(run: Path) -> int:
    return len(lines(run / "metrics.jsonl"))


def left_out(run: Path, name: str) -> bool:
    return any(event["event"] == "client-gone" and event["client"] == name for event in events(run))


def back(run: Path, name: str) -> bool:
    said = [e["event"] for e in events(run) if e.get("client") == name]
    return said[-1:] == ["client-came"] and lines(run / "metrics.jsonl")[-1]["participants"] == 4


def events(run: Path) -> list[dict]:
    return lines(run / "events.jsonl")


def lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
