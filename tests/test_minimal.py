"""The one-page twin and the library take the same rounds: ``examples/minimal.py`` beside ``simulate``.

The twin's Adam computes in float64, torch's in float32, so weights agree to float32 rounding, and so do
the points at which the next round measures. A float32 loss moves by its own rounding then, which 1/σ
enlarges 10⁴ times. So whole rounds are compared with a float64 network, whose rounding (10⁻¹⁶/σ = 10⁻¹²)
is out of the way, and float32 slopes where both stand on the same weights (round 0).
"""

import numpy as np
import pytest
import torch

import baffle
from baffle import data, models
from examples import minimal

ROUNDS = 4
ULP = 2.0**-23  # float32, relative


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(minimal, "K", 12)
    # 3 clients of 240, 240 and 239 samples: 3 batches an epoch, the last of them short.
    monkeypatch.setattr(minimal, "BATCH", 90)


def _shares():
    train, _ = data.digits()
    train = train.subset(slice(0, 719))
    return [train.subset(part) for part in data.iid(len(train), 3, seed=5)]


def _both(dtype, rounds):
    """One row a round: slopes, weights and average of the twin, then those of the library."""
    shares = _shares()
    slow = minimal.train(models.build("lenet", 1, 10, 0).to(dtype), shares, rounds)

    runtime = baffle.TorchRuntime(models.build("lenet", 1, 10, 0).to(dtype))
    server = baffle.Server(
        runtime, baffle.SteinEstimator(minimal.K, minimal.SIGMA), seed=minimal.SEED, batch_size=minimal.BATCH
    )
    clients = [
        baffle.Client(f"client-{i}", runtime, share, seed=minimal.SEED) for i, share in enumerate(shares)
    ]
    fast = baffle.simulate(server, clients, rounds=rounds)
    for ours in slow:
        plan, model = server.plan().encode(), server.model().encode()
        answers = [baffle.RoundResult.decode(client.answer(plan, model)).values for client in clients]
        next(fast)
        yield ours, (np.array(answers), server.weights, server.ema_weights)


def test_on_the_same_weights_float32_slopes_agree():
    """A loss's last bits are an engine's own, and σ enlarges them: both lie by the float64 network's."""
    ((slopes, *_), (theirs, *_)), *_ = _both(torch.float32, 1)
    ((exact, *_), _), *_ = _both(torch.float64, 1)
    bound = ULP * np.log(10) / minimal.SIGMA  # one ulp of a loss of ten classes that knows nothing yet
    assert bound < 0.01 * np.abs(exact).max()
    for found in (slopes, theirs):
        assert 0 < np.abs(found - exact).max() < bound


def test_rounds_on_end_agree_to_float32_rounding():
    # The last round is the first of the clients' second epoch: another permutation.
    for t, (ours, theirs) in enumerate(_both(torch.float64, ROUNDS)):
        slopes, weights, average = ours
        # Slopes are answered in float32. The points differ by Δw (below), which moves a slope by at most
        # ‖Hz‖·‖Δw‖: of the order of the slopes' own ulp for a smooth loss. 16 of them leave room.
        assert np.abs(slopes - theirs[0]).max() <= 16 * ULP * np.abs(theirs[0]).max(), t
        # A round adds the rounding of a weight and of a step, and what the slopes' ulps do to a step:
        # 16 ulp of the gradient's typical entry. Adam divides by the root of the mean square of t
        # entries, which among n = 26,730 is as small as n^(−1/2) = 1/163 of the typical one from two
        # rounds on (in the first, steps are ±lr).
        bound = (t + 1) * (ULP * np.abs(weights).max() + 16 * 163 * ULP * minimal.RATE)
        assert np.abs(weights - theirs[1]).max() <= bound, t
        assert np.abs(average - theirs[2]).max() <= 2 * bound, t


def test_the_page_prints_accuracies(monkeypatch, capsys):
    monkeypatch.setattr(minimal, "ROUNDS", 10)
    monkeypatch.setattr(minimal, "CLIENTS", 2)
    monkeypatch.setattr(minimal, "K", 2)
    minimal.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("round  10   accuracy 0.")
