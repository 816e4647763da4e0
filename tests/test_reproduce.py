"""``baffle reproduce``: cells are run once, kept, gone on with; tables follow from what is kept."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle import cli, plots, training
from baffle.config import TrainConfig
from baffle.errors import BaffleError, ConfigError, DataError
from baffle.reproduce import figures, measured, tables, verdicts
from baffle.reproduce.cell import MACHINE, key, settings
from baffle.reproduce.experiment import SCALES, Experiment
from baffle.reproduce.running import Runner, rounds_of
from baffle.reproduce.workers import Work, share, work
from baffle.runs import RunFolder

TOML = """
title = "Tiny"
about = "Two rows and two columns on the packaged digits."
figure = "curves"

[settings]
data = "digits"
model = "mlp"
clients = 2
batch-size = 8
directions = 4
fidelity = "law"
ema = 0.5

[scales.smoke]
seeds = [0, 1]
settings = { rounds = 2 }

[scales.paper]
seeds = [0, 1, 2]
settings = { rounds = 3 }

[columns.few]
title = "few"
settings = { train-samples = 64 }

[columns.more]
title = "more"
settings = { train-samples = 128 }

[rows.law]
title = "by the law"

[rows.backprop]
title = "backprop"
settings = { fidelity = "backprop" }
columns = ["few"]

[rows.plain]
title = "without EMA"
of = "law"
metric = "accuracy"
columns = ["few"]

[paper]
source = "a paper"

[paper.values.law]
few = 50.0

[spread]
points = 1.5
"""
TIMES = ("seconds", "peak_mb", "printed_on")


@pytest.fixture
def no_pictures(monkeypatch):
    """matplotlib takes a second to load."""
    monkeypatch.setattr(plots, "available", lambda: False)


@pytest.fixture
def tiny(tmp_path, no_pictures):
    return made(tmp_path / "experiments" / "tiny", TOML)


def made(folder, text):
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(text)
    return Experiment.read(folder)


def command(*arguments):
    """Code, and what was printed on either stream."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["reproduce", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def reproduce(experiment, *arguments):
    parent = experiment.folder.parent
    places = ["--experiments", parent, "--runs", parent.parent / "runs"]
    return command(experiment.name, *places, *arguments)


def run_all(cells, runs, **options):
    assert work(cells, runs, stop=lambda: False, say=lambda line: None, **options)
    return [cell.read() for cell in cells]


def plain(row):
    """What does not depend on the machine and its load."""
    return {name: value for name, value in row.items() if name not in TIMES}


# -- settings -------------------------------------------------------------------------------------------

VALUES = {
    "directions": st.integers(1, 50),
    "sigma": st.sampled_from([1e-4, 1e-3, 0.5]),
    "scheme": st.sampled_from(["forward", "central", "tangent"]),
    "ema-warmup": st.booleans(),
    "rounds": st.integers(1, 9),
}


@given(st.lists(st.fixed_dictionaries({}, optional=VALUES), min_size=7, max_size=7), st.integers(0, 3))
def test_settings_are_laid_over_each_other_in_order(tmp_path_factory, tables_, seed):
    names = ["settings", "scales.small.settings", "columns.c.settings", "columns.c.small"]
    names += ["rows.r.settings", "rows.r.small", "rows.r.in.c"]
    text = 'title = "t"\nabout = "a"\n'
    for name, table in zip(names, tables_, strict=True):
        text += f"[{name}]\n" + "".join(f"{n} = {json.dumps(v)}\n" for n, v in table.items())
    # Of another scale and another column: never seen.
    text += "[columns.c.paper]\nrounds = 77\n[rows.r.paper]\nrounds = 78\n"
    text += "[columns.d]\n[rows.r.in.d]\nrounds = 79\n"
    text += f"[scales.paper]\nsettings = {{ rounds = 80 }}\n[scales.small]\nseeds = [{seed}]\n"
    experiment = made(tmp_path_factory.mktemp("merged") / "x", text)
    (config,) = [cell.config for cell in experiment.cells("small") if cell.column == "c"]
    expected = {}
    for table in tables_:  # a naive chain
        for name, value in table.items():
            expected[name.replace("-", "_")] = value
    for name in VALUES:
        name = name.replace("-", "_")
        default = getattr(TrainConfig(), name)
        assert getattr(config, name) == expected.get(name, default)
    assert config.seed == seed


