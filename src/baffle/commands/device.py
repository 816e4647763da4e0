"""``baffle device``."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from baffle.commands.settings import add_settings, config_of
from baffle.errors import ConfigError

HELP = "be one client of a federation, behind a socket"


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", required=True, metavar="NAME", help="the client's name")
    command.add_argument("--listen", type=Path, required=True, metavar="PATH", help="socket to listen at")
    command.add_argument("--identity", type=Path, metavar="FILE", help="secure: its key (baffle identity)")
    command.add_argument(
        "--ledger", type=Path, metavar="FILE", help="secure: what it answered, kept for good (needed there)"
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags win")
    add_settings(command)


def run(options: argparse.Namespace) -> int:
    config = config_of(options)
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
