"""When a worker may start an iteration, and which gradients become an update: the consistency models as pure state machines.

No tensors, threads, clocks or I/O: a policy gets the events and returns what to do; `shard_host.py` does it under its lock.

- `Sync` (BSP): step v+1 begins when every slice of step v is in, added in slice order.
- `Async` (Downpour, Dean et al., NIPS 2012; Hogwild, Recht et al., NIPS 2011): each slice is an update at once.
- `BoundedStaleness` (SSP, Ho et al., NIPS 2013): as Async, with a gate at the start of each iteration.

Slices may come in any order, from anybody, more than once, or never. A policy keeps what it has accepted, and each slice counts once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from disttrain.api import spec
from disttrain_trainer.data.index_set import IndexSet


class OutOfStep(Exception):
    """A worker broke the protocol, as with a gradient for a step that has not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What to do when a part is complete."""

    add: tuple[int, ...]
    """Parts whose gradients are to be added to the sum now, in this order."""
    update: bool
    """Then take an optimiser step with the sum, to the next version."""


class Clocks:
    """The iterations that each live worker has completed.

    Invariant: the minimum never decreases. A worker that joins starts at the minimum or later; a worker that leaves no longer counts.
    """

    def __init__(self) -> None:
        self._completed: dict[int, int] = {}
        self.minimum = 0
        """Of the live workers; with none, where the last one stopped."""

    def join(self, worker: int, at: int = 0) -> int:
        """Makes the worker a live one, at `at` or the minimum if that is later. Returns its clock."""
        clock = max(at, self.minimum)
        self._completed[worker] = clock
        self._update()
        return clock

    def leave(self, worker: int) -> None:
        """Forgets the worker; the minimum is that of the others at once."""
        if worker in self._completed:
            del self._completed[worker]
            self._update()

    def complete(self, worker: int, clock: int) -> None:
        """The worker has completed iteration `clock`; idempotent."""
        before = self._completed.get(worker)
        if before is not None and clock >= before:
            self._completed[worker] = clock + 1
            if before == self.minimum:
                self._update()

    def __contains__(self, worker: int) -> bool:
        return worker in self._completed

    def at_minimum(self) -> list[int]:
        """The live workers that all others wait for."""
        return sorted(worker for worker, clock in self._completed.items() if clock == self.minimum)

    def _update(self) -> None:
        self.minimum = min(self._completed.values(), default=self.minimum)


class Consistency(ABC):
    """A policy: which parts are accepted, when they become an update, and which worker may start an iteration."""

    def __init__(self, *, version: int = 0, accepted: IndexSet | None = None) -> None:
        self.version = version
        """Optimiser steps behind the current parameters."""
        self.accepted = IndexSet() if accepted is None else accepted
        """Every part that counts; pushed again, it is ignored."""
        self.late = 0
        """Gradients that came for a part that was accepted already."""
        self.max_staleness_seen = 0
        """Largest lead over the slowest live worker at the start of an iteration."""

    def arrive(self, index: int, *, empty: bool) -> Arrival | None:
        """A part is complete; `empty`: it has no samples, so no gradient. None when it was accepted already. Raises OutOfStep."""
        if index in self.accepted:
            self.late += 1
            return None
        arrival = self._arrive(index, empty)
        self.accepted.add(index)
        self.version += arrival.update
        return arrival

    @property
    def in_version(self) -> IndexSet:
        """The parts whose gradients are in the current version: those that a checkpoint of it lists."""
        return self.accepted

    @property
    @abstractmethod
    def gate(self) -> int:
        """The version that waiting workers wait for: while it is unchanged, none of them may start."""

    @abstractmethod
    def join(self, worker: int, at: int = 0) -> int:
        """A worker begins (again), with clock `at` or later; returns its clock."""

    @abstractmethod
    def leave(self, worker: int) -> None:
        """A worker is idle, ended or lost: no other worker waits for it any more. Idempotent."""

    @abstractmethod
    def complete(self, worker: int, clock: int) -> None:
        """A worker has pushed the gradient of its iteration `clock`."""

    @abstractmethod
    def start(self, worker: int, clock: int, step: int | None) -> bool:
        """Whether the worker may read the parameters now, to start iteration `clock` on `step`. True counts as the start.

        Raises OutOfStep for a worker that did not join.
        """

    @abstractmethod
    def waits_for(self, step: int | None) -> str:
        """What a worker that may not start waits for, for humans."""

    @abstractmethod
    def _arrive(self, index: int, empty: bool) -> Arrival: ...


class Sync(Consistency):
    """Each version is one update with all parts of one step, summed in the order of the parts: bitwise equal for any order of arrival."""

    def __init__(self, *, parts_per_step: int, version: int = 0) -> None:
        super().__init__(
            version=version, accepted=IndexSet.from_intervals([(0, version * parts_per_step)] if version else [])
        )
        self.parts_per_step = parts_per_step
        self._next = version * parts_per_step  # the first part that is not in the sum
        self._early: set[int] = set()

    def _arrive(self, index: int, empty: bool) -> Arrival:
        if index // self.parts_per_step > self.version:
            raise OutOfStep(
                f"part {index} is of step {index // self.parts_per_step}, but this shard is at {self.version}"
            )
        self._early.add(index)
        first = self._next
        while self._next in self._early:
            self._early.remove(self._next)
            self._next += 1
        return Arrival(
            add=tuple(range(first, self._next)), update=self._next == (self.version + 1) * self.parts_per_step
        )

    @property
    def in_version(self) -> IndexSet:
        return IndexSet.from_intervals([(0, self.version * self.parts_per_step)] if self.version else [])

    @property
    def gate(self) -> int:
        return self.version

    def join(self, worker: int, at: int = 0) -> int:
        return self.version

    def leave(self, worker: int) -> None:
        pass

    def complete(self, worker: int, clock: int) -> None:
        pass

    def start(self, worker: int, clock: int, step: int | None) -> bool:
        return step is None or self.version >= step

    def waits_for(self, step: int | None) -> str:
        missing = IndexSet(range(self.version * self.parts_per_step, (self.version + 1) * self.parts_per_step))
        names = [str(index) for index in missing if index not in self.accepted]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"step {self.version} to be complete: part {', '.join(names[:8])}{more} is missing"


class Async(Consistency):
    """Each part is an update at once; no worker waits."""

    def __init__(self, *, version: int = 0, accepted: IndexSet | None = None) -> None:
        super().__init__(version=version, accepted=accepted)
        self._clocks = Clocks()

    def _arrive(self, index: int, empty: bool) -> Arrival:
        return Arrival(add=(index,), update=not empty)

    @property
    def gate(self) -> int:
        return self._clocks.minimum

    def join(self, worker: int, at: int = 0) -> int:
        return self._clocks.join(worker, at)

    def leave(self, worker: int) -> None:
        self._clocks.leave(worker)

    def complete(self, worker: int, clock: int) -> None:
        self._clocks.complete(worker, clock)

    def start(self, worker: int, clock: int, step: int | None) -> bool:
        if worker not in self._clocks:
            raise OutOfStep(f"worker {worker} starts iteration {clock}, but did not join or has left")
        lead = clock - self._clocks.minimum
        if not self._within(lead):
            return False
        self.max_staleness_seen = max(self.max_staleness_seen, lead)
        return True

    def waits_for(self, step: int | None) -> str:
        slowest = ", ".join(map(str, self._clocks.at_minimum()))
        return f"worker {slowest} to complete iteration {self._clocks.minimum}"

    def _within(self, lead: int) -> bool:
        return True


class BoundedStaleness(Async):
    """As Async, but iteration c starts only if c - min <= max_staleness, min over the live workers' completed iterations.

    So a read at clock c contains every update of iterations <= c - max_staleness - 1 of every live worker, and each worker's own.
    An iteration is completed when every shard has it, so the true clock is the least over the shards, and a gate on each shard
    is the gate on the true minimum.
    """

    def __init__(self, *, max_staleness: int, version: int = 0, accepted: IndexSet | None = None) -> None:
        super().__init__(version=version, accepted=accepted)
        self.max_staleness = max_staleness

    def _within(self, lead: int) -> bool:
        return lead <= self.max_staleness


def build(
    strategy: spec.ParameterServerStrategy, *, parts_per_step: int, version: int = 0, accepted: IndexSet | None = None
) -> Consistency:
    """The policy that the job names, going on from a checkpoint's version and accepted parts."""
    match strategy.consistency:
        case spec.Consistency.SYNC:
            return Sync(parts_per_step=parts_per_step, version=version)
        case spec.Consistency.ASYNC:
            return Async(version=version, accepted=accepted)
        case spec.Consistency.BOUNDED_STALENESS:
            return BoundedStaleness(max_staleness=strategy.max_staleness or 0, version=version, accepted=accepted)
