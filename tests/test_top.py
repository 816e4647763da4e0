"""``baffle top``: figures against naive sums over a run's files, pages, a real terminal, a real scrape."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import time
import unicodedata
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle import cli, events, prometheus, top
from baffle.config import TrainConfig
from baffle.errors import ConfigError, DataError
from baffle.federation import StageRecord
from baffle.runs import RunFolder
from baffle.watch import Look, Round, View, Watch, read

BAFFLE = Path(sys.executable).with_name("baffle")
TINY = [*("--data", "digits", "--model", "mlp", "--clients", "6", "-K", "4", "--threads", "1")]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def baffle(*arguments):
    """The command in this process: its exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code
    return code, out.getvalue(), err.getvalue()


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def row(number, **changes):
    """A line of the metrics as this version writes it."""
    stage = {"asked": 10, "answered": 9, "seconds": 0.75, "bytes_down": 4000, "bytes_up": 360}
    return {
        "round": number,
        "fidelity": "forward-only",
        "loss": 2.0 - 0.1 * number,
        "participants": 10,
        "dropped": 1,
        "forward_passes": 99,
        "bytes_down": 4000,
        "bytes_up": 360,
        "seconds": 1.0,
        "stages": {"answer": stage},
        "dropouts": {"answer": {"late": 1}},
        "elapsed": 1.5 * (number + 1),
    } | changes


@pytest.fixture
def folder(tmp_path):
    """A run that has not had a round yet."""
    return RunFolder.create(tmp_path / "run", TrainConfig(rounds=8, cohort=10, clients=20))


def add(folder, *rows):
    for each in rows:
        folder.append_metrics(each)


def without_time(view):
    return replace(view, now=0.0, heard=None, written=None)


# What a folder says


@pytest.fixture(scope="module", params=["plain", "secure", "private"])
def real(request, tmp_path_factory):
    """A run folder as the command leaves it."""
    if request.param == "private":
        pytest.importorskip("dp_accounting")
    path = tmp_path_factory.mktemp("top") / request.param
    flags = {
        "plain": ["--dropout", "0.3"],
        "secure": ["--secure", "--dropout", "0.2"],
        "private": ["--privacy", "client", "--clip-norm", "5", "--noise-multiplier", "1"],
    }[request.param]
    flags += ["--rounds", "12", "--evaluate-every", "3"]
    if request.param == "secure":
        pytest.importorskip("cryptography")
    code, _, err = baffle("train", "--run", path, *TINY, *flags)
    assert code == 0, err
    return path


def test_figures_of_a_real_run_are_sums_over_its_rows(real):
    view, rows = read(real), rows_of(real)
    assert (view.done, view.rounds, view.ended, view.damaged) == (12, 12, True, 0)
    assert view.bytes_down == sum(row["bytes_down"] for row in rows)
    assert view.bytes_up == sum(row["bytes_up"] for row in rows)
    assert view.aborted == sum("aborted" in row for row in rows)
    looks = [row for row in rows if "test_accuracy" in row]
    assert [(look.round, look.accuracy, look.ema_accuracy) for look in view.looks] == [
        (row["round"], row["test_accuracy"], row["ema_accuracy"]) for row in looks
    ]
    dropouts, seconds = Counter(), Counter()
    for each in rows:
        for stage, reasons in each.get("dropouts", {}).items():
            for reason, count in reasons.items():
                dropouts[stage, reason] += count
        for stage, entry in each["stages"].items():
            seconds[stage] += entry["seconds"]
    assert dict(view.dropouts) == dict(dropouts)
    assert {stage: total for stage, (_, total) in view.stage_seconds.items()} == pytest.approx(dict(seconds))
    assert (sum(dropouts.values()) > 0) == (real.name != "private")
    assert len(seconds) == (1 if real.name != "secure" else len(view.stage_seconds))
    assert (len(seconds) > 2) == (real.name == "secure")
    assert view.epsilon == (looks[-1]["epsilon"] if real.name == "private" else None)
    assert view.last.answered == rows[-1]["participants"] - rows[-1]["dropped"]
    assert view.pace == pytest.approx(rows[-1]["elapsed"] / 12)
    assert view.events[0]["event"] == "run"


