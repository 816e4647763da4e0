"""The settings that the paper's experiments need, each against a naive computation of its own."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

from baffle import job, law, training
from baffle.checkpoint import load_checkpoint, save_checkpoint
from baffle.config import TrainConfig
from baffle.data.augment import MARGIN, CropFlip, crop_flip
from baffle.errors import ConfigError
from baffle.estimator import SteinEstimator
from baffle.perturbations import Gaussian, Layout, LowRank, Rademacher
from baffle.plan import RoundSum
from baffle.runs import RunFolder
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchRuntime, evaluate
from baffle.server import Server
from baffle.simulation import simulate
from baffle.stream import Stream, derive_seed, seed_from

SEED = seed_from(7)
LAYOUT = Layout(("conv", "bias", "out"), ((6, 2, 3, 3), (6,), (4, 6)))
RNG = np.random.default_rng(3)


def built(**settings):
    return job.build(
        TrainConfig.resolve({"rounds": 4, "clients": 2, "threads": 1, "batch_size": 16, **settings})
    )


# --- crops and mirrors ---------------------------------------------------------------------------


def naive_crop(image, top, left, mirrored):
    """One image (C, H, W), pixel by pixel, its border reflected."""
    _, height, width = image.shape
    out = np.empty_like(image)

    def inside(i, size):
        i = abs(i)
        return 2 * (size - 1) - i if i >= size else i

    for r in range(height):
        for c in range(width):
            source = width - 1 - c if mirrored else c
            out[:, r, c] = image[:, inside(r + top - MARGIN, height), inside(source + left - MARGIN, width)]
    return out


def test_a_crop_is_that_of_the_loop():
    images = RNG.standard_normal((40, 3, 9, 8)).astype(np.float32)
    got = crop_flip(images, np.random.default_rng(5))
    again = np.random.default_rng(5)
    top, left = again.integers(0, 2 * MARGIN + 1, (2, 40))
    mirrored = again.integers(0, 2, 40)
    assert 0 < mirrored.sum() < 40
    assert {0, 2 * MARGIN} <= {*top, *left}, "the far corners are among them"
    for i, image in enumerate(images):
        np.testing.assert_array_equal(got[i], naive_crop(image, top[i], left[i], mirrored[i]))


class Images:
    """Samples that tell which they are."""

    def __init__(self, count=60):
        self.inputs = RNG.standard_normal((count, 1, 12, 12)).astype(np.float32)

    def __len__(self):
        return len(self.inputs)

    def batch(self, indices):
        return Batch(self.inputs[indices], np.asarray(indices) % 10)


def test_what_a_batch_shows_is_a_function_of_seed_and_order():
    samples, order = Images(), np.arange(20)
    first = CropFlip(samples, 1).batch(order)
    np.testing.assert_array_equal(first.inputs, CropFlip(samples, 1).batch(order).inputs)
    np.testing.assert_array_equal(first.targets, order % 10)
    assert (first.inputs != CropFlip(samples, 2).batch(order).inputs).any()
    other = CropFlip(samples, 1).batch(order[::-1].copy()).inputs[::-1]
    assert (first.inputs != other).any(), "another epoch deals another order, and shows other crops"


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4, 9), (2, 1, 9, 4)])
def test_crops_want_images(shape):
    with pytest.raises(ConfigError, match="larger than 4 pixels"):
        crop_flip(np.zeros(shape, np.float32), np.random.default_rng(0))


def test_training_images_are_cropped_and_test_images_are_not():
    plain, cropped = built(), built(augment="crop-flip")
    for a, b in zip(plain.test, cropped.test, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
    chosen = np.arange(8)
    a, b = plain.clients[0].samples.batch(chosen), cropped.clients[0].samples.batch(chosen)
    assert (a.inputs != b.inputs).any()
    assert (a.targets == b.targets).all()


# --- what a run sees of the data -----------------------------------------------------------------


def test_raw_pixels_lie_between_0_and_1():
    config = TrainConfig.resolve({"raw_pixels": True})
    train, test = job.load_data(config)
    for part in (train, test):
        inputs = part.batch(slice(0, 50)).inputs
        np.testing.assert_array_equal(inputs, part.inputs[:50].astype(np.float32) * part.scale[0])
        assert inputs.min() == 0
        assert 0 < inputs.max() <= 1


def test_images_are_stretched_where_a_set_pads_and_refused_elsewhere(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.arange(40 * 28 * 28, dtype=np.uint8).reshape(40, 28, 28) % 200 + 50
    for half in ("train", "t10k"):
        sizes = struct.pack(">3I", *images.shape)
        (folder / f"{half}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + sizes + images.tobytes())
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 40) + bytes(i % 10 for i in range(40))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(labels)
    settings = {"data": "mnist", "data_folder": str(tmp_path)}
    padded, _ = job.load_data(TrainConfig.resolve(settings))
    for part in job.load_data(TrainConfig.resolve({**settings, "stretch": True})):
        assert part.shape == padded.shape == (1, 32, 32)
        assert part.inputs.min() >= 50, "no black margin"
    assert padded.inputs.min() == 0
    with pytest.raises(ConfigError, match="stretch = True: it is for mnist"):
        TrainConfig.resolve({"stretch": True})


def test_fewer_images_are_the_same_for_every_seed():
    first, second = (job.load_data(TrainConfig.resolve({"train_samples": 100, "seed": s})) for s in (0, 5))
    whole, _ = job.load_data(TrainConfig.resolve({}))
    assert len(first[0]) == 100
    np.testing.assert_array_equal(first[0].inputs, second[0].inputs)
    held = {image.tobytes() for image in whole.inputs}
    assert all(image.tobytes() in held for image in first[0].inputs)
    assert len(np.unique(first[0].targets)) == 10, "drawn, not the first of an ordered set"
    assert len(first[1]) == len(second[1]) == len(job.load_data(TrainConfig.resolve({}))[1])
    with pytest.raises(ConfigError, match="train-samples = 99999"):
        job.load_data(TrainConfig.resolve({"train_samples": 99999}))


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "there", "absent"),
    [
        ({"activation": "relu"}, nn.ReLU, nn.Hardswish),
        ({"activation": "selu", "model": "wrn-10-2"}, nn.SELU, nn.Hardswish),
        ({"norm": "group"}, nn.GroupNorm, nn.BatchNorm2d),
        ({"norm": "none", "model": "wrn-10-2"}, nn.Hardswish, nn.GroupNorm),
    ],
)
def test_activations_and_norms_of_the_networks(settings, there, absent):
    config = TrainConfig.resolve(settings)
    kinds = {type(module) for module in job.build_model(config, job.load_data(config)[0]).modules()}
    assert there in kinds
    assert absent not in kinds


def test_the_wide_lenet_has_the_authors_channels():
    config = TrainConfig.resolve({"model": "lenet-wide"})
    module = job.build_model(config, job.load_data(config)[0])
    assert [m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d)] == [32, 128]


# --- the moving average --------------------------------------------------------------------------


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x):
        return x * self.w


def stepped(server, rounds):
    """The weights after each of ``rounds`` rounds of made-up gradients."""
    seen = []
    for round_ in range(server.round, rounds):
        plan = server.plan()
        gradient = np.random.default_rng(round_).standard_normal(5)
        server.apply(RoundSum(plan.round, gradient))
        seen.append(server.weights.astype(np.float64))
    return seen


def averaged(**options):
    return Server(TorchRuntime(Vector()), SteinEstimator(2), fidelity="backprop", **options)


def test_an_average_that_warms_up_is_the_authors():
    server = averaged(ema=0.5, ema_every=3, ema_warmup=True)
    shadow, steps = server.weights.astype(np.float64), 0
    for number, weights in enumerate(stepped(server, 17), 1):
        if number % 3 == 0:
            steps += 1
            decay = min(0.5, (1 + steps) / (10 + steps))
            shadow = decay * shadow + (1 - decay) * weights
    np.testing.assert_allclose(server.ema_weights, shadow, rtol=1e-5, atol=1e-6)


def test_an_average_of_every_third_round_is_corrected_for_its_start():
    server = averaged(ema=0.9, ema_every=3)
    weights = stepped(server, 10)[2::3]
    shares = np.array([0.1 * 0.9 ** (len(weights) - 1 - i) for i in range(len(weights))])
    want = shares @ np.array(weights) / shares.sum()
    np.testing.assert_allclose(server.ema_weights, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_a_restart_goes_on_with_the_average(warmup, tmp_path):
    options = {"ema": 0.9, "ema_every": 2, "ema_warmup": warmup}
    whole, first = averaged(**options), averaged(**options)
    stepped(whole, 9)
    stepped(first, 5)
    save_checkpoint(tmp_path / "c", first)
    second = averaged(**options)
    load_checkpoint(tmp_path / "c", second)
    stepped(second, 9)
    np.testing.assert_array_equal(second.ema_weights, whole.ema_weights)


def test_averages_that_cannot_be():
    with pytest.raises(ConfigError, match="every 0 rounds"):
        averaged(ema_every=0)


# --- the server's step ---------------------------------------------------------------------------


def test_weight_decay_is_added_to_the_gradient(tmp_path):
    settings = {"fidelity": "backprop", "weight_decay": 0.01, "model": "mlp", "optimizer": "sgd", "clip": 0.0}
    made = built(**settings, schedule="constant", learning_rate=0.5, rounds=1)
    before = made.server.weights.astype(np.float64)
    gradient = np.zeros_like(before)
    for client in made.clients:
        batch = client.samples.batch(client._indices(0, 16))
        share = len(client.samples) / sum(len(one.samples) for one in made.clients)
        gradient += share * made.runtime.gradient(made.server.weights, batch)[0]
    config = made.config
    folder = training.train(config, tmp_path / "run", lambda p: None)
    want = before - 0.5 * (gradient + 0.01 * before)
    np.testing.assert_allclose(folder.load_weights("final"), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_with_local_epochs_is_that_of_each_clients_own_optimizer(optimizer):
    settings = {"fidelity": "backprop", "weight_decay": 0.05, "model": "mlp", "local_epochs": 2, "clip": 0.0}
    made = built(**settings, local_optimizer=optimizer, local_learning_rate=0.01, clients=2, rounds=1)
    before = made.server.weights.copy()
    want = np.zeros_like(before, np.float64)
    for client in made.clients:
        theirs = torch.from_numpy(before.copy()).requires_grad_()
        oracle = (
            torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.05)
            if optimizer == "adam"
            else torch.optim.SGD([theirs], lr=0.01, weight_decay=0.05)
        )
        for indices in client._local_batches(0, 2, made.config.batch_size):
            gradient, _ = made.runtime.gradient(theirs.detach().numpy(), client.samples.batch(indices))
            theirs.grad = torch.from_numpy(gradient.copy())
            oracle.step()
        want += len(client.samples) / sum(len(one.samples) for one in made.clients) * theirs.detach().numpy()
    for _ in simulate(made.server, made.clients, rounds=1):
        pass
    moved = made.server.weights - before
    np.testing.assert_allclose(moved, want - before, rtol=1e-3, atol=2e-5)
    assert np.linalg.norm(moved) > 0.1


@pytest.mark.parametrize(("local_epochs", "decay"), [(1, 0.0), (0, 0.05)])
def test_weights_decay_in_one_place(local_epochs, decay):
    made = built(weight_decay=0.05, local_epochs=local_epochs, optimizer="adam")
    assert {group["weight_decay"] for group in made.server.optimizer.param_groups} == {decay}
    assert (made.server.local is not None) == bool(local_epochs)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weight_decay": 0.1, "downlink": "scalars"}, "weight-decay = 0.1"),
        ({"weight_decay": 0.1, "optimizer": "radazo"}, "weight-decay = 0.1"),
        ({"weight_decay": 1.0}, r"weight-decay = 1.0: it lies in \[0, 1\)"),
        ({"mixed_precision": True}, "mixed-precision = True: it is for gradients"),
        ({"bundle": "x", "activation": "relu"}, "a bundle has its own activations"),
        ({"ema_every": 0}, "ema-every = 0"),
        ({"pretrained": "x", "model": "mobilenet-v2", "norm": "none"}, "leave activation and norm out"),
        ({"pretrained": "x", "model": "mobilenet-v2", "augment": "crop-flip"}, "augment = 'crop-flip'"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ConfigError, match=text):
        TrainConfig.resolve(settings)


# --- simulated estimates -------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", [Gaussian(), Rademacher(), LowRank(2)], ids=lambda p: p.spec)
def test_exact_slopes_are_those_of_the_loop(perturbation):
    gradient = RNG.standard_normal(LAYOUT.n).astype(np.float32)
    stream, estimator = Stream(SEED, 4), SteinEstimator(9, perturbation=perturbation)
    slopes = estimator.exact_slopes(gradient, stream, LAYOUT)
    z = np.array([perturbation.values(stream, k, LAYOUT, 0, LAYOUT.n) for k in range(9)], np.float64)
    # float32 products of a few hundred terms.
    np.testing.assert_allclose(slopes, z @ gradient.astype(np.float64), rtol=1e-4, atol=1e-4)


def test_a_simulated_estimate_is_the_law_for_gaussian_directions_and_the_loop_for_others():
    gradient = RNG.standard_normal(LAYOUT.n).astype(np.float32)
    stream, seed = Stream(SEED, 4), derive_seed(SEED, "draw")
    drawn = SteinEstimator(9).simulated(gradient, stream, LAYOUT, seed)
    np.testing.assert_array_equal(drawn, law.sample_estimate(gradient, 9, law.generator(seed)))
    signs = np.array([Rademacher().values(stream, k, LAYOUT, 0, LAYOUT.n) for k in range(9)], np.float64)
    want = (signs @ gradient.astype(np.float64)) @ signs / 9
    estimator = SteinEstimator(9, perturbation=Rademacher())
    np.testing.assert_allclose(
        estimator.simulated(gradient, stream, LAYOUT, seed), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("local_epochs", [0, 1])
def test_a_run_by_the_law_along_rademacher_is_the_forward_only_run(local_epochs, tmp_path):
    """Of one seed both go along the same directions: they differ by what σ = 1e-4 and float32 leave."""
    common = {
        "model": "mlp", "clients": 2, "rounds": 2, "directions": 8, "threads": 1, "batch_size": 64,
        "perturbation": "rademacher", "local_epochs": local_epochs, "local_optimizer": "sgd",
        "local_learning_rate": 1e-3, "learning_rate": 1e-3, "optimizer": None if local_epochs else "sgd",
    }  # fmt: skip
    common = {name: value for name, value in common.items() if value is not None}
    ends = {}
    for fidelity in ("law", "forward-only"):
        config = TrainConfig.resolve({**common, "fidelity": fidelity})
        folder = training.train(config, tmp_path / fidelity, lambda p: None, picture=False)
        ends[fidelity] = folder.load_weights("final").astype(np.float64)
    start = job.build(TrainConfig.resolve(common)).server.weights
    moved = {fidelity: end - start for fidelity, end in ends.items()}
    error = np.linalg.norm(moved["law"] - moved["forward-only"]) / np.linalg.norm(moved["law"])
    assert error < 0.02
    assert not (tmp_path / "law" / "curves.png").exists(), "picture=False"


def test_mixed_precision_is_that_of_bfloat16():
    plain, mixed = built(fidelity="law"), built(fidelity="law", mixed_precision=True)
    batch, weights = plain.clients[0].samples.batch(np.arange(32)), plain.server.weights
    exact, loss = plain.runtime.gradient(weights, batch)
    coarse, near = mixed.runtime.gradient(weights, batch)
    error = np.linalg.norm(coarse - exact) / np.linalg.norm(exact)
    # bfloat16 rounds to 2⁻⁹; a few layers add up.
    assert 1e-5 < error < 0.05
    assert near == pytest.approx(loss, rel=0.02)
    np.testing.assert_array_equal(mixed.runtime.loss(weights, batch), plain.runtime.loss(weights, batch))


# --- top-5 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 12])
def test_top_5_counts_labels_among_the_five_largest(classes):
    torch.manual_seed(1)
    runtime = TorchRuntime(nn.Linear(6, classes))
    inputs, targets = RNG.standard_normal((50, 6)).astype(np.float32), RNG.integers(0, classes, 50)
    batches = [Batch(inputs[:30], targets[:30]), Batch(inputs[30:], targets[30:])]
    outputs = np.concatenate([runtime.outputs(runtime.weights(), batch).numpy() for batch in batches])
    better = (outputs > outputs[np.arange(50), targets][:, None]).sum(axis=1)
    found = evaluate(runtime, runtime.weights(), batches)
    assert found.top5 == np.mean(better < 5)
    assert found.accuracy == np.mean(better < 1)


def test_a_look_keeps_both(tmp_path):
    config = TrainConfig.resolve({"model": "mlp", "clients": 2, "rounds": 1, "directions": 2, "threads": 1})
    folder = training.train(config, tmp_path / "run", lambda p: None)
    row = RunFolder.open(folder.path).metrics()[-1]
    for which in ("test", "ema"):
        assert 0 <= row[f"{which}_accuracy"] <= row[f"{which}_top5"] <= 1
    found = job.build(config).evaluate(folder.load_weights("final"))
    assert (found.accuracy, found.top5) == (row["test_accuracy"], row["test_top5"])