def test_cells_come_seed_by_seed_and_each_run_once(tiny):
    assert [(cell.seed, cell.name) for cell in tiny.cells("smoke")] == [
        *[(0, "law/few"), (0, "law/more"), (0, "backprop/few")],
        *[(1, "law/few"), (1, "law/more"), (1, "backprop/few")],
    ]
    assert tiny.cells("small") == []
    again = TOML + '[columns.same]\ntitle = "the same runs"\nsettings = { train-samples = 64 }\n'
    more = made(tiny.folder.parent / "again", again)
    assert [cell.name for cell in more.cells("smoke") if cell.column == "same"] == []
    assert len(more.cells("smoke")) == 6
    assert more.cell("smoke", "law", "same", 0).key == more.cell("smoke", "law", "few", 0).key


def test_a_key_is_of_what_figures_depend_on():
    assert key(TrainConfig()) == hashlib.sha256(b"{}").hexdigest()[:16]
    told = b'{"directions":200,"epochs":2.0,"seed":1}'
    assert key(TrainConfig(directions=200, epochs=2, seed=1)) == hashlib.sha256(told).hexdigest()[:16]
    base = TrainConfig(data="mnist", model="mobilenet-v2", pretrained="a/weights.npz")
    elsewhere = dataclasses.replace(
        base,
        data_folder="somewhere",
        pretrained="b/weights.npz",
        threads=3,
        device="cuda",
        checkpoint_every=7,
        evaluate_every=3,
    )
    assert key(base) == key(elsewhere)
    assert key(base) != key(dataclasses.replace(base, pretrained="a/other.npz"))
    pacs, office = (TrainConfig(data="domains", data_folder=f"x/{name}") for name in ("PACS", "OfficeHome"))
    assert key(pacs) != key(office)
    assert key(pacs) == key(TrainConfig(data="domains", data_folder="y/PACS"))
    other = {"clients": 11, "alpha": 0.5, "model": "mlp", "clip": 0.1, "augment": "crop-flip", "seed": 5}
    keys = {key(TrainConfig(**{name: value})) for name, value in other.items()}
    assert len(keys | {key(TrainConfig())}) == len(other) + 1


def test_every_setting_counts_but_those_of_the_machine():
    names = {entry.name for entry in dataclasses.fields(TrainConfig)}
    assert settings(TrainConfig()).keys() == names - MACHINE