def test_the_page_of_a_real_run_says_so(real):
    code, out, err = baffle("top", real)
    assert (code, err) == (0, "")
    last = rows_of(real)[-1]
    assert re.search(r"^ rounds +12 of 12 +━+  100 %$", out, re.M)
    assert re.search(rf"^ accuracy +{last['test_accuracy']:.4f}  [ ▁-█]{{12}}  best 0\.\d{{4}}$", out, re.M)
    assert f"{real.name} " in out.splitlines()[0]
    assert re.search(r"● ended \d+ s ago", out.splitlines()[0])
    assert ("secure sums" in out) == (real.name == "secure")
    spent = re.search(r"^ ε +([\d.]+) at δ = 1e-05$", out, re.M)
    assert (spent and spent[1]) == (f"{last['epsilon']:.4g}" if real.name == "private" else None)
    assert bool(re.search(r"^ answer +simulated +[\d–]+ +\d+ +\d+$", out, re.M)) == (real.name != "private")
    for stage in last["stages"]:
        assert re.search(rf"^ {stage} +\d+ +\d+ +\d\.\d{{3}} ", out, re.M)


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path):
    code, out, err = baffle("top", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"baffle top: {tmp_path} is no run folder: it has no config.toml\n"
    with pytest.raises(DataError):
        Watch(tmp_path / "none")


def test_a_run_without_a_round_says_that_it_waits(folder):
    assert baffle("top", folder.path, "--once")[0] == 0
    out = baffle("top", folder.path)[1]
    assert "● starting" in out
    assert "waits for its first round" in out
    assert math.isnan(read(folder.path).pace)


def test_it_follows_a_file_that_grows_letter_by_letter(folder):
    watch = Watch(folder.path)
    text = "".join(json.dumps(row(number)) + "\n" for number in range(3)).encode()
    ends = [at for at, letter in enumerate(text) if letter == ord("\n")]
    with (folder.path / "metrics.jsonl").open("ab", buffering=0) as file:
        for at in range(len(text)):
            file.write(text[at : at + 1])
            if at % 7 == 0 or at in ends or at - 1 in ends:
                view = watch.look()
                assert view.done == sum(end <= at for end in ends)
                assert view.damaged == 0
    assert without_time(watch.look()) == without_time(read(folder.path))
    assert not watch.look().ended


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.booleans()), max_size=6))
def test_what_was_followed_is_what_is_read_at_once(tmp_path_factory, steps):
    """Rounds are added, and rewound and run again as a resume does: with other times."""
    path = tmp_path_factory.mktemp("run") / "run"
    folder = RunFolder.create(path, TrainConfig(rounds=100))
    watch, metrics, rows = Watch(path), path / "metrics.jsonl", []
    for again, (back, more, drops) in enumerate(steps, 1):
        rows = rows[: max(len(rows) - back, 0)]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(len(rows), len(rows) + more):
            changes = {} if drops else {"dropouts": {}}
            if number % 3 == 0:
                changes |= {"test_accuracy": 0.1 * again, "test_loss": None, "ema_accuracy": 0.5}
            rows.append(row(number, elapsed=number + again / 8, **changes))
            add(folder, rows[-1])
        look, fresh = watch.look(), read(path)
        assert look.done == len(rows)
        assert str(without_time(look)) == str(without_time(fresh))  # a NaN is itself


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_a_look_reads_what_was_added_and_no_more(folder):
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(5000)))

    def read_so_far():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    watch = Watch(folder.path)
    before = read_so_far()
    assert watch.look().done == 5000
    whole = read_so_far() - before
    assert whole > 1_000_000
    add(folder, row(5000))
    before = read_so_far()
    assert watch.look().done == 5001
    assert read_so_far() - before < 10_000


