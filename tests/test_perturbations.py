"""Directions: definitions, random access, the table, NumPy = torch, statistics, Stein's identity."""

import hashlib
import itertools
import math
import runpy
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

import baffle.perturbations as perturbations
from baffle.errors import BaffleError, ConfigError
from baffle.estimator import SteinEstimator
from baffle.perturbations import Gaussian, Layout, LowRank, Rademacher, gaussian_table, perturbation_from_spec
from baffle.runtimes import Batch
from baffle.stream import Stream, seed_from

SEED = seed_from(11)
KINDS = [Gaussian(), Rademacher(), LowRank(1), LowRank(4)]
LAYOUT = Layout(("conv", "bias", "scale", "head"), ((4, 3, 3, 2), (7,), (), (5, 9)))
KINDS_BY_SPEC = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.spec)


def bits(values):
    """Bit patterns: unlike ==, they tell −0 from +0."""
    return np.ascontiguousarray(values).view(np.uint32)


def whole(kind, layout=LAYOUT, k=0, round_=0):
    return kind.values(Stream(SEED, round_), k, layout, 0, layout.n)


# -- layouts and names -----------------------------------------------------------------------------------


def test_layout():
    assert LAYOUT.sizes == (72, 7, 1, 45)
    assert LAYOUT.offsets == (0, 72, 79, 80, 125)
    assert LAYOUT.n == 125
    flat = np.arange(125)
    assert [t.shape for t in LAYOUT.split(flat)] == list(LAYOUT.shapes)
    assert np.concatenate([t.ravel() for t in LAYOUT.split(flat)]).tolist() == flat.tolist()


@pytest.mark.parametrize(("names", "shapes"), [(("a",), ()), (("a", "a"), ((1,), (2,)))])
def test_layouts_that_cannot_be(names, shapes):
    with pytest.raises(ConfigError):
        Layout(names, shapes)


@KINDS_BY_SPEC
def test_spec_round_trip(kind):
    assert perturbation_from_spec(kind.spec) == kind


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "Gaussian",
        "gaussian:",
        "gaussian:1",
        "lowrank",
        "lowrank:",
        "lowrank:0",
        "lowrank:-1",
        "lowrank:1.5",
        "lowrank:65536",
        "lowrank:²",
        "lowrank:١",
        "lowrank:" + "9" * 5000,
        "rademacher ",
        "os.system",
    ],
)
def test_unknown_specs_are_refused(spec):
    with pytest.raises(ConfigError):
        perturbation_from_spec(spec)


# -- random access ---------------------------------------------------------------------------------------