def test_files_lie_where_data_says(tmp_path):
    text = 'title = "t"\nabout = "a"\n[settings]\ndata = "domains"\ndata-folder = "PACS"\n'
    text += 'model = "mobilenet-v2"\npretrained = "weights.npz"\n[scales.smoke]\n[columns.c]\n[rows.r]\n'
    experiment = made(tmp_path / "x", text)
    data = tmp_path / "data"
    (data / "mobilenet").mkdir(parents=True)
    (data / "mobilenet" / "weights.npz").touch()
    (config,) = [cell.config for cell in experiment.cells("smoke", data=data, threads=2, device="cuda")]
    assert config.data_folder == str(data / "PACS")
    assert config.pretrained == str(data / "mobilenet" / "weights.npz")
    assert (config.threads, config.device) == (2, "cuda")
    (bare,) = experiment.cells("smoke")
    assert bare.key == key(config)
    (data / "weights.npz").touch()
    (config,) = [cell.config for cell in experiment.cells("smoke", data=data)]
    assert config.pretrained == str(data / "weights.npz")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("[settings]", "[setings]", "unknown setings: did you mean settings?"),
        ("clients = 2", "client = 2", "at scale smoke: unknown setting 'client': did you mean clients?"),
        ("clients = 2", "clients = 0", "clients = 0: it must be positive"),
        ("[rows.backprop]", "[rows.backprop.in.few2]", "unknown rows.backprop.in.few2: did you mean few?"),
        ("[columns.few]", "[columns.few.tiny]", "unknown columns.few.tiny"),
        ("[scales.smoke]", "[scales.huge]", "unknown scales.huge"),
        ("seeds = [0, 1]", 'seeds = ["a"]', "a list of whole numbers is expected"),
        ('of = "law"', 'of = "lwa"', "of = 'lwa' is no row with runs of its own"),
        ('of = "law"', 'of = "law"\nsettings = { rounds = 1 }', "has no settings of its own"),
        ("[paper.values.law]", "[paper.values.low]", "unknown paper.values.low: did you mean law?"),
        ("few = 50.0", 'few = "50"', "a number is expected"),
        ('source = "a paper"', "", "paper.source is missing"),
        ('columns = ["few"]', 'columns = ["fw"]', "unknown rows.backprop.columns.fw: did you mean few?"),
        ('figure = "curves"', 'figure = "curve"', "figure = 'curve': choose one of curves, by-k"),
        ('title = "Tiny"', "", "title is missing"),
        ('data = "digits"', 'data = "images"', "data-folder is missing"),
        ("points = 1.5", "points = nan", "spread.points = nan: a number is expected"),
        ("points = 1.5", "point = 1.5", "unknown spread.point: did you mean points?"),
        ("[spread]", "[spread", "is no TOML"),
    ],
)
def test_what_is_wrong_in_a_toml_is_named_in_a_line(tmp_path, old, new, why):
    assert old in TOML
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        Experiment.read(folder)
    assert why in str(caught.value)
    assert "experiment.toml" in str(caught.value)
    code, out, err = command("tiny", "--experiments", folder.parent, "--runs", tmp_path / "runs")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["experiment.toml", "experiments", "tiny"]


# -- runs ----------------------------------------------------------------------------------------------


def test_a_cell_is_the_run_that_train_makes(tiny, tmp_path):
    cell = tiny.cells("smoke")[0]
    assert cell.read() is None
    (row,) = run_all([cell], tmp_path / "runs")
    config = dataclasses.replace(cell.config, evaluate_every=1)
    same = training.train(config, tmp_path / "beside", lambda progress: None)
    rows = same.metrics()
    assert len(rows) == 2
    assert row["accuracy"] == round(100 * rows[-1]["test_accuracy"], 3)
    assert row["ema_accuracy"] == round(100 * rows[-1]["ema_accuracy"], 3)
    assert row["top5"] == round(100 * rows[-1]["test_top5"], 3)
    assert row["forward_passes"] == sum(r["forward_passes"] for r in rows) > 0
    assert (row["bytes_up"], row["bytes_down"]) == tuple(
        sum(r[name] for r in rows) for name in ("bytes_up", "bytes_down")
    )
    assert [point[0] for point in row["curve"]] == [1, 2]
    assert row["curve"][-1] == [
        2,
        row["forward_passes"],
        row["bytes_up"],
        row["accuracy"],
        row["ema_accuracy"],
    ]
    named = ("experiment", "cell", "scale", "seed", "fidelity", "rounds")
    assert [row[name] for name in named] == ["tiny", "law/few", "smoke", 0, "law", 2]
    assert row["settings"] == settings(cell.config)
    assert row["printed_on"]["versions"]["torch"]
    weights = RunFolder.open(tmp_path / "runs" / cell.key).load_weights("final")
    assert np.array_equal(weights, same.load_weights("final"))


def test_what_is_kept_is_not_run_again(tiny, tmp_path, monkeypatch):
    cells = tiny.cells("smoke")
    kept = run_all(cells, tmp_path / "runs")
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(training, "resume", None)
    assert run_all(cells, tmp_path / "elsewhere") == kept
    # ... nor by an experiment that asks for the same runs.
    other = made(
        tiny.folder.parent / "other",
        TOML.replace("rows.law", "rows.first")
        .replace('of = "law"', 'of = "first"')
        .replace("values.law", "values.first"),
    )
    assert run_all(other.cells("smoke"), tmp_path / "elsewhere") == kept
    assert not (other.folder / "results").exists()


