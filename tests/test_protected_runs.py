"""Runs with ``--secure`` and ``--privacy``: their bits, their ε, their refusals, and the noise in them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats

import baffle
from baffle import training
from baffle.aggregation import OpenSeal
from baffle.cli import main as command
from baffle.config import TrainConfig
from baffle.errors import DataError
from baffle.job import build
from baffle.privacy import Accountant, Privacy, calibrate, clip_rows, not_covered
from baffle.runs import RunFolder
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Roster
from baffle.secure import Protection, SecureSeal, SecureSum

FALSE_ALARM = 1e-6
# Digits in 7 shares of 205 or 206 samples; one may vanish, none collude.
TINY = {"data": "digits", "model": "mlp", "clients": 7, "directions": 4, "threads": 1, "evaluate_every": 2}
TINY |= {"rounds": 4, "batch_size": 20, "max_colluding": 0.0, "max_dropout": 0.15}
EXAMPLE = {"privacy": "example", "clip_norm": 5.0, "noise_multiplier": 1.5}
CLIENT = {"privacy": "client", "clip_norm": 5.0, "noise_multiplier": 3.0}
TIMES = ("seconds", "elapsed")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        calibrate.cache_clear()
        yield
        calibrate.cache_clear()


def flags(settings):
    for name, value in settings.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)


@pytest.fixture
def baffle_(capsys):
    """The command in this process: (code, output, errors)."""

    def run(*arguments, **settings):
        try:
            code = command([str(argument) for argument in (*arguments, *flags(settings))])
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return run


def train(path, stop=lambda: False, **settings):
    """A run without the command around it, and without the picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.plots, "available", lambda: False)
        return training.train(TrainConfig(**{**TINY, **settings}), path, lambda progress: None, stop=stop)


