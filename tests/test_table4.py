"""Whole processes measured: the figures are of what they say, and the verdicts follow from them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "table4"
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402
import memory_cell  # noqa: E402


@pytest.fixture(scope="module")
def table4():
    spec = importlib.util.spec_from_file_location("table4_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(numpy_mb=40.0, forward=2.5):
    """One of each kind, with shares that can be read off."""
    return {
        "import numpy": {"peak_mb": 25.0},
        "import torch": {"peak_mb": 200.0},
        "lenet, torch backprop": {"peak_mb": 350.0},
        "lenet, torch inference": {"peak_mb": 250.0, "forward_over_eager": 1.0},
        "lenet, numpy layer float32": {"peak_mb": numpy_mb, "forward_over_eager": forward},
    }


def test_shares_are_of_whole_processes_and_of_what_is_beyond_imports(table4):
    (row,) = table4.ratios(cells())
    assert row == {
        "way": "numpy layer float32",
        "whole": {"lenet": round(100 * 40 / 350, 2)},
        "beyond": {"lenet": 10.0},
    }


@pytest.mark.parametrize(
    ("numpy_mb", "forward", "met"),
    [(40.0, 2.5, [True, True, True]), (40.1, 2.6, [False, True, False]), (42.1, 1, [False, False, True])],
)
def test_verdicts_follow_from_the_figures(table4, numpy_mb, forward, met):
    rows = table4.verdicts(cells(numpy_mb, forward))
    assert [row["unit"].split()[0] for row in rows] == ["MB", "%", "×"]
    assert [row["met"] for row in rows] == met
    shown = "\n".join(table4.page({**table4.made(kept(numpy_mb, forward))}))
    assert shown.count("**") == 2 * met.count(False)
    assert "10.35 / 10.43 / 10.63 and 7.95 / 7.32 / 5.48 %" in shown


def kept(*figures):
    machine = {"processor": "p", "cores": 1, "system": "s", "date": "d", "versions": {"torch": 1, "numpy": 2}}
    return {
        "printed_on": machine,
        "directions": 20,
        "cells": {
            name: {**row, "peaks_mb": [row["peak_mb"]], "commit": "c", "load": 0.1}
            for name, row in cells(*figures).items()
        },
    }


def test_a_block_is_written_between_its_marks(table4):
    text = table4.inserted("a\n<!-- table4 -->\nold\n<!-- /table4 -->\nb\n", ["new \\1"])
    assert text == "a\n<!-- table4 -->\nnew \\1\n<!-- /table4 -->\nb\n"


def test_the_page_holds_the_kept_result(table4):
    if not memory.RESULT.exists():
        pytest.skip("not measured yet")
    content = table4.made(json.loads(memory.RESULT.read_text()))
    assert json.loads((FOLDER / "results" / "table4.json").read_text()) == json.loads(json.dumps(content))
    page = (FOLDER / "README.md").read_text()
    assert page == table4.inserted(page, table4.page(content))
    assert {row["network"] for row in content["verdicts"]} == set(memory_cell.NETWORKS)


def test_a_quick_slice_is_of_real_processes(table4):
    found = memory.quickly()
    assert [row.get("failed") for row in found.values()] == [None] * len(found)
    python, with_numpy = found["import nothing"]["peak_mb"], found["import numpy"]["peak_mb"]
    device, trainer = found["lenet, numpy layer float32"], found["lenet, torch backprop"]["peak_mb"]
    # Half and twice of what is expected: an order of processes, no figure of this machine.
    assert 4 < python < with_numpy < device["peak_mb"] < trainer / 3
    assert found["lenet, torch inference"]["forward_over_eager"] == 1
    assert 0 < device["directions_share"] < 1
    assert device["forward_seconds"] > 0
    assert {row["network"] for row in table4.verdicts(found)} == {"lenet"}
    assert len(memory.table(found)) == len(found)
    assert all(len(row) == len(memory.HEADS) for row in memory.table(found))


def test_a_cell_that_cannot_run_says_why(monkeypatch):
    def broken(name, folder, directions, seconds):
        raise RuntimeError("no such runtime")

    monkeypatch.setattr(memory, "process", broken)
    assert memory.measure(["import numpy"], 1, 1) == {"import numpy": {"failed": "no such runtime"}}


def test_cells_are_chosen_with_what_they_stand_beside():
    assert list(memory.chosen("lenet, onnx 1")) == ["lenet, torch inference", "lenet, onnx 1"]
    assert list(memory.chosen("import torch")) == ["import torch"]
    assert set(memory.chosen("")) == set(memory.cells(quick=False))


def test_what_takes_memory_shows():
    """A process that holds 64 MB more is measured with 64 MB more."""
    code = "import memory_cell as c; {}print(c.peak())"
    peaks = []
    for held in ("", "held = bytearray(64_000_000); "):
        done = subprocess.run(
            [sys.executable, "-c", code.format(held)],
            cwd=ROOT / "benchmarks",
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] == pytest.approx(64_000_000, rel=0.05)