def test_rows_of_older_versions(folder):
    old = row(0, dropped=3)
    aborted = row(1, dropped=10, aborted="too few")
    for each in (old, aborted):
        del each["stages"], each["dropouts"]
        add(folder, each)
    view = read(folder.path)
    assert view.dropouts == {("round", "not said"): 3, ("round", "aborted"): 10}
    assert view.stage_seconds == {}
    page = "\n".join(top.lines(view, 80, 30))
    assert re.search(r"^ round +aborted +10 +10 +10$", page, re.M)
    assert re.search(r"^ cohort +10 asked, no sum: too few, 1 round without a sum$", page, re.M)


def test_how_many_rounds_are_asked_for(tmp_path):
    for number, (config, rounds) in enumerate(
        [(TrainConfig(), 200), (TrainConfig(rounds=7), 7), (TrainConfig(epochs=1.0), None)]
    ):
        folder = RunFolder.create(tmp_path / str(number), config)
        add(folder, row(0))
        view = read(folder.path)
        assert view.rounds == rounds
        assert ("rounds     1 done" in "\n".join(top.lines(view, 80, 30))) == (rounds is None)
    with events.to(folder.events):
        events.emit("run", "begins", rounds=31)
    assert read(folder.path).rounds == 31


@pytest.mark.parametrize(
    ("values", "spent", "shown"),
    [([1.0, 2.0], 2.0, "2 of 8 at δ"), ([None], math.inf, "inf of 8 at δ"), ([], None, "– of 8 at δ")],
)
def test_epsilon_is_the_last_one_said(tmp_path, values, spent, shown):
    config = TrainConfig(rounds=8, privacy="client", clip_norm=1.0, target_epsilon=8.0)
    folder = RunFolder.create(tmp_path / "run", config)
    add(folder, *(row(number, epsilon=value) for number, value in enumerate(values)), row(len(values)))
    view = read(folder.path)
    assert view.epsilon == spent
    assert shown in "\n".join(top.lines(view, 80, 30))


HOSTILE = "\x1b[2J\x1b[1;1Hx\r\n fake  line\u202e\u0007\u009b31m\ud800"
STRANGE = [
    *({"round": 0}, {"round": 0, "loss": "x", "participants": [], "stages": 3, "dropouts": 4}),
    {"round": 0, "participants": -3, "dropped": 1e400, "seconds": -1, "elapsed": "soon", "bytes_up": True},
    {"round": 0, "participants": 10**40, "bytes_down": 10**400, "stages": {HOSTILE: {"seconds": 10**300}}},
    {
        "round": 0,
        "stages": {"answer": 3},
        "dropouts": {"answer": {HOSTILE: 2}, HOSTILE: {HOSTILE: "x"}, "a": 1},
    },
    {"round": 0, "aborted": HOSTILE, "test_accuracy": "best", "epsilon": "none", "stages": {}},
    {"round": 0, "stages": {str(n): {} for n in range(1000)}},
]


@pytest.mark.parametrize("number", range(len(STRANGE)))
def test_rows_as_nobody_writes_them_still_make_a_page(folder, number):
    (folder.path / "metrics.jsonl").write_text(json.dumps(STRANGE[number]) + "\n", encoding="utf-8")
    view = read(folder.path)
    assert view.done == 1
    page = top.lines(view, 100, 40)
    assert len(page) <= 40
    assert all(line.isprintable() for line in page)
    pytest.importorskip("prometheus_client")
    assert list(prometheus.metrics(view))


