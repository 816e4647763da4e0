"""A short slice of the heavier tiers, so that they cannot rot: the real scripts on very little data."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
import cells  # noqa: E402
import measurements  # noqa: E402
import report  # noqa: E402
import scale  # noqa: E402
import secagg  # noqa: E402
import yardsticks  # noqa: E402

TINY = {"data": "digits", "model": "mlp", "clients": 3, "rounds": 4, "directions": 3, "evaluate_every": 2}


@pytest.fixture
def tiny_mnist(tmp_path):
    """320 + 40 images in MNIST's four files: each class a bright bar of its own."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 320), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        for i, label in enumerate(labels):
            images[i, 2 * label + 3, 4:24] = 255
        head = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">4BI", 0, 0, 8, 1, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return tmp_path


def test_a_cell_is_run_once_and_continued_where_it_stopped(tmp_path, capsys):
    first = cells.cell(tmp_path, **TINY)
    assert "rounds" in capsys.readouterr().out
    rows = first.run.metrics()
    again = cells.cell(tmp_path, **TINY, threads=1)  # where and how it is run is not part of it
    assert capsys.readouterr().out == ""
    assert again.run.path == first.run.path
    assert again.run.metrics() == rows
    assert cells.cell(tmp_path, **TINY, seed=1).run.path != first.run.path
    row = first.row()
    assert row["rounds"] == 4
    assert row["forward_passes"] == 4 * 3 * 4
    assert row["accuracy"] == pytest.approx(100 * rows[-1]["test_accuracy"], abs=0.005)


@pytest.mark.parametrize("what", ["table", "confirm", "preset", "speed"])
def test_mnist_scripts_run(tiny_mnist, tmp_path, what, monkeypatch):
    import mnist

    written = {}
    monkeypatch.setattr(mnist, "write", lambda name, content: written.update({name: content}))
    short = mnist.settings
    monkeypatch.setattr(mnist, "settings", lambda data, **more: {**short(data, **more), "epochs": 1.0})
    monkeypatch.setattr(
        sys,
        "argv",
        ["mnist.py", what, "--data", str(tiny_mnist), "--runs", str(tmp_path / "r"), "--epochs", "1"],
    )
    mnist.main()
    ((name, content),) = written.items()
    lines = report.BLOCKS[name](json.loads(json.dumps(content)))
    assert lines[0].startswith("|")
    assert len(lines) >= 5


def test_the_profile_runs(capsys):
    pytest.importorskip("numba")
    import profile_steps

    assert profile_steps.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "3×3 convolutions, stride 2" in printed
    assert "grouped convolutions" in printed


def test_search_script_runs(tiny_mnist, tmp_path, monkeypatch, capsys):
    import search

    monkeypatch.setattr(search, "write", lambda name, content: report.BLOCKS[name](content))
    monkeypatch.setattr(search, "EPOCHS", 1)
    monkeypatch.setattr(search, "CANDIDATES", search.CANDIDATES[-1:])
    monkeypatch.setattr(sys, "argv", ["search.py", "--data", str(tiny_mnist), "--runs", str(tmp_path / "r")])
    search.main()
    assert "EMA" in capsys.readouterr().out


def test_the_documents_hold_the_committed_results():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "report.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_stale_block_is_seen():
    text = "<!-- demo -->\nold\n<!-- /demo -->\n"
    assert report.rendered(text) != text
    assert report.rendered(report.rendered(text)) == report.rendered(text)


@pytest.mark.parametrize("file", sorted(p.name for p in (BENCHMARKS / "results").glob("*.json")))
def test_committed_results_name_their_machine_and_no_path(file):
    text = (BENCHMARKS / "results" / file).read_text()
    printed = json.loads(text)["printed_on"]
    assert printed["processor"]
    assert printed["versions"]["torch"]
    assert "/home" not in text


# The table of ratios


