"""What a graph need not do: nodes that nobody reads, and paddings that the convolution behind them can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from baffle.runtimes.graph import Node


def simplified(nodes: Sequence[Node], output: int) -> tuple[Node, ...]:
    """The nodes that value ``output`` depends on, renumbered so that it is the last. Same results.

    Zeros around a convolution's input become its own padding where nobody else reads the padded image.
    """
    nodes, readers = list(nodes), Counter(i for node in nodes for i in node.inputs)
    for at, node in enumerate(nodes):
        source = node.inputs[0]
        if node.op == "conv2d" and source and nodes[source - 1].op == "pad" and readers[source] == 1:
            before = nodes[source - 1]
            total = tuple(a + b for a, b in zip(node.setting("pad"), before.setting("pad"), strict=True))
            settings = tuple(sorted({**dict(node.settings), "pad": total}.items()))
            nodes[at] = replace(node, inputs=before.inputs, settings=settings)
    needed = {output}
    for number in range(output, 0, -1):
        if number in needed:
            needed.update(nodes[number - 1].inputs)
    places, kept = {0: 0}, list[Node]()
    for number, node in enumerate(nodes[:output], start=1):
        if number in needed:
            kept.append(replace(node, inputs=tuple(places[i] for i in node.inputs)))
            places[number] = len(kept)
    return tuple(kept)
