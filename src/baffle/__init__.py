"""Federated training for devices that can only run a model forward.

    server = baffle.Server(runtime, baffle.SteinEstimator(100))
    for record in baffle.simulate(server, clients, rounds=200):
        print(record.round, record.loss)

The names below are the public ones. Those that need torch or cryptography are imported when they are first
asked for: a device that runs a ``Client`` installs and imports NumPy and its own runtime, nothing more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from baffle.aggregation import Aggregator, IntegerSum, PlainSum, Seal, Stage, Tally
from baffle.client import Client, Download, Samples
from baffle.endpoint import Endpoint
from baffle.errors import BaffleError
from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.perturbations import Gaussian, Layout, LowRank, Perturbation, Rademacher
from baffle.plan import LocalSteps, LocalTraining, ModelMessage, RoundPlan, RoundResult, RoundSum
from baffle.privacy import Privacy
from baffle.runtimes import Batch, DifferentiableRuntime, ExampleRuntime, Runtime, TangentRuntime
from baffle.stream import Stream
from baffle.terms import Terms

if TYPE_CHECKING:
    from baffle.checkpoint import ScalarLog, load_checkpoint, replay, save_checkpoint
    from baffle.federation import Driver, RoundRecord
    from baffle.optimizers import Portable, RAdaZO
    from baffle.privacy import Accountant
    from baffle.runtimes.torch import TorchRuntime, cross_entropy, evaluate
    from baffle.secagg.primitives import Identity
    from baffle.secagg.session import Policy, Roster
    from baffle.secure import FileLedger, Protection, SecureSeal, SecureSum
    from baffle.server import Server
    from baffle.simulation import random_drops, simulate

_LAZY = {
    "Accountant": "baffle.privacy",
    "Driver": "baffle.federation",
    "FileLedger": "baffle.secure",
    "Identity": "baffle.secagg.primitives",
    "Policy": "baffle.secagg.session",
    "Portable": "baffle.optimizers",
    "Protection": "baffle.secure",
    "RAdaZO": "baffle.optimizers",
    "Roster": "baffle.secagg.session",
    "RoundRecord": "baffle.federation",
    "ScalarLog": "baffle.checkpoint",
    "SecureSeal": "baffle.secure",
    "SecureSum": "baffle.secure",
    "Server": "baffle.server",
    "TorchRuntime": "baffle.runtimes.torch",
    "cross_entropy": "baffle.runtimes.torch",
    "evaluate": "baffle.runtimes.torch",
    "load_checkpoint": "baffle.checkpoint",
    "random_drops": "baffle.simulation",
    "replay": "baffle.checkpoint",
    "save_checkpoint": "baffle.checkpoint",
    "simulate": "baffle.simulation",
}

__version__ = "0.1.0"
__all__ = [
    "Accountant",
    "Aggregator",
    "BaffleError",
    "Batch",
    "Client",
    "DifferentiableRuntime",
    "Download",
    "Driver",
    "Endpoint",
    "ExampleRuntime",
    "FileLedger",
    "FixedPoint",
    "Gaussian",
    "Identity",
    "IntegerSum",
    "Layout",
    "LocalSteps",
    "LocalTraining",
    "LowRank",
    "ModelMessage",
    "Perturbation",
    "PlainSum",
    "Policy",
    "Portable",
    "Privacy",
    "Protection",
    "RAdaZO",
    "Rademacher",
    "Roster",
    "RoundPlan",
    "RoundRecord",
    "RoundResult",
    "RoundSum",
    "Runtime",
    "Samples",
    "ScalarLog",
    "Seal",
    "SecureSeal",
    "SecureSum",
    "Server",
    "Stage",
    "SteinEstimator",
    "Stream",
    "Tally",
    "TangentRuntime",
    "Terms",
    "TorchRuntime",
    "cross_entropy",
    "evaluate",
    "load_checkpoint",
    "random_drops",
    "replay",
    "save_checkpoint",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'baffle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
