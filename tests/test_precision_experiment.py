"""The experiment on precision runs, goes on where it was stopped, and its page shows the kept result."""

import importlib.util
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from baffle.runtimes import USABLE_SIGMA

FOLDER = Path(__file__).parents[1] / "experiments" / "precision"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("precision_run", FOLDER / "run.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules["precision_run"] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    yield made
    del sys.modules["precision_run"]


@pytest.fixture(scope="module")
def quick(module):
    return module.measure(module.QUICK, None, 1, None)


def test_every_fleet_trains_all_that_it_has(module, quick):
    rows = {row["fleet"]: row for row in quick["fleets"]}
    assert list(rows) == list(module.FLEETS)
    scale = module.QUICK
    for name, row in rows.items():
        central = module.FLEETS[name].scheme == "central"
        each = 2 * scale.directions if central else scale.directions + 1
        assert row["forward_passes"] == each * scale.clients * scale.rounds
        assert row["dropped"] == 0
        assert row["model_bytes"] - 4 * row["n"] == rows["float32"]["model_bytes"] - 4 * 26730
        assert min(row["start"], row["ema"], row["accuracy"]) > 30  # of ten classes, after the server's steps
    assert {row["n"] for row in rows.values()} == {26730, 26730 - 26640 // 2}
    assert len({row["accuracy"] for name, row in rows.items() if name != "pruned"}) > 1
    for fleet in module.FLEETS.values():
        for kind in fleet.kinds:
            assert (fleet.sigma < USABLE_SIGMA[kind.arithmetic]) == fleet.refused


def test_slopes_of_float32_are_derivatives_and_those_of_bfloat16_are_noise(module, quick):
    found = {row["kind"]: row["correlation"] for row in quick["correlations"]}
    assert list(found) == list(module.KINDS)
    for name, kind in module.KINDS.items():
        if kind.arithmetic == "float32":
            assert found[name]["0.0001 central"] > 0.99
        assert found[name]["0.01 central"] > 0.98
    assert found["all arithmetic in bfloat16"]["0.0001 central"] < 0.9


def test_what_is_kept_is_not_done_again(module, tmp_path, monkeypatch):
    file, asked = tmp_path / "precision.json", []

    def instead(task, scale, folder):
        asked.append(task)
        what, name, seed = task
        if len(asked) == 5:
            raise KeyboardInterrupt
        return {"fleet" if what == "fleets" else "kind": name, "seed": seed}

    monkeypatch.setattr(module, "done", instead)
    scale = replace(module.QUICK, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        module.measure(scale, None, 1, file)
    before = list(asked)
    kept = module.measure(scale, None, 1, file)
    assert asked[:5] == before
    assert asked[4:6] == [before[4]] * 2
    assert sorted(asked[:4] + asked[5:]) == sorted(module.tasks(scale))
    assert json.loads(file.read_text())["fleets"] == kept["fleets"]
    assert len(kept["fleets"]) == 2 * len(module.FLEETS)
    with pytest.raises(SystemExit, match="other settings"):
        module.measure(replace(scale, rounds=9), None, 1, file)


def test_differences_are_those_of_one_seed(module):
    rows = [
        {"fleet": fleet, "seed": seed, "ema": ema}
        for fleet, emas in (("float32", (80.0, 90.0, 85.0)), ("int8", (79.0, 89.5, 84.1)))
        for seed, ema in enumerate(emas)
    ]
    found = module.differences(rows, "int8")
    np.testing.assert_allclose(found, [-1.0, -0.5, -0.9])
    error = np.std(found, ddof=1) / math.sqrt(3)
    assert -4.9 > -0.8 / error > -5.5  # Student's 97.5 % quantile is 4.30 of three
    assert module.verdict(found) == f"{-0.8 / error:+.1f}, **worse**"
    assert module.verdict([-1.0, -0.4, -0.9]).endswith("within noise")
    assert module.verdict([-1.0, 1.0, 0.3]).endswith("within noise")
    assert module.verdict([1.0, 1.1, 1.2]).endswith("better")


def test_the_page_shows_the_kept_result(module):
    kept = json.loads(module.RESULTS.read_text())
    assert "\n".join(module.page(kept)) in (FOLDER / "README.md").read_text()
    assert kept["scale"] == asdict(replace(module.FULL, seeds=0))
    seeds = {row["seed"] for row in kept["fleets"]}
    assert len(seeds) >= 3
    have = {("fleets", row["fleet"], row["seed"]) for row in kept["fleets"]}
    have |= {("correlations", row["kind"], row["seed"]) for row in kept["correlations"]}
    assert have == set(module.tasks(replace(module.FULL, seeds=len(seeds))))
    assert kept["printed_on"]["versions"]["torch"]
