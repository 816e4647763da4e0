"""The leakage experiments: their statistics against oracles, and a glance of each command."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("cryptography")
pytest.importorskip("scipy")

ROOT = Path(__file__).parents[1]
LEAKAGE = ROOT / "experiments" / "leakage"
sys.path[:0] = [str(LEAKAGE), str(ROOT / "benchmarks")]

import attacker  # noqa: E402
import common  # noqa: E402
import masking  # noqa: E402
import membership  # noqa: E402
import pictures  # noqa: E402
import reconstruct  # noqa: E402
import report  # noqa: E402
import scores  # noqa: E402
import slopes  # noqa: E402

from baffle.environment import environment  # noqa: E402
from baffle.runtimes.torch import TorchRuntime  # noqa: E402
from baffle.secagg import client  # noqa: E402
from baffle.stream import Stream, seed_from  # noqa: E402

# By its place: other experiments have a run.py too.
spec = importlib.util.spec_from_file_location("leakage_run", LEAKAGE / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    return tmp_path


# Each command


# torch.func.jvp loads decompositions that call it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("command", run.COMMANDS)
def test_a_command_runs_and_its_tables_hold_its_figures(command, nothing_kept, monkeypatch):
    module = __import__(command)
    kept = {}
    monkeypatch.setattr(module, "write", lambda name, content: kept.update({name: content}))
    # As a full run, on what --quick takes: so that pictures and tables are made too.
    monkeypatch.setattr(module, "FULL", module.QUICK)
    module.run(None, quick=False)
    assert (nothing_kept / f"{command}.png").stat().st_size > 1000
    ((name, content),) = kept.items()
    content = json.loads(json.dumps({"printed_on": environment(), **content}))
    blocks = [block for block in report.BLOCKS if block.split(":")[0] == name]
    assert blocks
    for block in blocks:
        heads, _, *rows = report.BLOCKS[block](content)[:-2]
        assert rows
        assert all(row.count("|") == heads.count("|") for row in rows)
        assert all(" ± " in row or "quartiles" in row for row in rows)
    if command == "inversion":
        errors = {(r["examples"], r["upload"], r["attack"]): r["mse"][0] for r in content["rows"]}
        assert errors[1, "K = 80", "slopes"] < 0.01 * errors[1, None, "class mean"]
    if command == "collusion":
        threshold, rounds = content["threshold"], content["rounds"]
        assert all(row["exact"] == rounds * (row["colluders"] >= threshold) for row in content["rows"])
    if command == "membership":
        assert all(c["positive"]["auc"] == 1.0 for c in content["controls"])
        assert all(c["named"]["right"] == c["positive"]["uploads"] for c in content["controls"])
        assert all(c["auc"] <= c["bound"] + 4 * c["auc_error"] for c in content["cells"])


def test_the_command_line_asks_for_data(capsys):
    with pytest.raises(SystemExit):
        run.main(["membership"])
    assert "--data DIR" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(path.name for path in (LEAKAGE / "results").glob("*.json")))
def test_committed_results_name_their_machine_and_no_path(file):
    text = (LEAKAGE / "results" / file).read_text()
    assert json.loads(text)["printed_on"]["versions"]["torch"]
    assert "/home" not in text
    for block in report.BLOCKS:
        if block.split(":")[0] == file.removesuffix(".json"):
            assert report.BLOCKS[block](json.loads(text))[0].startswith("|")


# Scores


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    pairs = one[:, None] - other
    assert scores.auc(one, other) == pytest.approx(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)


def test_true_positives_keep_to_the_false_positive_rate():
    outside = np.arange(200.0)
    inside = np.array([197.0, 197.5, 198.0, 500.0])
    # Two of 200 are allowed above the threshold, which is then 197.
    assert scores.true_positives(inside, outside) == 0.75
    assert scores.true_positives(np.zeros(5), np.zeros(300)) == 0.0


def test_standard_error_of_independent_scores_is_the_closed_form():
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(1, 1, (800, 1)), rng.normal(0, 1, (800, 1))
    value, error = scores.with_error(scores.auc, inside, outside)
    pairs = (inside > outside.T).astype(float)  # DeLong's components
    closed = math.sqrt(pairs.mean(1).var(ddof=1) / 800 + pairs.mean(0).var(ddof=1) / 800)
    assert error == pytest.approx(closed, rel=0.25)
    assert abs(value - scores.gaussian_bound(1.0, distance=1.0)) < 4 * closed


def test_repetitions_of_one_target_are_no_new_evidence():
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(0.5, 1, (60, 1)), rng.normal(0, 1, (60, 1))
    once = scores.with_error(scores.auc, inside, outside)
    often = scores.with_error(scores.auc, np.repeat(inside, 9, 1), np.repeat(outside, 9, 1))
    assert often == pytest.approx(once)


# The attacker


def test_shrinkage_is_ledoit_and_wolfs():
    covariance = pytest.importorskip("sklearn.covariance")
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(50, 30)) * np.linspace(0.2, 3, 30) + 1
    found = attacker.Moments.of(vectors)
    rebuilt = found.axes @ np.diag(found.spectrum) @ found.axes.T
    np.testing.assert_allclose(rebuilt, covariance.LedoitWolf().fit(vectors).covariance_, atol=1e-10)
    np.testing.assert_allclose(found.axes @ found.mean, vectors.mean(0), atol=1e-12)


@pytest.mark.parametrize("addends", [1, 5])
def test_the_attack_reaches_the_optimum_of_a_gaussian_shift(addends):
    """Others' slopes as good as zero: two normal distributions ‖d*‖ apart, AUC Φ(‖d*‖ / (√2 deviation))."""
    rng = np.random.default_rng(4)
    targets = np.full((200, 4), 0.5)
    moments = attacker.Moments(np.zeros(4), np.eye(4), np.full(4, 1e-9))

    def drawn(*shape):
        return attacker.Sums(rng.normal(size=(*shape, 4)), rng.normal(size=(*shape, 4)))

    game = attacker.Game(moments, addends, noise=1.0)
    _, inside, outside = attacker.attack(game, targets, drawn(400), drawn(200, 10))
    value, error = scores.with_error(scores.auc, inside, outside)
    assert abs(value - scores.gaussian_bound(1.0, distance=1.0)) < 4 * error


