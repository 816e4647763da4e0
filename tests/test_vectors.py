"""The published vectors, NumPy and an independent C program hold each other to the bit."""

import hashlib
import json
import math
import shutil
import struct
import subprocess
from dataclasses import replace
from fractions import Fraction
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from baffle.errors import ConfigError, MessageError
from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.perturbations import Layers, Layout, perturbation_from_spec
from baffle.plan import LocalSteps, LocalTraining, RoundPlan, RoundResult, weights_digest
from baffle.privacy import encode_clipped
from baffle.stream import Stream, derive_seed, philox4x32, seed_from
from baffle.terms import RingResult, Terms
from baffle.vectors import dump, hex_row

HERE = Path(__file__).parent / "vectors"
VECTORS = json.loads((HERE / "v1.json").read_text(encoding="utf-8"))


def test_published_vectors_are_what_this_package_makes():
    assert dump() == (HERE / "v1.json").read_text(encoding="utf-8")


def test_vectors_cover_every_kind_and_stay_small():
    assert len(dump()) < 60_000
    assert {d["perturbation"] for d in VECTORS["directions"]} >= {"gaussian", "rademacher", "lowrank:4"}
    assert any(d["perturbation"].startswith("layers:") for d in VECTORS["directions"])
    (rank_one,) = [d for d in VECTORS["directions"] if d["layout"] == "w=4000x2"]
    assert rank_one["perturbation"] == "lowrank:1"
    assert "00000000" in rank_one["values"].split()
    kinds = {v["bytes"][10:12] for messages in VECTORS["messages"].values() for v in messages}
    assert kinds == {"01", "02", "03", "04", "05", "06"}


# -- sums in a ring: struct and fractions against the published vectors -------------------------------------


def double(bits):
    return struct.unpack(">d", bytes.fromhex(bits))[0]


def doubles(row):
    return [double(bits) for bits in row.split()]


def point_of(v):
    """Bits of the ring, fraction bits, limit, and the largest integer: by Python's fractions."""
    limit = Fraction(double(v["limit"]))
    return v["ring_bits"], v["fraction_bits"], limit, round(limit * 2 ** v["fraction_bits"])