def test_a_stale_or_damaged_row_is_refused(tiny, tmp_path):
    cell = tiny.cells("smoke")[0]
    run_all([cell], tmp_path / "runs")
    path, sound = cell.find(), cell.read()
    # A setting that came later, and is at its default, makes nothing stale.
    path.write_text(
        json.dumps({**sound, "settings": {n: v for n, v in sound["settings"].items() if n != "clip"}})
    )
    assert cell.read() is not None
    for changed in ({"clients": 3}, {"clip": 0.5}, {"unheard-of": 1}):
        path.write_text(json.dumps({**sound, "settings": {**sound["settings"], **changed}}))
        code, _, err = reproduce(tiny, "--show")
        assert (code, err.count("\n")) == (2, 1)
        assert f"is stale: it was run with another {next(iter(changed))}" in err
    for damaged in ("", "[]", "{}", '{"settings": 3}', "\x00"):
        path.write_text(damaged)
        with pytest.raises(DataError, match="is damaged"):
            cell.read()


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, no_pictures):
    text = TOML.replace(
        '[rows.law]\ntitle = "by the law"',
        '[rows.law]\ntitle = "by the law"\nsettings = { '
        'fidelity = "backprop", optimizer = "sgd", learning-rate = 2e9 }',
    )
    text = text.replace("rounds = 2", "rounds = 20")
    experiment = made(tmp_path / "experiments" / "tiny", text)
    code, out, _ = reproduce(experiment)
    assert code == 0
    assert "diverged" in out
    rows = {cell.name: cell.read() for cell in experiment.cells("smoke")}
    assert rows["law/few"]["failed"]
    assert rows["law/few"]["accuracy"] is None
    assert "failed" not in rows["backprop/few"]
    entry = verdicts.entry(experiment, "law", "few")
    assert (entry.verdict, entry.seeds, entry.diverged, entry.mean) == ("diverged", 0, 2, None)
    assert "diverged" in "\n".join(tables.markdown(experiment))
    files = {path: path.stat().st_mtime_ns for path in experiment.folder.glob("results/cells/*.json")}
    assert "nothing is left to run" in reproduce(experiment)[1]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "4 of 6 cells are to be run" in reproduce(experiment, "--again")[1]
    changed = {path for path, then in files.items() if path.stat().st_mtime_ns != then}
    assert {json.loads(path.read_text())["cell"] for path in changed} == {"law/few", "law/more"}


def test_a_run_that_was_stopped_goes_on_to_the_same_row(tiny, tmp_path):
    cells = tiny.cells("paper")[:2]
    whole = run_all(cells, tmp_path / "whole")
    for cell in cells:
        cell.find().unlink()
    asked = iter([False, False, True])  # before the first, and after its first two rounds
    said = []
    assert not work(cells, tmp_path / "runs", stop=lambda: next(asked, True), say=said.append)
    assert said[-1] == "law/few seed 0: stopped after round 2"
    assert [cell.read() for cell in cells] == [None, None]
    # The machine has changed: it is the same run all the same.
    moved = [dataclasses.replace(c, config=dataclasses.replace(c.config, checkpoint_every=2)) for c in cells]
    again = run_all(moved, tmp_path / "runs")
    assert [plain(row) for row in again] == [plain(row) for row in whole]
    assert RunFolder.open(tmp_path / "runs" / cells[0].key).config().checkpoint_every == 2


def test_a_cell_that_another_process_has_is_left_to_it(tiny, tmp_path):
    cells, runs = tiny.cells("smoke")[:2], tmp_path / "runs"
    claim = runs / ".claims" / cells[0].key
    claim.mkdir(parents=True)
    with RunFolder(claim).held():
        assert Runner(runs, lambda line: None).run(cells[0]) == "held"
        run_all(cells, runs)
        assert [cell.find() is not None for cell in cells] == [False, True]
        assert not (runs / cells[0].key).exists()
    (runs / cells[0].key).mkdir()
    with RunFolder(runs / cells[0].key).held():  # by `baffle train --resume`
        assert Runner(runs, lambda line: None).run(cells[0]) == "held"
    # Now of a process that was killed before it wrote anything
    run_all(cells, runs)
    assert cells[0].find() is not None


