"""The command ``baffle``: parse, make one call, print. Errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from baffle.config import TrainConfig, read_toml, value_type
from baffle.errors import BaffleError, ConfigError, MissingExtraError

if TYPE_CHECKING:
    from baffle.federation import Driver
    from baffle.runs import RunFolder
    from baffle.training import Progress


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

    train = _command(commands, "train", _train, "train a model in a federation: simulated, or of devices")
    train.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/NAME-N)")
    train.add_argument("--resume", type=Path, metavar="DIR", help="go on with this run; takes no settings")
    train.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags win")
    train.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    train.add_argument(
        "--devices", type=Path, metavar="DIR", help="with the devices that listen there (baffle device)"
    )
    _add_settings(train)

    compare = _command(
        commands, "compare", _compare, "compare runs: a table, and their curves in one picture"
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    compare.add_argument("--plot", type=Path, metavar="PNG", help="write the picture here")

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
    _add_settings(data, {"data", "data_folder", "image_size", "clients", "partition", "alpha", "seed"})

    device = _command(commands, "device", _device, "be one client of a federation, behind a socket")
    device.add_argument("--name", required=True, metavar="NAME", help="the client's name")
    device.add_argument("--listen", type=Path, required=True, metavar="PATH", help="socket to listen at")
    device.add_argument("--identity", type=Path, metavar="FILE", help="secure: its key (baffle identity)")
    device.add_argument(
        "--ledger", type=Path, metavar="FILE", help="secure: what it answered, kept for good (needed there)"
    )
    device.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags win")
    _add_settings(device)

    identity = _command(commands, "identity", _identity, "make a client's key; prints its line of the roster")
    identity.add_argument("file", type=Path, metavar="FILE", help="where the key goes; nothing may be there")
    identity.add_argument("--name", required=True, metavar="NAME", help="the client's name")

    _command(commands, "vectors", _vectors, "print the published test vectors as JSON")
    _command(
        commands, "doctor", _doctor, "what is installed, what is missing, which σ each precision resolves"
    )
    return top


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    command.set_defaults(run_command=run)
    return command


# -- settings ---------------------------------------------------------------------------------------


def _add_settings(command: argparse.ArgumentParser, names: set[str] | None = None) -> None:
    group = command.add_argument_group("settings (each is also a key of the TOML file)")
    for entry in dataclasses.fields(TrainConfig):
        if names is not None and entry.name not in names:
            continue
        text = entry.metadata["help"]
        if entry.default is not None and entry.default is not False:
            text += f" (default: {entry.default})"
        if value_type(entry) is bool:
            group.add_argument(
                f"--{entry.name.replace('_', '-')}",
                dest=entry.name,
                default=argparse.SUPPRESS,
                action=argparse.BooleanOptionalAction,
                help=text.replace("%", "%%"),
            )
            continue
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            *entry.metadata["flags"],
            dest=entry.name,
            default=argparse.SUPPRESS,
            type=value_type(entry),
            choices=entry.metadata["choices"],
            metavar=None if entry.metadata["choices"] else value_type(entry).__name__.upper(),
            help=text.replace("%", "%%"),
        )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    known = {entry.name for entry in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(options).items() if name in known}


def _config(options: argparse.Namespace) -> TrainConfig:
    tables = [read_toml(options.config)] if options.config else []
    return TrainConfig.resolve(*tables, _settings(options))


# -- train ------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    if options.resume and (_settings(options) or options.config or options.run):
        raise ConfigError("--resume goes on with the settings of the run: give no others")
    config = None if options.resume else _config(options)
    from baffle import plots, training
    from baffle.runs import RunFolder, next_run

    if options.resume and RunFolder.open(options.resume).ended:
        print(f"{options.resume} has ended already: nothing is left to run")
    elif not plots.available():
        print("matplotlib is not installed: curves.png will be left out", file=sys.stderr)
    driver = _driver(options, config)
    with _stopping() as stop, _display() as show:
        if config is None:
            path = options.resume
            run = training.resume(path, show, driver=driver, stop=stop, tensorboard=options.tensorboard)
        else:
            path = options.run or next_run(Path("runs"), f"{config.data.split(':')[0]}-{config.model}")
            run = training.train(
                config, path, show, driver=driver, stop=stop, tensorboard=options.tensorboard
            )
    if not run.ended:
        where = [] if options.devices is None else ["--devices", str(options.devices)]
        command = shlex.join(["baffle", "train", "--resume", str(path), *where])
        print(f"stopped after round {run.rounds_done()}; go on with: {command}")
        return 130
    print(_summary(run))
    return 0


def _driver(options: argparse.Namespace, config: TrainConfig | None) -> Driver | None:
    if options.devices is None:
        return None
    from baffle.device import Sockets
    from baffle.runs import RunFolder

    if not options.devices.is_dir():
        raise ConfigError(f"{options.devices} is no folder: devices listen in one (baffle device --listen)")
    settings = config or RunFolder.open(options.resume).config()
    return Sockets(options.devices, least=settings.clients)


def _summary(run: RunFolder) -> str:
    rows, last, config = run.metrics(), _last(run), run.config()
    passes = sum(row["forward_passes"] for row in rows)
    how = {
        "forward-only": f"{passes:,} forward passes, no backward pass",
        "law": f"simulated by the law: {passes:,} forward passes on devices",
        "backprop": "backpropagation",
    }[config.fidelity]
    return (
        f"{run.path}: test accuracy {last['test_accuracy']:.4f}, "
        f"moving average {last['ema_accuracy']:.4f} after {len(rows)} rounds ({how})"
        f"{_spent(config, last)}"
    )


def _spent(config: TrainConfig, last: dict[str, Any]) -> str:
    """What privacy the run spent, and what that does not cover."""
    if config.privacy is None:
        return ""
    from baffle.privacy import not_covered

    unit = "each example" if config.privacy == "example" else "all that a client answered"
    seen = (
        "" if config.secure else ", towards whoever sees the sums; the server itself sees each client's share"
    )
    lines = "".join(f"\n  - {sentence}" for sentence in not_covered())
    return f"\nε = {_epsilon(last):.3g} at δ = {config.delta:g} for {unit}{seen}. Not covered:{lines}"


def _epsilon(last: dict[str, Any]) -> float:
    """ε at the last look. A record has null where it is infinite."""
    return math.inf if last.get("epsilon") is None else float(last["epsilon"])


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the run after the round it interrupts; a second one ends the process."""
    asked = False

    def ask(_signal: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Not print: the round that it interrupts may be in the middle of a print.
        os.write(2, b"\nstopping after this round (again: stop now, at the last checkpoint)\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    """A live line on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():

        def say(p: Progress) -> None:
            if p.aborted:
                print(f"no step: {p.aborted}", file=sys.stderr, flush=True)
            if p.evaluated:
                print(_plain(p), flush=True)

        yield say
        return
    from tqdm import tqdm

    with tqdm(unit="round", dynamic_ncols=True) as bar:

        def show(p: Progress) -> None:
            if bar.total is None:
                bar.total, bar.initial = p.rounds, p.round - 1
                bar.n = p.round - 1
            if p.aborted:
                bar.write(f"no step: {p.aborted}", file=sys.stderr)
            bar.set_postfix_str(_figures(p), refresh=False)
            bar.update(1)

        yield show


def _figures(p: Progress) -> str:
    accuracy = "" if p.accuracy is None else f"acc {p.accuracy:.4f} ema {p.ema_accuracy:.4f} "
    rate = f"{p.forwards_per_second:,.0f} fwd/s " if p.forward_passes else ""
    spent = "" if p.epsilon is None else f"ε {p.epsilon:.3g} "
    loss = "" if math.isnan(p.loss) else f"loss {p.loss:.4f} "  # real devices keep it to themselves
    return f"{loss}{accuracy}{spent}{rate}up {_bytes(p.bytes_up)} down {_bytes(p.bytes_down)}"


def _plain(p: Progress) -> str:
    return f"round {p.round}/{p.rounds} {_figures(p)} {p.seconds:.0f} s, {p.seconds_left:.0f} s left"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# -- the other commands -----------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> int:
    from baffle import plots
    from baffle.runs import RunFolder

    runs = [RunFolder.open(path) for path in options.runs]
    rows = [_comparison(run) for run in runs]
    heads: tuple[str, ...] = (
        "run",
        "fidelity",
        "rounds",
        "accuracy",
        "EMA",
        "forward passes",
        "down",
        "up",
        "seconds",
        "ε",
    )
    if all(row[-1] == "–" for row in rows):  # nobody spent any ε
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    widths = [max(len(heads[i]), *(len(row[i]) for row in rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(runs) > 1:
        best = [max(_last(run)["test_accuracy"], _last(run)["ema_accuracy"]) for run in runs]
        for run, accuracy in zip(runs[1:], best[1:], strict=True):
            gap = 100 * (accuracy - best[0])
            print(
                f"{run.path.name} is {gap:+.2f} points from {runs[0].path.name} (the better of its weights)"
            )
    if options.plot:
        plots.curves(runs, options.plot)
        print(f"curves: {options.plot}")
    return 0


def _last(run: RunFolder) -> dict[str, Any]:
    from baffle.errors import DataError

    looks = [row for row in run.metrics() if row.get("test_accuracy") is not None]
    if not looks:
        raise DataError(f"{run.path} has no look at the test set yet")
    return looks[-1]


def _comparison(run: RunFolder) -> tuple[str, ...]:
    rows, last = run.metrics(), _last(run)
    return (
        run.path.name,
        run.config().fidelity,
        str(len(rows)),
        f"{last['test_accuracy']:.4f}",
        f"{last['ema_accuracy']:.4f}",
        f"{sum(row['forward_passes'] for row in rows):,}",
        _bytes(sum(row["bytes_down"] for row in rows)),
        _bytes(sum(row["bytes_up"] for row in rows)),
        f"{rows[-1]['elapsed']:.0f}",
        f"{_epsilon(last):.3g}" if run.config().privacy else "–",
    )


def _evaluate(options: argparse.Namespace) -> int:
    from baffle.job import build
    from baffle.runs import RunFolder
    from baffle.runtimes.torch import evaluate

    run = RunFolder.open(options.run)
    weights = run.load_weights(options.weights)
    job = build(run.config())
    accuracy, loss = evaluate(job.runtime, weights, job.test)
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

    config = _config(options)
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


def _device(options: argparse.Namespace) -> int:
    config = _config(options)
    if config.secure and options.ledger is None:
        raise ConfigError("secure sums need --ledger FILE: without it, a client that starts again forgets")
    from baffle.device import serve
    from baffle.endpoint import Endpoint
    from baffle.job import build_client

    if config.secure:
        from baffle.identities import read_identity
        from baffle.secure import FileLedger

        identity = None if options.identity is None else read_identity(options.identity)
        client = build_client(config, options.name, identity=identity, ledger=FileLedger(options.ledger))
    else:
        client = build_client(config, options.name)

    def end(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        serve(Endpoint(client), options.listen, lambda: _say(f"{options.name} listens at {options.listen}"))
    except KeyboardInterrupt:
        _say(f"{options.name} has ended")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


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