def rows_of(path):
    rows = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for stage in row["stages"].values():
            del stage["seconds"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights_of(path):
    return load_file(Path(path) / "weights.safetensors")


# -- sums in a ring are sums in a ring ----------------------------------------------------------------


def unmasked(settings):
    """The weights after the same run by a server that sees every client's integers, and the job."""
    job = build(TrainConfig(**{**TINY, **settings}))
    job.server.aggregator = baffle.IntegerSum(job.server.aggregator.terms)
    for client in job.clients:
        client.seal = OpenSeal()
    records = list(
        baffle.simulate(job.server, job.clients, rounds=job.rounds, cohort=job.config.cohort, drops=job.drops)
    )
    return job, records


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ring_bits": 32, "ring_limit": 300.0},
        {"dropout": 0.06, "seed": 4},
        {"cohort": 5, "max_dropout": 0.2},
        {"session_rounds": 2},
        {"local_epochs": 1, "rounds": 2, "optimizer": "average", "learning_rate": 1.0},
        {"fidelity": "backprop"},
        {"fidelity": "law"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_masks_change_no_bit_of_a_run(settings, tmp_path):
    train(tmp_path / "run", secure=True, **settings)
    job, records = unmasked({"secure": True, **settings})
    saved = weights_of(tmp_path / "run")
    assert saved["weights"].tobytes() == job.server.weights.tobytes()
    assert saved["ema"].tobytes() == job.server.ema_weights.tobytes()
    rows = rows_of(tmp_path / "run")
    if "dropout" in settings:
        assert {row["dropped"] for row in rows} == {0, 1}
    for row, record in zip(rows, records, strict=True):
        for key in ("loss", "participants", "dropped", "forward_passes"):
            assert row[key] == getattr(record, key)
        assert row["bytes_up"] > record.bytes_up or settings.get("fidelity") == "law"
        assert "epsilon" not in row


def test_without_the_ring_other_bits_but_the_same_sums(tmp_path):
    """A ring of 32 bits rounds each slope to some 2^-12; float64 sums do not."""
    ring = {"secure": True, "ring_bits": 32, "ring_limit": 300.0}
    point = build(TrainConfig(**TINY, **ring)).server.aggregator.terms.fixed_point
    train(tmp_path / "ring", rounds=1, **ring)
    train(tmp_path / "plain", rounds=1)
    (plan, ring), (_, plain) = (next(iter(RunFolder(tmp_path / n).log)) for n in ("ring", "plain"))
    bound = 2.0 ** -(point.fraction_bits + 1)
    assert 8 <= point.fraction_bits <= 16
    assert 0 < np.abs(ring.values - plain.values).max() <= bound * (1 + 1e-6)
    assert len(ring.values) == plan.estimator.directions


def test_without_noise_a_secure_run_is_the_same_whenever_it_is_made(tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, secure=True)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    assert weights_of(tmp_path / "one")["ema"].tobytes() == weights_of(tmp_path / "two")["ema"].tobytes()


@pytest.mark.parametrize("unit", [EXAMPLE, CLIENT], ids=lambda s: s["privacy"])
@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_noise_is_no_function_of_the_seed(unit, secure, tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, secure=secure, rounds=1, **unit)
    (_, one), (_, two) = (next(iter(RunFolder(tmp_path / n).log)) for n in ("one", "two"))
    assert not (one.values == two.values).any()


def test_a_stopped_secure_run_ends_in_the_same_bits(tmp_path):
    train(tmp_path / "whole", secure=True)
    stopped = train(tmp_path / "stopped", stop=lambda: True, secure=True)
    assert not stopped.ended
    training.resume(tmp_path / "stopped", lambda progress: None, stop=lambda: True)
    training.resume(tmp_path / "stopped", lambda progress: None)
    for file in ("weights.safetensors", "rounds.log"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    # New keys are made after each resume: the stages and bytes that this takes are all that differs.
    whole, resumed = (rows_of(tmp_path / name) for name in ("whole", "stopped"))
    assert ["advertise" in row["stages"] for row in whole] == [True] + [False] * (len(whole) - 1)
    assert ["advertise" in row["stages"] for row in resumed[:3]] == [True, True, True][: len(resumed)]
    for row in (*whole, *resumed):
        del row["bytes_up"], row["bytes_down"], row["stages"]
    assert whole == resumed
    assert not (tmp_path / "stopped" / "resumes").exists()


def test_a_round_that_too_many_leave_is_recorded_and_the_run_goes_on(tmp_path, baffle_):
    run = tmp_path / "run"
    code, out, err = baffle_("train", "--run", run, **{**TINY, "secure": True, "dropout": 0.3, "seed": 1})
    assert code == 0, err
    rows = rows_of(run)
    lost = [row for row in rows if "aborted" in row]
    assert 0 < len(lost) < len(rows)
    for row in lost:
        assert row["dropped"] == row["participants"] == 7
        assert "are needed" in row["aborted"]
    assert len(list(RunFolder(run).log)) == len(rows) - len(lost)
    assert "after 4 rounds" in out


# -- ε: where it is shown, and what it counts ---------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {**EXAMPLE, "secure": True},
        {**CLIENT, "secure": True},
        EXAMPLE,
        CLIENT,
        {"privacy": "example", "clip_norm": 5.0, "target_epsilon": 3.0},
        {"privacy": "client", "clip_norm": 5.0, "target_epsilon": 3.0, "secure": True},
    ],
    ids=lambda s: "-".join(str(s[k]) for k in s if k in ("privacy", "secure", "target_epsilon")),
)
def test_epsilon_is_the_accountants_wherever_it_is_shown(settings, tmp_path, baffle_):
    run = tmp_path / "run"
    code, out, err = baffle_("train", "--run", run, **{**TINY, **settings})
    assert (code, err) == (0, "")

    samples, batch, shares = 1437, TINY["batch_size"], 6
    q = batch * 7 / samples if settings["privacy"] == "example" else 1.0
    terms = build(TrainConfig(**{**TINY, **settings})).server.aggregator.terms
    z = settings.get("noise_multiplier", terms.privacy.noise_multiplier)
    assert terms.privacy.sampling_rate == pytest.approx(q)
    assert (terms.privacy.clip, terms.privacy.noise_multiplier) == (5.0, z)
    # Open, the noise is made by those that remain; secure, by those that hide each other for certain.
    assert terms.privacy.shares == shares if "secure" not in settings else 3 <= terms.privacy.shares <= 6
    accountant = Accountant(Privacy(settings["privacy"], 5.0, z, q, shares), terms.fixed_point, 4)
    spent = {n: accountant.epsilon(n, 1e-5) for n in (2, 4)}
    if "target_epsilon" in settings:
        assert 0.99 * settings["target_epsilon"] < spent[4] <= settings["target_epsilon"]

    rows = rows_of(run)
    assert [row["rounds_asked"] for row in rows] == [1, 2, 3, 4]
    assert {
        row["round"] + 1: pytest.approx(row["epsilon"], rel=1e-6) for row in rows if "epsilon" in row
    } == spent
    lines = out.splitlines()
    for line, n in zip(lines, (2, 4), strict=False):
        assert f" ε {spent[n]:.3g} " in line
    told = next(line for line in lines if line.startswith("ε = "))
    assert told.startswith(f"ε = {spent[4]:.3g} at δ = 1e-05 for ")
    assert ("the server itself sees each client's share" in told) == ("secure" not in settings)
    assert [line for line in lines if line.startswith("  - ")] == [f"  - {text}" for text in not_covered()]


def test_epsilon_in_tables_and_curves(tmp_path, baffle_):
    train(tmp_path / "private", secure=True, **EXAMPLE)
    train(tmp_path / "plain")
    picture = tmp_path / "both.png"
    code, out, err = baffle_("compare", tmp_path / "private", tmp_path / "plain", "--plot", picture)
    assert (code, err) == (0, "")
    heads, private, plain = (line.split() for line in out.splitlines()[:3])
    assert heads[-1] == "ε"
    assert (private[-1], plain[-1]) == (f"{rows_of(tmp_path / 'private')[-1]['epsilon']:.3g}", "–")
    assert picture.stat().st_size > 10_000
    code, out, _ = baffle_("compare", tmp_path / "plain")
    assert "ε" not in out
    assert baffle_("evaluate", tmp_path / "private")[0] == 0


def test_hardly_any_noise_is_an_infinite_epsilon_and_no_accident(tmp_path, baffle_):
    run = tmp_path / "run"
    code, out, err = baffle_("train", "--run", run, **{**TINY, **EXAMPLE, "noise_multiplier": 0.005})
    assert (code, err) == (0, "")
    assert rows_of(run)[-1]["epsilon"] is None
    assert "ε = inf" in out
    assert (run / "curves.png").stat().st_size > 10_000
    code, out, _ = baffle_("compare", run)
    assert code == 0
    assert out.splitlines()[1].split()[-1] == "inf"


def test_what_a_resume_asks_again_counts_twice(tmp_path):
    """Whoever stops a run cannot know whether the round that was running had been answered."""
    path, quiet = tmp_path / "run", lambda progress: None
    settings = {**EXAMPLE, "rounds": 5, "evaluate_every": 1}
    config = TrainConfig(**{**TINY, **settings})

    class Kill(BaseException):
        pass

    def interrupted(run, round_):
        """Killed in that round, after the clients have answered and before it is written down."""
        real = baffle.Server.apply

        def apply(server, total):
            if server.round == round_:
                raise Kill
            real(server, total)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(baffle.Server, "apply", apply)
            with pytest.raises(Kill):
                run()

    interrupted(lambda: training.train(config, path, quiet), 0)  # before anything is in the record
    interrupted(lambda: training.resume(path, quiet), 2)
    for _ in range(3):  # nothing is written between these
        interrupted(lambda: training.resume(path, quiet), 2)
    training.resume(path, quiet)
    rows = rows_of(path)
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["rounds_asked"] for row in rows] == [2, 3, 8, 9, 10]
    accountant = build(config).accountant
    for row in rows:
        assert row["epsilon"] == accountant.epsilon(row["rounds_asked"], 1e-5)