def test_lines_that_are_no_rows_are_counted(folder):
    lines = [b"null", b"{", b"\xff", json.dumps(row(0)).encode(), json.dumps(row(7)).encode(), b"[" * 9999]
    (folder.path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    folder.events.write_bytes(b'{"event": 1}\n{"event": "run"}\n')
    view = read(folder.path)
    assert (view.done, view.damaged, len(view.events)) == (1, 6, 1)
    assert "6 damaged lines" in "\n".join(top.lines(view, 80, 30))


def test_a_file_that_cannot_be_read_is_one_line(folder):
    (folder.path / "metrics.jsonl").mkdir()
    code, out, err = baffle("top", folder.path)
    assert (code, out) == (2, "")
    assert err == f"baffle top: cannot read {folder.path}: Is a directory\n"


# Pages

NOW = 1_800_000_000.0


def view(**changes):
    stages = (
        StageRecord("answer", 10, 9, 1.25, 1_000_000, 4_200),
        StageRecord("unmask", 9, 9, 0.25, 2_000, 3_000),
    )
    last = Round(1.5, 10, 9, 2.0, 60.0, 1_002_000, 7_200, stages, {("answer", "late"): 1}, None)
    before = replace(last, elapsed=50.0, dropouts={("answer", "gone"): 2})
    first = View(
        name="digits-mlp-1",
        config=TrainConfig(rounds=100, cohort=10, clients=50, model="mlp", secure=True),
        now=NOW,
        ended=False,
        rounds=100,
        done=30,
        written=NOW - 3,
        heard=NOW - 3,
        recent=(*[replace(before, elapsed=22.0 + 2 * n) for n in range(19)], last),
        losses=[3.0 - n / 10 for n in range(30)],
        looks=[Look(n, 2.0, n / 60, n / 120) for n in range(9, 30, 10)],
        epsilon=None,
        bytes_down=30_060_000,
        bytes_up=216_000,
        aborted=2,
        stage_seconds={"answer": (30, 37.5), "unmask": (28, 7.0)},
        dropouts={("answer", "late"): 7, ("answer", "gone"): 40, ("unmask", "gone"): 3},
        events=(
            {
                "time": "2027-01-15T07:59:57.000Z",
                "level": "warning",
                "event": "dropout",
                "round": 29,
                "stage": "answer",
                "client": "client-004",
                "reason": "late",
                "text": "nothing in 600 s",
            },
            {"time": "2027-01-15T08:00:00.000Z", "level": "info", "event": "resume", "text": "goes on"},
        ),
        damaged=0,
    )
    return replace(first, **changes)


PAGE = """\
 digits-mlp-1                                      ● running, last word 3 s ago
 digits · mlp · 50 clients, 10 a round · forward-only, K = 100 · secure sums
 rounds     30 of 100  ━━━━━━━━━━━━━━━──────────────────────────────────   30 %
 time       2.0 s a round, 2 min 20 s left, 1 min 00 s so far
 cohort     10 asked, 9 answered, 2 rounds without a sum
 loss       0.1000  ███▇▇▇▇▆▆▆▆▅▅▅▅▄▄▄▄▃▃▃▃▂▂▂▂▁▁▁  best 0.1000
 accuracy   0.4833           ▁▁▁▁▁▁▁▁▁▁▄▄▄▄▄▄▄▄▄▄█  best 0.4833
 EMA        0.2417           ▁▁▁▁▁▁▁▁▁▁▄▄▄▄▄▄▄▄▄▄█  best 0.2417

 stage       asked  answered   seconds                         down          up
 answer         10         9     1.250  █████████▍           1.0 MB      4.2 kB
 unmask          9         9     0.250  █▉                   2.0 kB      3.0 kB
 round          10         9     2.000                       1.0 MB      7.2 kB
 a client                                                  100.2 kB       720 B
 all rounds                       60.0                      30.1 MB    216.0 kB

 dropouts                 last round  last 20     ever
 answer     gone                   –       38       40
 answer     late                   1        1        7
 unmask     gone                   –        –        3

 events
 07:59:57  dropout         round 29, client-004, answer, late: nothing in 600 s
 08:00:00  resume          goes on
"""


@pytest.fixture
def greenwich(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("greenwich")
def test_a_page():
    assert "\n".join(top.lines(view(), 80, 24)) + "\n" == PAGE


@pytest.mark.usefixtures("greenwich")
def test_a_wide_page_has_the_dropouts_beside_the_stages():
    page = top.lines(view(), 150, 30)
    (at,) = (number for number, line in enumerate(page) if line.startswith(" stage"))
    assert re.fullmatch(r" stage .* up +dropouts +last round  last 20     ever", page[at])
    assert re.fullmatch(r" answer .* 4\.2 kB +answer +gone +– +38 +40", page[at + 1])
    assert page[-1].endswith("goes on")
    assert page[2] == page[at - 1] == ""


def columns(text):
    """How wide a terminal shows a text, without the module's own words for it."""
    marks = sum(unicodedata.combining(letter) != 0 for letter in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in text)


@pytest.mark.parametrize("width", [0, 1, 5, 20, 40, 66, 79, 80, 81, 123, 124, 140, 200, 400])
def test_a_page_fits_whatever_the_terminal(width):
    wide = {
        "event": "日本語" * 9,
        "client": "客" * 30,
        "text": "e\u0301" * 300,
        "time": "now",
        "level": "error",
    }
    many = {("answer", f"reason {number}"): number for number in range(50)}
    for shown in (
        *(view(), view(recent=(), done=0, losses=[], looks=[]), view(looks=[]), view(done=10**6)),
        *(view(name="長い名前" * 20, events=(wide,) * 50, dropouts=many), view(damaged=3)),
    ):
        for height in (0, 1, 2, 7, 12, 23, 24, 40, 100):
            page = top.lines(shown, width, height)
            assert len(page) <= height
            assert all(columns(line) <= max(width, 0) for line in page), page


def test_color_is_paint_alone():
    plain, painted = top.lines(view(), 80, 24), top.lines(view(), 80, 24, color=True)
    assert "\x1b" not in "".join(plain)
    assert [ESCAPE.sub("", line).rstrip() for line in painted] == plain
    assert all(ESCAPE.findall(line)[-1] == "\x1b[0m" for line in painted if "\x1b" in line)


def test_hostile_texts_cannot_move_the_cursor_nor_fake_a_line(folder):
    add(folder, row(0, aborted=HOSTILE))
    hostile = dict.fromkeys(("time", "level", "event", "client", "stage", "reason", "text"), HOSTILE)
    folder.events.write_text(json.dumps(hostile) + "\n")  # as if this package had not written it
    code, out, _ = baffle("top", folder.path)
    assert code == 0
    assert all(line.isprintable() for line in out.split("\n"))
    assert not re.search(r"^ *fake", out, re.M)
    painted = "\n".join(top.lines(read(folder.path), 120, 40, color=True))
    assert ESCAPE.sub("", painted).replace("\n", "").isprintable()
    assert set(ESCAPE.findall(painted)) <= {f"\x1b[{code}m" for code in (0, 1, 2, 32, 33, 31, 36)}


def test_many_reasons_are_summed_up_where_room_is_short():
    many = {("answer", f"reason {number:02d}"): number for number in range(1, 21)}
    page = "\n".join(top.lines(view(dropouts=many), 80, 24))
    assert re.search(r"^ answer +reason 20 +– +– +20$", page, re.M)
    assert re.search(r"^ +and 17 other reasons, 153 ever$", page, re.M)
    assert "goes on" in page
    assert "other reasons" not in "\n".join(top.lines(view(dropouts=many), 80, 60))


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"heard": NOW - 15}, "running, last word 15 s ago"),
        ({"heard": NOW - 17}, "quiet, last word 17 s ago"),
        ({"heard": NOW - 3 * 86400 - 7200}, "quiet, last word 3 d 2 h ago"),
        ({"heard": NOW - 4000, "ended": True}, "ended 1 h 06 min ago"),
        ({"heard": NOW + 5}, "running, last word 0 s ago"),
        ({"events": ({"event": "failed", "text": "x"},)}, "failed 3 s ago"),
        ({"recent": (), "done": 0}, "starting"),
    ],
)
def test_what_became_of_a_run(changes, state):
    assert top.lines(view(**changes), 80, 24)[0].endswith(" ● " + state)


