"""Whole runs whose clients measure without torch: the same training, by settings and from a bundle."""

import json

import numpy as np
import pytest

from baffle.cli import main as command
from baffle.config import TrainConfig
from baffle.data import digits, iid
from baffle.errors import ConfigError
from baffle.job import build, build_client
from baffle.models import LeNet

JOB = ["--clients", "3", "-K", "6", "--rounds", "3", "--evaluate-every", "3", "--batch-size", "16"]


def run(path, *settings):
    assert command(["train", "--run", str(path), *JOB, *settings]) == 0
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows]), rows[-1]


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    return run(tmp_path_factory.mktemp("torch") / "run")


@pytest.mark.parametrize("runtime", ["numpy", "onnx"])
def test_training_goes_as_with_torch(by_torch, runtime, tmp_path):
    """Losses of the first round are equal to float32's rounding; later ones as far as Adam lets roundings
    grow: its steps are of size lr, whatever the slopes' size, so some entries may step the other way.
    """
    losses, last = run(tmp_path / "run", "--runtime", runtime)
    assert losses[0] == pytest.approx(by_torch[0][0], rel=64 * 2.0**-24)
    np.testing.assert_allclose(losses, by_torch[0], rtol=1e-3)
    assert last["forward_passes"] == by_torch[1]["forward_passes"]
    assert last["test_loss"] == pytest.approx(by_torch[1]["test_loss"], rel=1e-3)


def test_a_bundle_is_the_same_job_as_its_network(tmp_path):
    """To the bit: the bundle's graph, weights and normalisation are those that the job makes by itself."""
    assert command(["export", "--out", str(tmp_path / "lenet"), "--no-onnx"]) == 0
    mine, _ = run(tmp_path / "mine", "--bundle", str(tmp_path / "lenet"))
    theirs, _ = run(tmp_path / "theirs", "--runtime", "numpy")
    assert mine.tolist() == theirs.tolist()
    assert (tmp_path / "mine" / "weights.safetensors").exists()


def test_a_pruned_run_trains_and_sends_what_is_kept(by_torch, tmp_path):
    config = TrainConfig.resolve({"sparsity": 0.75, "clients": 3, "directions": 6, "rounds": 3})
    job = build(config)
    whole = LeNet(1, 10)
    sizes = [p.numel() for p in whole.parameters() if p.dim() > 1]
    kept = sum(size - int(0.75 * size) for size in sizes)
    assert job.server.layout.n == kept + sum(p.numel() for p in whole.parameters() if p.dim() == 1)
    _, last = run(tmp_path / "run", "--sparsity", "0.75")
    full = by_torch[1]["stages"]["answer"]["bytes_down"]
    assert last["stages"]["answer"]["bytes_down"] < 0.3 * full
    client = build_client(config, "client-001")
    assert client.runtime.layout == job.server.layout
    assert client.runtime.frozen_digest == job.runtime.frozen_digest


def test_frozen_features_are_computed_once_without_torch_too(tmp_path, monkeypatch):
    from baffle.runtimes import numpy as numpy_runtime

    passes = []
    real = numpy_runtime.NumpyRuntime.prefixed
    monkeypatch.setattr(
        numpy_runtime.NumpyRuntime,
        "prefixed",
        lambda self, batch: passes.append(len(batch.targets)) or real(self, batch),
    )
    from baffle.export.torch import from_torch
    from baffle.models import MLP

    module = MLP(1, 10, hidden=(8,), grid=4)
    for parameter in module.features.parameters():
        parameter.requires_grad_(False)
    config = TrainConfig.resolve({"clients": 2, "directions": 4, "rounds": 2})
    train, _ = digits()
    bundle = from_torch(
        module,
        input_shape=(1, 8, 8),
        classes=[str(i) for i in range(10)],
        scale=train.scale,
        shift=train.shift,
        onnx=False,
    )
    bundle.write(tmp_path / "head")
    passes.clear()  # what the export was checked with
    job = build(TrainConfig.resolve({**_plain(config), "bundle": str(tmp_path / "head")}))
    assert sum(passes) == 1437 + 360  # each sample once
    assert all(client.samples.batch(np.arange(2)).prefixed for client in job.clients)
    client, own = job.clients[0], iid(1437, 2, 0)[0][:4]
    cached = client.runtime.loss(job.server.weights, client.samples.batch(np.arange(4)))
    assert cached == pytest.approx(client.runtime.loss(job.server.weights, train.batch(own)), rel=1e-6)


def _plain(config):
    return {"clients": config.clients, "directions": config.directions, "rounds": config.rounds}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"bundle": "x", "runtime": "torch"}, "no torch module"),
        ({"runtime": "numpy", "fidelity": "law"}, "gradients"),
        ({"runtime": "onnx", "scheme": "tangent"}, "torch"),
        ({"runtime": "numpy", "device": "cuda"}, "torch"),
        ({"bundle": "x", "pretrained": "y", "model": "mobilenet-v2"}, "weights of its own"),
        ({"sparsity": 1.0}, "sparsity"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        TrainConfig.resolve(settings)


def test_a_bundle_for_other_images_is_refused(tmp_path, capsys):
    assert command(["export", "--out", str(tmp_path / "b"), "--no-onnx", "--model", "mlp"]) == 0
    held = ["train", "--bundle", str(tmp_path / "b"), "--image-size", "16", "--run", str(tmp_path / "run")]
    assert command(held) == 2
    assert "(1, 8, 8)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
