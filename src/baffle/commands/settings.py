"""Settings of ``TrainConfig`` as flags of a command."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from baffle.config import TrainConfig, read_toml, value_type


def add_settings(command: argparse.ArgumentParser, names: set[str] | None = None) -> None:
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


def settings(options: argparse.Namespace) -> dict[str, Any]:
    known = {entry.name for entry in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(options).items() if name in known}


def config_of(options: argparse.Namespace) -> TrainConfig:
    tables = [read_toml(options.config)] if options.config else []
    return TrainConfig.resolve(*tables, settings(options))
