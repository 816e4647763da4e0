"""The reference loop in a process of its own: `alone.py NETWORK K BATCH THREADS`, a call a line on stdin.

What a process allocated and freed before decides how much the loop's allocations cost: the C library hands
blocks of a few megabytes back to the system, and faults them in again, until it has seen a larger one freed.
The benchmark's own process has seen larger ones.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType


class ReferenceLoop:
    """``run()`` is one reference loop over there. Leave the context to end the process."""

    def __init__(self, network: str, directions: int, batch: int, threads: int) -> None:
        arguments = [network, str(directions), str(batch), str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self) -> None:
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None
        assert answer is not None
        ask.write("go\n")
        ask.flush()
        if answer.readline() != "done\n":
            raise RuntimeError("the reference loop's process ended")

    def __enter__(self) -> ReferenceLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def main(network: str, directions: int, batch: int, threads: int) -> None:
    import torch
    import yardsticks

    from baffle import models

    torch.set_num_threads(threads)
    channels = 1 if network == "lenet" else 3
    module = models.build(network, channels, 10, seed=0).eval()
    inputs, targets = torch.randn(batch, channels, 32, 32), torch.randint(0, 10, (batch,))
    for _ in sys.stdin:
        yardsticks.reference_loop(module, inputs, targets, directions)
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
