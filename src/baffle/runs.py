"""The run folder: what a run leaves behind, and how it is read again.

config.toml              every setting, resolved
environment.json         machine, versions, date of the start
metrics.jsonl            one line a round
events.jsonl             one line for whatever is worth a word: dropouts, aborted rounds (``events``)
checkpoint.safetensors   to go on from
rounds.log               the scalar log (forward-only, batch-level runs)
start.safetensors        the snapshot that the scalar log begins at
driver                   what brought messages to the clients, where these are on devices
resumes                  one byte for each resume of a private run: what may have been asked twice
weights.safetensors      final weights and their moving average ("weights", "ema")
curves.png               accuracy and loss against rounds, forward passes and bytes
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from baffle.checkpoint import ScalarLog, read_checkpoint, write_atomically
from baffle.config import TrainConfig, read_toml
from baffle.environment import environment as environment
from baffle.errors import CheckpointError, ConfigError, DataError

_COUNTS = {"participants", "dropped", "forward_passes", "bytes_down", "bytes_up", "elapsed"}


@dataclass(frozen=True)
class RunFolder:
    """Paths and contents of one run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def start(self) -> Path:
        return self.path / "start.safetensors"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def ended(self) -> bool:
        """True once the final weights are there: nothing is left to run."""
        return self._weights.exists()

    @property
    def log(self) -> ScalarLog:
        return ScalarLog(self.path / "rounds.log")

    @classmethod
    def create(cls, path: Path, config: TrainConfig, driver: str | None = None) -> RunFolder:
        """A new folder with config and environment. Raises ConfigError where one is there already."""
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            raise ConfigError(
                f"{path} is there already: go on with --resume {path}, or choose another --run"
            ) from error
        except OSError as error:
            raise ConfigError(f"cannot make the folder {path}: {error.strerror}") from error
        try:
            write_atomically(path / "environment.json", json.dumps(environment(), indent=1).encode())
            if driver is not None:
                write_atomically(path / "driver", driver.encode())
            write_atomically(path / "config.toml", config.to_toml().encode())
        except CheckpointError:  # without a config, nobody could go on with it
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises DataError where there is none."""
        if not os.path.isfile(path / "config.toml"):
            raise DataError(f"{path} is no run folder: it has no config.toml")
        return cls(path)

    @property
    def driver(self) -> str | None:
        """What brought messages to the clients; None for a simulation."""
        file = self.path / "driver"
        return file.read_text(encoding="utf-8") if file.exists() else None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For one process at a time. Raises DataError where another is at this run. POSIX."""
        import fcntl  # elsewhere a run must do without

        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = "another process is at this run: wait for it, or end it"
                raise DataError(f"{self.path}: {text}") from error
            yield
        finally:
            os.close(folder)

    def config(self) -> TrainConfig:
        return TrainConfig.resolve(read_toml(self.path / "config.toml"))

    def environment(self) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError):
            return {}
        return loaded

    # -- metrics ------------------------------------------------------------------------------------

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line; NaN becomes null."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self._metrics}: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The rows so far, one a round; a last line that was cut short by a kill is left out.

        Raises DataError, naming the line, where anything else is not as ``append_metrics`` left it.
        """
        try:
            *lines, _cut_short = self._metrics.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self._metrics}: {error}") from error
        rows = [_row(line) for line in lines]
        for number, row in enumerate(rows):
            if row.get("round") != number:
                raise DataError(f"{self._metrics} is damaged at line {number + 1}")
        return rows

    def rewind(self, round_: int, *, logged: bool) -> None:
        """Drops what metrics and log say of ``round_`` and later rounds: they will be run again.

        Raises DataError or CheckpointError, before anything is written, where one of them is damaged or
        lacks a round before ``round_``. ``logged``: the run has a scalar log.
        """
        rows = self.metrics()[:round_]
        if len(rows) < round_:
            raise DataError(f"{self._metrics} ends at round {len(rows)}, the checkpoint at {round_}")
        answered = [row["round"] for row in rows if row["participants"] > row["dropped"]]
        if logged and answered != self._logged_rounds(round_):
            raise CheckpointError(f"{self.log.path} lacks rounds that the checkpoint holds")
        write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.log.truncate(round_)
        for left in self.path.glob(".*.part"):  # of a write that a kill cut short
            left.unlink(missing_ok=True)

    def _logged_rounds(self, until: int) -> list[int]:
        if not self.log.path.exists():
            return []
        return [plan.round for plan, _ in self.log if plan.round < until]

    def sync(self) -> None:
        """Forces metrics and log onto the disk: before a checkpoint that relies on them."""
        try:
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self._metrics}: {error.strerror}") from error
        self.log.sync()

    # -- resumes ------------------------------------------------------------------------------------

    @property
    def _resumes(self) -> Path:
        """One byte for each time that a private run was gone on with."""
        return self.path / "resumes"

    def resumes(self) -> int:
        """How often ``note_resume`` was called."""
        return self._resumes.stat().st_size if self._resumes.exists() else 0

    def note_resume(self) -> None:
        """On disk when it returns: before anybody is asked again."""
        try:
            with self._resumes.open("ab") as file:
                file.write(b"+")
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self._resumes}: {error.strerror}") from error

    # -- weights ------------------------------------------------------------------------------------

    def save_weights(self, weights: NDArray[np.float32], ema: NDArray[np.float32]) -> None:
        write_atomically(self._weights, save({"weights": weights, "ema": ema}))

    def load_weights(self, which: str) -> NDArray[np.float32]:
        """``which``: "ema" or "final". Raises CheckpointError where the run has not ended."""
        if not self.ended:
            raise CheckpointError(f"{self.path} has not ended: finish it with --resume {self.path}")
        try:
            return load_file(self._weights)["ema" if which == "ema" else "weights"]
        except Exception as error:  # safetensors raises its own, unrelated types
            raise CheckpointError(f"{self._weights} is damaged: {error}") from error

    def rounds_done(self) -> int:
        """Rounds that the last checkpoint holds; 0 before the first."""
        return int(read_checkpoint(self.checkpoint)[1]["round"]) if self.checkpoint.exists() else 0


def next_run(parent: Path, stem: str) -> Path:
    """``parent/stem-1``, or the first number that is free."""
    number = 1
    while os.path.lexists(parent / f"{stem}-{number}"):
        number += 1
    return parent / f"{stem}-{number}"


def _row(line: str) -> dict[str, Any]:
    """One line of the metrics file; {} for what is none."""
    try:
        row = json.loads(line)
        sound = isinstance(row, dict) and all(type(row[key]) in (int, float) for key in _COUNTS)
    except (ValueError, LookupError, RecursionError):
        sound = False
    return row if sound else {}
