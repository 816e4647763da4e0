"""Two hundred rounds with real devices that are killed, stopped and started again at random; a server too.

Whatever happened, the weights are those of a run in one process in which the same answers are missing: to the
bit. Not collected by a plain pytest (``make test-deploy``). Devices are those of ``tests/fleet.py``.
"""

import collections
import random

import pytest

import baffle
from baffle import federation
from baffle.checkpoint import ScalarLog, load_checkpoint, save_checkpoint
from baffle.optimizers import Portable
from baffle.secagg.primitives import hash_of
from baffle.secure import Protection, SecureSum
from baffle.simulation import InProcess
from tests.fleet import Fleet, LinearRegression, a_round, client

ROUNDS, K = 200, 8
NAMES = [f"client-{i}" for i in range(10)]
MODEL = {"shapes": ((5,), (), (300,)), "names": ("weight", "bias", "more")}
TERMS = baffle.Terms(baffle.FixedPoint(64, 24, 1024.0), len(NAMES), 30)
DEADLINE = 2.0  # seconds: for those that are stopped
MOMENTS = ("before", "measuring", "after", "later")
STAGES = {"plain": ["answer"], "ring": ["answer"], "secure": ["advertise", "share", "answer", "unmask"]}


def server_of(kind, fleet=None):
    """``fleet`` None: for the run in one process, where integers are summed without masks."""
    aggregator = None
    if kind == "ring" or (kind == "secure" and fleet is None):
        aggregator = baffle.IntegerSum(TERMS)
    elif kind == "secure":
        protection = Protection(0.0, 0.3, 3, rounds=5)
        aggregator = SecureSum(fleet.roster, TERMS, protection, job=hash_of(b"soak"))
    return baffle.Server(
        LinearRegression(**MODEL),
        baffle.SteinEstimator(K, 1e-4),
        seed=7,
        batch_size=4,
        aggregator=aggregator,
        downlink="scalars" if kind == "plain" else "model",
        optimizer=lambda parameters: Portable(parameters, "adam", lr=0.01),
    )


class Weather:
    """What befalls the devices: drawn from a seed, though when it hits is for the machine to say."""

    def __init__(self, kind, fleet, seed):
        self._rng, self._fleet, self._stages = random.Random(seed), fleet, STAGES[kind]
        self.told = collections.Counter()
        self._stopped = {}  # name → rounds that it stays so

    def before_round(self):
        rng, awaited = self._rng, []
        for name, device in self._fleet.items():
            if name in self._stopped:
                self._stopped[name] -= 1
                if self._stopped[name] == 0:
                    device.go()
                    del self._stopped[name]
            elif not device.alive:
                if rng.random() < 0.5:
                    device.start(wait=False)
                    self.told["started"] += 1
                    if rng.random() < 0.8:  # else it comes in the midst of a round
                        awaited.append(device)
            elif not device._arms and rng.random() < 0.04:
                stage = rng.choice(self._stages)
                moment = rng.choice(MOMENTS if stage == "answer" else ("before", "after", "later"))
                device.at(stage, moment, self._kill)
            elif not self._stopped and not device._arms and rng.random() < 0.003:
                device.stop()
                self._stopped[name] = rng.randint(1, 2)
                self.told["stopped"] += 1
        for device in awaited:
            device.there()
        return rng.random() < 0.03  # whether the server is next

    def _kill(self, device):
        device.kill()
        self.told["killed"] += 1


@pytest.mark.parametrize("kind", ["plain", "ring", "secure"])
def test_soak(kind, tmp_path):
    answered, digests, reasons = {}, [], collections.Counter()
    log = ScalarLog(tmp_path / "rounds.log")
    with Fleet(NAMES, model=MODEL, least=3 if kind == "secure" else None) as fleet:
        server, weather = server_of(kind, fleet), Weather(kind, fleet, f"soak {kind}")
        while server.round < ROUNDS:
            if weather.before_round():  # the server is another one, from its checkpoint
                save_checkpoint(tmp_path / "checkpoint", server)
                server = server_of(kind, fleet)
                load_checkpoint(tmp_path / "checkpoint", server)
                server.downlink.refill(log)
                weather.told["servers"] += 1
            out = a_round(server, fleet, names=NAMES, deadline=DEADLINE)
            fleet.seen.clear()
            record = out.record
            for dropout in record.dropouts:
                assert dropout.text
                reasons[dropout.stage, dropout.reason] += 1
            missing = {
                each.client for each in record.dropouts if each.stage in ("advertise", "share", "answer")
            }
            answered[record.round] = {*out.answered} if record.total is not None else set()
            assert record.participants - len(answered[record.round]) == record.dropped
            assert record.total is None or record.dropped == len(missing)
            if record.total is not None:
                log.append(record.plan, record.total)
            digests.append(record.plan.weights_digest)
        weights, told = server.weights, weather.told
        assert not any("Traceback" in device.log() for device in fleet.values())

    summed = sum(1 for names in answered.values() if names)
    print(f"{kind}: {summed} of {ROUNDS} rounds gave a sum; {dict(told)}; {dict(reasons)}")
    assert told["killed"] > 40
    assert told["stopped"] > 0
    assert told["servers"] > 0
    assert summed > ROUNDS / 2
    assert {reason for _, reason in reasons} <= {"gone", "late", "refused", "unasked"}

    alone = server_of(kind)
    driver = InProcess([client(name, MODEL) for name in NAMES])
    drops = lambda round_, name: name not in answered[round_]  # noqa: E731
    for record in federation.run(alone, driver, rounds=ROUNDS, drops=drops):
        assert record.plan.weights_digest == digests[record.round], f"the ways part before {record.round}"
    assert alone.weights.tobytes() == weights.tobytes()
