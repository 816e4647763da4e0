"""``baffle client``: what a phone, a sensor gateway or an enclave runs. NumPy, and nothing else at once."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baffle.allocator import return_large_blocks
from baffle.config import TrainConfig, read_toml
from baffle.errors import BaffleError, ConfigError, DataError

if TYPE_CHECKING:
    from baffle.aggregation import Seal
    from baffle.bundle import Bundle
    from baffle.client import Samples
    from baffle.data.local import RawDataset
    from baffle.endpoint import Endpoint
    from baffle.runtimes.numpy import NumpyRuntime

HELP = "be one client of a federation with NumPy alone: a bundle, data of its own, limits"

_MB = 10**6
_WEIGHTS, _DAYS = "weights.bin", "days"  # in the state's folder
_STREAMED = ("stream", "kernel")  # modes that read weights where they lie
# Of activations and what else a pass works in, where a limit of memory asks for little: bytes.
_ROOMS = (8 << 20, 4 << 20, 2 << 20, 1 << 20, 1 << 19)


def arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--name", required=True, metavar="NAME", help="the client's name")
    add("--bundle", type=Path, required=True, metavar="DIR", help="the network (baffle export)")
    add("--data", type=Path, required=True, metavar="PATH", help=".npz, or folder of idx files or classes")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--listen", type=Path, metavar="PATH", help="socket to listen at")
    where.add_argument("--drop", type=Path, metavar="DIR", help="folder to answer in (baffle train --drop)")
    add("--config", type=Path, metavar="FILE", help="TOML file of the job's settings, by which it insists")
    add("--identity", type=Path, metavar="FILE", help="secure: its key (baffle identity)")
    add("--ledger", type=Path, metavar="FILE", help="secure: what it answered, kept for good (needed there)")
    add(
        "--roster", type=Path, metavar="FILE", help="secure: the clients' public keys (default: the config's)"
    )
    add("--state", type=Path, metavar="DIR", help="folder for what it keeps: streamed weights, days of use")

    runs = command.add_argument_group("how it measures")
    runs.add_argument("--runtime", choices=("numpy", "onnx"), default="numpy", help="default: numpy")
    runs.add_argument(
        "--mode",
        choices=("full", "layer", "stream", "kernel"),
        help="numpy: what is in memory of the weights and their perturbed copy: all of both; all and a "
        "layer; a layer of each, from --state; a block of one (default: layer, or what the memory allows)",
    )
    runs.add_argument("--micro-batch", type=int, metavar="N", help="samples that pass together")
    runs.add_argument(
        "--storage",
        choices=("float32", "float16", "bfloat16", "int8"),
        help="numpy: how weights are held; with --state, in memory only so",
    )
    runs.add_argument(
        "--arithmetic", choices=("float32", "float16", "bfloat16"), help="numpy: what is computed in"
    )

    limits = command.add_argument_group("limits of its owner; a plan outside them is not answered")
    limits.add_argument("--most-directions", type=int, metavar="K", help="largest K")
    limits.add_argument("--most-memory", type=float, metavar="MB", help="numpy: of the whole process")
    limits.add_argument("--most-seconds", type=float, metavar="S", help="of a round, as predicted")
    limits.add_argument(
        "--most-days", type=int, metavar="N", help="on which it measures, ever; needs --state"
    )
    limits.add_argument(
        "--least-cohort", type=int, metavar="N", help="secure: honest clients in any sum of its answers"
    )
    limits.add_argument(
        "--when", metavar="COMMAND", help="asked before each measurement; exit code 0 allows it"
    )


def run(options: argparse.Namespace) -> int:
    # Before NumPy is imported: a thread of the BLAS has buffers of its own, and numba is larger than NumPy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("BAFFLE_KERNELS", "0")
    return_large_blocks()
    endpoint, filed = _endpoint(options)

    def end(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        if options.drop is not None:
            from baffle.drop import serve_drop

            serve_drop(endpoint, options.drop, lambda: _say(f"{options.name} answers in {options.drop}"))
        else:
            from baffle.device import serve

            spool = options.state if filed else None
            serve(
                endpoint,
                options.listen,
                lambda: _say(f"{options.name} listens at {options.listen}"),
                spool=spool,
            )
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends as it is
        _say(f"{options.name} has ended")
    return 0


def _endpoint(options: argparse.Namespace) -> tuple[Endpoint, bool]:
    """The client as its options say, and whether models go to a file as they come.

    What cannot be is refused before anything large is read.
    """
    config = _config(options)
    if options.drop is not None:
        from baffle.drop import folder_name

        folder_name(options.name)
    _check(options)
    from baffle.bundle import Bundle
    from baffle.client import Client
    from baffle.data.local import load_local
    from baffle.endpoint import Alone, Endpoint, Stored
    from baffle.limits import Guard, Limits, resident

    allowed = Limits(
        options.most_directions,
        None if options.most_memory is None else int(options.most_memory * _MB),
        options.most_seconds,
        options.most_days,
        options.least_cohort,
        options.when,
    )
    seal = _seal(options, config)
    bundle = Bundle.read(options.bundle)
    if bundle.graph is not None and bundle.graph.loss != "cross-entropy":
        raise ConfigError(f"{options.bundle}: labels need cross-entropy, not {bundle.graph.loss}")
    data = load_local(options.data, bundle.input_shape, bundle.classes, bundle.scale, bundle.shift)
    pruned = _pruning(bundle, config.sparsity)
    whole, mode = _runtime(options, bundle, pruned, config.batch_size or len(data), allowed.memory)
    runtime, samples = pruned(whole), _samples(whole, data)
    client = Client(options.name, runtime, samples, seed=config.seed, seal=seal)
    del data
    state = None if options.state is None else options.state / _DAYS
    filed = _is_filed(options, mode)
    weights = bundle.stored if filed and not config.sparsity else None
    base = resident() + _carried(options, bundle, mode)
    guard = Guard(allowed, client, state=state, base=base, weights=weights)
    receiver = Stored(options.state / _WEIGHTS) if filed else Alone()
    return Endpoint(client, receiver=receiver, guard=guard), filed


def _config(options: argparse.Namespace) -> TrainConfig:
    tables = [read_toml(options.config)] if options.config else []
    if options.roster is not None:
        tables.append({"roster": str(options.roster)})
    return TrainConfig.resolve(*tables)


def _check(options: argparse.Namespace) -> None:
    if options.runtime == "onnx":
        for name in ("mode", "storage", "arithmetic", "most_memory"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for --runtime numpy")
    if options.most_memory is not None and not 0 < options.most_memory < 10**12:
        raise ConfigError(f"--most-memory {options.most_memory:g}: a positive number of megabytes is needed")
    if options.state is None:
        if options.mode in _STREAMED:
            raise ConfigError(f"--mode {options.mode} keeps weights in a file: say where, with --state DIR")
        if options.most_days is not None:
            raise ConfigError("--most-days remembers the days: say where, with --state DIR")
        return
    try:
        options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot use {options.state}: {error.strerror or error}") from error


def _seal(options: argparse.Namespace, config: TrainConfig) -> Seal | None:
    if not config.secure:
        if options.least_cohort is not None:
            raise ConfigError("--least-cohort needs secure sums: in plain ones, the server sees each answer")
        return None
    if options.ledger is None:
        raise ConfigError("secure sums need --ledger FILE: without it, a client that starts again forgets")
    from baffle.identities import read_identity
    from baffle.membership import device_seal
    from baffle.secure import FileLedger

    identity = None if options.identity is None else read_identity(options.identity)
    ledger = FileLedger(options.ledger)
    try:
        return device_seal(config, options.name, identity, ledger, options.least_cohort)
    except BaffleError:
        ledger.close()
        raise


def _pruning(bundle: Bundle, sparsity: float) -> Callable[[Any], Any]:
    """A runtime of the whole network → the one that measures."""
    if not sparsity:
        return lambda runtime: runtime
    from baffle.runtimes.pruned import Pruned, by_magnitude

    mask = by_magnitude(bundle.weights(), bundle.layout, sparsity)
    return lambda runtime: Pruned(runtime, mask)


def _runtime(
    options: argparse.Namespace,
    bundle: Bundle,
    pruned: Callable[[Any], Any],
    batch_size: int,
    memory: int | None,
) -> tuple[Any, str]:
    """The runtime, and its mode: of those that the memory allows, the one that takes the most."""
    if options.runtime == "onnx":
        from baffle.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(bundle, micro_batch=options.micro_batch), "full"
    from baffle.limits import resident
    from baffle.runtimes.numpy import NumpyRuntime

    def made(mode: str, room: int) -> NumpyRuntime:
        return NumpyRuntime(
            bundle,
            mode=mode,
            micro_batch=options.micro_batch,
            memory=room,
            storage=options.storage or "float32",
            arithmetic=options.arithmetic or "float32",
        )

    if memory is None:
        mode = options.mode or "layer"
        return made(mode, _ROOMS[0]), mode
    base, least = resident(), None
    modes = ["layer"] if options.state is None else ["layer", *_STREAMED]
    for mode in [options.mode] if options.mode else modes:
        for room in _ROOMS:
            try:
                runtime = made(mode, room)
                needed = base + _carried(options, bundle, mode) + pruned(runtime).peak(batch_size)
            except ConfigError:  # a sample does not fit that little room
                break
            if needed <= memory:
                return runtime, mode
            least = needed if least is None else min(least, needed)
    hint = "" if options.state is not None else "; with --state DIR it could read weights where they lie"
    raise ConfigError(
        f"--most-memory {memory / _MB:g}: a batch of {batch_size} takes {(least or base) / _MB:.1f} MB at "
        f"least{hint}"
    )


def _is_filed(options: argparse.Namespace, mode: str) -> bool:
    """Whether a round's model goes to a file as it comes: what streams it or packs it reads it from there."""
    return options.state is not None and (mode in _STREAMED or _packs(options))


def _packs(options: argparse.Namespace) -> bool:
    return options.storage not in (None, "float32")


def _carried(options: argparse.Namespace, bundle: Bundle, mode: str) -> int:
    """Bytes of a round's model that a runtime does not count: what it is packed from, and on its way.

    From a socket to memory it is there twice as it comes.
    """
    if _is_filed(options, mode):
        return 0
    return (4 * _packs(options) + 8 * (options.drop is None)) * bundle.layout.n


def _samples(runtime: Any, data: RawDataset) -> Samples:
    """The data behind the frozen prefix, where that is no larger than the data."""
    if not getattr(runtime, "has_frozen_prefix", False):
        return data
    import numpy as np

    from baffle.runtimes.cache import cache_prefix

    one = runtime.prefixed(data.batch(np.arange(1)))
    if one.inputs.nbytes * len(data) > data.inputs.nbytes:
        return data
    return cache_prefix(runtime, data)


def _say(line: str) -> None:
    print(line, flush=True)
