"""Clients that hold or compute in less than float32, beside others, under one server of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import baffle
from baffle import data, federation
from baffle.endpoint import Endpoint
from baffle.errors import PrecisionError
from baffle.estimator import SteinEstimator
from baffle.export.torch import from_torch
from baffle.models import build
from baffle.perturbations import Gaussian
from baffle.plan import RoundResult
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.pruned import Pruned, by_magnitude
from baffle.runtimes.torch import TorchRuntime

K = 60
SEED = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def network(digits):
    """The server's runtime of an MLP, and its bundle, which is what devices have."""
    train, _ = digits
    runtime = TorchRuntime(build("mlp", train.shape[0], len(train.classes), SEED))
    return runtime, from_torch(runtime.module, input_shape=train.shape, onnx=False)


class Part:
    def __init__(self, samples, indices):
        self.samples, self.indices = samples, indices

    def __len__(self):
        return len(self.indices)

    def batch(self, indices):
        return self.samples.batch(self.indices[indices])


def fleet(runtimes, train, clients=6):
    parts = data.iid(len(train), clients, SEED)
    return [
        baffle.Client(f"c{i}", runtimes[i % len(runtimes)], Part(train, part), seed=SEED)
        for i, part in enumerate(parts)
    ]


def served(runtime, sigma=1e-4, scheme="forward", **options):
    return baffle.Server(runtime, SteinEstimator(K, sigma, scheme), seed=SEED, **options)


def held(weights, layout, storage):
    """Weights as such a client holds them: rounded tensor by tensor, by another hand."""
    tensors = []
    for w in layout.split(weights.astype(np.float64)):
        if storage == "float16":
            w = w.astype(np.float16).astype(np.float64)
        elif storage == "bfloat16":
            whole, power = np.frexp(w)
            w = np.ldexp(np.rint(whole * 2**8) / 2**8, power)  # 8 bits of significand
        elif storage == "int8" and w.ndim >= 2:
            most = np.abs(w.reshape(len(w), -1)).max(axis=1).reshape(-1, *[1] * (w.ndim - 1))
            w = np.rint(w / (most / 127)) * (most / 127)
        tensors.append(w.reshape(-1))
    return np.concatenate(tensors)


STORED = ("float32", "float16", "bfloat16", "int8")


@pytest.mark.parametrize("storage", STORED)
def test_a_client_answers_with_the_slopes_at_the_weights_as_it_holds_them(storage, network, digits):
    runtime, bundle = network
    server = served(runtime)
    (client,) = fleet([NumpyRuntime(bundle, storage=storage)], digits[0], 1)
    answer = client.answer(server.plan().encode(), server.model().encode())
    got = RoundResult.decode(answer).values
    exact = TorchRuntime(build("mlp", 1, 10, SEED).double())
    batch = client.samples.batch(client._indices(0, 32))
    gradient, _ = exact.gradient(held(server.weights, runtime.layout, storage), batch)
    stream, n = server.plan().stream, runtime.layout.n
    want = [float(Gaussian().values(stream, k, runtime.layout, 0, n) @ gradient) for k in range(K)]
    # A float32 loss of about 2.3, in differences over 1e-4; σ adds its own curvature.
    np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.linalg.norm(want) / np.sqrt(K))
    assert np.corrcoef(got, want)[0, 1] > 0.9995
    if storage != "float32":  # and it did hold other weights than the server sent
        there, _ = exact.gradient(server.weights.astype(np.float64), batch)
        assert not np.allclose(gradient, there, rtol=1e-5)


def test_fleets_of_several_storages_train_together(network, digits):
    runtime, bundle = network
    train, test = digits
    runtimes = [NumpyRuntime(bundle, mode="full", storage=storage) for storage in STORED[:2] + STORED[3:]]
    ends = {}
    for name, used in (("mixed", runtimes), ("float32", runtimes[:1])):
        server = served(runtime)
        for record in baffle.simulate(server, fleet(used, train, 3), rounds=20):
            assert (record.aborted, record.dropped) == (None, 0)
        ends[name] = server.weights
    start = served(runtime).weights

    def accuracy(weights):
        batch = test.batch(slice(0, len(test)))
        return (runtimes[0].outputs(weights, batch).argmax(axis=1) == batch.targets).mean()

    spread = np.sqrt(accuracy(ends["float32"]) * (1 - accuracy(ends["float32"])) / len(test))
    assert accuracy(ends["float32"]) > accuracy(start) + 0.3
    assert abs(accuracy(ends["mixed"]) - accuracy(ends["float32"])) < 4 * spread
    assert ends["mixed"].tobytes() != ends["float32"].tobytes()
    mixed, alone = ends["mixed"] - start, ends["float32"] - start
    assert mixed @ alone > 0.9 * np.linalg.norm(mixed) * np.linalg.norm(alone)


def test_the_sum_of_a_mixed_fleet_is_that_of_its_answers(network, digits):
    runtime, bundle = network
    clients = fleet([NumpyRuntime(bundle, storage=storage) for storage in STORED], digits[0], 4)
    server = served(runtime)
    plan, model = server.plan().encode(), server.model().encode()
    answers = [RoundResult.decode(client.answer(plan, model)) for client in clients]
    assert len({answer.values.tobytes() for answer in answers}) == 4
    total = sum(answer.samples * answer.values.astype(np.float64) for answer in answers)
    want = total / sum(answer.samples for answer in answers)
    (record,) = baffle.simulate(server, clients, rounds=1)
    np.testing.assert_allclose(record.total.values, want, rtol=1e-12)