def test_a_stop_after_a_round_counts_once_more_at_most(tmp_path):
    path, quiet = tmp_path / "run", lambda progress: None
    config = TrainConfig(**{**TINY, **CLIENT, "rounds": 3, "evaluate_every": 1})
    training.train(config, path, quiet, stop=lambda: True)
    before = rows_of(path)
    training.resume(path, quiet)
    assert rows_of(path)[:1] == before
    assert [row["rounds_asked"] for row in rows_of(path)] == [1, 3, 4]
    training.resume(path, quiet)  # has ended
    assert (path / "resumes").read_bytes() == b"+"


def test_a_resume_that_cannot_be_noted_asks_nobody(tmp_path):
    path = tmp_path / "run"
    train(path, stop=lambda: True, **CLIENT)
    (path / "resumes").mkdir()
    before = rows_of(path)
    with pytest.raises(DataError, match="cannot write"):
        training.resume(path, lambda progress: None)
    assert rows_of(path) == before


# -- refusals: one line, exit code 2, nothing written -------------------------------------------------

PRIVATE = {"privacy": "example", "clip_norm": 1.0, "noise_multiplier": 1.0}
REFUSED = [
    ({"privacy": "example", "noise_multiplier": 1.0}, "privacy needs clip-norm"),
    ({"privacy": "client", "clip_norm": 1.0}, "either noise-multiplier or target-epsilon"),
    ({**PRIVATE, "target_epsilon": 1.0}, "either noise-multiplier or target-epsilon"),
    ({**PRIVATE, "delta": 0.0}, "delta = 0.0: it is positive"),
    ({**PRIVATE, "delta": 1.0}, "delta = 1.0: it lies in [0, 1)"),
    ({**PRIVATE, "clip_norm": -1.0}, "clip-norm = -1.0"),
    ({**PRIVATE, "clip_norm": "nan"}, "clip-norm = nan"),
    ({**PRIVATE, "noise_multiplier": 0.0}, "noise-multiplier = 0.0"),
    ({**PRIVATE, "noise_multiplier": 1e7}, "noise multiplier 10000000.0: above 0 and at most 1e6"),
    ({"privacy": "everything"}, "invalid choice: 'everything'"),
    ({"clip_norm": 1.0}, "clip-norm = 1.0: it goes with --privacy"),
    ({"noise_multiplier": 1.0}, "noise-multiplier = 1.0: it goes with --privacy"),
    ({"target_epsilon": 1.0, "secure": True}, "target-epsilon = 1.0: it goes with --privacy"),
    ({"privacy": "example", "clip_norm": 1.0, "target_epsilon": 1e9}, "target epsilon 1e+09"),
    ({**PRIVATE, "fidelity": "law"}, "privacy is for the fidelity 'forward-only', not 'law'"),
    ({**PRIVATE, "privacy": "client", "fidelity": "backprop"}, "fidelity 'forward-only', not 'backprop'"),
    ({**PRIVATE, "scheme": "tangent"}, "the scheme forward or central, not tangent"),
    ({**PRIVATE, "local_epochs": 1}, "needs batch-level slopes"),
    ({**PRIVATE, "batch_size": 0}, "batch-size = 0: with privacy"),
    ({**PRIVATE, "batch_size": 300}, "at most the 205 that it has"),
    ({**PRIVATE, "ring_bits": 32, "noise_multiplier": 1e6}, "ring of 32 bits"),
    ({"ring_bits": 16}, "ring-bits = 16: choose 32 or 64"),
    (
        {"secure": True, "ring_bits": 32, "ring_limit": 1e6},
        "take a smaller limit, smaller weights or a ring of 64",
    ),
    ({"secure": True, "ring_limit": 0.0}, "ring-limit = 0.0"),
    ({"secure": True, "ring_limit": 1e300}, "ring-limit = 1e+300"),
    ({"secure": True, "clients": 2}, "2 clients: a sum of fewer than 3"),
    ({"secure": True, "cohort": 2}, "2 clients: a sum of fewer than 3"),
    ({"secure": True, "max_dropout": 0.5, "max_colluding": 0.3}, "2 may collude and 3 drop out"),
    ({"secure": True, "max_dropout": 0.9}, "6 drop out"),
    ({"secure": True, "max_dropout": 1.0}, "max-dropout = 1.0: it lies in [0, 1)"),
    ({"secure": True, "max_colluding": -0.1}, "max-colluding = -0.1: it lies in [0, 1)"),
    ({"secure": True, "session_rounds": 0}, "session-rounds = 0"),
]


