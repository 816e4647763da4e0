"""Flower for real: SuperLink with TLS and node authentication, SuperNodes, devices; and the driver by itself.

Not collected by a plain pytest (`make test-deploy`). Every process is this test's own, on 127.0.0.1, under a
temporary folder, and ends with it. What runs end with is compared, bit for bit, with the same job in one
process.
"""

import dataclasses
import time
import tomllib
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra flower")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from baffle import events, flower, job, simulation
from baffle.config import TrainConfig
from baffle.errors import ConfigError, DeliveryError
from baffle.exchange import Envelope, Reply
from baffle.runs import RunFolder
from examples.flower import local_fleet
from examples.flower.local_fleet import Fleet

CONFIG = TrainConfig.resolve(
    {
        "model": "mlp",
        "clients": 4,
        "directions": 20,
        "batch_size": 16,
        "rounds": 3,
        "evaluate_every": 2,
        "seed": 7,
        "threads": 1,
        "deadline": 90.0,
    }
)
SECURE = dataclasses.replace(CONFIG, rounds=2, secure=True, max_colluding=0.25, max_dropout=0.0)
PATIENCE = 240.0  # seconds for a whole run: what is left is a hang


def in_one_process(config, dropped=None):
    """Final weights and their average, of the same job without Flower; ``dropped`` holds (round, name)."""
    made = job.build(config)
    drops = made.drops if dropped is None else lambda round_, name: (round_, name) in dropped
    for _ in simulation.simulate(
        made.server, made.clients, rounds=made.rounds, cohort=config.cohort, drops=drops
    ):
        pass
    return made.server.weights, made.server.ema_weights


def assert_same_bits(run, reference):
    for which, expected in zip(("final", "ema"), reference, strict=True):
        assert np.array_equal(run.load_weights(which).view(np.uint32), expected.view(np.uint32))


def finish(fleet, run, name):
    status, details = fleet.wait(run, PATIENCE)
    assert status == "finished:completed", details
    folder = RunFolder.open(fleet.folder / name)
    assert folder.ended
    return folder


def rows(fleet, name):
    """The rounds that a run has done so far."""
    with suppress(Exception):
        return RunFolder.open(fleet.folder / name).metrics()
    return []


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} after {PATIENCE:g} s"
        time.sleep(0.2)


# -- real processes ---------------------------------------------------------------------------------


@pytest.mark.slice
def test_two_clients_end_with_the_bits_of_one_process(tmp_path):
    config = dataclasses.replace(CONFIG, clients=2, rounds=2)
    with Fleet(tmp_path, ["client-000", "client-001"]) as fleet:
        local_fleet.start(fleet, config)
        run = finish(fleet, fleet.submit(fleet.settings(config)), "run")
    assert_same_bits(run, in_one_process(config))
    assert [row["stages"]["answer"]["answered"] for row in run.metrics()] == [2, 2]
    assert not fleet.processes


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with Fleet(tmp_path_factory.mktemp("fleet"), [f"client-{i:03d}" for i in range(CONFIG.clients)]) as made:
        local_fleet.start(made, CONFIG)
        yield made


def test_plain_sums_with_drops(fleet):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    run = finish(fleet, fleet.submit(fleet.settings(config, "plain")), "plain")
    assert any(row.get("dropouts") for row in run.metrics())  # the seed was chosen so
    assert_same_bits(run, in_one_process(config))


def test_a_killed_device_and_a_killed_node_are_named_and_come_back(fleet):
    config = dataclasses.replace(CONFIG, rounds=8, deadline=30.0)
    run = fleet.submit(fleet.settings(config, "kill"))
    until(lambda: len(rows(fleet, "kill")) >= 1, "first round")
    for who in ("device-client-001", "node-client-002"):  # SIGKILL: a socket stays behind, and a node's word
        fleet.kill(who)
    until(lambda: any(row["dropped"] for row in rows(fleet, "kill")), "round without them")
    fleet.device("client-001", fleet.folder / "federation.toml")
    fleet.supernode("client-002")  # refused, and started again by the fleet, until its old self has lapsed
    folder = finish(fleet, run, "kill")

    said = list(events.reading(folder.events))
    found = [e for e in said if e["event"] == "dropout"]
    reasons = {(e["client"], e["reason"]) for e in found}
    assert ("client-001", "gone") in reasons
    assert reasons & {("client-002", "late"), ("client-002", "gone")}
    assert sum(e["event"] == "client-came" and e["client"] == "client-002" for e in said) == 2
    assert (folder.metrics()[-1]["participants"], folder.metrics()[-1]["dropped"]) == (4, 0)
    missing = {(e["round"], e["client"]) for e in found}
    assert {e["client"] for e in said if e["event"] == "client-gone"} == {"client-002"}
    missing |= {(row["round"], "client-002") for row in folder.metrics() if row["participants"] == 3}
    assert_same_bits(folder, in_one_process(config, missing))


