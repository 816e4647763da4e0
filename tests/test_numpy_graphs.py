"""Random networks in the NumPy runtime: whatever is cut, fused or done in place, values stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.bundle import Bundle
from baffle.errors import ConfigError
from baffle.perturbations import Layout
from baffle.runtimes import Batch, network, schedule
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.numpy import MODES, NumpyRuntime
from baffle.runtimes.schedule import CACHE, Planner, Work

CONV = (("dilation", (1, 1)), ("groups", 1), ("pad", (0, 0, 0, 0)), ("stride", (1, 1)))
SHAPE = (3, 4, 2)


@st.composite
def graphs(draw):
    """A graph of up to a dozen nodes, most of which read what was just made; and its 1×1 convolutions."""
    nodes, tensors = [], {}
    for number in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from(["conv2d", "activation", "add", "mul", "scale_shift"]))
        back = st.sampled_from([0, 0, 0, 0, 1, 2, 5])  # mostly what was made last
        inputs = tuple(max(0, number - draw(back)) for _ in range(2 if op in ("add", "mul") else 1))
        roles, values = (), ()
        if op == "conv2d":
            tensors[f"w{number}"] = (3, 3, 1, 1)
            roles, values = (("weight", f"w{number}"),), CONV
        elif op == "activation":
            values = (("kind", draw(st.sampled_from(["relu", "tanh", "identity"]))),)
        elif op == "scale_shift":
            values = (("scale", 0.5), ("shift", -0.25))
        nodes.append(Node(op, f"n{number}", inputs, roles, values))
    tensors["head"] = (2, 24)
    nodes.append(Node("flatten", "flat", (len(nodes),)))
    nodes.append(Node("linear", "head", (len(nodes),), (("weight", "head"),)))
    return Graph(SHAPE, tuple(nodes)), Layout(tuple(tensors), tuple(tensors.values()))


def naive(graph, layout, flat, x):
    tensors = dict(zip(layout.names, layout.split(flat.astype(np.float64)), strict=True))
    values = [x.astype(np.float64)]
    for node in graph.nodes:
        a, b = values[node.inputs[0]], values[node.inputs[-1]]
        weight = tensors.get(node.tensor("weight"))
        if node.op == "conv2d":
            values.append(np.einsum("bchw,oc->bohw", a, weight[:, :, 0, 0]))
        elif node.op == "activation":
            kind = node.setting("kind")
            values.append(np.maximum(a, 0) if kind == "relu" else np.tanh(a) if kind == "tanh" else a)
        elif node.op == "linear":
            values.append(a @ weight.T)
        elif node.op == "flatten":
            values.append(a.reshape(len(a), -1))
        elif node.op == "scale_shift":
            values.append(a * 0.5 - 0.25)
        else:
            values.append(a + b if node.op == "add" else a * b)
    return values[-1]


@given(
    graphs(), st.sampled_from(MODES), st.integers(1, 5), st.integers(0, 4), st.integers(9, 24), st.booleans()
)
@settings(max_examples=250, deadline=None)
def test_any_graph_gives_its_values_however_it_is_cut(made, mode, batch, micro, kilobytes, fine):
    graph, layout = made
    rng = np.random.default_rng(batch)
    w = (rng.normal(size=layout.n) / 2).astype(np.float32)
    x = rng.normal(size=(batch, *SHAPE)).astype(np.float32)
    bundle = Bundle(
        "random", layout, {}, bytes(32), SHAPE, ("a", "b"), np.ones(3, np.float32), np.zeros(3, np.float32),
        graph, initial=w,
    )  # fmt: skip
    options = {"mode": mode, "micro_batch": micro or None, "memory": kilobytes << 10}
    with pytest.MonkeyPatch.context() as patch:
        if fine:  # every cut pays, and every layer is made in blocks
            patch.setattr(network, "BLOCK", 4)
            patch.setattr(schedule, "WORTH", 1)
        runtime = NumpyRuntime(bundle, arithmetic="float64", **options)
        parts = [part for part in (runtime._prefix, runtime._network) if part is not None]
        try:
            segments = [part.schedule(batch).segments for part in parts]
        except ConfigError:
            REFUSED.append(options)
            return
        CUTS.append(max(map(len, segments)))
        got = runtime.outputs(w, Batch(x, np.zeros(batch, int)))
    want = naive(graph, layout, w, x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * max(1, np.abs(want).max()))


REFUSED: list[dict] = []
CUTS: list[int] = []


def test_the_random_networks_were_cut_and_mostly_ran():
    if len(CUTS) < 100:
        pytest.skip("runs behind the test above")
    assert max(CUTS) > 2
    assert len(REFUSED) < len(CUTS)


# Schedules


def chain(sizes, weights):
    """Steps one behind the other: value i + 1 of sizes[i], made with weights[i]."""
    return [Work((i,), i + 1, s, False, w, 0) for i, (s, w) in enumerate(zip(sizes, weights, strict=True))]


def test_early_layers_go_together_and_late_ones_alone():
    """Images that do not fit for the whole batch are cut by samples, weights that do not fit by layers."""
    works = chain(
        [1 << 18, 1 << 18, 1 << 12, 1 << 10, 1 << 10, 10], [100, 100, 100, 1 << 19, 1 << 19, 1 << 19]
    )
    plan = Planner(works, 1 << 16, 4, whole=False, micro_batch=None).schedule(32, 8 << 20)
    cuts = [segment.stop for segment in plan.segments]
    assert cuts == [3, 4, 5, 6]
    assert plan.segments[0].micro == 1
    assert [segment.micro for segment in plan.segments[1:]] == [32, 32, 32]
    assert plan.size * 4 < 8 << 20
    whole = Planner(works, 1 << 16, 4, whole=True, micro_batch=None).schedule(32, 8 << 20)
    assert len(whole.segments) == 1
    assert whole.size > plan.size


def test_micro_batches_are_alike():
    works = chain([1 << 14] * 3, [1] * 3)
    for batch, most in ((10, 4), (9, 4), (7, 7)):
        plan = Planner(works, 16, 4, whole=True, micro_batch=most).schedule(batch, 8 << 20)
        assert plan.segments[0].micro == {10: 4, 9: 3, 7: 7}[batch]


def test_values_that_are_needed_at_once_do_not_overlap():
    """A residual: value 1 is read again when 2 and 3 have been made; none may lie on another."""
    works = [
        Work((0,), 1, 64, False, 0, 0),
        Work((1,), 2, 32, False, 0, 0),
        Work((2,), 3, 64, False, 0, 0),
        Work((3, 1), 4, 64, True, 0, 0),
        Work((4,), 5, 16, False, 0, 0),
    ]
    (segment,) = Planner(works, 16, 4, whole=True, micro_batch=2).schedule(2, 1 << 20).segments
    at = segment.offsets
    assert at[4] == at[3]
    for a, b, size_a, size_b in (
        (1, 2, 64, 32),
        (1, 3, 64, 64),
        (2, 3, 32, 64),
        (4, 5, 64, 16),
        (0, 1, 16, 64),
    ):
        assert at[a] + size_a <= at[b] or at[b] + size_b <= at[a], (a, b)
    assert segment.arena == 160


def test_a_budget_that_holds_no_sample_names_what_would():
    works = chain([1000, 1000], [1, 1])
    planner = Planner(works, 10, 4, whole=False, micro_batch=None)
    with pytest.raises(ConfigError, match=r"7000 bytes of memory do not hold .* 1 sample at.*: 8000 would"):
        planner.schedule(1, 7000)
    assert planner.schedule(1, 8000).segments
    with pytest.raises(ConfigError, match=r"8000 bytes .*: 8004 would"):
        planner.schedule(1, 8000, aside=4)


def test_weights_are_made_again_as_seldom_as_what_is_there_allows():
    """A layer made in blocks, once for each micro-batch: its micro-batch grows into what others need."""
    works = [
        Work((0,), 1, 1 << 20, False, 600_000, 0),
        Work((1,), 2, 1 << 13, False, 100, 0),
        Work((2,), 3, 1 << 16, False, 100, 1 << 18),
        Work((3,), 4, 1 << 13, False, 600_000, 0),
        Work((4,), 5, 10, False, 10, 0),
    ]
    plan = Planner(works, 16, 4, whole=False, micro_batch=None).schedule(64, 8 << 20)
    (segment,) = (s for s in plan.segments if s.again)
    assert segment.first > 0
    assert segment.micro > CACHE // (4 * segment.arena)
    assert max(s.size(64, s.micro) for s in plan.segments) == plan.size