def test_losses_that_stay_on_devices_give_their_place_to_the_tests():
    page = "\n".join(top.lines(view(losses=[math.nan] * 30), 80, 24))
    assert re.search(r"^ test loss +2\.0000 ", page, re.M)
    assert not re.search(r"^ loss", page, re.M)


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=80),
    st.integers(1, 40),
)
def test_a_sparkline_is_the_means_of_its_columns(values, width):
    curve = top._sparkline(range(len(values)), values, len(values), width)
    count = min(len(values), width)
    parts = [[v for at, v in enumerate(values) if at * count // len(values) == c] for c in range(count)]
    means = [[v for v in part if not math.isnan(v)] for part in parts]
    means = [sum(part) / len(part) if part else math.nan for part in means]
    known = [mean for mean in means if not math.isnan(mean)]
    assert len(curve) == count
    before = " "
    for letter, mean in zip(curve, means, strict=True):
        if math.isnan(mean):
            assert letter == before
        elif max(known) > min(known):
            height = 7 * (mean - min(known)) / (max(known) - min(known))
            assert abs("▁▂▃▄▅▆▇█".index(letter) - height) <= 0.501
        before = letter


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (2e16, "20000.0 TB"),
    ],
)
def test_sizes(count, text):
    assert events.size(count) == text