def test_a_cell_that_another_process_left_is_taken(tiny, tmp_path):
    cells, runs = tiny.cells("smoke")[:2], tmp_path / "runs"
    claim = runs / ".claims" / cells[0].key
    claim.mkdir(parents=True)
    with contextlib.ExitStack() as other:
        other.enter_context(RunFolder(claim).held())
        said = []

        def say(line):
            said.append(line)
            other.close()  # it was killed, after the first cell was passed by

        assert work(cells, runs, stop=lambda: False, say=say)
    assert [line.split(" seed")[0] for line in said] == ["law/more", "law/more", "law/few", "law/few"]
    assert all(cell.find() for cell in cells)


def test_a_budget_begins_no_cell_after_its_end(tiny, tmp_path):
    code, out, _ = reproduce(tiny, "--budget", 0)
    assert code == 0
    assert "stopped: 6 of 6 cells are left" in out
    assert not list(tiny.folder.rglob("*.json"))
    assert (tiny.folder / "results" / "tiny-smoke.csv").read_text().count("\n") == 1


def test_looks_are_few():
    assert rounds_of(TrainConfig(rounds=70)) == 70
    assert rounds_of(TrainConfig(epochs=5, local_epochs=2)) == 3
    assert rounds_of(TrainConfig(epochs=2, batch_size=8, clients=2, train_samples=128)) == 16


@pytest.mark.parametrize(
    ("every", "looks"), [("", 20), ("evaluate-every = 1", 40), ("evaluate-every = 50", 2)]
)
def test_a_curve_has_few_points(tmp_path, no_pictures, every, looks):
    text = TOML.replace("rounds = 2", "rounds = 80").replace("clients = 2", f"clients = 2\n{every}")
    cell = made(tmp_path / "experiments" / "tiny", text).cells("smoke")[0]
    (row,) = run_all([cell], tmp_path / "runs")
    assert len(row["curve"]) == looks
    assert row["curve"][-1][0] == 80


# -- processes -----------------------------------------------------------------------------------------

LONG = TOML.replace("rounds = 2", "rounds = 60, checkpoint-every = 7").replace("[0, 1]", "[0]")


def workers_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def until(true, seconds=300.0):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.01)


def rounds_kept(runs):
    return sum(path.read_text().count("\n") for path in runs.glob("*/metrics.jsonl"))


@pytest.fixture
def long(tmp_path, no_pictures):
    return made(tmp_path / "experiments" / "long", LONG)


