"""What do the uploaded K numbers tell? `run.py figure5|membership|collusion|inversion`.

`--data DIR` names the folder that holds MNIST/raw/*-ubyte.gz. `--quick` takes seconds, needs no files and
keeps nothing. Full runs take about ten minutes each on one core and write results/ beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

COMMANDS = ("figure5", "membership", "collusion", "inversion")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--data", type=Path, help="folder of MNIST/raw; only --quick does without")
    parser.add_argument("--quick", action="store_true", help="a glance on the packaged digits")
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick and options.command != "collusion":
        parser.error("a full run reads MNIST: --data DIR")
    torch.set_num_threads(1)
    importlib.import_module(options.command).run(None if options.quick else options.data, options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
