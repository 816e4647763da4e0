"""Networks as plain data: what is read, what is refused by name, and shapes held against torch's own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from baffle.errors import DataError
from baffle.runtimes.graph import ACTIVATIONS, OPERATORS, Graph, Node

CONV = (("dilation", (1, 1)), ("groups", 1), ("pad", (1, 1, 1, 1)), ("stride", (1, 1)))
SMALL = Graph(
    (2, 6, 6),
    (
        Node("conv2d", "first", (0,), (("bias", "b"), ("weight", "w")), CONV),
        Node("activation", "act", (1,), (), (("kind", "leaky_relu"), ("slope", 0.1))),
        Node("add", "sum", (1, 2)),
        Node("global_avg_pool", "pool", (3,), (), (("keep", 0),)),
        Node("linear", "head", (4,), (("weight", "v"),)),
    ),
)
TENSORS = {"w": (4, 2, 3, 3), "b": (4,), "v": (3, 4)}


def test_a_graph_goes_through_json_and_back():
    data = json.loads(json.dumps(SMALL.as_dict()))
    assert Graph.from_dict(data) == SMALL
    assert Graph.from_dict(data).as_dict() == data


def test_shapes_of_all_values():
    assert SMALL.shapes(TENSORS) == ((2, 6, 6), (4, 6, 6), (4, 6, 6), (4, 6, 6), (4,), (3,))
    assert SMALL.tensors() == ("b", "w", "v")


def test_an_operator_that_is_not_covered_is_named_with_its_node():
    data = SMALL.as_dict()
    data["nodes"][2] |= {"op": "attention", "name": "blocks.3.attn"}
    with pytest.raises(DataError, match=r"node 'blocks\.3\.attn': the operator 'attention' is not covered"):
        Graph.from_dict(data)


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (0, {"inputs": [1]}, r"'first' \(conv2d\): its inputs \(1,\) are not values made before it"),
        (0, {"inputs": [-1]}, "not values made before"),
        (0, {"inputs": [False]}, "not values made before"),
        (0, {"inputs": [0, 0]}, "has 2 inputs, 1 are needed"),
        (0, {"tensors": {"bias": "b"}}, "has the tensors bias, which is not what it takes"),
        (0, {"tensors": {"weight": "w", "mean": "b"}}, "not what it takes"),
        (0, {"tensors": {"weight": 3}}, "a tensor's name is a text"),
        (0, {"settings": {"stride": [1, 1]}}, "its settings are dilation, groups, pad, stride"),
        (1, {"settings": {"kind": "relu", "slope": 0.1}}, "its settings are kind"),
        (1, {"settings": {"kind": "mish"}}, "kind = 'mish' cannot be"),
        (1, {"settings": {"kind": "leaky_relu", "slope": float("nan")}}, "slope = nan cannot be"),
        (3, {"settings": {"keep": 2}}, "keep = 2 cannot be"),
        (3, {"settings": {"keep": True}}, "keep = True cannot be"),
        (4, {"name": 5}, "node 4: op and name are texts"),
        (4, {"name": "x" * 301}, "at most 300 letters"),
        (4, {"extra": 1}, "node 4 has the fields"),
    ],
)
def test_what_no_runtime_could_run_is_refused_by_name(place, change, says):
    data = SMALL.as_dict()
    data["nodes"][place] |= change
    with pytest.raises(DataError, match=says):
        Graph.from_dict(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": 1}, "a loss and a list"),
        ({"input_shape": []}, "a graph's input has the shape"),
        ({"input_shape": [0, 3]}, "a graph's input has the shape"),
        ({"input_shape": "abc"}, "a graph has an input_shape"),
        ({"nodes": []}, "a graph of 0 nodes"),
        ({"nodes": {}}, "a list of nodes"),
        ({"more": 1}, "a graph has the fields"),
    ],
)
def test_a_graph_around_its_nodes_is_checked_too(change, says):
    with pytest.raises(DataError, match=says):
        Graph.from_dict(SMALL.as_dict() | change)


def _mutations(value):
    """Every JSON value that differs from ``value`` in one place, by something of another kind."""
    yield from (None, True, -1, 1 << 70, 0.5, "x", [], {}, [[]], [None])
    if isinstance(value, dict):
        for key in value:
            for changed in _mutations(value[key]):
                yield value | {key: changed}
            yield {k: v for k, v in value.items() if k != key}
    if isinstance(value, list):
        for i, item in enumerate(value):
            for changed in _mutations(item):
                yield [*value[:i], changed, *value[i + 1 :]]


def test_reading_is_total():
    """Whatever one place of a graph becomes, it is a graph that runs or a DataError, nothing else."""
    read = 0
    for data in _mutations(SMALL.as_dict()):
        try:
            Graph.from_dict(copy.deepcopy(data)).shapes(TENSORS)
            read += 1
        except DataError:
            pass
    assert read < 60


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists, max_leaves=8))
@settings(max_examples=50, deadline=None)
def test_no_json_value_raises_anything_else(value):
    for data in (value, {"input_shape": value, "loss": value, "nodes": value}):
        with pytest.raises(DataError):
            Graph.from_dict(data)


# Shapes


def one(op, shape, tensors=(), **values):
    node = Node(op, "node", (0,), tensors, tuple(sorted(values.items())))
    return Graph(shape, (node,), "mse")


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_shapes_of_convolutions_and_pools_are_torchs(data):
    def pair(low, high):
        return (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))

    size, kernel, stride, dilation, pad = pair(1, 9), pair(1, 4), pair(1, 3), pair(1, 3), pair(0, 2)
    kind = data.draw(st.sampled_from(["conv2d", "max_pool", "avg_pool"]))
    shape, x = (4, *size), torch.zeros(1, 4, *size)
    around = {"pad": pad * 2, "stride": stride}
    if kind == "conv2d":
        groups = data.draw(st.sampled_from([1, 2, 4]))
        weight = (8, 4 // groups, *kernel)
        graph = one(kind, shape, (("weight", "w"),), dilation=dilation, groups=groups, **around)
        tensors = {"w": weight}

        def run():
            return F.conv2d(x, torch.zeros(weight), None, stride, pad, dilation, groups)
    else:
        tensors = {}
        if kind == "max_pool":
            graph = one(kind, shape, kernel=kernel, dilation=dilation, **around)

            def run():
                return F.max_pool2d(x, kernel, stride, pad, dilation)
        else:
            graph = one(kind, shape, kernel=kernel, count_pad=1, **around)

            def run():
                return F.avg_pool2d(x, kernel, stride, pad)

    try:
        want = tuple(run().shape[1:])
    except RuntimeError:
        want = None
    try:
        got = graph.shapes(tensors)[-1]
    except DataError:
        got = None
    # torch takes paddings up to half of a pool's kernel, a graph any below the kernel.
    if want is not None or kind == "conv2d":
        assert got == want


@pytest.mark.parametrize(
    ("graph", "tensors"),
    [
        (one("linear", (4,), (("weight", "w"),)), {"w": (3, 5)}),
        (one("linear", (1, 4), (("weight", "w"),)), {"w": (3, 4)}),
        (one("linear", (4,), (("bias", "b"), ("weight", "w"))), {"w": (3, 4), "b": (4,)}),
        (one("linear", (4,), (("weight", "w"),)), {}),
        (one("group_norm", (6, 2, 2), groups=4, eps=1e-5), {}),
        (one("group_norm", (6, 2, 2), (("weight", "w"),), groups=2, eps=1e-5), {"w": (2,)}),
        (one("batch_norm", (6, 2, 2), (("mean", "m"), ("var", "v")), eps=1e-5), {"m": (6,), "v": (1,)}),
        (one("layer_norm", (6, 2), dims=3, eps=1e-5), {}),
        (one("layer_norm", (6, 2), (("weight", "w"),), dims=1, eps=1e-5), {"w": (6,)}),
        (one("max_pool", (2, 4), kernel=(2, 2), stride=(2, 2), pad=(0,) * 4, dilation=(1, 1)), {}),
        (one("max_pool", (1, 4, 4), kernel=(2, 2), stride=(2, 2), pad=(2,) * 4, dilation=(1, 1)), {}),
        (one("global_avg_pool", (4,), keep=0), {}),
        (one("conv2d", (3, 4, 4), (("weight", "w"),), **dict(CONV)), {"w": (4, 2, 3, 3)}),
        (one("conv2d", (3, 4, 4), (("weight", "w"),), **dict(CONV)), {"w": (4, 3, 7, 3)}),
        (Graph((2, 3), (Node("flatten", "f", (0,)), Node("add", "sum", (0, 1))), "mse"), {}),
    ],
)
def test_tensors_and_values_that_do_not_fit_are_refused_by_node(graph, tensors):
    with pytest.raises(DataError, match=r"node '(node|sum)' \("):
        graph.shapes(tensors)


def test_logits_are_vectors():
    graph = Graph((1, 4, 4), (Node("scale_shift", "s", (0,), (), (("scale", 1.0), ("shift", 0))),))
    with pytest.raises(DataError, match=r"logits have the shape \(classes,\)"):
        graph.shapes({})


def test_a_channel_of_numbers_goes_with_images():
    nodes = (Node("global_avg_pool", "p", (0,), (), (("keep", 1),)), Node("mul", "m", (1, 0)))
    assert Graph((3, 4, 5), nodes, "mse").shapes({}) == ((3, 4, 5), (3, 1, 1), (3, 4, 5))


def test_the_page_in_the_docstring_has_every_operator():
    from baffle.runtimes import graph

    for name in (*OPERATORS, "leaky_relu"):
        assert name in (graph.__doc__ or "")
    assert len(set(ACTIVATIONS)) == 12
