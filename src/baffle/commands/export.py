"""``baffle export``: what devices without torch are given."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from baffle.commands.settings import add_settings, config_of, settings
from baffle.config import TrainConfig
from baffle.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from baffle.bundle import Bundle

HELP = "write a bundle: a network, its weights and what it is fed, for devices without torch"

_SETTINGS = {"model", "pretrained", "data", "data_folder", "image_size", "seed"}


def arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("file", nargs="?", type=Path, metavar="ONNX", help="an ONNX file instead of a network by name")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; nothing may be there")
    add("--run", type=Path, metavar="RUN", help="the network of a run that ended, with its weights")
    add("--weights", choices=("ema", "final"), default="ema", help="of the run, which (default: ema)")
    add("--onnx", action=argparse.BooleanOptionalAction, default=True, help="also for ONNX Runtime")
    add("--config", type=Path, metavar="FILE", help="TOML file of settings; flags win")
    file = command.add_argument_group("for an ONNX file")
    file.add_argument("--loss", choices=("cross-entropy", "mse"), default="cross-entropy", help="of a sample")
    file.add_argument(
        "--trainable",
        default="all",
        metavar="REGEX",
        help="initializers that are trained (default: all that are parameters, float32)",
    )
    file.add_argument("--input-shape", metavar="CxHxW", help="of one sample, where the file leaves it open")
    file.add_argument(
        "--mean", default="0", metavar="M,…", help="of pixels in [0, 1], by channel (default: 0)"
    )
    file.add_argument("--std", default="1", metavar="S,…", help="likewise (default: 1): (x/255 − mean)/std")
    add_settings(command, _SETTINGS)


def run(options: argparse.Namespace) -> int:
    given = settings(options) or options.config
    if options.file is not None and (options.run is not None or given):
        raise ConfigError("an ONNX file has a network and weights of its own: leave settings and --run out")
    if options.run is not None and given:
        raise ConfigError("a run has settings of its own: leave other settings out")
    if options.out.exists():  # before minutes of work
        raise ConfigError(f"{options.out} is there already: choose another folder")
    weights: NDArray[np.float32] | None = None
    if options.file is not None:
        bundle = _of_file(options)
    elif options.run is not None:
        from baffle.runs import RunFolder

        folder = RunFolder.open(options.run)
        weights = folder.load_weights(options.weights)
        bundle = _of_config(folder.config(), options.onnx)
        weights = _unpruned(folder.config(), bundle, weights)
    else:
        bundle = _of_config(config_of(options), options.onnx)
    for line in describe(bundle.write(options.out, weights)):
        print(line)
    return 0


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = text.lower().replace("×", "x").split("x")
    if not all(size.isascii() and size.isdigit() and len(size) < 7 for size in sizes):
        raise ConfigError(f"input-shape = {text!r}: whole numbers are needed, like 3x224x224")
    return tuple(map(int, sizes))


def _of_file(options: argparse.Namespace) -> Bundle:
    from baffle.data.dataset import normalisation
    from baffle.export.onnx import from_onnx

    bundle = from_onnx(
        options.file,
        loss=options.loss,
        trainable=options.trainable,
        input_shape=_shape(options.input_shape),
    )
    channels = bundle.input_shape[0]
    mean, std = _numbers("mean", options.mean, channels), _numbers("std", options.std, channels)
    if min(std) <= 0:
        raise ConfigError(f"std = {options.std}: positive numbers are needed")
    scale, shift = normalisation(mean, std)
    return dataclasses.replace(bundle, scale=scale, shift=shift)


def _numbers(what: str, text: str, channels: int) -> list[float]:
    """One for each channel, or one for all."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} = {text!r}: numbers are needed, like 0.49,0.48,0.45") from error
    if len(found) not in (1, channels) or not all(map(math.isfinite, found)):
        raise ConfigError(
            f"{what} = {text!r}: one finite number is needed, or one for each of {channels} channels"
        )
    return found * (channels // len(found))


def _of_config(config: TrainConfig, onnx: bool) -> Bundle:
    from baffle import job

    if config.bundle is not None:
        return job.read_bundle(config)
    from baffle.export.torch import from_torch

    train, _ = job.load_data(config)
    return from_torch(
        job.build_model(config, train),
        input_shape=train.shape,
        name=config.model,
        classes=train.classes,
        scale=train.scale,
        shift=train.shift,
        onnx=onnx,
    )


def _unpruned(config: TrainConfig, bundle: Bundle, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """A run of a pruned network keeps the weights that are left; the others are 0."""
    if len(weights) == bundle.layout.n or not config.sparsity:
        return weights
    import numpy as np

    from baffle.runtimes.pruned import by_magnitude

    kept = by_magnitude(bundle.weights(), bundle.layout, config.sparsity)
    if kept.sum() != len(weights):
        raise ConfigError(f"the run's {len(weights)} weights are not those of its network")
    whole = np.zeros(bundle.layout.n, np.float32)
    whole[kept] = weights
    return whole


def describe(bundle: Bundle) -> list[str]:
    """What is in a bundle, for its owner."""
    shape = "×".join(map(str, bundle.input_shape))
    lines = [
        f"{bundle.folder}: {bundle.name}, {bundle.layout.n:,} parameters in {len(bundle.layout.names)} "
        f"tensors, {len(bundle.frozen)} tensors frozen",
        f"inputs of {shape}, {len(bundle.classes)} classes",
    ]
    if bundle.graph is not None:
        counts = Counter(node.op for node in bundle.graph.nodes)
        lines.append("operators: " + ", ".join(f"{op} {count}" for op, count in counts.most_common()))
        lines.append("runtime numpy: yes")
    else:
        lines.append(f"runtime numpy: no, it lacks {bundle.missing}")
    lines.append(f"runtime onnx: {'no, without an ONNX file' if bundle.onnx is None else 'yes'}")
    lines.append(f"sha256 {bundle.digest.hex()}")
    return lines
