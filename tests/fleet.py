"""Clients as processes of their own behind real sockets, to be held, killed, stopped and started again.

Run as a script, this file is such a device: ``Endpoint`` and ``device.serve`` as they are, on a Python
without torch, with moments at which it can be held. Imported, it starts and drives them: a test arms a device
for a moment of a stage; the device stops there and says so on its pipe; a thread here does to the process
what the test wants, by its pid. A driver for the engine as well: ``Sockets``, with a record of all that
passed.

    moments   forgotten   it holds what it was built with, as if it had started again
              flipped     a bit of the weights that it holds has changed; "remembered": of the rule's state
              before      the envelope has arrived, nothing was done with it
              measuring   half of the forward passes are done
              after       the reply is made, and has not left
              later       the reply has arrived

What a test compares a sum with are the same clients, asked one by one in the process of the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import baffle
from baffle import device, events, federation
from baffle.endpoint import Endpoint
from baffle.errors import BaffleError
from baffle.exchange import Envelope

# -- what a device measures with ---------------------------------------------------------------------------


class LinearRegression:
    """Squared error of a linear model, in NumPy. Weights beyond its own count a little: all matter."""

    def __init__(self, features=5, initial=0.25, names=("weight", "bias"), shapes=None, frozen=""):
        self.features, self.initial = features, initial
        shapes = shapes or ((features,), ())
        self.layout = baffle.Layout(tuple(names), tuple(map(tuple, shapes)))
        self.frozen_digest = bytes.fromhex(frozen) or bytes(32)
        self.measuring = lambda: None

    def weights(self):
        return np.full(self.layout.n, self.initial, np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        w, b = weights[: self.features], weights[self.features]
        return float(np.mean((batch.inputs @ w + b - batch.targets) ** 2) + 1e-3 * np.mean(weights**2))

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        wide, found = weights.astype(np.float64), []
        for at, k in enumerate(directions):
            if at == len(directions) // 2:
                self.measuring()
            z = perturbation.values(stream, k, self.layout, 0, self.layout.n)
            found.append(self.loss(wide + scale * z, batch))
        return np.array(found)


class Rows:
    """3 to 29 samples of a client's own."""

    def __init__(self, name, features):
        rng = np.random.default_rng(int.from_bytes(name.encode(), "little"))
        count = int(rng.integers(3, 30))
        self.x, self.y = rng.standard_normal((count, features)), rng.standard_normal(count)

    def __len__(self):
        return len(self.y)

    def batch(self, indices):
        return baffle.Batch(self.x[indices], self.y[indices])


def client(name, model=None, seal=None):
    """``model``: what ``LinearRegression`` is made with."""
    runtime = LinearRegression(**(model or {}))
    return baffle.Client(name, runtime, Rows(name, runtime.features), seed=3, seal=seal)


# -- the device --------------------------------------------------------------------------------------------


