"""Many cells, by one process or several: each takes the next cell that is neither kept nor held."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from baffle.errors import BaffleError, ConfigError, DataError
from baffle.interrupts import stopping
from baffle.reproduce.cell import Cell
from baffle.reproduce.experiment import Experiment

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Work:
    """What a command asks for, in plain words that a process can be given."""

    experiment: str  # its folder
    scale: str
    runs: str
    data: str | None = None
    only: tuple[str, ...] = ()  # globs; none stand for all
    budget: float | None = None  # seconds from now
    threads: int | None = None
    device: str = "cpu"

    def cells(self) -> list[Cell]:
        """In the order in which they are run. Raises ConfigError where one of ``only`` chooses none."""
        runs = Path(self.runs)
        every = Experiment.read(Path(self.experiment)).cells(
            self.scale,
            data=None if self.data is None else Path(self.data),
            features=runs / "features",
            threads=self.threads,
            device=self.device,
        )
        for glob in self.only:
            if every and not any(_matches(cell, glob) for cell in every):
                names = ", ".join(dict.fromkeys(cell.name for cell in every))
                raise ConfigError(f"--only {glob}: chooses none of {names}")
        return [cell for cell in every if not self.only or any(_matches(cell, glob) for glob in self.only)]


def _matches(cell: Cell, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in (cell.name, f"{cell.name}/{cell.seed}"))


def work(
    cells: Sequence[Cell],
    runs: Path,
    *,
    stop: Callable[[], bool],
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs what is neither kept nor held, until there is none; then True. False where it was stopped.

    After ``budget`` seconds no cell is begun, and one that runs is stopped after its round.
    """
    from baffle.reproduce.running import Runner  # torch, which a process that shares work does without

    until = None if budget is None else time.monotonic() + budget

    def over() -> bool:
        return stop() or (until is not None and time.monotonic() > until)

    runner = Runner(runs, say, over)
    again = True
    while again:
        again = False
        for cell in cells:
            if cell.read() is not None:
                continue
            if over():
                return False
            outcome = runner.run(cell)
            if outcome == "stopped":
                return False
            if outcome == "kept":
                again = True  # from the first again: another process may have left one unfinished
                break
    return True


def share(work: Work, workers: int, *, stop: Callable[[], bool]) -> bool:
    """``work`` by so many processes; False where it was stopped. Each ends when this one does.

    Raises DataError where one ended otherwise than it should; it has said why.
    """
    command = [sys.executable, "-m", "baffle.reproduce.workers", json.dumps(asdict(work))]
    # In sessions of their own, so that Ctrl-C reaches them once, from here.
    begun = [subprocess.Popen([*command, str(os.getpid())], start_new_session=True) for _ in range(workers)]
    told = False
    try:
        while any(process.poll() is None for process in begun):
            if stop() and not told:
                told = True
                for process in begun:
                    process.terminate()
            time.sleep(_POLL_SECONDS)
    finally:
        for process in begun:
            process.kill()
            process.wait()
    codes = {process.returncode for process in begun}
    if codes - {0, 130} and any(cell.find() is None for cell in work.cells()):
        raise DataError("a worker did not end as it should: see above; the same command goes on")
    return 130 not in codes


def main(text: str, parent: int) -> int:
    """A worker process. Ends after a round when its parent has ended."""
    given = Work(**json.loads(text))
    try:
        with stopping(quiet=True) as stop:
            done = work(
                given.cells(),
                Path(given.runs),
                stop=lambda: stop() or os.getppid() != parent,
                budget=given.budget,
                say=lambda line: print(line, flush=True),
            )
    except BaffleError as error:
        print(f"baffle reproduce: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if done else 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