@pytest.fixture
def begin(tmp_path):
    """Begins a command; ends it and its workers, whatever becomes of the test."""
    begun, pids = [], []

    def command_of(experiment, *arguments):
        places = ["--experiments", str(experiment.folder.parent), "--runs", str(tmp_path / "runs")]
        process = subprocess.Popen(
            [sys.executable, "-m", "baffle", "reproduce", experiment.name, *places, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        begun.append(process)
        until(lambda: len(workers_of(process)) == 2)
        pids.extend(workers_of(process))
        return process, pids

    yield command_of
    for process in begun:
        process.kill()
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_workers_that_are_killed_lose_nothing(long, tmp_path, begin):
    runs = tmp_path / "runs"
    cells = long.cells("smoke", threads=1)
    expected = [plain(row) for row in run_all(cells, tmp_path / "whole")]
    for cell in cells:
        cell.find().unlink()

    process, pids = begin(long, "--workers", "2")
    until(lambda: len(list(runs.glob("*/metrics.jsonl"))) == 2 and rounds_kept(runs) > 16)
    os.kill(pids[0], signal.SIGKILL)
    process.kill()  # the other worker ends by itself
    until(lambda: not alive(pids[1]))
    assert [cell for cell in cells if cell.find() is None]
    assert all(json.loads(path.read_text()) for path in long.folder.glob("results/cells/*.json"))

    said = []
    assert work(cells, runs, stop=lambda: False, say=said.append)
    assert any("goes on after round" in line for line in said)
    assert [plain(cell.read()) for cell in cells] == expected
    assert not list(long.folder.rglob("*.part"))


def test_ctrl_c_stops_workers_after_their_rounds(long, tmp_path, begin):
    process, pids = begin(long, "--workers", "2")
    until(lambda: rounds_kept(tmp_path / "runs") > 10)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    assert "stopped after round" in out
    assert "cells are left; the same command goes on" in out
    assert not any(map(alive, pids))


def test_what_a_worker_cannot_read_is_said_once(long, tmp_path, capfd):
    given_ = Work(str(long.folder), "smoke", str(tmp_path / "runs"))
    (long.folder / "experiment.toml").write_text(LONG.replace('"digits"', '"mnist"'))
    with pytest.raises(DataError, match="a worker did not end as it should"):
        share(given_, 1, stop=lambda: False)
    assert "name their folder, --data DIR" in capfd.readouterr().err


# -- verdicts ------------------------------------------------------------------------------------------

POINTS = st.floats(0, 100).map(lambda x: round(x, 2))


@given(
    st.lists(POINTS, max_size=6), st.none() | POINTS, st.sampled_from(SCALES), st.none() | st.floats(0.01, 5)
)
def test_a_verdict_is_what_a_naive_computation_says(values, paper, scale, expected):
    said = verdicts.verdict(values, paper, scale, expected)
    n = len(values)
    if n == 0:
        assert said == "not run"
    elif paper is None:
        assert said == "no figure to hand"
    elif scale in ("smoke", "small"):
        assert said == "not comparable"
    elif n < 3 and expected is None:
        assert said == "too few seeds"
    else:
        mean = sum(values) / n
        s = expected if n < 3 else float(np.std(values, ddof=1))
        bound = 2 * s * (1 + 1 / n) ** 0.5
        if abs(abs(mean - paper) - bound) > 1e-9:  # else rounding decides
            low, high = paper - bound, paper + bound
            assert said == ("below" if mean < low else "above" if mean > high else "within spread")


@pytest.mark.parametrize(
    ("values", "paper", "said"),
    [
        ([90.0, 91.0, 92.0], 93.3, "within spread"),  # s = 1: 2·√(4/3) = 2.309
        ([90.0, 91.0, 92.0], 93.4, "below"),
        ([90.0, 91.0, 92.0], 88.6, "above"),
        ([91.0], 93.8, "within spread"),  # 1.0 expected: 2·√2 = 2.828
        ([91.0], 93.9, "below"),
    ],
)
def test_verdicts_by_hand(values, paper, said):
    assert verdicts.verdict(values, paper, "paper", 1.0) == said


def test_a_place_shows_the_largest_scale_that_was_run(tiny, tmp_path):
    runs = tmp_path / "runs"
    entry = verdicts.entry(tiny, "law", "few")
    assert (entry.scale, entry.verdict, entry.paper, tables.ours(entry)) == (None, "not run", 50.0, "not run")
    small = run_all(tiny.cells("smoke"), runs)
    entry = verdicts.entry(tiny, "law", "few")
    assert (entry.scale, entry.verdict, entry.seeds, entry.missing) == ("smoke", "not comparable", 2, 0)
    values = [row["ema_accuracy"] for row in small if row["cell"] == "law/few"]
    assert entry.mean == pytest.approx(np.mean(values))
    assert entry.deviation == pytest.approx(np.std(values, ddof=1))
    run_all(tiny.cells("paper")[:1], runs)
    entry = verdicts.entry(tiny, "law", "few")
    assert (entry.scale, entry.seeds, entry.missing, entry.deviation) == ("paper", 1, 2, None)
    assert entry.verdict in ("within spread", "above", "below")
    assert "(1 of 3 seeds; paper, law)" in tables.ours(entry)
    assert verdicts.entry(tiny, "law", "few", "smoke").scale == "smoke"
    # The row that shows the same runs by another metric.
    beside = verdicts.entry(tiny, "plain", "few", "smoke")
    assert [row["cell"] for row in beside.rows] == ["law/few"] * 2
    assert beside.mean == pytest.approx(np.mean([row["accuracy"] for row in beside.rows]))
    assert beside.verdict == "no figure to hand"


def test_which_metric_a_place_compares(tiny):
    text = TOML.replace('title = "more"', 'title = "more"\nmetric = "ema_top5"')
    text = text.replace(
        'metric = "accuracy"\ncolumns = ["few"]', 'metric = "accuracy"\nmetrics = { more = "top5" }'
    )
    one = made(tiny.folder.parent / "metrics", text)
    found = {(r, c): one.metric_of(r, c) for r in one.rows for c in one.shown(r)}
    assert found == {
        ("law", "few"): "ema_accuracy",
        ("law", "more"): "ema_top5",
        ("backprop", "few"): "ema_accuracy",
        ("plain", "few"): "accuracy",
        ("plain", "more"): "top5",
    }
    row = {"accuracy": 3, "top5": None, "domains": {"sketch": {"top5": 7.5}}}
    paths = ("accuracy", "top5", "domains.sketch.top5", "domains.photo.top5", "accuracy.x")
    assert [verdicts.value_of(row, path) for path in paths] == [3.0, None, 7.5, None, None]


# -- output --------------------------------------------------------------------------------------------


def test_tables_hold_what_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()  # it draws
    page = "# T\n<!-- table -->\nold \\1\n<!-- /table -->\nend\n"
    (tiny.folder / "README.md").write_text(page)
    code, out, err = reproduce(tiny, "--only", "*/few/?", "--only", "law/few")
    assert (code, err) == (0, "")
    results = tiny.folder / "results"
    assert sorted(path.name for path in results.iterdir()) == [
        *("cells", "tiny-smoke.csv", "tiny-smoke.md", "tiny-smoke.png")
    ]
    cells = {cell.key: cell for cell in tiny.cells("smoke") if cell.column == "few"}
    assert len(list(results.glob("cells/*"))) == len(cells) == 4
    lines = list(csv.DictReader(io.StringIO((results / "tiny-smoke.csv").read_text())))
    assert [line["key"] for line in lines] == list(cells)
    for line in lines:
        row = cells[line["key"]].read()
        for name in ("fidelity", "seed", "rounds", "forward_passes", "bytes_up", "bytes_down", "seconds"):
            assert line[name] == str(row[name])
        assert float(line["value"]) == row["ema_accuracy"]
        assert (line["processor"], line["device"]) == (row["printed_on"]["processor"], "cpu")
    entry = verdicts.entry(tiny, "law", "few")
    number = f"{entry.mean:.2f} ± {entry.deviation:.2f} (2 seeds; smoke, law)"
    for shown in (out, (results / "tiny-smoke.md").read_text(), (tiny.folder / "README.md").read_text()):
        assert number in shown
        assert "not comparable" in shown
    readme = (tiny.folder / "README.md").read_text()
    assert readme.startswith("# T\n<!-- table -->\n")
    assert readme.endswith("<!-- /table -->\nend\n")
    assert "old" not in readme
    assert "| backprop |" in readme
    assert "baffle reproduce tiny --scale paper --data DIR" in readme
    assert (results / "tiny-smoke.png").read_bytes().startswith(b"\x89PNG")
    # Said again, it is the same, to the byte, and nothing is written.
    before = {path: path.stat().st_mtime_ns for path in [*results.glob("*.[mc]*"), tiny.folder / "README.md"]}
    reproduce(tiny, "--only", "*/few/?")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_show_runs_and_writes_nothing(tiny):
    code, out, _ = reproduce(tiny, "--show", "--scale", "paper")
    assert code == 0
    assert out.splitlines()[0] == "Tiny"
    assert "and 3 more that were not run" in out
    assert [path.name for path in tiny.folder.iterdir()] == ["experiment.toml"]


def test_curves_are_those_of_the_runs():
    rows = [{"curve": [[1, 0, 0, 10.0, 1.0], [2, 0, 0, 20.0, 2.0]]}, {"curve": [[2, 0, 0, 30.0, 4.0]]}]
    rounds, values = figures.curve_of(rows, "accuracy")
    assert (rounds.tolist(), values.tolist()) == ([2.0], [[20.0], [30.0]])
    assert figures.curve_of(rows, "domains.x.ema_top5")[1].tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize("kind", ["curves", "by-k"])
def test_figures_are_drawn_of_what_is_kept(tmp_path, kind, monkeypatch):
    text = TOML.replace('figure = "curves"', f'figure = "{kind}"')
    experiment = made(tmp_path / "experiments" / "tiny", text)
    assert not figures.draw(experiment, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with monkeypatch.context() as patch:
        patch.setattr(plots, "available", lambda: False)
        run_all(experiment.cells("smoke"), tmp_path / "runs")
        with pytest.raises(BaffleError, match="matplotlib"):
            figures.draw(experiment, tmp_path / "none.png")
    assert figures.draw(experiment, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


# -- experiments that measure ----------------------------------------------------------------------------

MEASURES = """
import json
from pathlib import Path
import beside_run

RESULT = Path(__file__).parent / "result.json"

def measure(scale, data):
    RESULT.write_text(json.dumps([scale, str(data), beside_run.NAME]))

def page():
    import beside_run
    return [f"found {RESULT.read_text()} {beside_run.NAME}"] if RESULT.exists() else ["not run"]
"""


def test_experiments_that_measure_are_loaded_apart(tmp_path):
    parent = tmp_path / "experiments"
    for name in ("one", "two"):
        experiment = made(parent / name, 'title = "T"\nabout = "a"\n')
        (parent / name / "run.py").write_text(MEASURES)
        (parent / name / "beside_run.py").write_text(f"NAME = {name!r}\n")
        (parent / name / "README.md").write_text("<!-- page -->\n<!-- /page -->\n")
        assert experiment.measured
    before, modules = list(sys.path), set(sys.modules)
    for name in ("one", "two"):
        assert measured.page(parent / name) == ["not run"]
        code, out, err = command(name, "--experiments", parent, "--scale", "small", "--data", "d")
        assert (code, err) == (0, "")
        line = f'found ["small", "d", "{name}"] {name}'
        assert line in out
        assert line in (parent / name / "README.md").read_text()
    assert sys.path == before
    assert not any("beside_run" in name or "baffle_experiment" in name for name in set(sys.modules) - modules)
    code, out, _ = command("--experiments", parent)
    assert (code, out) == (0, "one           T (run.py)\ntwo           T (run.py)\n")


# -- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "holds no experiments: run this in a checkout"),
        (["--list"], "holds no experiments: run this in a checkout"),
        (["table1"], "holds no experiments: run this in a checkout"),
        (["table1", "--workers", "0"], "workers = 0: at least one is needed"),
        (["table1", "--budget", "-1"], "budget = -1"),
    ],
)
def test_without_a_checkout_there_is_one_line(tmp_path, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert why in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--only", "nothing/*"], "--only nothing/*: chooses none of law/few, law/more, backprop/few"),
        (["--data", "nowhere"], "MNIST: train-images"),
        ([], "law/few reads mnist from files: name their folder, --data DIR"),
    ],
)
def test_what_cannot_be_run_leaves_nothing(tmp_path, no_pictures, arguments, why):
    experiment = made(tmp_path / "experiments" / "tiny", TOML.replace('"digits"', '"mnist"'))
    code, _, err = reproduce(experiment, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert why in err
    assert [path.name for path in experiment.folder.iterdir()] == ["experiment.toml"]
    assert not list((tmp_path / "runs").glob("[!.]*"))


def test_lists(tiny, tmp_path):
    run_all(tiny.cells("smoke")[:1], tmp_path / "runs")
    code, out, _ = command("--experiments", tiny.folder.parent)
    assert (code, out) == (0, "tiny          Tiny (smoke 1/6, paper 0/9)\n")
    code, out, _ = reproduce(tiny, "--list")
    lines = out.splitlines()
    assert len(lines) == 6
    assert lines[0] == f"{tiny.cells('smoke')[0].key}  kept  law/few seed 0"
    assert "kept" not in "".join(lines[1:])
    code, _, err = command("tny", "--experiments", tiny.folder.parent)
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no experiment 'tny'" in err