@KINDS_BY_SPEC
@given(st.lists(st.integers(0, LAYOUT.n), max_size=6), st.integers(0, 2**32 - 1))
def test_any_chunking_makes_the_same_bits(kind, cuts, k):
    stream = Stream(SEED, 5)
    edges = sorted({0, *cuts, LAYOUT.n})
    parts = [kind.values(stream, k, LAYOUT, a, b) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(bits(np.concatenate(parts)), bits(kind.values(stream, k, LAYOUT, 0, LAYOUT.n)))


@pytest.mark.parametrize("kind", [Gaussian(), Rademacher()], ids=lambda kind: kind.spec)
@given(st.integers(0, 2**35 - 300), st.integers(0, 150), st.integers(0, 150))
def test_far_slices_make_the_same_bits(kind, start, skip, length):
    far = Layout.flat(1 << 35)
    stream = Stream(SEED, 5)
    around = kind.values(stream, 3, far, start, start + 300)
    inside = kind.values(stream, 3, far, start + skip, start + skip + length)
    assert np.array_equal(bits(inside), bits(around[skip : skip + length]))


@KINDS_BY_SPEC
@pytest.mark.parametrize(
    ("start", "stop"), [(-1, 2), (3, 2), (0, LAYOUT.n + 1), (LAYOUT.n + 1, LAYOUT.n + 1)]
)
def test_slices_outside_the_layout_are_refused(kind, start, stop):
    with pytest.raises(ConfigError):
        kind.values(Stream(SEED, 0), 0, LAYOUT, start, stop)


@KINDS_BY_SPEC
@pytest.mark.parametrize("k", [-1, 2**32])
def test_directions_outside_the_stream_are_refused(kind, k):
    with pytest.raises(ConfigError):
        kind.values(Stream(SEED, 0), k, LAYOUT, 0, 1)


@KINDS_BY_SPEC
@pytest.mark.parametrize("some", [range(0), range(-1, 3), range(2**32 - 2, 2**32 + 1), range(1, -2, -1)])
@pytest.mark.parametrize("n", [1, 5000])  # by array operations, and by a kernel where there is one
def test_ranges_outside_the_stream_are_refused(kind, some, n):
    with pytest.raises(ConfigError):
        kind.values(Stream(SEED, 0), some, Layout.flat(n), 0, n)


@KINDS_BY_SPEC
@pytest.mark.parametrize("some", [range(1), range(3, 9), range(2**32 - 1, 2**32 - 12, -5), range(7, 40, 11)])
@pytest.mark.parametrize("layout", [LAYOUT, Layout(("w", "b"), ((60, 70), (1000,)))], ids=["small", "large"])
def test_several_directions_are_the_rows_of_one_array(kind, some, layout, torch_devices):
    stream, (start, stop) = Stream(SEED, 9), (1, layout.n - 1)
    single = np.array([kind.plain(stream, k, layout, start, stop) for k in some])
    assert np.array_equal(bits(kind.plain(stream, some, layout, start, stop)), bits(single))
    assert np.array_equal(bits(kind.values(stream, some, layout, start, stop)), bits(single))
    for arrays in torch_devices:
        made = kind.values(stream, some, layout, start, stop, arrays).numpy(force=True)
        assert np.array_equal(bits(made), bits(single))


def test_empty_tensors_take_no_values_and_a_matrix_takes_its_factors():
    """Of a (0, 7) matrix B alone has half-words: 7·r of them lie between the factors of its neighbours."""
    layout, gap = Layout(("a", "e", "f", "b"), ((2, 3), (0, 7), (0,), (4,))), (2 + 3) * 2 + 7 * 2
    vector = Gaussian().values(Stream(SEED, 0), 1, Layout.flat(99), gap, gap + 4)
    assert np.array_equal(bits(whole(LowRank(2), layout, 1)[6:]), bits(vector))


def test_parameters_outside_the_stream_are_refused():
    for kind, most in ((Gaussian(), 1 << 35), (LowRank(2), 1 << 35), (Rademacher(), 1 << 39)):
        with pytest.raises(ConfigError):
            kind.values(Stream(SEED, 0), 0, Layout.flat(most + 1), most, most + 1)
        kind.values(Stream(SEED, 0), 0, Layout.flat(most), most - 1, most)


# -- definitions, by naive loops -------------------------------------------------------------------------


def naive_gaussian_integer(stream, k, i):
    u = int(stream.words(k, i // 2, i // 2 + 1)[0]) >> 16 * (i % 2) & 0xFFFF
    return int(gaussian_table()[u])


def test_gaussian_is_its_definition():
    expected = [naive_gaussian_integer(Stream(SEED, 0), 0, i) / 4096 for i in range(LAYOUT.n)]
    assert np.array_equal(bits(whole(Gaussian())), bits(np.array(expected, np.float32)))


def test_rademacher_is_its_definition():
    words = Stream(SEED, 0).words(0, 0, 4).tolist()
    expected = [1 - 2 * (words[i // 32] >> i % 32 & 1) for i in range(LAYOUT.n)]
    assert whole(Rademacher()).tolist() == expected


@pytest.mark.parametrize("r", [1, 2, 5])
def test_lowrank_is_its_definition(r):
    stream, at, expected = Stream(SEED, 0), 0, []

    def take(count):
        nonlocal at
        at += count
        return np.array([naive_gaussian_integer(stream, 0, i) for i in range(at - count, at)], object)

    for shape, size in zip(LAYOUT.shapes, LAYOUT.sizes, strict=True):
        if len(shape) < 2:
            expected += [q / 4096 for q in take(size)]
        else:
            m = size // shape[0]
            left, right = take(shape[0] * r).reshape(-1, r), take(m * r).reshape(-1, r)
            expected += [float(s) * (2.0**-24 * (1 / math.sqrt(r))) for s in (left @ right.T).ravel()]
    assert np.array_equal(bits(whole(LowRank(r))), bits(np.array(expected, np.float32)))


def test_lowrank_has_its_rank():
    for r in (1, 2, 3):
        z = LAYOUT.split(whole(LowRank(r)).astype(np.float64))
        assert np.linalg.matrix_rank(z[0].reshape(4, -1), tol=1e-5) == r
        assert np.linalg.matrix_rank(z[3], tol=1e-5) == r


def test_lowrank_keeps_its_place_behind_an_empty_tensor():
    with_empty = Layout(("e", "w"), ((3, 0), (2, 2)))
    z = LowRank(2).values(Stream(SEED, 0), 0, with_empty, 0, 4)
    # The empty tensor takes 3·2 + 0·2 numbers of the stream.
    behind = Layout(("six", "w"), ((6,), (2, 2)))
    assert np.array_equal(bits(z), bits(LowRank(2).values(Stream(SEED, 0), 0, behind, 6, 10)))


# -- the Gaussian table ----------------------------------------------------------------------------------


def moment(power):
    """E z^power over the table, exactly."""
    return Fraction(sum(int(q) ** power for q in gaussian_table()), 65536 * 4096**power)


def test_table_has_mean_0_and_variance_1_exactly():
    assert moment(1) == 0
    assert moment(2) == 1
    # A truncated, midpoint normal law has lighter tails than the normal law's 3 and 105.
    assert 2.98 < moment(4) < 3
    assert 95 < moment(8) < 105


def test_table_is_monotone_and_odd():
    table = gaussian_table()
    half = table[:32768]
    assert half[0] == 0
    assert np.all(np.diff(half) >= 0)
    assert half[-1] == half.max() < 65536
    assert np.array_equal(table[32768:], -half)


def test_table_lies_within_a_grid_step_of_the_scaled_normal_quantiles():
    half = gaussian_table()[:32768]
    p = (32768 + np.arange(32768) + 0.5) / 65536
    exact = ndtri(p)
    scaled = exact / np.sqrt(np.mean(exact**2)) * 4096
    assert np.abs(half - scaled).max() < 1.0
    # Most entries are rounded to nearest; only those moved to make the variance 1 are not.
    assert np.mean(np.abs(half - scaled) <= 0.5) > 0.99
    # mpmath is a second oracle for scipy's quantiles.
    with mpmath.workdps(30):
        for j in (0, 1, 100, 16384, 30000, 32700, 32766, 32767):
            oracle = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(65536 + 2 * j + 1) / 131072 - 1)
            assert abs(oracle - exact[j]) < 1e-9


def test_the_floats_are_the_table_to_the_bit():
    floats = perturbations._gaussian_floats()
    assert floats.dtype == np.float32
    assert floats.tobytes() == (gaussian_table() * 2.0**-12).astype(np.float32).tobytes()


def test_table_is_regenerated_byte_for_byte():
    maker = runpy.run_path(str(Path(__file__).parent / "vectors" / "make_gaussian_table.py"))
    packaged = Path(perturbations.__file__).with_name("gaussian15.bin").read_bytes()
    assert maker["gaussian_half_table"]().tobytes() == packaged


@pytest.mark.parametrize("damage", ["one bit", "cut short", "one byte more"])
def test_a_corrupted_table_is_refused(monkeypatch, damage):
    data = bytearray(Path(perturbations.__file__).with_name("gaussian15.bin").read_bytes())
    if damage == "one bit":
        data[4321] ^= 1
    data = {"cut short": data[:-2], "one byte more": data + b"\0"}.get(damage, data)
    monkeypatch.setattr(perturbations.pkgutil, "get_data", lambda package, name: bytes(data))
    with pytest.raises(BaffleError, match="not the published table"):
        gaussian_table.__wrapped__()


# -- NumPy and torch -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_devices():
    """``Arrays`` of torch on the CPU, and on the GPU where there is one."""
    torch = pytest.importorskip("torch")
    from baffle.runtimes.torch import TorchArrays

    return [TorchArrays(name) for name in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])]


@KINDS_BY_SPEC
def test_torch_makes_the_same_bits(kind, torch_devices):
    rng = np.random.default_rng(0)
    layout = Layout(("w", "b", "v"), ((50, 40), (33,), (2, 3, 300)))
    for _, arrays in itertools.product(range(15), torch_devices):
        stream = Stream(rng.bytes(32), int(rng.integers(1 << 63)))
        k = int(rng.integers(1 << 32))
        start, stop = sorted(rng.integers(0, layout.n + 1, size=2).tolist())
        made = kind.values(stream, k, layout, start, stop, arrays)
        assert made.device.type == arrays.device.type
        assert made.numpy(force=True).dtype == np.float32
        expected = kind.values(stream, k, layout, start, stop)
        assert np.array_equal(bits(made.numpy(force=True)), bits(expected))


@pytest.mark.parametrize("kind", [Gaussian(), Rademacher()], ids=lambda kind: kind.spec)
def test_torch_makes_the_same_bits_far_out(kind, torch_devices):
    far, stream = Layout.flat(1 << 35), Stream(SEED, 2**64 - 1)
    for start, arrays in itertools.product((0, (1 << 34) - 50, (1 << 35) - 100), torch_devices):
        made = kind.values(stream, 2**32 - 1, far, start, start + 100, arrays)
        expected = kind.values(stream, 2**32 - 1, far, start, start + 100)
        assert np.array_equal(bits(made.numpy(force=True)), bits(expected))


def test_a_zero_is_positive_in_numpy_and_torch(torch_devices):
    # A few in 65536 table entries are an integer zero; in a rank-1 factor it empties a row.
    layout = Layout(("w",), ((4000, 30),))
    for k in range(8):
        expected = whole(LowRank(1), layout, k)
        assert not np.any((expected == 0) & np.signbit(expected))
        for arrays in torch_devices:
            made = LowRank(1).values(Stream(SEED, 0), k, layout, 0, layout.n, arrays)
            assert np.array_equal(bits(made.numpy(force=True)), bits(expected))
    assert any(np.any(whole(LowRank(1), layout, k) == 0) for k in range(8))


@KINDS_BY_SPEC
def test_gradients_have_the_same_bits_in_any_chunk_and_library(kind, torch_devices):
    slopes = np.random.default_rng(0).standard_normal(12) * 10.0 ** np.arange(-6, 6)
    estimator, stream = SteinEstimator(12, perturbation=kind), Stream(SEED, 1)
    naive = np.zeros(LAYOUT.n)
    for k in range(12):
        naive += slopes[k] * whole(kind, k=k, round_=1).astype(np.float64)
    expected = bits((naive / 12).astype(np.float32))
    for chunk in (3, 64, 1000):
        made = estimator.gradient(slopes, stream, LAYOUT, chunk=chunk)
        assert np.array_equal(bits(made), expected)
    for chunk, arrays in itertools.product((53, 1000), torch_devices):
        made = estimator.gradient(slopes, stream, LAYOUT, chunk=chunk, arrays=arrays)
        assert np.array_equal(bits(made.numpy(force=True)), expected)


@pytest.mark.parametrize("kind", [Gaussian(), Rademacher()], ids=lambda kind: kind.spec)
def test_gradients_are_summed_in_the_stated_order(kind, torch_devices):
    """Where z_0 = z_1 the large slopes cancel, and only rounding errors of float64 are left."""
    layout, slopes = Layout.flat(60_000), np.array([1e8 + 1 / 3, -1e8 - 1 / 3, 1e-9])
    z = [whole(kind, layout, k).astype(np.float64) for k in range(3)]
    naive = ((z[0] * slopes[0] + z[1] * slopes[1] + z[2] * slopes[2]) / 3).astype(np.float32)
    other = ((z[2] * slopes[2] + z[1] * slopes[1] + z[0] * slopes[0]) / 3).astype(np.float32)
    assert not np.array_equal(naive, other)  # so the order can be seen
    estimator, stream = SteinEstimator(3, perturbation=kind), Stream(SEED, 0)
    assert np.array_equal(bits(estimator.gradient(slopes, stream, layout)), bits(naive))
    for arrays in torch_devices:
        made = estimator.gradient(slopes, stream, layout, arrays=arrays)
        assert np.array_equal(bits(made.numpy(force=True)), bits(naive))


def test_gradients_are_divided_by_K(torch_devices):
    """Divided by 49 the sum is halfway between two float32 and goes to the even one; times 1/49 it is not."""
    t = 2 - 5 * 2.0**-24
    assert 49 * t / 49 == t > 49 * t * (1 / 49)
    slopes, estimator = np.array([49 * t] + 48 * [0.0]), SteinEstimator(49, perturbation=Rademacher())
    made = [estimator.gradient(slopes, Stream(SEED, 0), LAYOUT)]
    for arrays in torch_devices:
        made.append(estimator.gradient(slopes, Stream(SEED, 0), LAYOUT, arrays=arrays).numpy(force=True))
    assert all(set(np.abs(gradient).tolist()) == {2 - 2.0**-22} for gradient in made)


# -- statistics ------------------------------------------------------------------------------------------

M4, M8 = float(moment(4)), float(moment(8))
N = 1 << 19


@pytest.fixture(scope="module")
def gaussian_rows():
    """Four directions of two rounds, float64 (8, N)."""
    layout = Layout.flat(N)
    return np.array([whole(Gaussian(), layout, k, t) for t in (0, 1) for k in range(4)], np.float64)


def test_gaussian_moments(gaussian_rows):
    z = gaussian_rows.ravel()
    # Standard errors over 8N values from the table's exact moments: 1, M4 − 1 and M8 − M4² over 8N.
    assert abs(z.mean()) < 5 * math.sqrt(1 / z.size)
    assert abs(np.mean(z**2) - 1) < 5 * math.sqrt((M4 - 1) / z.size)
    assert abs(np.mean(z**4) - M4) < 5 * math.sqrt((M8 - M4**2) / z.size)
    # Third moment: its variance is E z⁶.
    assert abs(np.mean(z**3)) < 5 * math.sqrt(float(moment(6)) / z.size)


def test_directions_and_rounds_are_uncorrelated(gaussian_rows):
    # 28 pairs; a correlation of independent rows has the standard error 1/√N, for z and for z².
    for rows in (gaussian_rows, gaussian_rows**2):
        assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 5 / math.sqrt(N)


def test_neighbours_in_a_direction_are_uncorrelated(gaussian_rows):
    # 8 half-words share a block; lags within, across and far beyond it. Standard error 1/√(8N).
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 128, 1024, 65536):
        for rows in (gaussian_rows, (gaussian_rows**2 - 1) / math.sqrt(M4 - 1)):
            assert abs(np.mean(rows[:, lag:] * rows[:, :-lag])) < 5 / math.sqrt(8 * (N - lag))


def test_rademacher_moments_and_lags():
    z = whole(Rademacher(), Layout.flat(N)).astype(np.float64)
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean()) < 5 / math.sqrt(N)
    for lag in (1, 2, 31, 32, 33, 96, 128):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 5 / math.sqrt(N - lag)
    other = whole(Rademacher(), Layout.flat(N), 1)
    assert abs(np.mean(z * other)) < 5 / math.sqrt(N)


@pytest.mark.parametrize("kind", [Rademacher(), LowRank(1), LowRank(3)], ids=lambda kind: kind.spec)
def test_second_moments_are_the_identity(kind):
    layout, K = Layout(("w", "b", "c"), ((2, 3), (2,), (2, 1, 2))), 800
    z = np.array([whole(kind, layout, k) for k in range(K)], np.float64)
    # E z⁴ ≤ 3 + (M4² − 3)/r for an entry Σ_s a_s b_s/√r; by Cauchy-Schwarz it bounds Var(z_i z_j) too.
    fourth = 3 + (M4**2 - 3) / kind.rank if isinstance(kind, LowRank) else 1.0
    assert np.abs(z.T @ z / K - np.eye(layout.n)).max() < 5 * math.sqrt(fourth / K)
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(K)


def test_covariance_error_falls_as_the_root_of_n_over_K():
    """Theorem 3.2, ‖Σ̂ − I‖₂ ≤ C₀ √(n/K), with its constant.

    The largest eigenvalue of Σ̂ is (1 + √y)² in the limit (y = n/K; Bai and Yin 1993), so the norm is
    2√y + y. At finite n it is that plus s·T with s = (√K + √n)(1/√K + 1/√n)^⅓ / K and T of the
    Tracy-Widom law: mean −1.2065, standard deviation 1.2680 (Johnstone 2001).
    """
    copies, most, sizes, counts = 8, 2048, (16, 32, 64), (256, 512, 1024, 2048)
    layout = Layout.flat(copies * max(sizes))
    z = np.array([whole(Gaussian(), layout, k) for k in range(most)], np.float64).reshape(most, copies, -1)
    measured, predicted, errors, logs = [], [], [], []
    for n in sizes:
        for K in counts:
            cut = z[:K, :, :n].transpose(1, 0, 2)
            sigma = cut.transpose(0, 2, 1) @ cut / K
            norm = np.mean(np.linalg.norm(sigma - np.eye(n), ord=2, axis=(1, 2)))
            y = n / K
            s = (math.sqrt(K) + math.sqrt(n)) * (1 / math.sqrt(K) + 1 / math.sqrt(n)) ** (1 / 3) / K
            measured.append(norm)
            predicted.append(2 * math.sqrt(y) + y - 1.2065 * s)
            errors.append(1.2680 * s / math.sqrt(copies))
            logs.append((1.0, math.log(n), math.log(K)))
    measured, predicted, errors, logs = map(np.array, (measured, predicted, errors, logs))
    # Five standard errors of a mean over the copies, and 3% for the limit laws at n = 16.
    assert np.all(np.abs(measured - predicted) < 5 * errors + 0.03 * predicted)
    # C₀: between 1.5 and 2 + √(1/4), while n/K runs from 1/128 to 1/4.
    ratios = measured / np.exp(logs @ [0, 0.5, -0.5])
    assert 1.5 < ratios.min() < ratios.max() < 2.5
    # Exponents: ½ and −½ in the limit, which y and s move to 0.60 and −0.55 at these sizes. Five standard
    # errors of the least squares, doubled because the twelve cells share directions.
    _, by_n, by_K = np.linalg.lstsq(logs, np.log(measured), rcond=None)[0]
    _, exact_n, exact_K = np.linalg.lstsq(logs, np.log(predicted), rcond=None)[0]
    _, error_n, error_K = np.sqrt(np.linalg.pinv(logs) ** 2 @ (errors / predicted) ** 2)
    assert abs(by_n - exact_n) < 2 * 5 * error_n < 0.2
    assert abs(by_K - exact_K) < 2 * 5 * error_K < 0.2


# -- Stein's identity on a quadratic ---------------------------------------------------------------------


class Quadratic:
    """L(x) = ½ xᵀAx + b·x in float64: a runtime with a closed form."""

    frozen_digest = bytes(32)

    def __init__(self, layout, seed=0):
        rng = np.random.default_rng(seed)
        root = rng.standard_normal((layout.n, layout.n)) / math.sqrt(layout.n)
        self.layout, self.A, self.b = layout, root + root.T, rng.standard_normal(layout.n)

    def check_sigma(self, sigma):
        pass

    def at(self, x):
        return float(x @ self.A @ x / 2 + self.b @ x)

    def loss(self, weights, batch):
        return self.at(weights.astype(np.float64))

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        x = weights.astype(np.float64)
        z = [
            perturbation.values(stream, k, self.layout, 0, self.layout.n).astype(np.float64)
            for k in directions
        ]
        return np.array([self.at(x + scale * row) for row in z])


SMALL = Layout(("w", "b"), ((2, 3), (3,)))
BATCH = Batch(np.zeros(1), np.zeros(1))


@KINDS_BY_SPEC
def test_slopes_of_a_quadratic_have_their_closed_form(kind):
    quadratic, sigma, K = Quadratic(SMALL), 0.25, 50
    weights = np.random.default_rng(1).standard_normal(SMALL.n).astype(np.float32)
    x, stream = weights.astype(np.float64), Stream(SEED, 2)
    z = np.array([whole(kind, SMALL, k, 2) for k in range(K)], np.float64)
    directional = z @ (quadratic.A @ x + quadratic.b)
    curvature = np.einsum("ki,ij,kj->k", z, quadratic.A, z)
    central = SteinEstimator(K, sigma, "central", kind).slopes(quadratic, weights, BATCH, stream)
    forward = SteinEstimator(K, sigma, "forward", kind).slopes(quadratic, weights, BATCH, stream)
    # Losses up to about 100 carry rounding errors of 1e-14, divided by σ.
    assert np.abs(central.slopes - directional).max() < 1e-11
    assert np.abs(forward.slopes - (directional + sigma / 2 * curvature)).max() < 1e-11
    assert np.abs(forward.slopes - directional).max() > 0.1  # the curvature's term is not lost in noise
    assert (central.forward_passes, forward.forward_passes) == (2 * K, K + 1)
    assert abs(forward.loss - quadratic.at(x)) < 1e-12
    assert abs(central.loss - (quadratic.at(x) + sigma**2 / 2 * curvature.mean())) < 1e-11


@KINDS_BY_SPEC
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_the_estimate_is_unbiased_on_a_quadratic(kind, scheme):
    quadratic, sigma, K = Quadratic(SMALL), 0.25, 400
    weights = np.random.default_rng(1).standard_normal(SMALL.n).astype(np.float32)
    stream, estimator = Stream(SEED, 3), SteinEstimator(K, sigma, scheme, kind)
    slopes = estimator.slopes(quadratic, weights, BATCH, stream).slopes
    estimate = estimator.gradient(slopes, stream, SMALL)
    true = quadratic.A @ weights + quadratic.b
    terms = slopes[:, None] * np.array([whole(kind, SMALL, k, 3) for k in range(K)], np.float64)
    # E ĝ = ∇L exactly, for the curvature's term is odd in z. Standard error from the K terms themselves.
    error = terms.std(axis=0, ddof=1) / math.sqrt(K)
    assert np.all(np.abs(estimate - true) < 5 * error)
    # The tolerance means something: the gradient is many standard errors away from zero.
    assert np.linalg.norm(true) > 10 * np.linalg.norm(error) / math.sqrt(SMALL.n)


def test_gaussian_estimate_has_its_closed_form_variance():
    """Var ĝ_i = (‖g‖² + g_i² (M4 − 2)) / K for slopes z·g and the table's fourth moment M4."""
    n, K = 9, 1 << 17
    g = np.random.default_rng(2).standard_normal(n)
    z = whole(Gaussian(), Layout.flat(n * K)).astype(np.float64).reshape(K, n)
    terms = (z @ g)[:, None] * z
    squared = (terms - g) ** 2
    exact = g @ g + g**2 * (M4 - 2)
    assert np.all(np.abs(squared.mean(axis=0) - exact) < 5 * squared.std(axis=0) / math.sqrt(K))


def test_published_table_digest():
    half = gaussian_table()[:32768].astype("<u2").tobytes()
    assert (
        hashlib.sha256(half).hexdigest() == "678d9111986cea3b4d19f88b1b19148343cade0f1d986c1390c8118f0a4f4007"
    )
