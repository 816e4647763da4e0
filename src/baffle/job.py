"""A config made real: data, model, clients and server, before anything is written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from baffle import data, membership, models
from baffle.bundle import Bundle
from baffle.client import Client, Samples
from baffle.config import TrainConfig
from baffle.data.augment import CropFlip
from baffle.dealing import Deal
from baffle.errors import ConfigError
from baffle.estimator import SteinEstimator
from baffle.federation import Drops
from baffle.optimizers import Portable, RAdaZO
from baffle.perturbations import Gaussian, Layers, Layout, perturbation_from_spec
from baffle.plan import LocalSteps, LocalTraining
from baffle.privacy import Accountant
from baffle.runtimes import Batch, LayerRuntime, Runtime
from baffle.runtimes.cache import PrefixRuntime, cache_prefix
from baffle.runtimes.pruned import Pruned, by_magnitude
from baffle.runtimes.torch import Classifier, Evaluation, TorchRuntime, evaluate
from baffle.server import OptimizerFactory, SchedulerFactory, Server, averaging
from baffle.simulation import random_drops
from baffle.stream import Stream, derive_seed, seed_from

if TYPE_CHECKING:  # at run time, only where secure sums are asked for: they need cryptography
    from baffle.secagg.primitives import Identity
    from baffle.secagg.session import Roster
    from baffle.secure import Ledger

_EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Job:
    """Everything of a run. ``test`` is the test set in batches, after the frozen prefix if there is one.

    ``clients`` is empty where they are on devices; ``names`` are theirs. ``runtime`` is what clients of this
    process measure with; of a pruned model, too, its weights are those of the server.
    """

    config: TrainConfig
    server: Server
    clients: list[Client]
    names: list[str]
    runtime: Runtime
    test: list[Batch]
    rounds: int
    drops: Drops | None
    accountant: Accountant | None = None
    test_domains: NDArray[np.int64] | None = None  # of the test samples, in the order of the batches
    domain_names: tuple[str, ...] = ()

    def evaluate(self, weights: NDArray[np.float32]) -> Evaluation:
        """Accuracy and mean loss of weights (n,) on the test set."""
        if isinstance(self.runtime, Pruned):
            weights = self.runtime.whole(weights)
        return evaluate(cast(Classifier, _whole(self.runtime)), weights, self.test)


def build(config: TrainConfig, *, devices: bool = False) -> Job:
    """Data, model, server, and the clients unless ``devices`` have them.

    Raises ConfigError, PartitionError, DataError or MissingExtraError; writes nothing.
    """
    _set_threads(config)
    train, test = load_data(config)
    roster, identities = membership.identities(config, None if devices else client_names(config, train))
    parts, names = split(config, train), _names(config, train, roster)
    sizes = [config.max_samples or len(part) for part in parts]
    if len(names) != len(parts):  # a roster says who there is, and each has a set of its own
        sizes = [config.max_samples or len(train)] * len(names)
    runtime = _runtime(config, train)
    samples: Samples = train if devices else _fed(config, runtime, train, train=True)
    tested = _fed(config, runtime, test, train=False)
    starts = range(0, len(test), _EVALUATION_BATCH)
    test_batches = [tested.batch(np.arange(at, min(at + _EVALUATION_BATCH, len(test)))) for at in starts]
    rounds = rounds_of(config, sum(sizes), len(names))
    estimator = _estimator(config, runtime.layout)
    aggregator, accountant = membership.protection(config, sizes, rounds, estimator.directions, roster)
    clients = (
        []
        if devices
        else [
            Client(
                name,
                runtime,
                Subset(samples, part),
                seed=config.seed,
                seal=None
                if roster is None
                else membership.seal(config, name, identities[name], roster, accountant),
            )
            for name, part in zip(names, parts, strict=True)
        ]
    )
    local = None
    if config.local_epochs:
        local = LocalTraining(
            config.local_epochs,
            config.local_learning_rate,
            "adam" if config.local_optimizer == "adam" else "sgd",
            config.clip,
            config.weight_decay,
        )
    steps = LocalSteps(config.local_steps, config.local_learning_rate) if config.local_steps > 1 else None
    server = Server(
        runtime,
        estimator,
        seed=config.seed,
        optimizer=_optimizer(config),
        scheduler=_scheduler(config, rounds),
        ema=config.ema,
        ema_every=config.ema_every,
        ema_warmup=config.ema_warmup,
        clip=config.clip,
        batch_size=config.batch_size,
        fidelity=config.fidelity,  # type: ignore[arg-type]  # checked by TrainConfig
        local=local,
        steps=steps,
        aggregator=aggregator,
        downlink=config.downlink,  # type: ignore[arg-type]
        least_directions=config.least_directions,
        deal=_deal(config, runtime, estimator.directions, samples),
    )
    if aggregator is not None:
        aggregator.terms.check_plan(server.plan())
    server.cohort(names, config.cohort)
    drops = random_drops(config.dropout, config.seed) if config.dropout else None
    return Job(
        config,
        server,
        clients,
        names,
        runtime,
        test_batches,
        rounds,
        drops,
        accountant,
        test.domains,
        test.domain_names,
    )


def _fed(config: TrainConfig, runtime: Runtime, part: data.Dataset, *, train: bool) -> Samples:
    """A set as the trained part of the model is fed it: after the frozen prefix, cropped, or as it is."""
    whole = _whole(runtime)
    if whole.has_frozen_prefix:  # a pass over all data: after what can be refused without it
        return cache_prefix(whole, part, folder=None if config.features is None else Path(config.features))
    return CropFlip(part, config.seed) if train and config.augment == "crop-flip" else part


def device_names(config: TrainConfig) -> list[str]:
    """Who the clients of ``build(config, devices=True)`` are, for a driver that is made before the job."""
    train, _ = load_data(config)
    return _names(config, train, membership.identities(config, None)[0])


def build_client(
    config: TrainConfig, name: str, *, identity: Identity | None = None, ledger: Ledger | None = None
) -> Client:
    """One client of ``build``, for a device: from its own copy of the config, by which it insists.

    ``identity`` and ``ledger`` are for secure sums, which pin the config's roster and the job of its seed.
    Raises what ``build`` does.
    """
    _set_threads(config)
    train, _ = load_data(config)
    roster = membership.identities(config, None)[0]
    names = _names(config, train, roster)
    if name not in names:
        raise ConfigError(f"there is no client {name}: the names are {names[0]} to {names[-1]}")
    parts = split(config, train)
    part = np.arange(len(train)) if config.partition == "own" else parts[names.index(name)]
    runtime = _runtime(config, train)
    samples = _fed(config, runtime, train, train=True)
    seal = None
    if roster is not None:
        if identity is None:
            raise ConfigError(f"client {name}: secure sums need its key: --identity FILE")
        if roster.keys[roster.place(name)] != identity.public:
            raise ConfigError(f"client {name}: its key is not the one that the roster {config.roster} has")
        job = membership.job_name(config)
        seal = membership.seal(config, name, identity, roster, None, ledger, job=job)
    return Client(name, runtime, Subset(samples, part), seed=config.seed, seal=seal)


def _set_threads(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(min(config.threads, os.cpu_count() or 1))


def _runtime(config: TrainConfig, train: data.Dataset) -> Runtime:
    """What the config's model is measured with."""
    runtime = _of_torch(config, train) if config.bundle is None else _of_bundle(config, train)
    if config.sparsity:
        runtime = Pruned(runtime, by_magnitude(runtime.weights(), runtime.layout, config.sparsity))
    if config.scheme != "tangent":  # which has no σ
        runtime.check_sigma(config.sigma)
    return runtime


