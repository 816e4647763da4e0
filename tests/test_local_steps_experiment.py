"""The experiment on local steps runs, and its page shows the table of the kept result."""

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "local_steps"


def loaded():
    spec = importlib.util.spec_from_file_location("local_steps_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_one_length_spend_the_same_forward_passes():
    run = loaded().run
    rows = [run("sgd", share, steps, 0.1, 0, 2) for share, steps in ((1, 1), (2, 1), (2, 2))]
    assert [row["forward_passes"] for row in rows] == [4 * 200] * 3
    assert [row["rounds"] for row in rows] == [2, 1, 1]
    assert rows[1]["accuracy"] != rows[2]["accuracy"]


def test_the_table_takes_the_best_rate_of_each_row():
    def row(rate, seed, accuracy):
        kind = {"server": "sgd", "rounds": 3, "steps": 2, "forward_passes": 800, "bytes_up": 8400}
        return kind | {"rate": rate, "seed": seed, "accuracy": accuracy}

    rows = [row(0.1, 0, 0.9), row(0.1, 1, 0.1), row(0.2, 0, 0.55), row(0.2, 1, 0.65)]
    assert loaded().table(rows).splitlines()[2:] == ["| sgd | 3 | 2 | 800 | 8 | 0.2 | 60.0 ± 5.0 % |"]


def test_the_page_shows_the_kept_result():
    module = loaded()
    result = json.loads(module.RESULTS.read_text())
    assert module.table(result["rows"]) in (FOLDER / "README.md").read_text()
    kinds = {(row["server"], row["rounds"], row["steps"], row["rate"]) for row in result["rows"]}
    wanted = {
        (server, module.TOTAL // share, steps, rate)
        for server, rates in module.RATES.items()
        for share, steps in module.SHAPES
        for rate in rates
    }
    assert kinds == wanted
    assert len({row["seed"] for row in result["rows"]}) >= 3
    assert result["printed_on"]["versions"]["torch"]