# A terminal


class Terminal:
    """A process on a terminal of its own, that ends with the test."""

    def __init__(self, *command, rows=24, width=80):
        self.master, slave = pty.openpty()
        self.resize(rows, width)
        self.before = termios.tcgetattr(self.master)
        self.seen = b""
        self.process = subprocess.Popen(
            [str(BAFFLE), *map(str, command)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"},
        )
        os.close(slave)

    def resize(self, rows, width):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, width, 0, 0))

    def type(self, keys):
        os.write(self.master, keys)

    def until(self, condition):
        """Reads what is shown until the condition holds of the last page."""
        end = time.monotonic() + 60
        while not condition(self.page()):
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 1 << 16)
                except OSError:  # Linux's end of a terminal that nobody has open
                    self.process.wait(30)
                    assert condition(self.page()), self.seen
                    return

    def page(self):
        frame = self.seen.split(b"\x1b[H")[-1].decode(errors="replace")
        return [line.rstrip("\r") for line in ESCAPE.sub("", frame).split("\n")]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        with contextlib.suppress(OSError):
            os.close(self.master)


ENTERED, LEFT = b"\x1b[?1049h\x1b[?25l\x1b[?7l", b"\x1b[?7h\x1b[?25h\x1b[?1049l"


def ended(terminal):
    """The exit code, once the terminal is as it was."""
    terminal.until(lambda _: terminal.process.poll() is not None and terminal.seen.endswith(LEFT))
    assert terminal.seen.startswith(ENTERED)
    assert terminal.seen.count(ENTERED) == terminal.seen.count(LEFT)
    assert termios.tcgetattr(terminal.master) == terminal.before
    return terminal.process.returncode


def test_a_live_page_follows_the_run_and_the_window_until_q(folder):
    with Terminal("top", folder.path, "--every", "0.1") as terminal:
        terminal.until(lambda page: any("waits for its first round" in line for line in page))
        assert len(terminal.page()) == 24
        assert terminal.page()[-1] == " q ends · every 0.1 s"
        add(folder, row(0))
        terminal.until(lambda page: any("1 of 8" in line for line in page))
        add(folder, row(1))
        terminal.until(lambda page: any("2 of 8" in line for line in page))
        terminal.resize(40, 150)
        terminal.until(lambda page: len(page) == 40)
        assert len(next(line for line in terminal.page() if "2 of 8" in line)) > 130
        assert b"\x1b[36m" in terminal.seen
        assert terminal.seen.count(b"\x1b[2J") == 0  # nothing blinks
        terminal.type(b"xq")
        assert ended(terminal) == 0


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_the_terminal_is_as_it_was_whatever_ends_the_page(how, folder):
    with Terminal("top", folder.path) as terminal:
        terminal.until(lambda page: "q ends" in page[-1])
        if how == "Ctrl-C":
            terminal.type(b"\x03")
        else:
            terminal.process.terminate()
        assert ended(terminal) == (0 if how == "Ctrl-C" else 128 + signal.SIGTERM)