def test_every_cell_of_the_bench_runs_and_fills_its_rows():
    cells = {name: bench.measure(name, quick=True) for name in bench.CELLS}
    json.dumps(cells)
    lacking = {row.words for row in bench.ROWS if bench.value(cells, row) is None}
    # Two threads where the quick slice has one, no memory to speak of, no convolutions of low rank.
    left_out = ("on two", "K = 50", "inference of LeNet", "inference of WRN")
    allowed = {row.words for row in bench.ROWS if any(part in row.words for part in left_out)}
    if not yardsticks.onnx_available():
        allowed |= {row.words for row in bench.ROWS if "ONNX" in row.words}
    assert lacking <= allowed
    for name in (name for name in report.BLOCKS if name.startswith("performance")):
        stamped = {cell: {**found, **STAMP} for cell, found in cells.items()}
        assert report.BLOCKS[name]({"cells": stamped})[0].startswith("|")


STAMP = {"commit": "0000000", "machine": bench.machine()}


def made_up(ratio):
    """Cells in which every figure is ``ratio``."""
    cells = {name: {"figures": {}} for name in bench.CELLS}
    for row in bench.ROWS:
        if row.cell != "derived":
            cells[row.cell]["figures"][row.figure] = {"median": ratio, "low": 0, "high": 9, "of_minima": 1}
    for name in ("1 core", "2 cores"):
        cells[f"reconstruction, {name}"]["digest"] = "a"
    for name in ("a tenth of K", "K"):
        cells[f"memory of {name}"]["figures"]["extra, MB"] = ratio
    return cells


def test_the_check_names_each_row_that_falls_short():
    cells = made_up(1000.0)
    low_is_good = [row for row in bench.ROWS if row.at_most is not None and row.cell != "derived"]
    assert bench.shortfalls(cells) == [
        f"short: {row.words}: 1,000, at most {row.at_most:g} was the aim" for row in low_is_good
    ]
    cells = made_up(1e-6)
    high_is_good = [row for row in bench.ROWS if row.at_least is not None and row.cell != "derived"]
    assert bench.shortfalls(cells) == [
        f"short: {row.words}: 1e-06, at least {row.at_least:g} was the aim" for row in high_is_good
    ]


def test_a_row_on_its_bound_has_reached_it():
    row = next(row for row in bench.ROWS if row.at_least == 2.5)
    cells = {row.cell: {"figures": {row.figure: {"median": 2.5}}}}
    assert row.verdict(cells) == "reached"
    cells[row.cell]["figures"][row.figure]["median"] = 2.4999
    assert row.verdict(cells) == "short"


def test_the_check_sees_other_bits_and_growing_memory():
    cells = made_up(1e-6)
    cells["reconstruction, 2 cores"]["digest"] = "b"
    cells["memory of K"]["figures"]["extra, MB"] = 2e-6
    assert {line.split(":")[1].strip() for line in bench.shortfalls(cells)} >= {
        "Same bits on one core and on two (1",
        "Extra memory at K = 500 / at K = 50",
    }


def test_only_what_a_gpu_is_needed_for_may_go_unmeasured():
    unmeasured = bench.shortfalls({})
    assert len(unmeasured) == sum(not row.optional for row in bench.ROWS)
    assert not any("GPU" in line for line in unmeasured)


def test_a_cell_in_its_own_process_has_the_cores_it_names(tmp_path):
    script = tmp_path / "cores.py"
    script.write_text(
        "import json, os\n"
        "print('chatter')\n"
        "print(json.dumps([len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]))\n"
    )
    assert bench.apart(str(script), cores=1) == [1, "1"]
    assert bench.apart(str(script), cores=1 << 20) is None


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_bench_check_judges_what_is_kept_and_measures_nothing(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(bench, "FILE", tmp_path / "performance.json")
    monkeypatch.setattr(bench, "apart", lambda *_, **__: pytest.fail("measured"))
    bench.keep(made_up(1000.0))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--read", *arguments])
    assert bench.main() == len(arguments)
    assert "at most 1.25 was the aim" in capsys.readouterr().out


def test_items_can_be_measured_again_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FILE", tmp_path / "results" / "performance.json")
    bench.FILE.parent.mkdir()
    bench.keep(made_up(1.0))
    asked = []
    monkeypatch.setattr(bench, "apart", lambda *words, cores: asked.append(words[-1]) or {"figures": {}})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "3"])
    bench.main()
    assert asked == ["perturbations, 1 core"]
    kept = bench.read()
    assert "commit" in kept["perturbations, 1 core"]
    assert kept["LeNet, 1 core"] == made_up(1.0)["LeNet, 1 core"]


