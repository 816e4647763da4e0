"""Events: what they say, who sees them, and that nothing in them or around them can do harm."""

import json
import logging
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle import events
from baffle.events import JsonLines, Tail, clean, emit, plain, reading


@pytest.fixture
def file(tmp_path):
    return tmp_path / "events.jsonl"


@pytest.fixture
def heard():
    """What a handler of the user's own on the logger "baffle" gets, at its level."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record)

    logger, handler = logging.getLogger("baffle"), Handler()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


# What an event is


def test_an_event_is_one_json_object_a_line(file):
    with events.to(file):
        emit("dropout", "client-004 is late", level="warning", round=3, stage="answer", client="client-004")
        emit("resume", "goes on from round 4")
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert list(first) == ["time", "level", "event", "round", "stage", "client", "text"]
    moment = datetime.fromisoformat(first.pop("time"))
    assert moment.tzinfo == UTC
    assert timedelta(0) <= datetime.now(UTC) - moment < timedelta(minutes=1)
    assert first == {
        "level": "warning",
        "event": "dropout",
        "round": 3,
        "stage": "answer",
        "client": "client-004",
        "text": "client-004 is late",
    }
    assert (second["level"], second["event"], second["text"]) == ("info", "resume", "goes on from round 4")
    assert [event["event"] for event in reading(file)] == ["dropout", "resume"]


def test_only_what_is_said_meanwhile_is_recorded(file):
    emit("run", "before")
    with events.to(file):
        emit("run", "meanwhile")
    emit("run", "after")
    assert [event["text"] for event in reading(file)] == ["meanwhile"]


def test_a_field_cannot_take_the_place_of_what_every_event_has(file):
    with events.to(file):
        emit("run", "true", time="never", **{"le vel\n": 1})
    (event,) = reading(file)
    assert event["time"] != "never"
    assert event["le vel"] == 1


def test_levels_have_names(file):
    with events.to(file), pytest.raises(KeyError):
        emit("run", "text", level="loud")


# Who sees it


def test_handlers_of_the_user_see_what_their_level_lets_through(file, heard):
    with events.to(file):
        emit("hello", "who are you", level="debug")
        emit("node-came", "client-001 is here")
        emit("dropout", "client-001 is late", level="warning", reason="late")
    assert [record.getMessage() for record in heard] == ["client-001 is late"]
    assert [event["event"] for event in reading(file)] == ["node-came", "dropout"]
    assert logging.getLogger("baffle").level == logging.NOTSET
    logging.getLogger("baffle").setLevel(logging.INFO)
    emit("node-came", "100 % of client-001 is here")
    record = heard[-1]
    assert (record.event, record.fields) == ("node-came", {})
    assert record.getMessage() == "100 % of client-001 is here"
    assert (heard[0].fields, heard[0].levelname) == ({"reason": "late"}, "WARNING")


def test_a_record_names_the_place_that_emitted_it(heard):
    emit("dropout", "gone", level="warning")
    assert (heard[0].filename, heard[0].funcName) == (
        "test_events.py",
        "test_a_record_names_the_place_that_emitted_it",
    )


def test_records_that_were_logged_otherwise_are_kept_too(file):
    logger, handler = logging.getLogger("baffle"), JsonLines(file)
    logger.addHandler(handler)
    try:
        logging.getLogger("baffle.mine").warning("%d things\n{}", 2)
    finally:
        logger.removeHandler(handler)
    (event,) = reading(file)
    assert (event["event"], event["level"], event["text"]) == ("log", "warning", "2 things {}")


def test_nothing_is_printed_unasked():
    code = """
        from baffle.events import emit
        emit("dropout", "client-004 is late", level="error")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# Harmless


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ('x\n{"event": "ended"}', 'x {"event": "ended"}'),
        ("a\r\nb\vc\fd\x1ce\x85f\u2028g\u2029h", "a b c d e f g h"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m\x00\x7f", r"\x9b31m\x00\x7f"),
        ("abc\u202egpj.exe", r"abc\u202egpj.exe"),
        ("\ud800\udfff", r"\ud800\udfff"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("e" + "\u0301" * 400, "e\u0301\u0301"),
        ("Zürich 東京 ε = 3", "Zürich 東京 ε = 3"),
    ],
)
def test_texts_are_made_harmless(hostile, shown, file):
    assert clean(hostile) == shown
    with events.to(file):
        emit(hostile, hostile, level="warning", **{hostile: hostile, "list": [hostile, {hostile: hostile}]})
    lines = file.read_bytes().decode("utf-8").splitlines()  # splits at more than \n
    assert len(lines) == 1
    (event,) = reading(file)
    assert event["event"] == event["text"] == event[shown] == event["list"][0] == shown
    assert event["list"][1] == {shown: shown}