class _Held(Endpoint):
    """An endpoint with moments at which it waits for a word of the test."""

    def __init__(self, client, arms):
        super().__init__(client)
        self._arms, self._words = arms, queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in sys.stdin:
            self._words.put(line)
        os._exit(0)  # whoever started it is gone

    def hold(self, stage, moment):
        print("held", stage, moment, flush=True)
        self._words.get()

    def handle(self, data):
        stage, round_ = "", -1
        with contextlib.suppress(BaffleError):
            envelope = Envelope.decode(data)
            stage = envelope.stage
            round_ = baffle.RoundPlan.decode(envelope.plan).round
        armed = {
            moment
            for at, its, moment in (json.loads(self._arms.read_text()) if self._arms.exists() else ())
            if its == stage and at in (None, round_)
        }
        if "forgotten" in armed:
            self._holding = None
            self.hold(stage, "forgotten")
        for moment in armed & {"flipped", "remembered"}:
            held = self._holding
            row = held.weights if moment == "flipped" else held.state.arrays["mean"]
            row.setflags(write=True)
            row.view(np.uint32)[len(row) // 2] ^= 1 << 20
            row.setflags(write=False)
            self.hold(stage, moment)
        if "before" in armed:
            self.hold(stage, "before")
        measuring = "measuring" in armed
        self.client.runtime.measuring = lambda: self.hold(stage, "measuring") if measuring else None
        reply = super().handle(data)
        if "after" in armed:
            self.hold(stage, "after")
        return reply


def _main():
    settings = json.loads(sys.argv[1])
    name, seal = settings["name"], None
    if settings["identity"]:
        from baffle.secagg.primitives import Identity
        from baffle.secagg.session import Policy, Roster
        from baffle.secure import FileLedger, SecureSeal

        seal = SecureSeal(
            name,
            Identity.from_bytes(bytes.fromhex(settings["identity"])),
            Roster({who: bytes.fromhex(key) for who, key in settings["roster"].items()}),
            Policy(settings["least"], 0.0),
            ledger=FileLedger(Path(settings["ledger"])),
        )
    endpoint = _Held(client(settings.get("plays", name), settings["model"], seal), Path(settings["arms"]))
    assert not {"torch", "numba", "dp_accounting"} & sys.modules.keys()
    device.serve(endpoint, Path(settings["listen"]), lambda: print("listens", flush=True))


# -- the fleet ---------------------------------------------------------------------------------------------


class Device:
    """A client's process; the same name, key and ledger whenever it is started."""

    def __init__(self, name, folder, settings):
        self.name, self.process = name, None
        self.listen = folder / f"{name}.sock"
        self._arms_file, self._log = folder / f"{name}.arms", folder / f"{name}.err"
        self._settings = settings | {
            "name": name,
            "listen": str(self.listen),
            "arms": str(self._arms_file),
            "ledger": str(folder / f"{name}.ledger"),
        }
        self._arms, self._ready, self._lock = [], threading.Event(), threading.RLock()

    def start(self, wait=True, **other):
        """Starts it, with ``other`` settings for this life, and waits until it listens."""
        with self._lock:
            assert self.process is None
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-W", "error", "-P", __file__, json.dumps(self._settings | other)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "BAFFLE_KERNELS": "0"},
                )
        threading.Thread(target=self._watch, args=(self.process,), daemon=True).start()
        return self.there() if wait else self

    def there(self):
        """Waits until it listens."""
        assert self._ready.wait(60), self.log()
        return self

    def _watch(self, process):
        with process.stdout as said:
            for line in said:
                word, *what = line.decode().split()
                if word == "listens":
                    self._ready.set()
                elif word == "held":
                    self.fire(*what)
                    with contextlib.suppress(OSError, ValueError):  # it may be dead by now
                        process.stdin.write(b"go\n")
                        process.stdin.flush()

    def at(self, stage, moment, act, round=None):
        """At that moment, once, ``act`` is done to this device: ``Device.kill``, ``Device.stop``, ..."""
        self._arms.append((round, stage, moment, act))
        self._write_arms()

    def disarm(self):
        self._arms.clear()
        self._write_arms()

    def fire(self, stage, moment):
        for arm in self._arms:
            if arm[1:3] == (stage, moment):
                self._arms.remove(arm)
                self._write_arms()
                arm[3](self)
                return

    def _write_arms(self):
        beside = self._arms_file.with_suffix(".part")
        beside.write_text(json.dumps([arm[:3] for arm in self._arms]))
        beside.replace(self._arms_file)

    @property
    def alive(self):
        with self._lock:
            return self.process is not None

    def log(self):
        return self._log.read_text() if self._log.exists() else ""

    def stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def go(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self):
        self.end(signal.SIGKILL)

    def end(self, number):
        with self._lock:
            if self.process is None:
                return
            self._ready.clear()
            if self.process.poll() is None:
                os.kill(self.process.pid, number)
            self.process.wait(60)
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.process = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """One envelope, and what came of it."""

    stage: str
    name: str
    envelope: Envelope
    outcome: federation.Outcome

    @property
    def round(self):
        return baffle.RoundPlan.decode(self.envelope.plan).round