@pytest.mark.parametrize(
    ("settings", "why"),
    REFUSED,
    ids=lambda case: None if isinstance(case, str) else ",".join(f"{k}={v}" for k, v in case.items()),
)
def test_settings_that_cannot_be_are_one_line(settings, why, tmp_path, baffle_):
    path = tmp_path / "run"
    code, out, err = baffle_("train", "--run", path, **{**TINY, **settings})
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("baffle train: ")
    assert why in line
    assert not path.exists()


def test_the_same_settings_in_a_file_are_refused_too(tmp_path, baffle_):
    (tmp_path / "bad.toml").write_text(
        'privacy = "example"\nclip-norm = 1\nnoise-multiplier = 1\ndelta = 0\n'
    )
    code, out, err = baffle_("train", "--run", tmp_path / "run", "--config", tmp_path / "bad.toml")
    assert (code, out) == (2, "")
    assert err == "baffle train: delta = 0.0: it is positive\n"
    (tmp_path / "bad.toml").write_text('secure = "yes"\n')
    code, out, err = baffle_("train", "--run", tmp_path / "run", "--config", tmp_path / "bad.toml")
    assert (code, err) == (2, "baffle train: secure = 'yes': expected bool\n")


WITHOUT_EXTRAS = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        hidden = ("cryptography", "dp_accounting", "matplotlib")
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *rest)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
import baffle

