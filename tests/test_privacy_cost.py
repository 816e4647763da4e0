"""The experiment on what ε costs runs, and its committed result is what the page shows."""

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "privacy_cost"


def loaded():
    spec = importlib.util.spec_from_file_location("privacy_cost_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_spends_no_more_than_it_may():
    found = loaded().run(8.0, 0, 2, None)
    assert 0 < found["epsilon"] <= found["target"] == 8.0
    assert 0 <= found["accuracy"] <= 1


def test_the_kept_result_is_complete():
    result = json.loads((FOLDER / "results" / "privacy-cost.json").read_text())
    rows = result["rows"]
    assert len({row["seed"] for row in rows}) >= 3
    assert {row["target"] for row in rows} == set(loaded().EPSILONS)
    assert all(row["epsilon"] <= row["target"] for row in rows if row["target"])
    assert result["printed_on"]["versions"]["torch"]
