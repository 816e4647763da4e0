"""The command ``baffle``: parse, make one call, print. Errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from baffle.commands import client, compare, device, enclave, export, reproduce, train
from baffle.commands.settings import add_settings, config_of
from baffle.errors import BaffleError, ConfigError, MissingExtraError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(self.prog, f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _complain(program: str, message: object) -> None:
    """One line, whatever stands in the message: a path may hold a line break."""
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for bad input, 130 for a run that Ctrl-C stopped."""
    options = parser().parse_args(argv)
    program = f"baffle {options.command}"
    try:
        code: int = options.run_command(options)
        sys.stdout.flush()
    except BaffleError as error:
        _complain(program, error)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        _complain(program, MissingExtraError("torch", "torch", program))
        return 2
    except MemoryError as error:
        _complain(program, f"not enough memory: {error}; choose a smaller model, image size or batch size")
        return 2
    except KeyboardInterrupt:
        _complain(program, "interrupted")
        return 130
    except BrokenPipeError:  # whoever read the output has left, as in `baffle vectors | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def parser() -> argparse.ArgumentParser:
    """The whole command line; `docs/commands.md` is printed from it."""
    top = _Parser(
        prog="baffle",
        description="Federated training for devices that can only run a model forward.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _module(commands, train)
    _module(commands, compare)
    _module(commands, reproduce)

    evaluate = _command(
        commands, "evaluate", _evaluate, "accuracy and loss of a run's weights on its test set"
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--weights", choices=("ema", "final"), default="ema", help="which weights (default: ema)"
    )

    watch = _command(commands, "top", _top, "watch a run live: rounds, dropouts, bytes, seconds, ε, accuracy")
    watch.add_argument("run", type=Path, metavar="RUN", help="run folder")
    watch.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="time between two looks (default: 1)"
    )
    watch.add_argument(
        "--once", action="store_true", help="print one page and end; so too where the output is no terminal"
    )
    watch.add_argument(
        "--serve",
        metavar="HOST:PORT",
        help="also answer Prometheus there; without a host, from this machine alone",
    )

    data = _command(commands, "data", _data, "show how a data set is dealt to the clients")
    data.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags win")
    data.add_argument("--plot", type=Path, metavar="PNG", help="write a picture of the partition here")
    add_settings(
        data, {"data", "data_folder", "image_size", "train_samples", "clients", "partition", "alpha", "seed"}
    )

    _module(commands, export)
    _module(commands, client)
    _module(commands, device)
    _module(commands, enclave)

    identity = _command(commands, "identity", _identity, "make a client's key; prints its line of the roster")
    identity.add_argument("file", type=Path, metavar="FILE", help="where the key goes; nothing may be there")
    identity.add_argument("--name", required=True, metavar="NAME", help="the client's name")

    _command(commands, "vectors", _vectors, "print the published test vectors as JSON")
    _command(
        commands, "doctor", _doctor, "what is installed, what is missing, which σ each precision resolves"
    )
    return top


def _module(commands: Any, module: ModuleType) -> None:
    """A command that has a module of its own: HELP, arguments(), run()."""
    name = module.__name__.rpartition(".")[2]
    module.arguments(_command(commands, name, module.run, module.HELP))


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    command.set_defaults(run_command=run)
    return command


# -- the other commands -----------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace) -> int:
    from baffle.job import build
    from baffle.runs import RunFolder

    run = RunFolder.open(options.run)
    weights = run.load_weights(options.weights)
    job = build(run.config())
    accuracy, loss, _ = job.evaluate(weights)
    samples = sum(len(batch.targets) for batch in job.test)
    print(
        f"{run.path} ({options.weights} weights): accuracy {accuracy:.4f}, loss {loss:.4f}, {samples} samples"
    )
    return 0


def _top(options: argparse.Namespace) -> int:
    if not 0.1 <= options.every <= 3600:
        raise ConfigError(f"every = {options.every:g}: it lies in [0.1, 3600] seconds")
    if options.once and options.serve is not None:
        raise ConfigError("--once prints one page and ends: nobody could ask what --serve offers")
    from baffle import prometheus, top
    from baffle.watch import Watch

    watch, url = Watch(options.run), ""
    with ExitStack() as stack:
        if options.serve is not None:
            url = stack.enter_context(prometheus.serving(watch, *prometheus.address(options.serve)))
        if top.on_terminal() and not options.once:
            top.live(watch, options.every, url)
        elif url:
            print(f"{options.run}: {url}", flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        else:
            top.once(watch)
    return 0


def _data(options: argparse.Namespace) -> int:
    from baffle import data, job

    config = config_of(options)
    train, test = job.load_data(config)
    parts = job.split(config, train)
    names = job.client_names(config, train)
    shape = "×".join(map(str, train.shape))
    print(f"{train.name}: {len(train)} training and {len(test)} test samples of {shape}")
    for name, share in zip(names, data.describe(parts, train.targets, train.classes), strict=True):
        counts = " ".join(f"{count:5d}" for count in share.counts[:20])
        more = " …" if len(share.counts) > 20 else ""
        print(f"{name:>16}  {share.samples:6d}  {counts}{more}")
    if options.plot:
        data.plot(parts, train.targets, train.classes, options.plot, clients=names)
        print(f"picture: {options.plot}")
    return 0


def _identity(options: argparse.Namespace) -> int:
    if not options.name or len(options.name.split()) != 1 or options.name.startswith("#"):
        raise ConfigError(f"name {options.name!r}: one word is needed, as it stands in the roster")
    from baffle.identities import make_identity

    print(f"{options.name} {make_identity(options.file).public.hex()}")
    return 0


def _vectors(options: argparse.Namespace) -> int:
    from baffle.vectors import dump

    sys.stdout.write(dump())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from baffle.doctor import report

    for line in report():
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