assert not {"cryptography", "dp_accounting", "torch"} & sys.modules.keys()
from baffle.cli import main

for arguments in ARGUMENTS:
    print("--", main(["train", *arguments]), flush=True)
"""


def test_without_the_extras_plain_runs_work_and_others_name_them(tmp_path):
    tiny = list(flags({**TINY, "rounds": 1}))
    settings = [
        {},
        {"secure": True},
        {**EXAMPLE, "secure": True},
        EXAMPLE,
        {"privacy": "client", "clip_norm": 5.0, "target_epsilon": 3.0},
    ]
    arguments = [["--run", str(tmp_path / str(i)), *tiny, *flags(s)] for i, s in enumerate(settings)]
    code = WITHOUT_EXTRAS.replace("ARGUMENTS", repr(arguments))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("--")]
    assert codes == ["-- 0", *(4 * ["-- 2"])]
    _, *lines = done.stderr.splitlines()  # the first says that there is no matplotlib
    lines = [line for line in lines if "matplotlib" not in line]
    secure = "secure aggregation needs the package 'cryptography', which is not installed: "
    private = "counting up ε needs the package 'dp-accounting', which is not installed: "
    assert lines[0] == f"baffle train: {secure}pip install 'baffle-fl[secure]'"
    assert lines[1].startswith("baffle train: ")
    assert secure in lines[1] or private in lines[1]
    assert lines[2:] == 2 * [f"baffle train: {private}pip install 'baffle-fl[privacy]'"]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_plain_run_imports_no_extra_that_is_there(tmp_path):
    code = """
        import sys, baffle
        assert not {"cryptography", "dp_accounting", "torch"} & sys.modules.keys()
        from baffle.cli import main
        assert main(["train", *sys.argv[1:]]) == 0
        assert not {"cryptography", "dp_accounting"} & sys.modules.keys()
        assert "torch" in sys.modules
    """
    arguments = ["--run", tmp_path / "run", *flags({**TINY, "rounds": 1})]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# -- the noise and the sample, through the whole chain ------------------------------------------------


class Shifts:
    """Linear regression without a bias; numbers of its own for each example."""

    layout = baffle.Layout(("w",), ((3,),))
    frozen_digest = bytes(32)

    def weights(self):
        return np.array([0.5, -0.25, 0.125], np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        return float(self._each(weights, batch).mean())

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        return self.example_losses(weights, batch, stream, perturbation, directions, scale).mean(axis=1)

    def example_losses(self, weights, batch, stream, perturbation, directions, scale):
        wide = weights.astype(np.float64)
        rows = (perturbation.values(stream, k, self.layout, 0, 3) for k in directions)
        return np.array([self._each(wide + scale * row, batch) for row in rows])

    @staticmethod
    def _each(weights, batch):
        return (batch.inputs @ weights - batch.targets) ** 2


class Rows:
    """Samples that note which of them were asked for."""

    def __init__(self, seed, count):
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.standard_normal((count, 3)), rng.standard_normal(count) * 2
        self.asked = []

    def __len__(self):
        return len(self.y)

    def batch(self, indices):
        self.asked.append(np.array(indices))
        return baffle.Batch(self.x[indices], self.y[indices])


def federation(privacy, directions, sizes, batch_size, protection):
    """A secure one in memory, whose server stands still, and its samples."""
    names = [f"c{i}" for i in range(len(sizes))]
    identities = {name: Identity.generate() for name in names}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    point, weight = baffle.FixedPoint(64, 30, privacy.clip), 1 if privacy.unit == "client" else 64
    terms = baffle.Terms(point, len(names), weight, (), privacy)
    runtime = Shifts()
    samples = {name: Rows(i, sizes[i]) for i, name in enumerate(names)}
    clients = []
    for name in names:
        seal = SecureSeal(
            name, identities[name], roster, protection.policy, least_noise=privacy.noise_multiplier
        )
        clients.append(baffle.Client(name, runtime, samples[name], seed=1, seal=seal))
    server = baffle.Server(
        runtime,
        baffle.SteinEstimator(directions, 1e-3, "central"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        batch_size=batch_size,
        aggregator=SecureSum(roster, terms, protection),
    )
    return server, clients, samples


def slopes_of(plan, weights, samples):
    """(N, K): what each example would answer."""
    everything = baffle.Batch(samples.x, samples.y)
    return plan.estimator.example_slopes(Shifts(), weights, everything, plan.stream).slopes


@pytest.mark.parametrize("vanish", [0, 1])
def test_decoded_sums_of_clients_hold_the_promised_noise(vanish):
    """Six shares where four are counted on: variance (zC)²·6/4, and with one gone (zC)²·5/4."""
    K, rounds, C, z = 500, 4, 15.0, 0.7
    privacy = Privacy("client", C, z, shares=4)
    protection = Protection(0.0, 0.17, 3, 100, consistency=True)
    server, clients, samples = federation(privacy, K, [8] * 6, 0, protection)
    gone = {"c3"} if vanish else set()
    residuals = []
    records = baffle.simulate(server, clients, rounds=rounds, drops=lambda round_, name: name in gone)
    for record in records:
        assert record.aborted is None
        assert record.dropped == vanish
        expected, long = np.zeros(K), 0
        for client in clients:
            if client.name not in gone:
                row = slopes_of(record.plan, server.weights, samples[client.name]).mean(axis=0)
                long += np.linalg.norm(row) > C
                expected += clip_rows(row[None], C)[0]
        assert long >= 3  # the clip has something to do
        residuals.append(record.total.values * (6 - vanish) - expected)
    noise = np.concatenate(residuals)
    variance, shares = (z * C) ** 2, (6 - vanish) / 4
    # (n − 1)s²/σ² is χ² of n − 1 for Gaussian noise; its grid of 2^-30 is far below it.
    low, high = stats.chi2.interval(1 - FALSE_ALARM, len(noise)) / np.array(len(noise))
    assert low < (noise**2).mean() / (variance * shares) < high
    assert (noise**2).mean() > variance
    assert high < 1.25
    assert stats.kstest(noise / np.sqrt(variance * shares), "norm").pvalue > FALSE_ALARM
    assert abs(noise.mean()) < 5 * np.sqrt(variance * shares / len(noise))
    assert abs(np.corrcoef(residuals)[np.triu_indices(rounds, 1)]).max() < 5.5 / np.sqrt(K)


def test_too_few_shares_of_the_noise_give_no_sum():
    """Where two vanish of six, a protection that hides the rest still refuses noise for too few."""
    privacy = Privacy("client", 1.0, 1.0, shares=5)
    terms = baffle.Terms(baffle.FixedPoint(64, 30, 1.0), 6, 1, (), privacy)
    clients = [baffle.Client(f"c{i}", Shifts(), Rows(i, 8), seed=1) for i in range(6)]
    server = baffle.Server(
        Shifts(), baffle.SteinEstimator(3, 1e-3, "central"), batch_size=0, aggregator=baffle.IntegerSum(terms)
    )
    gone = {0: {"c1"}, 1: {"c1", "c2"}, 2: set()}
    records = list(
        baffle.simulate(server, clients, rounds=3, drops=lambda round_, name: name in gone[round_])
    )
    assert [record.total is None for record in records] == [False, True, False]
    assert "4 clients answered, and 5 make the noise that was promised" in records[1].aborted


@pytest.fixture(scope="module")
def sampled():
    """100 secure rounds of examples with tiny noise: records, decoded sums and who was sampled."""
    rounds, rate, sizes = 100, 0.3, [40, 40, 40, 40]
    privacy = Privacy("example", 6.0, 1e-3, rate, 3)
    server, clients, samples = federation(privacy, 6, sizes, 12, Protection(0.0, 0.0, 3, rounds))
    chosen = {client.name: [] for client in clients}
    records = []
    for record in baffle.simulate(server, clients, rounds=rounds):
        records.append(record)
        for name, rows in samples.items():
            asked, rows.asked = rows.asked, []
            chosen[name].append(np.concatenate(asked) if asked else np.zeros(0, int))
    return rate, records, chosen, samples, server.weights


def test_examples_are_sampled_by_independent_coins(sampled):
    rate, records, chosen, _, _ = sampled
    taken = np.array(
        [np.bincount(row, minlength=40) for rows in chosen.values() for row in rows]
    )  # (clients·rounds, examples)
    assert set(np.unique(taken)) == {0, 1}  # nobody twice
    assert stats.binomtest(int(taken.sum()), taken.size, rate).pvalue > FALSE_ALARM
    spread = rate * (1 - rate)
    per_round = ((taken.sum(axis=1) - 40 * rate) ** 2 / (40 * spread)).sum()  # a sample of fixed size: 0
    by_client = taken.reshape(4, len(records), 40).sum(axis=1).ravel()
    per_example = ((by_client - len(records) * rate) ** 2 / (len(records) * spread)).sum()
    for statistic, count in ((per_round, len(taken)), (per_example, len(by_client))):
        assert FALSE_ALARM < stats.chi2.sf(statistic, count) < 1 - FALSE_ALARM
    seen = {row.tobytes() for row in taken}
    assert len(seen) > 0.99 * len(taken)  # hardly one of 2^40 comes back
    for record in records:
        assert record.forward_passes == 12 * sum(
            len(range(0, len(rows[record.round]), 12)) for rows in chosen.values()
        )


def test_decoded_slopes_converge_to_the_clipped_mean(sampled):
    """E[decoded] = q·Σ_i clip(v_i) / (clients·batch size), whose variance the coins make."""
    rate, records, chosen, samples, weights = sampled
    off, variance, exact, scale = np.zeros(6), np.zeros(6), 0.0, 4 * 12
    clipped = []
    for record in records:
        rows = {n: clip_rows(slopes_of(record.plan, weights, s), 6.0) for n, s in samples.items()}
        everyone = np.concatenate(list(rows.values()))
        clipped.append((np.linalg.norm(everyone, axis=1) > 5.999).mean())
        off += record.total.values - rate * everyone.sum(axis=0) / scale
        variance += rate * (1 - rate) * (everyone**2).sum(axis=0) / scale**2
        sums = sum(rows[name][chosen[name][record.round]].sum(axis=0) for name in rows)
        exact = max(exact, np.abs(record.total.values - sums / scale).max())
    assert 0.2 < np.mean(clipped) < 0.8
    assert np.abs(off / np.sqrt(variance)).max() < 5
    # Given who was sampled, the noise alone is left: zC = 6e-3 a sum of three shares, four are there.
    assert 0 < exact < 8 * 6e-3 * np.sqrt(4 / 3) / scale