def _of_torch(config: TrainConfig, train: data.Dataset) -> Runtime:
    module = build_model(config, train)
    if config.runtime in (None, "torch"):
        autocast = torch.bfloat16 if config.mixed_precision else None
        return TorchRuntime(module, device=_device(config.device), gradient_autocast=autocast)
    from baffle.export.torch import from_torch

    return _without_torch(
        config,
        from_torch(
            module,
            input_shape=train.shape,
            name=config.model,
            classes=train.classes,
            scale=train.scale,
            shift=train.shift,
            onnx=config.runtime == "onnx",
        ),
    )


def _of_bundle(config: TrainConfig, train: data.Dataset) -> Runtime:
    bundle = read_bundle(config)
    found, wanted = (train.shape, len(train.classes)), (bundle.input_shape, len(bundle.classes))
    if found != wanted:
        raise ConfigError(
            f"bundle = {config.bundle!r}: it takes {wanted[0]} and has {wanted[1]} classes, but "
            f"{train.name} has {found[0]} and {found[1]}"
        )
    if bundle.graph is not None and bundle.graph.loss != "cross-entropy":
        raise ConfigError(f"bundle = {config.bundle!r}: labels need cross-entropy, not {bundle.graph.loss}")
    return _without_torch(config, bundle)


def _without_torch(config: TrainConfig, bundle: Bundle) -> Runtime:
    if config.runtime == "onnx":
        from baffle.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(bundle)
    from baffle.runtimes.numpy import NumpyRuntime

    return NumpyRuntime(bundle)


