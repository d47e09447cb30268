"""The sums of gradients over all ranks, in buckets that travel while backward still runs, as in torch's DistributedDataParallel.

Not DDP itself, which refuses a parameter without a gradient, or searches each step's graph for it; which takes no sparse gradient into
dense memory; and which copies every gradient twice. Here a bucket is a part of the flat gradient, and what took part is one more sum:
the order of sums is fixed, so when a rank sends a bucket is its own affair, and one that lacks a gradient is sent after backward.

What breaks in a sum is kept, backward goes on, and `finish` raises BrokenGroup.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Work
from torch.utils.hooks import RemovableHandle

from disttrain_trainer.errors import UserError
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.parallel.shared_buffers import SharedBuffers

POLL_SECONDS = 20e-6
"""Seconds between two looks at whether a GPU has its sums."""
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
"""Bytes, as in DDP: a small one first, so that the network is busy early."""


@dataclass(slots=True, eq=False)
class _Bucket:
    vector: torch.Tensor
    """The part of the flat gradient."""
    numbers: tuple[int, ...]
    """Of its parameters."""
    missing: int = 0
    """Parameters whose gradient is not there yet."""


class Replicated:
    """One rank's gradients, which become the weighted mean over all ranks."""

    def __init__(
        self,
        model: FlatModel,
        *,
        group: AbortableProcessGroup,
        buffers: SharedBuffers | None = None,
        search: bool = False,
    ) -> None:
        """buffers: those of the model, if it has some. search: look through each loss's graph for parameters that take no part in it, so
        that nothing waits for them."""
        self._model = model
        self._group = group
        self.buffers = buffers
        self.reshaped = False
        """Whether a rank's buffers have changed their form in the last step: then they are still each rank's own."""
        self._search = search
        self._error: Exception | None = None
        self._buckets = _cut(model)
        self._bucket_of = {number: bucket for bucket in self._buckets for number in bucket.numbers}
        self._usual: list[int] | None = None
        """How often a parameter's gradient grows in one backward, the most so far; None before the first one. More than once where
        activation checkpointing runs parts of backward by itself."""
        self._times = [0] * len(model.places)
        self._next = 0
        """The bucket that is sent next: in this order on every rank."""
        self._early = False
        self._late: int | None = None
        """A parameter whose gradient grew after it was sent."""
        self._works: list[Work] = []
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(model.trained)
        ]
        self.sent = 0.0
        """When the newest bucket was sent, of time.perf_counter: what follows the last one is waiting."""
        device = model.parameters[0].device
        self.ending = False
        """Whether any rank knew in the last step that the round is to end after it. All ranks say the same of a step."""
        self._notes = torch.zeros(4 + len(model.places), dtype=torch.float64, device=device)
        """Sums over the ranks: weights; ranks whose weight is the loss's own; ranks whose buffers have changed their form; ranks that know
        that the round is to end; and for each parameter, ranks in which it took part."""

    def close(self) -> None:
        """Removes the hooks from the parameters. The object cannot be used after it."""
        for handle in self._handles:
            handle.remove()

    def begin(self, loss: torch.Tensor, *, early: bool = True) -> None:
        """Call it before each backward of this loss. Does not block.

        early: buckets may be sent while backward runs. False when its gradients will not be used.
        """
        self._times = [0] * len(self._times)
        self._early = early and self._usual is not None
        idle = _unused(loss, self._model.trained) if self._search and self._early else frozenset()
        for bucket in self._buckets:
            bucket.missing = (
                len(bucket.numbers) - sum(number in idle for number in bucket.numbers) if idle else len(bucket.numbers)
            )
        self._send_ready()

    def finish(self, *, weight: float, own: bool, alive: Callable[[], bool], ending: bool = False) -> list[bool] | None:
        """Call it after each backward: sends what is left, and blocks until all sums are there. Each `.grad` is then the weighted mean
        over the ranks.

        weight: of this rank's part, such that all are 1 together unless one of them is the loss's own; 0: its gradient is 0.
        ending: this rank knows that the round is to end after this step.

        Returns which parameters took part on any rank, None for all. Raises BrokenGroup when a peer was lost.
        """
        gradients = self._model.gradients()
        took = self._model.took_part
        if self._late is not None:
            raise self._sent_too_early(self._late)
        if any(self._times):
            self._usual = [max(pair) for pair in zip(self._usual or self._times, self._times, strict=True)]
            self._times = [0] * len(self._times)
        for bucket in self._buckets[self._next :]:
            self._send(bucket.vector)
        self._next = 0
        if not weight:
            self._notes.zero_()
        elif took is None:
            self._notes.fill_(1.0)
        else:
            self._notes.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0, *took], dtype=torch.float64, device="cpu"))
        fits = self.buffers is None or self.buffers.pack(gives=dist.get_rank() == 0)
        self._notes[0], self._notes[1], self._notes[2], self._notes[3] = (
            weight,
            float(own),
            float(not fits),
            float(ending),
        )
        self._send(self._notes)
        if self.buffers is not None and self.buffers.bytes.numel():
            self._send(self.buffers.bytes, source=0)
        self.sent = time.perf_counter()
        self._await(alive)
        total, owned, reshaped, ends, *counts = self._notes.tolist()
        self.reshaped, self.ending = bool(reshaped), bool(ends)
        if self.buffers is not None and not reshaped and dist.get_rank():
            self.buffers.take()
        if owned and total:
            for vector in gradients:
                vector.mul_(1 / total)
        if not total:
            return [False] * len(counts)
        return None if all(counts) else [bool(count) for count in counts]

    def _await(self, alive: Callable[[], bool]) -> None:
        if self._error is not None:
            raise BrokenGroup(self._error) from None
        works, self._works = self._works, []
        if self._notes.is_cuda:
            await_sums(works, alive)
        for work in works:
            work.wait()  # of a GPU it is done, and this orders the streams

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        bucket, buckets = self._bucket_of[number], self._buckets
        position = buckets.index(bucket)

        def grown(_: torch.Tensor) -> None:
            times = self._times[number] = self._times[number] + 1
            if not self._early:
                return
            if position < self._next:
                self._late = number
            elif self._usual is not None and times == max(1, self._usual[number]):
                bucket.missing -= 1
                if not bucket.missing:
                    self._send_ready()

        return grown

    def _send_ready(self) -> None:
        if not self._early:
            return
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            bucket = self._buckets[self._next]
            self._next += 1
            for number in bucket.numbers:
                self._model.put_back(number)
            self._send(bucket.vector)

    def _send(self, vector: torch.Tensor, *, source: int | None = None) -> None:
        """Adds the vector up over all ranks, or gives every rank that of `source`."""
        self.sent = time.perf_counter()
        if self._error is not None:
            return
        try:
            work = self._group.all_reduce(vector) if source is None else dist.broadcast(vector, source, async_op=True)
        except (RuntimeError, BrokenGroup) as error:
            self._error = error
            return
        assert work is not None
        self._works.append(work)

    def _sent_too_early(self, number: int) -> UserError:
        name = self._model.places[number].name
        if self._search:
            return UserError(
                f"trainer.findUnusedParameters: parameter {name} got a gradient that the graph of the loss does not show, as with "
                "activation checkpointing of use_reentrant=True: set use_reentrant=False, or findUnusedParameters to false"
            )
        return UserError(
            f"parameter {name} got its gradient in more parts than in the steps before, and those before were sent already: "
            "activation checkpointing with use_reentrant=True does so; set use_reentrant=False"
        )