class Fleet(dict):
    """Name → Device, in a folder of its own, ended and removed at the end of ``with``."""

    def __init__(self, names, *, model=None, least=None):
        """``least``: the devices seal what they answer, and insist on that many honest ones."""
        # pytest's own folders have paths that are too long for a socket.
        self.folder = Path(tempfile.mkdtemp(prefix="fleet-"))
        self.model, self.roster = model or {}, None
        common = {"model": self.model, "identity": None, "least": least}
        identities = {}
        if least is not None:
            from baffle.secagg.primitives import Identity
            from baffle.secagg.session import Roster

            identities = {name: Identity.generate() for name in names}
            self.roster = Roster({name: who.public for name, who in identities.items()})
            common["roster"] = {name: who.public.hex() for name, who in identities.items()}
        for name in names:
            own = {"identity": identities[name].to_bytes().hex()} if identities else {}
            self[name] = Device(name, self.folder, common | own)
        self.driver, self.seen = device.Sockets(self.folder), []

    def __enter__(self):
        return self.ready()

    def __exit__(self, *_):
        for each in self.values():
            each.kill()
        shutil.rmtree(self.folder)

    def ready(self):
        """All listen, nobody is armed, nothing was seen."""
        self.seen = []
        for each in self.values():
            each.disarm()
            if not each.alive:
                each.start(wait=False)
        for each in self.values():
            each.there()
        return self

    # -- a driver

    def names(self):
        return self.driver.names()

    def ask(self, stage, requests, deadline):
        for name, outcome in self.driver.ask(stage, requests, deadline):
            self.seen.append(Seen(stage, name, Envelope.decode(requests[name]), outcome))
            if name in self and isinstance(outcome, bytes):
                self[name].fire(stage, "later")
            yield name, outcome


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a round."""

    record: federation.RoundRecord
    model: bytes  # that the clients measured at
    events: list
    seen: list

    @property
    def answered(self):
        """Who is in the sum, as the record has it."""
        asked = {each.name for each in self.seen if each.stage == "answer"}
        return sorted(asked - {d.client for d in self.record.dropouts if d.stage == "answer"})

    def dropout(self, name):
        """The first dropout of a client; events say all of them."""
        found = [each for each in self.record.dropouts if each.client == name]
        assert all(each.text for each in found)
        said = [each for each in self.events if each["event"] == "dropout" and each["client"] == name]
        assert all(each["round"] == self.record.round for each in said)
        assert [(e["stage"], e["reason"]) for e in said] == [(each.stage, each.reason) for each in found]
        return found[0]

    def stage(self, name):
        (found,) = [each for each in self.record.stages if each.name == name]
        return found

    def seen_of(self, name, stage="answer"):
        return [each for each in self.seen if (each.name, each.stage) == (name, stage)]


def a_round(server, fleet, *, deadline=60.0, **options):
    """The next round."""
    model, start = server.model().encode(), len(fleet.seen)
    file = fleet.folder / "events.jsonl"
    file.unlink(missing_ok=True)
    with events.to(file):
        (record,) = federation.run(server, fleet, rounds=server.round + 1, deadline=deadline, **options)
    return Outcome(record, model, list(events.reading(file)), fleet.seen[start:])


def sum_of(plan, model, names, terms=None, settings=None):
    """What a server that sees everything gets from these clients, each asked here and alone."""
    if terms is not None:
        tally = baffle.IntegerSum(terms).open(plan, names)
        (stage,) = tally.stages()
        for name in names:
            download = baffle.Download.decode(plan.encode(), model)
            tally.add(name, client(name, settings).reply(stage.name, stage.requests[name], download))
        return tally.close()
    total, weight = [0.0] * plan.estimator.directions, 0
    for name in sorted(names):
        result = baffle.RoundResult.decode(client(name, settings).answer(plan.encode(), model))
        total = [t + result.samples * float(v) for t, v in zip(total, result.values, strict=True)]
        weight += result.samples
    return baffle.RoundSum(plan.round, np.array(total) / weight)


def assert_sum_of(outcome, names, terms=None, settings=None):
    """To the bit, and of these clients alone."""
    record = outcome.record
    assert record.aborted is None, record.aborted
    assert outcome.answered == sorted(names)
    assert record.dropped == record.participants - len(names)
    expected = sum_of(record.plan, outcome.model, names, terms, settings)
    assert record.total.encode() == expected.encode()
    assert len(set(expected.values)) == record.plan.estimator.directions


# -- who lies ----------------------------------------------------------------------------------------------


def framed(data):
    return struct.pack("<Q", len(data)) + data


class Liar:
    """Stands at a client's socket. ``lie(envelope, forward)`` gives the bytes to write there, or many such.

    ``forward(envelope)`` asks the true device, which listens elsewhere meanwhile.
    """

    def __init__(self, path, lie, true=None):
        self.path, self._lie = path, lie
        self._true = true
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError, EOFError):
                connection.settimeout(30)
                envelope = device._receive(connection, time.monotonic() + 30)
                if envelope == b"end":
                    return
                said = self._lie(envelope, lambda data: device.relay(self._true, data, 30))
                for part in [said] if isinstance(said, bytes) else said:
                    connection.sendall(part)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BaffleError):
            device.relay(self.path, b"end", 30)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._listener.close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def lying(fleet, name, lie):
    """The device ``name`` is true and lives, but who is asked in its place is a liar."""
    path = fleet[name].listen
    hidden = path.with_suffix(".true")
    path.rename(hidden)
    try:
        with Liar(path, lie, hidden) as liar:
            yield liar
    finally:
        hidden.rename(path)


if __name__ == "__main__":
    _main()