def read_bundle(config: TrainConfig) -> Bundle:
    """The bundle that the config names. Raises DataError for one that is damaged."""
    return Bundle.read(config.bundle or "")


def _whole(runtime: Runtime) -> PrefixRuntime:
    """The runtime of the model with what was pruned of it."""
    return cast(PrefixRuntime, runtime.runtime if isinstance(runtime, Pruned) else runtime)


@dataclass(frozen=True)
class Subset:
    """One client's share of a data set, without a copy of it."""

    samples: Samples
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        return self.samples.batch(self.indices[indices])


def load_data(config: TrainConfig) -> tuple[data.Dataset, data.Dataset]:
    """Train and test set, normalised as the model wants it."""
    # What it says of images: its files are compared with their hashes where they are used.
    bundle = None if config.bundle is None else Bundle.read(config.bundle, check=False)
    size = config.image_size
    if size is None and bundle is not None and not config.data.startswith("cifar"):  # which has its own
        size = bundle.input_shape[-1]
    options: dict[str, object] = {} if size is None else {"size": size}
    if config.stretch:
        options["stretch"] = True
    folder = None if config.data_folder is None else Path(config.data_folder)
    train, test = data.load(config.data, folder, **options)
    if bundle is not None and len(bundle.scale) == train.shape[0]:
        train, test = (
            dataclasses.replace(part, scale=bundle.scale, shift=bundle.shift) for part in (train, test)
        )
    if config.train_samples is not None:
        if config.train_samples > len(train):
            raise ConfigError(f"train-samples = {config.train_samples}: {train.name} has {len(train)}")
        order = Stream(derive_seed(seed_from(0), "train-samples"), 0).permutation(0, len(train))
        train = train.subset(np.sort(order[: config.train_samples]))
    if config.raw_pixels:
        peak = 1.0 / 255.0 if train.inputs.dtype == np.uint8 else 1.0
        raw = np.full(train.shape[0], peak, np.float32), np.zeros(train.shape[0], np.float32)
        train, test = (dataclasses.replace(part, scale=raw[0], shift=raw[1]) for part in (train, test))
    if config.pretrained is not None:
        # The pretrained weights were made for RGB in [−1, 1].
        channels = train.shape[0]
        scale, shift = data.normalisation([0.5] * channels, [0.5] * channels)
        train, test = (dataclasses.replace(part, scale=scale, shift=shift) for part in (train, test))
    return train, test


def build_model(config: TrainConfig, train: data.Dataset) -> nn.Module:
    """The network, its initial weights drawn from the config's seed."""
    channels, classes = train.shape[0], len(train.classes)
    if config.pretrained is not None:
        return models.MobileNetV2.from_npz(config.pretrained, classes, seed=config.seed)
    options: dict[str, object] = {}
    if config.activation is not None:
        options["activation"] = config.activation
    if config.norm is not None:
        options["norm"] = None if config.norm == "none" else config.norm
    return models.build(config.model, channels, classes, config.seed, **options)


def split(config: TrainConfig, train: data.Dataset) -> list[NDArray[np.int64]]:
    """Indices of each client's samples."""
    if config.partition == "own":  # as many as there are devices, each with all that its folder has
        return [np.arange(len(train))] * config.clients
    if config.partition == "iid":
        return data.iid(len(train), config.clients, config.seed)
    if config.partition == "dirichlet":
        return data.dirichlet(train.targets, config.clients, config.seed, alpha=config.alpha)
    if train.domains is None:
        raise ConfigError(f"{train.name} has no domains: use --partition iid or dirichlet")
    return data.by_domain(train.domains, config.clients, config.seed)


