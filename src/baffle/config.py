"""The settings of ``baffle train``: one flat table for flags, TOML and the run's record.

In Python, pass objects to constructors. Names exist here, on the command line and on the wire only, and
each is decoded through an allow-list. The defaults are the demo's: digits in a few minutes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baffle.errors import ConfigError


def _setting(default: Any, text: str, *flags: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "flags": flags, "choices": choices})


PRESETS: dict[str, dict[str, Any]] = {
    # Feng et al., Section 5 and the authors' code: constant rate, clip 0.3, EMA 0.995.
    "paper": {
        "learning_rate": 0.01,
        "schedule": "constant",
        "clip": 0.3,
        "ema": 0.995,
        "batch_size": 32,
    },
    # Found with the law simulator on MNIST/LeNet (docs/results.md): at equal forward passes times
    # samples, eight times as many steps on batches an eighth as large, the rate falling to nothing.
    "annealed": {
        "learning_rate": 0.005,
        "schedule": "cosine",
        "clip": 0.3,
        "ema": 0.999,
        "batch_size": 4,
    },
    # Of experiments/techniques the best that suits any network and any sum: batches as small, and directions
    # in one layer at a time, or all of a layer's coordinates where these are cheap (experiments/preset).
    "layered": {
        "perturbation": "layers",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "ema": 0.999,
        "batch_size": 4,
    },
}
_MOST = 2**31
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Raises ConfigError, naming the setting, for a value that cannot be."""

    preset: str | None = _setting(None, f"named server settings to start from: {', '.join(PRESETS)}")

    data: str = _setting(
        "digits", "data set: digits, mnist, fashion-mnist, cifar10, cifar100, images, domains, hf:<id>"
    )
    data_folder: str | None = _setting(None, "folder that holds the data set's files")
    image_size: int | None = _setting(None, "image side in pixels (default: the set's own)")
    stretch: bool = _setting(False, "images of mnist, fashion-mnist stretched to image-size, not padded")
    raw_pixels: bool = _setting(False, "pixels between 0 and 1, not normalised by the set's mean and spread")
    augment: str = _setting(
        "none",
        "what training images go through: crop-flip shifts each by up to 4 pixels and mirrors every second",
        choices=("none", "crop-flip"),
    )
    features: str | None = _setting(
        None, "folder that keeps what frozen layers make of a data set, for other runs (default: none)"
    )
    train_samples: int | None = _setting(
        None, "train on so many images, the same ones for every seed (default: all)"
    )
    clients: int = _setting(10, "number of clients; for --partition domain, of each domain")
    partition: str = _setting(
        "iid",
        "how samples are dealt: evenly, by skewed labels, by domain; own: each device has a set of its own",
        choices=("iid", "dirichlet", "domain", "own"),
    )
    alpha: float = _setting(0.3, "concentration of the Dirichlet partition; smaller is more skewed")

    model: str = _setting("lenet", "network: lenet, lenet-wide, wrn-10-2, mobilenet-v2, mlp")
    activation: str | None = _setting(
        None,
        "activation of the network (default: its own, hardswish for those of the paper)",
        choices=("hardswish", "relu", "selu"),
    )
    norm: str | None = _setting(
        None, "normalisation of the network (default: its own)", choices=("none", "group")
    )
    bundle: str | None = _setting(
        None, "instead of a network by name: the folder that `baffle export` made, for clients without torch"
    )
    pretrained: str | None = _setting(
        None, "npz of pretrained MobileNetV2 weights: trains a new head, features frozen"
    )

    sparsity: float = _setting(
        0.0, "share of each weight tensor that is pruned, the smallest at the start: neither trained nor sent"
    )

    runtime: str | None = _setting(
        None,
        "what clients measure with: torch; numpy, as devices without a framework do; onnx, by ONNX Runtime "
        "(default: torch, or numpy for a bundle)",
        choices=("torch", "numpy", "onnx"),
    )
    fidelity: str = _setting(
        "forward-only",
        "forward-only: K perturbed losses, as a device does; law: simulate them (σ → 0) from one backward "
        "pass; backprop: the baseline",
        choices=("forward-only", "law", "backprop"),
    )
    mixed_precision: bool = _setting(
        False, "law and backprop: gradients computed in bfloat16 where torch's autocast does so"
    )
    scheme: str = _setting(
        "forward",
        "finite difference, or tangent: the derivative itself",
        choices=("forward", "central", "tangent"),
    )
    directions: int | None = _setting(None, "K, directions a measurement (default 100)", "-K")
    forward_passes: int | None = _setting(None, "instead of K: forward passes a measurement")
    least_directions: int | None = _setting(
        None, "on devices: K may fall to this where owners allow fewer (default: who cannot is left out)"
    )
    sigma: float = _setting(1e-4, "scale of the perturbations")
    perturbation: str = _setting(
        "gaussian",
        "gaussian, rademacher, lowrank:R, or layers: one layer at a time, K dealt out by what slopes say",
    )

    rounds: int | None = _setting(None, "communication rounds (default 200, unless --epochs)")
    epochs: float | None = _setting(None, "instead of rounds: passes over the data")
    batch_size: int = _setting(32, "samples a client measures on at a time; 0 for all of its samples")
    local_epochs: int = _setting(
        0, "0: batch-level communication (FedSGD); E ≥ 1: epoch-level (FedAvg) with E local epochs"
    )
    local_steps: int = _setting(
        1, "S ≥ 2: batch-level, with S steps of a client in each round, along K/S directions each"
    )
    local_learning_rate: float = _setting(0.01, "learning rate of the local steps, of either kind")
    local_optimizer: str = _setting("adam", "optimizer of the local epochs' steps", choices=("adam", "sgd"))
    cohort: int | None = _setting(None, "clients drawn each round (default: all)")
    dropout: float = _setting(0.0, "chance that a client of the cohort vanishes mid-round")

    secure: bool = _setting(False, "secure aggregation: the server learns the clients' sum and nothing else")
    max_colluding: float = _setting(0.1, "secure: share of the clients that may help a lying server")
    max_dropout: float = _setting(0.3, "secure or private: share of the clients that may vanish in a round")
    session_rounds: int = _setting(100, "secure: rounds that one key agreement serves")
    ring_bits: int = _setting(64, "secure or private: size of a masked number, 64 or 32 bits")
    ring_limit: float = _setting(
        1024.0, "secure: largest magnitude of a number that a client sends; larger ones saturate"
    )
    privacy: str | None = _setting(
        None,
        "differential privacy, of each example or of all that a client answers (default: none)",
        choices=("example", "client"),
    )
    clip_norm: float | None = _setting(
        None, "private: C, the largest L2 norm of an example's (a client's) whole vector of slopes"
    )
    noise_multiplier: float | None = _setting(
        None, "private: z; the noise in a sum has standard deviation z·C"
    )
    target_epsilon: float | None = _setting(
        None, "instead of the noise multiplier: the ε that all rounds together must not exceed"
    )
    delta: float = _setting(1e-5, "private: δ of the (ε, δ) that is shown")

    roster: str | None = _setting(
        None, "secure, on devices: file of the clients' public keys, a line each: name, space, key"
    )
    max_samples: int | None = _setting(
        None, "secure or private: most samples that a client may have (default: as dealt)"
    )
    deadline: float = _setting(600.0, "on devices: seconds that they have for each stage of a round")
    downlink: str = _setting(
        "model",
        "what a round sends down: the weights (model), in half precision (float16), their change in half "
        "precision (update), or the last sum, from which clients take the server's step themselves (scalars)",
        choices=("model", "float16", "update", "scalars"),
    )

    optimizer: str | None = _setting(
        None,
        "server optimizer: adam (batch-level default), radazo, sgd, momentum; average: to where the clients' "
        "own steps lead, on average (epoch-level default)",
        choices=("adam", "radazo", "sgd", "momentum", "average"),
    )
    learning_rate: float = _setting(0.02, "learning rate of the server", "--lr")
    beta1: float = _setting(0.9, "decay of the server's momentum")
    beta2: float = _setting(0.99, "decay of the server's second moment")
    schedule: str = _setting("linear", "learning rate over the run", choices=("constant", "cosine", "linear"))
    warmup: float = _setting(0.0, "share of the rounds in which the learning rate rises from 0")
    ema: float = _setting(0.97, "decay of the weights' moving average; 0 for none")
    ema_every: int = _setting(1, "rounds between two steps of that average")
    ema_warmup: bool = _setting(
        False, "let the decay rise from (1 + t)/(10 + t), t steps, as the authors' code does, from the start"
    )
    weight_decay: float = _setting(
        0.0,
        "what an optimizer adds to the gradient, times the weights: the server's, with local epochs each "
        "client's (the authors' code: 5e-4)",
    )
    clip: float = _setting(
        0.0, "largest inf-norm of a gradient estimate (the authors' code: 0.3); 0 for none"
    )

    seed: int = _setting(0, "seed of everything: split, initial weights, order, directions")
    device: str = _setting("cpu", "where forward passes run: cpu, cuda, cuda:1")
    threads: int | None = _setting(None, "processor cores to use (default: all)")
    evaluate_every: int = _setting(10, "rounds between two looks at the test set")
    checkpoint_every: int = _setting(
        10, "rounds between two checkpoints; secure and private runs write one each round"
    )

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            choices = entry.metadata["choices"]
            if isinstance(value, str) and not value.isprintable():
                self._refuse(entry.name, "it has a character that cannot be printed")
            if choices and value is not None and value not in choices:
                self._refuse(entry.name, f"choose one of {', '.join(choices)}")
        self._positive("clients", "rounds", "cohort", "directions", "forward_passes", "image_size")
        self._positive("least_directions", "ema_every", "train_samples")
        self._positive("evaluate_every", "checkpoint_every", "threads")
        self._positive("sigma", "learning_rate", "local_learning_rate", "local_steps", "epochs", "alpha")
        self._positive("max_samples", "deadline")
        self._positive("session_rounds", "ring_limit", "clip_norm", "noise_multiplier", "target_epsilon")
        for name in ("clip", "batch_size", "local_epochs"):
            if not 0 <= getattr(self, name) < _MOST:
                self._refuse(name, "it lies in [0, 2^31)")
        if not 0 <= self.seed < 2**63:
            self._refuse("seed", "it lies in [0, 2^63)")
        if self.image_size is not None and self.image_size > _MOST_PIXELS:
            self._refuse("image_size", f"it is at most {_MOST_PIXELS}")
        if self.stretch and self.data not in ("mnist", "fashion-mnist"):
            self._refuse("stretch", f"it is for mnist and fashion-mnist, which are padded, not {self.data}")
        shares = ("sparsity", "dropout", "warmup", "max_colluding", "max_dropout", "delta")
        for name in ("ema", "beta1", "beta2", *shares):
            if not 0 <= getattr(self, name) < 1:
                self._refuse(name, "it lies in [0, 1)")
        if self.rounds is not None and self.epochs is not None:
            raise ConfigError("rounds and epochs exclude each other: set one of them")
        if self.directions is not None and self.forward_passes is not None:
            raise ConfigError("directions and forward-passes exclude each other: set one of them")
        if self.perturbation.startswith("layers"):
            for name in ("local_steps", "least_directions"):
                if getattr(self, name) not in (1, None):
                    self._refuse(name, "the perturbation layers needs all of its K directions at one place")
            if self.perturbation == "layers" and (self.local_epochs or self.privacy is not None):
                self._refuse(
                    "perturbation", "local epochs and privacy need one K: say layers:K.K. … yourself"
                )
        if not 0 <= self.weight_decay < 1:
            self._refuse("weight_decay", "it lies in [0, 1)")
        if self.weight_decay and not self.local_epochs and self.optimizer in ("radazo", "average"):
            self._refuse("weight_decay", "it is for the rules adam, sgd and momentum")
        if self.mixed_precision and self.fidelity == "forward-only":
            self._refuse("mixed_precision", "it is for gradients: choose fidelity law or backprop")
        if self.bundle is not None and (self.activation is not None or self.norm is not None):
            raise ConfigError("a bundle has its own activations and norms: leave activation and norm out")
        if self.pretrained is not None and (self.activation is not None or self.norm is not None):
            raise ConfigError("pretrained weights are for one network: leave activation and norm out")
        if self.pretrained is not None and self.augment != "none":
            self._refuse("augment", "features behind a frozen prefix are computed once: leave it out")
        if self.pretrained is not None and self.model != "mobilenet-v2":
            raise ConfigError(f"pretrained weights are for mobilenet-v2, not for {self.model}")
        self._check_runtime()
        if self.preset is not None and self.preset not in PRESETS:
            self._refuse("preset", f"choose one of {', '.join(PRESETS)}")
        if self.local_steps > 1 and self.local_epochs:
            raise ConfigError("local-steps and local-epochs exclude each other: set one of them")
        if self.downlink == "scalars":
            self._check_scalars()
        self._check_privacy()

    def _check_runtime(self) -> None:
        if self.bundle is not None and self.pretrained is not None:
            raise ConfigError("a bundle has weights of its own: leave pretrained out")
        if self.bundle is not None and self.runtime == "torch":
            self._refuse("runtime", "a bundle holds no torch module: use numpy or onnx")
        if self.bundle is not None or self.runtime in ("numpy", "onnx"):
            if self.fidelity != "forward-only":
                self._refuse("fidelity", "only torch can take gradients: leave bundle and runtime out")
            if self.scheme == "tangent":
                self._refuse("scheme", "it needs torch: leave bundle and runtime out")
            if self.device != "cpu":
                self._refuse("device", "it is for torch: leave bundle and runtime out")

    def _check_scalars(self) -> None:
        if self.fidelity != "forward-only" or self.local_epochs:
            raise ConfigError("downlink scalars is for forward-only, batch-level rounds: these sum K numbers")
        if self.optimizer in ("radazo", "average"):
            self._refuse("optimizer", "with downlink scalars, clients replay sgd, momentum or adam")
        if self.weight_decay:
            self._refuse("weight_decay", "with downlink scalars, clients replay rules that have none")

    def _check_privacy(self) -> None:
        if self.ring_bits not in (32, 64):
            self._refuse("ring_bits", "choose 32 or 64")
        if self.privacy is None:
            for name in ("clip_norm", "noise_multiplier", "target_epsilon"):
                if getattr(self, name) is not None:
                    self._refuse(name, "it goes with --privacy example or client")
            return
        if self.clip_norm is None:
            raise ConfigError("privacy needs clip-norm: the largest L2 norm of one vector of slopes")
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ConfigError("privacy needs either noise-multiplier or target-epsilon")
        if self.delta == 0:
            self._refuse("delta", "it is positive")

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < _MOST:
                self._refuse(name, "it must be positive, and below 2^31")

    def _refuse(self, name: str, why: str) -> None:
        raise ConfigError(f"{name.replace('_', '-')} = {getattr(self, name)!r}: {why}")

    @classmethod
    def resolve(cls, *tables: Mapping[str, Any]) -> TrainConfig:
        """One config from tables of settings, later ones winning; a preset lies below all of them."""
        merged: dict[str, Any] = {}
        for table in tables:
            merged.update(_checked(table))
        preset = merged.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"preset = {preset!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS.get(preset or "", {}), **merged})

    def to_toml(self) -> str:
        """The whole config as TOML; settings that are None are left out. ``resolve`` reads it back."""
        lines = [
            # A JSON string, number, boolean is a TOML one.
            f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        ]
        return "\n".join(lines) + "\n"


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ConfigError, naming the file, for what cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error


def value_type(entry: dataclasses.Field[Any]) -> type:
    """bool, int, float or str: the type of a setting that is set."""
    return {"bool": bool, "int": int, "float": float, "str": str}[str(entry.type).removesuffix(" | None")]


def _checked(table: Mapping[str, Any]) -> dict[str, Any]:
    fields = {entry.name: entry for entry in dataclasses.fields(TrainConfig)}
    checked = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f": did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ConfigError(f"unknown setting {key!r}{hint}")
        wanted = value_type(fields[name])
        if wanted is float and type(value) is int and abs(value) < _MOST:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"{key} = {value!r}: expected {wanted.__name__}")
        checked[name] = value
    return checked