def test_ratios_are_medians_of_quotients_within_a_turn():
    turns = measurements.Turns({}, 0)
    turns.seconds = {"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 2.0]}
    assert turns.ratio("a", "b") == {"median": 1.5, "low": 1.0, "high": 1.75, "of_minima": 0.5}
    assert turns.ratio("a", "b", 2.0)["median"] == 3.0
    assert turns.quickest("a", "b") == "b"


def test_candidates_take_turns_after_one_warm_up():
    calls = []
    turns = measurements.Turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4
    assert [len(seconds) for seconds in turns.seconds.values()] == [3, 3]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_extra_memory_is_the_peak_of_the_run_alone():
    """In a process of its own: what other tests left could be freed meanwhile."""
    code = """
import numpy as np
import measurements
np.ones(30_000_000)  # an earlier peak, freed
print(measurements.extra_memory(lambda: np.ones(5_000_000))[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert 39e6 <= float(done.stdout) < 60e6  # the kernel counts pages in lots


# The yardsticks


def test_the_reference_loop_is_steins_estimate():
    """Against autograd: per coordinate, the error over K directions has the variance (|g|² + g_i²)/K."""
    module = torch.nn.Linear(4, 3)
    module.weight.requires_grad_(True)
    module.bias.requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(8, 4, generator=rng), torch.randint(3, (8,), generator=rng)
    before = module.weight.detach().clone()
    torch.manual_seed(0)
    found = yardsticks.reference_loop(module, inputs, targets, 3000, sigma=1e-2)
    assert list(found) == ["weight"]
    torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=1e-5)
    module.load_state_dict({"weight": before, "bias": module.bias})
    (exact,) = yardsticks.backprop(module, inputs, targets)
    error = (exact.norm() ** 2 + exact**2).div(3000).sqrt()
    assert ((found["weight"] - exact) / error).abs().max() < 4.5
    assert exact.norm() > 20 * error.max()


@pytest.mark.skipif(not yardsticks.onnx_available(), reason="onnxruntime is not installed")
@pytest.mark.parametrize("name", ["lenet", "wrn-10-2"])
def test_both_plain_inferences_are_the_same_network(name):
    module = measurements.build(name)
    inputs = torch.as_tensor(measurements.images(2, 1 if name == "lenet" else 3, 32).inputs)
    outputs = yardsticks.onnx_inference(module, inputs, 1)(2)
    np.testing.assert_allclose(outputs, yardsticks.plain_inference(module, inputs, 2), rtol=1e-4, atol=1e-5)


# The curves


@pytest.mark.parametrize("axis", scale.CURVES)
def test_a_point_of_each_curve(axis):
    point = 2000 if axis == "n" else 2
    found = scale.measure(axis, point, patience=0.0)
    assert found["runs"] == 1
    assert found["seconds"] > 0
    assert found[axis] == pytest.approx(point, rel=0.1)


def test_curves_are_drawn_and_printed(tmp_path):
    row = {"seconds": 1.0, "runs": 1, "before_mb": 10.0, "extra_mb": 0.0}
    curves = {axis: {"points": [{axis: at, **row} for at in (1, 10)], **STAMP} for axis in scale.CURVES}
    scale.draw(curves, tmp_path / "all.png")
    scale.draw({}, tmp_path / "none.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert len(report.BLOCKS["scale"]({"curves": curves})) == 2 + 2 * len(scale.CURVES) + 2


# What secure sums cost


def test_the_cost_of_secure_sums_by_stage():
    cell = secagg.measure(secagg.QUICK)
    assert list(cell["first"]["stages"]) == ["open", "advertise", "share", "answer", "unmask", "close"]
    ring, deposit = 8 * 501, 32 * 9 + 16 + 9 * (16 + 48)
    answer = cell["steady"]["stages"]["answer"]
    assert answer["up"] == ring + 32 + 9 * (32 + 16) + deposit + 16
    assert answer["down"] == 8 + 2 + 9 * 48
    assert cell["first"]["stages"]["share"]["up"] == deposit + 16
    assert cell["steady"]["stages"]["share"]["up"] == (deposit + 16) / 10  # one of ten lost its answer
    for kind in ("first", "steady"):
        total = cell[kind]["total"]
        assert all(0 < figure["min"] <= figure["median"] for figure in total.values())
    cells = {"10 clients, 10%": {**cell, **STAMP_OF_COSTS}}
    for name in (name for name in report.BLOCKS if name.startswith("secagg")):
        assert report.BLOCKS[name]({"cells": cells})[0].startswith("|")


STAMP_OF_COSTS = {"commit": "0000000", "machine": secagg.this_machine()}


def test_a_secure_sum_that_is_not_the_plain_one_is_no_measurement(monkeypatch):
    federation = secagg.Federation(secagg.QUICK)
    seal = next(iter(federation.seals.values()))
    reply = seal.reply

    def cheat(stage, request, plan, measure):
        return reply(stage, request, plan, lambda terms: measure(terms) + np.uint64(1))

    monkeypatch.setattr(seal, "reply", cheat)
    with pytest.raises(ArithmeticError, match="not the plain one"):
        federation.go()


def test_ten_thousand_clients_are_scaled_by_neighbours_and_clients():
    stages = {name: dict.fromkeys(secagg.FIGURES, 5000.0) for name in ("advertise", "answer")}
    total = {figure: {"median": 10_000.0, "min": 5000.0} for figure in secagg.FIGURES}
    kinds = {kind: {"stages": stages, "total": total} for kind in secagg.ROUNDS}
    found = {"k": 96, "t": 64, "clients": 1000, "corrupt": 0.05, "dropout": 0.1}
    found |= {"values": 500, "ring_bits": 64}
    scaled = secagg.extrapolated(json.loads(json.dumps({**found, **kinds})), 10_000)
    neighbours = (2 - 96 / 9999) / (2 - 96 / 999)
    advert, answer = (scaled["steady"]["stages"][name] for name in ("advertise", "answer"))
    assert (advert["client_cpu"], advert["up"], advert["server_cpu"]) == (5000, 5000, 50_000)
    assert answer["client_cpu"] == pytest.approx(5000 * neighbours)
    assert answer["server_cpu"] == pytest.approx(50_000 * neighbours)
    assert answer["up"] == pytest.approx(4008 + 992 * neighbours)
    assert answer["down"] == pytest.approx(5000 * neighbours + 9000 / 8)
    first = scaled["first"]["total"]["down"]
    assert first["median"] == pytest.approx(5000 * (1 + neighbours) + 2 * 9000 / 8)
    assert first["min"] == pytest.approx(first["median"] / 2)
    assert (scaled["clients"], scaled["measured_with"]) == (10_000, 1000)


def test_aims_are_compared_in_milliseconds_and_seconds():
    total = {figure: {"median": 0.025, "min": 0.02} for figure in secagg.FIGURES}
    kinds = {kind: {"stages": {}, "total": total} for kind in secagg.ROUNDS}
    first, steady = secagg.aim_table({"100 clients, 0%": kinds})
    assert first == (
        "100 clients, 0%",
        "first",
        "50",
        "25",
        "25",
        "2.00, 2.00",
        "0.4",
        "0.025",
        "0.025",
        "16.00, 16.00",
    )
    assert steady[1] == "steady"


def test_parameters_are_those_that_clients_accept_and_a_dash_where_none_serve():
    lines = secagg.parameter_table(clients=(10, 1000))
    assert ("1,000", "5%", "18, 18, 13, 109, confirm", "78, 52, 24, 297, confirm", "–") in lines
    assert lines[1] == ("10", "5%", "9, 9, 0, 9", "9, 8, 0, 8", "9, 6, 0, 4")


def test_the_clock_of_coordinates():
    """One small case: what is counted is less than a pass for each, and the estimate is the gradient."""
    import coordinates

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    row = coordinates.measured(1, 16, 2, turns=1)
    torch.set_num_threads(before)
    assert row["directions"] == 26730
    assert 10 < row["counted"] < 1000
    assert row["error"] < 0.05
    assert row["by_the_clock"]["median"] < row["directions"]
    (line, *_) = report.coordinates(
        {
            "rows": [row],
            "printed_on": json.loads((report.RESULTS / "low-rank.json").read_text())["printed_on"],
        }
    )[2:]
    assert line.startswith("| 1×16×16, batch 2 | 26,730 |")
