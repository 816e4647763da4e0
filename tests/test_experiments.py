"""The experiments as data: they resolve, say what the paper did, and run; and docs/paper.md."""

import dataclasses
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from baffle import cli
from baffle.config import TrainConfig
from baffle.reproduce.cell import settings
from baffle.reproduce.experiment import SCALES, Experiment
from baffle.reproduce.running import Runner, rounds_of
from baffle.reproduce.verdicts import entry, value_of

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
sys.path.insert(0, str(ROOT / "benchmarks"))

import paper  # noqa: E402

FOLDERS = sorted(file.parent for file in EXPERIMENTS.glob("*/experiment.toml"))
OURS = ("table1", "table2", "figure2", "figure3", "why", "preset")


def read(name):
    return Experiment.read(EXPERIMENTS / name)


def configs(name, scale):
    """{"ROW/COLUMN": its config at seed 0}."""
    return {cell.name: cell.config for cell in read(name).cells(scale) if cell.seed == 0}


# -- the experiments as data ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_experiment_reads_and_its_cells_resolve_at_every_scale(folder):
    experiment = Experiment.read(folder)
    assert experiment.columns or experiment.measured
    for scale in experiment.scales:
        cells = experiment.cells(scale)
        assert cells
        assert len({cell.key for cell in cells}) == len(cells)
        for cell in cells:
            told = {name: v for name, v in dataclasses.asdict(cell.config).items() if v is not None}
            assert TrainConfig.resolve(told) == cell.config


@pytest.mark.parametrize("name", OURS)
def test_every_scale_is_there_and_three_seeds_where_it_counts(name):
    experiment = read(name)
    assert list(experiment.scales) == list(SCALES)
    for scale in ("small", "paper"):
        assert len(experiment.scales[scale].seeds) >= 3
    # Without data sets, on any machine, in seconds.
    for config in configs(name, "smoke").values():
        assert config.data == "digits"
        assert rounds_of(config) <= 4
        assert config.train_samples in range(1, 321)


def test_table_1_is_the_papers_setting():
    cells = configs("table1", "paper")
    for name, config in cells.items():
        row, column = name.split("/")
        mnist = column.startswith("mnist")
        assert (config.clients, config.partition, config.batch_size) == (10, "iid", 32)
        assert (config.local_epochs, config.local_optimizer, config.local_learning_rate) == (1, "adam", 0.01)
        assert (config.ema, config.sigma, config.schedule) == (0.995, 1e-4, "constant")
        assert config.clip == (0 if row == "backprop" else 0.3)  # the authors' code clips estimates alone
        assert rounds_of(config) == (20 if mnist else 40)
        assert config.augment == ("none" if mnist else "crop-flip")
        assert config.raw_pixels == mnist
        assert config.stretch == (mnist and not row.endswith("-plain"))
        assert config.weight_decay == (0 if row.endswith("-plain") else 5e-4)
        assert config.fidelity == ("backprop" if row.startswith("backprop") else "law")
    assert {cells[f"k{i}/mnist-lenet"].directions for i in (1, 2, 3)} == {100, 200, 500}
    assert {cells[f"k{i}/cifar100-wrn"].directions for i in (1, 2, 3)} == {200, 500, 1000}
    assert cells["k1/cifar100-lenet"].model == "lenet-wide"
    assert cells["k1/mnist-lenet"].norm == "none"


@pytest.mark.parametrize("name", ["table1", "table2", "figure3"])
@pytest.mark.parametrize("scale", SCALES)
def test_an_ablation_is_the_smallest_k_but_for_one_thing(name, scale):
    cells = configs(name, scale)
    for row, changed in {
        "relu": {"activation"},
        "selu": {"activation"},
        "central": {"scheme", "directions"},
        "backprop": {"fidelity", "directions", "clip"},
    }.items():
        for column in {place.split("/")[1] for place in cells}:
            if f"{row}/{column}" not in cells:
                continue
            one, other = settings(cells[f"k1/{column}"]), settings(cells[f"{row}/{column}"])
            assert {setting for setting in one if one[setting] != other[setting]} == changed
            if row == "central":  # as many forward passes: 2K beside K + 1
                assert 2 * other["directions"] == one["directions"]


def test_table_2_differs_from_table_1_in_who_has_what():
    first, second = configs("table1", "paper"), configs("table2", "paper")
    assert first.keys() - second.keys() == {
        f"{row}-plain/{c}-lenet" for row in ("k1", "backprop") for c in ("mnist", "cifar10")
    }
    for name, config in second.items():
        one, other = settings(first[name]), settings(config)
        assert {s for s in one if one[s] != other[s]} <= {"clients", "partition", "rounds"}
        assert (config.clients, config.partition, config.alpha) == (100, "dirichlet", 0.3)
        assert config.rounds == 40