def test_an_unknown_key_is_refused(fleet):
    fleet.node("mallory")
    until(lambda: fleet.processes["node-mallory"].poll() is not None, "end of the unknown node")
    fleet.kill("executor-node-mallory")
    node = fleet.processes.pop("node-mallory")
    assert node.returncode != 0
    assert "Failed to activate SuperNode" in fleet.log("node-mallory").read_text()


def test_a_superlink_that_is_killed_goes_on_from_its_database(fleet):
    config = dataclasses.replace(CONFIG, rounds=4)
    run = fleet.submit(fleet.settings(config, "restart"))
    until(lambda: len(rows(fleet, "restart")) >= 1, "first round")
    fleet.kill("superlink")
    fleet.superlink()
    folder = finish(fleet, run, "restart")
    found = [e for e in events.reading(folder.events) if e["event"] == "dropout"]
    assert_same_bits(folder, in_one_process(config, {(e["round"], e["client"]) for e in found}))


def test_secure_sums(fleet):
    for name in fleet.names:
        with suppress(KeyError):
            fleet.kill(f"device-{name}")
    fleet.devices(SECURE)
    for name in fleet.names:
        fleet.ready(name)
    run = finish(fleet, fleet.submit(fleet.settings(SECURE, "secure")), "secure")
    assert [list(row["stages"]) for row in run.metrics()][1] == ["answer", "confirm", "unmask"]
    assert_same_bits(run, in_one_process(SECURE))


def test_a_setting_that_cannot_be_fails_the_run_in_one_line(fleet):
    settings = fleet.settings(CONFIG, "wrong")
    settings.write_text(settings.read_text() + 'optimizer = "adams"\n')
    status, details = fleet.wait(fleet.submit(settings), PATIENCE)
    assert status == "finished:failed"
    assert "optimizer = 'adams': choose one of adam" in details
    assert not (fleet.folder / "wrong").exists()


# -- the driver by itself ---------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Grid:
    """Nodes that say a name, and answer what ``answers`` says: (seconds it takes, content or Error)."""

    def __init__(self, clock, names):
        self.clock, self.names = clock, dict(names)  # node → the name its device says, None for silence
        self.answers, self.pushed, self.on_the_way = {}, [], []
        self.refused = set()  # nodes that the SuperLink takes no message for

    def get_node_ids(self):
        return list(self.names)

    def push_messages(self, messages):
        return [self.push(message) for message in messages]

    def push(self, message):
        node, record = message.metadata.dst_node_id, message.content["baffle"]
        if node in self.refused:
            return ""
        number = str(len(self.pushed))
        message.metadata.__dict__["_message_id"] = number  # which Flower's grid does there
        self.pushed.append(message)
        envelope = Envelope.decode(record["envelope"])
        if envelope.stage == "hello":
            name = self.names[node]
            seconds, content = 1.0, hello(envelope, name)
        else:
            seconds, content = self.answers[self.names[node]]
        if isinstance(content, dict):
            content = RecordDict({"baffle": ConfigRecord(content)})
        self.on_the_way.append((self.clock.now + seconds, Message(content, reply_to=message)))
        return number

    def pull_messages(self, numbers):
        assert numbers, "asked for nothing"
        here = [m for at, m in self.on_the_way if at <= self.clock.now]
        self.on_the_way = [(at, m) for at, m in self.on_the_way if at > self.clock.now]
        return here  # those nobody asked for as well: a driver must not take them for another


def hello(envelope, name):
    if name is None:
        return {"gone": "no device replies there"}
    if name == "!":
        return {"refused": "settings that cannot be here"}
    return {"reply": Reply(envelope.ticket(name), "answer", name.encode()).encode()}


