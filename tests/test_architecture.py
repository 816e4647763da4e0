"""The house: who imports whom, what is optional, what is public, and that a device needs no torch."""

import ast
import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import baffle

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "baffle"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# A module imports from rows above its own in this table, inside functions too.
ROWS = """
    errors environment events digests durable allocator interrupts
    stream wire fixedpoint config law rules runtimes.prefix models._layers data.files data.partition
    secagg.primitives secagg.sharing
    kernels privacy optimizers exchange secagg secagg.parameters
    kernels.directions kernels.simd secagg.session
    kernels.winograd secagg.messages
    kernels.layers kernels.coordinates secagg.client secagg.server
    perturbations runtimes.graph models.guidelines models.lenet models.mlp models.mobilenet models.wideresnet
    runtimes runtimes.activations runtimes.sources runtimes.simplify runtimes.objective runtimes.arrays models
    runtimes.onebyone runtimes.lowrank runtimes.schedule runtimes.strips runtimes.modules bundle export
    export.agreement runtimes.batched runtimes.steps runtimes.convolutions data.picture data.pickles
    runtimes.program runtimes.operators
    runtimes.sweeps runtimes.tangent runtimes.network runtimes.coordinates
    runtimes.layered
    estimator dealing runtimes.torch runtimes.numpy runtimes.onnx runtimes.pruned runtimes.cache
    data.dataset data.augment
    plan data.folders export.onnx_graph
    terms local downlink data.hub export.onnx_file
    aggregation vectors export.onnx_writer
    client server secure identities data.sources
    endpoint federation checkpoint membership data.local
    data
    simulation device drop limits runs export.torch export.onnx
    enclave enclave.evidence enclave.seccomp
    enclave.sandbox enclave.channel enclave.manifest enclave.sealing enclave.certificates
    enclave.worker enclave.software enclave.tpm enclave.gramine enclave.sev
    enclave.host
    job
    plots doctor watch domains
    training top prometheus
    reproduce reproduce.cell reproduce.measured reproduce.strict
    reproduce.experiment
    reproduce.running reproduce.verdicts
    reproduce.workers reproduce.tables reproduce.figures
    commands commands.settings commands.runs commands.trust
    commands.train commands.compare commands.device commands.client commands.export commands.enclave
    commands.reproduce
    cli flower flare
    __main__ __init__
"""
# What a module may import when it is imported, beyond the standard library and NumPy ...
AT_ONCE = {
    "torch": {"server", "optimizers", "job", "export.torch", "runtimes.modules"}
    | {name for name in MODULES if name.startswith("models")}
    | {"runtimes.arrays", "runtimes.batched", "runtimes.lowrank", "runtimes.objective", "runtimes.onebyone"}
    | {"runtimes.prefix", "runtimes.program", "runtimes.steps", "runtimes.sweeps", "runtimes.tangent"}
    | {"runtimes.torch", "runtimes.layered", "runtimes.coordinates"},
    "safetensors": {"checkpoint", "runs"},
    "numba": {"kernels.directions", "kernels.simd"},
    "llvmlite": {"kernels.simd"},
    "cryptography": {"secagg.primitives", "enclave.tpm"}
    | {"enclave.certificates", "enclave.gramine", "enclave.sev"},
    "flwr": {"flower"},
    "nvflare": {"flare"},
}
# ... and what only inside functions: whoever does not call them need not have it.
INSIDE_FUNCTIONS = {
    "numba": {"kernels"},
    "torch": {"doctor", "training", "reproduce.running"},
    "tqdm": {"commands.train"},
    "matplotlib": {"plots", "data.picture", "reproduce.figures"},
    "PIL": {"data.folders"},
    "datasets": {"data.hub"},
    "dp_accounting": {"privacy"},
    "prometheus_client": {"prometheus"},
    "onnxruntime": {"runtimes.onnx"},
    "onnx": {"export.torch", "export.onnx_file"},
    "onnxscript": {"export.torch"},
}
MOST_LINES = 600


def rows_in(text):
    """Module → number of its row."""
    return {name: number for number, row in enumerate(text.split("\n")) for name in row.split()}


def imports(name, *, at_once=False):
    """Dotted names that a module imports; ``at_once``: those of its import alone."""
    found = set()

    def visit(node):
        if at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if at_once and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide who is imported"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if below.removeprefix("baffle.") in MODULES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return found


def within(name):
    """Modules of this package that a module imports."""
    return {
        other.removeprefix("baffle.") if other != "baffle" else "__init__"
        for other in imports(name)
        if other.split(".")[0] == "baffle"
    }


def third_party(name, **options):
    roots = {other.split(".")[0] for other in imports(name, **options)}
    return roots - sys.stdlib_module_names - {"baffle", "numpy", "_sha2"}  # the last: of a later Python


# Directions of import


def test_every_module_has_a_row():
    assert sorted(MODULES) == sorted(rows_in(ROWS))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    rows = rows_in(ROWS)
    for other in within(name) - {name}:
        assert rows[other] < rows[name], f"{name} imports {other}, which does not lie below it"