def await_sums(works: Sequence[Work], alive: Callable[[], bool]) -> None:
    """Blocks until the sums of a GPU are there. Raises BrokenGroup when the round ended before.

    An aborted sum ends as if it were done, with whatever it had added up so far: an optimiser's step that was queued behind it
    would make of it the newest state of all.
    """
    while alive() and not all(work.is_completed() for work in works):
        time.sleep(POLL_SECONDS)
    for work in works:
        if (error := work.exception()) is not None:
            raise BrokenGroup(str(error))
    if not alive():
        raise BrokenGroup("it ended within a step")


def _cut(model: FlatModel) -> list[_Bucket]:
    """Buckets of neighbours, those of the last parameters first: backward comes by them first."""
    vectors = model.gradients()
    buckets: list[tuple[int, list[int]]] = []
    open_buckets: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for number in reversed(range(len(model.places))):
        place = model.places[number]
        if place.vector not in open_buckets:
            open_buckets[place.vector], sizes[place.vector] = [], 0
            buckets.append((place.vector, open_buckets[place.vector]))
        open_buckets[place.vector].append(number)
        sizes[place.vector] += (place.stop - place.start) * vectors[place.vector].itemsize
        if sizes[place.vector] >= (FIRST_BUCKET if len(buckets) == 1 else BUCKET):
            del open_buckets[place.vector]
    # Complete is a bucket with its first parameter: the order in which that happens.
    buckets.sort(key=lambda bucket: -bucket[1][-1])
    return [
        _Bucket(
            vector=vectors[vector][model.places[numbers[-1]].start : model.places[numbers[0]].stop],
            numbers=tuple(numbers),
        )
        for vector, numbers in buckets
    ]


def _unused(loss: torch.Tensor, parameters: list[nn.Parameter]) -> frozenset[int]:
    """Numbers of the parameters that the graph of the loss does not reach."""
    reached: set[int] = set()
    seen = {loss.grad_fn}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if (variable := getattr(node, "variable", None)) is not None:
            reached.add(id(variable))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return frozenset(number for number, parameter in enumerate(parameters) if id(parameter) not in reached)