def client_names(config: TrainConfig, train: data.Dataset) -> list[str]:
    """Names in the order of ``split``: client-000 …, by domain where the split is."""
    if config.partition == "domain" and train.domains is not None:
        held = [train.domain_names[d] for d in np.unique(train.domains)]
        return [f"{name}-{i:03d}" for name in held for i in range(config.clients)]
    return [f"client-{i:03d}" for i in range(config.clients)]


def _names(config: TrainConfig, train: data.Dataset, roster: Roster | None) -> list[str]:
    """Those of the split, or of the roster where each client brings its own data. Ascending in the latter."""
    if roster is None or config.roster is None:
        return client_names(config, train)
    if config.partition == "own":
        return list(roster.names)
    names = client_names(config, train)
    for name in names:
        if name not in roster.names:
            raise ConfigError(f"client {name} is not on the roster {config.roster}")
    return names


def _estimator(config: TrainConfig, layout: Layout) -> SteinEstimator:
    """Where K is dealt out to layers, that of the first round is the server's to say."""
    perturbation = Gaussian() if _deals(config) else perturbation_from_spec(config.perturbation)
    if isinstance(perturbation, Layers):
        perturbation.parts(layout)
    if config.forward_passes is not None:
        each = SteinEstimator.from_forward_passes(
            config.forward_passes // config.local_steps, config.sigma, config.scheme, perturbation
        )
        return dataclasses.replace(each, directions=config.local_steps * each.directions)
    directions = config.directions or 100
    if isinstance(perturbation, Layers) and config.directions is None:
        directions = perturbation.directions
    return SteinEstimator(directions, config.sigma, config.scheme, perturbation)


def _deals(config: TrainConfig) -> bool:
    return config.perturbation == "layers"


def _deal(config: TrainConfig, runtime: Runtime, directions: int, samples: Samples) -> Deal | None:
    """As many forward passes as ``directions`` of the whole model take, dealt out to its layers."""
    if not _deals(config):
        return None
    if not isinstance(runtime, LayerRuntime):
        return Deal.of(directions, runtime.layout)
    costs = runtime.layer_costs(samples.batch(np.arange(min(len(samples), config.batch_size or 32))))
    kept = 1 + len(costs)  # passes: `SteinEstimator.passes`
    if directions - kept < sum(cost.direction for cost in costs):
        raise ConfigError(
            f"K = {directions}: the perturbation layers takes {kept} passes for what is kept, and one for "
            f"each of {len(costs)} layers at the least"
        )
    return Deal.of(directions - kept, runtime.layout, costs)


def rounds_of(config: TrainConfig, samples: int, clients: int) -> int:
    """Rounds of a run, given how many samples how many clients have."""
    if config.epochs is None:
        return config.rounds or 200
    if config.local_epochs:
        return math.ceil(config.epochs / config.local_epochs)
    cohort = config.cohort or clients
    a_round = cohort * config.batch_size if config.batch_size else samples * cohort / clients
    return math.ceil(config.epochs * math.ceil(samples / a_round) / config.local_steps)


def _optimizer(config: TrainConfig) -> OptimizerFactory:
    name = config.optimizer or ("average" if config.local_epochs else "adam")
    lr, betas = config.learning_rate, (config.beta1, config.beta2)
    decay = 0.0 if config.local_epochs else config.weight_decay  # there the clients' steps have it

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if config.downlink == "scalars":  # clients replay it
            return Portable(parameters, name, lr=lr, betas=betas)  # type: ignore[arg-type]  # by TrainConfig
        if name == "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=decay)
        if name == "radazo":
            return RAdaZO(parameters, lr=lr, betas=betas)
        if name == "average" and config.local_steps > 1:
            return torch.optim.SGD(parameters, lr=config.local_steps * config.local_learning_rate)
        if name == "average":
            return averaging(parameters)
        momentum = config.beta1 if name == "momentum" else 0.0
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)

    return make


def _scheduler(config: TrainConfig, rounds: int) -> SchedulerFactory | None:
    if config.schedule == "constant" and config.warmup == 0:
        return None
    warm = config.warmup * rounds

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        at = (step - warm) / max(rounds - warm, 1)
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(at, 1.0)))
        return max(1 - at, 0.0) if config.schedule == "linear" else 1.0

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r}: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name!r}: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: this torch sees no CUDA device here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {name!r}: the last one here is cuda:{torch.cuda.device_count() - 1}")
    return device