@pytest.fixture
def identity():
    """What Flower sets in the processes of its apps, and messages have in them."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


@pytest.fixture
def clock(monkeypatch, identity):
    made = Clock()
    monkeypatch.setattr(flower, "time", made)
    return made


def driver(grid, expected=("a", "b", "c"), **options):
    return flower.FlowerDriver(grid, expected=expected, poll=0.5, **options)


REQUESTS = {name: Envelope("answer", b"plan", name.encode()).encode() for name in "abc"}


def said(outcomes):
    return {n: o.reason if isinstance(o, DeliveryError) else o for n, o in outcomes}


def test_replies_come_in_order_and_who_is_late_is_named(clock):
    grid = Grid(clock, {30: "a", 10: "b", 20: "c"})
    asked = driver(grid)
    assert asked.names() == ["a", "b", "c"]
    grid.answers = {"a": (3, {"reply": b"A"}), "b": (1, {"reply": b"B"}), "c": (60, {"reply": b"C"})}
    before = clock.now
    outcomes = list(asked.ask("answer", REQUESTS, 5.0))
    assert [name for name, _ in outcomes] == ["a", "b", "c"]
    assert said(outcomes) == {"a": b"A", "b": b"B", "c": "late"}
    assert clock.now - before <= 5.0 + 0.5  # the deadline and one look
    assert {m.metadata.ttl for m in grid.pushed[-3:]} == {5.0}
    # What comes later is a reply to a message that nobody waits for any more.
    clock.now += 100
    grid.answers = dict.fromkeys("abc", (1, {"reply": b"now"}))
    assert said(asked.ask("answer", REQUESTS, 5.0)) == dict.fromkeys("abc", b"now")


def test_what_goes_wrong_on_the_way_has_a_reason(clock):
    names = ("a", "b", "c", "d", "e", "f", "g")
    grid = Grid(clock, enumerate(names, 1))
    asked = driver(grid, names)
    asked.names()
    grid.answers = {
        "a": (1, Error(code=3, reason="expired")),
        "b": (1, Error(code=5, reason="node unavailable")),
        "c": (1, Error(code=2, reason="raised")),
        "d": (1, {"reply": "text, not bytes"}),
        "e": (1, RecordDict({"other": ConfigRecord({"reply": b""})})),
        "f": (1, {"late": "no reply within 5 s"}),
        "g": (1, {"gone": "no device replies there"}),
    }
    outcomes = said(asked.ask("answer", dict.fromkeys(names, REQUESTS["a"]), 5.0))
    assert outcomes == {
        "a": "late", "b": "gone", "c": "gone", "d": "malformed", "e": "malformed", "f": "late", "g": "gone"
    }  # fmt: skip


def test_equal_envelopes_are_one_object(clock):
    grid = Grid(clock, {1: "a", 2: "b", 3: "c"})
    asked = driver(grid)
    asked.names()
    grid.answers = dict.fromkeys("abc", (1, {"reply": b""}))
    list(asked.ask("answer", dict.fromkeys("abc", REQUESTS["a"]), None))
    assert len({m.content["baffle"].object_id for m in grid.pushed[-3:]}) == 1


def test_nodes_that_leave_are_gone_and_may_come_back_as_others(clock):
    grid = Grid(clock, {1: "a", 2: "b", 3: "c"})
    asked = driver(grid)
    asked.names()
    grid.answers = dict.fromkeys("abc", (1, {"reply": b"x"}))
    del grid.names[2]
    assert asked.names() == ["a", "c"]
    assert said(asked.ask("answer", REQUESTS, 5.0)) == {"a": b"x", "b": "gone", "c": b"x"}
    grid.names[9] = "b"
    asked.names()
    clock.now += 2
    assert asked.names() == ["a", "b", "c"]
    grid.refused.add(9)
    assert said(asked.ask("answer", REQUESTS, 5.0)) == {"a": b"x", "b": "gone", "c": b"x"}


def test_a_name_belongs_to_the_first_and_strangers_are_not_asked(clock):
    grid = Grid(clock, {1: "a", 2: "a", 3: "zebra", 4: "b"})
    asked = driver(grid, patience=10.0)
    assert asked.names() == ["a", "b"]  # c never came; two are more than the least, 1
    assert sum(m.metadata.group_id == "hello" for m in grid.pushed) == 4
    grid.answers = dict.fromkeys("ab", (1, {"reply": b"x"}))
    list(asked.ask("answer", {"a": REQUESTS["a"]}, 5.0))
    first = grid.pushed[-1].metadata.dst_node_id
    del grid.names[first]
    asked.names()
    clock.now += 2
    assert asked.names() == ["a", "b"]
    list(asked.ask("answer", {"a": REQUESTS["a"]}, 5.0))
    assert {first, grid.pushed[-1].metadata.dst_node_id} == {1, 2}


def test_a_node_without_a_device_yet_is_asked_again(clock):
    grid = Grid(clock, {1: "a", 2: None})
    asked = driver(grid, ("a", "b"))
    clock.sleep = lambda seconds: (setattr(clock, "now", clock.now + seconds), grid.names.update({2: "b"}))
    assert asked.names() == ["a", "b"]


def test_too_few_devices_end_the_wait(clock):
    with pytest.raises(DeliveryError, match="1 of at least 2 devices are there after 30 s") as caught:
        driver(Grid(clock, {1: "a"}), least=2, patience=30.0).names()
    assert caught.value.reason == "gone"
    assert 30.0 <= clock.now <= 31.0
    with pytest.raises(ConfigError, match="least = 4"):
        driver(Grid(clock, {}), least=4)


def test_a_node_that_needs_other_settings_ends_the_run(clock):
    with pytest.raises(ConfigError, match="settings that cannot be here"):
        driver(Grid(clock, {1: "a", 2: "!"})).names()


# -- the node's side --------------------------------------------------------------------------------


def context(node_config, run_config=None):
    return Context(
        run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config=run_config or {}
    )


def asked_on_a_node(node_config, run_config=None, envelope=b""):
    content = RecordDict({"baffle": ConfigRecord({"envelope": envelope, "seconds": 5.0})})
    message = Message(content, dst_node_id=2, message_type="query")
    reply = flower.client_app(message, context(node_config, run_config))
    return dict(reply.content["baffle"])


def test_a_node_relays_and_says_when_nobody_is_there(tmp_path, identity):
    (found,) = asked_on_a_node({"device": str(tmp_path / "none.sock")}).items()
    assert found[0] == "gone"
    assert "none.sock" in found[1]


def test_virtual_clients_are_built_from_the_run_config(identity):
    settings = {"model": "mlp", "clients": 2, "directions": 2, "preset": ""}
    envelope = Envelope("hello").encode()
    reply = asked_on_a_node({"partition-id": 1}, settings, envelope)["reply"]
    assert Reply.decode(reply) == Reply(Envelope("hello").ticket("client-001"), "answer", b"client-001")
    assert "one more than the 2" in asked_on_a_node({"partition-id": 2}, settings)["refused"]
    assert (
        "keys that must not move"
        in asked_on_a_node({"partition-id": 0}, settings | {"secure": True})["refused"]
    )
    assert "--node-config" in asked_on_a_node({}, settings)["refused"]


# -- settings ---------------------------------------------------------------------------------------


def test_the_app_lists_every_setting():
    app = tomllib.loads((Path(local_fleet.APP) / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    own = {f.name for f in dataclasses.fields(flower.Settings)} - {"config"}
    named = {f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)}
    assert set(app["config"]) == own | named
    assert flower.Settings.read(app["config"]) == flower.Settings(TrainConfig())
    for component in app["components"].values():
        module, name = component.split(":")
        assert module == flower.__name__
        assert hasattr(flower, name)


def test_settings_that_cannot_be():
    read = flower.Settings.read
    assert read({"patience": 3, "rounds": 5, "model": ""}).patience == 3.0
    with pytest.raises(ConfigError, match="did you mean rounds"):
        read({"round": 5})
    with pytest.raises(ConfigError, match="resume = 1: expected bool"):
        read({"resume": 1})
    with pytest.raises(ConfigError, match="run: name the run folder"):
        flower._train(types.SimpleNamespace(), read({}))


def test_training_over_the_driver_without_flower(clock, tmp_path):
    """The whole server's half over a grid whose nodes are clients of this process."""
    config = dataclasses.replace(CONFIG, clients=2, rounds=2)
    endpoints = {f"client-{i:03d}": e for i, e in enumerate(flower._virtual_clients(config))}
    grid = Grid(clock, enumerate(endpoints, 1))
    push = grid.push

    def answering(message):
        name = grid.names[message.metadata.dst_node_id]
        reply = endpoints[name].handle(message.content["baffle"]["envelope"])
        grid.answers[name] = (1.0, {"reply": reply})
        return push(message)

    grid.push = answering
    settings = {"run": str(tmp_path / "run")} | tomllib.loads(config.to_toml())
    flower.server_app(grid, context({}, settings))
    assert_same_bits(RunFolder.open(tmp_path / "run"), in_one_process(config))
    # What has ended is left as it is; another run does not go over it.
    flower.server_app(grid, context({}, settings | {"resume": True}))
    with pytest.raises(ConfigError, match="is there already"):
        flower.server_app(grid, context({}, settings))