@pytest.mark.parametrize("v", VECTORS["fixed_point"], ids=lambda v: f"{v['ring_bits']}-{v['fraction_bits']}")
def test_fractions_encode_the_published_values(v):
    m, f, limit, largest = point_of(v)
    assert v["largest"] == largest
    clamped = [min(max(Fraction(x), -limit), limit) for x in doubles(v["values"])]
    integers = [round(x * 2**f) for x in clamped]  # Python rounds halves of fractions to even
    assert [int(x) for x in v["integers"].split()] == integers
    assert [int(x, 16) for x in v["residues"].split()] == [x % 2**m for x in integers]
    assert {len(x) for x in v["residues"].split()} == {m // 4}
    assert [Fraction(x) for x in doubles(v["decoded"])] == [Fraction(x, 2**f) for x in integers]
    point = FixedPoint(m, f, double(v["limit"]))
    residues = np.array([int(x, 16) for x in v["residues"].split()], point.dtype)
    assert point.integers(residues).tolist() == integers


@pytest.mark.parametrize("v", VECTORS["clipped"], ids=lambda v: v["integers"][:12])
def test_fractions_clip_the_published_rows(v):
    _, f, _, _ = point_of(v)
    row, clip = [Fraction(x) for x in doubles(v["row"])], Fraction(double(v["clip"]))
    integers = [int(x) for x in v["integers"].split()]
    assert sum(x * x for x in integers) <= (clip * 2**f) ** 2  # the bound that a row must keep
    squares = sum(x * x for x in row)
    if squares <= clip**2:
        assert integers == [math.trunc(x * 2**f) for x in row]
    else:  # clip / norm to 100 digits and more
        scale = clip * 10**120 / math.isqrt(int(squares * 10**240))
        assert all(abs(x * scale * 2**f - n) < 1 for x, n in zip(row, integers, strict=True))
        assert integers == [math.trunc(x * scale * 2**f) for x in row]
    point = FixedPoint(v["ring_bits"], f, double(v["limit"]))
    assert encode_clipped([doubles(v["row"])], double(v["clip"]), point)[0].tolist() == integers


@pytest.mark.parametrize("v", VECTORS["messages"]["terms"], ids=lambda v: v["digest"][:8])
def test_struct_writes_the_published_terms(v):
    data, levels = bytes.fromhex(v["bytes"]), v["levels"]
    expected = b"BFFL\1\5" + struct.pack("<BBd", v["ring_bits"], v["fraction_bits"], double(v["limit"]))
    expected += struct.pack("<IQH", v["cohort"], v["largest_weight"], len(levels))
    expected += b"".join(struct.pack("<I", level) for level in levels)
    privacy = v["privacy"]
    if privacy is None:
        expected += b"\0"
    else:
        expected += {"example": b"\1", "client": b"\2"}[privacy["unit"]]
        numbers = [double(privacy[name]) for name in ("clip", "noise_multiplier", "sampling_rate")]
        expected += struct.pack("<dddI", *numbers, privacy["shares"])
    assert data == expected
    assert hashlib.sha256(data).hexdigest() == v["digest"]
    terms = Terms.decode(data)
    assert terms.encode() == data
    assert terms.digest.hex() == v["digest"]
    assert (terms.cohort, terms.largest_weight, list(terms.levels)) == (
        v["cohort"],
        v["largest_weight"],
        levels,
    )


def test_the_published_terms_reach_the_edge_of_the_ring():
    """One of them has the largest cohort that fits: one client more is refused, as the bytes of it are."""
    (v,) = [v for v in VECTORS["messages"]["terms"] if v["ring_bits"] == 32]
    m, _, _, largest = point_of(v)
    cohort, weight = v["cohort"], v["largest_weight"]
    assert cohort * weight * largest < 2 ** (m - 1) <= (cohort + 1) * weight * largest
    data = bytes.fromhex(v["bytes"])
    more = data[:16] + struct.pack("<I", cohort + 1) + data[20:]
    with pytest.raises(MessageError, match="overflow"):
        Terms.decode(more)
    with pytest.raises(ConfigError, match="overflow"):
        replace(Terms.decode(data), cohort=cohort + 1)


@pytest.mark.parametrize("v", VECTORS["messages"]["ring_results"], ids=lambda v: v["terms_digest"][:8])
def test_struct_writes_the_published_ring_results(v):
    residues, data = v["residues"].split(), bytes.fromhex(v["bytes"])
    bits = 4 * len(residues[0])
    expected = b"BFFL\1\6" + struct.pack("<Q", v["round"]) + bytes.fromhex(v["plan_digest"])
    expected += bytes.fromhex(v["terms_digest"]) + struct.pack("<BI", bits, len(residues))
    expected += b"".join(int(x, 16).to_bytes(bits // 8, "little") for x in residues)
    assert data == expected
    back = RingResult.decode(data)
    assert back.encode() == data
    assert [f"{x:0{bits // 4}x}" for x in back.residues.tolist()] == residues
    assert v["plan_digest"] in {plan["digest"] for plan in VECTORS["messages"]["plans"]}
    (terms,) = [t for t in VECTORS["messages"]["terms"] if t["digest"] == v["terms_digest"]]
    assert terms["ring_bits"] == bits


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A function: command lines in, answer lines out, by the C program."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler `cc` on this machine: the second implementation was not run")
    program = tmp_path_factory.mktemp("reference") / "reference"
    flags = ["-O2", "-ffp-contract=off", "-std=c99", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(HERE / "reference.c"), "-o", str(program), "-lm"], check=True)

    def run(*commands):
        with resources.as_file(resources.files("baffle") / "gaussian15.bin") as table:
            done = subprocess.run(
                [str(program), str(table)],
                input="\n".join(commands) + "\n",
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
        answers = done.stdout.splitlines()
        assert len(answers) == len(commands)
        return answers

    return run


def commas(row):
    return row.replace(" ", ",")


def layout_text(layout):
    pairs = zip(layout.names, layout.shapes, strict=True)
    return ",".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in pairs)


def label_text(labels):
    return ",".join(str(label).encode().hex() for label in labels) or "-"


def plan_fields(plan):
    """A plan as the C program prints it, made from the object and not from its bytes."""
    e, local, steps = plan.estimator, plan.local, plan.steps

    def double(x):
        return hex_row(np.array([x], np.float64))

    fields = [plan.round, plan.seed.hex(), e.directions, double(e.sigma), e.scheme, e.perturbation.spec]
    fields += [plan.fidelity, plan.batch_size, plan.weights_digest.hex()]
    if local is not None:
        fields += [local.epochs, double(local.learning_rate), local.optimizer, double(local.clip)]
        fields += [double(local.weight_decay)] if local.weight_decay else []
    if steps is not None:
        fields += [steps.count, double(steps.learning_rate)]
    return " ".join(map(str, fields))


# -- the C program against the published vectors ------------------------------------------------------


def test_c_makes_the_published_words(reference):
    pairs = [("table", VECTORS["gaussian_table"]["sha256"])]
    pairs += [
        (f"philox {commas(v['counter'])} {commas(v['key'])}", v["words"]) for v in VECTORS["philox4x32_10"]
    ]
    pairs += [(f"seed {int(v['value']):032x}", v["seed"]) for v in VECTORS["seeds"]["from_integer"]]
    pairs += [
        (f"derive {v['seed']} {label_text(v['labels'])}", v["derived"]) for v in VECTORS["seeds"]["derived"]
    ]
    for v in VECTORS["stream"]:
        stop = v["start"] + len(v["words"].split())
        pairs.append((f"words {v['seed']} {v['round']} {v['k']} {v['start']} {stop}", v["words"]))
    for v in VECTORS["permutations"]:
        count = len(v["order"].split())
        pairs.append((f"permutation {v['seed']} {v['round']} {v['k']} {count}", v["order"]))
    assert reference(*[command for command, _ in pairs]) == [answer for _, answer in pairs]


def test_c_makes_the_published_directions_and_gradients(reference):
    pairs = []
    for v in VECTORS["directions"]:
        stop = v["start"] + len(v["values"].split())
        where = f"{v['seed']} {v['round']} {v['k']} {v['start']} {stop}"
        pairs.append((f"values {v['perturbation']} {v['layout']} {where}", v["values"]))
    for v in VECTORS["gradients"]:
        where = f"{v['seed']} {v['round']} {commas(v['slopes'])}"
        pairs.append((f"gradient {v['perturbation']} {v['layout']} {where}", v["gradient"]))
    assert reference(*[command for command, _ in pairs]) == [answer for _, answer in pairs]


def test_c_reads_and_writes_the_published_messages(reference):
    messages = VECTORS["messages"]
    pairs = [
        (f"digest {v['layout']} {v['frozen']} {commas(v['weights'])}", v["digest"])
        for v in VECTORS["weights_digests"]
    ]
    for v in messages["plans"]:
        names = ["round", "seed", "directions", "sigma", "scheme", "perturbation", "fidelity", "batch_size"]
        fields = [v[name] for name in [*names, "weights_digest"]]
        fields += [*(v["local"] or {}).values(), *v.get("steps", {}).values()]
        pairs.append((f"plan {v['bytes']}", " ".join(map(str, [*fields, v["bytes"]]))))
        pairs.append((f"sha256 {v['bytes']}", v["digest"]))
    plans = {v["digest"]: v["bytes"] for v in messages["plans"]}
    for v in messages["results"]:
        command = f"result {plans[v['plan_digest']]} {v['samples']} {commas(v['values'])}"
        pairs.append((command, v["bytes"]))
    assert reference(*[command for command, _ in pairs]) == [answer for _, answer in pairs]


# -- the C program against NumPy on fresh inputs --------------------------------------------------------


def test_c_hashes_as_the_standard_library(reference):
    rng = np.random.default_rng(1)
    inputs = [rng.bytes(n) for n in (0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000)]
    answers = reference(*[f"sha256 {data.hex() or '-'}" for data in inputs])
    assert answers == [hashlib.sha256(data).hexdigest() for data in inputs]


def test_c_and_numpy_agree_on_random_words(reference):
    rng = np.random.default_rng(2)
    commands, expected = [], []
    for _ in range(20):
        *counter, k0, k1 = rng.integers(1 << 32, size=6).tolist()
        c, key = ",".join(f"{x:x}" for x in counter), f"{k0:x},{k1:x}"
        commands.append(f"philox {c} {key}")
        expected.append(hex_row(np.array(philox4x32(tuple(counter), (k0, k1)), np.uint32)))

        seed, round_ = rng.bytes(32), int(rng.integers(1 << 64, dtype=np.uint64))
        k, start = int(rng.integers(1 << 32)), int(rng.integers((1 << 34) - 20))
        stop = start + 1 + int(rng.integers(20))
        stream = Stream(seed, round_)
        commands.append(f"words {seed.hex()} {round_} {k} {start} {stop}")
        expected.append(hex_row(stream.words(k, start, stop)))
        commands.append(f"permutation {seed.hex()} {round_} {k} 25")
        expected.append(" ".join(map(str, stream.permutation(k, 25))))

        labels = ["client", int(rng.integers(1000)), rng.bytes(int(rng.integers(1, 70))).hex()]
        commands.append(f"derive {seed.hex()} {label_text(labels)}")
        expected.append(derive_seed(seed, *labels).hex())
        value = int.from_bytes(rng.bytes(16), "little")
        commands.append(f"seed {value:032x}")
        expected.append(seed_from(value).hex())
    assert reference(*commands) == expected


def random_layout(rng):
    shapes = [tuple(rng.integers(1, 6, size=rng.integers(0, 5)).tolist()) for _ in range(rng.integers(1, 6))]
    return Layout(tuple(f"layer{i}.weight" for i in range(len(shapes))), tuple(shapes))


@pytest.mark.parametrize("spec", ["gaussian", "rademacher", "lowrank:1", "lowrank:3", "lowrank:7"])
def test_c_and_numpy_agree_on_random_directions_and_gradients(reference, spec):
    rng = np.random.default_rng(3)
    perturbation = perturbation_from_spec(spec)
    commands, expected = [], []
    for _ in range(12):
        layout, seed = random_layout(rng), rng.bytes(32)
        round_, k = int(rng.integers(1 << 63)), int(rng.integers(1 << 32))
        start, stop = sorted(rng.integers(0, layout.n + 1, size=2).tolist())
        stream = Stream(seed, round_)
        commands.append(
            f"values {spec} {layout_text(layout)} {seed.hex()} {round_} {k} {start} {max(stop, start)}"
        )
        expected.append(hex_row(perturbation.values(stream, k, layout, start, stop)))
        slopes = rng.standard_normal(rng.integers(1, 9)) * 10.0 ** rng.integers(-6, 6)
        commands.append(
            f"gradient {spec} {layout_text(layout)} {seed.hex()} {round_} {commas(hex_row(slopes))}"
        )
        gradient = SteinEstimator(len(slopes), perturbation=perturbation).gradient(slopes, stream, layout)
        expected.append(hex_row(gradient))
        weights = rng.standard_normal(layout.n).astype(np.float32)
        commands.append(f"digest {layout_text(layout)} {seed.hex()} {commas(hex_row(weights))}")
        expected.append(weights_digest(weights, layout, seed).hex())
    assert reference(*commands) == expected


def test_c_and_numpy_agree_on_random_layers(reference):
    rng = np.random.default_rng(6)
    commands, expected, exact = [], [], 0
    for _ in range(30):
        shapes = [
            tuple(rng.integers(0, 4, size=rng.integers(0, 4)).tolist()) for _ in range(rng.integers(1, 8))
        ]
        stems = ["a.", "a.b.", "", "a.b.c", "ab."]
        names = [f"{stems[rng.integers(5)]}{i}" for i in range(len(shapes))]
        layout, seed = Layout(tuple(names), tuple(shapes)), rng.bytes(32)
        if not layout.n:
            continue
        sizes = [stop - start for _, start, stop in layout.layers]
        counts = [size if rng.integers(3) == 0 else int(rng.integers(1, size + 1)) for size in sizes]
        exact += any(count == size > 1 for count, size in zip(counts, sizes, strict=True))
        layers = Layers(tuple(counts))
        estimator, stream = SteinEstimator(layers.directions, perturbation=layers), Stream(seed, 8)
        where = f"{layers.spec} {layout_text(layout)} {seed.hex()} 8"
        for k in range(layers.directions):
            commands.append(f"values {where} {k} 0 {layout.n}")
            expected.append(hex_row(layers.values(stream, k, layout, 0, layout.n)))
        slopes = rng.standard_normal(layers.directions) * 10.0 ** rng.integers(-6, 6)
        commands.append(f"gradient {where} {commas(hex_row(slopes))}")
        expected.append(hex_row(estimator.gradient(slopes, stream, layout)))
    assert exact > 5
    assert reference(*commands) == expected


@pytest.mark.parametrize("spec", ["gaussian", "rademacher"])
def test_c_and_numpy_agree_where_the_sum_cancels(reference, spec):
    """Where z_0 = z_1 only rounding errors of float64 are left: they tell the order, and a fused
    multiply-add from multiplying and then adding."""
    slopes, stream = np.array([1e8 + 1 / 3, -1e8 - 1 / 3, 1e-9]), Stream(bytes(32), 0)
    layout = Layout.flat(60_000)
    estimator = SteinEstimator(3, perturbation=perturbation_from_spec(spec))
    (answer,) = reference(f"gradient {spec} w=60000 {bytes(32).hex()} 0 {commas(hex_row(slopes))}")
    assert answer == hex_row(estimator.gradient(slopes, stream, layout))


ALLOWED = {"layers:5", "layers:2.3", "layers:1.4294967294", "layers:" + "1." * 496 + "1", "layers:" + "9" * 9}
SPELLINGS = [
    ("layers:5", 5),
    ("layers:2.3", 5),
    ("layers:1.4294967294", (1 << 32) - 1),
    ("layers:" + "1." * 496 + "1", 497),  # 1000 characters
    ("layers:" + "9" * 9, 10**9 - 1),
    *((bad, 5) for bad in ("layers", "layers:", "layers:0", "layers:2.3.", "layers:.2.3", "layers:2..3")),
    *(
        (bad, 5)
        for bad in ("layers:02.3", "layers:2.03", "layers:+2.3", "layers: 2.3", "layers:2,3", "layer:5")
    ),
    *(
        (bad, 5)
        for bad in ("layers:2.0.3", "layers:2.3\0", "layers:5 ", "Layers:5", "layers:٥".encode().hex())
    ),
    ("layers:2.4", 5),
    ("layers:2.2", 5),
    ("layers:1.4294967295", (1 << 32) - 1),
    ("layers:4294967296", 1),
    ("layers:18446744073709551617", 1),
    ("layers:" + "1." * 496 + "10", 506),
    ("layers:" + "1." * 20000 + "1", 20001),
]


def spelled(spec, directions):
    """The bytes of a plan whose perturbation has that name."""
    data, at = bytearray(RoundPlan(0, bytes(32), SteinEstimator(1), bytes(32)).encode()), 6 + 8 + 32
    struct.pack_into("<I", data, at, directions)
    name = spec.encode()
    return bytes(data[: at + 13]) + struct.pack("<H", len(name)) + name + bytes(data[at + 23 :])


def random_plan(rng):
    fidelity = ["forward-only", "law", "backprop"][rng.integers(3)]
    count, directions, kind = int(rng.integers(2, 1 << 16)), int(rng.integers(1, 1 << 32)), rng.integers(3)
    walks = fidelity == "forward-only" and kind == 1
    if walks:
        directions = max(directions // count, 1) * count
    specs = ["gaussian", "rademacher", "lowrank:1", "lowrank:65535"]
    if not walks:
        counts = rng.integers(1, 10 ** rng.integers(1, 5), rng.integers(1, 150)).tolist()
        specs += [f"layers:{'.'.join(map(str, counts))}"] * 2
    spec = str(rng.choice(specs))
    if spec.startswith("layers"):
        directions = sum(counts)
    local = LocalTraining(
        int(rng.integers(1, 1 << 16)),
        float(rng.exponential()) + math.ulp(0.0),
        ["sgd", "adam"][rng.integers(2)],
        float(rng.choice([0.0, rng.exponential()])),
        float(rng.choice([0.0, rng.uniform()])),
    )
    return RoundPlan(
        int(rng.integers(1 << 64, dtype=np.uint64)),
        rng.bytes(32),
        SteinEstimator(
            directions,
            float(10.0 ** rng.uniform(-9, 0)),
            ["forward", "central", "tangent"][rng.integers(3)],
            perturbation_from_spec(spec),
        ),
        rng.bytes(32),
        int(rng.integers(1 << 32)),
        fidelity,
        local if kind == 2 else None,
        LocalSteps(count, float(rng.exponential()) + math.ulp(0.0)) if walks else None,
    )


def test_c_and_python_agree_on_random_plans_and_answers(reference):
    rng = np.random.default_rng(4)
    commands, expected = [], []
    for _ in range(40):
        plan, values = random_plan(rng), rng.standard_normal(rng.integers(1, 20)).astype(np.float32)
        samples = int(rng.integers(1, 1 << 64, dtype=np.uint64))
        commands.append(f"plan {plan.encode().hex()}")
        expected.append(f"{plan_fields(plan)} {plan.encode().hex()}")
        commands.append(f"result {plan.encode().hex()} {samples} {commas(hex_row(values))}")
        expected.append(RoundResult(plan.round, plan.digest, samples, values).encode().hex())
    assert reference(*commands) == expected


def test_c_and_python_refuse_the_same_plans(reference):
    rng = np.random.default_rng(5)
    candidates = []
    for _ in range(300):
        data = bytearray(random_plan(rng).encode())
        at = int(rng.integers(len(data)))
        data[at] = int(rng.integers(256))
        candidates.append(bytes(data[: int(rng.integers(len(data)))] if rng.integers(5) == 0 else data))
    sigma = 6 + 8 + 32 + 4
    for bad in (math.nan, math.inf, -1.0, 0.0):
        data = bytearray(random_plan(rng).encode())
        struct.pack_into("<d", data, sigma, bad)
        candidates.append(bytes(data))
    plain = replace(random_plan(rng), local=None, steps=None, fidelity="forward-only")
    data = bytearray(replace(plain, local=LocalTraining()).encode())
    data[-1] = 0x80  # a clip of −0
    candidates.append(bytes(data))
    estimator = replace(plain.estimator, directions=12)
    walking = replace(plain, estimator=estimator, steps=LocalSteps(4)).encode()
    assert RoundPlan.decode(walking).steps == LocalSteps(4)
    for count in (0, 1, 5, 24):  # no steps have no bytes; 12 directions for 5, for 24
        candidates.append(walking[:-10] + struct.pack("<H", count) + walking[-8:])
    for bad in (math.nan, math.inf, -1.0, 0.0):
        candidates.append(walking[:-8] + struct.pack("<d", bad))
    trained = replace(plain, estimator=estimator, local=LocalTraining()).encode()
    candidates += [trained + walking[-10:], walking[:-1], walking + bytes(1)]
    candidates += [trained + struct.pack("<d", bad) for bad in (0.0, -0.0, -0.5, 1.0, math.nan)]
    candidates += [spelled(spec, K) for spec, K in SPELLINGS if spec not in ALLOWED]
    allowed = [spelled(spec, K) for spec, K in SPELLINGS if spec in ALLOWED]
    assert [RoundPlan.decode(data).encode() == data for data in allowed] == [True] * len(ALLOWED)
    assert reference(*[f"plan {data.hex()}" for data in allowed]).count("refused") == 0
    refused = []
    for data in candidates:
        try:
            RoundPlan.decode(data)
        except MessageError:
            refused.append(True)
        else:
            refused.append(False)
    answers = reference(*[f"plan {data.hex() or '-'}" for data in candidates])
    assert [answer == "refused" for answer in answers] == refused
    assert refused[-21 - len(SPELLINGS) + len(ALLOWED) :] == [True] * (21 + len(SPELLINGS) - len(ALLOWED))
    assert 60 < sum(refused) < 300  # both kinds are there
