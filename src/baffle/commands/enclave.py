"""``baffle enclave``: a client that the owner of its machine cannot look into, and what others do with it."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baffle.commands.trust import key_of, kind_of, measurement_of, verifier_of
from baffle.config import TrainConfig, read_toml
from baffle.errors import ConfigError, DataError, DeliveryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from baffle.enclave.evidence import Root, Verifier
    from baffle.enclave.host import Setup

HELP = "a client in a sealed, measured sandbox: measure it, run it, verify it, send it data"

_ACTIONS = {
    "root": "make a software root; prints what verifiers trust",
    "measure": "what a worker of this bundle and these settings is; prints its measurement",
    "run": "run one, and pass on what is sealed to it",
    "verify": "ask a running one for evidence",
    "provision": "verify it, and send it the data",
}


def arguments(command: argparse.ArgumentParser) -> None:
    what = "; ".join(f"{name}: {text}" for name, text in _ACTIONS.items())
    command.add_argument("action", choices=tuple(_ACTIONS), help=what)
    add = command.add_argument
    add("--root", metavar="WHERE", help="software:DIR, or tpm:TCTI with --state DIR (root, run)")
    add("--trust", metavar="WHOM", help="software:KEY as root prints it, or tpm:FILE (verify, provision)")
    add("--name", metavar="NAME", help="the client's name (run, verify, provision)")
    add("--bundle", type=Path, metavar="DIR", help="the network (measure, run, provision)")
    add("--manifest", type=Path, metavar="FILE", help="measure, run: write it; verify, provision: trust it")
    where = command.add_argument_group("where it is asked (run, verify, provision)")
    where.add_argument("--listen", type=Path, metavar="PATH", help="a socket")
    where.add_argument("--drop", type=Path, metavar="DIR", help="a folder (baffle train --drop)")

    runs = command.add_argument_group("how it runs (measure, run): part of what is measured")
    runs.add_argument(
        "--limit", type=float, default=90.0, metavar="MB", help="of all its memory (default: 90)"
    )
    modes = "full", "layer", "stream", "kernel"
    runs.add_argument("--mode", choices=modes, help="what of the weights is in memory twice (default: layer)")
    runs.add_argument("--micro-batch", type=int, metavar="N", help="samples that pass together")
    storages = "float32", "float16", "bfloat16", "int8"
    runs.add_argument("--storage", choices=storages, help="how weights are held (default: float32)")
    runs.add_argument("--arithmetic", choices=storages[:3], help="what is computed in (default: float32)")
    runs.add_argument(
        "--state", type=Path, metavar="DIR", help="run: keep its state there, sealed, to start again from"
    )

    owner = command.add_argument_group("what its owner sends (provision)")
    owner.add_argument("--data", type=Path, metavar="PATH", help=".npz, or folder of idx files or classes")
    owner.add_argument("--server", metavar="KEY", help="the public key that must sign every envelope")
    owner.add_argument("--config", type=Path, metavar="FILE", help="TOML file of the job's settings")
    owner.add_argument("--identity", type=Path, metavar="FILE", help="secure: its key (baffle identity)")
    owner.add_argument("--roster", type=Path, metavar="FILE", help="secure: the clients' public keys")


def run(options: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "root": _root,
        "measure": _measure,
        "run": _run,
        "verify": _verify,
        "provision": _provision,
    }
    return actions[options.action](options)


def _root(options: argparse.Namespace) -> int:
    from baffle.enclave.software import SoftwareRoot

    kind, folder = kind_of(_needed(options, "root"), "--root")
    if kind != "software":
        raise ConfigError("a TPM is there already; tpm: is for run, which prints what to trust")
    path = Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {path}: {error.strerror}") from error
    _say(f"--trust software:{SoftwareRoot.create(path).public.hex()}")
    return 0


def _measure(options: argparse.Namespace) -> int:
    setup = _setup(options)
    manifest = setup.manifest(setup.files())
    _write_manifest(options.manifest, manifest.encode())
    _say(manifest.measurement.hex())
    return 0


def _run(options: argparse.Namespace) -> int:
    from baffle.enclave.host import EnclaveHost

    name, setup = _needed(options, "name"), _setup(options)
    _one_place(options)

    def end(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        with EnclaveHost(name, setup, _root_of(options), state=options.state) as host:
            _write_manifest(options.manifest, host.manifest.encode())
            _say(f"{name}: measurement {host.measurement.hex()}")
            if options.drop is not None:
                from baffle.drop import serve_drop

                serve_drop(host, options.drop, lambda: _say(f"{name} answers in {options.drop}"))
            else:
                from baffle.device import serve

                serve(host, options.listen, lambda: _say(f"{name} listens at {options.listen}"))
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends as it is
        _say(f"{name} has ended")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from baffle.enclave.host import asked_for_evidence

    verifier, measurement = (
        verifier_of(_needed(options, "trust")),
        measurement_of(_needed(options, "manifest")),
    )
    found = asked_for_evidence(_exchange(options), _needed(options, "name"), verifier, [measurement])
    _say(f"{found.measurement.hex()} (assurance: {found.assurance})")
    return 0


def _provision(options: argparse.Namespace) -> int:
    from baffle.bundle import Bundle
    from baffle.data.local import load_local
    from baffle.enclave.host import provision, provisioning
    from baffle.stream import seed_from

    name, folder = _needed(options, "name"), _needed(options, "bundle")
    server = key_of(_needed(options, "server"), "--server")
    (verifier, measurement), config = _trusted(options), _config(options)
    if config.sparsity:
        raise ConfigError("a worker measures all parameters: sparsity is not for enclaves")
    bundle = Bundle.read(folder)
    data = load_local(
        _needed(options, "data"), bundle.input_shape, bundle.classes, bundle.scale, bundle.shift
    )
    given = provisioning(
        name,
        folder,
        data.inputs,
        data.targets,
        server,
        seed=seed_from(config.seed),
        seal=_seal(options, config, name),
        weights=config.downlink in ("update", "scalars"),
    )
    found = provision(_exchange(options), given, verifier, [measurement])
    _say(f"{name} has {len(data)} samples; assurance of what holds them: {found.assurance}")
    return 0


# -- what is asked for ------------------------------------------------------------------------------


def _needed(options: argparse.Namespace, name: str) -> Any:
    value = getattr(options, name)
    if value is None:
        raise ConfigError(f"{options.action} needs --{name}")
    return value


def _one_place(options: argparse.Namespace) -> None:
    if (options.listen is None) == (options.drop is None):
        raise ConfigError(f"{options.action} needs --listen or --drop, and not both")


def _root_of(options: argparse.Namespace) -> Root:
    kind, rest = kind_of(_needed(options, "root"), "--root")
    if kind == "software":
        from baffle.enclave.software import SoftwareRoot

        root = SoftwareRoot(Path(rest))
        if options.state is not None:  # whose counter is of one state: held until this process ends
            from baffle.enclave.sealing import held

            held(Path(rest) / "state.lock")
        return root
    from baffle.enclave.tpm import TpmRoot

    folder = _needed(options, "state")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tpm = TpmRoot(rest, folder)
    (folder / "attestation.key").write_bytes(tpm.public)
    _say(f"--trust tpm:{folder / 'attestation.key'}")
    return tpm


def _trusted(options: argparse.Namespace) -> tuple[Verifier, bytes]:
    return verifier_of(_needed(options, "trust")), measurement_of(_needed(options, "manifest"))


def _write_manifest(path: Path | None, data: bytes) -> None:
    if path is not None:
        from baffle.enclave.sealing import write_whole

        write_whole(path, data)


def _setup(options: argparse.Namespace) -> Setup:
    from baffle.enclave.host import Setup
    from baffle.enclave.sandbox import Limits

    if not 1 <= options.limit < 10**6:
        raise ConfigError(f"--limit {options.limit:g}: a number of megabytes from 1 is needed")
    names = "mode", "micro_batch", "storage", "arithmetic"
    runtime = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Setup(_needed(options, "bundle"), runtime, Limits(int(options.limit * 10**6)))


def _config(options: argparse.Namespace) -> TrainConfig:
    tables = [read_toml(options.config)] if options.config else []
    if options.roster is not None:
        tables.append({"roster": str(options.roster)})
    return TrainConfig.resolve(*tables)


def _seal(options: argparse.Namespace, config: TrainConfig, name: str) -> dict[str, Any] | None:
    if not config.secure:
        return None
    from baffle.enclave.worker import seal_settings
    from baffle.identities import read_identity
    from baffle.membership import device_seal, identities

    identity, (roster, _) = read_identity(_needed(options, "identity")), identities(config, None)
    seal: Any = device_seal(config, name, identity)
    assert roster is not None
    return seal_settings(
        identity,
        dict(zip(roster.names, roster.keys, strict=True)),
        seal.policy,
        least_noise=seal.least_noise,
        job=seal.job,
        levels=seal.levels,
    )


def _exchange(options: argparse.Namespace) -> Callable[[bytes], bytes]:
    """Envelope → reply, with the worker behind a socket or a folder."""
    _one_place(options)
    name = _needed(options, "name")

    def by_socket(envelope: bytes) -> bytes:
        from baffle.device import relay

        return relay(options.listen, envelope, 60.0)

    def by_folder(envelope: bytes) -> bytes:
        from baffle.drop import Drop

        ((_, outcome),) = Drop(options.drop).ask("enclave", {name: envelope}, 60.0)
        if isinstance(outcome, DeliveryError):
            raise outcome
        return outcome

    return by_socket if options.drop is None else by_folder


def _say(line: str) -> None:
    print(line, flush=True)
