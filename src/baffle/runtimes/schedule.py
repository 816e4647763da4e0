"""In which order a network's steps see a batch, so that activations stay within a budget of memory.

Consecutive steps form a segment. The perturbed weights of a segment are made once a direction; the batch
goes through it in micro-batches, whose activations share one arena; what a segment hands to the next is kept
for the whole batch. So early layers, with few weights and large images, become one segment with a small
micro-batch; late layers, with many weights and small images, go one by one with a large one. Without batch
statistics the loss is a mean over independent samples, so that no cut changes it beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baffle.errors import ConfigError

# Bytes of a micro-batch's activations that still lie in a core's cache: more samples at a time gain nothing
# there, fewer pay for starting operations.
CACHE = 1 << 20
# Bytes that a cut must save to be worth one.
WORTH = 1 << 18


@dataclass(frozen=True)
class Work:
    """What one step reads and writes. Sizes are elements of one sample."""

    inputs: tuple[int, ...]
    output: int
    size: int
    in_place: bool  # the result may take the place of the first input
    weights: int  # elements, held while the segment runs
    again: int  # elements that are made anew for every micro-batch, a block at a time; mostly 0


@dataclass(frozen=True)
class Segment:
    """Steps [first, stop), and where their values lie, in elements of one sample.

    Value ``taken`` is there for the whole batch when the segment starts (0 is the batch itself), ``given``
    when it is done (the last segment's is not kept). All others have a place in the arena.
    """

    first: int
    stop: int
    taken: int
    given: int
    kept: int  # of the two values, as far as they are kept
    arena: int
    offsets: dict[int, int]
    weights: int
    again: int
    micro: int = 0

    def size(self, batch: int, micro: int) -> int:
        """Elements that it needs for a batch, ``micro`` samples at a time."""
        return self.kept * batch + self.arena * micro + self.weights


@dataclass(frozen=True)
class Schedule:
    """Segments for a batch. ``size``: elements of the block that holds all values and weights of each."""

    batch: int
    segments: tuple[Segment, ...]
    size: int


class Planner:
    """Schedules for batches of any size.

    ``whole`` asks for one segment; ``micro_batch`` fixes the micro-batch, None leaves it to the budget.
    """

    def __init__(
        self, works: Sequence[Work], input_size: int, itemsize: int, *, whole: bool, micro_batch: int | None
    ) -> None:
        self.works, self.itemsize, self.micro_batch = tuple(works), itemsize, micro_batch
        self._sizes = {0: input_size} | {work.output: work.size for work in works}
        self._made = {0: -1} | {work.output: at for at, work in enumerate(works)}
        self._last = dict(self._made)
        for at, work in enumerate(works):
            for value in work.inputs:
                self._last[value] = at
        self._last[works[-1].output] = len(works)
        # Where one value crosses, the one that was made last: what nobody reads may have been made since.
        cuts = [at for at in range(1, len(works)) if self._live(at) == [works[at - 1].output]]
        cuts = [0, *([] if whole else cuts), len(works)]
        self._segments = {(i, j): self._segment(i, j) for i in cuts for j in cuts if i < j}

    def schedule(self, batch: int, budget: int, aside: int = 0) -> Schedule:
        """For ``batch`` samples, with activations within ``budget`` bytes, less what is put ``aside`` of it.

        Of all ways to cut, the one whose largest segment is smallest; of those the one that makes the fewest
        weights twice; of those the one with the fewest segments. Raises ConfigError where not one sample (or
        micro-batch, if that is fixed) fits.
        """
        room = (budget - aside) // self.itemsize
        best = {0: (0, 0, 0, 0)}  # end → largest, made again, segments, where the last of them begins
        for (i, j), segment in sorted(self._segments.items(), key=lambda item: (item[0][1], item[0][0])):
            micro = self._micro(segment, batch, room)
            if i in best and micro:
                largest, again, count, _ = best[i]
                size = segment.size(batch, micro) * self.itemsize
                largest = max(largest, -(-size // WORTH))
                again += segment.again * (-(-batch // micro) - 1)
                best[j] = min(best.get(j, (largest, again, count + 1, i)), (largest, again, count + 1, i))
        at = len(self.works)
        if at not in best:
            raise ConfigError(self._too_little(batch, budget, aside))
        chosen: list[Segment] = []
        while at:
            begin = best[at][3]
            segment = self._segments[begin, at]
            # Micro-batches alike, and as many of them as fit least.
            micro = -(-batch // -(-batch // self._micro(segment, batch, room)))
            chosen.insert(0, replace(segment, micro=micro))
            at = begin
        size = max(segment.size(batch, segment.micro) for segment in chosen)
        roomy = [self._roomy(segment, batch, room, size) for segment in chosen]
        return Schedule(batch, tuple(roomy), size)

    # -- inside -------------------------------------------------------------------------------------

    def _live(self, cut: int) -> list[int]:
        """The values that cross from the steps before ``cut`` to those after."""
        return [value for value, made in self._made.items() if made < cut <= self._last[value]]

    def _micro(self, segment: Segment, batch: int, room: int) -> int:
        """Samples at a time; 0 where none fits."""
        left = room - segment.kept * batch
        most = left // segment.arena if segment.arena else (batch if left >= 0 else 0)
        if self.micro_batch is not None:
            wanted = min(self.micro_batch, batch)
            return wanted if most >= wanted else 0
        cached = CACHE // (self.itemsize * segment.arena) if segment.arena else batch
        return max(0, min(most, max(1, cached), batch))

    def _roomy(self, segment: Segment, batch: int, room: int, size: int) -> Segment:
        """With as large a micro-batch as fits into what is there, where that saves making weights again."""
        if not segment.again or not segment.arena or self.micro_batch is not None:
            return segment
        left = min(room, size - segment.weights) - segment.kept * batch
        most = max(segment.micro, min(batch, left // segment.arena))
        return replace(segment, micro=-(-batch // -(-batch // most)))

    def _segment(self, first: int, stop: int) -> Segment:
        steps = self.works[first:stop]
        (taken,) = self._live(first) if first else (0,)
        given = steps[-1].output
        final = stop == len(self.works)
        kept = (self._sizes[taken] if first else 0) + (0 if final else self._sizes[given])
        # Value → (root of those that share a place, first and last step that need it)
        root: dict[int, int] = {}
        spans: dict[int, list[int]] = {}
        if first == 0:
            root[0], spans[0] = 0, [first, self._last[0]]
        for at, work in enumerate(steps, first):
            if work.output == given and not final:
                continue
            source = work.inputs[0]
            if work.in_place and source in root and self._last[source] == at:
                root[work.output] = root[source]
                spans[root[source]][1] = self._last[work.output]
            else:
                root[work.output] = work.output
                spans[work.output] = [at, self._last[work.output]]
        # The largest first, each as low as what is there at the same time allows.
        places: dict[int, int] = {}
        for value in sorted(spans, key=lambda value: -self._sizes[value]):
            size, at = self._sizes[value], 0
            others = sorted(
                (places[other], self._sizes[other])
                for other in places
                if spans[other][0] <= spans[value][1] and spans[value][0] <= spans[other][1]
            )
            for begin, length in others:
                if at + size <= begin:
                    break
                at = max(at, begin + length)
            places[value] = at
        return Segment(
            first,
            stop,
            taken,
            given,
            kept,
            max((places[value] + self._sizes[value] for value in places), default=0),
            {value: places[root[value]] for value in root},
            sum(work.weights for work in steps),
            sum(work.again for work in steps),
        )

    def _too_little(self, batch: int, budget: int, aside: int) -> str:
        count = min(self.micro_batch or 1, batch)
        need = self._segments[0, len(self.works)].arena * count * self.itemsize + aside
        return (
            f"{budget} bytes of memory do not hold the activations of {count} sample{'s' * (count > 1)} "
            f"at a time of a batch of {batch}: {need} would"
        )