def test_a_page_that_is_put_aside_and_taken_up_again(folder):
    with Terminal("top", folder.path, "--every", "0.1") as terminal:
        terminal.until(lambda page: "q ends" in page[-1])
        # Nobody could wake an orphan of its own session, so that the kernel does not stop it for Ctrl-Z: it
        # sees the signal, and goes on at once.
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.until(lambda _: terminal.seen.count(ENTERED) == 2)
        terminal.until(lambda page: "q ends" in page[-1])
        terminal.type(b"q")
        assert ended(terminal) == 0


def test_a_terminal_that_is_gone_ends_it(folder):
    with Terminal("top", folder.path) as terminal:
        terminal.until(lambda page: "q ends" in page[-1])
        os.close(terminal.master)
        assert terminal.process.wait(30) in (128 + signal.SIGHUP, -signal.SIGHUP)


def test_once_on_a_terminal_and_elsewhere(folder, monkeypatch):
    add(folder, row(0))
    with Terminal("top", folder.path, "--once") as terminal:
        terminal.until(lambda _: terminal.process.poll() is not None)
        assert b"\x1b[36m" in terminal.seen
        assert ENTERED not in terminal.seen
    monkeypatch.setenv("COLUMNS", "60")
    done = subprocess.run([str(BAFFLE), "top", str(folder.path)], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert max(map(len, done.stdout.decode().splitlines())) == 60


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--every", "0"], "every = 0: it lies in [0.1, 3600] seconds"),
        (["--every", "nan"], "every = nan: it lies in [0.1, 3600] seconds"),
        (["--once", "--serve", "9"], "--once prints one page and ends: nobody could ask what --serve offers"),
        (["--serve", "here"], "serve = 'here': HOST:PORT is needed, as 127.0.0.1:9464, or a port alone"),
        (["--serve", "1:2:3"], "serve = '1:2:3': HOST:PORT is needed, as 127.0.0.1:9464, or a port alone"),
        (["--serve", "65536"], "serve = '65536': HOST:PORT is needed, as 127.0.0.1:9464, or a port alone"),
    ],
)
def test_flags_that_cannot_be(flags, complaint, folder):
    assert baffle("top", folder.path, *flags) == (2, "", f"baffle top: {complaint}\n")


# Prometheus


def scrape(url, accept="text/plain"):
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def samples(text):
    parser = pytest.importorskip("prometheus_client.parser")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_of_a_real_run(real):
    pytest.importorskip("prometheus_client")
    rows, last = rows_of(real), rows_of(real)[-1]
    with prometheus.serving(Watch(real), "127.0.0.1", 0) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", url)
        text, kind = scrape(url)
    assert kind.startswith("text/plain")
    expected = {
        ("baffle_round",): 12,
        ("baffle_rounds",): 12,
        ("baffle_participants",): last["participants"],
        ("baffle_answered",): last["participants"] - last["dropped"],
        ("baffle_loss",): last["loss"],
        ("baffle_accuracy",): last["test_accuracy"],
        ("baffle_ema_accuracy",): last["ema_accuracy"],
        ("baffle_last_round_timestamp_seconds",): (real / "metrics.jsonl").stat().st_mtime,
        ("baffle_aborted_total",): sum("aborted" in row for row in rows),
        ("baffle_bytes_total", ("direction", "down")): sum(row["bytes_down"] for row in rows),
        ("baffle_bytes_total", ("direction", "up")): sum(row["bytes_up"] for row in rows),
    }
    if "epsilon" in last:
        expected["baffle_epsilon",] = last["epsilon"]
    for each in rows:
        for stage, reasons in each.get("dropouts", {}).items():
            for reason, count in reasons.items():
                key = ("baffle_dropouts_total", ("reason", reason), ("stage", stage))
                expected[key] = expected.get(key, 0) + count
        for stage, entry in each["stages"].items():
            for name, more in (("count", 1), ("sum", entry["seconds"])):
                key = (f"baffle_stage_seconds_{name}", ("stage", stage))
                expected[key] = expected.get(key, 0) + more
    found = samples(text)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected)


