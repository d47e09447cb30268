"""The optimiser on a block of a shard: whole, or of some elements by the rule of their group and with their own count of steps.

The kernels make the same bits of an element however a model is cut only in whole paddings (optimizer.py). So of a run of elements the whole
paddings are updated where they lie, without a copy, and the few elements around its ends on copies of a padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from disttrain_trainer.model.flat import Span
from disttrain_trainer.model.parameter_groups import Groups, within
from disttrain_trainer.parameter_server.optimizer import PADDING, Optimizer
from disttrain_trainer.parameter_server.participation import Interval, Missed, to_update


class Segment(NamedTuple):
    """Elements of a part that are updated alike."""

    start: int
    stop: int
    missed: int
    """The updates that they took no part in."""
    group: int


class BlockUpdate:
    """Of one shard. Not thread-safe.

    In its methods block is a slice of the part `number`, in whole paddings; current is that part of the parameters; gradient and
    following are as long as the block, and the gradient is lost. With history the result goes to `following`, which may be the gradient's
    memory; else to `current`. Where there is a 32-bit master it is updated, too.
    """

    def __init__(
        self, spans: Sequence[Span], masters: Sequence[torch.Tensor | None], optimizer: Optimizer, *, history: bool
    ) -> None:
        self._spans = spans
        self._masters = masters
        self._optimizer = optimizer
        self._history = history
        self.groups: Groups = ()
        """Of the model's elements; empty: all are in group 0."""

    def whole(
        self,
        number: int,
        block: slice,
        current: torch.Tensor,
        gradient: torch.Tensor,
        following: torch.Tensor,
        *,
        scale: float,
        rate: float,
        missed: int = 0,
        group: int = 0,
    ) -> None:
        """Updates a block whose elements are all updated alike. No memory is moved for the next version."""
        values, master = current[block], self._masters[number]
        out = following if self._history else values
        into = out if master is None else master[block]
        self._optimizer.step(
            number,
            block,
            values if master is None else into,
            gradient,
            scale=scale,
            out=into,
            missed=missed,
            rate=rate,
            group=group,
        )
        if master is not None:
            out.copy_(into)

    def segments(self, number: int, block: slice, missed: Missed, took: Sequence[Interval]) -> list[Segment]:
        """The elements of a block that take part in an update, in order. took: of the part."""
        span = self._spans[number]
        groups = within(self.groups, vector=number, start=span.start, stop=span.stop)
        return [
            Segment(low, high, count, group)
            for first, last, count in to_update(missed, took, span.length)
            for begin, end, group in groups
            if (low := max(first, begin, block.start)) < (high := min(last, end, block.stop))
        ]

    def some(
        self,
        number: int,
        block: slice,
        segments: Sequence[Segment],
        current: torch.Tensor,
        gradient: torch.Tensor,
        following: torch.Tensor,
        *,
        scale: float,
        rate: float,
    ) -> None:
        """Updates these segments of a block; the other elements stay as they are."""
        whole = []
        for start, stop, missed, group in segments:
            low, high = _up(start), stop // PADDING * PADDING
            if stop == self._spans[number].length:
                high = _up(stop)  # nothing else is in the last padding
            if low < high:
                whole.append(slice(low, high))
                here = slice(low - block.start, high - block.start)
                self.whole(
                    number,
                    whole[-1],
                    current,
                    gradient[here],
                    following[here],
                    scale=scale,
                    rate=rate,
                    missed=missed,
                    group=group,
                )
        edges = [block.start, *(edge for part in whole for edge in (part.start, part.stop)), block.stop]
        for low, high in zip(edges[::2], edges[1::2], strict=True):
            if low < high:
                here = slice(low - block.start, high - block.start)
                ends = slice(low, high)
                self._ends(number, ends, segments, current[ends], gradient[here], following[here], scale, rate)

    def _ends(
        self,
        number: int,
        ends: slice,
        segments: Sequence[Segment],
        current: torch.Tensor,
        gradient: torch.Tensor,
        following: torch.Tensor,
        scale: float,
        rate: float,
    ) -> None:
        """Elements of which no whole padding is of one segment, or that take no part."""
        master = self._masters[number]
        values = current if master is None else master[ends]
        gradient = gradient.clone()  # `following` may be the same memory
        out = following if self._history else current
        if self._history:
            following.copy_(current)
        for first, last, missed, group in segments:
            start, stop = max(first, ends.start), min(last, ends.stop)
            if start >= stop:
                continue
            around = slice(start // PADDING * PADDING, _up(stop))
            inner = slice(start - around.start, stop - around.start)
            rest = slice(around.start - ends.start, around.stop - ends.start)
            state = {slot: tensor[around] for slot, tensor in self._optimizer.state()[number].items()}
            before = {slot: tensor.clone() for slot, tensor in state.items()}
            new, mine = values[rest].clone(), gradient[rest].clone()
            self._optimizer.step(number, around, new, mine, scale=scale, out=new, missed=missed, rate=rate, group=group)
            for slot, old in before.items():  # what lies around the elements is put back
                old[inner] = state[slot][inner]
                state[slot].copy_(old)
            if master is not None:
                values[rest][inner] = new[inner]
            out[rest][inner] = new[inner]


def _up(element: int) -> int:
    """The end of the padding that begins before this element."""
    return -(-element // PADDING) * PADDING