def test_sums_hold_distinct_examples():
    rng = np.random.default_rng(5)
    vectors = 2.0 ** np.arange(12)[:, None]  # a sum names its addends
    for addends in (1, 5, 12):
        found = membership.sums(vectors, addends, 30, rng)[:, 0].astype(int)
        assert len(found) == 30
        assert all(int(value).bit_count() == addends for value in found)
    assert not membership.sums(vectors, 0, 3, rng).any()


# Slopes and masks


def test_slopes_by_gradients_are_those_of_single_examples():
    dataset = common.images(None)
    runtime = TorchRuntime(common.lenet(dataset))
    stream, count = Stream(seed_from(1), 2), 7
    found = slopes.by_gradients(runtime, dataset.batch(range(4)), slopes.directions(runtime, stream, count))
    for i in range(4):
        by_passes = slopes.measured(runtime, dataset.batch([i]), stream, count)
        # Float32 losses of about 2 over σ = 1e-4: an error of some 1e-3 on slopes of about 1.
        np.testing.assert_allclose(found[i], by_passes, atol=1e-2)
        assert np.abs(found[i]).max() > 0.1


def test_without_its_mask_an_upload_decodes(monkeypatch):
    vector = np.array([0.25, -3.5, 1000.0])
    with monkeypatch.context() as patch:
        patch.setattr(client, "mask", lambda key, count, dtype: np.zeros(count, dtype))
        np.testing.assert_array_equal(masking.as_reals(masking.masked_upload(vector)), vector)
    masked = masking.as_reals(masking.masked_upload(vector))
    assert np.abs(masked).max() > 1e6  # 2^31 at most, uniformly: below 1e6 thrice once in 1e10 times


# Reconstruction


def test_quality_of_pictures():
    rng = np.random.default_rng(6)
    one = torch.from_numpy(rng.random((2, 3, 64)))
    assert torch.allclose(reconstruct.ssim(one, one, 8), torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(reconstruct.psnr(one, one + 0.1), torch.full((2, 3), 20.0, dtype=torch.float64))
    assert float(reconstruct.ssim(one, torch.from_numpy(rng.random((2, 3, 64))), 8).abs().max()) < 0.5