def test_scrapes_follow_the_run_and_name_what_they_are(folder):
    pytest.importorskip("prometheus_client")
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict

    with prometheus.serving(Watch(folder.path), "127.0.0.1", 0) as url:
        first = samples(scrape(url)[0])
        assert (first["baffle_round",], first["baffle_rounds",]) == (0, 8)
        assert not {"baffle_loss", "baffle_accuracy", "baffle_epsilon"} & {name for name, *_ in first}
        add(folder, row(0, epsilon=None, dropouts={'an"sw\\er': {"la\u2028te": 2}}))
        text, kind = scrape(url, "application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
    families = {family.name: family for family in strict(text)}
    kinds = {name: family.type for name, family in families.items()}
    assert kinds == dict.fromkeys(kinds, "gauge") | {
        **dict.fromkeys(("baffle_bytes", "baffle_dropouts", "baffle_aborted"), "counter"),
        "baffle_stage_seconds": "summary",
    }
    assert families["baffle_epsilon"].samples[0].value == math.inf
    assert families["baffle_dropouts"].samples[0].labels == {"stage": 'an"sw\\er', "reason": "la te"}
    assert all(family.documentation.endswith(".") for family in families.values())


def test_the_server_ends_with_its_block(folder):
    pytest.importorskip("prometheus_client")
    with pytest.raises(RuntimeError), prometheus.serving(Watch(folder.path), "127.0.0.1", 0) as url:
        raise RuntimeError
    with pytest.raises(OSError, match="refused"):
        scrape(url)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("box.example:80", ("box.example", 80)),
    ],
)
def test_addresses(text, expected):
    assert prometheus.address(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "host:", "a b:1", "::1:80", "[::1]", "-1", "1.5", "٣", "host:80\n"]
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="HOST:PORT is needed"):
        prometheus.address(text)


def test_an_address_that_is_taken_is_one_line(folder):
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = baffle("top", folder.path, "--serve", port)
    assert (code, out) == (2, "")
    assert err == f"baffle top: cannot listen at 127.0.0.1:{port}: Address already in use\n"


def test_serving_without_a_terminal_until_interrupted(folder):
    pytest.importorskip("prometheus_client")
    add(folder, row(0))
    command = [str(BAFFLE), "top", str(folder.path), "--serve", ":0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            assert samples(scrape(url)[0])["baffle_round",] == 1
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 0


def test_serving_beside_a_live_page_says_where(folder):
    pytest.importorskip("prometheus_client")
    with Terminal("top", folder.path, "--serve", "127.0.0.1:0", "--every", "0.1") as terminal:
        terminal.until(lambda page: "http://" in page[-1] and page[-1].endswith("/metrics"))
        add(folder, row(0))
        assert samples(scrape(terminal.page()[-1].split()[-1])[0])["baffle_round",] == 1
        terminal.type(b"q")
        assert ended(terminal) == 0


def test_without_the_package_the_extra_is_named(folder):
    code = """
        import sys
        sys.modules["prometheus_client"] = None
        from baffle.cli import main
        raise SystemExit(main(sys.argv[1:]))
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), "top", str(folder.path)]
    done = subprocess.run([*command, "--serve", "0"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "baffle top: --serve needs the package 'prometheus_client', which is not installed: "
        "pip install 'baffle-fl[prometheus]'\n"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