def test_the_architecture_page_draws_true_rows():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.split("## Directions of import")[1].split("\n\n")[2]
    rows = rows_in("\n".join(reversed(drawn.split("\n"))))

    def room(name):  # data, models and the like are one name there; so is what runtimes.torch is made of
        rooms = ("data", "models", "kernels", "secagg", "commands", "enclave", "export", "reproduce")
        if name.split(".")[0] in rooms:
            return name.split(".")[0]
        apart = ("runtimes.prefix", "runtimes.graph", "runtimes.sources", "runtimes.pruned")
        return "runtimes.torch" if name.startswith("runtimes.") and name not in apart else name

    assert rows.keys() == {room(name) for name in MODULES} - {"__init__", "__main__"}
    for name in MODULES.keys() - {"__init__", "__main__"}:
        for other in within(name):
            assert room(other) == room(name) or rows[room(other)] < rows[room(name)], (name, other)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_optional_packages_are_imported_where_they_may_be(name):
    allowed = {package for package, modules in AT_ONCE.items() if name in modules}
    assert third_party(name, at_once=True) <= allowed
    inside = {package for package, modules in INSIDE_FUNCTIONS.items() if name in modules}
    assert third_party(name) <= allowed | inside


def test_the_tables_of_optional_packages_are_no_longer_than_the_truth():
    for package, modules in AT_ONCE.items():
        assert {name for name in modules if package in third_party(name)} == modules
    for package, modules in INSIDE_FUNCTIONS.items():
        assert {name for name in modules if package in third_party(name)} == modules


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_stay_readable(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text)), "a module says what it is"


# What is public


def test_public_names_are_sorted_and_resolve():
    assert baffle.__all__ == sorted(set(baffle.__all__))
    assert set(baffle.__all__) <= set(dir(baffle))
    for name in baffle.__all__:
        assert (getattr(baffle, name).__doc__ or "").strip(), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="module 'baffle' has no attribute 'Sever'"):
        baffle.Sever  # noqa: B018


def test_names_that_load_late_are_the_ones_they_say():
    assert set(baffle._LAZY) <= set(baffle.__all__)
    for name, module in baffle._LAZY.items():
        assert getattr(baffle, name) is getattr(importlib.import_module(module), name)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen_by_types = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen_by_types == baffle._LAZY


# Without the extras

WITHOUT = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        hidden = ("torch", "matplotlib", "PIL", "sklearn", "scipy", "tensorboard")
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *rest)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
"""
COMMAND = "from baffle.cli import main\nraise SystemExit(main(sys.argv[1:]))"


def bare(code, *arguments, cwd=None):
    """Code in a process where no extra is installed."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
    )


def test_import_help_and_vectors_need_no_extra():
    done = bare("import baffle, baffle.client, baffle.cli\nassert 'torch' not in sys.modules\nbaffle.Server")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torch'"
    for arguments in (["--help"], ["train", "--help"], ["vectors"]):
        done = bare(COMMAND, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


@pytest.mark.parametrize("arguments", [["train"], ["data"]], ids=" ".join)
def test_commands_that_need_torch_name_the_extra(arguments, tmp_path):
    done = bare(COMMAND, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"baffle {arguments[0]}: baffle {arguments[0]} needs the package 'torch', which is not installed: "
        "pip install 'baffle-fl[torch]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_doctor_runs_where_it_is_needed_most():
    done = bare(COMMAND, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for extra in ("torch", "plots", "images", "tensorboard"):
        assert f"missing: pip install 'baffle-fl[{extra}]'" in done.stdout


def test_a_client_answers_with_numpy_alone():
    done = bare("""
        import numpy as np
        import baffle
        from baffle.plan import weights_digest
        from baffle.stream import seed_from

        rng = np.random.Generator(np.random.PCG64(1))
        X, y = rng.standard_normal((20, 5)), rng.standard_normal(20)

        class LinearRegression:
            layout = baffle.Layout(("weight", "bias"), ((5,), ()))
            frozen_digest = bytes(32)

            def weights(self):
                return np.zeros(6, np.float32)

            def check_sigma(self, sigma):
                pass

            def loss(self, weights, batch):
                error = batch.inputs @ weights[:5] + weights[5] - batch.targets
                return float(np.mean(error**2))

            def losses(self, weights, batch, stream, perturbation, directions, scale):
                wide = weights.astype(np.float64)
                z = (perturbation.values(stream, k, self.layout, 0, 6) for k in directions)
                return np.array([self.loss(wide + scale * row, batch) for row in z])

        class Rows:
            def __len__(self):
                return len(y)

            def batch(self, indices):
                return baffle.Batch(X[indices], y[indices])

        runtime = LinearRegression()
        weights = rng.standard_normal(6).astype(np.float32)
        digest = weights_digest(weights, runtime.layout, runtime.frozen_digest)
        estimator = baffle.SteinEstimator(8, 1e-4, "central")
        plan = baffle.RoundPlan(0, seed_from(7), estimator, digest, 0)
        client = baffle.Client("sensor", runtime, Rows())
        sent = client.answer(plan.encode(), baffle.ModelMessage(weights).encode())
        answer = baffle.RoundResult.decode(sent)

        error = X @ weights[:5] + weights[5] - y
        gradient = 2 / 20 * np.append(X.T @ error, error.sum())
        z = np.array([baffle.Gaussian().values(plan.stream, k, runtime.layout, 0, 6) for k in range(8)])
        # The loss is quadratic: central differences are exact but for rounding, eps64·loss/σ and eps32.
        np.testing.assert_allclose(answer.values, z @ gradient, rtol=1e-6, atol=1e-6)
        assert answer.samples == 20 and client.observed.forward_passes == 16
        assert "torch" not in sys.modules
    """)
    assert (done.returncode, done.stderr) == (0, "")


# What is in git


def test_no_file_names_a_place_on_the_machine_it_was_made_on():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    forbidden = [("/" + place + "/").encode() for place in ("work", "root")]
    for name in filter(None, listed.decode().split("\0")):
        file = ROOT / name
        content = file.read_bytes() if os.path.isfile(file) else b""
        assert not any(word in content for word in forbidden), name