# --- σ belongs to the arithmetic -------------------------------------------------------------------------


class Wire:
    """Devices that reply whatever happens to them, as they do behind a transport."""

    def __init__(self, clients):
        self.endpoints = {client.name: Endpoint(client) for client in clients}

    def names(self):
        return sorted(self.endpoints)

    def ask(self, stage, requests, deadline):
        for name in sorted(requests):
            yield name, self.endpoints[name].handle(requests[name])


@pytest.mark.parametrize(
    ("arithmetic", "sigma", "takes_part"),
    [
        ("float16", 1e-4, False),
        ("float16", 1e-2, True),
        ("bfloat16", 1e-3, False),
        ("bfloat16", 1e-2, True),
        ("float32", 1e-4, True),
    ],
)
def test_who_cannot_resolve_the_plans_sigma_refuses_and_the_rest_go_on(
    arithmetic, sigma, takes_part, network, digits
):
    runtime, bundle = network
    runtimes = [NumpyRuntime(bundle, arithmetic=arithmetic), NumpyRuntime(bundle, storage="int8")]
    clients = fleet(runtimes, digits[0], 4)
    server = served(runtime, sigma, "central")
    (record,) = federation.run(server, Wire(clients), rounds=1)
    assert record.aborted is None
    assert {d.client for d in record.dropouts} == (set() if takes_part else {"c0", "c2"})
    assert {d.reason for d in record.dropouts} <= {"failed"}
    for dropout in record.dropouts:
        assert arithmetic in dropout.text
    if not takes_part:
        again = served(runtime, sigma)
        with pytest.raises(PrecisionError, match=arithmetic):
            clients[0].answer(again.plan().encode(), again.model().encode())


def test_few_bits_of_storage_do_not_bind_sigma(network):
    for storage in STORED:
        NumpyRuntime(network[1], storage=storage).check_sigma(1e-4)


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16"])
def test_half_precision_follows_the_slope_at_the_sigma_it_resolves(arithmetic, network, digits):
    runtime, bundle = network
    batch = digits[0].batch(slice(0, 32))
    server = served(runtime)
    half, exact = NumpyRuntime(bundle, arithmetic=arithmetic), NumpyRuntime(bundle, arithmetic="float64")
    weights, stream = server.weights, server.plan().stream

    def slopes(measuring, sigma):
        plus, minus = (
            measuring.losses(weights, batch, stream, Gaussian(), range(K), s) for s in (sigma, -sigma)
        )
        return (plus - minus) / (2 * sigma)

    want = slopes(exact, 1e-6)
    assert np.corrcoef(slopes(half, 1e-2), want)[0, 1] > 0.98
    assert np.corrcoef(slopes(half, 1e-5), want)[0, 1] < 0.8


# --- pruned ----------------------------------------------------------------------------------------------


def test_digests_of_torch_and_numpy_are_one(network):
    runtime, bundle = network
    mask = by_magnitude(runtime.weights(), runtime.layout, 0.5)
    ours, theirs = Pruned(runtime, mask), Pruned(NumpyRuntime(bundle), mask)
    assert ours.frozen_digest == theirs.frozen_digest
    assert ours.layout == theirs.layout
    assert ours.weights().tobytes() == theirs.weights().tobytes()
    assert served(ours).plan().encode() == served(theirs).plan().encode()
    assert served(ours).plan().weights_digest != served(runtime).plan().weights_digest


def test_pruned_devices_of_several_storages_train_under_a_server_of_torch(network, digits):
    runtime, bundle = network
    train, test = digits
    mask = by_magnitude(runtime.weights(), runtime.layout, 0.5)
    seen = []

    class Watched(NumpyRuntime):
        def losses(self, weights, batch, stream, perturbation, directions, scale):
            seen.append(weights[0 : self.layout.n][~mask])
            if scale:
                z = perturbation.values(stream, directions, self.layout, 0, self.layout.n)
                seen.append(z[:, ~mask])
            return super().losses(weights, batch, stream, perturbation, directions, scale)

    devices = [Pruned(Watched(bundle, mode="full", storage=storage), mask) for storage in ("float32", "int8")]
    server = served(Pruned(runtime, mask))
    assert server.layout.n == mask.sum() < runtime.layout.n
    start = server.weights
    for record in baffle.simulate(server, fleet(devices, train, 4), rounds=15):
        assert (record.aborted, record.dropped) == (None, 0)
    assert len(seen) == 3 * 15 * 4  # W for its loss; W and all z_k for theirs
    assert not any(np.count_nonzero(values) for values in seen)
    batch = test.batch(slice(0, len(test)))
    judge = NumpyRuntime(bundle)

    def accuracy(weights):
        whole = devices[0].whole(weights)
        assert not np.count_nonzero(whole[~mask])
        return (judge.outputs(whole, batch).argmax(axis=1) == batch.targets).mean()

    assert accuracy(server.weights) > accuracy(start) + 0.15


def test_int8_of_a_pruned_model_keeps_its_zeros(network):
    runtime, bundle = network
    mask = by_magnitude(runtime.weights(), runtime.layout, 0.7)
    pruned = Pruned(NumpyRuntime(bundle, storage="int8"), mask)
    packed = pruned.runtime._source(pruned.whole(pruned.weights()))
    assert not np.count_nonzero(packed[0 : len(mask)][~mask])