@given(st.text(alphabet=st.characters(), max_size=60), st.integers(2, 30))
def test_a_clean_text_is_one_printable_bounded_line(text, most):
    line = clean(text, most)
    assert line.isprintable()
    assert len(line) <= most
    assert clean(line, most) == line
    if text.isascii() and text.isprintable() and len(text) <= most:
        assert line == " ".join(text.split())


def test_length_is_bounded(file):
    assert clean("x" * 10**6) == "x" * 499 + "…"
    assert clean("\x00" * 499, 10) == r"\x00\x00\…"
    with events.to(file):
        emit("e" * 10**6, "t" * 10**6, names=["n" * 1000] * 10**5, table=dict.fromkeys(range(10**4), "v"))
    assert file.stat().st_size < 150_000


def test_any_value_can_be_a_field():
    class Unsayable:
        def __str__(self):
            raise RuntimeError("never")

    assert plain(float("nan")) is plain(np.float32("inf")) is plain(None) is None
    assert plain(True) is True
    assert plain([np.int64(3), np.float32(0.5), 1.5, (1,), {2}]) == [3, 0.5, 1.5, [1], [2]]
    assert plain(b"\x00") == r"b'\x00'"
    assert plain(10**5000).startswith("0x")
    assert plain(Unsayable()) == "<Unsayable>"
    assert isinstance(plain(Fraction(10**400)), str)
    nested = None
    for _ in range(10**4):
        nested = [nested]
    json.dumps(plain(nested), allow_nan=False)


# The disk


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_is_said_once_and_breaks_nothing(capsys):
    with events.to("/dev/full"):
        emit("run", "one")
        emit("run", "two")
    assert capsys.readouterr().err == "cannot write /dev/full: No space left on device; events are lost\n"


def test_events_go_on_when_the_disk_has_room_again(tmp_path, capsys):
    file = tmp_path / "later" / "events.jsonl"
    with events.to(file):
        emit("run", "lost")
        file.parent.mkdir()
        emit("run", "kept")
    assert "No such file or directory; events are lost" in capsys.readouterr().err
    assert [event["text"] for event in reading(file)] == ["kept"]


def test_a_closed_stderr_breaks_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with events.to("/nowhere/events.jsonl"):
        emit("run", "one")


def test_a_line_that_was_cut_short_takes_no_other_with_it(file):
    file.write_bytes(b'{"event": "run"}\n{"event": "dropo')
    assert [event["event"] for event in reading(file)] == ["run"]
    with events.to(file):
        emit("resume", "goes on")
        emit("ended", "done")
    assert [event["event"] for event in reading(file)] == ["run", "resume", "ended"]


# Reading


def test_reading_leaves_out_what_is_no_event(file):
    lines = [
        b"",
        b"null",
        b"[1]",
        b'{"event": 3}',
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"event": "run", "round": NaN}',
    ]
    file.write_bytes(b"\n".join(lines) + b"\n" + b'{"event": "cut')
    assert [event["event"] for event in reading(file)] == ["run"]
    assert list(reading(file.with_name("none.jsonl"))) == []


def test_a_tail_reads_each_complete_line_once(file):
    tail = Tail(file)
    assert tail.more() == ([], False)
    file.write_bytes(b"one\ntw")
    assert tail.more() == ([b"one"], False)
    with file.open("ab") as more:
        more.write(b"o\n\nthree\n")
    assert tail.more() == ([b"two", b"", b"three"], False)
    assert tail.more() == ([], False)


def test_a_tail_begins_anew_where_the_file_did(file):
    tail = Tail(file)
    file.write_bytes(b"one\ntwo\n")
    assert tail.more() == ([b"one", b"two"], False)
    file.write_bytes(b"one\n")  # rewound
    assert tail.more() == ([b"one"], True)
    file.write_bytes(b"one\nother\n")  # gone on with
    assert tail.more() == ([b"other"], False)
    file.write_bytes(b"one\nanother\nmore\n")  # rewound and gone on with, between two looks
    assert tail.more() == ([b"one", b"another", b"more"], True)
    file.unlink()
    assert tail.more() == ([], True)
    assert tail.more() == ([], False)


def test_a_tail_does_not_read_again_what_lies_before_the_last_line(file):
    tail = Tail(file)
    file.write_bytes(b"one\ntwo\n")
    tail.more()
    with file.open("r+b") as inside:
        inside.write(b"eno\n")
    assert tail.more() == ([], False)


def test_files_are_let_go_of(file):
    with pytest.raises(RuntimeError), events.to(file):
        raise RuntimeError
    assert events._FILES == []
