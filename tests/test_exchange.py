"""Envelopes and replies: their bytes by hand, what is none of them, and a device that is told nonsense."""

import contextlib
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import baffle
from baffle.aggregation import ANSWER
from baffle.errors import ConfigError, DeliveryError, MessageError
from baffle.exchange import HELLO, STATUSES, Envelope, Reply
from baffle.federation import in_order
from baffle.plan import weights_digest
from baffle.stream import seed_from


def test_an_envelope_is_made_of_its_parts_in_order():
    envelope = Envelope("answer", b"PLAN", b"ask", b"weights")
    head = b"BFFL\x01\x0b" + b"\x06answer" + struct.pack("<I", 4) + b"PLAN" + struct.pack("<I", 3) + b"ask"
    assert envelope.encode() == head + struct.pack("<Q", 7) + b"weights"
    ticket = hashlib.sha256(head + struct.pack("<Q", 7) + b"anna").digest()[:16]
    assert envelope.ticket("anna") == ticket
    assert len(Envelope("answer").encode()) == 29
    assert envelope.ticket("bo") != ticket
    assert Envelope("answer", b"PLAN", b"ask", b"weight5").ticket("anna") == ticket  # proven by the digest
    for other in (("unmask", b"PLAN", b"ask"), ("answer", b"PLAM", b"ask"), ("answer", b"PLAN", b"asks")):
        assert Envelope(*other, b"weights").ticket("anna") != ticket


def test_a_reply_is_made_of_its_parts_in_order():
    for number, status in enumerate(STATUSES):
        made = Reply(bytes(range(16)), status, b"body").encode()
        assert made == b"BFFL\x01\x0c" + bytes(range(16)) + bytes([number]) + struct.pack("<I", 4) + b"body"
        assert len(made) == Reply.OVERHEAD + 4


PARTS = st.binary(max_size=40)


@given(st.from_regex(r"[a-z]{1,64}", fullmatch=True), PARTS, PARTS, PARTS)
def test_envelopes_come_back_as_they_were(stage, plan, request, package):
    envelope = Envelope(stage, plan, request, package)
    assert Envelope.decode(envelope.encode()) == envelope


@given(st.binary(min_size=16, max_size=16), st.sampled_from(STATUSES[:-1]), st.binary(max_size=80))
def test_replies_come_back_as_they_were(ticket, status, body):
    assert Reply.decode(Reply(ticket, status, body).encode()) == Reply(ticket, status, body)


@pytest.mark.parametrize("message", [Envelope("unmask", b"p", b"r", b"w"), Reply(bytes(16), "answer", b"a")])
def test_what_is_cut_short_continued_or_of_another_kind_is_refused(message):
    data, kind = message.encode(), type(message)
    for cut in range(len(data)):
        with pytest.raises(MessageError):
            kind.decode(data[:cut])
    for wrong in (data + b"\0", b"BFFM" + data[4:], data[:4] + b"\2" + data[5:], data[:5] + b"\1" + data[6:]):
        with pytest.raises(MessageError):
            kind.decode(wrong)


@given(st.binary(max_size=200))
def test_random_bytes_behind_a_header_never_do_more_than_fail(data):
    for kind in (Envelope, Reply):
        head = b"BFFL\x01" + bytes([kind.KIND])
        with contextlib.suppress(MessageError):
            assert kind.decode(head + data).encode() == head + data


def test_lengths_beyond_the_bytes_cost_nothing():
    for data in (b"\x01a" + b"\xff" * 4, b"\x01a" + bytes(8) + b"\xff" * 8):
        with pytest.raises(MessageError, match="cut short"):
            Envelope.decode(b"BFFL\x01\x0b" + data)


@pytest.mark.parametrize("stage", ["", "a" * 65, "two words", "línea", "a\nb", "1"])
def test_a_stage_is_a_short_word(stage):
    with pytest.raises(ConfigError, match="letters"):
        Envelope(stage)


def test_reasons_are_one_short_harmless_line():
    text = Reply.explaining(bytes(16), "failed", "a\n b\x1b[2J" + "ä" * 1000)
    assert len(text.body) <= 500
    assert text.text.startswith("a b")
    assert text.text.isprintable()
    with pytest.raises(MessageError, match="longer than a line"):
        Reply.decode(Reply(bytes(16), "failed", bytes(501)).encode())
    assert Reply(bytes(16), "failed", b"\xff\xfe\x1b").text.isprintable()