@pytest.mark.parametrize("scale", SCALES)
def test_figure_3_has_no_runs_of_its_own(scale):
    assert {c.key for c in read("figure3").cells(scale)} <= {c.key for c in read("table1").cells(scale)}


@pytest.mark.parametrize("name", ["figure2", "why"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_average_moves_once_an_epoch(name, scale):
    everything = {"mnist": 60_000, "cifar10": 50_000}
    for place, config in configs(name, scale).items():
        if not config.ema_warmup or config.local_epochs:
            continue
        samples = config.train_samples or everything[config.data]
        a_client = -(-samples // config.clients)
        assert config.ema_every == math.ceil(a_client / config.batch_size), place


@pytest.mark.parametrize("name", ["table1", "table2", "figure2"])
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_the_confirmation_differs_in_fidelity_alone(name, scale):
    cells = configs(name, scale)
    law, real = (settings(cells[f"{row}/mnist-lenet"]) for row in paper.CONFIRMED[name])
    assert {s for s in law if law[s] != real[s]} == {"fidelity"}
    assert (law["fidelity"], real["fidelity"]) == ("law", "forward-only")


def test_why_changes_one_thing_at_a_time():
    cells = configs("why", "small")
    before = settings(cells["before/k100"])
    found = {}
    for place, config in cells.items():
        row, column = place.split("/")
        if column == "k100" and row != "before":
            after = settings(config)
            found[row] = {s for s in before if before[s] != after[s]}
    assert found.pop("ema-epoch") == {"ema_every", "ema_warmup"}
    both = found.pop("all")
    assert both == {"raw_pixels", "stretch", "weight_decay", "ema_every", "ema_warmup"}
    found.pop("epoch-level")
    assert all(len(changed) == 1 for changed in found.values()), found
    figure2 = settings(configs("figure2", "small")["k100/mnist-lenet"])
    here = settings(cells["all/k100"]) | {"epochs": figure2["epochs"], "norm": "none"}
    assert here == figure2


def test_only_figures_that_are_known_are_the_papers():
    assert dict(read("table1").values) == {
        ("k1", "mnist-lenet"): 87.27,
        ("k2", "mnist-lenet"): 89.48,
        ("k3", "mnist-lenet"): 92.18,
        ("k3", "mnist-wrn"): 95.17,
        ("backprop", "mnist-lenet"): 94.31,
    }


# -- the smallest cells run -----------------------------------------------------------------------------

SMOKE = [
    *("table1 k1/mnist-lenet", "table1 central/cifar10-lenet", "table1 k1-forward/mnist-lenet"),
    *("table1 backprop/cifar10-lenet", "table2 selu/mnist-lenet", "table2 k1-forward/mnist-lenet"),
    *("figure2 k5000/cifar10-lenet", "figure2 backprop/mnist-lenet", "figure2 k100-forward/mnist-lenet"),
    *("figure3 relu/cifar10-lenet", "why all/k100", "why epoch-level/backprop"),
]


@pytest.mark.parametrize("which", SMOKE)
def test_a_smoke_cell_runs(which, tmp_path):
    name, place = which.split()
    experiment = copied(name, tmp_path)
    (cell,) = (cell for cell in experiment.cells("smoke", threads=1) if cell.name == place)
    assert Runner(tmp_path / "runs", say=lambda _: None).run(cell) == "kept"

    row = cell.read()
    config = cell.config
    rounds = rounds_of(config)
    assert row["rounds"] == rounds
    for metric in ("accuracy", "ema_accuracy", "top5", "ema_top5", "late_loss"):
        assert math.isfinite(value_of(row, metric))
    assert 0 <= row["accuracy"] <= row["top5"] <= 100
    assert row["curve"][-1][3:] == pytest.approx([row["accuracy"], row["ema_accuracy"]])
    # K + 1 passes a measurement (2K: central), one or more measurements a client in each round.
    each = 0 if config.fidelity == "backprop" else config.directions + 1
    each = 2 * config.directions if config.scheme == "central" else each
    assert row["forward_passes"] >= each * rounds * config.clients
    assert row["forward_passes"] % each == 0 if each else row["forward_passes"] == 0
    shown = entry(experiment, cell.row, cell.column, "smoke")
    assert shown.mean == value_of(row, experiment.metric_of(cell.row, cell.column))


def copied(name, folder):
    """An experiment without what is kept of it."""
    target = folder / "experiments" / name
    target.mkdir(parents=True)
    shutil.copyfile(EXPERIMENTS / name / "experiment.toml", target / "experiment.toml")
    return Experiment.read(target)


# -- docs/paper.md --------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Experiments of which nothing is kept, and a function that keeps a row of three seeds."""
    monkeypatch.setattr(paper, "EXPERIMENTS", tmp_path / "experiments")
    known = {name: copied(name, tmp_path) for name in OURS}

    def keep(name, place, scale, values, metric="ema_accuracy", **more):
        row, column = place.split("/")
        for seed, value in enumerate(values):
            cell = known[name].cell(scale, row, column, seed)
            kept = cell.read() or {
                "seed": seed,
                "settings": settings(cell.config),
                "fidelity": cell.config.fidelity,
                "rounds": 20,
                "curve": [],
            }
            cell.keep(kept | {metric: value} | more)

    return keep


def bullets(lines):
    return [line for line in lines if line.startswith("- ")]


def test_with_nothing_run_the_page_says_so_and_claims_nothing(world):
    gaps = paper.gaps()
    assert "- Nothing of what has been compared so far." in gaps
    assert any("no run at its scale for k1/mnist-lenet" in line for line in gaps)
    assert all(line.split("|")[3].strip() == "not run" for line in paper.questions() if "Table" in line)
    assert all("| not run | not run | – |" in line for line in paper.overview()[2:])
    assert "No change moves backprop beyond chance" in paper.reasons()[-1]


def test_what_lies_outside_its_spread_comes_first(world):
    world("table1", "k1/mnist-lenet", "paper", (84.0, 84.2, 84.4))  # the paper: 87.27
    world("table1", "k2/mnist-lenet", "paper", (89.0, 89.5, 90.0))  # 89.48
    world("table1", "backprop/mnist-lenet", "paper", (99.0, 99.1, 99.2))  # 94.31
    world("table1", "k3/mnist-lenet", "small", (70.0, 71.0, 72.0))  # 92.18, at another scale
    gaps = paper.gaps()
    wrong = bullets(gaps[: gaps.index("What could not be checked:")])
    assert len(wrong) == 2
    assert "K = 100 / 200, MNIST, LeNet: 84.20 ± 0.20" in wrong[0]
    assert "87.27: **below** by 3.07 points" in wrong[0]
    assert "94.31: **above** by 4.79 points" in wrong[1]
    (left,) = (line for line in gaps if "a figure of the paper was to hand for 5" in line)
    assert "no run at its scale for k3/mnist-lenet, k3/mnist-wrn;" in left
    (line,) = (line for line in paper.overview() if "Table 1" in line)
    assert "1 within spread, 1 above, 1 below, 1 not comparable, 1 not run" in line


def test_an_answer_needs_more_than_chance(world):
    world("table1", "k1/mnist-lenet", "small", (80.0, 81.0, 82.0))
    world("table1", "relu/mnist-lenet", "small", (78.0, 79.1, 79.9))  # differences 2.0, 1.9, 2.1
    world("table1", "selu/mnist-lenet", "small", (83.0, 84.1, 84.9))  # −3.0, −3.1, −2.9
    world("table1", "central/mnist-lenet", "small", (79.0, 83.0, 80.0))  # 1, −2, 2
    said = {
        line.split("|")[1].strip(): line.split("|")[3].strip()
        for line in paper.questions()
        if "| Table 1 |" in line
    }
    # Sample deviation 0.1, Student's 4.30 for two degrees of freedom: 4.30·0.1/√3 = 0.25.
    assert said["Is Hardswish better than ReLU?"] == "MNIST, LeNet: **yes**, +2.00 ± 0.25 (3 seeds, small)"
    assert said["Is Hardswish better than SELU?"] == "MNIST, LeNet: **no**, -3.00 ± 0.25 (3 seeds, small)"
    central = said["Forward differences rather than central ones, at equal forward passes?"]
    assert central.startswith("MNIST, LeNet: **undecided**, +0.33 ± 5.17")
    assert said["Does backpropagation stay ahead of the largest K?"] == "not run"
    (no,) = bullets(paper.gaps()[: paper.gaps().index("What could not be checked:")])
    assert "Is Hardswish better than SELU? MNIST, LeNet: **no**" in no


def test_the_aims_are_reached_where_the_rows_say_so(world):
    assert all(line.endswith("| not run | not run |") for line in paper.BLOCKS["paper:aims"]()[2:])

    def curve(*looks):
        return {"curve": [[at, 100 * at, 0, 10.0, average] for at, average in looks], "rounds": 20}

    world("preset", "backprop/mnist-lenet", "paper", (99.0, 99.1, 99.2))
    # 100 passes a round, 20 rounds for 20 epochs: 300 on each image at the third, of 501 · 20.
    late = curve((1, 80.0), (3, 92.18), (4, 98.5))
    world("preset", "layered/mnist-lenet", "paper", (98.5, 98.55, 98.6), **late)
    near, soon, *_ = paper.BLOCKS["paper:aims"]()[2:]
    assert near.endswith("| MNIST, LeNet | +0.55 ± 0.12 points behind (3 seeds) | **yes** |")
    assert "92.18 after at most 300 passes on an image of 10,020: 3.0% | **yes** |" in soon
    never = curve((1, 80.0), (20, 92.17))
    world("preset", "layered/mnist-lenet", "paper", (97.0, 97.1, 97.2), **never)
    near, soon, *_ = paper.BLOCKS["paper:aims"]()[2:]
    assert near.endswith("+2.00 ± 0.00 points behind (3 seeds) | **no** |")
    assert soon.endswith("| not all runs reach 92.18 | **no** |")
    world("preset", "published/cifar10-lenet", "paper", (60.0,))
    world("preset", "layered/cifar10-lenet", "paper", (70.0,), **curve((12, 60.5)))  # 2,400 of 20,040
    world("preset", "backprop/cifar10-lenet", "paper", (71.0,))
    _, _, near, soon = paper.BLOCKS["paper:aims"]()[2:]
    assert near.endswith("+1.00 ± 1.41 points behind (1 seed) | undecided |")
    assert "60.00 after at most 2,400 passes on an image of 20,040: 12.0% | **yes** |" in soon


def test_one_seed_is_held_to_the_expected_spread(world):
    # 2·√2·1.0 = 2.83 points.
    world("table1", "k1/mnist-lenet", "small", (80.0,))
    world("table1", "relu/mnist-lenet", "small", (77.5,))
    world("table1", "selu/mnist-lenet", "small", (77.0,))
    asked = {q.worse: q for q in paper.QUESTIONS["table1"]}
    table1 = Experiment.read(paper.EXPERIMENTS / "table1")
    assert paper.answers(table1, asked["relu"])[0].said == paper.UNDECIDED
    assert paper.answers(table1, asked["selu"])[0].said == paper.YES


def test_the_average_is_compared_with_the_weights_of_the_same_runs(world):
    world("table1", "k1/mnist-lenet", "small", (80.0, 81.0, 82.0))
    world("table1", "k1/mnist-lenet", "small", (78.0, 79.0, 80.0), metric="accuracy")
    (line,) = (line for line in paper.questions() if "moving average" in line and "| Table 1 |" in line)
    assert "MNIST, LeNet: **yes**, +2.00 ± 0.00" in line


def test_smoke_runs_say_nothing_of_the_paper(world):
    world("table1", "k1/mnist-lenet", "smoke", (10.0,))
    world("table1", "relu/mnist-lenet", "smoke", (90.0,))
    (line,) = (line for line in paper.overview() if "Table 1" in line)
    assert "| not run | not run | – |" in line
    assert all(line.split("|")[3].strip() == "not run" for line in paper.questions() if "| Table 1" in line)


def test_a_run_that_diverged_is_told(world):
    world("table1", "k1/mnist-lenet", "paper", (84.0, 84.2))
    world("table1", "k1/cifar10-lenet", "small", (10.0,), failed="loss is not finite")
    assert any("K = 100 / 200, CIFAR-10, LeNet: **diverged** (1 of 1 runs)" in b for b in paper.gaps())


def test_the_law_is_held_to_forward_passes(world):
    for metric, law, real in (
        ("accuracy", (20.0, 22.0, 24.0), (24.0, 25.0, 26.0)),
        ("ema_accuracy", (20.0, 20.5, 21.0), (25.0, 25.5, 26.0)),
        ("late_loss", (2.0, 2.1, 2.2), (1.8, 1.82, 1.84)),
    ):
        world("table1", "k1-short/mnist-lenet", "small", law, metric)
        world("table1", "k1-forward/mnist-lenet", "small", real, metric)
    rows = [line.split("|") for line in paper.confirm() if line.startswith("| Table 1")]
    # 2.78·s·√(1/3 + 1/3), pooled s = √2.5, 0.5, √0.0052: 3.59, 1.13, 0.164.
    assert [row[5].strip() for row in rows] == ["within spread", "above", "below"]
    assert rows[0][3].strip() == "22.00 ± 2.00 (3 seeds)"


def test_the_change_that_moves_most_is_named(world):
    world("why", "before/backprop", "small", (99.0, 99.1, 99.2))
    world("why", "weight-decay/backprop", "small", (94.0, 94.2, 94.1))
    world("why", "raw-pixels/backprop", "small", (98.0, 98.1, 98.2))
    world("why", "no-clip/backprop", "small", (99.5, 99.6, 99.7))
    text = paper.reasons()
    assert text[-1].endswith(
        "Beyond chance backprop is moved up by “no clip” (+0.50), and down by “weight decay 5e-4” (-5.00), "
        "“pixels between 0 and 1” (-1.00). "
        "No change moves K = 100 beyond chance, of those that were run."
    )
    (line,) = (line for line in text if "weight decay 5e-4" in line and "94.10" in line)
    assert "-5.00 ± 0.25" in line


def test_a_table_is_short_and_leaves_nothing_unsaid(world):
    world("table1", "k1/mnist-lenet", "paper", (84.0, 84.2, 84.4))
    world("table1", "k2/mnist-lenet", "paper", (89.0, 89.5))
    world("table1", "k3/mnist-lenet", "small", (70.0, 71.0, 72.0))
    world("table1", "k1/cifar10-lenet", "small", (30.0,))
    text = paper.table_of("table1")
    assert text[1] == "| | MNIST, LeNet (`paper`) | MNIST, WRN-10-2 | CIFAR-10, LeNet (`small`) |"
    by_row = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text[3:]
        if line.startswith("|")
    }
    assert by_row["K = 100 / 200"] == [
        "84.20 ± 0.20; the paper 87.27: **below**",
        "–",
        "30.00 (1 seed)",
    ]
    assert by_row["K = 200 / 500"][0] == "89.25 ± 0.35 (2 seeds); the paper 89.48: **within spread**"
    assert by_row["K = 500 / 1000"] == [
        "71.00 ± 1.00 (`small`); the paper 92.18: **not comparable**",
        "not run; the paper 95.17",
        "–",
    ]
    assert by_row["backprop"][0] == "not run; the paper 94.31"
    assert "Not run: CIFAR-10, WRN-10-2; CIFAR-100, LeNet 32/128, top-5; CIFAR-100, WRN-10-2, top-5." in text


def test_a_picture_is_shown_where_there_is_one(world, tmp_path):
    page = paper.EXPERIMENTS / "figure3" / "README.md"
    text = (EXPERIMENTS / "figure3" / "README.md").read_text()
    assert "](results/" not in paper.readme(page, text)
    (page.parent / "results").mkdir()
    for scale in ("smoke", "small"):
        (page.parent / "results" / f"figure3-{scale}.png").touch()
    assert "](results/figure3-small.png)" in paper.readme(page, text)
    assert any("experiments/figure3/results/figure3-small.png" in line for line in paper.table_of("figure3"))


def test_verdicts_are_read_off_other_pages():
    page = [
        "Words.",
        "",
        "| what | found | verdict |",
        "| --- | --- | --- |",
        "| a | 1 \\| 2 | holds |",
        "| b | 3 | **does not hold** |",
        "",
        "| other | table |",
        "|---|---|",
        "| x | does not hold |",
    ]
    assert [row[-1] for row in paper.verdict_rows(page)] == ["holds", "**does not hold**"]


PAGE = ROOT / "docs" / "paper.md"


def test_the_page_says_first_what_does_not_hold_and_has_every_experiment():
    text = PAGE.read_text()
    names = re.findall(r"^<!-- (paper:.*?) -->$", text, re.M)
    assert names[0] == "paper:gaps"
    assert set(paper.BLOCKS) <= set(names)
    tables = {name.split()[1] for name in names if name.startswith("paper:table ")}
    assert tables | {"table3-officehome", "techniques", "why"} == set(paper.CLAIMS)
    assert set(OURS) <= {folder.name for folder in FOLDERS} & set(paper.CLAIMS)


@pytest.mark.parametrize("name", OURS)
def test_a_readme_has_its_table_its_commands_and_no_broken_link(name):
    page = EXPERIMENTS / name / "README.md"
    text = page.read_text()
    assert "<!-- table -->" in text
    commands = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (baffle .*)$", text, re.M)]
    assert commands
    for words in commands:
        assert cli.parser().parse_args(words).name == name
    for link in re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", text):
        assert re.match(r"[a-z]+:", link) or (page.parent / link).exists(), link