# -- a device --------------------------------------------------------------------------------------------


class Bowl:
    """L(w) = |w|²/2."""

    layout, frozen_digest = baffle.Layout.flat(3), bytes(32)
    broken = False

    def weights(self):
        return np.ones(3, np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        if self.broken:
            raise RuntimeError("secret numbers")
        return float(weights @ weights) / 2

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        rows = [perturbation.values(stream, k, self.layout, 0, 3) for k in directions]
        return np.array([self.loss(weights + scale * row, batch) for row in rows])


class One:
    def __len__(self):
        return 1

    def batch(self, indices):
        return baffle.Batch(np.zeros((1, 1)), np.zeros(1))


def a_device(runtime=None):
    return baffle.Endpoint(baffle.Client("anna", runtime or Bowl(), One()))


def plan_at(weights, round_=0):
    digest = weights_digest(weights, Bowl.layout, bytes(32))
    return baffle.RoundPlan(round_, seed_from(1), baffle.SteinEstimator(4), digest)


def asked(device, envelope):
    reply = Reply.decode(device.handle(envelope.encode()))
    assert reply.ticket == envelope.ticket("anna")
    return reply


def test_a_device_says_its_name():
    reply = asked(a_device(), Envelope(HELLO))
    assert (reply.status, reply.body) == ("answer", b"anna")


def test_a_device_answers_as_its_client_does_and_keeps_what_it_needs():
    weights, device = np.ones(3, np.float32), a_device()
    plan, model = plan_at(weights).encode(), baffle.ModelMessage(weights).encode()
    expected = baffle.Client("anna", Bowl(), One()).answer(plan, model)
    assert asked(device, Envelope(ANSWER, plan, b"", model)).body == expected
    assert asked(device, Envelope(ANSWER, plan)).body == expected  # it was built with these weights
    moved = np.float32([1, 2, 3])
    reply = asked(device, Envelope(ANSWER, plan_at(moved, 1).encode()))
    assert reply.status == "digest"
    assert reply.body == struct.pack("<Q", 0) + weights_digest(weights, Bowl.layout, bytes(32))
    reply = asked(
        device, Envelope(ANSWER, plan_at(moved, 1).encode(), b"", baffle.ModelMessage(moved).encode())
    )
    assert reply.status == "answer"
    # A model for one round is kept for none.
    assert asked(device, Envelope(ANSWER, plan_at(moved, 2).encode())).status == "digest"


@pytest.mark.parametrize(
    ("envelope", "status", "text"),
    [
        (Envelope(ANSWER, b"nonsense"), "malformed", "no BAFFLE message"),
        (Envelope(ANSWER, plan_at(np.ones(3, np.float32)).encode(), b"", b"weights"), "malformed", "package"),
        (Envelope("unmask", plan_at(np.ones(3, np.float32)).encode()), "failed", "cannot do the stage"),
    ],
)
def test_what_goes_wrong_is_what_a_device_replies(envelope, status, text):
    reply = asked(a_device(), envelope)
    assert reply.status == status
    assert text in reply.text


def test_a_device_survives_bytes_and_runtimes_that_break(caplog):
    device = a_device()
    for data in (b"", b"BFFL", b"\0" * 100, Reply(bytes(16), "answer", b"").encode()):
        reply = Reply.decode(device.handle(data))
        assert (reply.status, reply.ticket) == ("malformed", bytes(16))
    runtime = Bowl()
    runtime.broken = True
    reply = asked(a_device(runtime), Envelope(ANSWER, plan_at(np.ones(3, np.float32)).encode()))
    assert (reply.status, reply.text) == ("failed", "RuntimeError in the client")  # details stay there
    assert "secret numbers" in caplog.text


# -- the order of names ----------------------------------------------------------------------------------


@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 4))
def test_arrivals_are_held_back_until_their_turn(order, count):
    came = [(name, name.encode()) for name in order[:count]]
    seen, taken = [], []

    def arrivals():
        for pair in came:
            taken.append(pair[0])
            yield pair

    for name, outcome in in_order("dcba", arrivals()):
        seen.append(name)
        if isinstance(outcome, DeliveryError):
            assert outcome.reason == "gone"
            assert name in order[count:]
        else:
            assert outcome == name.encode()
            assert set(taken) >= set(seen) - set(order[count:])
    assert seen == ["a", "b", "c", "d"]
